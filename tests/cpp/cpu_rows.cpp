// The row functions of the CPU (csrc/cpu/rows.h) with one variant of their loops, against double: cpu_rows VARIANT.
// Exits with 77 if this processor lacks what the variant is compiled for.
#include "cpu/rows.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <thread>

#include "check.h"
#include "output_memory.h"
#include "reference.h"
#include "variants.h"

namespace {

using namespace test;
using namespace npu_xent::cpu;
using npu_xent::first_bad_target;
using npu_xent::give_memory_back;
using npu_xent::kLargeOutput;
using npu_xent::kTotals;
using npu_xent::take_memory;

Parallel on_threads(int64_t threads) {
  return {threads, [threads](int64_t n_tasks, const std::function<void(int64_t)>& task) {
            std::atomic<int64_t> next{0};
            const auto work = [&] {
              for (int64_t i; (i = next++) < n_tasks;) {
                task(i);
              }
            };
            std::vector<std::thread> helpers;
            for (int64_t i = 1; i < std::min(threads, n_tasks); ++i) {
              helpers.emplace_back(work);
            }
            work();
            for (auto& helper : helpers) {
              helper.join();
            }
          }};
}

// How a matrix lies in memory: row by row, or as two images (one of few rows) of planes, one for each class.
enum class Order { rows, planes };

// A matrix with guard memory between and behind its elements, which no sweep may write.
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t cols, int64_t padding, Order order = Order::rows)
      : rows_(rows), cols_(cols), layout_(Layout::of_rows(rows, cols + padding)) {
    if (order == Order::planes) {
      const int64_t inner = rows % 2 == 0 ? rows / 2 : rows, plane = inner + padding;
      layout_ = {inner, cols * plane, 1, plane};
    }
    memory_.resize((rows + padding) * (cols + padding) * 2 + kBehind);
    std::memset(memory_.data(), kFill, memory_.size() * sizeof(T));
  }
  // The padding is NaN: a result would tell that it was read.
  Matrix(int64_t rows, int64_t cols, int64_t padding, Order order, const std::vector<double>& values)
      : Matrix(rows, cols, padding, order) {
    std::fill(memory_.begin(), memory_.end(), Format<T>::store(NAN));
    for (int64_t i = 0; i < rows * cols; ++i) {
      memory_[place(i)] = Format<T>::store(values[i]);
    }
  }
  T* data() { return memory_.data(); }
  const Layout& layout() const { return layout_; }
  Output<T> output() { return {data(), layout_}; }
  std::vector<T> values() const {
    std::vector<T> result;
    for (int64_t i = 0; i < rows_ * cols_; ++i) {
      result.push_back(memory_[place(i)]);
    }
    return result;
  }
  // An output's values, after a look at what is between them.
  std::vector<T> results(const char* name) const {
    std::vector<bool> inside(memory_.size());
    for (int64_t i = 0; i < rows_ * cols_; ++i) {
      inside[place(i)] = true;
    }
    bool intact = true;
    for (size_t i = 0; i < memory_.size(); ++i) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(&memory_[i]);
      intact = intact && (inside[i] || std::all_of(bytes, bytes + sizeof(T), [](auto b) { return b == kFill; }));
    }
    check(intact, "%s: memory beside its rows was written", name);
    return values();
  }

 private:
  static constexpr unsigned char kFill = 0xa5;
  static constexpr int64_t kBehind = 64;
  int64_t place(int64_t i) const { return layout_.row_start(i / cols_) + i % cols_ * layout_.column; }

  int64_t rows_, cols_;
  Layout layout_;
  std::vector<T> memory_;
};

template <typename T>
struct Results {
  using acc = acc_t<T>;
  std::vector<acc> lse, lse_low, picked, wsum, entropy;             // of row_stats
  std::vector<float> top1;                                          // 0 or 1
  std::vector<acc> swept_lse, swept_low, swept_picked, swept_wsum;  // of row_stats_grad
  std::vector<T> log_prob, grad, swept;
  std::vector<double> totals, loss, z_loss;
};

template <typename T>
class Run {
 public:
  using acc = acc_t<T>;

  Run(const ChunkKernels<T>& kernels, const Problem& p, int64_t padding, Order order)
      : kernels_(kernels),
        p_(p),
        padding_(padding),
        order_(order),
        weight_(stored<acc>(p.weight)),
        temperature_(stored<acc>(p.temperature)),
        grad_entropy_(stored<acc>(p.grad_entropy)) {}

