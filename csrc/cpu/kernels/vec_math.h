// exp, tanh and log. Included only by chunk_kernels.cpp, and like it compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels/vec_blocks.h"

namespace npu_xent::cpu::CPU_CAPABILITY {
namespace {

// exp(x) for x <= 0, within 2 ulp; 0 for -inf and where the result would be subnormal; NaN or inf for NaN.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2; exp(r) is the polynomial of degree 5 with the
// smallest relative error, 0.8 ulp. Half the instructions of at::vec's exp_u20, which also handles x > 0.
inline Vec<float> exp(const Vec<float>& x) {
  const Vec<float> to_integer(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> biased = at::vec::fmadd(x, Vec<float>(1.44269504f), to_integer);
  const Vec<float> n = biased - to_integer;
  const Vec<float> minus_ln2(-0.693147182f), rounding(1.90465421e-9f);  // float(ln 2) - ln 2
  const Vec<float> r = at::vec::fmadd(n, rounding, at::vec::fmadd(n, minus_ln2, x));
  Vec<float> p = at::vec::fmadd(r, Vec<float>(8.2902721e-3f), Vec<float>(4.1898160e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6667638e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(4.9999148e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(9.9999971e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(1.f));
  constexpr float kLogSmallestNormal = -87.3365448f;
#ifdef CPU_CAPABILITY_AVX512
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLogSmallestNormal), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, n);
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
  const __m256i power = _mm256_add_epi32(exponent, _mm256_castps_si256(_mm256_set1_ps(1.f)));
  const __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(kLogSmallestNormal), _CMP_NLT_UQ);
  return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(power)), normal);
#endif
}
#else
inline Vec<float> exp(const Vec<float>& x) {
  return x.exp_u20();
}
#endif
inline Vec<double> exp(const Vec<double>& x) {
  return x.exp();
}

// log(x) for x >= 1 (a number that means nothing for other x), with a relative error of 4e-14. Half the time of
// at::vec's logarithm in loops, which compilers vectorise. x = 2^k m with m in [sqrt(1/2), sqrt(2)), and log m = 2
// artanh(s).
inline double log_from_1(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCD;
  const uint64_t k = (bits - kSqrtHalf) >> 52, bits_of_m = bits - (k << 52);
  const uint64_t bits_of_shifted = k | 0x4330000000000000;  // 2^52 + k
  double m, shifted;
  std::memcpy(&m, &bits_of_m, sizeof(m));
  std::memcpy(&shifted, &bits_of_shifted, sizeof(shifted));
  const double s = (m - 1) / (m + 1), square = s * s;
  double tail = 2. / 15;
  for (const double term : {2. / 13, 2. / 11, 2. / 9, 2. / 7, 2. / 5, 2. / 3}) {
    tail = tail * square + term;
  }
  return (shifted - 0x1p52) * 0.693147180559945309 + (2 * s + s * square * tail);
}

// y, or a number whose exponential is 0 too: y may be -inf, and -inf * 0 would be NaN.
template <typename acc>
Vec<acc> finite(const Vec<acc>& y) {
  return at::vec::clamp_min(y, Vec<acc>(-1000));
}

#ifdef CPU_CAPABILITY_SVE256
// at::vec's tanh for SVE, (exp(2 y) - 1) / (exp(2 y) + 1), cancels near 0. There use y + y^3 P(y^2), with the
// coefficients of Cephes' tanhf (S. L. Moshier).
inline Vec<float> tanh(const Vec<float>& y) {
  const Vec<float> square = y * y;
  Vec<float> p = at::vec::fmadd(square, Vec<float>(-5.70498872745e-3f), Vec<float>(2.06390887954e-2f));
  p = at::vec::fmadd(p, square, Vec<float>(-5.37397155531e-2f));
  p = at::vec::fmadd(p, square, Vec<float>(1.33314422036e-1f));
  p = at::vec::fmadd(p, square, Vec<float>(-3.33332819422e-1f));
  return Vec<float>::blendv(y.tanh(), at::vec::fmadd(p * square, y, y), y.abs() < Vec<float>(0.625f));
}
#else
inline Vec<float> tanh(const Vec<float>& y) {
  return y.tanh();
}
#endif
inline Vec<double> tanh(const Vec<double>& y) {
  return y.tanh();
}

}  // namespace
}  // namespace npu_xent::cpu::CPU_CAPABILITY
