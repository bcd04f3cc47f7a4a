// Vector operations with a scalar: Adds Muls Maxs Mins LeakyRelu ShiftLeft ShiftRight, and Axpy, which reads dst too.
#pragma once

#include "cann_sim/vector_binary.h"
#include "cann_sim/vector_unary.h"

namespace cann_sim::ops {

template <typename T>
using Adds = WithScalar<Add, T>;
template <typename T>
using Muls = WithScalar<Mul, T>;
template <typename T>
using Maxs = WithScalar<Max, T>;
template <typename T>
using Mins = WithScalar<Min, T>;

template <typename S>
struct Axpy {
  S scalar;
  template <typename D>
  D operator()(S a, D c) const {
    return MulAdd{}(a, scalar, c);
  }
};

}  // namespace cann_sim::ops

namespace cann_sim {

// An operation with its scalar; the distance of a shift must be one.
template <typename Op, typename T>
Op scalar_op(const char* name, Place where, T scalar) {
  if constexpr (one_of<Op, ops::ShiftLeft<T>, ops::ShiftRight<T>>) {
    const auto distance = static_cast<int64_t>(scalar);
    if (distance < 0 || distance > static_cast<int64_t>(8 * sizeof(T))) {
      core().fail("params", where,
                  format("%s: the distance is %lld, allowed are 0 to %u", name, static_cast<long long>(distance),
                         static_cast<unsigned>(8 * sizeof(T))));
    }
    Op op{};
    op.distance = static_cast<uint32_t>(distance);
    return op;
  } else {
    return Op{scalar};
  }
}

template <typename D, typename S>
void axpy(Place where, const Lanes& lanes, const AscendC::LocalTensor<D>& dst, const AscendC::LocalTensor<S>& src,
          S scalar, Strides to, Strides from) {
  const Operand<D> out("dst", dst, to);
  elementwise("Axpy", where, VectorClass::fma, 0, lanes, ops::Axpy<S>{scalar}, out, Operand<S>("src", src, from), out);
}

}  // namespace cann_sim

namespace AscendC {

// Both forms, each with the scalar as T and, as on the device, as a U that has to be T: a scalar of another type does
// not deduce unless T is given.
#define CANN_SIM_SCALAR_FORMS(NAME, KIND, SCALAR, PARAMETERS, ...)                                                 \
  template <CANN_SIM_UNPACK PARAMETERS, typename M>                                                                \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const SCALAR& scalarValue, M mask,               \
            const int64_t repeatTime, const UnaryRepeatParams& repeatParams, CANN_SIM_HERE) {                      \
    CANN_SIM_TYPES(NAME, T, __VA_ARGS__);                                                                          \
    const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>(#NAME, where, mask, repeatTime);                     \
    const auto op = ::cann_sim::scalar_op<::cann_sim::ops::NAME<T>>(#NAME, where, scalarValue);                    \
    ::cann_sim::unary_repeat(#NAME, where, ::cann_sim::VectorClass::KIND, lanes, op, dst, src, repeatParams);      \
  }                                                                                                                \
  template <CANN_SIM_UNPACK PARAMETERS>                                                                            \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const SCALAR& scalarValue, const int32_t& count, \
            CANN_SIM_HERE) {                                                                                       \
    CANN_SIM_TYPES(NAME, T, __VA_ARGS__);                                                                          \
    const auto lanes = ::cann_sim::count_lanes<isSetMask, T>(#NAME, where, count);                                 \
    const auto op = ::cann_sim::scalar_op<::cann_sim::ops::NAME<T>>(#NAME, where, scalarValue);                    \
    ::cann_sim::unary_count(#NAME, where, ::cann_sim::VectorClass::KIND, lanes, op, dst, src);                     \
  }
#define CANN_SIM_UNPACK(...) __VA_ARGS__
#define CANN_SIM_SCALAR(NAME, KIND, ...)                                                                    \
  CANN_SIM_SCALAR_FORMS(NAME, KIND, T, (typename T, bool isSetMask = true), __VA_ARGS__)                    \
  CANN_SIM_SCALAR_FORMS(                                                                                    \
      NAME, KIND, U,                                                                                        \
      (typename T, typename U, bool isSetMask = true, std::enable_if_t<std::is_same_v<T, U>, bool> = true), \
      __VA_ARGS__)

CANN_SIM_SCALAR(Adds, add, int16_t, half, int32_t, float)
CANN_SIM_SCALAR(Muls, mul, int16_t, half, int32_t, float)
CANN_SIM_SCALAR(Maxs, add, int16_t, half, int32_t, float)
CANN_SIM_SCALAR(Mins, add, int16_t, half, int32_t, float)
CANN_SIM_SCALAR(LeakyRelu, mul, half, float)
CANN_SIM_SCALAR(ShiftLeft, logic, int16_t, uint16_t, int32_t, uint32_t)

#undef CANN_SIM_SCALAR
#undef CANN_SIM_UNPACK
#undef CANN_SIM_SCALAR_FORMS

template <typename T, bool isSetMask = true, typename M>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue, M mask,
                const int64_t repeatTime, const UnaryRepeatParams& repeatParams, bool roundEn = false, CANN_SIM_HERE) {
  CANN_SIM_TYPES(ShiftRight, T, int16_t, uint16_t, int32_t, uint32_t);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("ShiftRight", where, mask, repeatTime);
  auto op = ::cann_sim::scalar_op<::cann_sim::ops::ShiftRight<T>>("ShiftRight", where, scalarValue);
  op.round = roundEn && std::is_signed_v<T>;
  ::cann_sim::unary_repeat("ShiftRight", where, ::cann_sim::VectorClass::logic, lanes, op, dst, src, repeatParams);
}
template <typename T, bool isSetMask = true>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalarValue, const int32_t& count,
                CANN_SIM_HERE) {
  CANN_SIM_TYPES(ShiftRight, T, int16_t, uint16_t, int32_t, uint32_t);
  const auto lanes = ::cann_sim::count_lanes<isSetMask, T>("ShiftRight", where, count);
  const auto op = ::cann_sim::scalar_op<::cann_sim::ops::ShiftRight<T>>("ShiftRight", where, scalarValue);
  ::cann_sim::unary_count("ShiftRight", where, ::cann_sim::VectorClass::logic, lanes, op, dst, src);
}

template <typename T, typename U, bool isSetMask = true, typename M>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, M mask, const int64_t repeatTime,
          const UnaryRepeatParams& repeatParams, CANN_SIM_HERE) {
  using namespace ::cann_sim;
  require_mul_add_types<T, U>();
  const Lanes lanes = repeat_lanes<isSetMask, T, U>("Axpy", where, mask, repeatTime);
  const Strides to = strides_of("Axpy", where, "dst", repeatParams.dstBlkStride, repeatParams.dstRepStride, 65535, 255);
  const Strides from =
      strides_of("Axpy", where, "src", repeatParams.srcBlkStride, repeatParams.srcRepStride, 65535, 255);
  axpy(where, lanes, dst, src, scalarValue, to, from);
}
template <typename T, typename U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalarValue, const int32_t& count,
          CANN_SIM_HERE) {
  ::cann_sim::require_mul_add_types<T, U>();
  const auto lanes = ::cann_sim::count_lanes<true, T, U>("Axpy", where, count);
  ::cann_sim::axpy(where, lanes, dst, src, scalarValue, ::cann_sim::contiguous_strides<T>(lanes.width),
                   ::cann_sim::contiguous_strides<U>(lanes.width));
}

}  // namespace AscendC