  // Gradients go over the logits if `in_place`.
  Results<T> on(int64_t threads, bool in_place) {
    parallel_ = on_threads(threads);
    Results<T> r;
    const RowOptions& o = p_.options;
    r.totals.resize(kTotals);
    reduce_totals(kernels_.sums, o, p_.target.data(), p_.rows, weight(), r.totals.data(), parallel_);

    Matrix<T> logits = new_logits(), log_prob(p_.rows, p_.cols, 0, order_);
    Matrix<acc> entropy(1, p_.rows, 0);
    Matrix<unsigned char> top1(1, p_.rows, 0);
    static_assert(sizeof(bool) == 1);
    stats_of(
        [&](Stats<T> out) {
          out.entropy = entropy.data();
          out.top1 = reinterpret_cast<bool*>(top1.data());
          row_stats(kernels_, rows(logits), p_.read_ignored, out, Output<T>{}, parallel_);
        },
        r.lse, r.lse_low, r.picked, r.wsum);
    r.entropy = entropy.results("entropy");
    const auto flags = top1.results("top1");
    r.top1.assign(flags.begin(), flags.end());
    // log_prob is of all rows.
    std::vector<acc> lse, low, picked, wsum;
    stats_of([&](const Stats<T>& out) { row_stats(kernels_, rows(logits), true, out, log_prob.output(), parallel_); },
             lse, low, picked, wsum);
    r.log_prob = log_prob.results("log_prob");

    const size_t losses = o.reduction == Reduction::none ? p_.rows : 1;
    r.loss.resize(losses);
    r.z_loss.resize(losses);
    reduce_loss(kernels_.sums, o, p_.target.data(), p_.rows, weight(), r.lse.data(), r.lse_low.data(), r.picked.data(),
                need_wsum() ? r.wsum.data() : nullptr, r.totals.data(), r.loss.data(), r.z_loss.data(), parallel_);

    const auto from_loss = stored<acc>(p_.grad_loss), from_z = stored<acc>(p_.grad_z_loss);
    const Upstream<T> upstream{from_loss.data(),     from_z.data(),     nullptr, or_null(grad_entropy_),
                               from_loss.size() > 1, from_z.size() > 1, 0,       1};
    Matrix<T> grad = in_place ? new_logits() : Matrix<T>(p_.rows, p_.cols, 1, order_);
    Matrix<T> swept = in_place ? new_logits() : Matrix<T>(p_.rows, p_.cols, 5, order_);
    row_grad(kernels_, rows(in_place ? grad : logits), r.totals.data(), upstream, r.lse.data(), r.lse_low.data(),
             r.entropy.data(), grad.output(), parallel_);
    stats_of(
        [&](const Stats<T>& out) {
          row_stats_grad(kernels_, rows(in_place ? swept : logits), p_.read_ignored, r.totals.data(), out,
                         swept.output(), parallel_);
        },
        r.swept_lse, r.swept_low, r.swept_picked, r.swept_wsum);
    r.grad = in_place ? grad.values() : grad.results("grad");
    r.swept = in_place ? swept.values() : swept.results("grad of row_stats_grad");
    return r;
  }

 private:
  bool need_wsum() const { return p_.options.label_smoothing != 0; }
  static const acc* or_null(const std::vector<acc>& x) { return x.empty() ? nullptr : x.data(); }
  const acc* weight() const { return or_null(weight_); }
  Matrix<T> new_logits() const { return {p_.rows, p_.cols, padding_, order_, p_.logits}; }
  Rows<T> rows(Matrix<T>& logits) const {
    return {p_.options, logits.data(),    logits.layout(), p_.rows,
            p_.cols,    p_.target.data(), weight(),        or_null(temperature_)};
  }
  template <typename F>
  void stats_of(const F& call, std::vector<acc>& lse, std::vector<acc>& low, std::vector<acc>& picked,
                std::vector<acc>& wsum) const {
    Matrix<acc> out[4] = {{1, p_.rows, 0}, {1, p_.rows, 0}, {1, p_.rows, 0}, {1, p_.rows, 0}};
    call({out[0].data(), out[1].data(), out[2].data(), need_wsum() ? out[3].data() : nullptr, nullptr, nullptr});
    lse = out[0].results("lse");
    low = out[1].results("lse_low");
    picked = out[2].results("picked");
    wsum = need_wsum() ? out[3].results("wsum") : std::vector<acc>{};
  }

  const ChunkKernels<T>& kernels_;
  const Problem& p_;
  const int64_t padding_;
  const Order order_;
  const std::vector<acc> weight_, temperature_, grad_entropy_;
  Parallel parallel_;
};

