// One chunk of one row, vectorised with at::vec. This file is compiled once per instruction set, with
// CPU_CAPABILITY naming it, and everything in it lives in a namespace of that name or is anonymous: a symbol
// shared between variants would let the linker put AVX512 code on a machine without it.
//
// Why one exp an element is enough: `stats` keeps exp(z - max of the chunk) while the chunk is in cache, and the
// gradient only scales it by exp(max of the chunk - lse).
#include "cpu/kernels/chunk_kernels.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

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
    const auto v = n == kBlock<acc> ? Vec<stored>::loadu(as_vec(p)) : Vec<stored>::loadu(as_vec(p), n);
    const auto [lo, hi] = at::vec::convert_to_float<stored>(v);
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

// Lanes at n and beyond become `value`.
template <typename acc>
Pair<acc> keep_first(const Pair<acc>& v, int64_t n, acc value) {
  constexpr int64_t width = Vec<acc>::size();
  const Vec<acc> other(value);
  return {Vec<acc>::set(other, v.lo, std::min(n, width)), Vec<acc>::set(other, v.hi, std::max<int64_t>(n - width, 0))};
}

inline Vec<float> exp(const Vec<float>& x) {
  // Within 2 ulp for x in [-87, 0], which is all that a softmax asks for; exp_u20(-inf) is 0. exp_u20(NaN) is +inf: a
  // row with a NaN is recognised by its maximum, and what is made of it here is not used.
  return x.exp_u20();
}
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

// z of LogitMap as a product, base(x) * factor; and z + offset, where the product is not rounded by itself.
template <typename acc>
struct Scaled {
  static constexpr bool capped = false;
  Vec<acc> factor;

  explicit Scaled(const LogitMap<acc>& m) : factor(m.scale) {}
  Vec<acc> base(const Vec<acc>& x) const { return x; }
  Vec<acc> shifted(const Vec<acc>& base, const Vec<acc>& offset) const { return at::vec::fmadd(base, factor, offset); }
};

// The same with a softcap. Here z is rounded before anything is added to it (CpuVariants.cmake keeps the compiler from
// contracting the two): the maximum of a chunk and the target's logit are rounded likewise, so that z is off by the
// same wherever it comes from, and a confident prediction's loss does not consist of the difference.
template <typename acc>
struct Capped {
  static constexpr bool capped = true;
  Vec<acc> factor, scale, inverse;

  explicit Capped(const LogitMap<acc>& m) : factor(m.softcap), scale(m.scale), inverse(1 / m.softcap) {}
  Vec<acc> base(const Vec<acc>& x) const { return tanh(x * scale * inverse); }
  Vec<acc> shifted(const Vec<acc>& base, const Vec<acc>& offset) const { return base * factor + offset; }
};

// Calls f with the one of these that m asks for.
template <typename acc, typename F>
void with_map(const LogitMap<acc>& m, const F& f) {
  m.softcap == 0 ? f(Scaled<acc>(m)) : f(Capped<acc>(m));
}

// z + offset.
template <typename acc, typename Map>
Pair<acc> shifted(const Map& z, const Pair<acc>& base, const Vec<acc>& offset) {
  return {z.shifted(base.lo, offset), z.shifted(base.hi, offset)};
}
template <typename acc, typename Map>
Pair<acc> base_of(const Map& z, const Pair<acc>& x) {
  return {z.base(x.lo), z.base(x.hi)};
}

// max of z over the chunk, NaN if there is one. A softcap leaves the order of logits as it is.
template <typename scalar_t>
acc_t<scalar_t> chunk_max(const scalar_t* x, int64_t n, LogitMap<acc_t<scalar_t>> map) {
  using acc = acc_t<scalar_t>;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const Vec<acc> scale(map.scale);
  Pair<acc> top{Vec<acc>(lowest), Vec<acc>(lowest)};
  int64_t i = 0;
  for (; i + kBlock<acc> <= n; i += kBlock<acc>) {
    const auto v = load(x + i, kBlock<acc>);
    top.lo = at::vec::maximum(top.lo, v.lo * scale);
    top.hi = at::vec::maximum(top.hi, v.hi * scale);
  }
  if (i < n) {
    const auto v = load(x + i, n - i);
    const auto scaled = keep_first<acc>({v.lo * scale, v.hi * scale}, n - i, lowest);
    top.lo = at::vec::maximum(top.lo, scaled.lo);
    top.hi = at::vec::maximum(top.hi, scaled.hi);
  }
  alignas(64) acc lanes[kBlock<acc>];
  top.lo.store(lanes);
  top.hi.store(lanes + Vec<acc>::size());
  acc result = lowest;
  for (const acc lane : lanes) {
    result = std::isnan(lane) || lane > result ? lane : result;
    if (std::isnan(result)) {
      break;
    }
  }
  if (map.softcap == 0) {
    return result;
  }
  const Capped<acc> z({1, map.softcap});  // `result` is scaled already
  return first_lane<acc>(z.base(Vec<acc>(result)) * z.factor);
}

