// The device kernels on cann_sim, against double: row_stats, row_grad, row_stats_grad, reduce_rows and scale for a
// small shape of each row mode, by the launches that an operation is made of. Every launch is also checked by cann_sim.
#include <aclrtlaunch_npu_xent_reduce_rows.h>
#include <aclrtlaunch_npu_xent_row_grad.h>
#include <aclrtlaunch_npu_xent_row_stats.h>
#include <aclrtlaunch_npu_xent_row_stats_grad.h>
#include <aclrtlaunch_npu_xent_scale.h>

#include <cann_sim/launch.h>

#include <algorithm>

#include "check.h"
#include "reference.h"
#include "tiling/row_args.h"
#include "tiling/row_plan.h"

namespace {

using namespace test;
using npu_xent::div_up;
using npu_xent::LogitsType;
using npu_xent::RowMode;
using npu_xent::Stage;

// Global memory: elements that a launch may touch, and none beside them. Those of an output count as unwritten.
template <typename T>
class Gm {
 public:
  explicit Gm(const std::vector<T>& values) : values_(values), id_(add(1)) {}
  explicit Gm(int64_t n) : values_(n), id_(add(0)) {}
  Gm(const Gm&) = delete;
  Gm& operator=(const Gm&) = delete;
  ~Gm() {
    if (id_ != 0) {
      cann_sim_unregister(id_);
    }
  }
  // Null without elements: a tensor that a launch does not have.
  void* address() { return values_.empty() ? nullptr : values_.data(); }
  const std::vector<T>& values() const { return values_; }

 private:
  uint64_t add(int written) {
    return values_.empty() ? 0 : cann_sim_register(values_.data(), values_.size() * sizeof(T), written);
  }

  std::vector<T> values_;
  uint64_t id_;
};

using Floats = Gm<float>;

void launched(const char* kernel, uint32_t code) {
  check(code == 0, "%s: %s", kernel, cann_sim_last_error());
}

template <typename T>
constexpr LogitsType logits_type() {
  return std::is_same_v<T, float> ? LogitsType::fp32 : std::is_same_v<T, f16> ? LogitsType::fp16 : LogitsType::bf16;
}

// The statistics of rows or of their parts.
struct StatsGm {
  Floats lse, lse_low, picked, wsum, weight;  // weight: of parts
  Floats entropy, top1;
  StatsGm(int64_t n, bool need_wsum, bool by_row, bool parts = false)
      : lse(n),
        lse_low(n),
        picked(n),
        wsum(need_wsum ? n : 0),
        weight(need_wsum && parts ? n : 0),
        entropy(by_row ? n : 0),
        top1(by_row ? n : 0) {}
};

template <typename T>
class Operation {
 public:
  Operation(const Problem& p, const XentPlan& plan, int64_t cores)
      : p_(p),
        plan_(plan),
        cores_(cores),
        need_wsum_(p.options.label_smoothing != 0),
        logits_(stored<T>(p.logits)),
        target_(p.target),
        weight_(stored<float>(p.weight)),
        row_scale_(scales(p)),
        grad_entropy_(stored<float>(p.grad_entropy)) {
    const RowOptions& o = p.options;
    args_.dtype = static_cast<int64_t>(logits_type<T>());
    args_.rows = p.rows;
    args_.cols = args_.logits_stride = args_.output_stride = args_.num_classes = p.cols;
    args_.ignore_index = kIgnore;
    args_.reduction = static_cast<int64_t>(o.reduction);
    args_.read_ignored = p.read_ignored;
    args_.logit_scale = static_cast<float>(p.options.logit_scale);
    args_.softcap = static_cast<float>(p.options.softcap);
    args_.grad_scale = static_cast<float>(p.options.grad_scale);
    args_.target_share = static_cast<float>(1 - o.label_smoothing);
    args_.class_share = static_cast<float>(o.label_smoothing / static_cast<double>(p.cols));
    args_.lse_square_scale = static_cast<float>(o.lse_square_scale);
    args_.row_scaled = args_.by_row = p.by_row();
  }

