// Blocks of accumulators: loads and stores of every storage type, with and without the caches. Included only by
// chunk_kernels.cpp, and like it compiled once per instruction set.
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

// f of compile-time constants with the values of the flags.
template <typename F>
void with_bools(const F& f) {
  f();
}
template <typename F, typename... Flags>
void with_bools(const F& f, bool flag, Flags... flags) {
  const auto with = [&](auto first) { with_bools([&](auto... rest) { f(first, rest...); }, flags...); };
  flag ? with(std::true_type()) : with(std::false_type());
}

template <typename T>
using Vec = at::vec::Vectorized<T>;

// The storage types of at::vec.
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

// Every loop works on blocks of two accumulator vectors, the size of one vector of a 16-bit type.
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

// Stores one vector bypassing the caches: the cache line is not read first, and nothing is evicted. p is aligned to the
// size of the vector.
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

// Call before another thread reads the streamed data.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Streams a whole block.
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

// out[i, i + valid) = f(i, valid), block by block: whole blocks, for which valid is a compile-time constant, and a
// partial one at the end. Streaming stores also begin with a partial block, up to an aligned address.
template <typename scalar_t, typename F>
void write_blocks(int64_t n, scalar_t* out, bool past_cache, const F& f) {
  using acc = acc_t<scalar_t>;
  constexpr std::integral_constant<int64_t, kBlock<acc>> whole{};
  constexpr uintptr_t vector_bytes = sizeof(Vec<acc>);
  const uintptr_t unaligned = reinterpret_cast<uintptr_t>(out) % vector_bytes;
  int64_t i = 0;
  if (past_cache && unaligned % sizeof(scalar_t) == 0) {  // otherwise no element is vector-aligned
    if (unaligned != 0) {
      i = std::min(n, static_cast<int64_t>((vector_bytes - unaligned) / sizeof(scalar_t)));
      store(out, f(0, i), i);
    }
    for (; i + whole <= n; i += whole) {
      stream_block(out + i, f(i, whole));
    }
  } else {
    for (; i + whole <= n; i += whole) {
      store(out + i, f(i, whole), whole);
    }
  }
  if (i < n) {
    store(out + i, f(i, n - i), n - i);
  }
}

// Lanes at n and beyond become `value`.
template <typename acc>
Pair<acc> keep_first(const Pair<acc>& v, int64_t n, acc value) {
  constexpr int64_t width = Vec<acc>::size();
  const Vec<acc> other(value);
  return {Vec<acc>::set(other, v.lo, std::min(n, width)), Vec<acc>::set(other, v.hi, std::max<int64_t>(n - width, 0))};
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
