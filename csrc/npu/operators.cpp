// The primitives on an NPU: from tensors to launches.
#include "npu/operators.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>

#include <cstdlib>
#include <limits>
#include <string_view>

#include "checks.h"
#include "npu/launch.h"
#include "ops.h"

namespace npu_xent::npu {
namespace {

// The dtype has been checked.
LogitsType logits_type(at::ScalarType dtype) {
  return dtype == at::kFloat ? LogitsType::fp32 : dtype == at::kHalf ? LogitsType::fp16 : LogitsType::bf16;
}

// Reading values synchronizes with the device, so targets are checked only on demand.
bool debugging() {
  const char* value = std::getenv("NPU_XENT_DEBUG");
  return value != nullptr && std::string_view(value) != "0" && std::string_view(value) != "";
}

void check_targets_on_demand(const RowOptions& o, const Tensor& target) {
  if (debugging()) {
    check_target_range(o, target.to(at::kCPU));
  }
}

// Contiguous fp32, as kernels expect all tensors except logits and targets.
Tensor as_values(const Tensor& t) {
  return to_plain_format(t).to(at::kFloat).contiguous();
}
Tensor as_values(const OptionalTensor& t) {
  return t ? as_values(*t) : Tensor();
}
Tensor as_targets(const Tensor& target) {
  return to_plain_format(target).contiguous();
}

// An in-place operator must write to the caller's memory, so it cannot convert the format by a copy.
void check_overwritable(const Tensor& x) {
  TORCH_CHECK_VALUE(has_plain_format(x),
                    "npu_xent: a tensor that is overwritten must not be in one of the device's own formats; pass "
                    "torch_npu.npu_format_cast(x, 2).");
}

// Autograd runs these kernels below the key that would bump the version after an in-place write.
void note_written(const Tensor& tensor) {
  tensor.unsafeGetTensorImpl()->bump_version();
}

// The options as kernels take them; only this function fills these members of XentArgs.
XentArgs kernel_args(const RowOptions& o) {
  XentArgs args{};
  args.reduction = static_cast<int64_t>(o.reduction);
  args.ignore_index = o.ignore_index;
  args.class_start = o.class_start;
  args.num_classes = o.num_classes;
  args.target_share = static_cast<float>(1 - o.label_smoothing);
  args.class_share = static_cast<float>(o.label_smoothing / static_cast<double>(o.num_classes));
  args.lse_square_scale = static_cast<float>(o.lse_square_scale);
  args.logit_scale = static_cast<float>(o.logit_scale);
  args.softcap = static_cast<float>(o.softcap);
  args.grad_scale = static_cast<float>(o.grad_scale);
  return args;
}

// What the kernels multiply the logits of each row by; NaN for a temperature that is not positive and finite.
Tensor row_scale_of(const OptionalTensor& row_temperature) {
  if (!row_temperature) {
    return {};
  }
  const auto scale = as_values(*row_temperature).reciprocal();
  const auto is_usable = scale.gt(0).logical_and(scale.lt(std::numeric_limits<double>::infinity()));
  return scale.masked_fill(is_usable.logical_not(), std::numeric_limits<double>::quiet_NaN());
}

// The arguments of a sweep, converted for the kernels, and their plan. `by_row`: the kernel has an entropy or top1.
struct Sweep {
  Tensor logits, target, weight, row_scale;
  XentArgs args{};
  XentPlan plan{};

  Sweep(const Options& o, const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_,
        const OptionalTensor& row_temperature = std::nullopt, bool by_row = false) {
    check_storages({{"logits", logits_}, {"target", target_}, {"weight", weight_}, {"temperature", row_temperature}});
    logits = to_plain_format(logits_);
    target = as_targets(target_);
    weight = as_values(weight_);
    if (logits.size(1) != 1 && logits.stride(1) != 1) {
      logits = logits.contiguous();
    }
    const auto options = row_options(o, logits.size(1));
    args = kernel_args(options);
    args.dtype = static_cast<int64_t>(logits_type(logits.scalar_type()));
    args.rows = logits.size(0);
    args.cols = logits.size(1);
    args.logits_stride = logits.stride(0);
    args.output_stride = args.cols;
    check_targets_on_demand(options, target);
    row_scale = row_scale_of(row_temperature);
    args.row_scaled = row_scale.defined();
    args.by_row = by_row || row_scale.defined();
    if (args.rows != 0) {
      plan = plan_rows(args.rows, args.cols, args.dtype, options.softcap != 0, args.by_row != 0);
    }
  }

