// See rows.h. Scalar code, which runs once per row or chunk and calls the vectorised loops.
#include "cpu/rows.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "output_memory.h"

namespace npu_xent::cpu {
namespace {

// 16 KiB of fp32: a chunk and its exponentials fit in a first-level cache.
constexpr int64_t kChunk = 4096;
// The exponentials of a row are kept if they fit in a second-level cache. For longer rows they are computed twice; the
// results are bitwise identical.
constexpr int64_t kMaxExpBytes = int64_t{1} << 20;
// Elements per task: enough to hide the scheduling cost, and to prefetch from row to row.
constexpr int64_t kTask = 65536;
// Rows with more classes are long enough for vectors along the classes.
constexpr int64_t kMaxTileClasses = 256;
// Rows that a tile takes at once, if it has few classes.
constexpr int64_t kTileLanes = 128;
static_assert(kTileLanes <= kMaxLanes);
// Elements per task when scaling.
constexpr int64_t kScaleTask = 16384;
// Rows whose losses one task sums, independent of the number of threads.
constexpr int64_t kSumBlock = 4096;

int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// log sum exp of a row, with twice the precision of the stored dtype.
struct Lse {
  double high, low;
  double below(double x) const { return (x - high) - low; }
};

// log sum exp and the entropy over chunks.
class LogSumExp {
 public:
  void add(double max, double sum, double tilted) {
    if (!std::isfinite(max)) {
      special_ += max < 0 ? 0 : max;  // -inf adds nothing, NaN wins over +inf
    } else if (max > max_) {
      const double factor = std::exp(max_ - max);
      tilted_ = factor == 0 ? tilted : (tilted_ + (max_ - max) * sum_) * factor + tilted;
      sum_ = sum_ * factor + sum;
      max_ = max;
    } else {
      const double factor = std::exp(max - max_);
      tilted_ += factor == 0 ? 0 : (tilted + (max - max_) * sum) * factor;
      sum_ += sum * factor;
    }
  }
  // H = -sum p log p = log S - T / S, with S = sum e^(z - m) and T = sum (z - m) e^(z - m): two terms >= 0.
  double entropy() const {
    return special_ != 0 || sum_ == 0 ? std::numeric_limits<double>::quiet_NaN() : std::log(sum_) - tilted_ / sum_;
  }
  template <typename acc>
  Lse value() const {
    if (special_ != 0) {
      return {special_, 0};
    }
    const double log_sum = std::log(sum_);
    const double high = static_cast<acc>(max_ + log_sum);
    return {high, std::isfinite(high) ? (max_ - high) + log_sum : 0};
  }

 private:
  double max_ = -std::numeric_limits<double>::infinity(), sum_ = 0, tilted_ = 0, special_ = 0;
};

// A thread's buffers for one row, reused across rows and calls.
template <typename acc>
struct Scratch {
  std::vector<ChunkStats<acc>> chunks;
  acc parts[kChunk];  // of class probabilities in the loss

  acc* exps_of(int64_t n) {
    if (exps_.size() < static_cast<size_t>(n)) {
      exps_.resize(n);
    }
    return exps_.data();
  }
  static Scratch& of_this_thread() {
    // On the heap: where a thread has no memory left for thread-local data of this size, glibc aborts.
    static thread_local const auto scratch = std::make_unique<Scratch>();
    return *scratch;
  }

