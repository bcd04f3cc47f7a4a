// Rows with their operands, as both halves of the fuzzer take them, and what the definition says of their results.
//
// The definition is row_math.h's in twice the precision, from the logits after scale (rounded once to the statistics'
// type) and softcap, and for gradients from the statistics that the call is given. A bound is a sum over the roundings
// of the computation:
//
//   exp          units of eps by which exp is off, and by which the factors around it are rounded
//   |z - lse|    eps of it: an exponent is rounded once or twice
//   additions    eps / 2 of what is added up, for each addition in one lane of a vector
//   tanh         eps of z, with a softcap: tanh, its argument, and the product
//   factors      of each term of a row's coefficients; the CPU computes these in double
//   joined       eps of the type in which chunks of a row are joined; float64 sums also have the roundings of a joint:
//                two factors exp(difference of maxima), two products, an addition
//   FLT_MIN      exp is 0 below it, in float64 below DBL_MIN it loses digits
//   2^-1074      the step of numbers below DBL_MIN: float64 coefficients of a row are rounded to it
#pragma once

#include "cpu/row_types.h"
#include "fuzz.h"

namespace fuzz {

using npu_xent::kClassWeight;
using npu_xent::kKeptRows;
using npu_xent::kKeptWeight;
using npu_xent::kTotals;
using npu_xent::Reduction;
using npu_xent::RowOptions;
using npu_xent::cpu::acc_t;
using npu_xent::cpu::Layout;

inline long long ll(int64_t x) {
  return x;
}

// How far the roundings of an implementation go.
struct Rounding {
  double exp, tanh, factors, joined;
  double additions_of_float, additions_of_double;  // columns of a chunk for each addition in a lane, times 2
};

// How rows lie in memory, and how many elements that takes.
struct Place {
  Layout layout;
  int64_t size;
};
// `inner` rows an image. What is written must not overlap.
inline Place some_place(Random& random, int64_t rows, int64_t cols, int64_t inner, bool written) {
  const int64_t gap = random.one_in(2) ? 0 : random.below(6);
  Layout at{};
  if (random.one_in(inner < rows ? 2 : 3)) {  // classes side by side in planes
    const int64_t column = !written && random.one_in(8) ? random.below(inner + 1) : inner + gap;
    at = {inner, (cols - 1) * column + inner + gap, 1, column};
    if (written || !random.one_in(8)) {
      at.outer = cols * column + gap;
    }
  } else {
    const int64_t row = !written && random.one_in(8) ? random.below(cols + 1) : cols + gap;
    at = {inner, (inner - 1) * row + cols + gap, row, 1};
  }
  if (!written && random.one_in(8)) {
    at.outer = random.below(at.outer + 1);
  }
  const int64_t last = rows == 0 ? 0 : (rows - 1) / inner * at.outer + (inner - 1) * at.row + (cols - 1) * at.column;
  return {at, rows == 0 ? 0 : last + 1};
}
inline int64_t index(const Layout& at, int64_t n, int64_t c) {
  return at.row_start(n) + c * at.column;
}

// T: the logits' type.
template <typename T>
struct Problem {
  using acc = acc_t<T>;
  using Real = std::conditional_t<std::is_same_v<acc, double>, long double, double>;
  static constexpr Real eps = Format<acc>::eps, tiny = Format<acc>::tiny;
  static constexpr Real largest = static_cast<Real>(kLargest<acc>) / 64;  // terms beyond may overflow

  Random& random;
  const bool on_device, of_probabilities;
  const Rounding rounding;
  Memory memory;
  int64_t rows, cols, inner;  // inner: rows of an image
  RowOptions options{};
  Place place{}, probability_place{};
  Buffer<T> logits, probabilities;
  Buffer<int64_t> target;
  Buffer<acc> weight, temperature;
  double totals[kTotals];
  int64_t chunks = 2;  // one more than a row may be cut into

