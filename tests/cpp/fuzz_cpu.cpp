// The CPU's half of the fuzzer: rows.h with the loops of every instruction set of this processor, and the sweeps over
// tiles by themselves, with tiles of any shape.
#include "cpu/rows.h"
#include "fuzz_rows.h"
#include "variants.h"

namespace fuzz {
namespace {

using namespace npu_xent::cpu;
// In blocks of two vectors of 256 bits or more.
constexpr Rounding kCpuRounding{
    /*exp=*/4, /*tanh=*/5, /*factors=*/2 * Format<double>::eps, /*joined=*/Format<double>::eps, 32, 16};

// The variants that this processor has.
const std::vector<std::string>& variants() {
  static const std::vector<std::string> all = [] {
    std::vector<std::string> names;
    const std::string compiled = compiled_capabilities() + ' ';
    for (size_t begin = 0, end; (end = compiled.find(' ', begin)) != std::string::npos; begin = end + 1) {
      const std::string name = compiled.substr(begin, end - begin);
      if (test::processor_has(name)) {
        names.push_back(name);
      }
    }
    return names;
  }();
  return all;
}

// Reads as one thread or as several; tasks run in either order.
Parallel some_threads(Random& random) {
  const int64_t threads = random.number_of({1, 1, 2, 3, 8});
  const bool backwards = random.one_in(2);
  return {threads, [backwards](int64_t n_tasks, const std::function<void(int64_t)>& task) {
            for (int64_t i = 0; i < n_tasks; ++i) {
              task(backwards ? n_tasks - 1 - i : i);
            }
          }};
}

int64_t some_cols(Random& random) {
  const int64_t kind = random.below(200);
  if (kind < 130) {
    return 1 + random.below(kind < 60 ? 8 : 40);
  }
  if (kind < 198) {
    return near(random, random.number_of({16, 16, 32, 32, 64, 64, 128, 256, 300}));
  }
  return kind == 198 ? near(random, random.number_of({4096, 8192})) : 1 + random.below(9000);
}
int64_t some_rows(Random& random, int64_t cols) {
  const int64_t most = std::max<int64_t>(random.one_in(16) ? 1500 : 120, (random.one_in(4) ? 2 : 1) * cols) / cols;
  const int64_t rows =
      random.one_in(3) ? near(random, random.number_of({8, 16, 32, 64, 128, 256})) - 1 : random.below(10);
  return std::min(rows, std::min<int64_t>(most, 300));
}

int64_t some_inner(Random& random, int64_t rows) {
  return rows > 1 && random.one_in(4) ? 1 + random.below(random.one_in(2) ? rows : std::min<int64_t>(rows, 4))
                                      : std::max<int64_t>(rows, 1);
}
struct Shape {
  int64_t rows, cols, inner;
};
Shape some_shape(Random& random) {
  const int64_t cols = some_cols(random), rows = some_rows(random, cols), inner = some_inner(random, rows);
  return {rows / inner * inner, cols, inner};
}

// The operands of a call.
template <typename T>
struct Call : Problem<T> {
  using P = Problem<T>;
  using P::eps, P::tiny, P::random, P::memory, P::rows, P::cols, P::inner, P::of_probabilities, P::options, P::place,
      P::probability_place, P::logits, P::probabilities, P::target, P::weight, P::temperature, P::totals, P::ignored,
      P::weight_of, P::part, P::z, P::lse, P::log_sum, P::tilt, P::map_row, P::sum_row, P::z_error, P::coefficients;
  using typename P::acc, typename P::Real, typename P::Coefficients;

  const ChunkKernels<T>& kernels;
  Parallel parallel;
  const bool by_tiles, past_cache;  // call the sweeps over tiles by themselves, and have them write past the caches
  int64_t tile_lanes, tile_classes;
  Rows<T> given;

