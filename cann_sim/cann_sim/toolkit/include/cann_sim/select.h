// Select: src0 where a bit of selMask is set, else src1, a tensor or a scalar. Bits: mode VSEL_CMPMASK_SPR uses those
// of the first repeat for all, the other two go on from repeat to repeat; the lowest bit of a byte comes first.
#pragma once

#include "cann_sim/vector_binary.h"

namespace cann_sim {

using AscendC::SELMODE;

// `other(repeat, lane)` is what is taken where the bit is clear.
template <typename T, typename U, typename Other>
void select_lanes(Place where, const Lanes& lanes, SELMODE mode, const Operand<T>& dst,
                  const AscendC::LocalTensor<U>& bits, const Operand<T>& src0, const Operand<T>* src1,
                  const Other& other) {
  CANN_SIM_TYPES(Select, T, half, float);
  CANN_SIM_TYPES(Select, U, uint8_t, uint16_t, uint32_t, uint64_t);
  if (lanes.repeats == 0) {
    return;
  }
  const bool same_bits = mode == SELMODE::VSEL_CMPMASK_SPR;
  const uint32_t last = lanes.prefix ? lanes.tail : lanes.width;
  const uint64_t bit_count =
      same_bits ? (lanes.repeats > 1 ? lanes.width : last) : uint64_t{lanes.repeats - 1} * lanes.width + last;
  const uint64_t bytes = (bit_count + 7) / 8;
  require_alignment("Select", where, "selMask", bits, kBlockBytes);
  require_range("Select", where, "selMask", bits, 0, bytes, 1);
  check_dst("Select", where, lanes, dst);
  Accesses reads(bits.address(), bytes), writes;
  add_accesses(writes, dst, lanes);
  if (bits.address() < dst.address() + extent(dst, lanes) && dst.address() < bits.address() + bytes) {
    core().fail("overlap", where, "Select: dst and selMask overlap");
  }
  for (const Operand<T>* src : {&src0, src1}) {
    if (src != nullptr) {
      check_operand("Select", where, lanes, *src);
      check_overlap("Select", where, lanes, dst, *src, false);
      add_accesses(reads, *src, lanes);
    }
  }
  core().vector("Select", where, VectorClass::select, lanes.repeats, sizeof(T), reads, writes);
  const auto* mask = reinterpret_cast<const uint8_t*>(bits.data());
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    for (uint32_t lane = 0; lane < lanes.width; ++lane) {
      if (lanes.prefix ? lane < lanes.active_in(repeat) : lanes.on(lane)) {
        const uint32_t bit = (same_bits ? 0 : repeat * lanes.width) + lane;
        const T a = *advance(static_cast<const T*>(src0.local.data()), src0.lane_offset(repeat, lane));
        const T b = other(repeat, lane);
        *advance(dst.local.data(), dst.lane_offset(repeat, lane)) = ((mask[bit / 8] >> (bit % 8)) & 1) != 0 ? a : b;
      }
    }
  }
}

template <typename T, typename U>
void select_tensors(Place where, const Lanes& lanes, SELMODE mode, const AscendC::LocalTensor<T>& dst,
                    const AscendC::LocalTensor<U>& bits, const AscendC::LocalTensor<T>& src0,
                    const AscendC::LocalTensor<T>& src1, const BinaryStrides& strides) {
  if (mode != SELMODE::VSEL_CMPMASK_SPR && mode != SELMODE::VSEL_TENSOR_TENSOR_MODE) {
    core().fail("params", where, "Select: with two tensors the mode is VSEL_CMPMASK_SPR or VSEL_TENSOR_TENSOR_MODE");
  }
  const Operand<T> other("src1", src1, strides.src1);
  select_lanes(where, lanes, mode, Operand<T>("dst", dst, strides.dst), bits, Operand<T>("src0", src0, strides.src0),
               &other, [&](uint32_t repeat, uint32_t lane) {
                 return *advance(static_cast<const T*>(src1.data()), other.lane_offset(repeat, lane));
               });
}

template <typename T, typename U>
void select_scalar(Place where, const Lanes& lanes, SELMODE mode, const AscendC::LocalTensor<T>& dst,
                   const AscendC::LocalTensor<U>& bits, const AscendC::LocalTensor<T>& src0, T scalar,
                   const BinaryStrides& strides) {
  if (mode != SELMODE::VSEL_TENSOR_SCALAR_MODE) {
    core().fail("params", where, "Select: with a scalar the mode is VSEL_TENSOR_SCALAR_MODE");
  }
  select_lanes(where, lanes, mode, Operand<T>("dst", dst, strides.dst), bits, Operand<T>("src0", src0, strides.src0),
               static_cast<const Operand<T>*>(nullptr), [&](uint32_t, uint32_t) { return scalar; });
}

}  // namespace cann_sim

namespace AscendC {

template <typename T, typename U, bool isSetMask = true, typename M>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE selMode, M mask, int64_t repeatTime,
            const BinaryRepeatParams& repeatParams, CANN_SIM_HERE) {
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("Select", where, mask, repeatTime);
  ::cann_sim::select_tensors(where, lanes, selMode, dst, selMask, src0, src1,
                             ::cann_sim::binary_strides("Select", where, repeatParams));
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE selMode, uint32_t count, CANN_SIM_HERE) {
  const auto lanes = ::cann_sim::count_lanes<true, T>("Select", where, count);
  ::cann_sim::select_tensors(where, lanes, selMode, dst, selMask, src0, src1,
                             ::cann_sim::binary_contiguous<T, T>(lanes.width));
}
template <typename T, typename U, bool isSetMask = true, typename M>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, T src1,
            SELMODE selMode, M mask, int64_t repeatTime, const BinaryRepeatParams& repeatParams, CANN_SIM_HERE) {
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("Select", where, mask, repeatTime);
  ::cann_sim::select_scalar(where, lanes, selMode, dst, selMask, src0, src1,
                            ::cann_sim::binary_strides("Select", where, repeatParams));
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& selMask, const LocalTensor<T>& src0, T src1,
            SELMODE selMode, uint32_t count, CANN_SIM_HERE) {
  const auto lanes = ::cann_sim::count_lanes<true, T>("Select", where, count);
  ::cann_sim::select_scalar(where, lanes, selMode, dst, selMask, src0, src1,
                            ::cann_sim::binary_contiguous<T, T>(lanes.width));
}

}  // namespace AscendC
