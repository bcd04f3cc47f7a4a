// Sweeps over a tile: rows side by side, one in each lane of a vector. Included only by chunk_kernels.cpp, and like it
// compiled once per instruction set. Per-row arithmetic is vectorised too, in double, since rows may have only two
// classes.
//
// Rows become planes (TileMemory) by transposition. Where the classes are not adjacent in memory, but the rows are,
// memory has the order of planes already.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "cpu/kernels/vec_blocks.h"
#include "cpu/kernels/vec_math.h"
#include "cpu/row_types.h"

namespace npu_xent::cpu::CPU_CAPABILITY {
namespace {

template <typename acc>
Pair<acc> load_block(const acc* p) {
  return load(p, kBlock<acc>);
}
template <typename acc>
void store_block(acc* p, const Pair<acc>& v) {
  store(p, v, kBlock<acc>);
}
template <typename acc>
Pair<acc> broadcast(acc value) {
  return {Vec<acc>(value), Vec<acc>(value)};
}

// The maps of chunk_kernels.cpp, with numbers of their own for each lane: those at i and beyond.
template <typename acc>
struct LanesUnscaled {
  static constexpr bool capped = false;

  LanesUnscaled(const TileMemory<acc>&, int64_t) {}
  Pair<acc> scaled(const Pair<acc>& x) const { return x; }
  Pair<acc> base(const Pair<acc>& x) const { return x; }
  Pair<acc> value(const Pair<acc>& base) const { return base; }
};
template <typename acc>
struct LanesScaled {
  static constexpr bool capped = false;
  Pair<acc> factor;

  LanesScaled(const TileMemory<acc>& m, int64_t i) : factor(load_block(m.scale + i)) {}
  Pair<acc> scaled(const Pair<acc>& x) const { return {x.lo * factor.lo, x.hi * factor.hi}; }
  Pair<acc> base(const Pair<acc>& x) const { return x; }
  Pair<acc> value(const Pair<acc>& base) const { return scaled(base); }
};
template <typename acc>
struct LanesCapped {
  static constexpr bool capped = true;
  Pair<acc> scale, softcap, inverse;

  LanesCapped(const TileMemory<acc>& m, int64_t i)
      : scale(load_block(m.scale + i)),
        softcap(load_block(m.softcap + i)),
        inverse{Vec<acc>(1) / softcap.lo, Vec<acc>(1) / softcap.hi} {}
  Pair<acc> scaled(const Pair<acc>& x) const { return {x.lo * scale.lo, x.hi * scale.hi}; }
  Pair<acc> base(const Pair<acc>& x) const { return base_of_scaled(scaled(x)); }
  Pair<acc> base_of_scaled(const Pair<acc>& x) const { return {tanh(x.lo * inverse.lo), tanh(x.hi * inverse.hi)}; }
  Pair<acc> value(const Pair<acc>& base) const { return {base.lo * softcap.lo, base.hi * softcap.hi}; }
};

// x[i] = f(x[i]), vectorised. n is a multiple of kBlock<double>.
template <typename F>
void apply(double* x, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += Vec<double>::size()) {
    f(Vec<double>::loadu(x + i)).store(x + i);
  }
}

// Transposes a square of vectors, by interleaving log2(size) times.
template <typename acc>
void transpose(std::array<Vec<acc>, Vec<acc>::size()>& v) {
  constexpr int64_t size = Vec<acc>::size(), half = size / 2;
  for (int64_t stage = 1; stage < size; stage *= 2) {
    std::array<Vec<acc>, size> next;
    for (int64_t i = 0; i < half; ++i) {
      std::tie(next[2 * i], next[2 * i + 1]) = at::vec::interleave2(v[i], v[i + half]);
    }
    v = next;
  }
}

// A sum with its rounding errors (Knuth's two-sum).
template <typename acc>
struct ExactSum {
  Pair<acc> high = broadcast(acc(0)), low = high;

  void add(const Pair<acc>& x) {
    add(x.lo, high.lo, low.lo);
    add(x.hi, high.hi, low.hi);
  }
  Pair<acc> value() const { return {high.lo + low.lo, high.hi + low.hi}; }

 private:
  static void add(const Vec<acc>& x, Vec<acc>& sum, Vec<acc>& rounding) {
    const Vec<acc> before = sum;
    sum = before + x;
    const Vec<acc> added = sum - before;
    rounding = rounding + ((before - (sum - added)) + (x - added));
  }
};

constexpr double kQuietNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Calls f(i) for each lane. No iteration reads what another one writes.
template <typename F>
void for_lanes(int64_t lanes, const F& f) {
#pragma GCC ivdep
  for (int64_t i = 0; i < lanes; ++i) {
    f(i);
  }
}

// values[i stride] of the rows, and zeros in the lanes beyond; all zeros for null.
template <typename T>
void read_rows(const T* values, int64_t stride, int64_t rows, int64_t lanes, double* to) {
  if (values == nullptr) {
    std::fill_n(to, lanes, 0.0);
    return;
  }
  for_lanes(rows, [&](int64_t i) { to[i] = static_cast<double>(values[i * stride]); });
  std::fill(to + rows, to + lanes, 0.0);
}

// The sweeps over one tile. The lanes beyond its rows have logits 0 and, where there are targets, a valid one; nothing
// is stored for them.
template <typename scalar_t>
class TileSweep {
 public:
  using acc = acc_t<scalar_t>;