  Call(Random& random_, const std::string& variant, bool probabilities_, const Shape& shape)
      : P(random_, false, probabilities_, kCpuRounding, shape.rows, shape.cols, shape.inner),
        kernels(kernel_table(variant).template of<T>()),
        parallel(some_threads(random_)),
        by_tiles(random.one_in(4)),
        past_cache(random.one_in(2)) {
    const int64_t block = kernels.tile.block, whole = inner < block ? rows : inner;
    tile_lanes = block * (1 + random.below(kMaxLanes / block));
    if (random.one_in(2)) {
      tile_lanes = std::clamp((whole + block - 1) / block * block, block, tile_lanes);
    }
    tile_classes = std::min(cols, kMaxTile / tile_lanes);
    if (random.one_in(2)) {
      tile_classes = 1 + random.below(tile_classes);
    }
    count_chunks(1);
    note("%s, %s, %lld threads, %lld lanes, %lld classes", variant.c_str(), by_tiles ? "tiles alone" : "rows.h",
         ll(parallel.threads), ll(tile_lanes), ll(tile_classes));
    given = {options, logits.data(), place.layout, rows, cols, target.data(), weight.data(), temperature.data()};
    given.probabilities = probabilities.data();
    given.probability_layout = probability_place.layout;
  }

  // Of rows whose output has classes `column` apart: rows.h cuts rows into chunks of 4096 classes, or in tiles of 128
  // at least (in_tiles in rows.cpp).
  void count_chunks(int64_t column) {
    const bool in_tiles = cols <= 256 || inner < rows || place.layout.column != 1 || column != 1 ||
                          (of_probabilities && probability_place.layout.column != 1);
    P::chunks = cols / (by_tiles ? tile_classes : in_tiles ? 128 : 4096) + 2;
  }

  template <typename F>
  void for_tiles(const F& f) const {
    static const auto scratch = std::make_unique<TileMemory<acc>>();
    const int64_t block = kernels.tile.block, whole = inner < block ? rows : inner;
    for (int64_t first = 0; first < rows;) {
      const int64_t left = whole - first % whole, n = std::min(left, tile_lanes);
      f(Tile{first, n, tile_lanes, tile_classes}, *scratch);
      first += n;
    }
    kernels.finish();
  }