  bool split() const { return plan.mode == static_cast<int64_t>(RowMode::split); }
  bool empty() const { return args.rows == 0; }
  int64_t rows_of_work() const { return work_items(plan, args.rows); }
  int64_t chunks_of_work() const { return chunk_items(plan, args.rows); }
  XentArgs at(Stage stage) const {
    XentArgs copy = args;
    copy.stage = static_cast<int64_t>(stage);
    return copy;
  }
  Tensor new_values(at::IntArrayRef shape) const { return at::empty(shape, logits.options().dtype(at::kFloat)); }
  // [N, C] in the logits' dtype.
  Tensor new_output() const { return at::empty({args.rows, args.cols}, logits.options()); }
};

// One value per row.
struct Stats {
  Tensor lse, lse_low, picked, wsum, entropy, top1;  // top1: 1 or 0

  Stats(const Sweep& sweep, const StatsWanted& wanted) {
    const auto values = [&](bool is_wanted) { return sweep.new_values({is_wanted ? sweep.args.rows : 0}); };
    lse = values(true);
    lse_low = values(true);
    picked = values(true);
    wsum = values(wanted.wsum);
    entropy = values(wanted.entropy);
    top1 = values(wanted.top1);
  }
};

// Statistics of rows that are cut into parts: first of the parts, then of the rows.
void launch_split_stats(const Sweep& sweep, const Stats& out) {
  const auto device = sweep.logits.device();
  const int64_t rows = sweep.args.rows, parts = sweep.plan.parts;
  const auto parts_of = [&](const Tensor& all) {
    return all.numel() != 0 ? sweep.new_values({rows, parts}) : Tensor();
  };
  const auto lse = parts_of(out.lse), lse_low = parts_of(out.lse_low), picked = parts_of(out.picked);
  const auto wsum = parts_of(out.wsum), weight = parts_of(out.wsum);
  const auto entropy = parts_of(out.entropy), top1 = parts_of(out.top1);
  launch(RowStatsKernel{.logits = sweep.logits,
                        .target = sweep.target,
                        .weight = sweep.weight,
                        .row_scale = sweep.row_scale,
                        .lse = lse,
                        .lse_low = lse_low,
                        .picked = picked,
                        .wsum = wsum,
                        .part_weight = weight,
                        .entropy = entropy,
                        .top1 = top1,
                        .log_prob = {}},
         device, sweep.rows_of_work(), sweep.plan, sweep.at(Stage::partial_stats));
  ReduceRowsKernel join{};
  join.target = sweep.target;
  join.weight = sweep.weight;
  join.lse = out.lse;
  join.lse_low = out.lse_low;
  join.picked = out.picked;
  join.wsum = out.wsum;
  join.part_lse = lse;
  join.part_lse_low = lse_low;
  join.part_picked = picked;
  join.part_wsum = wsum;
  join.part_weight = weight;
  join.entropy = out.entropy;
  join.top1 = out.top1;
  join.part_entropy = entropy;
  join.part_top1 = top1;
  launch(join, device, rows, sweep.plan, sweep.at(Stage::join_parts));
}

// The gradient from statistics and upstream gradients; `grad` may be the logits.
void launch_row_grad(const Sweep& sweep, RowGradKernel kernel, const Tensor& grad) {
  kernel.logits = sweep.logits;
  kernel.target = sweep.target;
  kernel.weight = sweep.weight;
  kernel.row_scale = sweep.row_scale;
  kernel.grad = grad;
  launch(kernel, sweep.logits.device(), sweep.chunks_of_work(), sweep.plan, sweep.args);
}

// Prepares a sweep for a gradient of lse: grad_loss becomes G of each row, 0 for ignored rows, and grad_z_loss what is
// added to a (row_math.h). Ignored rows whose lse has a gradient become rows without a target.
void use_coefficients_by_row(Sweep& sweep, RowGradKernel& kernel, const Tensor& from_lse) {
  const auto &lse = kernel.lse, &totals = kernel.totals;
  auto &from_loss = kernel.grad_loss, &from_z = kernel.grad_z_loss;
  constexpr int64_t kIgnored = -1, kBad = -2;
  auto& args = sweep.args;
  const bool mean = args.reduction == static_cast<int64_t>(Reduction::mean);
  const auto ignored = sweep.target.eq(args.ignore_index);
  const auto bad = sweep.target.lt(0).logical_or(sweep.target.ge(args.num_classes)).logical_and(ignored.logical_not());
  auto added = from_lse.reshape(-1);
  if (args.lse_square_scale != 0 && (from_loss.defined() || from_z.defined())) {
    auto z = !from_z.defined() ? from_loss : !from_loss.defined() ? from_z : from_loss + from_z;
    z = (mean ? z / totals.select(0, kKeptRows) : z).reshape(-1);
    added = added + (z * (2 * args.lse_square_scale) * lse).masked_fill(ignored, 0);
  }
  from_z = added;
  if (from_loss.defined()) {
    from_loss = mean ? from_loss / totals.select(0, kKeptWeight) : from_loss;
    from_loss = from_loss.reshape(-1).masked_fill(ignored, 0);
  }
  if (kernel.grad_entropy.defined()) {
    kernel.grad_entropy = kernel.grad_entropy.reshape(-1).masked_fill(ignored, 0);
  }
  sweep.target = sweep.target.masked_fill(bad, kBad)
                     .masked_fill(ignored, kNoTarget)
                     .masked_fill(ignored.logical_and(from_lse.reshape(-1).eq(0)), kIgnored);
  args.ignore_index = kIgnored;
  args.reduction = static_cast<int64_t>(Reduction::none);
  args.adds_to_a = 1;
}

void launch_row_stats(const Sweep& sweep, const Stats& stats, const Tensor& log_prob) {
  RowStatsKernel kernel{.logits = sweep.logits,
                        .target = sweep.target,
                        .weight = sweep.weight,
                        .row_scale = sweep.row_scale,
                        .lse = stats.lse,
                        .lse_low = stats.lse_low,
                        .picked = stats.picked,
                        .wsum = stats.wsum,
                        .part_weight = {},
                        .entropy = stats.entropy,
                        .top1 = stats.top1,
                        .log_prob = log_prob};
  const auto device = sweep.logits.device();
  const bool by_row = stats.entropy.numel() != 0 || stats.top1.numel() != 0;
  const bool at_once = !sweep.split() && !(by_row && log_prob.numel() != 0);
  if (at_once) {
    launch(kernel, device, sweep.rows_of_work(), sweep.plan, sweep.args);
    return;
  }
  if (sweep.split()) {
    launch_split_stats(sweep, stats);
  } else {
    kernel.log_prob = Tensor();
    launch(kernel, device, sweep.rows_of_work(), sweep.plan, sweep.args);
    kernel.log_prob = log_prob;
  }
  if (log_prob.numel() != 0) {
    kernel.picked = kernel.wsum = kernel.entropy = kernel.top1 = Tensor();
    launch(kernel, device, sweep.chunks_of_work(), sweep.plan, sweep.at(Stage::log_prob_only));
  }
}

RowStats row_stats_npu(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                       const OptionalTensor& row_temperature, bool need_log_prob, const StatsWanted& wanted) {
  check_row_stats(o, logits, target, weight, row_temperature);
  const c10::DeviceGuard guard(logits.device());
  Sweep sweep(o, logits, target, weight, row_temperature, wanted.entropy || wanted.top1);
  sweep.args.read_ignored = wanted.read_ignored || need_log_prob;
  const Stats stats(sweep, wanted);
  const auto log_prob = need_log_prob ? sweep.new_output() : not_wanted(logits.options());
  if (!sweep.empty()) {
    launch_row_stats(sweep, stats, log_prob);
  }
  const auto top1 = wanted.top1 ? stats.top1.ne(0) : not_wanted(stats.top1.options().dtype(at::kBool));
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, log_prob, stats.entropy, top1};
}

template <bool over_logits>
GradOf<over_logits> row_grad_npu(const Options& o, const Tensor& logits, const Tensor& target,
                                 const OptionalTensor& weight, const ForGrad& x) {
  check_row_grad(o, logits, target, weight, x);
  if (over_logits) {
    check_dense(logits);
    check_overwritable(logits);
  }
  const c10::DeviceGuard guard(logits.device());
  Sweep sweep(o, logits, target, weight, x.row_temperature, x.grad_entropy.has_value());
  const auto grad = over_logits ? logits : sweep.new_output();
  check_storages({{"lse", x.lse},
                  {"lse_low", x.lse_low},
                  {"totals", x.totals},
                  {"grad_loss", x.grad_loss},
                  {"grad_z_loss", x.grad_z_loss},
                  {"grad_lse", x.grad_lse},
                  {"entropy", x.entropy},
                  {"grad_entropy", x.grad_entropy}});
  if (!sweep.empty()) {
    RowGradKernel kernel{};
    kernel.lse = as_values(x.lse);
    kernel.lse_low = as_values(x.lse_low);
    kernel.totals = as_values(x.totals);
    kernel.grad_loss = as_values(x.grad_loss);
    kernel.grad_z_loss = as_values(x.grad_z_loss);
    if (x.grad_entropy) {
      kernel.entropy = as_values(x.entropy);
      kernel.grad_entropy = as_values(x.grad_entropy);
    }
    if (x.grad_lse) {
      use_coefficients_by_row(sweep, kernel, as_values(x.grad_lse));
    }
    launch_row_grad(sweep, kernel, grad);
  }
  if constexpr (over_logits) {
    note_written(logits);
  } else {
    return grad;
  }
}

template <bool over_logits>
StatsGradOf<over_logits> row_stats_grad_npu(const Options& o, const Tensor& logits, const Tensor& target,
                                            const OptionalTensor& weight, const Tensor& totals, bool read_ignored) {
  check_row_stats_grad(o, logits, target, weight, totals);
  if (over_logits) {
    check_dense(logits);
    check_overwritable(logits);
  }
  const c10::DeviceGuard guard(logits.device());
  Sweep sweep(o, logits, target, weight);
  sweep.args.read_ignored = read_ignored;
  sweep.args.unit_upstream = 1;
  StatsWanted wanted;
  wanted.wsum = o.need_wsum();
  const Stats stats(sweep, wanted);
  const auto grad = over_logits ? logits : sweep.new_output();
  check_storages({{"totals", totals}});
  const auto denominators = as_values(totals);
  if (sweep.split()) {
    launch_split_stats(sweep, stats);
    RowGradKernel kernel{};
    kernel.lse = stats.lse;
    kernel.lse_low = stats.lse_low;
    kernel.totals = denominators;
    launch_row_grad(sweep, kernel, grad);
  } else if (!sweep.empty()) {
    launch(RowStatsGradKernel{.logits = sweep.logits,
                              .target = sweep.target,
                              .weight = sweep.weight,
                              .totals = denominators,
                              .lse = stats.lse,
                              .lse_low = stats.lse_low,
                              .picked = stats.picked,
                              .wsum = stats.wsum,
                              .grad = grad},
           sweep.logits.device(), sweep.rows_of_work(), sweep.plan, sweep.args);
  }
  if constexpr (over_logits) {
    note_written(logits);
    return {stats.lse, stats.lse_low, stats.picked, stats.wsum};
  } else {
    return {stats.lse, stats.lse_low, stats.picked, stats.wsum, grad};
  }
}

// A reduction in two launches, block sums and then their sum; holds what both launches share.
struct Reduce {
  ReduceRowsKernel kernel{};
  XentArgs args;
  at::TensorOptions values;

