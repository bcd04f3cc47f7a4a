// The options of cross_entropy, and the loss without a gradient: what autograd and inference share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <string>

#include "checks.h"
#include "ops.h"

namespace npu_xent {

struct LossOptions {
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing, lse_square_scale, logit_scale;
  std::optional<double> softcap, grad_scale;
  at::ScalarType loss_dtype;
  bool need_lse, need_log_prob, differentiable_z_loss;

  bool need_wsum() const { return label_smoothing != 0; }
};

inline void check_loss_options(const OptionalTensor& weight, const LossOptions& o) {
  parse_reduction(o.reduction);
  check_options(o.label_smoothing, o.lse_square_scale);
  check_scales(o.logit_scale, o.grad_scale);
  check_loss_dtype(o.loss_dtype);
  TORCH_CHECK(!(weight && weight->requires_grad() && at::GradMode::is_enabled()),
              "npu_xent: weight requires a gradient, which cross entropy does not compute; pass weight.detach().");
}

// Everything that can be wrong, checked before the first sweep.
inline void check_loss(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const LossOptions& o) {
  check_rows(logits, target, weight, o.softcap, 0, std::nullopt);
  check_loss_options(weight, o);
}

// `dtype` is that of the logits.
inline Tensor totals_of(const Tensor& target, const OptionalTensor& weight, const c10::SymInt& num_classes,
                        at::ScalarType dtype, const LossOptions& o) {
  auto [loss, z_loss, totals] =
      reduce_rows(target, weight, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt, o.reduction,
                  o.ignore_index, o.label_smoothing, o.lse_square_scale, num_classes, stats_dtype(dtype));
  return totals;
}

// (loss, z_loss) out of statistics.
inline std::pair<Tensor, Tensor> loss_of(const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
                                         const Tensor& lse_low, const Tensor& picked, const Tensor& wsum,
                                         const Tensor& totals, const c10::SymInt& num_classes, const LossOptions& o) {
  auto [loss, z_loss, _] = reduce_rows(target, weight, lse, lse_low, picked, wsum, totals, o.reduction, o.ignore_index,
                                       o.label_smoothing, o.lse_square_scale, num_classes, o.loss_dtype);
  return {loss, z_loss};
}

struct LossAndStats {
  Tensor loss, z_loss, lse, lse_low, log_prob, totals;
};

// Two launches of size N around one sweep that reads.
inline LossAndStats loss_by_reading(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                    const LossOptions& o) {
  auto totals = totals_of(target, weight, logits.sym_size(1), logits.scalar_type(), o);
  auto [lse, lse_low, picked, wsum, log_prob] = row_stats(logits, target, weight, o.ignore_index, o.logit_scale,
                                                          o.softcap, 0, std::nullopt, o.need_wsum(), o.need_log_prob,
                                                          /*read_ignored=*/o.need_lse || o.need_log_prob);
  auto [loss, z_loss] = loss_of(target, weight, lse, lse_low, picked, wsum, totals, logits.sym_size(1), o);
  return {loss, z_loss, lse, lse_low, log_prob, totals};
}

// The same for logits that are never all there.
inline LossAndStats loss_by_reading(const LinearRows& rows, const LossOptions& o) {
  const auto num_classes = rows.linear_weight.sym_size(0);
  auto totals = totals_of(rows.target, rows.weight, num_classes, rows.input.scalar_type(), o);
  auto [lse, lse_low, picked, wsum] = linear_row_stats(rows, o.need_wsum(), /*read_ignored=*/o.need_lse);
  auto [loss, z_loss] = loss_of(rows.target, rows.weight, lse, lse_low, picked, wsum, totals, num_classes, o);
  return {loss, z_loss, lse, lse_low, {}, totals};
}

// An output that was not asked for.
inline Tensor not_wanted(const Tensor& like) {
  return at::empty({0}, like.options());
}

}  // namespace npu_xent