  void check_all() {
    const Truth t = truth_of(p_);
    Floats totals(3);
    sum_totals(totals);
    for (int64_t i = 0; i < 3; ++i) {
      check_near<float, float>("totals", i, totals.values()[i], t.totals[i], t.totals[i]);
    }

    StatsGm stats(p_.rows, need_wsum_, p_.by_row());
    Gm<T> log_prob(p_.rows * p_.cols);
    const bool apart = plan_.mode == static_cast<int64_t>(RowMode::split) || p_.by_row();
    row_stats(stats, apart ? nullptr : log_prob.address());
    if (apart) {
      XentArgs args = of_stage(Stage::log_prob_only);
      launched("row_stats", aclrtlaunch_npu_xent_row_stats(
                                cores(chunk_items()), nullptr, logits_.address(), target_.address(), weight_.address(),
                                row_scale_.address(), stats.lse.address(), stats.lse_low.address(), nullptr, nullptr,
                                nullptr, nullptr, nullptr, log_prob.address(), &plan_, &args));
    }
    check_stats(t, stats);

    const bool none = p_.options.reduction == Reduction::none;
    Floats loss(none ? p_.rows : 1), z_loss(p_.options.lse_square_scale == 0 ? 0 : none ? p_.rows : 1);
    sum_losses(stats, totals, loss, z_loss);
    for (size_t i = 0; i < loss.values().size(); ++i) {
      check_near<float, float>("loss", i, loss.values()[i], t.loss[i], 2 * t.loss_terms[i], 2);
    }
    for (size_t i = 0; i < z_loss.values().size(); ++i) {
      check_near<float, float>("z_loss", i, z_loss.values()[i], t.z_loss[i], 2 * t.z_loss[i], 2);
    }

    Floats from_loss(stored<float>(p_.grad_loss)), from_z(stored<float>(p_.grad_z_loss));
    Gm<T> grad(p_.rows * p_.cols), swept(p_.rows * p_.cols);
    row_grad(stats, totals, &from_loss, &from_z, grad);
    const bool sweeps = !p_.by_row();  // row_stats_grad has no numbers by row
    if (sweeps) {
      StatsGm again(p_.rows, need_wsum_, false);
      row_stats_grad(again, totals, swept);
      check_stats(t, again);
    }
    Problem unit = p_;  // what row_stats_grad computes
    unit.grad_loss = {1};
    unit.grad_z_loss = {0};
    const Truth of_unit = truth_of(unit);
    for (int64_t i = 0; i < p_.rows * p_.cols; ++i) {
      const double size = std::fabs(mapped(p_, i / p_.cols, p_.logits[i])) + std::fabs(t.lse[i / p_.cols]) + 1;
      if (p_.target[i / p_.cols] != kIgnore || p_.read_ignored) {
        check_near<T, float>("log_prob", i, log_prob.values()[i], t.log_prob[i], 2 * size, 2);
      }
      check_near<T, float>("grad", i, grad.values()[i], t.grad[i], 2 * t.grad_terms[i], 2);
      if (sweeps && p_.options.reduction != Reduction::none) {
        check_near<T, float>("grad of row_stats_grad", i, swept.values()[i], of_unit.grad[i], 2 * of_unit.grad_terms[i],
                             2);
      }
    }
  }

  // Logits so far from 0 that lse_low holds the whole logarithm of the sum: the gradient must not lose digits.
  void check_far_from_0() {
    const Truth t = truth_of(p_);
    Floats totals(3), ones(std::vector<float>{1});
    sum_totals(totals);
    StatsGm stats(p_.rows, need_wsum_, false), again(p_.rows, need_wsum_, false);
    row_stats(stats, nullptr);
    Gm<T> grad(p_.rows * p_.cols), swept(p_.rows * p_.cols);
    row_grad(stats, totals, &ones, nullptr, grad);
    row_stats_grad(again, totals, swept);
    for (int64_t i = 0; i < p_.rows * p_.cols; ++i) {
      const bool at_target = i % p_.cols == p_.target[i / p_.cols];
      const double size = std::fabs(t.grad[i]) + (at_target ? 1.0 / static_cast<double>(p_.rows) : 0);
      check_near<T, float>("grad", i, grad.values()[i], t.grad[i], size, 1, 64);
      check_near<T, float>("grad of row_stats_grad", i, swept.values()[i], t.grad[i], size, 1, 64);
    }
  }
  // A gradient of the z-loss alone: it is defined for rows without weight too.
  void check_z_loss_alone() {
    const Truth t = truth_of(p_);
    Floats totals(3), from_z(stored<float>(p_.grad_z_loss));
    sum_totals(totals);
    StatsGm stats(p_.rows, need_wsum_, false);
    row_stats(stats, nullptr);
    Gm<T> grad(p_.rows * p_.cols);
    row_grad(stats, totals, nullptr, &from_z, grad);
    const bool mean = p_.options.reduction == Reduction::mean;
    for (int64_t i = 0; i < p_.rows * p_.cols; ++i) {
      const int64_t n = i / p_.cols;
      const double z = mean ? p_.grad_z_loss[0] / static_cast<double>(p_.rows) : p_.grad_z_loss[n];
      const double factor = z * 2 * p_.options.lse_square_scale * t.lse[n], expected = factor * std::exp(t.log_prob[i]);
      const bool at_target = i % p_.cols == p_.target[n];  // a (p - 1) + a
      check_near<T, float>("grad", i, grad.values()[i], expected, std::fabs(at_target ? factor : expected), 1, 64);
    }
  }

