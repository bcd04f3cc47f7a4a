// Vector operations with two sources: Add Sub Mul Div Max Min And Or, and MulAddDst and FusedMulAdd, which read dst
// too.
#pragma once

#include "cann_sim/vector_engine.h"
#include "cann_sim/vector_ops.h"

namespace cann_sim {

struct BinaryStrides {
  Strides dst, src0, src1;
};

inline BinaryStrides binary_strides(const char* name, Place where, const AscendC::BinaryRepeatParams& params) {
  return {strides_of(name, where, "dst", params.dstBlkStride, params.dstRepStride, 255, 255),
          strides_of(name, where, "src0", params.src0BlkStride, params.src0RepStride, 255, 255),
          strides_of(name, where, "src1", params.src1BlkStride, params.src1RepStride, 255, 255)};
}

template <typename D, typename S>
BinaryStrides binary_contiguous(uint32_t width) {
  return {contiguous_strides<D>(width), contiguous_strides<S>(width), contiguous_strides<S>(width)};
}

// Add, Sub, Mul, Max and Min may read through src1 what an earlier repeat wrote, when one of the two stays in place.
template <typename T>
uint32_t accumulates(const BinaryStrides& strides, bool documented) {
  const bool in_place = strides.src1.repeat == 0 || strides.dst.repeat == 0;
  return documented && in_place && one_of<T, half, int32_t, float> ? 2 : 0;
}

template <typename Op, typename T>
void binary(const char* name, Place where, VectorClass kind, bool accumulating, const Lanes& lanes, const Op& op,
            const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src0,
            const AscendC::LocalTensor<T>& src1, const BinaryStrides& strides) {
  elementwise(name, where, kind, accumulates<T>(strides, accumulating), lanes, op, Operand<T>("dst", dst, strides.dst),
              Operand<T>("src0", src0, strides.src0), Operand<T>("src1", src1, strides.src1));
}

template <typename D, typename S>
constexpr void require_mul_add_types() {
  static_assert(
      (std::is_same_v<D, S> && one_of<D, half, float>) || (std::is_same_v<D, float> && std::is_same_v<S, half>),
      "Axpy and MulAddDst support half, float, and half into float on Atlas A2");
}

// dst = src0 * src1 + dst
template <typename D, typename S>
void mul_add_dst(Place where, const Lanes& lanes, const AscendC::LocalTensor<D>& dst,
                 const AscendC::LocalTensor<S>& src0, const AscendC::LocalTensor<S>& src1,
                 const BinaryStrides& strides) {
  const Operand<D> to("dst", dst, strides.dst);
  elementwise("MulAddDst", where, VectorClass::fma, 0, lanes, ops::MulAdd{}, to, Operand<S>("src0", src0, strides.src0),
              Operand<S>("src1", src1, strides.src1), to);
}

// dst = src0 * dst + src1
template <typename T>
void fused_mul_add(Place where, const Lanes& lanes, const AscendC::LocalTensor<T>& dst,
                   const AscendC::LocalTensor<T>& src0, const AscendC::LocalTensor<T>& src1,
                   const BinaryStrides& strides) {
  const Operand<T> to("dst", dst, strides.dst);
  elementwise("FusedMulAdd", where, VectorClass::fma, 0, lanes, ops::MulAdd{}, to,
              Operand<T>("src0", src0, strides.src0), to, Operand<T>("src1", src1, strides.src1));
}

}  // namespace cann_sim

namespace AscendC {

// Both forms of an operation: over repeats (the mask is a number of lanes or an array of bits), and over the first
// `count` elements.
#define CANN_SIM_BINARY(NAME, KIND, ACCUMULATES, ...)                                                                 \
  template <typename T, bool isSetMask = true, typename M>                                                            \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, M mask,                \
            const int64_t repeatTime, const BinaryRepeatParams& repeatParams, CANN_SIM_HERE) {                        \
    CANN_SIM_TYPES(NAME, T, __VA_ARGS__);                                                                             \
    const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>(#NAME, where, mask, repeatTime);                        \
    ::cann_sim::binary(#NAME, where, ::cann_sim::VectorClass::KIND, ACCUMULATES, lanes, ::cann_sim::ops::NAME{}, dst, \
                       src0, src1, ::cann_sim::binary_strides(#NAME, where, repeatParams));                           \
  }                                                                                                                   \
  template <typename T, bool isSetMask = true>                                                                        \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, const int32_t& count,  \
            CANN_SIM_HERE) {                                                                                          \
    CANN_SIM_TYPES(NAME, T, __VA_ARGS__);                                                                             \
    const auto lanes = ::cann_sim::count_lanes<isSetMask, T>(#NAME, where, count);                                    \
    ::cann_sim::binary(#NAME, where, ::cann_sim::VectorClass::KIND, ACCUMULATES, lanes, ::cann_sim::ops::NAME{}, dst, \
                       src0, src1, ::cann_sim::binary_contiguous<T, T>(lanes.width));                                 \
  }

CANN_SIM_BINARY(Add, add, true, int16_t, half, int32_t, float)
CANN_SIM_BINARY(Sub, add, true, int16_t, half, int32_t, float)
CANN_SIM_BINARY(Mul, mul, true, int16_t, half, int32_t, float)
CANN_SIM_BINARY(Div, div, false, half, float)
CANN_SIM_BINARY(Max, add, true, int16_t, half, int32_t, float)
CANN_SIM_BINARY(Min, add, true, int16_t, half, int32_t, float)
CANN_SIM_BINARY(And, logic, false, int16_t, uint16_t)
CANN_SIM_BINARY(Or, logic, false, int16_t, uint16_t)

#undef CANN_SIM_BINARY

template <typename T, typename U, bool isSetMask = true, typename M>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, M mask,
               const int64_t repeatTime, const BinaryRepeatParams& repeatParams, CANN_SIM_HERE) {
  ::cann_sim::require_mul_add_types<T, U>();
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T, U>("MulAddDst", where, mask, repeatTime);
  ::cann_sim::mul_add_dst(where, lanes, dst, src0, src1, ::cann_sim::binary_strides("MulAddDst", where, repeatParams));
}
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, const int32_t& count,
               CANN_SIM_HERE) {
  ::cann_sim::require_mul_add_types<T, U>();
  const auto lanes = ::cann_sim::count_lanes<true, T, U>("MulAddDst", where, count);
  ::cann_sim::mul_add_dst(where, lanes, dst, src0, src1, ::cann_sim::binary_contiguous<T, U>(lanes.width));
}

template <typename T, bool isSetMask = true, typename M>
void FusedMulAdd(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, M mask,
                 const int64_t repeatTime, const BinaryRepeatParams& repeatParams, CANN_SIM_HERE) {
  CANN_SIM_TYPES(FusedMulAdd, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("FusedMulAdd", where, mask, repeatTime);
  ::cann_sim::fused_mul_add(where, lanes, dst, src0, src1,
                            ::cann_sim::binary_strides("FusedMulAdd", where, repeatParams));
}
template <typename T, bool isSetMask = true>
void FusedMulAdd(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,
                 const int32_t& count, CANN_SIM_HERE) {
  CANN_SIM_TYPES(FusedMulAdd, T, half, float);
  const auto lanes = ::cann_sim::count_lanes<isSetMask, T>("FusedMulAdd", where, count);
  ::cann_sim::fused_mul_add(where, lanes, dst, src0, src1, ::cann_sim::binary_contiguous<T, T>(lanes.width));
}

}  // namespace AscendC
