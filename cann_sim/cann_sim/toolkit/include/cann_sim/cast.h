// Cast: the conversions of Atlas A2 among half, bfloat16_t, float and integers, in the rounding modes each allows.
#pragma once

#include "cann_sim/rounding.h"
#include "cann_sim/vector_unary.h"

namespace cann_sim {

constexpr uint32_t mode_bit(RoundMode mode) {
  return 1u << static_cast<uint32_t>(mode);
}
constexpr uint32_t kNone = mode_bit(RoundMode::CAST_NONE);
constexpr uint32_t kDirected = mode_bit(RoundMode::CAST_RINT) | mode_bit(RoundMode::CAST_FLOOR) |
                               mode_bit(RoundMode::CAST_CEIL) | mode_bit(RoundMode::CAST_ROUND) |
                               mode_bit(RoundMode::CAST_TRUNC);
constexpr uint32_t kOdd = mode_bit(RoundMode::CAST_ODD);

// The modes of a conversion from S to D; none when there is no such conversion.
template <typename D, typename S>
constexpr uint32_t cast_modes() {
  if constexpr (std::is_same_v<S, int8_t> || std::is_same_v<S, uint8_t>) {
    return one_of<D, half> ? kNone : 0;
  } else if constexpr (std::is_same_v<S, int16_t>) {
    return one_of<D, half> ? kDirected | kNone : one_of<D, float> ? kNone : 0;
  } else if constexpr (std::is_same_v<S, half>) {
    return one_of<D, int8_t, uint8_t>    ? kDirected | kNone
           : one_of<D, int16_t, int32_t> ? kDirected
           : one_of<D, float>            ? kNone
                                         : 0;
  } else if constexpr (std::is_same_v<S, bfloat16_t>) {
    return one_of<D, int32_t> ? kDirected : one_of<D, float> ? kNone : 0;
  } else if constexpr (std::is_same_v<S, int32_t>) {
    return one_of<D, int16_t, int64_t> ? kNone : one_of<D, float> ? kDirected | kNone : 0;
  } else if constexpr (std::is_same_v<S, float>) {
    return one_of<D, half>                                           ? kDirected | kOdd | kNone
           : one_of<D, int16_t, bfloat16_t, int32_t, int64_t, float> ? kDirected
                                                                     : 0;
  } else if constexpr (std::is_same_v<S, int64_t>) {
    return one_of<D, int32_t> ? kNone : one_of<D, float> ? kDirected : 0;
  } else {
    return 0;
  }
}

// Nearest (and exact) conversions have no branches, so that the loop over them vectorises.
template <typename D, typename S>
struct CastNearest {
  D operator()(S value) const {
    if constexpr (std::is_integral_v<S> && std::is_integral_v<D>) {
      return saturate<D>(static_cast<int64_t>(value));
    } else if constexpr (std::is_integral_v<S>) {
      return D(static_cast<float>(value));
    } else if constexpr (std::is_integral_v<D>) {
      return saturate<D>(nearest_integral(static_cast<float>(value)));
    } else if constexpr (std::is_same_v<D, S>) {
      return nearest_integral(value);
    } else {
      return D(static_cast<float>(value));
    }
  }
};

template <typename D, typename S>
struct CastRounded {
  RoundMode mode;
  D operator()(S value) const {
    if constexpr (std::is_integral_v<S>) {
      return D(static_cast<float>(round_digits(mode, value, std::is_same_v<D, half> ? 11 : 24)));
    } else if constexpr (std::is_integral_v<D>) {
      return saturate<D>(to_integral(mode, static_cast<float>(value)));
    } else if constexpr (std::is_same_v<D, S>) {
      return to_integral(mode, value);
    } else if constexpr (std::is_same_v<D, half>) {
      return to_half(mode, static_cast<float>(value));
    } else {
      return to_bfloat16(mode, static_cast<float>(value));
    }
  }
};

template <typename T>
constexpr const char* type_name() {
  return std::is_same_v<T, half>         ? "half"
         : std::is_same_v<T, bfloat16_t> ? "bfloat16_t"
         : std::is_same_v<T, float>      ? "float"
         : std::is_same_v<T, int64_t>    ? "int64_t"
         : std::is_same_v<T, int32_t>    ? "int32_t"
         : std::is_same_v<T, int16_t>    ? "int16_t"
         : std::is_same_v<T, int8_t>     ? "int8_t"
                                         : "uint8_t";
}

template <typename D, typename S>
void check_cast(Place where, RoundMode mode) {
  static_assert(!(std::is_same_v<D, half> && std::is_same_v<S, int32_t>),
                "Cast from int32_t to half scales by SetDeqScale, which cann_sim does not model");
  static_assert(cast_modes<D, S>() != 0, "Cast does not convert between these types on Atlas A2");
  static const char* const names[] = {"CAST_NONE",  "CAST_RINT",  "CAST_FLOOR", "CAST_CEIL",
                                      "CAST_ROUND", "CAST_TRUNC", "CAST_ODD"};
  const auto index = static_cast<uint32_t>(mode);
  if (index > 6 || (cast_modes<D, S>() & (1u << index)) == 0) {
    std::string allowed;
    for (uint32_t i = 0; i <= 6; ++i) {
      if ((cast_modes<D, S>() & (1u << i)) != 0) {
        allowed += std::string(allowed.empty() ? "" : ", ") + names[i];
      }
    }
    core().fail("rounding", where,
                format("Cast: %s is no rounding mode from %s to %s, which has %s", index > 6 ? "this" : names[index],
                       type_name<S>(), type_name<D>(), allowed.c_str()));
  }
}

template <typename D, typename S>
void cast(Place where, const Lanes& lanes, RoundMode mode, const AscendC::LocalTensor<D>& dst,
          const AscendC::LocalTensor<S>& src, Strides to, Strides from) {
  const Operand<D> out("dst", dst, to);
  const Operand<S> in("src", src, from);
  constexpr uint32_t modes = cast_modes<D, S>();
  if constexpr (modes != kNone) {
    if (mode != RoundMode::CAST_NONE && mode != RoundMode::CAST_RINT) {
      elementwise("Cast", where, VectorClass::cast, 0, lanes, CastRounded<D, S>{mode}, out, in);
      return;
    }
  }
  elementwise("Cast", where, VectorClass::cast, 0, lanes, CastNearest<D, S>{}, out, in);
}

}  // namespace cann_sim

