// Vectors of accumulators: loads and stores of every storage type, and the functions that a softmax needs. Included by
// chunk_kernels.cpp alone, and like it compiled once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/chunk_kernels.h"

namespace npu_xent::cpu::CPU_CAPABILITY {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Storage types as at::vec knows them.
template <typename scalar_t>
struct vec_type {
  using type = scalar_t;
};
template <>
struct vec_type<bf16> {
  using type = c10::BFloat16;
};
template <>
struct vec_type<f16> {
  using type = c10::Half;
};
template <typename scalar_t>
using vec_t = typename vec_type<scalar_t>::type;

template <typename scalar_t>
const vec_t<scalar_t>* as_vec(const scalar_t* p) {
  return reinterpret_cast<const vec_t<scalar_t>*>(p);
}
template <typename scalar_t>
vec_t<scalar_t>* as_vec(scalar_t* p) {
  return reinterpret_cast<vec_t<scalar_t>*>(p);
}

template <typename acc>
struct Pair {
  Vec<acc> lo, hi;
};

// Every loop works on blocks of two accumulator vectors, which is one vector of a 16-bit type.
template <typename acc>
constexpr int64_t kBlock = 2 * Vec<acc>::size();

// The first n elements of a block; the rest are zeros.
template <typename scalar_t>
Pair<acc_t<scalar_t>> load(const scalar_t* p, int64_t n) {
  using acc = acc_t<scalar_t>;
  constexpr int64_t width = Vec<acc>::size();
  if constexpr (std::is_same_v<scalar_t, acc>) {
    if (n == kBlock<acc>) {
      return {Vec<acc>::loadu(p), Vec<acc>::loadu(p + width)};
    }
    return {Vec<acc>::loadu(p, std::min(n, width)), n > width ? Vec<acc>::loadu(p + width, n - width) : Vec<acc>(0)};
  } else {
    using stored = vec_t<scalar_t>;
    if (n == kBlock<acc>) {
      Pair<acc> v;
      at::vec::load_to_float<stored>(as_vec(p), v.lo, v.hi);
      return v;
    }
    const auto [lo, hi] = at::vec::convert_to_float<stored>(Vec<stored>::loadu(as_vec(p), n));
    return {lo, hi};
  }
}

template <typename scalar_t>
void store(scalar_t* p, const Pair<acc_t<scalar_t>>& v, int64_t n) {
  using acc = acc_t<scalar_t>;
  constexpr int64_t width = Vec<acc>::size();
  if constexpr (std::is_same_v<scalar_t, acc>) {
    v.lo.store(p, std::min(n, width));
    if (n > width) {
      v.hi.store(p + width, n - width);
    }
  } else {
    at::vec::convert_from_float<vec_t<scalar_t>>(v.lo, v.hi).store(as_vec(p), n);
  }
}

// Stores one vector past the caches: memory is written without having been read, and what the caches hold stays there.
// p is aligned to the size of the vector.
template <typename T>
void stream(T* p, const Vec<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#else
  v.store(p);
#endif
}

// Before another thread may look at what was streamed.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// A whole block, likewise.
template <typename scalar_t>
void stream_block(scalar_t* p, const Pair<acc_t<scalar_t>>& v) {
  using acc = acc_t<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, acc>) {
    stream(p, v.lo);
    stream(p + Vec<acc>::size(), v.hi);
  } else {
    stream(as_vec(p), at::vec::convert_from_float<vec_t<scalar_t>>(v.lo, v.hi));
  }
}

// Lanes at n and beyond become `value`.
template <typename acc>
Pair<acc> keep_first(const Pair<acc>& v, int64_t n, acc value) {
  constexpr int64_t width = Vec<acc>::size();
  const Vec<acc> other(value);
  return {Vec<acc>::set(other, v.lo, std::min(n, width)), Vec<acc>::set(other, v.hi, std::max<int64_t>(n - width, 0))};
}

// exp(x) for x <= 0, within 2 ulp, and 0 where it would be subnormal, for -inf too. Of a NaN it makes NaN or inf: a sum
// shows it.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2; exp(r) is the polynomial of degree 5 with the
// smallest relative error, 0.8 ulp. Half the instructions of at::vec's exp_u20, which takes care of x > 0 as well.
inline Vec<float> exp(const Vec<float>& x) {
  const Vec<float> to_integer(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  const Vec<float> biased = at::vec::fmadd(x, Vec<float>(1.44269504f), to_integer);
  const Vec<float> n = biased - to_integer;
  const Vec<float> r = at::vec::fmadd(n, Vec<float>(-0.693147182f), x);
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

#ifdef CPU_CAPABILITY_SVE256
// There at::vec has (exp(2 y) - 1) / (exp(2 y) + 1), of which little is left near 0. Here it is y + y^3 P(y^2), with
// the coefficients of Cephes' tanhf (S. L. Moshier).
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

template <typename acc>
acc first_lane(const Vec<acc>& v) {
  alignas(64) acc lanes[Vec<acc>::size()];
  v.store(lanes);
  return lanes[0];
}

template <typename acc>
acc lane_sum(const Vec<acc>& v) {
  return at::vec::vec_reduce_all<acc>([](const Vec<acc>& a, const Vec<acc>& b) { return a + b; }, v);
}

}  // namespace
}  // namespace npu_xent::cpu::CPU_CAPABILITY