  Tensor new_values(at::IntArrayRef shape) const { return at::empty(shape, values); }
  void run(Stage stage, int64_t tasks) {
    args.stage = static_cast<int64_t>(stage);
    if (tasks != 0) {
      launch(kernel, kernel.target.device(), tasks, XentPlan{}, args);
    }
  }
  int64_t row_blocks() const { return div_up(args.rows, kReduceRows); }

  Tensor totals() {
    const int64_t tasks = row_blocks() + (kernel.weight.defined() ? div_up(args.num_classes, kReduceWeights) : 0);
    kernel.sums = new_values({tasks, kBlock});
    run(Stage::block_totals, tasks);
    kernel.totals = new_values({kTotals});
    run(Stage::join_totals, 1);
    return kernel.totals;
  }

  // (loss, z_loss); z_loss is undefined unless it has a scale.
  std::pair<Tensor, Tensor> loss() {
    const bool none = args.reduction == static_cast<int64_t>(Reduction::none);
    const at::DimVector shape = none ? at::DimVector{args.rows} : at::DimVector{};
    const auto loss = new_values(shape), z_loss = args.lse_square_scale != 0 ? new_values(shape) : Tensor();
    if (none) {
      kernel.loss = loss;
      kernel.z_loss = z_loss;
      run(Stage::block_loss, row_blocks());
    } else {
      kernel.sums = new_values({row_blocks(), kBlock});
      run(Stage::block_loss, row_blocks());
      kernel.loss = loss;
      kernel.z_loss = z_loss;
      run(Stage::join_loss, 1);
    }
    return {loss, z_loss};
  }
};

Reduced reduce_rows_npu(const Options& o, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& lse,
                        const OptionalTensor& lse_low, const OptionalTensor& picked, const OptionalTensor& wsum,
                        const OptionalTensor& totals, at::ScalarType loss_dtype) {
  check_reduce_rows(o, target, weight, lse, lse_low, picked, wsum, totals, loss_dtype);
  check_storages({{"target", target},
                  {"weight", weight},
                  {"lse", lse},
                  {"lse_low", lse_low},
                  {"picked", picked},
                  {"wsum", wsum},
                  {"totals", totals}});
  const c10::DeviceGuard guard(target.device());
  const auto options = row_options(o, 0);
  Reduce reduce{.args = kernel_args(options), .values = target.options().dtype(at::kFloat)};
  reduce.args.rows = target.numel();
  reduce.args.cols = options.num_classes;
  reduce.kernel.target = as_targets(target);
  reduce.kernel.weight = as_values(weight);
  check_targets_on_demand(options, reduce.kernel.target);
  const auto nothing = [&] { return not_wanted(target.options().dtype(loss_dtype)); };
  if (!lse) {
    return {nothing(), nothing(), reduce.totals().to(stats_dtype(loss_dtype))};
  }
  reduce.kernel.lse = as_values(lse);
  reduce.kernel.lse_low = as_values(lse_low);
  reduce.kernel.picked = as_values(picked);
  reduce.kernel.wsum = o.need_wsum() ? as_values(wsum) : Tensor();
  reduce.kernel.totals = as_values(totals);
  const auto [loss, z_loss] = reduce.loss();
  return {loss.to(loss_dtype), z_loss.defined() ? z_loss.to(loss_dtype) : nothing(), reduce.new_values({0})};
}

// The kernel reads the factor, so the host does not synchronize.
void scale_npu(const Tensor& self, const Tensor& factor) {
  check_scale(self, factor);
  check_overwritable(self);
  check_storages({{"the gradient", self}, {"the upstream gradient", factor}});
  TORCH_CHECK_VALUE(factor.device() == self.device(), "npu_xent: factor must be on the device of self, ", self.device(),
                    ", but is on ", factor.device(), ".");
  TORCH_CHECK_TYPE(at::isReducedFloatingType(factor.scalar_type()) || factor.scalar_type() == at::kFloat,
                   "npu_xent: factor must be float32, bfloat16 or float16, but is ", name_of(factor.scalar_type()),
                   "; convert it with factor.float().");
  XentArgs args{};
  args.dtype = static_cast<int64_t>(logits_type(self.scalar_type()));
  args.factor_dtype = static_cast<int64_t>(logits_type(factor.scalar_type()));
  if (self.numel() == 0) {
    return;
  }
  const c10::DeviceGuard guard(self.device());
  args.cols = self.numel();
  launch(ScaleKernel{.x = self, .factor = factor}, self.device(), div_up(args.cols, kScaleChunk), args);
  note_written(self);
}

}  // namespace

void try_a_kernel() {
  const auto values = at::arange(64, at::kFloat);
  const auto x = values.to(c10::Device(at::kPrivateUse1)), factor = at::full({}, 2.0, at::kFloat).to(x.device());
  scale_npu(x, factor);
  TORCH_CHECK(x.to(at::kCPU).equal(values * 2.0),
              "npu_xent: a test launch of a kernel did not run; see the device's log.");
}

void register_operators(torch::Library& m) {
  m.impl("row_stats", flat<row_stats_npu>);
  m.impl("row_grad", flat<row_grad_npu<false>>);
  m.impl("row_grad_", flat<row_grad_npu<true>>);
  m.impl("row_stats_grad", flat<row_stats_grad_npu<false>>);
  m.impl("row_stats_grad_", flat<row_stats_grad_npu<true>>);
  m.impl("reduce_rows", flat<reduce_rows_npu>);
  m.impl("scale_", scale_npu);
}

}  // namespace npu_xent::npu