  TileSweep(const Rows<scalar_t>& rows, const Tile& tile, TileMemory<acc>& memory)
      : r_(rows),
        o_(rows.options),
        t_(tile),
        lanes_(tile.lanes),
        one_image_(tile.first % rows.layout.inner + tile.rows <= rows.layout.inner),
        scaled_(o_.logit_scale != 1 || o_.softcap != 0 || rows.temperature),
        m_(memory) {
    auto& m = m_;
    const int64_t ignore = o_.ignore_index, start = o_.class_start;
    if (rows.target) {
      std::copy_n(rows.target + tile.first, tile.rows, m.target);
      std::fill(m.target + tile.rows, m.target + lanes_, start);
      for_lanes(lanes_, [&](int64_t i) {
        m.column[i] = m.target[i] == ignore ? -1 : m.target[i] - start;
        m.kept[i] = m.target[i] == ignore ? acc(0) : acc(1);
      });
      int64_t ignored = 0;
      for (int64_t i = 0; i < lanes_; ++i) {
        ignored += m.target[i] == ignore ? 1 : 0;
      }
      any_ignored_ = ignored != 0;
    } else {
      std::fill_n(m.kept, lanes_, acc(1));
    }
    const double scale = o_.logit_scale, softcap = o_.softcap, grad_scale = o_.grad_scale;
    if (!rows.temperature) {
      std::fill_n(m.scale, lanes_, static_cast<acc>(scale));
      std::fill_n(m.softcap, lanes_, static_cast<acc>(softcap));
      std::fill_n(m.u, lanes_, grad_scale);
      return;
    }
    read_rows(rows.temperature + tile.first, 1, tile.rows, lanes_, m.work);
    std::fill(m.work + tile.rows, m.work + lanes_, 1.0);
    for_lanes(lanes_, [&](int64_t i) {
      m.scale[i] = static_cast<acc>(scale / m.work[i]);
      m.softcap[i] = static_cast<acc>(softcap / m.work[i]);
      m.u[i] = grad_scale / m.work[i];
    });
  }

  void stats(bool read_ignored, const Stats<scalar_t>& out, const Output<scalar_t>& log_prob) {
    skip_ignored(!read_ignored);
    read_stats(out);
    auto& m = m_;
    for_lanes(log_prob.data ? lanes_ : 0, [&](int64_t i) {
      m.shift[i] = static_cast<acc>(std::abs(m.high[i]) < kInfinity ? m.high[i] : kQuietNaN);
      m.offset[i] = static_cast<acc>(m.low[i]);
    });
    for (int64_t c = 0; log_prob.data && c < r_.n_cols; c += t_.classes) {
      load_classes(c);
      subtract_lse(classes(c));
      store_classes(c, log_prob);
    }
  }

  void grad(const double* totals, const Upstream<scalar_t>& upstream, const acc* lse, const acc* lse_low,
            const acc* entropy, const Output<scalar_t>& grad) {
    auto& m = m_;
    const auto read = [&](const acc* values, int64_t stride, double* to) {
      read_rows(values ? values + t_.first * stride : nullptr, stride, t_.rows, lanes_, to);
    };
    read(lse, 1, m.high);
    read(lse_low, 1, m.low);
    read(upstream.grad_lse, upstream.lse_stride, m.work);
    // Ignored rows get only the gradient of lse; their logits are read only if it is not 0.
    for_lanes(lanes_, [&](int64_t i) { m.keep[i] = m.kept[i] != 0 || m.work[i] != 0 ? acc(1) : acc(0); });
    any_skipped_ = any_ignored_;
    read(upstream.grad_loss, upstream.loss_stride, m.a);
    read(upstream.grad_z_loss, upstream.z_loss_stride, m.b);
    if (r_.probabilities) {
      read(r_.part_sum, 1, m.b);
      for_lanes(lanes_, [&](int64_t i) {
        m.offset[i] = static_cast<acc>(m.a[i] * m.u[i]);
        m.a[i] = m.a[i] * m.b[i] + m.work[i];
      });
      write_grad(/*tilted=*/false, grad);
      return;
    }
    const bool mean = o_.reduction == Reduction::mean;
    // Not 0 / 0: only the gradient of a mean loss over no weight is undefined.
    const double divisor = mean && upstream.grad_loss ? totals[kKeptWeight] : 1;
    const double z_divisor = mean ? totals[kKeptRows] : 1;
    for_lanes(lanes_, [&](int64_t i) {
      m.b[i] = (m.a[i] + m.b[i]) / z_divisor;
      m.a[i] = m.a[i] / divisor;
    });
    coefficients(totals[kClassWeight]);
    if (upstream.grad_lse) {
      for_lanes(lanes_, [&](int64_t i) { m.a[i] += m.work[i]; });
    }
    const bool tilted = upstream.grad_entropy != nullptr;
    if (tilted) {
      read(upstream.grad_entropy, upstream.entropy_stride, m.h);
      read(entropy, 1, m.entropy);
      for_lanes(lanes_, [&](int64_t i) {
        m.h[i] = m.kept[i] != 0 ? m.h[i] : 0;
        m.entropy[i] = m.kept[i] != 0 ? m.entropy[i] : 0;
      });
    }
    write_grad(tilted, grad);
  }

  void stats_grad(bool read_ignored, const double* totals, const Stats<scalar_t>& out, const Output<scalar_t>& grad) {
    skip_ignored(!read_ignored);
    read_stats(out);
    const bool mean = o_.reduction == Reduction::mean;
    std::fill_n(m_.a, lanes_, mean ? 1 / totals[kKeptWeight] : 1);
    std::fill_n(m_.b, lanes_, mean ? 1 / totals[kKeptRows] : 1);
    coefficients(totals[kClassWeight]);
    skip_ignored(true);  // the gradient of ignored rows is 0, even if their statistics were read
    if (t_.classes >= r_.n_cols && o_.softcap == 0) {
      scale_exps(grad);
    } else {
      write_grad(/*tilted=*/false, grad);
    }
  }

  void probability_grad(const acc* grad_loss, const acc* lse, const acc* lse_low, const Output<scalar_t>& grad) {
    auto& m = m_;
    const double kept = 1 - o_.label_smoothing;
    const auto read = [&](const acc* values, double* to) { read_rows(values + t_.first, 1, t_.rows, lanes_, to); };
    read(grad_loss, m.a);
    read(lse, m.high);
    read(lse_low, m.low);
    for_lanes(lanes_, [&](int64_t i) {
      m.factor[i] = static_cast<acc>(-m.a[i] * kept);
      m.shift[i] = static_cast<acc>(std::abs(m.high[i]) < kInfinity ? m.high[i] : kQuietNaN);
      m.offset[i] = static_cast<acc>(m.low[i]);
    });
    for (int64_t c = 0; c < r_.n_cols; c += t_.classes) {
      load_planes(r_.logits, r_.layout, c, m.planes);
      load_parts</*need_sum=*/false>(c);
      grad_of_parts(weight_from(c), classes(c));
      store_classes(c, grad);
    }
  }