 private:
  std::vector<acc> exps_;
};

// The entropy of a row and its upstream gradient h: dL/dz_c gets - h p_c (z_c - lse + H).
struct EntropyGrad {
  double grad = 0, entropy = 0;
};

// Whether [n_rows, n_cols] outputs bypass the caches: large ones would be evicted before they are read. Gradients over
// logits do not bypass them, since the logits are cached already.
template <typename scalar_t>
bool is_large(const Rows<scalar_t>& rows) {
  return rows.n_rows * rows.n_cols * sizeof(scalar_t) >= kLargeOutput;
}
template <typename scalar_t>
bool goes_past_cache(const Rows<scalar_t>& rows, const scalar_t* out) {
  return out != rows.logits && is_large(rows);
}

// Whether rows go in tiles: where they have few classes, where the classes of a tensor are not adjacent, and where rows
// have no single stride. Not where there are few of them: a row has the same results in any batch.
template <typename scalar_t>
bool in_tiles(const Rows<scalar_t>& rows, const Output<scalar_t>& out) {
  return rows.n_cols <= kMaxTileClasses || rows.layout.inner < rows.n_rows || rows.layout.column != 1 ||
         (rows.probabilities && rows.probability_layout.column != 1) || (out.data && out.layout.column != 1);
}

template <typename acc>
TileMemory<acc>& tile_memory() {
  static thread_local const auto memory = std::make_unique<TileMemory<acc>>();
  return *memory;
}

// Calls f(tile, memory) for each tile.
template <typename scalar_t, typename F>
void for_each_tile(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, const Parallel& parallel,
                   const F& f) {
  const int64_t block = kernels.tile.block;
  // Images of few rows share tiles, whose lanes would be empty otherwise.
  const int64_t inner = rows.layout.inner < block ? rows.n_rows : rows.layout.inner;
  if (rows.n_rows == 0) {
    return;
  }
  // Many lanes, so that where classes are not adjacent long runs are read; but at least two blocks of them.
  const int64_t fitting = kMaxTile / rows.n_cols / block * block;
  const int64_t lanes = std::min(div_up(inner, block) * block, std::clamp(fitting, 2 * block, kTileLanes));
  const int64_t classes = std::min(rows.n_cols, kMaxTile / lanes);
  const int64_t tiles_per_image = div_up(inner, lanes), tiles = rows.n_rows / inner * tiles_per_image;
  const int64_t per_task =
      std::clamp<int64_t>(tiles / (4 * parallel.threads), 1, std::max<int64_t>(1, kTask / (lanes * rows.n_cols)));
  parallel.run(div_up(tiles, per_task), [&](int64_t task) {
    auto& memory = tile_memory<acc_t<scalar_t>>();
    for (int64_t t = task * per_task, end = std::min(tiles, t + per_task); t < end; ++t) {
      const int64_t begin = t % tiles_per_image * lanes;
      f(Tile{t / tiles_per_image * inner + begin, std::min(lanes, inner - begin), lanes, classes}, memory);
    }
    kernels.finish();
  });
}

// One operation over the rows of one tensor: partition into tasks, and code common to the three sweeps.
template <typename scalar_t>
class Sweep {
 public:
  using acc = acc_t<scalar_t>;

  Sweep(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, const Parallel& parallel)
      : k_(kernels),
        r_(rows),
        parallel_(parallel),
        n_chunks_(div_up(rows.n_cols, kChunk)),
        // At least four tasks per thread, for load balance.
        rows_per_task_(std::clamp<int64_t>(rows.n_rows / (4 * parallel.threads), 1,
                                           std::max<int64_t>(1, kTask / std::max<int64_t>(1, rows.n_cols)))) {}

  // Too few rows to occupy the threads: schedule chunks instead.
  bool by_chunks() const { return parallel_.threads > 1 && r_.n_rows < 4 * parallel_.threads && n_chunks_ > 1; }

  template <typename F>
  void for_each_row(const F& row) const {
    parallel_.run(div_up(r_.n_rows, rows_per_task_), [&](int64_t task) {
      for (int64_t n = task * rows_per_task_, end = std::min(r_.n_rows, n + rows_per_task_); n < end; ++n) {
        row(n);
      }
      k_.finish();
    });
  }
  template <typename F>
  void for_each_chunk(const F& chunk) const {
    if (by_chunks()) {
      parallel_.run(r_.n_rows * n_chunks_, [&](int64_t task) {
        chunk(task / n_chunks_, task % n_chunks_);
        k_.finish();
      });
    } else {
      for_each_row([&](int64_t n) {
        for (int64_t c = 0; c < n_chunks_; ++c) {
          chunk(n, c);
        }
      });
    }
  }