template <typename T>
void check_against_truth(const Problem& p, const Results<T>& r) {
  using acc = acc_t<T>;
  const Truth t = truth_of(p);
  Problem unit = p;  // what row_stats_grad computes
  unit.grad_loss = {1};
  unit.grad_z_loss = {0};
  std::fill(unit.grad_entropy.begin(), unit.grad_entropy.end(), 0);
  const Truth swept = truth_of(unit);
  for (int64_t i = 0; i < kTotals; ++i) {
    check_near<double, acc>("totals", i, r.totals[i], t.totals[i], 0);
  }
  for (int64_t n = 0; n < p.rows; ++n) {
    const bool ignored = p.target[n] == kIgnore, unread = ignored && !p.read_ignored;
    const double lse = unread ? 0 : t.lse[n];
    // With a softcap or a temperature z is rounded, and lse is off by as much.
    const bool rounded = p.options.softcap != 0 || p.by_row();
    check_near<acc, acc>("lse", n, r.lse[n], lse, rounded ? std::fmax(1, std::fabs(lse)) : 1);
    if (std::isfinite(lse)) {
      // Both numbers together are more exact than one could be.
      const double both = static_cast<double>(r.lse[n]) + static_cast<double>(r.lse_low[n]);
      const double terms = p.by_row() ? std::fmax(1, std::fabs(lse)) : 1;
      check_near<double, acc>("lse + lse_low", n, both, lse, unread ? 0 : terms, 1, 16);
    }
    check_near<acc, acc>("picked", n, r.picked[n], t.picked[n], rounded ? std::fabs(t.picked[n]) : 0);
    check_near<acc, acc>("entropy", n, r.entropy[n], unread ? 0 : t.entropy[n], unread ? 0 : t.entropy_terms[n]);
    check(r.top1[n] == (t.top1[n] ? 1 : 0), "top1[%lld] is %g", static_cast<long long>(n), r.top1[n]);
    if (!r.wsum.empty() && std::isfinite(lse)) {
      check_near<acc, acc>("wsum", n, r.wsum[n], unread ? 0 : t.wsum[n], unread ? 0 : t.wsum_terms[n]);
    }
  }
  for (int64_t i = 0; i < p.rows * p.cols; ++i) {
    const double size = std::fabs(mapped(p, i / p.cols, p.logits[i])) + std::fabs(t.lse[i / p.cols]) + 1;
    check_near<T, acc>("log_prob", i, r.log_prob[i], t.log_prob[i], std::isfinite(size) ? size : 0, 2);
    check_near<T, acc>("grad", i, r.grad[i], t.grad[i], t.grad_terms[i]);
    check_near<T, acc>("grad of row_stats_grad", i, r.swept[i], swept.grad[i], swept.grad_terms[i]);
  }
  const int units = sizeof(acc) == sizeof(double) ? 64 : 4;  // losses are summed in double
  for (size_t i = 0; i < r.loss.size(); ++i) {
    check_near<double, acc>("loss", i, r.loss[i], t.loss[i], t.loss_terms[i], 1, units);
    if (p.options.lse_square_scale != 0) {
      // Of one row it is scale * lse^2, which changes by 2 scale |lse| with lse; lse may be near 0.
      const double slope = r.loss.size() > 1 ? 2 * std::sqrt(t.z_loss[i] * p.options.lse_square_scale) : 0;
      check_near<double, acc>("z_loss", i, r.z_loss[i], t.z_loss[i], t.z_loss[i] + slope, 1, units);
    }
  }
}

// All results by one thread, and the same in place by three.
template <typename T>
Results<T> run(const ChunkKernels<T>& kernels, const Problem& p, int64_t padding, Order order = Order::rows) {
  Run<T> run(kernels, p, padding, order);
  const Results<T> one = run.on(1, false), three = run.on(3, true);
  const std::string before = context;
  context += ", 3 threads beside 1";
#define SAME(NAME) check_same_bits(#NAME, three.NAME, one.NAME)
  SAME(lse), SAME(lse_low), SAME(picked), SAME(wsum), SAME(swept_lse), SAME(swept_low), SAME(swept_picked);
  SAME(entropy), SAME(top1), SAME(swept_wsum), SAME(log_prob), SAME(grad), SAME(swept), SAME(totals), SAME(loss),
      SAME(z_loss);
#undef SAME
  context = before;
  check_same_bits("lse of row_stats_grad", one.swept_lse, one.lse);
  check_same_bits("lse_low of row_stats_grad", one.swept_low, one.lse_low);
  check_same_bits("picked of row_stats_grad", one.swept_picked, one.picked);
  check_same_bits("wsum of row_stats_grad", one.swept_wsum, one.wsum);
  return one;
}

template <typename T>
void describe(const char* what, int64_t rows, int64_t cols, const Case& c) {
  context = std::string(Format<T>::name) + ", " + what + ", [" + std::to_string(rows) + ", " + std::to_string(cols) +
            "], " + c.name;
}

// Sizes beside those of vectors and of blocks of two vectors, with all options.
constexpr int64_t kSmallShapes[][2] = {{1, 1},   {3, 3},  {5, 17}, {7, 31},  {4, 33},  {2, 65},
                                       {3, 127}, {40, 2}, {70, 5}, {33, 16}, {34, 256}};
// Beside those of chunks (4096), where few rows are shared out by chunks; and more rows than one task takes.
constexpr int64_t kLargeShapes[][2] = {{3, 1000}, {1, 4096}, {2, 4097}, {3, 4099}, {2, 8200}, {450, 37}};

