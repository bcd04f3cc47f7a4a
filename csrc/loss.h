// The loss composed of the primitives, without a gradient; used by autograd and inference.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"
#include "ops.h"

namespace npu_xent {

// The requested outputs of a loss.
struct Wanted {
  at::ScalarType loss_dtype;
  bool lse = false, log_prob = false, differentiable_z_loss = false;
};

// The options with num_classes set, which reduce_rows requires.
inline Options of_classes(Options o, c10::SymInt num_classes) {
  o.num_classes = std::move(num_classes);
  return o;
}

inline void check_loss_options(const OptionalTensor& weight, const Wanted& wanted, const Tensor& input) {
  check_loss_dtype(wanted.loss_dtype, input);
  TORCH_CHECK(!(weight && weight->requires_grad() && at::GradMode::is_enabled()),
              "npu_xent: weight requires a gradient, which cross entropy does not compute; pass weight.detach().");
}

// All checks, made before the first sweep.
inline void check_loss(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                       const Wanted& wanted) {
  check_rows(o, logits, target, weight);
  check_whole_rows(o, logits.sym_size(-1), "cross_entropy");
  check_loss_options(weight, wanted, logits);
}
inline void check_loss(const Options& o, const LinearRows& rows, const Wanted& wanted) {
  check_linear_rows(o, rows);
  check_whole_rows(o, rows.linear_weight.sym_size(0), "linear_cross_entropy");
  check_loss_options(rows.weight, wanted, rows.input);
}

// `dtype` is that of the logits.
inline Tensor totals_of(const Options& o, const Tensor& target, const OptionalTensor& weight, at::ScalarType dtype) {
  auto [loss, z_loss, totals] = reduce_rows(o, target, weight, std::nullopt, std::nullopt, std::nullopt, std::nullopt,
                                            std::nullopt, stats_dtype(dtype));
  return totals;
}

// (loss, z_loss) out of statistics.
inline std::pair<Tensor, Tensor> loss_of(const Options& o, const Tensor& target, const OptionalTensor& weight,
                                         const Tensor& lse, const Tensor& lse_low, const Tensor& picked,
                                         const OptionalTensor& wsum, const OptionalTensor& totals,
                                         at::ScalarType loss_dtype) {
  auto [loss, z_loss, _] = reduce_rows(o, target, weight, lse, lse_low, picked, wsum, totals, loss_dtype);
  return {loss, z_loss};
}

struct LossAndStats {
  Tensor loss, z_loss, lse, lse_low, log_prob, totals, grad;
};

// Two launches of size N and one reading sweep.
inline LossAndStats loss_by_reading(const Options& options, const Tensor& logits, const Tensor& target,
                                    const OptionalTensor& weight, const Wanted& wanted) {
  const auto o = of_classes(options, logits.sym_size(-1));
  auto totals = totals_of(o, target, weight, logits.scalar_type());
  StatsWanted stats;
  stats.wsum = o.need_wsum();
  stats.read_ignored = wanted.lse || wanted.log_prob;
  auto [lse, lse_low, picked, wsum, log_prob, entropy, top1] =
      row_stats(o, logits, target, weight, std::nullopt, wanted.log_prob, stats);
  auto [loss, z_loss] = loss_of(o, target, weight, lse, lse_low, picked, wsum, totals, wanted.loss_dtype);
  return {loss, z_loss, lse, lse_low, log_prob, totals, {}};
}

// The same without materializing the logits.
inline LossAndStats loss_by_reading(const Options& options, const LinearRows& rows, const Wanted& wanted) {
  const auto o = of_classes(options, rows.linear_weight.sym_size(0));
  auto totals = totals_of(o, rows.target, rows.weight, rows.input.scalar_type());
  StatsWanted stats;
  stats.wsum = o.need_wsum();
  stats.read_ignored = wanted.lse;
  auto [lse, lse_low, picked, wsum, entropy, top1] =
      linear_row_stats(o, rows.input, rows.linear_weight, rows.linear_bias, rows.target, rows.weight, std::nullopt,
                       rows.chunk_rows, stats);
  auto [loss, z_loss] = loss_of(o, rows.target, rows.weight, lse, lse_low, picked, wsum, totals, wanted.loss_dtype);
  return {loss, z_loss, lse, lse_low, {}, totals, {}};
}

}  // namespace npu_xent
