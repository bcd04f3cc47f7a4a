// Cross entropy of small problems in double, term by term as row_math.h defines it, and how large the terms are: what
// results are compared with. And the problems: logits, targets, options, the same on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "row_math.h"

namespace test {

using npu_xent::Reduction;
using npu_xent::RowOptions;

struct Case {
  const char* name;
  Reduction reduction;
  double label_smoothing, lse_square_scale;
  bool weighted, some_ignored, read_ignored;
  double logit_scale, softcap, grad_scale;
  bool upstream;  // gradients other than 1 reach the loss and the z-loss
  bool by_row;    // temperatures, and gradients of the entropy
};

inline const Case kCases[] = {
    {"mean", Reduction::mean, 0, 0, false, false, false, 1, 0, 1, false, false},
    {"sum, weight, smoothing, ignored rows", Reduction::sum, 0.1, 0, true, true, false, 1, 0, 1, true, false},
    {"mean, everything", Reduction::mean, 0.1, 1e-2, true, true, false, 0.5, 4, 2, true, false},
    {"none, z-loss, ignored rows", Reduction::none, 0, 1e-2, false, true, true, 1, 0, 1, true, false},
    {"none, smoothing, weight", Reduction::none, 0.25, 0, true, false, false, 1.25, 0, 1.25, true, false},
    {"mean, softcap far above the logits", Reduction::mean, 0, 0, false, false, false, 1, 1000, 1, false, false},
    {"none, by row, ignored rows", Reduction::none, 0, 0, false, true, false, 1, 0, 1, true, true},
    {"none, by row, softcap, smoothing, weight", Reduction::none, 0.1, 1e-2, true, true, false, 1.5, 6, 1.5, true,
     true},
};

inline constexpr int64_t kIgnore = -100;

// Sums in twice the precision, so that the order does not matter.
class Sum {
 public:
  void add(double x) {
    const double sum = sum_ + x;
    if (std::isfinite(sum)) {
      rest_ += std::fabs(sum_) >= std::fabs(x) ? (sum_ - sum) + x : (x - sum) + sum_;
    }
    sum_ = sum;
  }
  double value() const { return sum_ + rest_; }

 private:
  double sum_ = 0, rest_ = 0;
};

// About normally distributed, by integer arithmetic and a division that is exact.
class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}
  double uniform() { return (bits_() >> 8) / 16777216.0; }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) {
      sum += uniform();
    }
    return sum;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits_() % static_cast<uint64_t>(n)); }

 private:
  std::mt19937 bits_;
};

struct Problem {
  int64_t rows, cols;
  RowOptions options;
  bool read_ignored;
  std::vector<double> logits;  // [rows, cols], values of the type that is tested
  std::vector<int64_t> target;
  std::vector<double> weight;                     // fp32 values, or empty for all ones
  std::vector<double> grad_loss, grad_z_loss;     // one for each row, or one for all
  std::vector<double> temperature, grad_entropy;  // fp32 values, one for each row, or empty: 1 and 0

  bool by_row() const { return !temperature.empty(); }
  double temperature_of(int64_t n) const { return by_row() ? temperature[n] : 1; }
};