  void check_stats(bool with_log_prob, bool with_grad) {
    const bool read_ignored = with_log_prob || random.one_in(2);
    Buffer<acc> out_lse(memory, rows), low(memory, rows), picked(memory, rows, !of_probabilities);
    Buffer<acc> wsum(memory, rows, of_probabilities || random.one_in(2));
    Buffer<acc> entropy(memory, rows, !of_probabilities && !with_grad && random.one_in(2));
    Buffer<unsigned char> top1(memory, rows, !of_probabilities && !with_grad && random.one_in(2));
    Buffer<acc> part_sum(memory, rows, of_probabilities);
    const bool in_place = with_grad && random.one_in(3) && is_dense(place);
    const Place out_place = in_place ? place : some_place(random, rows, cols, inner, true);
    Buffer<T> out = in_place ? logits : Buffer<T>(memory, out_place.size, with_log_prob || with_grad);
    count_chunks(out.data() ? out_place.layout.column : 1);
    const Stats<T> stats{out_lse.data(), low.data(),     picked.data(),
                         wsum.data(),    entropy.data(), reinterpret_cast<bool*>(top1.data()),
                         part_sum.data()};
    note("%s%s%s%s%s%s%s", with_grad ? "row_stats_grad" : "row_stats", with_log_prob ? ", log_prob" : "",
         wsum.data() ? ", wsum" : "", entropy.data() ? ", entropy" : "", top1.data() ? ", top1" : "",
         read_ignored ? ", read_ignored" : "", in_place ? ", in place" : "");
    const Output<T> to{out.data(), out_place.layout, by_tiles && past_cache && !in_place};
    std::vector<T> before(in_place ? logits.data() : nullptr, in_place ? logits.data() + place.size : nullptr);
    if (with_grad) {
      if (by_tiles) {
        for_tiles([&](const Tile& tile, auto& scratch) {
          kernels.tile.stats_grad(given, tile, read_ignored, totals, stats, to, scratch);
        });
      } else {
        row_stats_grad(kernels, given, read_ignored, totals, stats, to, parallel);
      }
    } else if (by_tiles) {
      for_tiles(
          [&](const Tile& tile, auto& scratch) { kernels.tile.stats(given, tile, read_ignored, stats, to, scratch); });
    } else {
      row_stats(kernels, given, read_ignored, stats, to, parallel);
    }
    std::vector<T> results;
    if (in_place) {
      results.assign(logits.data(), logits.data() + place.size);
      std::copy(before.begin(), before.end(), logits.data());
    }
    for (int64_t n = 0; n < rows; ++n) {
      const bool unread = ignored(n) && !read_ignored;
      map_row(n);
      sum_row();
      const acc high = out_lse.take(n), rest = low.take(n);
      this->check_row_stats(n, unread, high, rest, picked, wsum, entropy, top1, part_sum);
      if (with_log_prob) {
        for (int64_t c = 0; c < cols; ++c) {
          if (this->undefined_scale(n)) {
            out.take(index(out_place.layout, n, c));
            continue;
          }
          const bool finite = std::isfinite(high);
          const Real y = z[c] - Real(high), expected = finite ? y - rest : std::numeric_limits<Real>::quiet_NaN();
          expect("log_prob", n, c, out.take(index(out_place.layout, n, c)), expected,
                 eps * (std::fabs(y) + std::fabs(Real(rest))) + z_error(z[c]));
        }
      }
      if (with_grad) {
        const bool mean = options.reduction == Reduction::mean;
        const Coefficients k =
            ignored(n) ? Coefficients{}
                       : coefficients(n, mean ? 1 / totals[kKeptWeight] : 1, mean ? 1 / totals[kKeptRows] : 1, high);
        this->check_row_grad(n, k, ignored(n), high, rest, [&](int64_t c) {
          const int64_t at = index(out_place.layout, n, c);
          return in_place ? results[at] : out.take(at);
        });
      }
    }
    out_lse.check_rest("lse"), low.check_rest("lse_low"), picked.check_rest("picked"), wsum.check_rest("wsum");
    entropy.check_rest("entropy"), top1.check_rest("top1"), part_sum.check_rest("part_sum");
    if (!in_place) {
      out.check_rest("the output");
      this->check_inputs();
    } else {
      this->check_small_inputs();
    }
  }

  // Rows one after the other without gaps, or images of planes: what may be overwritten.
  bool is_dense(const Place& p) const {
    return p.layout.column == 1 && p.layout.row == cols && (inner == rows || p.layout.outer == inner * cols);
  }

  // An upstream gradient of each row or of all, or none.
  Buffer<acc> some_upstream(int64_t& stride, bool by_row, bool present) {
    stride = by_row ? random.number_of({1, 1, 1, 2, 0}) : 0;
    const int64_t n = stride == 0 ? (by_row && rows == 0 ? 0 : 1) : rows == 0 ? 0 : (rows - 1) * stride + 1;
    Buffer<acc> values(memory, n, present);
    const double scale = random.one_of({1.0, 1.0, 1.0, 1e-20, 1e10, 65536.0});
    for (int64_t i = 0; present && i < n; i += std::max<int64_t>(stride, 1)) {
      values[i] = static_cast<acc>(random.one_in(8) ? 0 : scale * random.normal());
    }
    values.seal();
    return values;
  }

