// From tensors to launches: dtypes, strides, options, and what every operator on an NPU begins with.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdlib>
#include <string_view>

#include "checks.h"
#include "npu/launch.h"
#include "ops.h"

namespace npu_xent::npu {

// The checks have let nothing else through.
inline LogitsType logits_type(at::ScalarType dtype) {
  return dtype == at::kFloat ? LogitsType::fp32 : dtype == at::kHalf ? LogitsType::fp16 : LogitsType::bf16;
}

// Looking at values means waiting for the device, so it is done on demand only.
inline bool debugging() {
  const char* value = std::getenv("NPU_XENT_DEBUG");
  return value != nullptr && std::string_view(value) != "0" && std::string_view(value) != "";
}

inline void check_targets_on_demand(const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  if (debugging()) {
    check_target_range(target.to(at::kCPU), num_classes, ignore_index);
  }
}

// One value after another, in fp32, as kernels take everything but logits and targets.
inline Tensor as_values(const Tensor& t) {
  return to_plain_format(t).to(at::kFloat).contiguous();
}
inline Tensor as_values(const OptionalTensor& t) {
  return t ? as_values(*t) : Tensor();
}
inline Tensor as_targets(const Tensor& target) {
  return to_plain_format(target).contiguous();
}

// The memory that is to be overwritten is the caller's: a copy in another format would not do.
inline void check_overwritable(const Tensor& x) {
  TORCH_CHECK_VALUE(has_plain_format(x),
                    "npu_xent: a tensor that is overwritten must not be in one of the device's own formats; pass "
                    "torch_npu.npu_format_cast(x, 2).");
}

inline XentArgs reduction_args(Reduction reduction, int64_t ignore_index, double label_smoothing,
                               double lse_square_scale, int64_t num_classes) {
  XentArgs args{};
  args.reduction = static_cast<int64_t>(reduction);
  args.ignore_index = ignore_index;
  args.num_classes = num_classes;
  args.target_share = static_cast<float>(1 - label_smoothing);
  args.class_share = static_cast<float>(label_smoothing / static_cast<double>(num_classes));
  args.lse_square_scale = static_cast<float>(lse_square_scale);
  return args;
}

// The arguments of a sweep, in the form that kernels take, and the plan for them.
struct Sweep {
  Tensor logits, target, weight;
  XentArgs args{};
  XentPlan plan{};

  Sweep(const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_, const XentArgs& options,
        double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale, int64_t class_start)
      : logits(to_plain_format(logits_)), target(as_targets(target_)), weight(as_values(weight_)), args(options) {
    if (logits.size(1) != 1 && logits.stride(1) != 1) {
      logits = logits.contiguous();
    }
    args.dtype = static_cast<int64_t>(logits_type(logits.scalar_type()));
    args.rows = logits.size(0);
    args.cols = logits.size(1);
    args.logits_stride = logits.stride(0);
    args.output_stride = args.cols;
    args.class_start = class_start;
    args.logit_scale = static_cast<float>(logit_scale);
    args.softcap = static_cast<float>(softcap.value_or(0));
    args.grad_scale = static_cast<float>(grad_scale.value_or(logit_scale));
    check_targets_on_demand(target, args.num_classes, args.ignore_index);
    if (args.rows != 0) {
      plan = plan_rows(args.rows, args.cols, args.dtype, softcap.has_value());
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

// One value a row.
struct Stats {
  Tensor lse, lse_low, picked, wsum;

  Stats(const Sweep& sweep, bool need_wsum)
      : lse(sweep.new_values({sweep.args.rows})),
        lse_low(sweep.new_values({sweep.args.rows})),
        picked(sweep.new_values({sweep.args.rows})),
        wsum(sweep.new_values({need_wsum ? sweep.args.rows : 0})) {}
};

// Statistics of rows that are cut into parts: of the parts, and then of the rows.
inline void launch_split_stats(const Sweep& sweep, const Stats& out) {
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
inline void launch_row_grad(const Sweep& sweep, const Tensor& lse, const Tensor& lse_low, const Tensor& totals,
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

}  // namespace npu_xent::npu