 private:
  static std::vector<float> scales(const Problem& p) {
    std::vector<float> result;
    for (const double temperature : p.temperature) {
      result.push_back(static_cast<float>(1 / temperature));
    }
    return result;
  }
  uint32_t cores(int64_t tasks) const { return static_cast<uint32_t>(std::max<int64_t>(1, std::min(cores_, tasks))); }
  int64_t work_items() const { return npu_xent::work_items(plan_, p_.rows); }
  int64_t chunk_items() const { return npu_xent::chunk_items(plan_, p_.rows); }
  XentArgs of_stage(Stage stage) const {
    XentArgs args = args_;
    args.stage = static_cast<int64_t>(stage);
    return args;
  }

  void row_stats(StatsGm& out, void* log_prob) {
    if (plan_.mode == static_cast<int64_t>(RowMode::split)) {
      split_stats(out);
      return;
    }
    XentArgs args = args_;
    launched("row_stats",
             aclrtlaunch_npu_xent_row_stats(cores(work_items()), nullptr, logits_.address(), target_.address(),
                                            weight_.address(), row_scale_.address(), out.lse.address(),
                                            out.lse_low.address(), out.picked.address(), out.wsum.address(), nullptr,
                                            out.entropy.address(), out.top1.address(), log_prob, &plan_, &args));
  }

  void split_stats(StatsGm& out) {
    StatsGm parts(p_.rows * plan_.parts, need_wsum_, p_.by_row(), true);
    XentArgs args = of_stage(Stage::partial_stats);
    launched("row_stats", aclrtlaunch_npu_xent_row_stats(
                              cores(work_items()), nullptr, logits_.address(), target_.address(), weight_.address(),
                              row_scale_.address(), parts.lse.address(), parts.lse_low.address(),
                              parts.picked.address(), parts.wsum.address(), parts.weight.address(),
                              parts.entropy.address(), parts.top1.address(), nullptr, &plan_, &args));
    args = of_stage(Stage::join_parts);
    launched("reduce_rows", aclrtlaunch_npu_xent_reduce_rows(
                                cores(p_.rows), nullptr, target_.address(), weight_.address(), out.lse.address(),
                                out.lse_low.address(), out.picked.address(), out.wsum.address(), parts.lse.address(),
                                parts.lse_low.address(), parts.picked.address(), parts.wsum.address(),
                                parts.weight.address(), nullptr, nullptr, nullptr, nullptr, out.entropy.address(),
                                out.top1.address(), parts.entropy.address(), parts.top1.address(), &plan_, &args));
  }

  // Without upstream gradients: that of the loss is 1.
  void row_grad(StatsGm& stats, Floats& totals, Floats* from_loss, Floats* from_z, Gm<T>& grad) {
    XentArgs args = args_;
    args.unit_upstream = from_loss == nullptr && from_z == nullptr;
    launched("row_grad",
             aclrtlaunch_npu_xent_row_grad(cores(chunk_items()), nullptr, logits_.address(), target_.address(),
                                           weight_.address(), row_scale_.address(), stats.lse.address(),
                                           stats.lse_low.address(), stats.entropy.address(), totals.address(),
                                           from_loss == nullptr ? nullptr : from_loss->address(),
                                           from_z == nullptr ? nullptr : from_z->address(), grad_entropy_.address(),
                                           grad.address(), &plan_, &args));
  }

  void row_stats_grad(StatsGm& out, Floats& totals, Gm<T>& grad) {
    if (plan_.mode == static_cast<int64_t>(RowMode::split)) {
      split_stats(out);
      if (p_.options.reduction != Reduction::none) {
        row_grad(out, totals, nullptr, nullptr, grad);
      }
      return;
    }
    XentArgs args = args_;
    args.unit_upstream = 1;
    launched("row_stats_grad", aclrtlaunch_npu_xent_row_stats_grad(
                                   cores(work_items()), nullptr, logits_.address(), target_.address(),
                                   weight_.address(), totals.address(), out.lse.address(), out.lse_low.address(),
                                   out.picked.address(), out.wsum.address(), grad.address(), &plan_, &args));
  }