 private:
  int64_t classes(int64_t c) const { return std::min(t_.classes, r_.n_cols - c); }
  // With few classes, vectors find the targets' columns faster than indices do.
  static constexpr int64_t kFewClasses = 32;
  void find_targets(int64_t c, int64_t n) {
    auto& m = m_;
    for_lanes(lanes_, [&](int64_t i) {
      const int64_t column = m.column[i] - c;
      m.place[i] = static_cast<acc>(column >= 0 && column < n ? column : -1);
    });
  }
  // to[i] = the target's element of row i in the planes, if it is among the n classes from c on.
  void pick(int64_t c, int64_t n, acc* to) {
    if (n > kFewClasses) {
      for (int64_t i = 0; i < t_.rows; ++i) {
        const int64_t column = m_.column[i] - c;
        if (column >= 0 && column < n) {
          to[i] = m_.planes[column * lanes_ + i];
        }
      }
      return;
    }
    find_targets(c, n);
    for (int64_t i = 0; i < lanes_; i += kBlock<acc>) {
      const Pair<acc> place = load_block(m_.place + i);
      Pair<acc> picked = load_block(to + i);
      for (int64_t k = 0; k < n; ++k) {
        const Pair<acc> x = load_block(m_.planes + k * lanes_ + i);
        const Vec<acc> here(static_cast<acc>(k));
        picked = {Vec<acc>::blendv(picked.lo, x.lo, place.lo == here),
                  Vec<acc>::blendv(picked.hi, x.hi, place.hi == here)};
      }
      store_block(to + i, picked);
    }
  }
  // The target's element of row i = from[i].
  void put(int64_t c, int64_t n, const acc* from) {
    if (n > kFewClasses) {
      for (int64_t i = 0; i < t_.rows; ++i) {
        const int64_t column = m_.column[i] - c;
        if (column >= 0 && column < n) {
          m_.planes[column * lanes_ + i] = from[i];
        }
      }
      return;
    }
    find_targets(c, n);
    for (int64_t i = 0; i < lanes_; i += kBlock<acc>) {
      const Pair<acc> place = load_block(m_.place + i), value = load_block(from + i);
      for (int64_t k = 0; k < n; ++k) {
        acc* p = m_.planes + k * lanes_ + i;
        const Pair<acc> x = load_block(p);
        const Vec<acc> here(static_cast<acc>(k));
        store_block(p, Pair<acc>{Vec<acc>::blendv(x.lo, value.lo, place.lo == here),
                                 Vec<acc>::blendv(x.hi, value.hi, place.hi == here)});
      }
    }
  }
  const acc* weight_from(int64_t c) const { return r_.weight ? r_.weight + o_.class_start + c : nullptr; }

  // Whether the logits of ignored rows count as zeros, and their results are zeros.
  void skip_ignored(bool skip) {
    any_skipped_ = skip && any_ignored_;
    for_lanes(lanes_, [&, &m = m_](int64_t i) { m.keep[i] = skip ? m.kept[i] : acc(1); });
  }

  // Calls f(i, map) for each block of lanes.
  template <typename F>
  void for_each_block(const F& f) {
    const auto run = [&](auto map_of) {
      for (int64_t i = 0; i < lanes_; i += kBlock<acc>) {
        f(i, map_of(i));
      }
    };
    if (o_.softcap != 0) {
      run([&](int64_t i) { return LanesCapped<acc>(m_, i); });
    } else if (scaled_) {
      run([&](int64_t i) { return LanesScaled<acc>(m_, i); });
    } else {
      run([&](int64_t i) { return LanesUnscaled<acc>(m_, i); });
    }
  }

  // The planes of the classes from c on; zeros in the lanes that are skipped or beyond the rows.
  void load_classes(int64_t c) {
    load_planes(r_.logits, r_.layout, c, m_.planes);
    clear_skipped(classes(c));
  }
  // parts = w ((1 - e) q + e/C), and on request their sum.
  template <bool need_sum>
  void load_parts(int64_t c) {
    load_planes(r_.probabilities, r_.probability_layout, c, m_.parts);
    const int64_t n = classes(c);
    const double e = o_.label_smoothing;
    const Vec<acc> kept(static_cast<acc>(1 - e)), per_class(static_cast<acc>(e / static_cast<double>(o_.num_classes)));
    const acc* w = weight_from(c);
    for (int64_t i = 0; i < lanes_; i += kBlock<acc>) {
      ExactSum<acc> sum;
      for (int64_t k = 0; k < n; ++k) {
        acc* p = m_.parts + k * lanes_ + i;
        const Pair<acc> q = load_block(p);
        const Vec<acc> weight(w ? w[k] : acc(1));
        const Pair<acc> part{at::vec::fmadd(q.lo, kept, per_class) * weight,
                             at::vec::fmadd(q.hi, kept, per_class) * weight};
        store_block(p, part);
        if constexpr (need_sum) {
          sum.add(part);
        }
      }
      store_block(m_.sum + i, sum.high);
      store_block(m_.rounding + i, sum.low);
    }
    for_lanes(need_sum ? lanes_ : 0, [&, &m = m_](int64_t i) {
      m.part_sum[i] = static_cast<double>(m.sum[i]) + static_cast<double>(m.rounding[i]);
    });
  }
  // The classes from c on of a tensor like the logits.
  void load_planes(const scalar_t* x, const Layout& layout, int64_t c, acc* planes) {
    const int64_t n = classes(c);
    x += c * layout.column;
    if (layout.column == 1) {
      load_rows(x, layout, n, planes);
    } else if (one_image_) {
      for (int64_t j = 0; j < n; ++j) {
        load_plane(x + layout.row_start(t_.first) + j * layout.column, planes + j * lanes_);
      }
    } else {
      std::fill_n(planes, n * lanes_, acc(0));
      for (int64_t i = 0; i < t_.rows; ++i) {
        const scalar_t* row = x + layout.row_start(t_.first + i);
        for (int64_t j = 0; j < n; ++j) {
          planes[j * lanes_ + i] = static_cast<acc>(*as_vec(row + j * layout.column));
        }
      }
    }
  }
  void load_plane(const scalar_t* x, acc* plane) {
    int64_t i = 0;
    for (; i + kBlock<acc> <= t_.rows; i += kBlock<acc>) {
      store_block(plane + i, load(x + i, kBlock<acc>));
    }
    for (; i < lanes_; i += kBlock<acc>) {
      store_block(plane + i, i < t_.rows ? load(x + i, t_.rows - i) : broadcast(acc(0)));
    }
  }
  void load_rows(const scalar_t* x, const Layout& layout, int64_t n, acc* planes) {
    if constexpr (std::is_same_v<scalar_t, acc>) {
      // Vectors past a row's end reach into the next rows, which must exist.
      const int64_t rows_behind = layout.inner - t_.first % layout.inner - t_.rows;
      if (one_image_ && t_.rows == lanes_ && rows_behind * layout.row >= Vec<acc>::size()) {
        transpose_rows(x + layout.row_start(t_.first), layout.row, n, planes);
        return;
      }
    }
    const auto copy = [](const scalar_t* from, acc* to, int64_t count) {
      write_blocks(count, to, /*past_cache=*/false, [&](int64_t i, auto valid) { return load(from + i, valid); });
    };
    if (one_image_ && layout.row == n) {
      copy(x + layout.row_start(t_.first), m_.rows, t_.rows * n);
    } else {
      for (int64_t i = 0; i < t_.rows; ++i) {
        copy(x + layout.row_start(t_.first + i), m_.rows + i * n, n);
      }
    }
    std::fill(m_.rows + t_.rows * n, m_.rows + lanes_ * n, acc(0));
    transpose_rows(m_.rows, n, n, planes);
  }
  void transpose_rows(const acc* x, int64_t row_stride, int64_t n, acc* planes) {
    constexpr int64_t size = Vec<acc>::size();
    for (int64_t i = 0; i < lanes_; i += size) {
      for (int64_t c = 0; c < n; c += size) {
        std::array<Vec<acc>, size> v;
        for (int64_t k = 0; k < size; ++k) {
          v[k] = Vec<acc>::loadu(x + (i + k) * row_stride + c);  // elements past the row's end are unused
        }
        transpose<acc>(v);
        acc* to = planes + c * lanes_ + i;
        if (c + size <= n) {
          for (int64_t k = 0; k < size; ++k) {
            v[k].store(to + k * lanes_);
          }
        } else {
          for (int64_t k = 0; k < n - c; ++k) {
            v[k].store(to + k * lanes_);
          }
        }
      }
    }
  }

