// row_stats_grad and row_stats_grad_ without values.
#include <torch/library.h>

#include "meta/shapes.h"

namespace npu_xent::meta {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_grad_meta(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t, double label_smoothing, double lse_square_scale, double,
    std::optional<double> softcap, std::optional<double>, bool) {
  check_row_stats_grad(logits, target, weight, totals, parse_reduction(reduction), label_smoothing, lse_square_scale,
                       softcap);
  return {empty_rows(logits), empty_rows(logits), empty_rows(logits), empty_rows(logits, label_smoothing != 0),
          empty_logits(logits)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_grad_over_logits_meta(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t, double label_smoothing, double lse_square_scale, double,
    std::optional<double> softcap, std::optional<double>, bool) {
  check_row_stats_grad(logits, target, weight, totals, parse_reduction(reduction), label_smoothing, lse_square_scale,
                       softcap);
  check_dense(logits);
  return {empty_rows(logits), empty_rows(logits), empty_rows(logits), empty_rows(logits, label_smoothing != 0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("row_stats_grad", row_stats_grad_meta);
  m.impl("row_stats_grad_", row_stats_grad_over_logits_meta);
}

}  // namespace npu_xent::meta