template <typename T>
void test_shape(const ChunkKernels<T>& kernels, int64_t rows, int64_t cols, const Case& c) {
  describe<T>("shapes", rows, cols, c);
  const Problem p = make_problem<T>(rows, cols, c);
  check_against_truth(p, run(kernels, p, cols % 2 == 0 ? 0 : 3));
  if (rows > 1) {
    context += ", classes not adjacent";
    check_against_truth(p, run(kernels, p, cols % 2 == 0 ? 3 : 0, Order::planes));
  }
}

template <typename T>
void test_shapes(const ChunkKernels<T>& kernels) {
  for (const auto& [rows, cols] : kSmallShapes) {
    for (const Case& c : kCases) {
      test_shape(kernels, rows, cols, c);
    }
  }
  size_t turn = sizeof(T);
  for (const auto& [rows, cols] : kLargeShapes) {
    test_shape(kernels, rows, cols, kCases[turn++ % std::size(kCases)]);
  }
}

// A row whose exponentials are not kept from the statistics to the gradient.
template <typename T>
void test_long_row(const ChunkKernels<T>& kernels) {
  test_shape(kernels, 1, (int64_t{1} << 20) / sizeof(acc_t<T>) + 77, kCases[0]);
}

// Row by row what is not an ordinary number, among rows that are.
template <typename T>
void test_corners(const ChunkKernels<T>& kernels) {
  for (const int64_t cols : {133, 4200}) {
    for (const Case& c : {kCases[3], kCases[4], kCases[6]}) {
      if (cols == 4200 && (sizeof(T) == 2) == c.weighted) {
        continue;  // to save time
      }
      describe<T>("NaN and infinities", 9, cols, c);
      Problem p = make_problem<T>(9, cols, c);
      const auto x = [&](int64_t n) { return p.logits.begin() + n * cols; };
      p.target = {3, 5, 7, cols - 3, 13, kIgnore, 17, 19, cols - 1};
      x(0)[cols / 2] = NAN;
      x(1)[cols - 2] = INFINITY;
      std::fill_n(x(2), cols, -INFINITY);
      std::fill_n(x(3), cols - 30, -INFINITY);  // a chunk of nothing else
      x(4)[13] = -INFINITY;                     // the target
      x(5)[0] = NAN;                            // ignored
      std::fill_n(x(7), cols, Format<T>::load(Format<T>::store(60000)));
      std::fill_n(x(8), cols - 1, -INFINITY);  // all of the probability at the target
      p.read_ignored = false;
      const Results<T> r = run(kernels, p, 3);
      check_against_truth(p, r);
      check_against_truth(p, run(kernels, p, 1, Order::planes));
      if (cols == 133) {
        p.read_ignored = true;
        check_against_truth(p, run(kernels, p, 0));
        check_against_truth(p, run(kernels, p, 0, Order::planes));
      }
    }
  }
}

// Logits far from 0, of which the statistics may not lose digits.
template <typename T>
void test_offset(const ChunkKernels<T>& kernels) {
  for (const auto& [cols, offset] : {std::pair{int64_t{1000}, 1e4}, std::pair{int64_t{4501}, -1e4}}) {
    describe<T>("logits far from 0", 3, cols, kCases[0]);
    const Problem p = make_problem<T>(3, cols, kCases[0], offset, 12);
    const Results<T> r = run(kernels, p, 0);
    check_against_truth(p, r);
    const Truth t = truth_of(p);
    for (int64_t i = 0; i < 3 * cols; ++i) {
      // Of the gradient and, at the target, of p, which is near 1; and not of the logit.
      const double size = std::fabs(t.grad[i]) + (i % cols == p.target[i / cols] ? 1.0 / 3 : 0);
      check_near<T, acc_t<T>>("grad", i, r.grad[i], t.grad[i], size, 1, 64);
      check_near<T, acc_t<T>>("grad of row_stats_grad", i, r.swept[i], t.grad[i], size, 1, 64);
    }
    check_near<double, acc_t<T>>("loss", 0, r.loss[0], t.loss[0], 1, 1, 16);
  }
}

// Chunks that are further apart than the largest number.
void test_opposite_chunks(const ChunkKernels<double>& kernels) {
  context = "chunks further apart than the largest number";
  constexpr int64_t cols = 5000, far = 4096;
  std::vector<double> x(cols, 1.7e308), grad(cols);
  std::fill_n(x.begin(), far, -1.7e308);
  const int64_t target = far;
  RowOptions o;
  o.reduction = Reduction::none;
  o.num_classes = cols;
  const Rows<double> rows{o, x.data(), Layout::of_rows(1, cols), 1, cols, &target, nullptr, nullptr};
  const double totals[kTotals] = {1, 1, 1};
  double lse, low, picked;
  row_stats_grad(kernels, rows, true, totals, {&lse, &low, &picked, nullptr, nullptr, nullptr},
                 Output<double>{grad.data(), rows.layout}, on_threads(1));
  for (int64_t c = 0; c < cols; ++c) {
    const double expected = c < far ? 0 : 1.0 / (cols - far) - (c == target ? 1 : 0);
    check_near<double, double>("grad", c, grad[c], expected, 1);
  }
}