  int64_t n_chunks() const { return n_chunks_; }
  int64_t size(int64_t c) const { return std::min(kChunk, r_.n_cols - c * kChunk); }
  const scalar_t* logits(int64_t n, int64_t c) const { return r_.logits + n * r_.layout.row + c * kChunk; }
  const acc* weight(int64_t c) const { return r_.weight ? r_.weight + r_.options.class_start + c * kChunk : nullptr; }
  // The weight of each class of chunk c in wsum. With probabilities the pointer is valid until the next call.
  const acc* parts(int64_t n, int64_t c) const {
    if (r_.probabilities == nullptr) {
      return weight(c);
    }
    const scalar_t* q = r_.probabilities + n * r_.probability_layout.row + c * kChunk;
    const double e = r_.options.label_smoothing, per_class = e / static_cast<double>(r_.options.num_classes);
    if constexpr (std::is_same_v<acc, scalar_t>) {
      if (e == 0 && r_.weight == nullptr) {
        return q;
      }
    }
    auto& scratch = Scratch<acc>::of_this_thread();
    k_.parts(q, weight(c), size(c), static_cast<acc>(1 - e), static_cast<acc>(per_class), scratch.parts);
    return scratch.parts;
  }
  bool ignored(int64_t n) const { return r_.target && r_.target[n] == r_.options.ignore_index; }
  double target_weight(int64_t n) const { return r_.weight ? r_.weight[r_.target[n]] : acc(1); }
  // The target's column, or -1 for an ignored row or a class of another shard.
  int64_t target_column(int64_t n) const {
    if (r_.target == nullptr || ignored(n)) {
      return -1;
    }
    const int64_t column = r_.target[n] - r_.options.class_start;
    return column >= 0 && column < r_.n_cols ? column : -1;
  }
  double target_logit(int64_t n) const {
    const int64_t column = target_column(n);
    return column < 0 ? 0 : k_.mapped(logits(n, 0) + column, r_.logit_map(n));
  }
  double grad_scale(int64_t n) const { return r_.divided(r_.options.grad_scale, n); }

  ChunkStats<acc> chunk_stats(int64_t n, int64_t c, const Stats<scalar_t>& out, acc* exps) const {
    return k_.stats(logits(n, c), parts(n, c), size(c), r_.logit_map(n), out.wsum != nullptr, out.entropy != nullptr,
                    exps, chunk_after(n, c));
  }
  bool past_cache() const { return is_large(r_); }
  bool past_cache(const scalar_t* out) const { return goes_past_cache(r_, out); }

  // Merges the statistics of the chunks of row n, and stores them.
  Lse join(int64_t n, const Stats<scalar_t>& out, const ChunkStats<acc>* chunks) const {
    LogSumExp sum;
    double wsum = 0, part_sum = 0;
    for (int64_t c = 0; c < n_chunks_; ++c) {
      sum.add(chunks[c].max, chunks[c].sum, chunks[c].tilted);
      part_sum += chunks[c].weight;
    }
    const Lse lse = sum.value<acc>();
    for (int64_t c = 0; out.wsum && c < n_chunks_; ++c) {
      wsum += chunks[c].wsum;
      if (chunks[c].weight != 0) {  // a chunk of only -inf has no maximum
        wsum += chunks[c].weight * lse.below(chunks[c].max);
      }
    }
    out.lse[n] = static_cast<acc>(lse.high);
    out.lse_low[n] = static_cast<acc>(lse.low);
    if (out.picked) {
      out.picked[n] = static_cast<acc>(target_logit(n));
    }
    if (out.wsum) {
      out.wsum[n] = static_cast<acc>(wsum);
    }
    if (out.part_sum) {
      out.part_sum[n] = static_cast<acc>(part_sum);
    }
    if (out.entropy) {
      out.entropy[n] = static_cast<acc>(sum.entropy());
    }
    if (out.top1) {
      out.top1[n] = std::isfinite(lse.high) && is_first_of_largest(n, out.picked[n], chunks);
    }
    return lse;
  }
  // The statistics of all rows when tasks are chunks.
  struct Joined {
    std::vector<ChunkStats<acc>> chunks;
    std::vector<Lse> lse;
  };
  Joined stats_by_chunks(bool read_ignored, const Stats<scalar_t>& out) const {
    Joined all{std::vector<ChunkStats<acc>>(r_.n_rows * n_chunks_), std::vector<Lse>(r_.n_rows)};
    const auto read = [&](int64_t n) { return read_ignored || !ignored(n); };
    for_each_chunk([&](int64_t n, int64_t c) {
      if (read(n)) {
        all.chunks[n * n_chunks_ + c] = chunk_stats(n, c, out, nullptr);
      }
    });
    for (int64_t n = 0; n < r_.n_rows; ++n) {
      if (read(n)) {
        all.lse[n] = join(n, out, &all.chunks[n * n_chunks_]);
      } else {
        store_unread(n, out);
      }
    }
    return all;
  }