  void check_grad() {
    const bool none = options.reduction == Reduction::none;
    Upstream<T> upstream{};
    const bool by_row = none || of_probabilities;
    const auto from_loss = some_upstream(upstream.loss_stride, by_row, of_probabilities || !random.one_in(4));
    const auto from_z = some_upstream(upstream.z_loss_stride, by_row, !of_probabilities && random.one_in(2));
    const auto from_lse = some_upstream(upstream.lse_stride, true, random.one_in(3));
    const auto from_entropy = some_upstream(upstream.entropy_stride, true, !of_probabilities && random.one_in(3));
    upstream.grad_loss = from_loss.data(), upstream.grad_z_loss = from_z.data();
    upstream.grad_lse = from_lse.data(), upstream.grad_entropy = from_entropy.data();
    const bool in_place = !of_probabilities && random.one_in(3) && is_dense(place);
    const Place out_place = in_place ? place : some_place(random, rows, cols, inner, true);
    Buffer<acc> high(memory, rows), low(memory, rows, of_probabilities || !random.one_in(4));
    Buffer<acc> entropy(memory, rows, from_entropy.data() != nullptr), part_sum(memory, rows, of_probabilities);
    const Real more = random.one_in(4) ? 3 * random.uniform() : 0;  // of the other shards
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      sum_row();
      high[n] = static_cast<acc>(lse + more);
      if (std::isinf(lse + more) || std::isfinite(high[n])) {
        const Real rest = std::isfinite(high[n]) ? lse + more - Real(high[n]) : 0;
        if (low.data() != nullptr) {
          low[n] = static_cast<acc>(rest);
        }
      } else if (low.data() != nullptr) {
        low[n] = 0;
      }
      if (entropy.data() != nullptr) {
        entropy[n] = static_cast<acc>(std::isfinite(lse) ? log_sum - tilt + more : lse);
      }
      if (part_sum.data() != nullptr) {
        Real sum = 0;
        for (int64_t c = 0; c < cols; ++c) {
          sum += part(n, c);
        }
        part_sum[n] = static_cast<acc>(sum);
      }
    }
    high.seal(), low.seal(), entropy.seal(), part_sum.seal();
    Buffer<T> out = in_place ? logits : Buffer<T>(memory, out_place.size);
    std::vector<T> before(in_place ? logits.data() : nullptr, in_place ? logits.data() + place.size : nullptr);
    given.part_sum = part_sum.data();
    note("row_grad%s%s%s%s%s", from_loss.data() ? ", of the loss" : "", from_z.data() ? ", of the z-loss" : "",
         from_lse.data() ? ", of lse" : "", from_entropy.data() ? ", of the entropy" : "",
         in_place ? ", in place" : "");
    const Output<T> to{out.data(), out_place.layout, by_tiles && past_cache && !in_place};
    const double ones[kTotals] = {1, 1, 1};
    const double* divisors = of_probabilities ? ones : totals;
    if (by_tiles) {
      for_tiles([&](const Tile& tile, auto& scratch) {
        kernels.tile.grad(given, tile, divisors, upstream, high.data(), low.data(), entropy.data(), to, scratch);
      });
    } else {
      row_grad(kernels, given, divisors, upstream, high.data(), low.data(), entropy.data(), to, parallel);
    }
    std::vector<T> results;
    if (in_place) {
      results.assign(logits.data(), logits.data() + place.size);
      std::copy(before.begin(), before.end(), logits.data());
    }
    const bool mean = options.reduction == Reduction::mean;
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      const auto at = [&](const Buffer<acc>& x, int64_t stride) {
        return x.data() != nullptr ? Real(x[n * stride]) : Real(0);
      };
      const Real g = at(from_loss, upstream.loss_stride), gz = at(from_z, upstream.z_loss_stride);
      const Real added = at(from_lse, upstream.lse_stride);
      Coefficients k;
      if (of_probabilities) {
        k.a = g * Real(part_sum[n]), k.of_parts = g;
      } else if (!ignored(n)) {
        k = coefficients(n,
                         from_loss.data() == nullptr ? 0
                         : mean                      ? g / totals[kKeptWeight]
                                                     : g,
                         mean ? (g + gz) / totals[kKeptRows] : g + gz, high[n]);
        if (from_entropy.data() != nullptr) {
          k.h = at(from_entropy, upstream.entropy_stride), k.entropy = entropy[n];
        }
      }
      k.a += added, k.size += std::fabs(added);
      this->check_row_grad(n, k, ignored(n) && added == 0, high[n], low.data() != nullptr ? low[n] : acc(0),
                           [&](int64_t c) {
                             const int64_t i = index(out_place.layout, n, c);
                             return in_place ? results[i] : out.take(i);
                           });
    }
    high.check_sealed("lse"), low.check_sealed("lse_low"), entropy.check_sealed("entropy");
    from_loss.check_sealed("grad_loss"), from_z.check_sealed("grad_z_loss"), from_lse.check_sealed("grad_lse");
    from_entropy.check_sealed("grad_entropy"), part_sum.check_sealed("part_sum");
    if (!in_place) {
      out.check_rest("grad");
      this->check_inputs();
    } else {
      this->check_small_inputs();
    }
  }