  Problem(Random& random_, bool on_device_, bool of_probabilities_, const Rounding& rounding_, int64_t rows_,
          int64_t cols_, int64_t inner_)
      : random(random_),
        on_device(on_device_),
        of_probabilities(of_probabilities_),
        rounding(rounding_),
        memory(random_),
        rows(rows_),
        cols(cols_),
        inner(inner_) {
    choose_options();
    place = on_device ? some_rows_place() : some_place(random, rows, cols, inner, false);
    note("%s, [%lld, %lld], %lld rows an image, strides %lld, %lld, %lld", Format<T>::name, ll(rows), ll(cols),
         ll(inner), ll(place.layout.outer), ll(place.layout.row), ll(place.layout.column));
    fill_logits();
    if (of_probabilities) {
      fill_probabilities();
    } else {
      fill_targets();
    }
    fill_weights();
    for (double& total : totals) {
      total = random.one_in(16)  ? 0
              : random.one_in(4) ? 1 + static_cast<double>(random.below(100))
                                 : 5 * random.uniform();
      total = static_cast<acc>(total);
    }
    state.rows += rows;
  }
  // Adjacent classes, and one stride for all rows.
  Place some_rows_place() const {
    const int64_t row = random.one_in(8) ? random.below(cols + 1) : cols + (random.one_in(2) ? 0 : random.below(40));
    return {Layout::of_rows(std::max<int64_t>(rows, 1), row), rows == 0 ? 0 : (rows - 1) * row + cols};
  }

  void choose_options() {
    RowOptions& o = options;
    o.reduction = random.one_of({Reduction::none, Reduction::mean, Reduction::sum});
    o.label_smoothing = random.one_in(2) ? 0 : random.one_of({0.1, 1e-10, 0.5, 1.0, random.uniform()});
    o.lse_square_scale = random.one_in(2) ? 0 : random.one_of({1e-4, 1.0, 1e-30, random.uniform()});
    o.logit_scale = random.one_in(2) ? 1 : random.one_of({0.5, -1.0, 0.0, 1e-30, 1e30, 1e-310, 4 * random.uniform()});
    o.softcap = random.one_in(5) ? random.one_of({1e-6, 1.0, 30.0, 1000.0, 1e6, 10 * random.uniform() + 1e-3}) : 0;
    o.grad_scale = random.one_in(2) ? o.logit_scale : random.one_of({1.0, 0.0, -2.0, 1e-20, 1e10});
    if (on_device) {
      o.grad_scale = random.one_in(8) ? random.one_of({0.0, -2.0, 1e-5, 1e5}) : 1;
    }
    if (random.one_in(8)) {  // a temperature
      const double t = random.one_of({1e-6, 0.7, 3.0, 1e6});
      o.logit_scale /= t, o.softcap /= t, o.grad_scale /= t;
    }
    o.num_classes = cols;
    if (!of_probabilities && random.one_in(3)) {  // a shard of the classes
      o.class_start = random.below(50);
      o.num_classes = o.class_start + cols + random.below(50);
    }
    if (!of_probabilities && random.one_in(16)) {  // without weights, which there cannot be so many of
      o.class_start = random.number_of({0, 1, int64_t{1} << 32, (int64_t{1} << 40) + 3, int64_t{1} << 62});
      o.num_classes = std::numeric_limits<int64_t>::max() - random.below(3);
    }
    const int64_t smallest = std::numeric_limits<int64_t>::min(), largest = std::numeric_limits<int64_t>::max();
    o.ignore_index =
        random.number_of({-100, -100, -100, -1, smallest, largest, o.class_start, o.num_classes,
                          o.class_start + cols - 1, int64_t{1} << 32, static_cast<int64_t>(random.bits())});
    note(
        "reduction %d, ignore_index %lld, smoothing %g, z scale %g, logit scale %g, softcap %g, grad scale %g, classes "
        "from %lld of %lld",
        static_cast<int>(o.reduction), ll(o.ignore_index), o.label_smoothing, o.lse_square_scale, o.logit_scale,
        o.softcap, o.grad_scale, ll(o.class_start), ll(o.num_classes));
  }