  void store_unread(int64_t n, const Stats<scalar_t>& out) const {
    out.lse[n] = out.lse_low[n] = out.picked[n] = 0;
    if (out.wsum) {
      out.wsum[n] = 0;
    }
    if (out.entropy) {
      out.entropy[n] = 0;
    }
    if (out.top1) {
      out.top1[n] = false;
    }
  }

  // The gradient of the target's column, avoiding the cancellation of a p - b for confident predictions.
  acc target_grad(int64_t n, const RowCoefficients& k, const EntropyGrad& h, Lse lse, double picked) const {
    const double below = lse.below(picked);
    double grad = k.a * std::expm1(below) + (k.a - k.b) - k.s * target_weight(n);
    if (h.grad != 0 && std::isfinite(below)) {
      grad -= h.grad * std::exp(below) * (below + h.entropy);
    }
    return static_cast<acc>(grad_scale(n) * softcap_slope(picked, r_.divided(r_.options.softcap, n)) * grad);
  }

  // Writes chunk c of the gradient of row n, with p = exp(z - shift) factor; `exps`, if not null, is exp(z - shift).
  void chunk_grad(int64_t n, int64_t c, const RowCoefficients& k, const EntropyGrad& h, Lse lse, double picked,
                  double shift, double factor, const acc* exps, scalar_t* grad, bool past_cache) const {
    const int64_t target = target_column(n) - c * kChunk;
    const double u = grad_scale(n);
    const double a = h.grad == 0 ? k.a : k.a - h.grad * (h.entropy + (shift - lse.high) - lse.low);  // not 0 * inf
    const acc scale = static_cast<acc>(u * factor * a);
    const acc tilt = static_cast<acc>(-u * factor * h.grad), offset = static_cast<acc>(u * k.s);
    if (!std::isfinite(lse.high)) {
      k_.fill(grad, size(c), std::numeric_limits<acc>::quiet_NaN(), past_cache);
      return;
    }
    if (exps) {
      k_.grad_from_exps(logits(n, c), exps, parts(n, c), size(c), r_.logit_map(n), scale, offset, grad, past_cache);
    } else {
      k_.grad(logits(n, c), parts(n, c), size(c), r_.logit_map(n), static_cast<acc>(shift), scale, tilt, offset, grad,
              past_cache);
    }
    if (target >= 0 && target < size(c)) {
      k_.store(grad + target, target_grad(n, k, h, lse, picked));
    }
  }

 private:
  // Whether the target is the first of the largest scaled logits of the row. Rounding can make different logits equal
  // after scale and softcap, so chunks that are close are compared by their logits themselves.
  bool is_first_of_largest(int64_t n, double picked, const ChunkStats<acc>* chunks) const {
    const int64_t target = target_column(n);
    if (target < 0) {
      return false;
    }
    constexpr double kTanhError = 1e-5;  // of a softcap, relative to it
    const double margin = kTanhError * r_.divided(r_.options.softcap, n);
    const double scale = r_.options.logit_scale;
    const acc sign = scale > 0 ? acc(1) : scale < 0 ? acc(-1) : acc(0);
    const acc value = k_.max(logits(n, 0) + target, 1, sign);
    const auto largest = [&](int64_t begin, int64_t end) { return k_.max(logits(n, 0) + begin, end - begin, sign); };
    for (int64_t c = 0; c < n_chunks_; ++c) {
      if (chunks[c].max < picked - margin) {
        continue;
      }
      const int64_t begin = c * kChunk, end = begin + size(c);
      const int64_t before = std::clamp(target, begin, end), after = std::clamp(target + 1, begin, end);
      if ((before > begin && largest(begin, before) >= value) || (after < end && largest(after, end) > value)) {
        return false;
      }
    }
    return true;
  }

  // The chunk that this thread reads after chunk c of row n, for prefetching; null if unknown.
  const scalar_t* chunk_after(int64_t n, int64_t c) const {
    if (by_chunks()) {
      return nullptr;
    }
    if (c + 1 < n_chunks_) {
      return logits(n, c + 1);
    }
    const bool same_task = n + 1 < r_.n_rows && (n + 1) % rows_per_task_ != 0;
    return same_task && !ignored(n + 1) ? logits(n + 1, 0) : nullptr;
  }