  void check_probability_grad() {
    note("probability_grad");
    Buffer<acc> from_loss(memory, rows), high(memory, rows), low(memory, rows);
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      sum_row();
      from_loss[n] = static_cast<acc>(random.normal());
      high[n] = static_cast<acc>(lse);
      low[n] = std::isfinite(high[n]) ? static_cast<acc>(lse - Real(high[n])) : acc(0);
    }
    from_loss.seal(), high.seal(), low.seal();
    const Place out_place = some_place(random, rows, cols, inner, true);
    Buffer<T> out(memory, out_place.size);
    const Output<T> to{out.data(), out_place.layout, by_tiles && past_cache};
    if (by_tiles) {
      for_tiles([&](const Tile& tile, auto& scratch) {
        kernels.tile.probability_grad(given, tile, from_loss.data(), high.data(), low.data(), to, scratch);
      });
    } else {
      probability_grad(kernels, given, from_loss.data(), high.data(), low.data(), to, parallel);
    }
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      for (int64_t c = 0; c < cols; ++c) {
        const T value = out.take(index(out_place.layout, n, c));
        const Real y = z[c] - Real(high[n]), low_n = low[n];
        const Real factor = -Real(from_loss[n]) * (1 - Real(options.label_smoothing)) * weight_of(c);
        if (!std::isfinite(high[n])) {
          // Where the factor is 0, or the part and z -inf, a number will do: the loss is NaN.
          continue;
        }
        if (std::isinf(y)) {
          if (part(n, c) == 0) {
            expect("grad of the probabilities", n, c, value, Real(0), Real(0));
          } else if (std::fabs(part(n, c)) > 4 * tiny && std::fabs(factor) > 4 * tiny) {
            expect("grad of the probabilities", n, c, value, factor * y, Real(0));
          }
          continue;
        }
        const Real size = std::fabs(factor);
        if (!(std::fabs(y) < P::largest && size * std::fabs(y) < P::largest)) {
          ++state.unbounded;
          continue;
        }
        expect("grad of the probabilities", n, c, value, factor * (y - low_n),
               size * (eps * (6 * std::fabs(y) + 3 * std::fabs(low_n)) + z_error(z[c])) +
                   tiny * (1 + std::fabs(y) * (1 + std::fabs(weight_of(c)))));
      }
    }
    out.check_rest("grad of the probabilities");
    from_loss.check_sealed("grad_loss"), high.check_sealed("lse"), low.check_sealed("lse_low");
    this->check_inputs();
  }

  // Targets of any 64 bits, most of them good.
  int64_t make_any_targets() {
    const int64_t n = random.one_in(64) ? near(random, random.number_of({4096, 8192, 5000})) : random.below(40);
    target = Buffer<int64_t>(memory, n);
    const bool bad = random.one_in(3);
    int64_t first = -1;
    for (int64_t i = 0; i < n; ++i) {
      int64_t y = random.one_in(8) ? options.ignore_index : random.below(options.num_classes);
      if (bad && random.one_in(n)) {
        y = this->some_bad_target();
      }
      target[i] = y;
      const bool is_class = y >= 0 && y < options.num_classes;
      if (first < 0 && !is_class && y != options.ignore_index) {
        first = i;
      }
    }
    target.seal();
    state.rows += n;
    return first;
  }

  void check_totals() {
    const int64_t first_bad = make_any_targets(), n = target.size();
    note("reduce_totals of %lld targets", ll(n));
    Buffer<double> out(memory, kTotals);
    const int64_t bad =
        reduce_totals<acc>(kernels.sums, options, target.data(), n, weight.data(), out.data(), parallel);
    if (bad != first_bad || npu_xent::first_bad_target(options, target.data(), n) != first_bad) {
      fail("the first bad target is %lld, expected %lld", ll(bad), ll(first_bad));
    }
    long double kept = 0, size = 0, count = 0, all = 0, all_size = 0;
    for (int64_t i = 0; i < n && first_bad < 0; ++i) {
      if (target[i] != options.ignore_index) {
        const long double w = weight.data() != nullptr ? weight[target[i]] : acc(1);
        kept += w, size += std::fabs(w), count += 1;
      }
    }
    for (int64_t c = 0; weight.data() != nullptr && c < options.num_classes; ++c) {
      all += weight[c], all_size += std::fabs(weight[c]);
    }
    all = weight.data() != nullptr ? all : static_cast<long double>(options.num_classes);
    const double results[] = {out.take(kKeptWeight), out.take(kKeptRows), out.take(kClassWeight)};
    if (first_bad < 0) {
      const auto bound = [&](long double terms, int64_t additions) {
        return terms * Format<double>::eps / 2 * static_cast<long double>(additions);
      };
      expect("kept weight", 0, 0, results[0], kept, bound(size, n));
      expect("kept rows", 0, 0, results[1], count, 0.0L);
      expect("class weight", 0, 0, results[2], all, bound(all_size, std::min<int64_t>(options.num_classes, 30000)));
    }
    out.check_rest("totals");
    this->check_small_inputs();
  }

  void check_loss() {
    const int64_t first_bad = make_any_targets(), n = target.size();
    const bool none = options.reduction == Reduction::none;
    note("reduce_loss of %lld rows", ll(n));
    Buffer<acc> high(memory, n), low(memory, n, !random.one_in(4)), picked(memory, n);
    Buffer<acc> wsum(memory, n, options.label_smoothing != 0);
    Values values(random);
    const bool hostile = random.one_in(4);
    const auto fill = [&](Buffer<acc>& to) {
      for (int64_t i = 0; to.data() != nullptr && i < n; ++i) {
        to[i] = hostile && random.one_in(16) ? values.template special<acc>() : values.template next<acc>();
      }
      to.seal();
    };
    fill(high), fill(picked), fill(wsum);
    for (int64_t i = 0; low.data() != nullptr && i < n; ++i) {
      low[i] = static_cast<acc>(std::isfinite(high[i]) ? high[i] * Format<acc>::eps * random.uniform() : 0);
    }
    low.seal();
    Buffer<double> loss(memory, none ? n : 1), z_loss(memory, none ? n : 1);
    const int64_t bad =
        reduce_loss<acc>(kernels.sums, options, target.data(), n, weight.data(), high.data(), low.data(), picked.data(),
                         wsum.data(), totals, loss.data(), z_loss.data(), parallel);
    if (bad != first_bad) {
      fail("the first bad target is %lld, expected %lld", ll(bad), ll(first_bad));
    }
    using Wide = long double;
    constexpr Wide overflow = kLargest<double> / 64;
    const Wide e = options.label_smoothing, zs = options.lse_square_scale, unit = Format<double>::eps;
    const bool mean = options.reduction == Reduction::mean;
    Wide sum = 0, z_sum = 0, size = 0, z_size = 0, most = 0;
    for (int64_t i = 0; i < n && first_bad < 0; ++i) {
      Wide l = 0, z_l = 0, terms = 0, growth = 0;  // what may overflow on the way
      if (target[i] != options.ignore_index) {
        const Wide w = weight.data() != nullptr ? weight[target[i]] : acc(1), share = (1 - e) * w;
        const Wide rest = low.data() != nullptr ? low[i] : acc(0);
        l = share == 0 ? 0 : share * (Wide(high[i]) - Wide(picked[i]) + rest);
        growth = share == 0 ? 0 : std::fabs(Wide(high[i])) + std::fabs(Wide(picked[i])) + std::fabs(rest);
        terms = share == 0 ? 0 : std::fabs(share) * growth;
        if (e != 0) {
          const Wide part = e / static_cast<Wide>(options.num_classes) * Wide(wsum[i]);
          l -= part, terms += std::fabs(part);
        }
        z_l = zs * Wide(high[i]) * Wide(high[i]);
        if (!std::isfinite(high[i])) {
          l = z_l = std::numeric_limits<Wide>::quiet_NaN(), terms = 0;
        }
        growth = std::isfinite(growth) ? growth : 0, terms = std::isfinite(terms) ? terms : 0;
      }
      if (none) {
        const double value = loss.take(i), z_value = z_loss.take(i);
        const bool grows = !(growth + terms + z_l < overflow) && !std::isnan(z_l);
        state.unbounded += grows;
        if (!grows) {
          expect("loss", i, 0, value, l + z_l, unit * (8 * terms + 4 * std::fabs(z_l)));
        }
        if (zs != 0 && !grows) {
          expect("z_loss", i, 0, z_value, z_l, 4 * unit * std::fabs(z_l));
        }
      }
      sum += l, z_sum += z_l, size += terms, most += growth, z_size += std::isfinite(z_l) ? std::fabs(z_l) : 0;
    }
    if (!none) {
      const double value = loss.take(0), z_value = z_loss.take(0);
      const Wide by_weight = mean ? totals[kKeptWeight] : 1, by_rows = mean ? totals[kKeptRows] : 1;
      const Wide additions = unit * (static_cast<Wide>(n) + 12);
      const Wide z_expected = z_sum / by_rows;
      Wide expected = mean && by_weight == 0 ? std::numeric_limits<Wide>::quiet_NaN() : sum / by_weight;
      Wide bound = additions * (by_weight == 0 ? 0 : size / by_weight);
      if (zs != 0) {
        expected += z_expected, bound += additions * (by_rows == 0 ? 0 : z_size / by_rows);
      }
      const bool grows = !(most + size + z_size + bound < overflow) || (zs != 0 && by_rows == 0);
      state.unbounded += grows;
      if (first_bad < 0 && !grows) {
        expect("loss", 0, 0, value, expected, bound);
        if (zs != 0) {
          expect("z_loss", 0, 0, z_value, z_expected, by_rows == 0 ? 0 : additions * z_size / by_rows);
        }
      }
    }
    if (none && first_bad >= 0) {  // rows of blocks without a bad target may be written
      for (int64_t i = 0; i < n; ++i) {
        loss.take(i), z_loss.take(i);
      }
    }
    loss.check_rest("loss"), z_loss.check_rest("z_loss");
    high.check_sealed("lse"), low.check_sealed("lse_low"), picked.check_sealed("picked"), wsum.check_sealed("wsum");
    this->check_small_inputs();
  }

  void check_scale() {
    const int64_t n = random.one_in(64) ? near(random, 16384) : random.below(200);
    Values values(random);
    Buffer<T> x(memory, n);
    std::vector<T> before;
    for (int64_t i = 0; i < n; ++i) {
      before.push_back(random.one_in(32) ? values.template special<T>() : values.template next<T>());
      x[i] = before[i];
    }
    const double factor = random.one_of(
        {0.0, -1.0, 0.5, 1e-30, 1e30, 3 * random.uniform(), static_cast<double>(NAN), static_cast<double>(INFINITY)});
    note("scale of %lld by %g", ll(n), factor);
    scale(kernels, x.data(), n, factor, parallel);
    for (int64_t i = 0; i < n; ++i) {
      const Real expected = static_cast<acc>(static_cast<acc>(load(before[i])) * static_cast<acc>(factor));
      expect("x", 0, i, x.take(i), expected, Real(0));
    }
    x.check_rest("x");
  }

  // The loops over a chunk write the same past the caches, wherever the output begins.
  void check_past_cache() {
    const int64_t n = 1 + random.below(300);
    Buffer<T> x(memory, n), outs[2] = {{memory, n + 70}, {memory, n + 70}};
    Buffer<acc> exps(memory, n), w(memory, n, random.one_in(2));
    const int64_t start = random.below(70);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = Format<T>::store(5 * random.normal());
      exps[i] = static_cast<acc>(random.uniform());
      if (w.data() != nullptr) {
        w[i] = static_cast<acc>(random.uniform());
      }
    }
    x.seal(), exps.seal(), w.seal();
    const LogitMap<acc> map{static_cast<acc>(options.logit_scale), static_cast<acc>(options.softcap)};
    const acc a = static_cast<acc>(random.normal()), b = static_cast<acc>(random.one_in(2) ? 0 : random.normal());
    const int64_t which = random.below(6);
    note("loop %lld over a chunk of %lld past the caches", ll(which), ll(n));
    Buffer<acc> parts(memory, n);

    kernels.parts(x.data(), w.data(), n, a, b, parts.data());
    for (const bool past : {false, true}) {
      T* out = outs[past].data() + start;
      switch (which) {
        case 0:
          kernels.grad_from_exps(x.data(), exps.data(), w.data(), n, map, a, b, out, past);
          break;
        case 1:
          kernels.grad(x.data(), w.data(), n, map, 3, a, 0, b, out, past);
          break;
        case 2:
          kernels.grad(x.data(), w.data(), n, map, 3, a, b, b, out, past);
          break;
        case 3:
          kernels.log_prob(x.data(), n, map, 3, a, out, past);
          break;
        case 4:
          kernels.fill(out, n, a, past);
          break;
        default:
          kernels.parts_grad(x.data(), parts.data(), w.data(), n, map, 3, a, b, out, past);
      }
      kernels.finish();
    }
    if (std::memcmp(outs[0].data(), outs[1].data(), (n + 70) * sizeof(T)) != 0) {
      fail("past the caches the results are others");
    }
    for (const auto& out : outs) {
      for (int64_t i = 0; i < n; ++i) {
        out.take(start + i);
      }
      out.check_rest("out");
    }
    x.check_sealed("x"), exps.check_sealed("exps"), w.check_sealed("w");
  }
};

