// Vector operations with one source: Exp Ln Abs Reciprocal Sqrt Rsqrt Relu Not.
#pragma once

#include "cann_sim/vector_engine.h"
#include "cann_sim/vector_ops.h"

namespace cann_sim {

template <typename Op, typename D, typename S>
void unary_count(const char* name, Place where, VectorClass kind, const Lanes& lanes, const Op& op,
                 const AscendC::LocalTensor<D>& dst, const AscendC::LocalTensor<S>& src) {
  elementwise(name, where, kind, 0, lanes, op, Operand<D>("dst", dst, contiguous_strides<D>(lanes.width)),
              Operand<S>("src", src, contiguous_strides<S>(lanes.width)));
}

template <typename Op, typename D, typename S>
void unary_repeat(const char* name, Place where, VectorClass kind, const Lanes& lanes, const Op& op,
                  const AscendC::LocalTensor<D>& dst, const AscendC::LocalTensor<S>& src,
                  const AscendC::UnaryRepeatParams& params) {
  const Strides to = strides_of(name, where, "dst", params.dstBlkStride, params.dstRepStride, 65535, 255);
  const Strides from = strides_of(name, where, "src", params.srcBlkStride, params.srcRepStride, 65535, 255);
  elementwise(name, where, kind, 0, lanes, op, Operand<D>("dst", dst, to), Operand<S>("src", src, from));
}

}  // namespace cann_sim

namespace AscendC {

// Both forms of an operation: over repeats (the mask is a number of lanes or an array of bits), and over the first
// `count` elements.
#define CANN_SIM_UNARY(NAME, KIND, ...)                                                                             \
  template <typename T, bool isSetMask = true, typename M>                                                          \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, M mask, const int64_t repeatTime,                 \
            const UnaryRepeatParams& repeatParams, CANN_SIM_HERE) {                                                 \
    CANN_SIM_TYPES(NAME, T, __VA_ARGS__);                                                                           \
    const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>(#NAME, where, mask, repeatTime);                      \
    ::cann_sim::unary_repeat(#NAME, where, ::cann_sim::VectorClass::KIND, lanes, ::cann_sim::ops::NAME{}, dst, src, \
                             repeatParams);                                                                         \
  }                                                                                                                 \
  template <typename T, bool isSetMask = true>                                                                      \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, CANN_SIM_HERE) {            \
    CANN_SIM_TYPES(NAME, T, __VA_ARGS__);                                                                           \
    const auto lanes = ::cann_sim::count_lanes<isSetMask, T>(#NAME, where, count);                                  \
    ::cann_sim::unary_count(#NAME, where, ::cann_sim::VectorClass::KIND, lanes, ::cann_sim::ops::NAME{}, dst, src); \
  }

CANN_SIM_UNARY(Exp, exp, half, float)
CANN_SIM_UNARY(Ln, ln, half, float)
CANN_SIM_UNARY(Abs, add, half, float)
CANN_SIM_UNARY(Reciprocal, div, half, float)
CANN_SIM_UNARY(Sqrt, sqrt, half, float)
CANN_SIM_UNARY(Rsqrt, sqrt, half, float)
CANN_SIM_UNARY(Relu, add, half, float, int32_t)
CANN_SIM_UNARY(Not, logic, int16_t, uint16_t)

#undef CANN_SIM_UNARY

}  // namespace AscendC