// Two shards of the classes, each with statistics of its own, and the gradient of each from those of all.
template <typename T>
void test_shards(const ChunkKernels<T>& kernels) {
  using acc = acc_t<T>;
  const int64_t rows = 5, cols = 1000, split = 301;
  const Case& c = kCases[1];
  describe<T>("class shards", rows, cols, c);
  const Problem p = make_problem<T>(rows, cols, c);
  const Truth t = truth_of(p);
  const auto logits = stored<T>(p.logits);
  const auto weight = stored<acc>(p.weight), all_lse = stored<acc>(t.lse), upstream = stored<acc>(p.grad_loss);
  for (const auto& [begin, end] : {std::pair{int64_t{0}, split}, std::pair{split, cols}}) {
    const int64_t n_cols = end - begin;
    RowOptions options = p.options;
    options.class_start = begin;
    const Rows<T> shard{
        options, logits.data() + begin, Layout::of_rows(rows, cols), rows, n_cols, p.target.data(), weight.data(),
        nullptr};
    std::vector<acc> lse(rows), low(rows), picked(rows), wsum(rows);
    row_stats(kernels, shard, false, {lse.data(), low.data(), picked.data(), wsum.data(), nullptr, nullptr},
              Output<T>{}, on_threads(1));
    std::vector<T> grad(rows * n_cols);
    row_grad(kernels, shard, t.totals, {upstream.data(), nullptr, nullptr, nullptr, 0, 0, 0, 0}, all_lse.data(),
             static_cast<const acc*>(nullptr), static_cast<const acc*>(nullptr),
             Output<T>{grad.data(), Layout::of_rows(rows, n_cols)}, on_threads(1));
    for (int64_t n = 0; n < rows; ++n) {
      const bool kept = p.target[n] != kIgnore;
      const auto* x = &p.logits[n * cols];
      Sum sum, expected_wsum;
      double size = 0;
      for (int64_t i = begin; i < end; ++i) {
        sum.add(std::exp(x[i]));
      }
      const double expected = std::log(sum.value());
      for (int64_t i = begin; i < end; ++i) {
        expected_wsum.add(p.weight[i] * (x[i] - expected));
        size += p.weight[i] * (std::fabs(x[i]) + std::fabs(expected));
        check_near<T, acc>("grad", i, grad[n * n_cols + i - begin], t.grad[n * cols + i], t.grad_terms[n * cols + i]);
      }
      const bool here = kept && p.target[n] >= begin && p.target[n] < end;
      check_near<acc, acc>("lse", n, lse[n], kept ? expected : 0, 1);
      check_near<acc, acc>("picked", n, picked[n], here ? x[p.target[n]] : 0, 0);
      check_near<acc, acc>("wsum", n, wsum[n], kept ? expected_wsum.value() : 0, kept ? size : 0);
    }
  }
}