  const ChunkKernels<scalar_t>& k_;
  const Rows<scalar_t>& r_;
  const Parallel& parallel_;
  int64_t n_chunks_, rows_per_task_;
};

// The divisors of a mean: the kept weight for l, the kept rows for z.
double loss_divisor(const RowOptions& o, const double* totals) {
  return o.reduction == Reduction::mean ? totals[kKeptWeight] : 1;
}
double z_divisor(const RowOptions& o, const double* totals) {
  return o.reduction == Reduction::mean ? totals[kKeptRows] : 1;
}

// p = exps * chunk_factor(max), with exps = exp(z - chunk_shift(max)). A chunk of only -inf has p = 0.
double chunk_shift(double max) {
  return std::isfinite(max) ? max : 0;
}
double chunk_factor(double max, Lse lse) {
  return std::isfinite(max) ? std::exp(lse.below(max)) : 0;
}

}  // namespace

template <typename scalar_t>
void row_stats(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, bool read_ignored,
               const Stats<scalar_t>& out, const Output<scalar_t>& log_prob, const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  if (in_tiles(rows, log_prob)) {
    const Output<scalar_t> to{log_prob.data, log_prob.layout, goes_past_cache(rows, log_prob.data)};
    for_each_tile(kernels, rows, parallel, [&](const Tile& tile, auto& memory) {
      kernels.tile.stats(rows, tile, read_ignored, out, to, memory);
    });
    return;
  }
  const Sweep<scalar_t> sweep(kernels, rows, parallel);
  const int64_t n_chunks = sweep.n_chunks();
  const bool past_cache = sweep.past_cache(log_prob.data);
  const auto skipped = [&](int64_t n) { return sweep.ignored(n) && !read_ignored; };
  const auto write_log_prob = [&](int64_t n, int64_t c) {
    scalar_t* chunk = log_prob.data + n * log_prob.layout.row + c * kChunk;
    if (std::isfinite(out.lse[n])) {
      kernels.log_prob(sweep.logits(n, c), sweep.size(c), rows.logit_map(n), out.lse[n], out.lse_low[n], chunk,
                       past_cache);
    } else {
      kernels.fill(chunk, sweep.size(c), std::numeric_limits<acc>::quiet_NaN(), past_cache);
    }
  };
  if (!sweep.by_chunks()) {
    sweep.for_each_row([&](int64_t n) {
      if (skipped(n)) {
        sweep.store_unread(n, out);
        return;
      }
      auto& chunks = Scratch<acc>::of_this_thread().chunks;
      chunks.resize(n_chunks);
      for (int64_t c = 0; c < n_chunks; ++c) {
        chunks[c] = sweep.chunk_stats(n, c, out, nullptr);
      }
      sweep.join(n, out, chunks.data());
      for (int64_t c = 0; log_prob.data && c < n_chunks; ++c) {
        write_log_prob(n, c);
      }
    });
    return;
  }
  sweep.stats_by_chunks(read_ignored, out);
  if (log_prob.data) {
    sweep.for_each_chunk(write_log_prob);
  }
}

template <typename scalar_t>
void row_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, const double* totals,
              const Upstream<scalar_t>& upstream, const acc_t<scalar_t>* lse, const acc_t<scalar_t>* lse_low,
              const acc_t<scalar_t>* entropy, const Output<scalar_t>& grad, const Parallel& parallel) {
  if (in_tiles(rows, grad)) {
    const Output<scalar_t> to{grad.data, grad.layout, goes_past_cache(rows, grad.data)};
    for_each_tile(kernels, rows, parallel, [&](const Tile& tile, auto& memory) {
      kernels.tile.grad(rows, tile, totals, upstream, lse, lse_low, entropy, to, memory);
    });
    return;
  }
  const Sweep<scalar_t> sweep(kernels, rows, parallel);
  const double class_weight = totals[kClassWeight];
  const bool past_cache = sweep.past_cache(grad.data);
  sweep.for_each_chunk([&](int64_t n, int64_t c) {
    scalar_t* out = grad.data + n * grad.layout.row + c * kChunk;
    const double from_lse = upstream.grad_lse ? upstream.grad_lse[n * upstream.lse_stride] : 0;
    const bool ignored = sweep.ignored(n);
    if (ignored && from_lse == 0) {
      kernels.fill(out, sweep.size(c), 0, sweep.past_cache());
      return;
    }
    RowCoefficients k{0, 0, 0};
    EntropyGrad h;
    if (!ignored && upstream.grad_entropy) {
      h = {upstream.grad_entropy[n * upstream.entropy_stride], entropy[n]};
    }
    if (!ignored) {
      const double from_loss = upstream.grad_loss ? upstream.grad_loss[n * upstream.loss_stride] : 0;
      const double from_z = upstream.grad_z_loss ? upstream.grad_z_loss[n * upstream.z_loss_stride] : 0;
      // Not 0 / 0: only the gradient of a mean loss over no weight is undefined.
      const double grad_loss = upstream.grad_loss ? from_loss / loss_divisor(rows.options, totals) : 0;
      k = rows.part_sum ? RowCoefficients{from_loss * rows.part_sum[n], 0, from_loss}
                        : row_coefficients(rows.options, sweep.target_weight(n), class_weight, lse[n], grad_loss,
                                           (from_loss + from_z) / z_divisor(rows.options, totals));
    }
    k.a += from_lse;
    // Read the target's logit now: if grad is the logits, its chunk will be overwritten.
    const int64_t target = sweep.target_column(n) - c * kChunk;
    const double picked = target >= 0 && target < sweep.size(c) ? sweep.target_logit(n) : 0;
    const Lse split{lse[n], lse_low ? lse_low[n] : 0};
    sweep.chunk_grad(n, c, k, h, split, picked, split.high, std::exp(-split.low), nullptr, out, past_cache);
  });
}