template <bool need_wsum, bool keep_exps, typename scalar_t, typename Map>
void sums(const scalar_t* x, const acc_t<scalar_t>* w, int64_t n, const Map& z, acc_t<scalar_t>* exps,
          ChunkStats<acc_t<scalar_t>>& stats) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> minus_max(-stats.max), zero(0);
  Pair<acc> sum{zero, zero}, wsum{zero, zero}, weights{zero, zero};
  const auto block = [&](const Pair<acc>& v, Pair<acc> w, int64_t valid) {
    const Pair<acc> y = shifted(z, base_of(z, v), minus_max);
    Pair<acc> e{exp(y.lo), exp(y.hi)};
    if (valid < kBlock<acc>) {
      e = keep_first<acc>(e, valid, 0);
      w = keep_first<acc>(w, valid, 0);
    }
    sum.lo = sum.lo + e.lo;
    sum.hi = sum.hi + e.hi;
    if constexpr (need_wsum) {
      wsum.lo = at::vec::fmadd(y.lo, w.lo, wsum.lo);
      wsum.hi = at::vec::fmadd(y.hi, w.hi, wsum.hi);
      weights.lo = weights.lo + w.lo;
      weights.hi = weights.hi + w.hi;
    }
    return e;
  };
  const Pair<acc> ones{Vec<acc>(1), Vec<acc>(1)};
  const bool weighted = need_wsum && w != nullptr;
  int64_t i = 0;
  for (; i + kBlock<acc> <= n; i += kBlock<acc>) {
    const auto e = block(load(x + i, kBlock<acc>), weighted ? load(w + i, kBlock<acc>) : ones, kBlock<acc>);
    if constexpr (keep_exps) {
      store(exps + i, e, kBlock<acc>);
    }
  }
  if (i < n) {
    const auto e = block(load(x + i, n - i), weighted ? load(w + i, n - i) : ones, n - i);
    if constexpr (keep_exps) {
      store(exps + i, e, n - i);
    }
  }
  stats.sum = lane_sum(sum.lo + sum.hi);
  stats.wsum = need_wsum ? lane_sum(wsum.lo + wsum.hi) : acc(0);
  stats.weight = need_wsum ? lane_sum(weights.lo + weights.hi) : acc(0);
}

template <typename scalar_t>
ChunkStats<acc_t<scalar_t>> stats(const scalar_t* x, const acc_t<scalar_t>* w, int64_t n, LogitMap<acc_t<scalar_t>> map,
                                  bool need_wsum, acc_t<scalar_t>* exps) {
  using acc = acc_t<scalar_t>;
  ChunkStats<acc> result{chunk_max(x, n, map), 0, 0, 0};
  const acc max = result.max;
  const bool finite = std::isfinite(max);
  if (!finite) {
    if (exps != nullptr) {
      std::fill_n(exps, n, acc(0));
    }
    if (!need_wsum) {
      return result;
    }
    // All -inf, or a +inf or NaN: only wsum is worth having, and it is what the arithmetic gives.
    result.max = 0;
  }
  const bool keep_exps = exps != nullptr && finite;
  with_map(map, [&](const auto& z) {
    if (need_wsum) {
      keep_exps ? sums<true, true>(x, w, n, z, exps, result) : sums<true, false>(x, w, n, z, exps, result);
    } else {
      keep_exps ? sums<false, true>(x, w, n, z, exps, result) : sums<false, false>(x, w, n, z, exps, result);
    }
  });
  if (!finite) {
    result.max = max;
    result.sum = 0;
  }
  return result;
}

// out[i, i + valid) = f(i, valid), block by block. All but the last are whole, and their size is a constant to f.
template <typename scalar_t, typename F>
void write_blocks(int64_t n, scalar_t* out, const F& f) {
  constexpr std::integral_constant<int64_t, kBlock<acc_t<scalar_t>>> whole{};
  int64_t i = 0;
  for (; i + whole <= n; i += whole) {
    store(out + i, f(i, whole), whole);
  }
  if (i < n) {
    store(out + i, f(i, n - i), n - i);
  }
}

// From exponentials to a gradient: slope (scale e - offset w). Without label smoothing the offset is 0, and the weights
// are not read.
template <typename acc>
class GradBlock {
 public:
  GradBlock(const acc* w, acc scale, acc offset)
      : with_offset_(offset != 0), w_(with_offset_ ? w : nullptr), scale_(scale), minus_offset_(-offset) {}