// Class probabilities instead of targets, some of them 0.
template <typename T>
void test_probabilities(const ChunkKernels<T>& kernels) {
  using acc = acc_t<T>;
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {40, 2}, {5, 33}, {2, 4099}, {1, 8200}}) {
    for (const Case& c : {kCases[0], kCases[2], kCases[4]}) {
      for (const Order order : {Order::rows, Order::planes}) {
        describe<T>("probabilities", rows, cols, c);
        Problem p = make_problem<T>(rows, cols, c);
        const Truth t = truth_of(p);
        std::vector<double> q;
        for (int64_t i = 0; i < rows * cols; ++i) {
          q.push_back(i % 3 == 1 ? 0 : Format<T>::load(Format<T>::store(static_cast<double>(i % 7 + 1) / 8)));
        }
        const auto weight = stored<acc>(p.weight);
        const int64_t padding = cols % 2 == 0 ? 0 : 3;
        Matrix<T> logits(rows, cols, padding, order, p.logits), probabilities(rows, cols, 1, order, q);
        Matrix<acc> lse(1, rows, 0), low(1, rows, 0), cross(1, rows, 0), part_sum(1, rows, 0);
        Rows<T> given{
            p.options, logits.data(), logits.layout(), rows, cols, nullptr, weight.empty() ? nullptr : weight.data(),
            nullptr};
        given.probabilities = probabilities.data();
        given.probability_layout = probabilities.layout();
        for (const int64_t threads : {1, 3}) {
          const auto parallel = on_threads(threads);
          row_stats(kernels, given, true,
                    {lse.data(), low.data(), nullptr, cross.data(), nullptr, nullptr, part_sum.data()}, Output<T>{},
                    parallel);
          const auto lses = lse.results("lse"), crosses = cross.results("cross"), sums = part_sum.results("part_sum");
          const auto grad_loss = stored<acc>(std::vector<double>(rows, 0.75));
          Matrix<T> grad(rows, cols, 5, order), grad_q(rows, cols, 0, order);
          given.part_sum = part_sum.data();
          const double ones[kTotals] = {1, 1, 1};
          row_grad(kernels, given, ones, {grad_loss.data(), nullptr, nullptr, nullptr, 1, 0, 0, 0}, lse.data(),
                   low.data(), static_cast<const acc*>(nullptr), grad.output(), parallel);
          probability_grad(kernels, given, grad_loss.data(), lse.data(), low.data(), grad_q.output(), parallel);
          const auto grads = grad.results("grad"), q_grads = grad_q.results("grad of the probabilities");
          for (int64_t n = 0; n < rows; ++n) {
            const double e = p.options.label_smoothing;
            Sum expected, terms, all_parts;
            std::vector<double> parts;
            for (int64_t i = 0; i < cols; ++i) {
              const int64_t at = n * cols + i;
              const double w = p.weight.empty() ? 1 : p.weight[i],
                           size = std::fabs(t.log_prob[at]) + std::fabs(t.lse[n]);
              parts.push_back(w * ((1 - e) * q[at] + e / static_cast<double>(cols)));
              all_parts.add(parts[i]);
              expected.add(parts[i] * t.log_prob[at]);
              terms.add(parts[i] * (size + 1));
              check_near<T, acc>("grad of the probabilities", at, q_grads[at], -0.75 * (1 - e) * w * t.log_prob[at],
                                 (1 - e) * w * (size + 1), 1, 8);
            }
            check_near<acc, acc>("lse", n, lses[n], t.lse[n], 1 + std::fabs(t.lse[n]));
            check_near<acc, acc>("cross", n, crosses[n], expected.value(), terms.value(), 1, 8);
            check_near<acc, acc>("part_sum", n, sums[n], all_parts.value(), all_parts.value(), 1, 8);
            for (int64_t i = 0; i < cols; ++i) {
              const int64_t at = n * cols + i;
              const double ratio = p.options.softcap == 0 ? 0 : mapped(p, n, p.logits[at]) / p.options.softcap;
              const double factor = 0.75 * p.options.grad_scale * (1 - ratio * ratio);
              const double prob = std::exp(t.log_prob[at]) * all_parts.value();
              check_near<T, acc>("grad", at, grads[at], factor * (prob - parts[i]),
                                 2 * (prob * (5 + std::fabs(t.lse[n])) + parts[i]), 1, 8);
            }
          }
        }
      }
    }
  }
}

template <typename T>
void test_scale(const ChunkKernels<T>& kernels) {
  for (const int64_t n : {1, 7, 33, 16389}) {
    describe<T>("scale", 1, n, kCases[0]);
    const Problem p = make_problem<T>(1, n, kCases[0]);
    std::vector<T> results[2];
    for (const int64_t threads : {1, 3}) {
      Matrix<T> x(1, n, 0, Order::rows, p.logits);
      scale(kernels, x.data(), n, -0.375, on_threads(threads));
      results[threads / 2] = x.values();
    }
    check_same_bits("3 threads beside 1", results[1], results[0]);
    for (int64_t i = 0; i < n; ++i) {
      check_near<T, acc_t<T>>("x", i, results[0][i], -0.375 * p.logits[i], 0);
    }
  }
}