  void reduce(Stage stage, int64_t tasks, StatsGm* stats, Floats* totals, Floats* loss, Floats* z_loss, Floats* sums) {
    const auto of = [](Floats* x) { return x == nullptr ? nullptr : x->address(); };
    XentPlan plan{};
    XentArgs args = of_stage(stage);
    launched("reduce_rows",
             aclrtlaunch_npu_xent_reduce_rows(cores(tasks), nullptr, target_.address(), weight_.address(),
                                              of(stats ? &stats->lse : nullptr), of(stats ? &stats->lse_low : nullptr),
                                              of(stats ? &stats->picked : nullptr), of(stats ? &stats->wsum : nullptr),
                                              nullptr, nullptr, nullptr, nullptr, nullptr, of(totals), of(loss),
                                              of(z_loss), of(sums), nullptr, nullptr, nullptr, nullptr, &plan, &args));
  }

  void sum_totals(Floats& totals) {
    const int64_t weights = p_.weight.empty() ? 0 : div_up(p_.cols, npu_xent::kReduceWeights);
    const int64_t tasks = div_up(p_.rows, npu_xent::kReduceRows) + weights;
    Floats sums(8 * tasks);
    reduce(Stage::block_totals, tasks, nullptr, nullptr, nullptr, nullptr, &sums);
    reduce(Stage::join_totals, 1, nullptr, &totals, nullptr, nullptr, &sums);
  }

  void sum_losses(StatsGm& stats, Floats& totals, Floats& loss, Floats& z_loss) {
    const int64_t blocks = div_up(p_.rows, npu_xent::kReduceRows);
    if (p_.options.reduction == Reduction::none) {
      reduce(Stage::block_loss, blocks, &stats, &totals, &loss, &z_loss, nullptr);
      return;
    }
    Floats sums(8 * blocks);
    reduce(Stage::block_loss, blocks, &stats, &totals, nullptr, nullptr, &sums);
    reduce(Stage::join_loss, 1, nullptr, &totals, &loss, &z_loss, &sums);
  }

  void check_stats(const Truth& t, const StatsGm& stats) {
    for (int64_t n = 0; n < p_.rows; ++n) {
      const bool unread = p_.target[n] == kIgnore && !p_.read_ignored;
      const double lse = unread ? 0 : t.lse[n];
      const float high = stats.lse.values()[n];
      check_near<float, float>("lse", n, high, lse, 2 * std::fabs(lse) + 2);
      check_near<double, float>("lse + lse_low", n, double{high} + double{stats.lse_low.values()[n]}, lse, 1, 1, 32);
      check_near<float, float>("picked", n, stats.picked.values()[n], t.picked[n],
                               p_.options.softcap == 0 && !p_.by_row() ? 0 : std::fabs(t.picked[n]));
      if (p_.by_row()) {
        check_near<float, float>("entropy", n, stats.entropy.values()[n], unread ? 0 : t.entropy[n],
                                 unread ? 0 : t.entropy_terms[n]);
        check(stats.top1.values()[n] == (t.top1[n] ? 1 : 0), "top1[%lld] is %g", static_cast<long long>(n),
              stats.top1.values()[n]);
      }
      if (need_wsum_) {
        check_near<float, float>("wsum", n, stats.wsum.values()[n], unread ? 0 : t.wsum[n], 2 * t.wsum_terms[n]);
      }
    }
  }