template <typename scalar_t>
void row_stats_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, bool read_ignored,
                    const double* totals, const Stats<scalar_t>& out, const Output<scalar_t>& grad,
                    const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  if (in_tiles(rows, grad)) {
    const Output<scalar_t> to{grad.data, grad.layout, goes_past_cache(rows, grad.data)};
    for_each_tile(kernels, rows, parallel, [&](const Tile& tile, auto& memory) {
      kernels.tile.stats_grad(rows, tile, read_ignored, totals, out, to, memory);
    });
    return;
  }
  const Sweep<scalar_t> sweep(kernels, rows, parallel);
  const int64_t n_chunks = sweep.n_chunks();
  const bool past_cache = sweep.past_cache(grad.data);
  const double grad_loss = 1 / loss_divisor(rows.options, totals), grad_z = 1 / z_divisor(rows.options, totals);
  const auto coefficients = [&](int64_t n, Lse lse) {
    return row_coefficients(rows.options, sweep.target_weight(n), totals[kClassWeight], lse.high, grad_loss, grad_z);
  };
  const auto grad_chunk = [&](int64_t n, int64_t c, const RowCoefficients& k, Lse lse, double max, const acc* exps) {
    sweep.chunk_grad(n, c, k, EntropyGrad(), lse, out.picked[n], chunk_shift(max), chunk_factor(max, lse), exps,
                     grad.data + n * grad.layout.row + c * kChunk, past_cache);
  };
  const auto zero_chunk = [&](int64_t n, int64_t c) {
    kernels.fill(grad.data + n * grad.layout.row + c * kChunk, sweep.size(c), 0, sweep.past_cache());
  };
  if (!sweep.by_chunks()) {
    const bool keep_exps = rows.n_cols * static_cast<int64_t>(sizeof(acc)) <= kMaxExpBytes;
    sweep.for_each_row([&](int64_t n) {
      if (sweep.ignored(n) && !read_ignored) {
        sweep.store_unread(n, out);
      } else {
        auto& scratch = Scratch<acc>::of_this_thread();
        auto& chunks = scratch.chunks;
        chunks.resize(n_chunks);
        acc* exps = keep_exps && !sweep.ignored(n) ? scratch.exps_of(rows.n_cols) : nullptr;
        for (int64_t c = 0; c < n_chunks; ++c) {
          chunks[c] = sweep.chunk_stats(n, c, out, exps ? exps + c * kChunk : nullptr);
        }
        const Lse lse = sweep.join(n, out, chunks.data());
        if (!sweep.ignored(n)) {
          const auto k = coefficients(n, lse);
          for (int64_t c = 0; c < n_chunks; ++c) {
            grad_chunk(n, c, k, lse, chunks[c].max, exps ? exps + c * kChunk : nullptr);
          }
          return;
        }
      }
      for (int64_t c = 0; c < n_chunks; ++c) {
        zero_chunk(n, c);
      }
    });
    return;
  }
  const auto joined = sweep.stats_by_chunks(read_ignored, out);
  sweep.for_each_chunk([&](int64_t n, int64_t c) {
    if (sweep.ignored(n)) {
      zero_chunk(n, c);
    } else {
      const Lse row = joined.lse[n];
      grad_chunk(n, c, coefficients(n, row), row, joined.chunks[n * n_chunks + c].max, nullptr);
    }
  });
}