  void store_classes(int64_t c, const Output<scalar_t>& out) {
    scalar_t* to = out.data + c * out.layout.column;
    const int64_t n = classes(c);
    if (out.layout.column == 1) {
      store_rows(to, n, out);
      return;
    }
    if (!one_image_) {
      for (int64_t i = 0; i < t_.rows; ++i) {
        scalar_t* row = to + out.layout.row_start(t_.first + i);
        for (int64_t j = 0; j < n; ++j) {
          *as_vec(row + j * out.layout.column) = static_cast<vec_t<scalar_t>>(m_.planes[j * lanes_ + i]);
        }
      }
      return;
    }
    to += out.layout.row_start(t_.first);
    for (int64_t j = 0; j < n; ++j) {
      const acc* plane = m_.planes + j * lanes_;
      write_blocks(t_.rows, to + j * out.layout.column, out.past_cache,
                   [&](int64_t i, auto valid) { return load(plane + i, valid); });
    }
  }
  void store_rows(scalar_t* to, int64_t n, const Output<scalar_t>& out) {
    constexpr int64_t size = Vec<acc>::size();
    for (int64_t i = 0; i < t_.rows; i += size) {
      // Blocks of classes in descending order: each overwrites what the one after it stored past a row's end.
      for (int64_t c = (n - 1) / size * size; c >= 0; c -= size) {
        std::array<Vec<acc>, size> v;
        for (int64_t k = 0; k < size; ++k) {
          v[k] = c + k < n ? Vec<acc>::loadu(m_.planes + (c + k) * lanes_ + i) : Vec<acc>(0);
        }
        transpose<acc>(v);
        for (int64_t k = 0; k < size; ++k) {
          v[k].store(m_.rows + (i + k) * n + c);
        }
      }
    }
    const auto copy = [&](const acc* from, scalar_t* target, int64_t count) {
      write_blocks(count, target, out.past_cache, [&](int64_t i, auto valid) { return load(from + i, valid); });
    };
    if (one_image_ && out.layout.row == n) {
      copy(m_.rows, to + out.layout.row_start(t_.first), t_.rows * n);
    } else {
      for (int64_t i = 0; i < t_.rows; ++i) {
        copy(m_.rows + i * n, to + out.layout.row_start(t_.first + i), n);
      }
    }
  }

  void clear_skipped(int64_t n) {
    const Vec<acc> zero(0);
    for (int64_t i = 0; any_skipped_ && i < lanes_; i += kBlock<acc>) {
      const Pair<acc> keep = load_block(m_.keep + i);
      for (int64_t c = 0; c < n; ++c) {
        acc* p = m_.planes + c * lanes_ + i;
        const Pair<acc> x = load_block(p);
        store_block(
            p, Pair<acc>{Vec<acc>::blendv(x.lo, zero, keep.lo == zero), Vec<acc>::blendv(x.hi, zero, keep.hi == zero)});
      }
    }
  }

  void map_picked() {
    for_each_block([&](int64_t i, const auto& map) {
      store_block(m_.picked + i, map.value(map.base(load_block(m_.picked + i))));
    });
  }

  // Statistics of all classes. Leaves exp(z - max) of the last chunk in the planes.
  void read_stats(const Stats<scalar_t>& out) {
    std::fill_n(m_.picked, lanes_, acc(0));
    if (out.top1) {
      // Before the first chunk is compared, the target's logit must be known.
      for (int64_t i = 0; i < t_.rows; ++i) {
        const scalar_t* row = r_.logits + r_.layout.row_start(t_.first + i);
        const bool read = m_.column[i] >= 0 && m_.column[i] < r_.n_cols;
        m_.shift[i] = read ? static_cast<acc>(*as_vec(row + m_.column[i] * r_.layout.column)) : acc(0);
      }
      std::fill_n(m_.rival, lanes_, acc(0));
    }
    for (int64_t c = 0; c < r_.n_cols; c += t_.classes) {
      const int64_t n = classes(c);
      load_classes(c);
      if (r_.probabilities) {
        load_parts</*need_sum=*/true>(c);
        sum_exps</*need_wsum=*/true, /*need_tilted=*/false, /*parts=*/true>(nullptr, n);
      } else {
        pick(c, n, m_.picked);
        if (out.top1) {
          find_rivals(c, n);
        }
        with_bools([&](auto wsum, auto tilted) { sum_exps<wsum, tilted, false>(weight_from(c), n); },
                   out.wsum != nullptr, out.entropy != nullptr);
      }
      merge(c, n, out);
    }
    if (out.picked) {
      map_picked();
    }
    store_stats(out);
  }

