// The primitives on an NPU: from tensors to launches.
#include "npu/operators.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>

#include <cstdlib>
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

// The arguments of a sweep, converted for the kernels, and their plan.
struct Sweep {
  Tensor logits, target, weight;
  XentArgs args{};
  XentPlan plan{};

  Sweep(const Options& o, const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_) {
    check_storages({{"logits", logits_}, {"target", target_}, {"weight", weight_}});
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
    if (args.rows != 0) {
      plan = plan_rows(args.rows, args.cols, args.dtype, options.softcap != 0);
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
  Tensor lse, lse_low, picked, wsum;

  Stats(const Sweep& sweep, bool need_wsum)
      : lse(sweep.new_values({sweep.args.rows})),
        lse_low(sweep.new_values({sweep.args.rows})),
        picked(sweep.new_values({sweep.args.rows})),
        wsum(sweep.new_values({need_wsum ? sweep.args.rows : 0})) {}
};

// Statistics of rows that are cut into parts: first of the parts, then of the rows.
void launch_split_stats(const Sweep& sweep, const Stats& out) {
  const auto device = sweep.logits.device();
  const int64_t rows = sweep.args.rows, parts = sweep.plan.parts;
  const bool need_wsum = out.wsum.numel() != 0;
  const auto new_parts = [&] { return sweep.new_values({rows, parts}); };
  const auto lse = new_parts(), lse_low = new_parts(), picked = new_parts();
  const auto wsum = need_wsum ? new_parts() : Tensor(), weight = need_wsum ? new_parts() : Tensor();
  launch(RowStatsKernel{.logits = sweep.logits,
                        .target = sweep.target,
                        .weight = sweep.weight,
                        .lse = lse,
                        .lse_low = lse_low,
                        .picked = picked,
                        .wsum = wsum,
                        .part_weight = weight,
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
  launch(join, device, rows, sweep.plan, sweep.at(Stage::join_parts));
}

// The gradient from statistics; `grad` may be the logits.
void launch_row_grad(const Sweep& sweep, const Tensor& lse, const Tensor& lse_low, const Tensor& totals,
                     const Tensor& grad_loss, const Tensor& grad_z_loss, const Tensor& grad) {
  launch(RowGradKernel{.logits = sweep.logits,
                       .target = sweep.target,
                       .weight = sweep.weight,
                       .lse = lse,
                       .lse_low = lse_low,
                       .totals = totals,
                       .grad_loss = grad_loss,
                       .grad_z_loss = grad_z_loss,
                       .grad = grad},
         sweep.logits.device(), sweep.chunks_of_work(), sweep.plan, sweep.args);
}

// Prepares a sweep for a gradient of lse: `from_loss` becomes G of each row, 0 for ignored rows, and `from_z` what is
// added to a (row_math.h). Ignored rows whose lse has a gradient become rows without a target.
void use_coefficients_by_row(Sweep& sweep, const Tensor& lse, const Tensor& totals, Tensor& from_loss, Tensor& from_z,
                             const Tensor& from_lse) {
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
                        .lse = stats.lse,
                        .lse_low = stats.lse_low,
                        .picked = stats.picked,
                        .wsum = stats.wsum,
                        .part_weight = {},
                        .log_prob = log_prob};
  const auto device = sweep.logits.device();
  if (!sweep.split()) {
    launch(kernel, device, sweep.rows_of_work(), sweep.plan, sweep.args);
    return;
  }
  launch_split_stats(sweep, stats);
  if (log_prob.numel() != 0) {
    kernel.picked = kernel.wsum = Tensor();
    launch(kernel, device, sweep.chunks_of_work(), sweep.plan, sweep.at(Stage::log_prob_only));
  }
}

RowStats row_stats_npu(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                       bool need_wsum, bool need_log_prob, bool read_ignored) {
  check_rows(o, logits, target, weight);
  const c10::DeviceGuard guard(logits.device());
  Sweep sweep(o, logits, target, weight);
  sweep.args.read_ignored = read_ignored || need_log_prob;
  const Stats stats(sweep, need_wsum);
  const auto log_prob = need_log_prob ? sweep.new_output() : not_wanted(logits.options());
  if (!sweep.empty()) {
    launch_row_stats(sweep, stats, log_prob);
  }
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, log_prob};
}

template <bool over_logits>
GradOf<over_logits> row_grad_npu(const Options& o, const Tensor& logits, const Tensor& target,
                                 const OptionalTensor& weight, const Tensor& lse, const OptionalTensor& lse_low,
                                 const Tensor& totals, const OptionalTensor& grad_loss,
                                 const OptionalTensor& grad_z_loss, const OptionalTensor& grad_lse) {
  check_row_grad(o, logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, grad_lse);
  if (over_logits) {
    check_dense(logits);
    check_overwritable(logits);
  }
  const c10::DeviceGuard guard(logits.device());
  Sweep sweep(o, logits, target, weight);
  const auto grad = over_logits ? logits : sweep.new_output();
  check_storages({{"lse", lse},
                  {"lse_low", lse_low},
                  {"totals", totals},
                  {"grad_loss", grad_loss},
                  {"grad_z_loss", grad_z_loss},
                  {"grad_lse", grad_lse}});
  if (!sweep.empty()) {
    const auto high = as_values(lse), sums = as_values(totals);
    auto from_loss = as_values(grad_loss), from_z = as_values(grad_z_loss);
    if (grad_lse) {
      use_coefficients_by_row(sweep, high, sums, from_loss, from_z, as_values(grad_lse));
    }
    launch_row_grad(sweep, high, as_values(lse_low), sums, from_loss, from_z, grad);
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
  const Stats stats(sweep, o.need_wsum());
  const auto grad = over_logits ? logits : sweep.new_output();
  check_storages({{"totals", totals}});
  const auto denominators = as_values(totals);
  if (sweep.split()) {
    launch_split_stats(sweep, stats);
    launch_row_grad(sweep, stats.lse, stats.lse_low, denominators, {}, {}, grad);
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
                   "npu_xent: factor must be float32, bfloat16 or float16, but is ", factor.scalar_type(),
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
