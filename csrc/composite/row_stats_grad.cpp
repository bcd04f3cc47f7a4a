// row_stats_grad and row_stats_grad_ out of the other primitives.
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "composite/rows.h"

namespace npu_xent::composite {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_grad_composite(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale, bool read_ignored) {
  check_row_stats_grad(logits, target, weight, totals, parse_reduction(reduction), label_smoothing, lse_square_scale,
                       softcap);
  auto [lse, lse_low, picked, wsum, _] =
      row_stats(logits, target, weight, ignore_index, logit_scale, softcap, 0, std::nullopt,
                /*need_wsum=*/label_smoothing != 0, /*need_log_prob=*/false, read_ignored);
  auto grad =
      row_grad(logits, target, weight, lse, lse_low, totals, at::ones({}, lse.options()), std::nullopt, reduction,
               ignore_index, label_smoothing, lse_square_scale, logit_scale, softcap, grad_scale, 0, std::nullopt);
  return {lse, lse_low, picked, wsum, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_grad_over_logits_composite(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale, bool read_ignored) {
  check_dense(logits);
  auto [lse, lse_low, picked, wsum, grad] =
      row_stats_grad_composite(logits, target, weight, totals, reduction, ignore_index, label_smoothing,
                               lse_square_scale, logit_scale, softcap, grad_scale, read_ignored);
  logits.copy_(grad);
  logits.unsafeGetTensorImpl()->bump_version();  // autograd calls this below the key that would
  return {lse, lse_low, picked, wsum};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("row_stats_grad", row_stats_grad_composite);
  m.impl("row_stats_grad_", row_stats_grad_over_logits_composite);
}

}  // namespace npu_xent::composite