// The 16-bit numbers one by one, to fp32 and back: all of their values, and what lies between two of them.
template <typename T>
void test_conversion(const ChunkKernels<T>& kernels) {
  context = std::string(Format<T>::name) + ", conversion";
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T x{static_cast<uint16_t>(bits)};
    const double expected = Format<T>::load(x);
    const float loaded = kernels.mapped(&x, {1, 0});
    check(std::isnan(expected) ? std::isnan(loaded) : loaded == expected, "%04x is %g, expected %g", bits, loaded,
          expected);
    if (!std::isfinite(expected) || !std::isfinite(Format<T>::load(T{static_cast<uint16_t>(bits + 1)}))) {
      continue;
    }
    const double next = Format<T>::load(T{static_cast<uint16_t>(bits + 1)});
    for (const double share : {0.0, 0.25, 0.5, 0.75}) {
      const auto between = static_cast<float>(expected + share * (next - expected));
      T one, whole[32];
      kernels.store(&one, between);
      kernels.fill(whole, 32, between, /*past_cache=*/false);
      const uint16_t wanted = Format<T>::store(between).bits;
      check(one.bits == wanted && whole[31].bits == wanted, "%.9g is stored as %04x, filled in as %04x, expected %04x",
            between, one.bits, whole[31].bits, wanted);
    }
  }
}
// The same for loops over vectors, which convert by instructions of their own: x times 1.
template <typename T>
void test_vector_conversion(const ChunkKernels<T>& kernels) {
  context = std::string(Format<T>::name) + ", conversion of vectors";
  std::vector<T> all(0x10000);
  for (uint32_t bits = 0; bits < all.size(); ++bits) {
    all[bits].bits = static_cast<uint16_t>(bits);
  }
  auto results = all;
  kernels.scale(results.data(), static_cast<int64_t>(results.size()), 1);
  for (size_t i = 0; i < all.size(); ++i) {
    const double expected = Format<T>::load(all[i]), actual = Format<T>::load(results[i]);
    check(std::isnan(expected) ? std::isnan(actual) : results[i].bits == all[i].bits, "%04x became %04x", all[i].bits,
          results[i].bits);
  }
  // Exponentials are fp32: out = exps, rounded. Halfway, above and below.
  std::vector<float> exps;
  for (uint32_t bits = 0; bits < 0x7000; bits += 3) {
    const double low = Format<T>::load(T{static_cast<uint16_t>(bits)});
    const double high = Format<T>::load(T{static_cast<uint16_t>(bits + 1)});
    for (const double share : {0.25, 0.5, 0.75}) {
      exps.push_back(static_cast<float>(low + share * (high - low)));
    }
  }
  std::vector<T> rounded(exps.size());
  kernels.grad_from_exps(nullptr, exps.data(), nullptr, static_cast<int64_t>(exps.size()), {1, 0}, 1, 0, rounded.data(),
                         /*past_cache=*/false);
  for (size_t i = 0; i < exps.size(); ++i) {
    const T wanted = Format<T>::store(exps[i]);
    check(rounded[i].bits == wanted.bits, "%.9g is stored as %04x, expected %04x", exps[i], rounded[i].bits,
          wanted.bits);
  }
}

// More rows than one task sums.
void test_many_rows(const SumKernels<float>& kernels) {
  context = "many rows";
  Case c = kCases[1];
  c.reduction = Reduction::mean;
  const Problem p = make_problem<float>(9000, 5, c);
  const auto weight = stored<float>(p.weight);
  std::vector<float> lse, picked, wsum;
  const Truth t = truth_of(p);
  for (int64_t n = 0; n < p.rows; ++n) {
    lse.push_back(static_cast<float>(t.lse[n]));
    picked.push_back(static_cast<float>(t.picked[n]));
    wsum.push_back(static_cast<float>(t.wsum[n]));
  }
  std::vector<double> results[2];
  for (const int64_t threads : {1, 3}) {
    std::vector<double>& r = results[threads / 2];
    r.resize(5);
    reduce_totals(kernels, p.options, p.target.data(), p.rows, weight.data(), r.data(), on_threads(threads));
    reduce_loss(kernels, p.options, p.target.data(), p.rows, weight.data(), lse.data(),
                static_cast<const float*>(nullptr), picked.data(), wsum.data(), r.data(), &r[3], &r[4],
                on_threads(threads));
  }
  check_same_bits("3 threads beside 1", results[1], results[0]);
  for (int64_t i = 0; i < kTotals; ++i) {
    check_near<double, double>("totals", i, results[0][i], t.totals[i], t.totals[i], 1, 64);
  }
  check_near<double, float>("loss", 0, results[0][3], t.loss[0], t.loss_terms[0]);

  const int64_t targets[] = {0, kIgnore, 4, 5, -1};
  const float ones[] = {1, 1, 1, 1, 1, 1};
  for (const auto& [n, classes, expected] : {std::array{5, 5, 3}, std::array{3, 5, -1}, std::array{5, 6, 4}}) {
    RowOptions o;
    o.num_classes = classes;
    o.ignore_index = kIgnore;
    double totals[kTotals], loss, z_loss;
    check(first_bad_target(o, targets, n) == expected, "first_bad_target");
    check(reduce_totals(kernels, o, targets, n, ones, totals, on_threads(1)) == expected,
          "a bad target in reduce_totals");
    const double some[kTotals] = {1, 1, 1};
    check(reduce_loss(kernels, o, targets, n, ones, ones, ones, ones, ones, some, &loss, &z_loss, on_threads(1)) ==
              expected,
          "a bad target in reduce_loss");
  }
}