template <typename scalar_t>
void probability_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows,
                      const acc_t<scalar_t>* grad_loss, const acc_t<scalar_t>* lse, const acc_t<scalar_t>* lse_low,
                      const Output<scalar_t>& grad, const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  if (in_tiles(rows, grad)) {
    const Output<scalar_t> to{grad.data, grad.layout, goes_past_cache(rows, grad.data)};
    for_each_tile(kernels, rows, parallel, [&](const Tile& tile, auto& memory) {
      kernels.tile.probability_grad(rows, tile, grad_loss, lse, lse_low, to, memory);
    });
    return;
  }
  const Sweep<scalar_t> sweep(kernels, rows, parallel);
  const double kept = 1 - rows.options.label_smoothing;
  sweep.for_each_chunk([&](int64_t n, int64_t c) {
    const double factor = -grad_loss[n] * kept;
    const acc high = std::isfinite(lse[n]) ? lse[n] : std::numeric_limits<acc>::quiet_NaN();
    kernels.parts_grad(sweep.logits(n, c), sweep.parts(n, c), sweep.weight(c), sweep.size(c), rows.logit_map(n), high,
                       lse_low[n], static_cast<acc>(factor), grad.data + n * grad.layout.row + c * kChunk,
                       sweep.past_cache());
  });
}

template <typename scalar_t>
void scale(const ChunkKernels<scalar_t>& kernels, scalar_t* x, int64_t n, double factor, const Parallel& parallel) {
  parallel.run(div_up(n, kScaleTask), [&](int64_t task) {
    const int64_t begin = task * kScaleTask;
    kernels.scale(x + begin, std::min(kScaleTask, n - begin), static_cast<acc_t<scalar_t>>(factor));
  });
}

// Calls sum(begin, end, total) for blocks of rows and adds up the totals, in a fixed order. Returns the first row whose
// target is out of range, or -1.
template <typename acc, typename Sum, typename F>
int64_t sum_over_rows(const SumKernels<acc>& kernels, const RowOptions& o, const int64_t* target, int64_t n_rows,
                      const Parallel& parallel, Sum& total, const F& sum) {
  struct Block {
    Sum sum{};
    bool bad = false;
  };
  std::vector<Block> blocks(div_up(n_rows, kSumBlock));
  const auto end_of = [&](int64_t b) { return std::min(n_rows, (b + 1) * kSumBlock); };
  parallel.run(static_cast<int64_t>(blocks.size()), [&](int64_t b) {
    const int64_t begin = b * kSumBlock, end = end_of(b);
    blocks[b].bad = kernels.any_bad(o, target + begin, end - begin);
    if (!blocks[b].bad) {
      sum(begin, end, blocks[b].sum);
    }
  });
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b].bad) {
      const int64_t begin = static_cast<int64_t>(b) * kSumBlock;
      return begin + first_bad_target(o, target + begin, end_of(static_cast<int64_t>(b)) - begin);
    }
    total += blocks[b].sum;
  }
  return -1;
}

template <typename acc>
int64_t reduce_totals(const SumKernels<acc>& kernels, const RowOptions& options, const int64_t* target, int64_t n_rows,
                      const acc* weight, double* totals, const Parallel& parallel) {
  struct Kept {
    double weight = 0, rows = 0;
    void operator+=(const Kept& other) {
      weight += other.weight;
      rows += other.rows;
    }
  } kept;
  const int64_t ignored = options.ignore_index;
  const int64_t bad =
      sum_over_rows(kernels, options, target, n_rows, parallel, kept, [&](int64_t begin, int64_t end, Kept& sum) {
        const auto kept_weight = [&](int64_t n) {
          return target[n] == ignored ? 0.0 : static_cast<double>(weight[target[n]]);
        };
        sum.rows = kernels.kept_rows(target + begin, end - begin, ignored);
        sum.weight = weight ? sum_of<double>(begin, end, kept_weight) : sum.rows;
      });
  totals[kKeptWeight] = kept.weight;
  totals[kKeptRows] = kept.rows;
  totals[kClassWeight] = weight ? 0 : static_cast<double>(options.num_classes);
  for (int64_t c = 0; weight && c < options.num_classes; ++c) {
    totals[kClassWeight] += weight[c];
  }
  return bad;
}