  template <typename Map, typename N>
  Pair<acc> operator()(const Map&, const Pair<acc>& base, const Pair<acc>& e, int64_t i, N valid) const {
    Pair<acc> g{e.lo * scale_, e.hi * scale_};
    if (with_offset_) {
      const Pair<acc> w = w_ ? load(w_ + i, valid) : Pair<acc>{Vec<acc>(1), Vec<acc>(1)};
      g = {at::vec::fmadd(w.lo, minus_offset_, g.lo), at::vec::fmadd(w.hi, minus_offset_, g.hi)};
    }
    if constexpr (Map::capped) {
      const Vec<acc> one(1);
      g = {g.lo * ((one - base.lo) * (one + base.lo)), g.hi * ((one - base.hi) * (one + base.hi))};
    }
    return g;
  }

 private:
  bool with_offset_;
  const acc* w_;
  Vec<acc> scale_, minus_offset_;
};

template <typename scalar_t>
void grad_from_exps(const scalar_t* x, const acc_t<scalar_t>* exps, const acc_t<scalar_t>* w, int64_t n,
                    LogitMap<acc_t<scalar_t>> map, acc_t<scalar_t> scale, acc_t<scalar_t> offset, scalar_t* out) {
  using acc = acc_t<scalar_t>;
  const GradBlock<acc> grad_of(w, scale, offset);
  with_map(map, [&](const auto& z) {
    write_blocks(n, out, [&](int64_t i, auto valid) {
      Pair<acc> base{Vec<acc>(0), Vec<acc>(0)};
      if constexpr (std::decay_t<decltype(z)>::capped) {
        base = base_of(z, load(x + i, valid));
      }
      return grad_of(z, base, load(exps + i, valid), i, valid);
    });
  });
}

template <typename scalar_t>
void grad(const scalar_t* x, const acc_t<scalar_t>* w, int64_t n, LogitMap<acc_t<scalar_t>> map, acc_t<scalar_t> shift,
          acc_t<scalar_t> scale, acc_t<scalar_t> offset, scalar_t* out) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> minus_shift(-shift);
  const GradBlock<acc> grad_of(w, scale, offset);
  with_map(map, [&](const auto& z) {
    write_blocks(n, out, [&](int64_t i, auto valid) {
      const Pair<acc> base = base_of(z, load(x + i, valid));
      const Pair<acc> y = shifted(z, base, minus_shift);
      return grad_of(z, base, Pair<acc>{exp(y.lo), exp(y.hi)}, i, valid);
    });
  });
}

template <typename scalar_t>
void log_prob(const scalar_t* x, int64_t n, LogitMap<acc_t<scalar_t>> map, acc_t<scalar_t> lse, acc_t<scalar_t> lse_low,
              scalar_t* out) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> minus_lse(-lse), low(lse_low);
  with_map(map, [&](const auto& z) {
    write_blocks(n, out, [&](int64_t i, auto valid) {
      const Pair<acc> y = shifted(z, base_of(z, load(x + i, valid)), minus_lse);
      return Pair<acc>{y.lo - low, y.hi - low};
    });
  });
}

template <typename scalar_t>
void scale(scalar_t* out, int64_t n, acc_t<scalar_t> factor) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> s(factor);
  write_blocks(n, out, [&](int64_t i, auto valid) {
    const Pair<acc> v = load(out + i, valid);
    return Pair<acc>{v.lo * s, v.hi * s};
  });
}

template <typename scalar_t>
acc_t<scalar_t> mapped(const scalar_t* x, LogitMap<acc_t<scalar_t>> map) {
  using acc = acc_t<scalar_t>;
  acc result(0);
  with_map(map, [&](const auto& z) { result = first_lane<acc>(z.base(load(x, 1).lo) * z.factor); });
  return result;
}

template <typename scalar_t>
void store_one(scalar_t* out, acc_t<scalar_t> value) {
  *as_vec(out) = static_cast<vec_t<scalar_t>>(value);
}

template <typename scalar_t>
void fill(scalar_t* out, int64_t n, acc_t<scalar_t> value) {
  std::fill_n(as_vec(out), n, static_cast<vec_t<scalar_t>>(value));
}

template <typename scalar_t>
constexpr ChunkKernels<scalar_t> kernels() {
  return {stats<scalar_t>, grad_from_exps<scalar_t>, grad<scalar_t>,   log_prob<scalar_t>,
          scale<scalar_t>, fill<scalar_t>,           mapped<scalar_t>, store_one<scalar_t>};
}

}  // namespace

extern const KernelTable table;
const KernelTable table{kernels<float>(), kernels<double>(), kernels<bf16>(), kernels<f16>()};

}  // namespace npu_xent::cpu::CPU_CAPABILITY