  const Problem& p_;
  XentPlan plan_;
  int64_t cores_;
  bool need_wsum_;
  Gm<T> logits_;
  Gm<int64_t> target_;
  Floats weight_, row_scale_, grad_entropy_;
  XentArgs args_{};
};

struct Shape {
  const char* name;
  int64_t rows, cols;
  RowMode mode;
};
// The planner would have the streaming rows split or resident: so short a row of that mode is made by hand.
constexpr Shape kShapes[] = {{"short", 50, 97, RowMode::short_rows},
                             {"resident", 26, 1031, RowMode::resident},
                             {"streaming", 3, 5003, RowMode::streaming},
                             {"split", 2, 4501, RowMode::split}};

// Two cases for each mode, from number `turn` on.
template <typename T>
void test_modes(int64_t cores, size_t turn) {
  for (const Shape& shape : kShapes) {
    for (int i = 0; i < 2; ++i) {
      const Case& c = kCases[turn++ % std::size(kCases)];
      XentPlan plan =
          npu_xent::plan_rows(shape.rows, shape.cols, static_cast<int64_t>(logits_type<T>()), c.softcap != 0, c.by_row);
      if (shape.mode == RowMode::streaming) {
        plan.mode = static_cast<int64_t>(RowMode::streaming);
        plan.parts = 1;
        plan.chunks_per_part = plan.chunks;
        plan.slots = npu_xent::kStreamSlots;
      }
      context = std::string(Format<T>::name) + ", " + shape.name + " rows, " + c.name;
      // With numbers by row no row has to stay.
      const RowMode mode = c.by_row && shape.mode == RowMode::resident ? RowMode::streaming : shape.mode;
      check(plan.mode == static_cast<int64_t>(mode), "planned as mode %lld", static_cast<long long>(plan.mode));
      const Problem p = make_problem<T>(shape.rows, shape.cols, c);
      Operation<T>(p, plan, cores).check_all();
    }
  }
}

// Found by the fuzzer.
void test_far_from_0() {
  for (const Shape& shape : kShapes) {
    context = std::string("logits far from 0, ") + shape.name + " rows";
    const Problem p = make_problem<float>(shape.rows, shape.cols, kCases[0], 1e8);
    XentPlan plan = npu_xent::plan_rows(shape.rows, shape.cols, static_cast<int64_t>(LogitsType::fp32));
    plan.mode = static_cast<int64_t>(shape.mode);
    if (shape.mode == RowMode::streaming) {
      plan.parts = 1;
      plan.chunks_per_part = plan.chunks;
      plan.slots = npu_xent::kStreamSlots;
    }
    Operation<float>(p, plan, 20).check_far_from_0();
  }
}
void test_z_loss_alone() {
  for (const Shape& shape : {kShapes[0], kShapes[1]}) {
    const XentPlan plan = npu_xent::plan_rows(shape.rows, shape.cols, static_cast<int64_t>(LogitsType::fp32));
    context = std::string("z-loss of rows without weight, ") + shape.name + " rows";
    Problem p = make_problem<float>(shape.rows, shape.cols, kCases[0]);
    p.options.lse_square_scale = 1e-2;
    p.weight.assign(shape.cols, 0);
    p.grad_loss = {0};
    p.grad_z_loss = {1};
    Operation<float>(p, plan, 20).check_z_loss_alone();

    // Factors of one term whose product overflows where the term does not.
    context = std::string("z-loss of large logits, ") + shape.name + " rows";
    p = make_problem<float>(shape.rows, shape.cols, kCases[0]);
    for (double& x : p.logits) {
      x = static_cast<float>(x * 1e33);
    }
    p.options.reduction = Reduction::none;
    p.options.lse_square_scale = 1e-4;
    p.grad_loss.assign(shape.rows, 0);
    p.grad_z_loss.assign(shape.rows, 1e6);
    Operation<float>(p, plan, 20).check_z_loss_alone();
  }
}

// Chunks, a tail, and a factor that leaves everything as it is.
template <typename T>
void test_scale() {
  context = std::string(Format<T>::name) + ", scale";
  const Problem p = make_problem<T>(1, npu_xent::kScaleChunk + 77, kCases[0]);
  for (const float factor : {-0.3f, 1.0f}) {
    Gm<T> x(stored<T>(p.logits));
    Floats factors(std::vector<float>{factor});
    XentArgs args{};
    args.dtype = static_cast<int64_t>(logits_type<T>());
    args.cols = p.cols;
    args.factor_dtype = static_cast<int64_t>(LogitsType::fp32);
    launched("scale", aclrtlaunch_npu_xent_scale(2, nullptr, x.address(), factors.address(), &args));
    for (int64_t i = 0; i < p.cols; ++i) {
      check_near<T, float>("x", i, x.values()[i], factor * p.logits[i], 0, 2);
    }
  }
}

}  // namespace

int main() {
  test_modes<float>(48, 4);
  test_modes<f16>(20, 0);
  test_modes<bf16>(40, 6);
  test_far_from_0();
  test_z_loss_alone();
  test_scale<float>();
  test_scale<f16>();
  test_scale<bf16>();
  return finish("device_kernels");
}
