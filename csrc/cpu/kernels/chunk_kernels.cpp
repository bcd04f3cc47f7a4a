// One chunk of one row, vectorised with at::vec. This file is compiled once per instruction set, which CPU_CAPABILITY
// names. Everything in it is in a namespace of that name or anonymous: if variants shared a symbol, the linker could
// pick the AVX512 version for every machine.
//
// One exp per element suffices: `stats` keeps exp(z - max of the chunk) while the chunk is in cache, and the gradient
// scales it by exp(max of the chunk - lse). To run near memory bandwidth, `stats` prefetches the next chunk while it
// computes exponentials, and large outputs bypass the cache.
#include "cpu/kernels/chunk_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/kernels/tile_kernels.h"
#include "cpu/kernels/vec_blocks.h"
#include "cpu/kernels/vec_math.h"

namespace npu_xent::cpu::CPU_CAPABILITY {
namespace {

// z = base(x) * factor. z is rounded before an addition (CpuVariants.cmake disables contraction): the maximum of the
// chunk and the target's logit are rounded in the same way, so these errors cancel in the loss of a confident
// prediction.

// LogitMap of the logits themselves.
template <typename acc>
struct Unscaled {
  static constexpr bool capped = false;
  Vec<acc> factor;

  explicit Unscaled(const LogitMap<acc>&) : factor(1) {}
  Vec<acc> base(const Vec<acc>& x) const { return x; }
  Vec<acc> shifted(const Vec<acc>& base, const Vec<acc>& offset) const { return base + offset; }
};

// LogitMap without a softcap.
template <typename acc>
struct Scaled {
  static constexpr bool capped = false;
  Vec<acc> factor;

  explicit Scaled(const LogitMap<acc>& m) : factor(m.scale) {}
  Vec<acc> base(const Vec<acc>& x) const { return x; }
  Vec<acc> shifted(const Vec<acc>& base, const Vec<acc>& offset) const { return base * factor + offset; }
};

// LogitMap with a softcap.
template <typename acc>
struct Capped {
  static constexpr bool capped = true;
  Vec<acc> factor, scale, inverse;

