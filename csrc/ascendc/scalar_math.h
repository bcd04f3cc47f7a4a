// Arithmetic of single numbers on the scalar unit, which has no exp or log, and sums that keep their rounding error.
//
// The scalar unit may be set up to report infinities, NaN and divisions by 0 as errors: they are told by their bits and
// kept away from its arithmetic. (The vector unit has no such setting.)
#pragma once

#include "kernel_operator.h"

namespace npu_xent {

constexpr float kFloatMax = 3.402823466e+38f;

__aicore__ inline float FloatOfBits(uint32_t bits) {
  union {
    uint32_t from;
    float to;
  } value;
  value.from = bits;
  return value.to;
}
__aicore__ inline float NaN() {
  return FloatOfBits(0x7fc00000u);
}
__aicore__ inline float MinusInfinity() {
  return FloatOfBits(0xff800000u);
}
__aicore__ inline uint32_t BitsOf(float x) {
  union {
    float from;
    uint32_t to;
  } value;
  value.from = x;
  return value.to;
}

__aicore__ inline bool IsFinite(float x) {
  return (BitsOf(x) & 0x7f800000u) != 0x7f800000u;
}
__aicore__ inline bool IsNaN(float x) {
  return (BitsOf(x) & 0x7fffffffu) > 0x7f800000u;
}
// a + b
__aicore__ inline float SumOfTwo(float a, float b) {
  if (IsFinite(a) && IsFinite(b)) {
    return a + b;
  }
  if (IsFinite(a) || IsFinite(b)) {
    return IsFinite(a) ? b : a;
  }
  return BitsOf(a) == BitsOf(b) ? a : NaN();  // infinities of one sign, or not
}
// a / b for what a mean divides by: NaN where that is 0, a mean over nothing.
__aicore__ inline float Quotient(float a, float b) {
  if ((BitsOf(b) & 0x7fffffffu) == 0 || !IsFinite(b)) {
    return NaN();
  }
  return IsFinite(a) ? a / b : a;
}
// a b, b finite
__aicore__ inline float Product(float a, float b) {
  if (IsFinite(a)) {
    return a * b;
  }
  return b == 0.0f || IsNaN(a) ? NaN() : FloatOfBits(BitsOf(a) ^ (BitsOf(b) & 0x80000000u));
}
// Between the finite bounds of fp32, and 0 for NaN.
__aicore__ inline float Bounded(float x) {
  return IsFinite(x) ? x : IsNaN(x) ? 0.0f : BitsOf(x) >> 31 != 0 ? -kFloatMax : kFloatMax;
}

// exp(x) - 1 for kNearZero <= x <= 0, by its series: the scalar unit has no exp, and what comes of one would cancel.
// The first term left out is below 2^-36.
constexpr float kNearZero = -0.5f;
constexpr int32_t kExpm1Terms = 10;
__aicore__ inline float Expm1NearZero(float x) {
  float sum = 1.0f + x * (1.0f / kExpm1Terms);
  for (int32_t k = kExpm1Terms - 1; k > 1; --k) {
    sum = 1.0f + x * sum / static_cast<float>(k);
  }
  return x * sum;
}

// exp(-x) for the low part of an lse. That is at most half a unit in the last place of the high part, so of a row with
// logits beyond 2^23 it may be the whole logarithm of the sum, and no series near 0 will do.
__aicore__ inline float ExpOfMinus(float x) {
  int32_t halved = 0;
  float y = x < 0.0f ? x : -x;
  while (y < kNearZero && halved < 8) {
    y *= 0.5f;
    ++halved;
  }
  float e = 1.0f + Expm1NearZero(y);
  for (; halved > 0; --halved) {
    e *= e;
  }
  return x < 0.0f ? 1.0f / e : e;
}

// high + low = a + b exactly (Knuth), high the rounded sum; low is 0 when the sum is not finite.
struct TwoFloats {
  float high, low;
};
__aicore__ inline TwoFloats TwoSum(float a, float b) {
  TwoFloats sum;
  sum.high = SumOfTwo(a, b);
  if (!IsFinite(a) || !IsFinite(b)) {
    sum.low = 0.0f;
    return sum;
  }
  const float b_rounded = sum.high - a;
  sum.low = IsFinite(sum.high) ? (a - (sum.high - b_rounded)) + (b - b_rounded) : 0.0f;
  return sum;
}

// A running sum with its rounding error kept aside (Neumaier).
struct ExactSum {
  float sum, error;
};
__aicore__ inline void AddTo(ExactSum& s, float x) {
  const TwoFloats t = TwoSum(s.sum, x);
  s.sum = t.high;
  s.error += t.low;  // finite, as t.low always is
}
__aicore__ inline float Rounded(const ExactSum& s) {
  return SumOfTwo(s.sum, s.error);
}

}  // namespace npu_xent
