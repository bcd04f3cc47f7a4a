// Compare, and Compares (CompareScalar) with a scalar: one result bit for each element, the lowest bit of a byte first.
// On Atlas A2 the mask of the repeat forms has no effect, and results follow one another whatever dst's strides.
#pragma once

#include "cann_sim/vector_binary.h"

namespace cann_sim {

using AscendC::CMPMODE;

template <typename T>
bool compare(CMPMODE mode, T a, T b) {
  const auto x = ops::widen(a), y = ops::widen(b);
  switch (mode) {
    case CMPMODE::LT:
      return x < y;
    case CMPMODE::GT:
      return x > y;
    case CMPMODE::EQ:
      return x == y;
    case CMPMODE::LE:
      return x <= y;
    case CMPMODE::GE:
      return x >= y;
    default:
      return x != y;
  }
}

// `other(repeat, lane)` is what src0 is compared with.
template <typename T, typename U, typename Other>
void compare_lanes(const char* op, Place where, const Lanes& lanes, CMPMODE mode, const AscendC::LocalTensor<U>& dst,
                   const Operand<T>& src0, const Operand<T>* src1, const Other& other) {
  CANN_SIM_TYPES(Compare, T, half, float, int32_t);
  if (std::is_same_v<T, int32_t> && mode != CMPMODE::EQ) {
    core().fail("params", where, format("%s: of int32_t only CMPMODE::EQ is supported", op));
  }
  if (lanes.repeats == 0) {
    return;
  }
  const uint64_t bytes = (uint64_t{lanes.repeats - 1} * lanes.active + lanes.tail) / 8;
  require_alignment(op, where, "dst", dst, kBlockBytes);
  require_range(op, where, "dst", dst, 0, bytes, 1);
  Accesses reads, writes(dst.address(), bytes);
  for (const Operand<T>* src : {&src0, src1}) {
    if (src == nullptr) {
      continue;
    }
    check_operand(op, where, lanes, *src);
    if (dst.address() < src->address() + extent(*src, lanes) && src->address() < dst.address() + bytes) {
      core().fail("overlap", where, format("%s: dst and %s overlap", op, src->name));
    }
    add_accesses(reads, *src, lanes);
  }
  core().vector(op, where, VectorClass::compare, lanes.repeats, sizeof(T), reads, writes);
  auto* to = reinterpret_cast<uint8_t*>(dst.data());
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    for (uint32_t first = 0; first < lanes.active_in(repeat); first += 8) {
      uint32_t byte = 0;
      for (uint32_t bit = 0; bit < 8; ++bit) {
        const T a = *advance(static_cast<const T*>(src0.local.data()), src0.lane_offset(repeat, first + bit));
        byte |= compare(mode, a, other(repeat, first + bit)) ? 1u << bit : 0u;
      }
      *to++ = static_cast<uint8_t>(byte);
    }
  }
}

template <typename T>
Lanes compare_count(const char* op, Place where, uint32_t count) {
  if (uint64_t{count} * sizeof(T) % kRepeatBytes != 0) {
    core().fail("params", where, format("%s: %u elements are no multiple of 256 bytes, which it needs", op, count));
  }
  return count_lanes<true, T>(op, where, count);
}

// The mask is taken for its checks only.
template <typename T, bool isSetMask, typename M>
Lanes compare_repeats(const char* op, Place where, M mask, int64_t repeat) {
  const uint32_t repeats = require_repeat(op, where, repeat);
  if constexpr (isSetMask) {
    take_mask(op, where, mask, repeat_width<T>());
  }
  return prefix_lanes(repeat_width<T>(), repeats, repeat_width<T>());
}

template <typename T, typename U>
void compare_tensors(Place where, const Lanes& lanes, CMPMODE mode, const AscendC::LocalTensor<U>& dst,
                     const Operand<T>& src0, const Operand<T>& src1) {
  compare_lanes("Compare", where, lanes, mode, dst, src0, &src1, [&](uint32_t repeat, uint32_t lane) {
    return *advance(static_cast<const T*>(src1.local.data()), src1.lane_offset(repeat, lane));
  });
}

template <typename T, typename U>
void compare_scalar(const char* op, Place where, const Lanes& lanes, CMPMODE mode, const AscendC::LocalTensor<U>& dst,
                    const Operand<T>& src0, T scalar) {
  CANN_SIM_TYPES(Compares, U, uint8_t);
  compare_lanes(op, where, lanes, mode, dst, src0, static_cast<const Operand<T>*>(nullptr),
                [&](uint32_t, uint32_t) { return scalar; });
}

}  // namespace cann_sim

namespace AscendC {

template <typename T, typename U, bool isSetMask = true, typename M>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE cmpMode,
             const M mask, int64_t repeatTime, const BinaryRepeatParams& repeatParams, CANN_SIM_HERE) {
  CANN_SIM_TYPES(Compare, U, uint8_t, int8_t);
  using namespace ::cann_sim;
  const Lanes lanes = compare_repeats<T, isSetMask>("Compare", where, mask, repeatTime);
  const BinaryStrides strides = binary_strides("Compare", where, repeatParams);
  compare_tensors(where, lanes, cmpMode, dst, Operand<T>("src0", src0, strides.src0),
                  Operand<T>("src1", src1, strides.src1));
}
template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE cmpMode,
             uint32_t count, CANN_SIM_HERE) {
  CANN_SIM_TYPES(Compare, U, uint8_t, int8_t);
  using namespace ::cann_sim;
  const Lanes lanes = compare_count<T>("Compare", where, count);
  const Strides strides = contiguous_strides<T>(lanes.width);
  compare_tensors(where, lanes, cmpMode, dst, Operand<T>("src0", src0, strides), Operand<T>("src1", src1, strides));
}

// CompareScalar is the older name of Compares.
#define CANN_SIM_COMPARE_SCALAR(NAME)                                                                                 \
  template <typename T, typename U, bool isSetMask = true, typename M>                                                \
  void NAME(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar, CMPMODE cmpMode, const M mask, \
            int64_t repeatTime, const UnaryRepeatParams& repeatParams, CANN_SIM_HERE) {                               \
    using namespace ::cann_sim;                                                                                       \
    const Lanes lanes = compare_repeats<T, isSetMask>(#NAME, where, mask, repeatTime);                                \
    const Strides from =                                                                                              \
        strides_of(#NAME, where, "src0", repeatParams.srcBlkStride, repeatParams.srcRepStride, 65535, 255);           \
    compare_scalar(#NAME, where, lanes, cmpMode, dst, Operand<T>("src0", src0, from), src1Scalar);                    \
  }                                                                                                                   \
  template <typename T, typename U>                                                                                   \
  void NAME(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T src1Scalar, CMPMODE cmpMode,               \
            uint32_t count, CANN_SIM_HERE) {                                                                          \
    using namespace ::cann_sim;                                                                                       \
    const Lanes lanes = compare_count<T>(#NAME, where, count);                                                        \
    compare_scalar(#NAME, where, lanes, cmpMode, dst, Operand<T>("src0", src0, contiguous_strides<T>(lanes.width)),   \
                   src1Scalar);                                                                                       \
  }

CANN_SIM_COMPARE_SCALAR(Compares)
CANN_SIM_COMPARE_SCALAR(CompareScalar)

#undef CANN_SIM_COMPARE_SCALAR

}  // namespace AscendC
