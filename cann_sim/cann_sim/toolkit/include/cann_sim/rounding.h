// Conversions between number types in each rounding mode, exact for every input. Out of range: floating results
// become infinite as IEEE has it (the device's non-saturating mode), integers take the nearest value, NaN becomes 0.
#pragma once

#include <cmath>
#include <limits>

#include "cann_sim/half.h"
#include "cann_sim/vector_params.h"

namespace cann_sim {

using AscendC::RoundMode;

// Whether the kept part of a number grows in magnitude, when `rest` of what is cut off is not nothing and `middle`
// stands for one half of the last place kept.
inline bool rounds_away(RoundMode mode, bool negative, bool odd, uint64_t rest, uint64_t middle) {
  switch (mode) {
    case RoundMode::CAST_NONE:
    case RoundMode::CAST_RINT:
      return rest > middle || (rest == middle && odd);
    case RoundMode::CAST_FLOOR:
      return negative && rest != 0;
    case RoundMode::CAST_CEIL:
      return !negative && rest != 0;
    case RoundMode::CAST_ROUND:
      return rest >= middle;
    case RoundMode::CAST_TRUNC:
      return false;
    case RoundMode::CAST_ODD:
      return rest != 0 && !odd;
  }
  return false;
}

// Cuts `shift` bits off a magnitude.
inline uint64_t round_shift(RoundMode mode, bool negative, uint64_t magnitude, uint32_t shift) {
  if (shift == 0) {
    return magnitude;
  }
  if (shift > 62) {  // only subnormal results shift that far, and what is cut off is less than a half
    return rounds_away(mode, negative, false, magnitude != 0 ? 1 : 0, 2) ? 1 : 0;
  }
  const uint64_t kept = magnitude >> shift, rest = magnitude & ((uint64_t{1} << shift) - 1);
  return kept + (rounds_away(mode, negative, (kept & 1) != 0, rest, uint64_t{1} << (shift - 1)) ? 1 : 0);
}

inline half to_half(RoundMode mode, float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const bool negative = sign != 0;
  if (magnitude >= 0x7f800000u) {
    return half(value);
  }
  uint64_t result;
  if (magnitude >= 0x38800000u) {  // 2^-14: normal in half
    result = round_shift(mode, negative, magnitude - (112u << 23), 13);
  } else {
    const uint32_t exponent = magnitude >> 23;
    const uint32_t significand = (magnitude & 0x7fffffu) | (exponent != 0 ? 0x800000u : 0);
    result = round_shift(mode, negative, significand, 126 - (exponent != 0 ? exponent : 1));
  }
  if (magnitude >= 0x47800000u) {  // 2^16 and more: beyond the largest half by more than a rounding
    const bool infinite = rounds_away(mode, negative, true, 3, 2);
    result = infinite ? 0x7c00u : 0x7bffu;
  }
  return half::from_bits(static_cast<uint32_t>(result) | sign);
}

inline bfloat16_t to_bfloat16(RoundMode mode, float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) {
    return bfloat16_t(value);
  }
  const bool negative = (bits >> 31) != 0;
  const uint32_t result = static_cast<uint32_t>(round_shift(mode, negative, magnitude, 16));
  return bfloat16_t::from_bits(result | (negative ? 0x8000u : 0));
}

// The nearest integral value, ties to even, without a branch or a call: adding 2^23 leaves no bits of a fraction.
inline float nearest_integral(float value) {
  const float magnitude = std::fabs(value);
  const float rounded = magnitude < 0x1p23f ? (magnitude + 0x1p23f) - 0x1p23f : magnitude;
  return std::copysign(rounded, value);
}

// To an integral value, still as float.
inline float to_integral(RoundMode mode, float value) {
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(value);
    case RoundMode::CAST_CEIL:
      return std::ceil(value);
    case RoundMode::CAST_ROUND:
      return std::round(value);
    case RoundMode::CAST_TRUNC:
      return std::trunc(value);
    default:
      return nearest_integral(value);
  }
}

template <typename I>
I saturate(float integral) {
  constexpr float most = 2.0f * static_cast<float>(std::numeric_limits<I>::max() / 2 + 1);  // a power of two
  constexpr float least = static_cast<float>(std::numeric_limits<I>::min());
  const bool inside = integral >= least && integral < most;
  const I outside = integral >= most   ? std::numeric_limits<I>::max()
                    : integral < least ? std::numeric_limits<I>::min()
                                       : I{0};  // NaN
  return inside ? static_cast<I>(inside ? integral : 0.0f) : outside;
}

template <typename I>
I saturate(int64_t value) {
  constexpr int64_t low = std::numeric_limits<I>::min(), high = std::numeric_limits<I>::max();
  return static_cast<I>(value < low ? low : value > high ? high : value);
}

// An integer as a floating number of `digits` significant bits, which a double then holds exactly.
inline double round_digits(RoundMode mode, int64_t value, int digits) {
  const bool negative = value < 0;
  const uint64_t magnitude = negative ? uint64_t{0} - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  const int bits = magnitude == 0 ? 0 : 64 - __builtin_clzll(magnitude);
  const int shift = bits > digits ? bits - digits : 0;
  const double rounded =
      std::ldexp(static_cast<double>(round_shift(mode, negative, magnitude, static_cast<uint32_t>(shift))), shift);
  return negative ? -rounded : rounded;
}

}  // namespace cann_sim