// Memory is aligned and disjoint, and comes again when it has been given back.
void test_memory() {
  context = "memory of outputs";
  const size_t bytes = kLargeOutput + 12345;
  void* first = take_memory(bytes);
  void* second = take_memory(bytes);
  check(first != nullptr && second != nullptr && first != second, "%p and %p", first, second);
  check(reinterpret_cast<uintptr_t>(first) % (2 << 20) == 0, "%p is not aligned", first);
  std::memset(first, 0x5a, bytes);
  std::memset(second, 0xa5, bytes);
  const auto* begin = static_cast<unsigned char*>(first);
  check(std::all_of(begin, begin + bytes, [](unsigned char b) { return b == 0x5a; }), "memory has changed");
  give_memory_back(first);
  void* other = take_memory(3 * bytes);
  check(other != first, "%p is too small", first);
  void* again = take_memory(bytes);
  check(again == first, "%p has come, not %p", again, first);
  for (void* memory : {again, second, other}) {
    give_memory_back(memory);
  }
}

// exp over what a softmax has; where it is below the smallest normal number, no more than that.
void test_exp(const ChunkKernels<float>& kernels) {
  context = "exp";
  std::vector<float> x{0.0f, -0.0f, -87.4f, -100.0f, -1e4f, -3e38f, -HUGE_VALF};
  for (float value = -1e-30f; value > -1; value *= 1.001f) {
    x.push_back(value);
  }
  for (float value = -1; value > -87.3f; value -= 0.00037f) {
    x.push_back(value);
  }
  std::vector<float> e(x.size());
  kernels.grad(x.data(), nullptr, static_cast<int64_t>(x.size()), {1, 0}, 0, 1, 0, 0, e.data(), /*past_cache=*/false);
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp(static_cast<double>(x[i]));
    const double allowed = expected < FLT_MIN ? FLT_MIN : 2 * 0x1p-23 * expected;
    check(std::abs(e[i] - expected) <= allowed, "exp(%.9g) is %.9g, expected %.9g", x[i], e[i], expected);
  }
  const float nan = std::nanf("");
  float of_nan;
  kernels.grad(&nan, nullptr, 1, {1, 0}, 0, 1, 0, 0, &of_nan, /*past_cache=*/false);
  check(!std::isfinite(of_nan), "exp(NaN) is %.9g", of_nan);
}

// What goes past the cache is the same, wherever it begins, and touches nothing beside it.
template <typename T>
void test_past_cache(const ChunkKernels<T>& kernels) {
  context = std::string(Format<T>::name) + ", past the cache";
  using acc = acc_t<T>;
  constexpr int64_t room = 300;
  std::vector<acc> exps(room);
  for (int64_t i = 0; i < room; ++i) {
    exps[i] = static_cast<acc>(1) / static_cast<acc>(i + 1);
  }
  std::vector<T> results[2];
  for (int64_t begin = 0; begin < 70; ++begin) {
    for (const int64_t n : {1, 7, 64, 130, 200}) {
      for (const bool past_cache : {false, true}) {
        auto& out = results[past_cache];
        out.assign(room, Format<T>::store(7));
        kernels.grad_from_exps(nullptr, exps.data(), nullptr, n, {1, 0}, acc(0.3), 0, &out[begin], past_cache);
        kernels.finish();
      }
      check(std::memcmp(results[0].data(), results[1].data(), room * sizeof(T)) == 0, "%lld elements at %lld differ",
            static_cast<long long>(n), static_cast<long long>(begin));
    }
  }
}

template <typename T>
void test_all(const KernelTable& table) {
  const auto& kernels = table.of<T>();
  test_shapes<T>(kernels);
  test_corners<T>(kernels);
  test_shards<T>(kernels);
  test_probabilities<T>(kernels);
  test_scale<T>(kernels);
  test_past_cache<T>(kernels);
  if constexpr (std::is_same_v<T, float>) {
    test_many_rows(kernels.sums);
    test_exp(kernels);
    test_offset<T>(kernels);
  }
  if constexpr (std::is_same_v<T, double>) {
    test_opposite_chunks(kernels);
  }
  if constexpr (sizeof(T) == 2) {
    test_conversion<T>(kernels);
    test_vector_conversion<T>(kernels);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string variant = argc == 2 ? argv[1] : "";
  const std::string expected = VARIANTS;
  if (compiled_capabilities() != expected || (' ' + expected + ' ').find(' ' + variant + ' ') == std::string::npos) {
    std::fprintf(stderr, "usage: cpu_rows VARIANT, one of %s (this library holds %s)\n", expected.c_str(),
                 compiled_capabilities().c_str());
    return 2;
  }
  if (!processor_has(variant)) {
    std::printf("cpu_rows %s: this processor lacks it\n", variant.c_str());
    return 77;
  }
  const KernelTable& table = kernel_table(variant);
  context = "variants";
  check((&table == &kernel_table("DEFAULT")) == (variant == "DEFAULT"), "%s has no table of its own", variant.c_str());
  test_all<float>(table);
  test_all<double>(table);
  test_all<bf16>(table);
  test_all<f16>(table);
  if (variant == "DEFAULT") {  // what is not compiled once for each
    test_long_row<float>(table.of<float>());
    test_memory();
  }
  return finish(("cpu_rows " + variant).c_str());
}
