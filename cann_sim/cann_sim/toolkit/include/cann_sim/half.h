// half and bfloat16_t, the 16-bit floating types of the device, with exact IEEE conversions (nearest, ties to even).
// The conversions are free of branches so that loops over them vectorise. Subnormals, infinities and NaN are kept.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace cann_sim {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Chosen by masking: the compiler keeps a conditional expression as a jump, which does not vectorise.
inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t all = 0u - static_cast<uint32_t>(condition);
  return (yes & all) | (no & ~all);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const int32_t magnitude = bits & 0x7fff;
  // Converted from an integer, so that a thread which flushes subnormals gets them right too.
  const uint32_t small = float_bits(static_cast<float>(magnitude) * 0x1p-24f);
  const uint32_t shifted = static_cast<uint32_t>(magnitude) << 13;
  const uint32_t finite = choose(magnitude < 0x400, small, shifted + (112u << 23));
  return bits_float(choose(magnitude >= 0x7c00, shifted | 0x7f800000u, finite) | sign);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const auto ordered = static_cast<int32_t>(magnitude);  // signed comparisons are the cheap ones
  // Adding one half lines a subnormal result up with the last bits of the sum, which the addition rounds.
  const uint32_t small = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t finite = choose(ordered < (113 << 23), small, normal);
  const uint32_t bounded = choose(ordered >= 0x477ff000, 0x7c00u, finite);  // 65520 and more round to infinity
  return static_cast<uint16_t>(choose(ordered > 0x7f800000, nan, bounded) | sign);
}

inline float bfloat16_to_float(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>(choose(static_cast<int32_t>(bits & 0x7fffffffu) > 0x7f800000, nan, rounded));
}

}  // namespace cann_sim

// IEEE binary16. Scalar arithmetic rounds each result to half.
struct half {
  uint16_t bits;

  half() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  half(T value) : bits(::cann_sim::float_to_half(static_cast<float>(value))) {}
  operator float() const { return ::cann_sim::half_to_float(bits); }

  half operator-() const { return from_bits(bits ^ 0x8000u); }
  half& operator+=(half other) { return *this = half(float(*this) + float(other)); }
  half& operator-=(half other) { return *this = half(float(*this) - float(other)); }
  half& operator*=(half other) { return *this = half(float(*this) * float(other)); }
  half& operator/=(half other) { return *this = half(float(*this) / float(other)); }

  static half from_bits(uint32_t bits) {
    half value;
    value.bits = static_cast<uint16_t>(bits);
    return value;
  }
};

// Templates, so that an expression of a half and another type takes the built-in operators of float.
template <typename T, typename = std::enable_if_t<std::is_same_v<T, half>>>
half operator+(T a, T b) {
  return half(float(a) + float(b));
}
template <typename T, typename = std::enable_if_t<std::is_same_v<T, half>>>
half operator-(T a, T b) {
  return half(float(a) - float(b));
}
template <typename T, typename = std::enable_if_t<std::is_same_v<T, half>>>
half operator*(T a, T b) {
  return half(float(a) * float(b));
}
template <typename T, typename = std::enable_if_t<std::is_same_v<T, half>>>
half operator/(T a, T b) {
  return half(float(a) / float(b));
}

// bfloat16: storage and conversion only, the device has no arithmetic on it.
struct bfloat16_t {
  uint16_t bits;

  bfloat16_t() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  bfloat16_t(T value) : bits(::cann_sim::float_to_bfloat16(static_cast<float>(value))) {}
  explicit operator float() const { return ::cann_sim::bfloat16_to_float(bits); }

  static bfloat16_t from_bits(uint32_t bits) {
    bfloat16_t value;
    value.bits = static_cast<uint16_t>(bits);
    return value;
  }
};

inline bool operator==(bfloat16_t a, bfloat16_t b) {
  return float(a) == float(b);
}
inline bool operator!=(bfloat16_t a, bfloat16_t b) {
  return float(a) != float(b);
}

static_assert(sizeof(half) == 2 && sizeof(bfloat16_t) == 2, "the 16-bit types are their bits");
static_assert(std::is_trivially_copyable_v<half> && std::is_trivially_copyable_v<bfloat16_t>);
static_assert(std::numeric_limits<float>::is_iec559, "the host's float must be IEEE binary32");

namespace AscendC {

inline float ToFloat(const bfloat16_t& value) {
  return static_cast<float>(value);
}
inline bfloat16_t ToBfloat16(const float& value) {
  return bfloat16_t(value);
}

}  // namespace AscendC
