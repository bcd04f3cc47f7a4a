// Checks for test programs: what fails is printed and counted, and the program goes on. Also the roundings that a
// result may have, and the 16-bit types.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels/chunk_kernels.h"

namespace test {

using npu_xent::cpu::acc_t;
using npu_xent::cpu::bf16;
using npu_xent::cpu::f16;

inline int failures = 0, checks = 0;
inline std::string context;  // what is being tested

__attribute__((format(printf, 2, 3))) inline bool check(bool ok, const char* text, ...) {
  ++checks;
  if (!ok && ++failures <= 20) {
    std::va_list arguments;
    va_start(arguments, text);
    std::fprintf(stderr, "%s: ", context.c_str());
    std::vfprintf(stderr, text, arguments);
    std::fprintf(stderr, "\n");
    va_end(arguments);
  }
  return ok;
}

// The program's exit code.
inline int finish(const char* program) {
  std::printf("%s: %d checks, %d failed\n", program, checks, failures);
  return failures != 0 || checks == 0;
}

// The 16-bit types, converted here by the definition of their formats and not by the code under test.
inline uint16_t round_to_bits(double x, int mantissa_bits, int exponent_bits) {
  const int sign = std::signbit(x) ? 0x8000 : 0, infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  if (std::isnan(x)) {
    return static_cast<uint16_t>(infinity | 1 << (mantissa_bits - 1));
  }
  if (std::isinf(x)) {
    return static_cast<uint16_t>(sign | infinity);
  }
  const int lowest = 2 - (1 << (exponent_bits - 1));  // exponent of the smallest normal number
  const int exponent = x == 0 ? lowest : std::max(std::ilogb(x), lowest);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent)));
  const int64_t bits = units + (static_cast<int64_t>(exponent - lowest) << mantissa_bits);
  return static_cast<uint16_t>(sign | (bits < infinity ? bits : infinity));
}
inline double from_bits(uint16_t bits, int mantissa_bits, int exponent_bits) {
  const int mantissa = bits & ((1 << mantissa_bits) - 1), most = (1 << exponent_bits) - 1;
  const int exponent = bits >> mantissa_bits & most, lowest = 2 - (1 << (exponent_bits - 1));
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == most) {
    return mantissa != 0 ? NAN : sign * INFINITY;
  }
  return sign * (exponent == 0 ? std::ldexp(mantissa, lowest - mantissa_bits)
                               : std::ldexp(mantissa + (1 << mantissa_bits), exponent - 1 + lowest - mantissa_bits));
}

// A floating-point type: its name, its unit in the last place of 1, its smallest normal number.
template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr const char* name = "float32";
  static constexpr double eps = 0x1p-23, tiny = 0x1p-126;
  static float store(double x) { return static_cast<float>(x); }
  static double load(float x) { return x; }
};
template <>
struct Format<double> {
  static constexpr const char* name = "float64";
  static constexpr double eps = 0x1p-52, tiny = 0x1p-1022;
  static double store(double x) { return x; }
  static double load(double x) { return x; }
};
template <>
struct Format<bf16> {
  static constexpr const char* name = "bfloat16";
  static constexpr double eps = 0x1p-7, tiny = 0x1p-126;
  static bf16 store(double x) { return {round_to_bits(x, 7, 8)}; }
  static double load(bf16 x) { return from_bits(x.bits, 7, 8); }
};
template <>
struct Format<f16> {
  static constexpr const char* name = "float16";
  static constexpr double eps = 0x1p-10, tiny = 0x1p-14;
  static f16 store(double x) { return {round_to_bits(x, 10, 5)}; }
  static double load(f16 x) { return from_bits(x.bits, 10, 5); }
};

template <typename T>
std::vector<T> stored(const std::vector<double>& x) {
  std::vector<T> result;
  for (const double value : x) {
    result.push_back(Format<T>::store(value));
  }
  return result;
}

// That a result in T, made from statistics in S, is `expected`: the same NaN or infinity, or as near as roundings alone
// allow: `roundings` of the result to T, and `units` in the last place of S on terms of the given size.
template <typename T, typename S>
bool check_near(const char* name, int64_t index, T actual, double expected, double terms, int roundings = 1,
                double units = 4) {
  const double value = Format<T>::load(actual);
  if (!std::isfinite(expected)) {
    return check(std::isnan(expected) ? std::isnan(value) : value == expected, "%s[%lld] is %g, expected %g", name,
                 static_cast<long long>(index), value, expected);
  }
  const double allowed = roundings * (std::fabs(expected) * Format<T>::eps + Format<T>::tiny * Format<T>::eps) / 2 +
                         units * Format<S>::eps * terms + Format<S>::tiny;
  return check(std::fabs(value - expected) <= allowed, "%s[%lld] is %.9g, expected %.9g: %.2f times the tolerance",
               name, static_cast<long long>(index), value, expected, std::fabs(value - expected) / allowed);
}

template <typename T>
bool check_same_bits(const char* name, const std::vector<T>& actual, const std::vector<T>& expected) {
  if (!check(actual.size() == expected.size(), "%s: %zu elements, expected %zu", name, actual.size(),
             expected.size())) {
    return false;
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) != 0) {
      return check(false, "%s[%zu] is %.17g, expected the bits of %.17g", name, i, Format<T>::load(actual[i]),
                   Format<T>::load(expected[i]));
    }
  }
  return check(true, "same");
}

}  // namespace test