  // rival = 1 where another class precedes the target: by a larger logit, or by an equal one in an earlier column.
  void find_rivals(int64_t c, int64_t n) {
    const acc sign = o_.logit_scale > 0 ? acc(1) : o_.logit_scale < 0 ? acc(-1) : acc(0);
    const Vec<acc> factor(sign), one(1);
    const auto precedes = [&](const Vec<acc>& x, const Vec<acc>& y, const Vec<acc>& before) {
      return (x * factor > y * factor) | ((x * factor == y * factor) & before);
    };
    for (int64_t i = 0; i < lanes_; ++i) {
      m_.offset[i] = static_cast<acc>(std::clamp<int64_t>(m_.column[i] - c, 0, n));
    }
    for (int64_t i = 0; i < lanes_; i += kBlock<acc>) {
      const Pair<acc> y = load_block(m_.shift + i), column = load_block(m_.offset + i);
      Pair<acc> rival = load_block(m_.rival + i);
      for (int64_t k = 0; k < n; ++k) {
        const Pair<acc> x = load_block(m_.planes + k * lanes_ + i);
        const Vec<acc> here(static_cast<acc>(k));
        rival = {Vec<acc>::blendv(rival.lo, one, precedes(x.lo, y.lo, here < column.lo)),
                 Vec<acc>::blendv(rival.hi, one, precedes(x.hi, y.hi, here < column.hi))};
      }
      store_block(m_.rival + i, rival);
    }
  }

  // ChunkStats of each lane: max is NaN for a lane with a NaN. The planes become exp(z - max). Each class has the
  // weight w, or with `parts` its part.
  template <bool need_wsum, bool need_tilted, bool parts>
  void sum_exps(const acc* w, int64_t n) {
    const Vec<acc> zero(0), infinity(std::numeric_limits<acc>::infinity());
    for_each_block([&](int64_t i, const auto& map) {
      using Map = std::decay_t<decltype(map)>;
      Pair<acc> top = broadcast(-std::numeric_limits<acc>::infinity());
      for (int64_t c = 0; c < n; ++c) {
        const Pair<acc> z = map.scaled(load_block(m_.planes + c * lanes_ + i));
        top = {at::vec::maximum(top.lo, z.lo), at::vec::maximum(top.hi, z.hi)};
      }
      if constexpr (Map::capped) {
        top = map.value(map.base_of_scaled(top));
      }
      store_block(m_.max + i, top);
      const Pair<acc> minus_max{Vec<acc>::blendv(zero, top.lo.neg(), top.lo.abs() < infinity),
                                Vec<acc>::blendv(zero, top.hi.neg(), top.hi.abs() < infinity)};
      // Sums of a few classes each, which are added up exactly: fewer rounding errors than in one sum.
      constexpr int64_t kFew = 8;
      ExactSum<acc> sum, tilted, wsum;
      for (int64_t begin = 0; begin < n; begin += kFew) {
        Pair<acc> few = broadcast(acc(0)), few_tilted = few, few_wsum = few;
        for (int64_t c = begin, end = std::min(n, begin + kFew); c < end; ++c) {
          acc* p = m_.planes + c * lanes_ + i;
          const Pair<acc> z = map.value(map.base(load_block(p)));
          const Pair<acc> y{z.lo + minus_max.lo, z.hi + minus_max.hi};
          const Pair<acc> e{exp(y.lo), exp(y.hi)};
          store_block(p, e);
          few = {few.lo + e.lo, few.hi + e.hi};
          if constexpr (need_tilted) {
            few_tilted = {at::vec::fmadd(finite(y.lo), e.lo, few_tilted.lo),
                          at::vec::fmadd(finite(y.hi), e.hi, few_tilted.hi)};
          }
          if constexpr (parts) {
            const Pair<acc> part = load_block(m_.parts + c * lanes_ + i);
            few_wsum = {few_wsum.lo + Vec<acc>::blendv(y.lo * part.lo, zero, part.lo == zero),
                        few_wsum.hi + Vec<acc>::blendv(y.hi * part.hi, zero, part.hi == zero)};
          } else if constexpr (need_wsum) {
            const acc weight = w ? w[c] : acc(1);
            if (weight != 0) {  // y may be -inf, and -inf * 0 would be NaN
              few_wsum = {at::vec::fmadd(y.lo, Vec<acc>(weight), few_wsum.lo),
                          at::vec::fmadd(y.hi, Vec<acc>(weight), few_wsum.hi)};
            }
          }
        }
        sum.add(few);
        if constexpr (need_tilted) {
          tilted.add(few_tilted);
        }
        if constexpr (need_wsum) {
          wsum.add(few_wsum);
        }
      }
      store_block(m_.sum + i, sum.high);
      store_block(m_.rounding + i, sum.low);
      if constexpr (need_tilted) {
        store_block(m_.tilted + i, tilted.value());
      }
      if constexpr (need_wsum) {  // the rounding error of an infinite sum is NaN
        const Pair<acc> exact = wsum.value();
        store_block(m_.wsum + i, Pair<acc>{Vec<acc>::blendv(wsum.high.lo, exact.lo, wsum.high.lo.abs() < infinity),
                                           Vec<acc>::blendv(wsum.high.hi, exact.hi, wsum.high.hi.abs() < infinity)});
      }
    });
  }