namespace AscendC {

// A repeat holds as many elements as fit of the wider type; strides are those of each tensor's own blocks.
template <typename T, typename U, bool isSetMask = true, typename M>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode, const M mask,
          const int64_t repeatTime, const UnaryRepeatParams& repeatParams, CANN_SIM_HERE) {
  using namespace ::cann_sim;
  check_cast<T, U>(where, roundMode);
  const Lanes lanes = repeat_lanes<isSetMask, T, U>("Cast", where, mask, repeatTime);
  const Strides to = strides_of("Cast", where, "dst", repeatParams.dstBlkStride, repeatParams.dstRepStride, 65535, 255);
  const Strides from =
      strides_of("Cast", where, "src", repeatParams.srcBlkStride, repeatParams.srcRepStride, 65535, 255);
  cast(where, lanes, roundMode, dst, src, to, from);
}
template <typename T, typename U>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& roundMode, const uint32_t count,
          CANN_SIM_HERE) {
  ::cann_sim::check_cast<T, U>(where, roundMode);
  const auto lanes = ::cann_sim::count_lanes<true, T, U>("Cast", where, count);
  ::cann_sim::cast(where, lanes, roundMode, dst, src, ::cann_sim::contiguous_strides<T>(lanes.width),
                   ::cann_sim::contiguous_strides<U>(lanes.width));
}

}  // namespace AscendC