// Logits of T; rows 1, 4, 7, ... are ignored if the case says so.
template <typename T>
Problem make_problem(int64_t rows, int64_t cols, const Case& c, double offset = 0, double confidence = 0) {
  Random random(static_cast<uint32_t>(1000 * rows + cols));
  Problem p{
      rows,
      cols,
      {c.reduction, kIgnore, c.label_smoothing, c.lse_square_scale, cols, 0, c.logit_scale, c.softcap, c.grad_scale},
      c.read_ignored,
      {},
      {},
      {},
      {1},
      {0},
      {},
      {}};
  for (int64_t n = 0; n < rows; ++n) {
    p.target.push_back(n == 0 ? cols - 1 : random.below(cols));
    for (int64_t i = 0; i < cols; ++i) {
      const double x = offset + 3 * random.normal() + (i == p.target[n] ? confidence : 0);
      p.logits.push_back(Format<T>::load(Format<T>::store(x)));
    }
    if (c.some_ignored && n % 3 == 1) {
      p.target[n] = kIgnore;
    }
  }
  for (int64_t i = 0; c.weighted && i < cols; ++i) {
    p.weight.push_back(static_cast<float>(1 - 0.9 * random.uniform()));
  }
  if (c.upstream) {
    const int64_t n = c.reduction == Reduction::none ? rows : 1;
    p.grad_loss.resize(n);
    p.grad_z_loss.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      p.grad_loss[i] = static_cast<float>(random.normal());
      p.grad_z_loss[i] = static_cast<float>(random.normal());
    }
  }
  for (int64_t n = 0; c.by_row && n < rows; ++n) {
    p.temperature.push_back(static_cast<float>(0.5 + 1.5 * random.uniform()));
    p.grad_entropy.push_back(n % 4 == 3 ? 0 : static_cast<float>(random.normal()));
  }
  return p;
}

struct Truth {
  std::vector<double> lse, picked, wsum, log_prob, grad;
  std::vector<double> entropy, entropy_terms;
  std::vector<bool> top1;
  std::vector<double> loss, z_loss;  // one for each row, or one
  std::vector<double> loss_terms, grad_terms, wsum_terms;
  double totals[npu_xent::kTotals];
};

// What the softmax sees of a logit of row n.
inline double mapped(const Problem& p, int64_t n, double logit) {
  const double scaled = logit * p.options.logit_scale;
  const double capped = p.options.softcap == 0 ? scaled : p.options.softcap * std::tanh(scaled / p.options.softcap);
  return capped / p.temperature_of(n);
}