  // Adds the statistics of a chunk of n classes, from c on, to those of the classes before.
  void merge(int64_t c, int64_t n, const Stats<scalar_t>& out) {
    auto& m = m_;
    if (out.wsum && !r_.probabilities) {
      const acc* w = weight_from(c);
      double weight = 0;
      for (int64_t k = 0; k < n; ++k) {
        weight += w ? w[k] : acc(1);
      }
      std::fill_n(m.part_sum, lanes_, weight);
    }
    if (c == 0) {
      for_lanes(lanes_, [&](int64_t i) {
        const double max = m.max[i], sum = static_cast<double>(m.sum[i]) + static_cast<double>(m.rounding[i]);
        const bool usual = std::abs(max) < kInfinity;
        m.all_max[i] = max;
        m.all_sum[i] = usual ? sum : 0;
        m.special[i] = usual || max < 0 ? 0 : max;  // -inf adds nothing, NaN wins over +inf
      });
      for_lanes(out.entropy ? lanes_ : 0, [&](int64_t i) {
        const double tilted = m.tilted[i];
        m.all_tilted[i] = std::abs(m.all_max[i]) < kInfinity ? tilted : 0;
      });
      for_lanes(out.wsum ? lanes_ : 0, [&](int64_t i) {
        m.all_wsum[i] = m.wsum[i];
        m.all_parts[i] = m.part_sum[i];
        m.reference[i] = std::abs(m.all_max[i]) < kInfinity ? m.part_sum[i] * m.all_max[i] : 0;
      });
      return;
    }
    // The factors of the sums before, and of the chunk's.
    double *before = m.work, *here = m.below;
    for_lanes(lanes_, [&](int64_t i) {
      const double max = m.max[i], sum = static_cast<double>(m.sum[i]) + static_cast<double>(m.rounding[i]);
      const bool usual = std::abs(max) < kInfinity, first = m.all_sum[i] == 0;
      const double now = usual && (max > m.all_max[i] || first) ? max : m.all_max[i];
      before[i] = first ? 0 : m.all_max[i] - now;
      here[i] = usual ? max - now : 0;
      m.special[i] += usual || max < 0 ? 0 : max;
      m.all_max[i] = now;
      m.high[i] = usual ? sum : 0;
      m.low[i] = usual ? static_cast<double>(m.tilted[i]) + here[i] * sum : 0;
      m.all_tilted[i] += before[i] * m.all_sum[i];
    });
    apply(before, lanes_, [](const Vec<double>& x) { return x.exp(); });
    apply(here, lanes_, [](const Vec<double>& x) { return x.exp(); });
    for_lanes(lanes_, [&](int64_t i) {
      m.all_sum[i] = m.all_sum[i] * before[i] + m.high[i] * here[i];
      m.all_tilted[i] = (before[i] == 0 ? 0 : m.all_tilted[i] * before[i]) + (here[i] == 0 ? 0 : m.low[i] * here[i]);
    });
    for_lanes(out.wsum ? lanes_ : 0, [&](int64_t i) {
      const double max = m.max[i];
      m.all_wsum[i] += m.wsum[i];
      m.all_parts[i] += m.part_sum[i];
      m.reference[i] += std::abs(max) < kInfinity ? m.part_sum[i] * max : 0;
    });
  }

  // lse as high + low, and the other requested statistics.
  void store_stats(const Stats<scalar_t>& out) {
    auto& m = m_;
    if constexpr (std::is_same_v<acc, double>) {
      std::copy_n(m.all_sum, lanes_, m.log_sum);
      apply(m.log_sum, lanes_, [](const Vec<double>& x) { return x.log(); });
    } else {
      for_lanes(lanes_, [&](int64_t i) { m.log_sum[i] = log_from_1(m.all_sum[i]); });
      for_lanes(lanes_, [&](int64_t i) { m.log_sum[i] = m.all_sum[i] == 0 ? -kInfinity : m.log_sum[i]; });
    }
    for_lanes(lanes_, [&](int64_t i) {
      const double rounded = static_cast<acc>(m.all_max[i] + m.log_sum[i]);
      m.high[i] = m.special[i] != 0 ? m.special[i] : rounded;
      m.low[i] = std::abs(m.high[i]) < kInfinity ? (m.all_max[i] - m.high[i]) + m.log_sum[i] : 0;
    });
    // An ignored row that is not read has zeros.
    const auto store_rows = [&](acc* to, const auto& value) {
      to += t_.first;
      if (any_skipped_) {
        for_lanes(t_.rows, [&](int64_t i) { to[i] = m.keep[i] != 0 ? static_cast<acc>(value(i)) : acc(0); });
      } else {
        for_lanes(t_.rows, [&](int64_t i) { to[i] = static_cast<acc>(value(i)); });
      }
    };
    store_rows(out.lse, [&](int64_t i) { return m.high[i]; });
    store_rows(out.lse_low, [&](int64_t i) { return m.low[i]; });
    const int64_t n_cols = r_.n_cols;
    if (out.picked) {
      store_rows(out.picked,
                 [&](int64_t i) { return m.column[i] >= 0 && m.column[i] < n_cols ? m.picked[i] : acc(0); });
    }
    if (out.wsum) {
      store_rows(out.wsum, [&](int64_t i) {
        const double weight = m.all_parts[i], shift = (m.reference[i] - weight * m.high[i]) - weight * m.low[i];
        return m.all_wsum[i] + (weight == 0 ? m.reference[i] : shift);  // not 0 * inf
      });
    }
    if (out.part_sum) {
      store_rows(out.part_sum, [&](int64_t i) { return m.all_parts[i]; });
    }
    if (out.entropy) {  // log S - T / S, with S = sum e^(z - m) and T = sum (z - m) e^(z - m): two terms >= 0
      store_rows(out.entropy, [&](int64_t i) {
        const bool usual = m.special[i] == 0 && m.all_sum[i] > 0;
        return usual ? m.log_sum[i] - m.all_tilted[i] / m.all_sum[i] : kQuietNaN;
      });
    }
    for (int64_t i = 0; out.top1 && i < t_.rows; ++i) {
      out.top1[t_.first + i] = m.keep[i] != 0 && std::abs(m.high[i]) < kInfinity && m.column[i] >= 0 &&
                               m.column[i] < n_cols && m.rival[i] == 0;
    }
  }