template <typename T>
void one_call(Random& random, const std::string& variant) {
  const int64_t kind = random.below(100);
  Call<T> call(random, variant, kind >= 80 && kind < 91, some_shape(random));
  if (kind < 32) {
    call.check_stats(false, false);
  } else if (kind < 42) {
    call.check_stats(true, false);
  } else if (kind < 68) {
    call.check_grad();
  } else if (kind < 80) {
    call.check_stats(false, true);
  } else if (kind < 84) {
    call.check_stats(false, false);
  } else if (kind < 88) {
    call.check_grad();
  } else if (kind < 91) {
    call.check_probability_grad();
  } else if (kind < 94) {
    call.check_totals();
  } else if (kind < 97) {
    call.check_loss();
  } else if (kind < 98) {
    call.check_scale();
  } else {
    call.check_past_cache();
  }
}

}  // namespace

void cpu_case(Random& random) {
  const std::string& variant = variants()[random.below(static_cast<int64_t>(variants().size()))];
  switch (random.below(6)) {
    case 0:
    case 1:
      return one_call<float>(random, variant);
    case 2:
      return one_call<double>(random, variant);
    case 3:
      return one_call<bf16>(random, variant);
    default:
      return one_call<f16>(random, variant);
  }
}

}  // namespace fuzz