inline Truth truth_of(const Problem& p) {
  const double e = p.options.label_smoothing, zs = p.options.lse_square_scale, classes = static_cast<double>(p.cols);
  const auto weight = [&](int64_t c) { return p.weight.empty() ? 1.0 : p.weight[c]; };
  Truth t{};
  Sum kept_weight, kept_rows, class_weight;
  for (int64_t c = 0; c < p.cols; ++c) {
    class_weight.add(weight(c));
  }
  for (const int64_t y : p.target) {
    kept_weight.add(y == kIgnore ? 0 : weight(y));
    kept_rows.add(y != kIgnore);
  }
  const double totals[] = {kept_weight.value(), kept_rows.value(), class_weight.value()};
  std::copy_n(totals, 3, t.totals);
  const bool mean = p.options.reduction == Reduction::mean;
  const double by_weight = mean ? totals[0] : 1, by_rows = mean ? totals[1] : 1;

  Sum loss, z_loss, loss_terms;
  for (int64_t n = 0; n < p.rows; ++n) {
    std::vector<double> x(p.logits.begin() + n * p.cols, p.logits.begin() + (n + 1) * p.cols);
    double top = -INFINITY;
    for (double& value : x) {
      value = mapped(p, n, value);
      top = std::isnan(value) || value > top ? value : top;
      if (std::isnan(top)) {
        break;
      }
    }
    const int64_t y = p.target[n];
    const bool kept = y != kIgnore;
    const double shift = std::isfinite(top) ? top : 0;
    Sum sum, others, wsum, wsum_terms;  // others: all but the target
    for (int64_t c = 0; c < p.cols; ++c) {
      sum.add(std::exp(x[c] - shift));
      others.add(c == y ? 0 : std::exp(x[c] - shift));
    }
    const double lse = std::isnan(top) ? NAN : shift + std::log(sum.value());
    const bool defined = std::isfinite(lse);
    for (int64_t c = 0; c < p.cols; ++c) {
      const double log_prob = defined ? x[c] - lse : NAN;
      t.log_prob.push_back(log_prob);
      wsum.add(weight(c) * log_prob);
      wsum_terms.add(std::isfinite(x[c]) ? weight(c) * (std::fabs(x[c]) + std::fabs(lse)) : 0);
    }
    Sum entropy, entropy_terms;  // of terms -p log p
    for (int64_t c = 0; c < p.cols; ++c) {
      const double prob = std::exp(x[c] - shift) / sum.value(), below = x[c] - lse;
      entropy.add(prob == 0 ? 0 : -prob * below);
      entropy_terms.add(prob == 0 ? 0 : prob * (1 + std::fabs(below)) * (1 + std::fabs(x[c])));
    }
    t.entropy.push_back(entropy.value());
    t.entropy_terms.push_back(defined ? 1 + std::log(sum.value()) + entropy_terms.value() : 0);
    const auto logits = p.logits.begin() + n * p.cols;
    t.top1.push_back(kept && defined && std::max_element(logits, logits + p.cols) - logits == y);

    const double w = kept ? weight(y) : 0, picked = kept ? x[y] : 0;
    t.lse.push_back(lse);
    t.picked.push_back(picked);
    t.wsum.push_back(wsum.value());
    t.wsum_terms.push_back(wsum_terms.value());

    double row_loss = 0, row_z = 0, row_terms = 0;
    if (kept) {
      row_z = zs == 0 ? 0 : defined ? zs * lse * lse : NAN;
      row_loss = (defined ? (1 - e) * w * (lse - picked) : NAN) - (e == 0 ? 0 : e / classes * wsum.value());
      row_terms = (1 - e) * w * (std::fabs(lse) + std::fabs(picked)) + e / classes * wsum_terms.value() + row_z;
    }
    row_terms = std::isfinite(row_terms) ? row_terms : 0;
    if (p.options.reduction == Reduction::none) {
      t.loss.push_back(row_loss + row_z);
      t.z_loss.push_back(row_z);
      t.loss_terms.push_back(row_terms);
    }
    loss.add(row_loss);
    z_loss.add(row_z);
    loss_terms.add(row_terms);

    const double from_loss = p.grad_loss[p.grad_loss.size() == 1 ? 0 : n];
    const double from_z = p.grad_z_loss[p.grad_z_loss.size() == 1 ? 0 : n];
    const double g = from_loss / by_weight, z = (from_loss + from_z) / by_rows * 2 * zs * (zs == 0 ? 0 : lse);
    for (int64_t c = 0; c < p.cols; ++c) {
      const double prob = std::exp(x[c] - shift) / sum.value();
      // p - 1 of the target without cancellation.
      const double p_minus_hot = c == y ? -others.value() / sum.value() : prob;
      const double smoothed = e / classes * (totals[2] * prob - weight(c));
      const double cosh =
          p.options.softcap == 0 ? 1 : std::cosh(p.logits[n * p.cols + c] * p.options.logit_scale / p.options.softcap);
      const double h = p.by_row() ? p.grad_entropy[n] : 0, below = std::isinf(x[c]) ? 0 : x[c] - lse;
      const double u = p.options.grad_scale / p.temperature_of(n);
      const double of_entropy = h * prob * (below + entropy.value());
      const double grad = u / (cosh * cosh) * (g * ((1 - e) * w * p_minus_hot + smoothed) + z * prob - of_entropy);
      t.grad.push_back(!kept ? 0 : defined ? grad : NAN);
      // An exponential of x - lse carries the rounding of x and of lse.
      const double hot = c == y, p_terms = std::isinf(x[c]) ? 0 : (1 + std::fabs(x[c]) + std::fabs(lse)) * prob;
      const double terms =
          std::fabs(g) * ((1 - e) * w * (p_terms + hot) + e / classes * (totals[2] * (p_terms + hot) + weight(c))) +
          std::fabs(z) * (p_terms + hot) +
          std::fabs(h) * (p_terms * (std::fabs(below) + entropy.value()) + prob * t.entropy_terms[n]);
      t.grad_terms.push_back(kept && defined ? std::fabs(u) * terms : 0);
    }
  }
  if (p.options.reduction != Reduction::none) {
    t.z_loss = {z_loss.value() / by_rows};
    t.loss = {loss.value() / by_weight + t.z_loss[0]};
    t.loss_terms = {loss_terms.value() / std::fmin(by_weight, by_rows)};
  }
  return t;
}

}  // namespace test