  // a, b and s of row_math.h, without what comes through lse; a and b hold the upstream gradients of l and z, each
  // divided as a mean is.
  void coefficients(double class_weight) {
    auto& m = m_;
    const double e = o_.label_smoothing, share = 1 - e, per_class = e / static_cast<double>(o_.num_classes);
    const double to_all = e == 0 ? 0 : per_class * class_weight, lse_factor = 2 * o_.lse_square_scale;
    std::fill_n(m.weight, lanes_, 1.0);
    for (int64_t i = 0; r_.weight && i < lanes_; ++i) {
      m.weight[i] = m.kept[i] != 0 ? r_.weight[m.target[i]] : acc(1);
    }
    for_lanes(lanes_, [&](int64_t i) {
      const double loss = m.kept[i] != 0 ? m.a[i] : 0, z_loss = m.kept[i] != 0 ? m.b[i] : 0;
      m.b[i] = loss * share * m.weight[i];
      m.a[i] = m.b[i] + (e == 0 ? 0 : loss * to_all) + (lse_factor == 0 ? 0 : z_loss * lse_factor * m.high[i]);
      m.s[i] = loss * per_class * m.u[i];
      m.offset[i] = static_cast<acc>(m.s[i]);
    });
  }

  // The gradient from the planes, which hold exp(z - max) of all classes.
  void scale_exps(const Output<scalar_t>& grad) {
    auto& m = m_;
    for_lanes(lanes_, [&](int64_t i) {
      const bool usual = std::abs(m.high[i]) < kInfinity;
      m.factor[i] = static_cast<acc>(usual ? m.u[i] * m.a[i] / m.all_sum[i] : kQuietNaN);
    });
    std::fill_n(m.at_target, lanes_, acc(0));
    pick(0, r_.n_cols, m.at_target);
    // a p - b without the cancellation for confident predictions, where e is 1.
    for_lanes(lanes_, [&](int64_t i) {
      const double e = m.at_target[i], sum = m.all_sum[i], a = m.a[i];
      const double value = m.u[i] * (a * ((e - sum) / sum) + (a - m.b[i])) - m.s[i] * m.weight[i];
      m.at_target[i] = static_cast<acc>(std::abs(m.high[i]) < kInfinity ? value : kQuietNaN);
    });
    with_bools([&](auto offset) { scale_planes<offset>(weight_from(0), r_.n_cols); }, o_.label_smoothing != 0);
    store_grad(0, grad);
  }

  // planes = factor planes - offset w
  template <bool with_offset>
  void scale_planes(const acc* w, int64_t n) {
    for (int64_t i = 0; i < lanes_; i += kBlock<acc>) {
      const Pair<acc> factor = load_block(m_.factor + i), offset = load_block(m_.offset + i);
      for (int64_t c = 0; c < n; ++c) {
        acc* p = m_.planes + c * lanes_ + i;
        const Pair<acc> e = load_block(p);
        Pair<acc> g{e.lo * factor.lo, e.hi * factor.hi};
        if constexpr (with_offset) {
          const Vec<acc> minus(w ? -w[c] : acc(-1));
          g = {at::vec::fmadd(minus, offset.lo, g.lo), at::vec::fmadd(minus, offset.hi, g.hi)};
        }
        store_block(p, g);
      }
    }
  }

  // Stores the gradient of the classes from c on, which the planes hold but for that of the targets.
  void store_grad(int64_t c, const Output<scalar_t>& grad) {
    const int64_t n = classes(c);
    put(c, n, m_.at_target);
    clear_skipped(n);
    store_classes(c, grad);
  }

  // The gradient from a, b, s, h, and lse: reads the logits.
  void write_grad(bool tilted, const Output<scalar_t>& grad) {
    auto& m = m_;
    double* factor = m.special;  // exp(z - lse) is exp(z - high) times it
    for_lanes(lanes_, [&](int64_t i) { factor[i] = -m.low[i]; });
    apply(factor, lanes_, [](const Vec<double>& x) { return x.exp(); });
    for_lanes(lanes_, [&](int64_t i) {
      const bool usual = std::abs(m.high[i]) < kInfinity;
      const double a = tilted ? m.a[i] - m.h[i] * (m.entropy[i] - m.low[i]) : m.a[i];
      m.factor[i] = static_cast<acc>(usual ? m.u[i] * factor[i] * a : kQuietNaN);
      m.shift[i] = static_cast<acc>(usual ? m.high[i] : 0);
      m.tilt[i] = static_cast<acc>(tilted ? -m.u[i] * factor[i] * m.h[i] : 0);
    });
    for (int64_t c = 0; c < r_.n_cols; c += t_.classes) {
      const int64_t n = classes(c);
      load_classes(c);
      if (r_.probabilities) {
        load_parts</*need_sum=*/false>(c);
        grad_of_classes</*with_tilt=*/false, /*with_offset=*/true, /*parts=*/true>(nullptr, n);
        store_classes(c, grad);
        continue;
      }
      std::fill_n(m.picked, lanes_, acc(0));
      pick(c, n, m.picked);
      map_picked();
      grad_at_target(tilted);
      with_bools([&](auto tilt, auto offset) { grad_of_classes<tilt, offset, false>(weight_from(c), n); }, tilted,
                 o_.label_smoothing != 0);
      store_grad(c, grad);
    }
  }

  // The gradient of the target's column, avoiding the cancellation of a p - b for confident predictions.
  void grad_at_target(bool tilted) {
    auto& m = m_;
    double* grad = m.work;
    for_lanes(lanes_, [&](int64_t i) {
      m.below[i] = (static_cast<double>(m.picked[i]) - m.high[i]) - m.low[i];
      grad[i] = m.below[i];
    });
    apply(grad, lanes_, [](const Vec<double>& x) { return x.expm1(); });
    for_lanes(lanes_,
              [&](int64_t i) { grad[i] = m.u[i] * (m.a[i] * grad[i] + (m.a[i] - m.b[i])) - m.s[i] * m.weight[i]; });
    if (tilted) {
      double* p = m.log_sum;
      std::copy_n(m.below, lanes_, p);
      apply(p, lanes_, [](const Vec<double>& x) { return x.exp(); });
      for_lanes(lanes_, [&](int64_t i) {
        const double from_entropy = m.u[i] * m.h[i] * p[i] * (m.below[i] + m.entropy[i]);
        grad[i] -= std::abs(m.below[i]) < kInfinity && m.h[i] != 0 ? from_entropy : 0;
      });
    }
    if (o_.softcap != 0) {
      for_lanes(lanes_, [&](int64_t i) {
        const double capped = static_cast<double>(m.picked[i]) / static_cast<double>(m.softcap[i]);
        grad[i] *= (1 - capped) * (1 + capped);
      });
    }
    for_lanes(lanes_, [&](int64_t i) {
      m.at_target[i] = static_cast<acc>(std::abs(m.high[i]) < kInfinity ? grad[i] : kQuietNaN);
    });
  }