  explicit Capped(const LogitMap<acc>& m) : factor(m.softcap), scale(m.scale), inverse(1 / m.softcap) {}
  Vec<acc> base(const Vec<acc>& x) const { return tanh(x * scale * inverse); }
  Vec<acc> shifted(const Vec<acc>& base, const Vec<acc>& offset) const { return base * factor + offset; }
};

// Calls f with the map that m describes.
template <typename acc, typename F>
void with_map(const LogitMap<acc>& m, const F& f) {
  if (m.softcap != 0) {
    f(Capped<acc>(m));
  } else if (m.scale != 1) {
    f(Scaled<acc>(m));
  } else {
    f(Unscaled<acc>(m));
  }
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

// max of scale x over the chunk. It may miss a NaN, which then appears in the sum of the exponentials.
template <typename scalar_t>
acc_t<scalar_t> scaled_max(const scalar_t* x, int64_t n, acc_t<scalar_t> scale) {
  using acc = acc_t<scalar_t>;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const Vec<acc> factor(scale);
  Pair<acc> top{Vec<acc>(lowest), Vec<acc>(lowest)};
  const auto add = [&](const Pair<acc>& v) {
    // Not at::vec::maximum, which also propagates NaN and is slower.
    top.lo = at::vec::clamp_min(top.lo, v.lo);
    top.hi = at::vec::clamp_min(top.hi, v.hi);
  };
  int64_t i = 0;
  for (; i + kBlock<acc> <= n; i += kBlock<acc>) {
    const auto v = load(x + i, kBlock<acc>);
    add({v.lo * factor, v.hi * factor});
  }
  if (i < n) {
    const auto v = load(x + i, n - i);
    add(keep_first<acc>({v.lo * factor, v.hi * factor}, n - i, lowest));
  }
  alignas(64) acc lanes[kBlock<acc>];
  top.lo.store(lanes);
  top.hi.store(lanes + Vec<acc>::size());
  return *std::max_element(lanes, lanes + kBlock<acc>);
}

// The same for a 16-bit type and scale > 0, without converting to float. Read as int16, positive floats keep their
// order; negative floats are below 0 and in reverse order.
template <typename scalar_t>
float scaled_max_of_bits(const scalar_t* x, int64_t n, float scale) {
  using Bits = Vec<int16_t>;
  const auto* bits = reinterpret_cast<const int16_t*>(x);
  int16_t highest = bits[0], lowest = bits[0];
  int64_t i = 0;
  if (n >= Bits::size()) {
    Bits high(highest), low(lowest);
    for (; i + Bits::size() <= n; i += Bits::size()) {
      const Bits v = Bits::loadu(bits + i);
      high = at::vec::maximum(high, v);
      low = at::vec::minimum(low, v);
    }
    alignas(64) int16_t highs[Bits::size()], lows[Bits::size()];
    high.store(highs);
    low.store(lows);
    highest = *std::max_element(highs, highs + Bits::size());
    lowest = *std::min_element(lows, lows + Bits::size());
  }
  for (; i < n; ++i) {
    highest = std::max(highest, bits[i]);
    lowest = std::min(lowest, bits[i]);
  }
  const scalar_t max{static_cast<uint16_t>(highest >= 0 ? highest : lowest)};
  return static_cast<float>(*as_vec(&max)) * scale;
}

template <typename scalar_t>
acc_t<scalar_t> max(const scalar_t* x, int64_t n, acc_t<scalar_t> scale) {
  if constexpr (sizeof(scalar_t) == sizeof(int16_t)) {
    if (scale > 0) {
      return scaled_max_of_bits(x, n, scale);
    }
  }
  return scaled_max(x, n, scale);
}

// max of z over the chunk, possibly missing a NaN. A softcap keeps the order of the logits.
template <typename scalar_t>
acc_t<scalar_t> chunk_max(const scalar_t* x, int64_t n, LogitMap<acc_t<scalar_t>> map) {
  using acc = acc_t<scalar_t>;
  const acc scaled = max(x, n, map.scale);
  if (map.softcap == 0) {
    return scaled;
  }
  const Capped<acc> z({1, map.softcap});
  return first_lane<acc>(z.base(Vec<acc>(scaled)) * z.factor);
}

template <typename scalar_t>
bool has_nan(const scalar_t* x, int64_t n, acc_t<scalar_t> scale) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> factor(scale);
  Vec<acc> seen(0);
  for (int64_t i = 0; i < n; i += kBlock<acc>) {
    const auto v = load(x + i, std::min(n - i, kBlock<acc>));
    seen = at::vec::maximum(seen, at::vec::maximum(v.lo * factor, v.hi * factor));
  }
  alignas(64) acc lanes[Vec<acc>::size()];
  seen.store(lanes);
  return std::any_of(lanes, lanes + Vec<acc>::size(), [](acc lane) { return std::isnan(lane); });
}

// Prefetches the block at `ahead` + i, which may be past the end.
template <typename scalar_t>
void prefetch_block(const scalar_t* ahead, int64_t i) {
  constexpr uintptr_t cache_line = 64, bytes = kBlock<acc_t<scalar_t>> * sizeof(scalar_t);
  const uintptr_t block = reinterpret_cast<uintptr_t>(ahead) + i * sizeof(scalar_t);
  for (uintptr_t line = 0; line < bytes; line += cache_line) {
    __builtin_prefetch(reinterpret_cast<const void*>(block + line));
  }
}

template <bool need_wsum, bool need_tilted, bool keep_exps, typename scalar_t, typename Map>
void sums(const scalar_t* x, const acc_t<scalar_t>* w, int64_t n, const Map& z, acc_t<scalar_t>* exps,
          const scalar_t* ahead, ChunkStats<acc_t<scalar_t>>& stats) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> minus_max(-stats.max), zero(0);
  Pair<acc> sum{zero, zero}, tilted{zero, zero}, wsum{zero, zero}, weights{zero, zero};
  const auto block = [&](const Pair<acc>& v, Pair<acc> w, int64_t valid) {
    const Pair<acc> y = shifted(z, base_of(z, v), minus_max);
    Pair<acc> e{exp(y.lo), exp(y.hi)};
    if (valid < kBlock<acc>) {
      e = keep_first<acc>(e, valid, 0);
      w = keep_first<acc>(w, valid, 0);
    }
    sum.lo = sum.lo + e.lo;
    sum.hi = sum.hi + e.hi;
    if constexpr (need_tilted) {
      tilted.lo = at::vec::fmadd(finite(y.lo), e.lo, tilted.lo);
      tilted.hi = at::vec::fmadd(finite(y.hi), e.hi, tilted.hi);
    }
    if constexpr (need_wsum) {  // y may be -inf, and -inf * 0 would be NaN
      wsum.lo = at::vec::fmadd(Vec<acc>::blendv(y.lo, zero, w.lo == zero), w.lo, wsum.lo);
      wsum.hi = at::vec::fmadd(Vec<acc>::blendv(y.hi, zero, w.hi == zero), w.hi, wsum.hi);
      weights.lo = weights.lo + w.lo;
      weights.hi = weights.hi + w.hi;
    }
    return e;
  };
  const Pair<acc> ones{Vec<acc>(1), Vec<acc>(1)};
  const bool weighted = need_wsum && w != nullptr;
  int64_t i = 0;
  for (; i + kBlock<acc> <= n; i += kBlock<acc>) {
    prefetch_block(ahead, i);
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
  stats.tilted = need_tilted ? lane_sum(tilted.lo + tilted.hi) : acc(0);
  stats.wsum = need_wsum ? lane_sum(wsum.lo + wsum.hi) : acc(0);
  stats.weight = need_wsum ? lane_sum(weights.lo + weights.hi) : acc(0);
}

template <typename scalar_t>
ChunkStats<acc_t<scalar_t>> stats(const scalar_t* x, const acc_t<scalar_t>* w, int64_t n, LogitMap<acc_t<scalar_t>> map,
                                  bool need_wsum, bool need_tilted, acc_t<scalar_t>* exps, const scalar_t* next) {
  using acc = acc_t<scalar_t>;
  constexpr acc infinity = std::numeric_limits<acc>::infinity();
  const acc max = chunk_max(x, n, map);
  ChunkStats<acc> result{std::isfinite(max) ? max : 0, 0, 0, 0, 0};
  if (std::isfinite(max) || need_wsum) {
    const scalar_t* ahead = next ? next : x;
    with_map(map, [&](const auto& z) {
      with_bools([&](auto wsum, auto tilted, auto keep) { sums<wsum, tilted, keep>(x, w, n, z, exps, ahead, result); },
                 need_wsum, need_tilted, exps != nullptr);
    });
  }
  if (std::isfinite(max) && result.sum < infinity) {
    return result;
  }
  // All -inf, or a +inf or NaN: only wsum is used, and it follows IEEE arithmetic.
  const bool nan = std::isfinite(max) || has_nan(x, n, map.scale);
  result.max = nan ? std::numeric_limits<acc>::quiet_NaN() : max;
  result.sum = 0;
  if (exps) {
    std::fill_n(exps, n, acc(0));
  }
  return result;
}

// The gradient from exponentials: slope (scale e - offset w). Without label smoothing the offset is 0, and the weights
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
                    LogitMap<acc_t<scalar_t>> map, acc_t<scalar_t> scale, acc_t<scalar_t> offset, scalar_t* out,
                    bool past_cache) {
  using acc = acc_t<scalar_t>;
  const GradBlock<acc> grad_of(w, scale, offset);
  with_map(map, [&](const auto& z) {
    write_blocks(n, out, past_cache, [&](int64_t i, auto valid) {
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
          acc_t<scalar_t> scale, acc_t<scalar_t> tilt, acc_t<scalar_t> offset, scalar_t* out, bool past_cache) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> minus_shift(-shift), factor(scale), tilt_by(tilt);
  const auto write = [&](const auto& z, const GradBlock<acc>& grad_of, const auto& factors) {
    write_blocks(n, out, past_cache, [&](int64_t i, auto valid) {
      const Pair<acc> base = base_of(z, load(x + i, valid));
      const Pair<acc> y = shifted(z, base, minus_shift);
      return grad_of(z, base, factors(y, Pair<acc>{exp(y.lo), exp(y.hi)}), i, valid);
    });
  };
  with_map(map, [&](const auto& z) {
    if (tilt == 0) {
      write(z, GradBlock<acc>(w, scale, offset), [](const Pair<acc>&, const Pair<acc>& e) { return e; });
      return;
    }
    write(z, GradBlock<acc>(w, 1, offset), [&](const Pair<acc>& y, const Pair<acc>& e) {
      return Pair<acc>{e.lo * at::vec::fmadd(finite(y.lo), tilt_by, factor),
                       e.hi * at::vec::fmadd(finite(y.hi), tilt_by, factor)};
    });
  });
}

template <typename scalar_t>
void log_prob(const scalar_t* x, int64_t n, LogitMap<acc_t<scalar_t>> map, acc_t<scalar_t> lse, acc_t<scalar_t> lse_low,
              scalar_t* out, bool past_cache) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> minus_lse(-lse), low(lse_low);
  with_map(map, [&](const auto& z) {
    write_blocks(n, out, past_cache, [&](int64_t i, auto valid) {
      const Pair<acc> y = shifted(z, base_of(z, load(x + i, valid)), minus_lse);
      return Pair<acc>{y.lo - low, y.hi - low};
    });
  });
}

template <typename scalar_t>
void parts(const scalar_t* q, const acc_t<scalar_t>* w, int64_t n, acc_t<scalar_t> kept, acc_t<scalar_t> per_class,
           acc_t<scalar_t>* out) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> factor(kept), offset(per_class);
  write_blocks(n, out, /*past_cache=*/false, [&](int64_t i, auto valid) {
    const Pair<acc> v = load(q + i, valid);
    const Pair<acc> part{at::vec::fmadd(v.lo, factor, offset), at::vec::fmadd(v.hi, factor, offset)};
    if (w == nullptr) {
      return part;
    }
    const Pair<acc> weight = load(w + i, valid);
    return Pair<acc>{part.lo * weight.lo, part.hi * weight.hi};
  });
}

template <typename scalar_t>
void parts_grad(const scalar_t* x, const acc_t<scalar_t>* parts, const acc_t<scalar_t>* w, int64_t n,
                LogitMap<acc_t<scalar_t>> map, acc_t<scalar_t> lse, acc_t<scalar_t> lse_low, acc_t<scalar_t> factor,
                scalar_t* out, bool past_cache) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> minus_lse(-lse), low(lse_low), k(factor), zero(0), lowest(-std::numeric_limits<acc>::infinity());
  const auto grad = [&](const Vec<acc>& y, const Vec<acc>& part, const Vec<acc>& weight) {
    return Vec<acc>::blendv((y - low) * (k * weight), zero, (y == lowest) & (part == zero));
  };
  with_map(map, [&](const auto& z) {
    write_blocks(n, out, past_cache, [&](int64_t i, auto valid) {
      const Pair<acc> y = shifted(z, base_of(z, load(x + i, valid)), minus_lse), part = load(parts + i, valid);
      const Pair<acc> weight = w ? load(w + i, valid) : Pair<acc>{Vec<acc>(1), Vec<acc>(1)};
      return Pair<acc>{grad(y.lo, part.lo, weight.lo), grad(y.hi, part.hi, weight.hi)};
    });
  });
}

template <typename scalar_t>
void scale(scalar_t* out, int64_t n, acc_t<scalar_t> factor) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> s(factor);
  write_blocks(n, out, /*past_cache=*/false, [&](int64_t i, auto valid) {
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
void fill(scalar_t* out, int64_t n, acc_t<scalar_t> value, bool past_cache) {
  using acc = acc_t<scalar_t>;
  const Vec<acc> v(value);
  write_blocks(n, out, past_cache, [&](int64_t, auto) { return Pair<acc>{v, v}; });
}

// As RowOptions::is_bad, which the variants would share.
bool any_bad(const RowOptions& options, const int64_t* target, int64_t n) {
  const auto classes = static_cast<uint64_t>(options.num_classes);
  const int64_t ignored = options.ignore_index;
  uint64_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    bad |= (static_cast<uint64_t>(target[i]) >= classes) & (target[i] != ignored) ? 1 : 0;
  }
  return bad != 0;
}

double kept_rows(const int64_t* target, int64_t n, int64_t ignored) {
  return sum_of<double>(0, n, [&](int64_t i) { return target[i] == ignored ? 0.0 : 1.0; });
}

template <typename acc>
double loss(const int64_t* target, int64_t n, int64_t ignored, double share, double per_class, const acc* lse,
            const acc* lse_low, const acc* picked, const acc* wsum) {
  double sum = 0;
  with_bools(
      [&](auto shared, auto smoothed) {
        sum = sum_of<double>(0, n, [&](int64_t i) {
          const double high = lse[i];
          double row = high - high;
          if constexpr (shared) {
            row += share * (high - picked[i] + lse_low[i]);
          }
          if constexpr (smoothed) {
            row -= per_class * wsum[i];
          }
          return target[i] == ignored ? 0.0 : row;
        });
      },
      share != 0, per_class != 0);
  return sum;
}

template <typename scalar_t>
constexpr ChunkKernels<scalar_t> kernels() {
  return {stats<scalar_t>,          grad_from_exps<scalar_t>,
          grad<scalar_t>,           log_prob<scalar_t>,
          fill<scalar_t>,           max<scalar_t>,
          scale<scalar_t>,          parts<scalar_t>,
          parts_grad<scalar_t>,     mapped<scalar_t>,
          store_one<scalar_t>,      finish_streaming,
          tile_kernels<scalar_t>(), {any_bad, kept_rows, loss<acc_t<scalar_t>>}};
}

}  // namespace

extern const KernelTable table;
const KernelTable table{kernels<float>(), kernels<double>(), kernels<bf16>(), kernels<f16>()};

}  // namespace npu_xent::cpu::CPU_CAPABILITY