  void fill_logits() {
    logits = Buffer<T>(memory, place.size);
    Values values(random);
    const bool overlap = random.one_in(4);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t c = 0; c < cols; ++c) {
        logits[index(place.layout, n, c)] = values.next<T>();
      }
    }
    for (int64_t i = overlap && rows > 0 ? 1 + random.below(6) : 0; i > 0; --i) {
      const int64_t n = random.below(rows), first = random.below(cols);
      const T value = values.special<T>();
      const int64_t end = random.one_in(4) ? cols : first + 1;  // one class, or all from there on
      for (int64_t c = random.one_in(8) ? 0 : first; c < end; ++c) {
        logits[index(place.layout, n, c)] = value;
      }
    }
    logits.seal();
  }
  void fill_probabilities() {
    probability_place = some_place(random, rows, cols, inner, false);
    probabilities = Buffer<T>(memory, probability_place.size);
    const int64_t kind = random.below(4);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t c = 0; c < cols; ++c) {
        const double q = kind == 0 ? (random.one_in(cols) ? 1 : 0) : kind == 1 ? random.uniform() : random.normal();
        probabilities[index(probability_place.layout, n, c)] = Format<T>::store(random.one_in(8) ? 0 : q);
      }
    }
    probabilities.seal();
  }
  bool is_class(int64_t y) const { return y >= 0 && y < options.num_classes; }
  int64_t some_bad_target() {
    const int64_t c = options.num_classes, low = random.below(std::min<int64_t>(c, 1000));
    const auto high = static_cast<int64_t>(static_cast<uint64_t>(1 + random.below(255)) << (32 + random.below(32)));
    return random.number_of({-1, -2, -3, c, -c, std::numeric_limits<int64_t>::min(),
                             std::numeric_limits<int64_t>::max(), low | high, static_cast<int64_t>(random.bits())});
  }
  void fill_targets() {
    const RowOptions& o = options;
    const bool any_bad = random.one_in(3);
    target = Buffer<int64_t>(memory, rows);
    for (int64_t n = 0; n < rows; ++n) {
      int64_t y = o.class_start + (random.one_in(4) ? random.number_of({0, cols - 1}) : random.below(cols));
      if (random.one_in(8)) {  // of another shard, perhaps with the same low bits
        y = random.one_in(2) ? random.below(o.num_classes) : y + (random.one_in(2) ? 1 : -1) * (int64_t{1} << 32);
      }
      if (random.one_in(8) || y < 0 || y >= o.num_classes) {
        y = o.ignore_index;
      }
      target[n] = is_class(y) || y == o.ignore_index ? y : o.class_start;
      if (on_device && any_bad && random.one_in(8)) {
        target[n] = some_bad_target();
      }
    }
    target.seal();
  }
  void fill_weights() {
    if (options.num_classes < 20000 && random.one_in(2)) {
      weight = Buffer<acc>(memory, options.num_classes);
      const double scale = on_device ? random.one_of({1.0, 1.0, 1e-5, 1e5}) : random.one_of({1.0, 1.0, 1e-20, 1e20});
      const double zero = static_cast<double>(random.below(3)) / 3;
      const bool negative = random.one_in(8);
      for (int64_t c = 0; c < options.num_classes; ++c) {
        const double w = scale * (negative ? random.normal() : random.uniform());
        weight[c] = static_cast<acc>(random.uniform() < zero ? 0 : w);
      }
      weight.seal();
    }
    if (random.one_in(4)) {
      temperature = Buffer<acc>(memory, rows);
      for (int64_t n = 0; n < rows; ++n) {
        temperature[n] = static_cast<acc>(random.one_of({1.0, 0.5 + random.uniform(), 0.01, 100.0, 1e-6, 1e6}));
        if (ignored(n) && random.one_in(4)) {  // may be anything
          temperature[n] = static_cast<acc>(random.one_of<double>({0.0, -1.0, NAN, INFINITY, 1e-320}));
        }
      }
      temperature.seal();
    }
  }

  void check_inputs() const {
    logits.check_sealed("logits");
    probabilities.check_sealed("probabilities");
    check_small_inputs();
  }
  void check_small_inputs() const {
    target.check_sealed("target");
    weight.check_sealed("weight");
    temperature.check_sealed("temperature");
  }

  // ---- the definition ----

  bool ignored(int64_t n) const { return target.data() != nullptr && target[n] == options.ignore_index; }
  // Only on a device: the CPU's operators refuse such targets.
  bool bad(int64_t n) const { return on_device && !ignored(n) && !is_class(target[n]); }
  // The target's column, or -1 without one in this shard.
  int64_t target_column(int64_t n) const {
    if (target.data() == nullptr || ignored(n) || !is_class(target[n]) || target[n] < options.class_start ||
        target[n] - options.class_start >= cols) {
      return -1;
    }
    return target[n] - options.class_start;
  }
  Real weight_of(int64_t c) const { return weight.data() != nullptr ? weight[options.class_start + c] : acc(1); }
  Real target_weight(int64_t n) const { return weight.data() != nullptr ? weight[target[n]] : acc(1); }
  double divided(double option, int64_t n) const {
    return temperature.data() != nullptr ? option / temperature[n] : option;
  }
  Real u_of(int64_t n) const { return divided(options.grad_scale, n); }
  // The temperature of an ignored row may be anything; and with an infinite scale all results are infinite or NaN.
  bool undefined_scale(int64_t n) const {
    const bool usable = temperature.data() == nullptr ||
                        (temperature[n] > 0 && temperature[n] <= kLargest<acc> && 1 / temperature[n] <= kLargest<acc>);
    return !usable || !(std::fabs(divided(options.logit_scale, n)) <= kLargest<acc>);
  }

  // A row after scale and softcap: z, and slope, the derivative's second factor. z is exact, or else off by z_error:
  // with a softcap, or scaled twice.
  std::vector<Real> z, slope;
  Real max, log_sum, lse, cap;
  // sum p |z - lse|, of p (z - lse)^2, of p |z|, of p (z - lse)
  Real mean_size, mean_square, mean_z, tilt;
  bool nan;
  bool overflows;  // if scaled twice, in one order or the other

  void map_row(int64_t n) {
    z.resize(cols), slope.assign(cols, 1);
    const acc scale = static_cast<acc>(divided(options.logit_scale, n));
    cap = static_cast<acc>(divided(options.softcap, n));
    nan = overflows = false;
    max = -std::numeric_limits<Real>::infinity();
    for (int64_t c = 0; c < cols; ++c) {
      const acc x = static_cast<acc>(load(logits.data()[index(place.layout, n, c)]));
      z[c] = on_device && temperature.data() != nullptr
                 ? Real(x) * Real(static_cast<acc>(options.logit_scale)) / Real(temperature[n])
                 : Real(static_cast<acc>(x * scale));
      if (on_device && temperature.data() != nullptr && std::isfinite(x)) {
        const Real scaled = std::fabs(Real(x) * Real(static_cast<acc>(options.logit_scale)));
        overflows = overflows || !(scaled < largest && std::fabs(z[c]) < largest);
      }
      if (cap != 0) {
        const Real ratio = Real(x) * Real(scale) / cap, less = std::expm1(-2 * std::fabs(ratio));
        z[c] = cap * std::copysign(-less / (2 + less), ratio);
        slope[c] = 4 * (1 + less) / ((2 + less) * (2 + less));
      }
      nan = nan || std::isnan(z[c]);
      max = z[c] > max ? z[c] : max;
    }
  }
  void sum_row() {
    lse = nan ? std::numeric_limits<Real>::quiet_NaN() : max;
    log_sum = mean_size = mean_square = mean_z = tilt = 0;
    if (!std::isfinite(lse)) {
      return;
    }
    Real sum = 0;
    for (int64_t c = 0; c < cols; ++c) {
      const Real y = z[c] - max, e = exp_of(y);
      sum += e;
      if (e != 0) {
        mean_size -= e * y, mean_square += e * y * y, mean_z += e * std::fabs(z[c]);
      }
    }
    log_sum = std::log(sum);
    lse = max + log_sum;
    tilt = -mean_size / sum;
    mean_size /= sum, mean_square /= sum, mean_z /= sum;
  }
  static Real exp_of(Real y) { return y < (sizeof(acc) == 4 ? -150 : -1500) ? Real(0) : std::exp(y); }
  bool capped() const { return options.softcap != 0; }
  Real z_units() const { return capped() ? rounding.tanh : on_device && temperature.data() != nullptr ? 3 : 0; }
  Real z_error(Real z_c) const {
    return z_units() == 0 ? Real(0) : z_units() * eps * std::fabs(z_c) + tiny * (2 + cap);
  }
  // eps / 2 for each addition in a lane: of two vectors at least in blocks, and what joins the lanes.
  Real additions() const {
    const double width = sizeof(acc) == 4 ? rounding.additions_of_float : rounding.additions_of_double;
    const Real joints = sizeof(acc) == 4 ? 0 : 2 * static_cast<Real>(chunks - 2);
    return static_cast<Real>(static_cast<double>(std::min<int64_t>(cols, 4096)) / width) + 4 + joints;
  }
  // How far log sum exp may be off.
  Real lse_bound() const {
    return eps * (rounding.exp + additions() + 2 * mean_size + std::fabs(log_sum)) + z_units() * eps * mean_z +
           static_cast<Real>(cols) * tiny;
  }
  // A class's part of the loss, and the size of its terms.
  Real part(int64_t n, int64_t c) const {
    const Real q = load(probabilities.data()[index(probability_place.layout, n, c)]), e = options.label_smoothing;
    return weight_of(c) * ((1 - e) * q + e / static_cast<Real>(cols));
  }
  Real part_size(int64_t n, int64_t c) const {
    const Real q = load(probabilities.data()[index(probability_place.layout, n, c)]), e = options.label_smoothing;
    return std::fabs(weight_of(c)) * (std::fabs((1 - e) * q) + e / static_cast<Real>(cols)) + tiny;
  }

  // The statistics of a row that is mapped and summed.
  template <typename Flag>
  void check_row_stats(int64_t n, bool unread, acc high, acc rest, Buffer<acc>& picked, Buffer<acc>& wsum,
                       Buffer<acc>& entropy, Buffer<Flag>& top1, Buffer<acc>& part_sum) {
    if ((undefined_scale(n) || overflows) && !unread) {
      for (Buffer<acc>* values : {&picked, &wsum, &entropy, &part_sum}) {
        values->data() != nullptr ? void(values->take(n)) : void();
      }
      top1.data() != nullptr ? void(top1.take(n)) : void();
      return;
    }
    const Real nothing = 0;
    const bool defined = std::isfinite(lse);
    const int64_t column = target_column(n);
    const Real bound = unread ? nothing : lse_bound();
    expect("lse", n, 0, high, unread ? nothing : lse, bound + rounding.joined * std::fabs(lse));
    if (unread || !defined) {
      expect("lse_low", n, 0, rest, nothing, nothing);
    } else {
      expect("lse_low", n, 0, rest, (max - Real(high)) + log_sum, bound + eps * std::fabs(Real(rest)));
    }
    if (picked.data() != nullptr) {
      const Real of_no_class = bad(n) ? std::numeric_limits<Real>::quiet_NaN() : nothing;
      expect("picked", n, 0, picked.take(n), column < 0 ? of_no_class : z[column],
             column < 0 ? nothing : z_error(z[column]));
    }
    if (wsum.data() != nullptr) {
      check_wsum(n, unread, wsum.take(n));
    }
    if (part_sum.data() != nullptr) {
      Real sum = 0, size = 0;
      for (int64_t c = 0; c < cols; ++c) {
        sum += part(n, c), size += part_size(n, c);
      }
      expect("part_sum", n, 0, part_sum.take(n), sum, eps * (rounding.exp + 2 * additions()) * size);
    }
    if (entropy.data() != nullptr) {
      const Real expected = unread ? nothing : defined ? log_sum - tilt : std::numeric_limits<Real>::quiet_NaN();
      const Real of_z = z_units() * eps * (2 * mean_z * (1 + log_sum + mean_size) + (z_units() == 0 ? 0 : square_z()));
      expect(
          "entropy", n, 0, entropy.take(n), expected,
          bound +
              eps * (2 * (rounding.exp + additions()) * (mean_size + 1) + 3 * mean_square + 2 * mean_size * mean_size) +
              of_z);
    }
    if (top1.data() != nullptr) {
      const int expected = !unread && defined && column >= 0 && is_first_of_largest(n, column);
      const double value = top1.take(n);
      ++state.compared;
      if (value != expected) {
        fail("top1[%lld] is %g, expected %d", ll(n), value, expected);
      }
    }
  }
  // sum p |z| |z - lse|
  Real square_z() const {
    Real sum = 0;
    for (const Real z_c : z) {
      const Real p = exp_of(z_c - lse);
      sum += p == 0 ? 0 : p * std::fabs(z_c) * std::fabs(z_c - lse);
    }
    return sum;
  }
  bool is_first_of_largest(int64_t n, int64_t column) const {
    const double scale = on_device ? static_cast<acc>(options.logit_scale) : options.logit_scale;  // fp32 there
    const double sign = scale > 0 ? 1 : scale < 0 ? -1 : 0;
    const auto value = [&](int64_t c) { return sign == 0 ? 0 : sign * load(logits.data()[index(place.layout, n, c)]); };
    for (int64_t c = 0; c < cols; ++c) {
      if (c < column ? value(c) >= value(column) : value(c) > value(column)) {
        return false;
      }
    }
    return true;
  }
  void check_wsum(int64_t n, bool unread, acc value) {
    if (unread || !std::isfinite(lse)) {  // the loss is NaN without it
      if (unread) {
        expect("wsum", n, 0, value, Real(0), Real(0));
      }
      return;
    }
    Real sum = 0, terms = 0, weights = 0, of_z = 0, farthest = std::fabs(max);
    bool infinite_down = false, infinite_up = false;
    for (int64_t c = 0; c < cols; ++c) {
      const Real w = of_probabilities ? part(n, c) : weight_of(c);
      const Real size = of_probabilities ? part_size(n, c) : std::fabs(w);
      weights += size;
      if (w == 0) {
        continue;
      }
      if (std::isinf(z[c])) {
        (w > 0 ? infinite_down : infinite_up) = true;
        continue;
      }
      sum += w * (z[c] - lse);
      terms += size * std::fabs(z[c] - lse);
      of_z += size * z_error(z[c]);
      farthest = std::max(farthest, std::fabs(z[c]));
    }
    if (!(terms + weights * (std::fabs(max) + std::fabs(lse)) < largest && farthest < largest)) {
      ++state.unbounded;
      return;
    }
    if (infinite_down || infinite_up) {
      if (!infinite_up && !tiny_parts(n)) {
        expect("wsum", n, 0, value, -std::numeric_limits<Real>::infinity(), Real(0), true);
      }
      return;
    }
    expect("wsum", n, 0, value, sum,
           eps * (rounding.exp + 2 * additions() + 2) * terms + (lse_bound() + eps * (1 + log_sum)) * weights * 2 +
               of_z + rounding.joined * weights * (std::fabs(max) + std::fabs(lse)) * static_cast<Real>(chunks) +
               tiny * (1 + farthest));
  }
  // Whether a part may have been rounded to 0.
  bool tiny_parts(int64_t n) const {
    for (int64_t c = 0; of_probabilities && c < cols; ++c) {
      if (part(n, c) != 0 && std::fabs(part(n, c)) < 4 * tiny) {
        return true;
      }
    }
    return false;
  }

  // a, b and s of row_math.h, without u; h: the gradient of the entropy H.
  struct Coefficients {
    Real a = 0, b = 0, s = 0, h = 0, entropy = 0;
    Real size = 0;      // of the terms of a
    Real growth = 0;    // of what may overflow on the way to it
    Real of_parts = 0;  // what the parts of probabilities are multiplied by
    Real steps = 0;     // what its terms are multiplied by after an underflow
  };
  Coefficients coefficients(int64_t n, Real grad_loss, Real grad_z, acc high) const {
    const Real e = options.label_smoothing, w = target_weight(n), zs = options.lse_square_scale;
    Coefficients k;
    k.b = grad_loss * (1 - e) * w;
    k.s = e == 0 ? 0 : grad_loss * e / static_cast<Real>(options.num_classes);
    if (e == 0 && !std::isfinite(grad_loss)) {
      k.s = 0;
    }
    const Real smoothed = e == 0 ? 0 : k.s * static_cast<Real>(totals[kClassWeight]);
    const Real of_z = zs == 0 ? 0 : grad_z * 2 * zs * static_cast<Real>(high);
    k.a = k.b + smoothed + of_z;
    k.growth = zs == 0 ? 0 : (1 + std::fabs(grad_z)) * (1 + 2 * zs) * std::fabs(static_cast<Real>(high));
    k.size = std::fabs(k.b) + std::fabs(smoothed) + std::fabs(of_z);
    k.steps = 2 * std::fabs(w) + (e == 0 ? 0 : 2 * std::fabs(static_cast<Real>(totals[kClassWeight]))) +
              (zs == 0 ? 0 : 3 * std::fabs(static_cast<Real>(high)));
    return k;
  }

  // What underflow may take from a gradient, before it is multiplied by large factors; size: of its terms.
  Real underflow(Real u, const Coefficients& k, Real s, Real size, Real weight_size) const {
    const Real lost = on_device ? 1e6 * (1 + static_cast<Real>(totals[kClassWeight])) * (1 + weight_size) : 0;
    const Real of_exps = tiny * (4 + 2 * size + lost + 2 * eps * weight_size);
    // G / W and G (1 - e), then times w; G e/C, times W; Z / rows and Z zs, times lse; a, b and s, times u; u s, times
    // a class's weight; a class's part, times u s.
    const Real steps = sizeof(acc) == 4 ? 0 : 4 + k.steps + weight_size + std::fabs(s);
    return of_exps + static_cast<Real>(0x1p-1074) * std::fabs(u) * steps;
  }

  // One row of a gradient, from a row that is mapped, and from lse as it was given or returned.
  template <typename F>
  void check_row_grad(int64_t n, const Coefficients& k, bool zero, acc high, acc rest, const F& result) {
    note("row %lld: a %g, b %g, s %g, h %g, H %g, u %g, lse %g %g, target's column %lld", ll(n), double(k.a),
         double(k.b), double(k.s), double(k.h), double(k.entropy), double(u_of(n)), double(high), double(rest),
         ll(target_column(n)));
    const Real u = u_of(n), nan_value = std::numeric_limits<Real>::quiet_NaN();
    const bool defined = std::isfinite(high);
    const int64_t column = target_column(n);
    for (int64_t c = 0; c < cols; ++c) {
      const T value = result(c);
      if ((undefined_scale(n) || overflows) && !zero) {
        continue;
      }
      if (z_error(max) > Real(0.01)) {  // lse was given by logits that are off by less
        ++state.unbounded;
        continue;
      }
      if (zero || !defined) {
        expect("grad", n, c, value, zero ? Real(0) : nan_value, Real(0));
        continue;
      }
      const Real below = z[c] - Real(high) - Real(rest), p = exp_of(below);
      const Real minus_one = c == column ? std::expm1(below) : 0;
      const Real class_weight = of_probabilities ? part(n, c) : weight_of(c);
      const Real weight_size = of_probabilities ? part_size(n, c) : std::fabs(class_weight);
      const Real s = of_probabilities ? k.of_parts : k.s;
      const Real tilted = k.h == 0 || p == 0 ? 0 : k.h * p * (below + k.entropy);
      const Real smoothed = s == 0 ? 0 : s * class_weight;
      Real g = c == column ? k.a * minus_one + (k.a - k.b) - smoothed : k.a * p - smoothed;
      g -= tilted;
      const Real expected = slope[c] == 0 && std::isfinite(g) ? Real(0) : u * g * slope[c];
      // How far p is off, relative to itself, and the terms.
      const Real far = p == 0 ? 0 : std::fabs(below) + std::fabs(Real(rest));
      const Real p_error = p == 0 ? 0 : p * (eps * (rounding.exp + 2 * far) + z_error(z[c]) + z_error(max));
      const Real h_size = std::fabs(k.h) * (far + std::fabs(k.entropy) + std::fabs(Real(rest)));
      Real error = (std::fabs(k.a) + h_size) * (p_error + eps * p) + std::fabs(k.h) * p * z_error(z[c]);
      error += c == column ? 2 * eps * (std::fabs(k.a * minus_one) + std::fabs(k.a - k.b)) : 0;
      error += rounding.factors * (c != column ? p * k.size : std::fabs(k.a * minus_one) + (k.a == k.b ? 0 : k.size));
      if (of_probabilities || s != 0) {
        error += std::fabs(s) * weight_size * ((of_probabilities ? 6 : 3) * eps + rounding.factors);
      }
      const Real size = std::fabs(u) * (std::fabs(k.a) + std::fabs(k.b) + h_size + std::fabs(s) * weight_size);
      Real bound =
          std::fabs(u) * error * std::min(Real(1), slope[c] + 16 * eps) + underflow(u, k, s, size, weight_size);
      if (u != 0) {
        bound += static_cast<Real>(0x1p-1074) * size / std::fabs(u);
      }
      if (capped()) {  // 1 - tanh^2 has an absolute error, and tanh as little
        bound += std::fabs(u * g) * eps * (8 + 4 * rounding.tanh);
      }
      bound += eps * std::fabs(expected) * 2;
      // A coefficient that overflows makes inf * 0 of a p of 0.
      const Real grown = std::max(Real(1), std::fabs(u)) * (k.growth + k.size + std::fabs(k.a) + std::fabs(k.b) +
                                                            h_size + std::fabs(s) * (1 + weight_size)) +
                         1000 * std::max(Real(1), std::fabs(u)) * std::fabs(k.h);  // log p is no less than -1000 there
      if (!(grown < largest) && std::isfinite(k.a)) {
        ++state.unbounded;
        continue;
      }
      expect("grad", n, c, value, std::isfinite(k.a) ? expected : nan_value, bound, /*wild=*/true);
    }
  }
};

}  // namespace fuzz