template <typename acc>
int64_t reduce_loss(const SumKernels<acc>& kernels, const RowOptions& options, const int64_t* target, int64_t n_rows,
                    const acc* weight, const acc* lse, const acc* lse_low, const acc* picked, const acc* wsum,
                    const double* totals, double* loss, double* z_loss, const Parallel& parallel) {
  const bool none = options.reduction == Reduction::none;
  const bool mean = options.reduction == Reduction::mean;
  RowLoss total;
  const auto of_row = [&](int64_t n) {
    RowLoss row;
    if (target[n] != options.ignore_index) {
      row = row_loss(options, weight ? weight[target[n]] : acc(1), lse[n], lse_low ? lse_low[n] : 0, picked[n],
                     wsum ? wsum[n] : acc(0));
    }
    if (none) {
      loss[n] = row.loss + row.z_loss;
      z_loss[n] = row.z_loss;
    }
    return row;
  };
  const bool plain = !none && !weight && options.lse_square_scale == 0 && lse_low;
  const double share = 1 - options.label_smoothing;
  const double per_class = options.label_smoothing / static_cast<double>(options.num_classes);
  const int64_t ignored = options.ignore_index;
  const int64_t bad =
      sum_over_rows(kernels, options, target, n_rows, parallel, total, [&](int64_t begin, int64_t end, RowLoss& sum) {
        if (plain) {
          sum.loss = kernels.loss(target + begin, end - begin, ignored, share, per_class, lse + begin, lse_low + begin,
                                  picked + begin, wsum ? wsum + begin : nullptr);
        } else {
          sum = sum_of<RowLoss>(begin, end, of_row);
        }
      });
  if (none) {
    return bad;
  }
  // l is divided by the kept weight, z by the kept rows, before they are added.
  *z_loss = mean ? total.z_loss / totals[kKeptRows] : total.z_loss;
  *loss = mean ? total.loss / totals[kKeptWeight] : total.loss;
  if (mean && totals[kKeptWeight] == 0) {
    *loss = std::numeric_limits<double>::quiet_NaN();  // with smoothing the numerator may not be 0
  }
  if (options.lse_square_scale != 0) {
    *loss += *z_loss;
  }
  return bad;
}

#define INSTANTIATE(scalar_t)                                                                                 \
  template void row_stats(const ChunkKernels<scalar_t>&, const Rows<scalar_t>&, bool, const Stats<scalar_t>&, \
                          const Output<scalar_t>&, const Parallel&);                                          \
  template void row_grad(const ChunkKernels<scalar_t>&, const Rows<scalar_t>&, const double*,                 \
                         const Upstream<scalar_t>&, const acc_t<scalar_t>*, const acc_t<scalar_t>*,           \
                         const acc_t<scalar_t>*, const Output<scalar_t>&, const Parallel&);                   \
  template void row_stats_grad(const ChunkKernels<scalar_t>&, const Rows<scalar_t>&, bool, const double*,     \
                               const Stats<scalar_t>&, const Output<scalar_t>&, const Parallel&);             \
  template void scale(const ChunkKernels<scalar_t>&, scalar_t*, int64_t, double, const Parallel&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(f16)
#undef INSTANTIATE

#define INSTANTIATE(scalar_t)                                                                                  \
  template void probability_grad(const ChunkKernels<scalar_t>&, const Rows<scalar_t>&, const acc_t<scalar_t>*, \
                                 const acc_t<scalar_t>*, const acc_t<scalar_t>*, const Output<scalar_t>&,      \
                                 const Parallel&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bf16)
INSTANTIATE(f16)
#undef INSTANTIATE

#define INSTANTIATE(acc)                                                                                         \
  template int64_t reduce_totals(const SumKernels<acc>&, const RowOptions&, const int64_t*, int64_t, const acc*, \
                                 double*, const Parallel&);                                                      \
  template int64_t reduce_loss(const SumKernels<acc>&, const RowOptions&, const int64_t*, int64_t, const acc*,   \
                               const acc*, const acc*, const acc*, const acc*, const double*, double*, double*,  \
                               const Parallel&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace npu_xent::cpu
