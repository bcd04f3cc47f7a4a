// Vector operations that move or make data: Duplicate, CreateVecIndex, Brcb, and Copy within the unified buffer.
#pragma once

#include "cann_sim/vector_engine.h"

namespace cann_sim {

template <typename T>
struct Constant {
  T value;
  T operator()() const { return value; }
};

template <typename T>
struct Identity {
  T operator()(T value) const { return value; }
};

template <typename T>
void duplicate(Place where, const Lanes& lanes, const AscendC::LocalTensor<T>& dst, T value, Strides strides) {
  elementwise("Duplicate", where, VectorClass::move, 0, lanes, Constant<T>{value}, Operand<T>("dst", dst, strides));
}

// Lane after lane the next number; masked-off lanes count too.
template <typename T>
void create_index(Place where, const Lanes& lanes, const AscendC::LocalTensor<T>& dst, T first, Strides strides) {
  if (lanes.repeats == 0) {
    return;
  }
  const Operand<T> to("dst", dst, strides);
  begin_vector("CreateVecIndex", where, VectorClass::move, lanes, to, nullptr, 0, 0);
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    for (uint32_t lane = 0; lane < lanes.width; ++lane) {
      if (lanes.prefix ? lane < lanes.active_in(repeat) : lanes.on(lane)) {
        const uint32_t index = repeat * lanes.width + lane;
        T value;
        if constexpr (std::is_integral_v<T>) {
          value = static_cast<T>(static_cast<uint32_t>(first) + index);
        } else {
          value = T(float(first) + static_cast<float>(index));
        }
        *advance(dst.data(), to.lane_offset(repeat, lane)) = value;
      }
    }
  }
}

}  // namespace cann_sim

namespace AscendC {

#define CANN_SIM_MOVE_TYPES(NAME, T) \
  CANN_SIM_TYPES(NAME, T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float)

template <typename T, bool isSetMask = true, typename M>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, M mask, const int64_t repeatTime,
               const int64_t dstBlockStride, const int64_t dstRepeatStride, CANN_SIM_HERE) {
  CANN_SIM_MOVE_TYPES(Duplicate, T);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("Duplicate", where, mask, repeatTime);
  ::cann_sim::duplicate(where, lanes, dst, scalarValue,
                        ::cann_sim::strides_of("Duplicate", where, "dst", dstBlockStride, dstRepeatStride, 65535, 255));
}
template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& scalarValue, const int32_t& count, CANN_SIM_HERE) {
  CANN_SIM_MOVE_TYPES(Duplicate, T);
  const auto lanes = ::cann_sim::count_lanes<true, T>("Duplicate", where, count);
  ::cann_sim::duplicate(where, lanes, dst, scalarValue, ::cann_sim::contiguous_strides<T>(lanes.width));
}

template <typename T, typename M>
void CreateVecIndex(const LocalTensor<T>& dst, const T& firstValue, M mask, const int64_t repeatTime,
                    const int64_t dstBlkStride, const int64_t dstRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(CreateVecIndex, T, int16_t, half, int32_t, float);
  const auto lanes = ::cann_sim::repeat_lanes<true, T>("CreateVecIndex", where, mask, repeatTime);
  ::cann_sim::create_index(
      where, lanes, dst, firstValue,
      ::cann_sim::strides_of("CreateVecIndex", where, "dst", dstBlkStride, dstRepStride, 65535, 255));
}
template <typename T>
void CreateVecIndex(const LocalTensor<T>& dst, const T& firstValue, uint32_t count, CANN_SIM_HERE) {
  CANN_SIM_TYPES(CreateVecIndex, T, int16_t, half, int32_t, float);
  const auto lanes = ::cann_sim::count_lanes<true, T>("CreateVecIndex", where, count);
  ::cann_sim::create_index(where, lanes, dst, firstValue, ::cann_sim::contiguous_strides<T>(lanes.width));
}

// Each of 8 elements a repeat fills one block of 32 bytes.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int64_t repeatTime,
          const BrcbRepeatParams& repeatParams, CANN_SIM_HERE) {
  CANN_SIM_MOVE_TYPES(Brcb, T);
  using namespace ::cann_sim;
  const uint32_t repeats = require_repeat("Brcb", where, repeatTime);
  const Strides strides =
      strides_of("Brcb", where, "dst", repeatParams.dstBlkStride, repeatParams.dstRepStride, 65535, 65535);
  const Lanes lanes = prefix_lanes(repeat_width<T>(), repeats, repeat_width<T>());
  if (repeats == 0) {
    return;
  }
  const Operand<T> to("dst", dst, strides);
  check_dst("Brcb", where, lanes, to);
  require_alignment("Brcb", where, "src", src, kBlockBytes);
  const uint64_t read = uint64_t{repeats} * 8 * sizeof(T);
  require_range("Brcb", where, "src", src, 0, read, sizeof(T));
  if (dst.address() < src.address() + read && src.address() < dst.address() + extent(to, lanes)) {
    core().fail("overlap", where, "Brcb: dst and src overlap, which it does not support");
  }
  Accesses reads(src.address(), read), writes;
  add_accesses(writes, to, lanes);
  core().vector("Brcb", where, VectorClass::move, repeats, sizeof(T), reads, writes);
  for (uint32_t i = 0; i < repeats * 8; ++i) {
    const T value = src.data()[i];
    T* block = advance(dst.data(), to.block_offset(i / 8, i % 8));
    for (uint32_t lane = 0; lane < kBlockBytes / sizeof(T); ++lane) {
      block[lane] = value;
    }
  }
}

// In counter mode the mask is the number of elements of each repeat, and repeatTime counts.
template <typename T, bool isSetMask = true, typename M>
void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const M mask, const int64_t repeatTime,
          const CopyRepeatParams& repeatParams, CANN_SIM_HERE) {
  CANN_SIM_MOVE_TYPES(Copy, T);
  using namespace ::cann_sim;
  Lanes lanes = repeat_lanes<isSetMask, T>("Copy", where, mask, repeatTime);
  if (core().mask.counter && lanes.repeats != 0) {
    const auto count = static_cast<uint32_t>(core().mask.low);
    lanes = prefix_lanes(count, static_cast<uint32_t>(repeatTime), count);
  }
  const Operand<T> to(
      "dst", dst, strides_of("Copy", where, "dst", repeatParams.dstStride, repeatParams.dstRepeatSize, 65535, 4095));
  const Operand<T> from(
      "src", src, strides_of("Copy", where, "src", repeatParams.srcStride, repeatParams.srcRepeatSize, 65535, 4095));
  elementwise("Copy", where, VectorClass::move, 0, lanes, Identity<T>{}, to, from);
}

#undef CANN_SIM_MOVE_TYPES

}  // namespace AscendC