  // planes = slope ((factor + tilt (z - shift)) exp(z - shift) - offset w), with `parts` in place of w
  template <bool with_tilt, bool with_offset, bool parts>
  void grad_of_classes(const acc* w, int64_t n) {
    for_each_block([&](int64_t i, const auto& map) {
      using Map = std::decay_t<decltype(map)>;
      const Pair<acc> shift = load_block(m_.shift + i), factor = load_block(m_.factor + i);
      const Pair<acc> tilt = load_block(m_.tilt + i), offset = load_block(m_.offset + i);
      for (int64_t c = 0; c < n; ++c) {
        acc* p = m_.planes + c * lanes_ + i;
        const Pair<acc> base = map.base(load_block(p)), z = map.value(base);
        const Pair<acc> y{z.lo - shift.lo, z.hi - shift.hi};
        Pair<acc> k = factor;
        if constexpr (with_tilt) {
          k = {at::vec::fmadd(finite(y.lo), tilt.lo, k.lo), at::vec::fmadd(finite(y.hi), tilt.hi, k.hi)};
        }
        Pair<acc> g{exp(y.lo) * k.lo, exp(y.hi) * k.hi};
        if constexpr (parts) {
          const Pair<acc> part = load_block(m_.parts + c * lanes_ + i);
          g = {at::vec::fmadd(part.lo.neg(), offset.lo, g.lo), at::vec::fmadd(part.hi.neg(), offset.hi, g.hi)};
        } else if constexpr (with_offset) {
          const Vec<acc> minus(w ? -w[c] : acc(-1));
          g = {at::vec::fmadd(minus, offset.lo, g.lo), at::vec::fmadd(minus, offset.hi, g.hi)};
        }
        if constexpr (Map::capped) {
          const Vec<acc> one(1);
          g = {g.lo * ((one - base.lo) * (one + base.lo)), g.hi * ((one - base.hi) * (one + base.hi))};
        }
        store_block(p, g);
      }
    });
  }

  // planes = factor w (z - shift - offset), and 0 where a part is 0 and z is -inf
  void grad_of_parts(const acc* w, int64_t n) {
    const Vec<acc> zero(0), lowest(-std::numeric_limits<acc>::infinity());
    const auto grad = [&](const Vec<acc>& y, const Vec<acc>& low, const Vec<acc>& factor, const Vec<acc>& part) {
      return Vec<acc>::blendv((y - low) * factor, zero, (y == lowest) & (part == zero));
    };
    for_each_block([&](int64_t i, const auto& map) {
      const Pair<acc> high = load_block(m_.shift + i), low = load_block(m_.offset + i);
      const Pair<acc> factor = load_block(m_.factor + i);
      for (int64_t c = 0; c < n; ++c) {
        acc* p = m_.planes + c * lanes_ + i;
        const Pair<acc> z = map.value(map.base(load_block(p))), part = load_block(m_.parts + c * lanes_ + i);
        const Vec<acc> weight(w ? w[c] : acc(1));
        store_block(p, Pair<acc>{grad(z.lo - high.lo, low.lo, factor.lo * weight, part.lo),
                                 grad(z.hi - high.hi, low.hi, factor.hi * weight, part.hi)});
      }
    });
  }

  // planes = z - shift - offset
  void subtract_lse(int64_t n) {
    for_each_block([&](int64_t i, const auto& map) {
      const Pair<acc> high = load_block(m_.shift + i), low = load_block(m_.offset + i);
      for (int64_t c = 0; c < n; ++c) {
        acc* p = m_.planes + c * lanes_ + i;
        const Pair<acc> z = map.value(map.base(load_block(p)));
        store_block(p, Pair<acc>{z.lo - high.lo - low.lo, z.hi - high.hi - low.hi});
      }
    });
  }

  const Rows<scalar_t>& r_;
  const RowOptions& o_;
  const Tile& t_;
  const int64_t lanes_;
  const bool one_image_;
  const bool scaled_;
  bool any_ignored_ = false, any_skipped_ = false;
  TileMemory<acc>& m_;
};

template <typename scalar_t>
void tile_stats(const Rows<scalar_t>& rows, const Tile& tile, bool read_ignored, const Stats<scalar_t>& out,
                const Output<scalar_t>& log_prob, TileMemory<acc_t<scalar_t>>& memory) {
  TileSweep<scalar_t>(rows, tile, memory).stats(read_ignored, out, log_prob);
}

template <typename scalar_t>
void tile_grad(const Rows<scalar_t>& rows, const Tile& tile, const double* totals, const Upstream<scalar_t>& upstream,
               const acc_t<scalar_t>* lse, const acc_t<scalar_t>* lse_low, const acc_t<scalar_t>* entropy,
               const Output<scalar_t>& grad, TileMemory<acc_t<scalar_t>>& memory) {
  TileSweep<scalar_t>(rows, tile, memory).grad(totals, upstream, lse, lse_low, entropy, grad);
}

template <typename scalar_t>
void tile_stats_grad(const Rows<scalar_t>& rows, const Tile& tile, bool read_ignored, const double* totals,
                     const Stats<scalar_t>& out, const Output<scalar_t>& grad, TileMemory<acc_t<scalar_t>>& memory) {
  TileSweep<scalar_t>(rows, tile, memory).stats_grad(read_ignored, totals, out, grad);
}

template <typename scalar_t>
void tile_probability_grad(const Rows<scalar_t>& rows, const Tile& tile, const acc_t<scalar_t>* grad_loss,
                           const acc_t<scalar_t>* lse, const acc_t<scalar_t>* lse_low, const Output<scalar_t>& grad,
                           TileMemory<acc_t<scalar_t>>& memory) {
  TileSweep<scalar_t>(rows, tile, memory).probability_grad(grad_loss, lse, lse_low, grad);
}

template <typename scalar_t>
constexpr TileKernels<scalar_t> tile_kernels() {
  return {kBlock<acc_t<scalar_t>>, tile_stats<scalar_t>, tile_grad<scalar_t>, tile_stats_grad<scalar_t>,
          tile_probability_grad<scalar_t>};
}

}  // namespace
}  // namespace npu_xent::cpu::CPU_CAPABILITY
