// row_grad and row_grad_ without values.
#include <torch/library.h>

#include "meta/shapes.h"

namespace npu_xent::meta {
namespace {

Tensor row_grad_meta(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
                     const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
                     const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t, double label_smoothing,
                     double lse_square_scale, double, std::optional<double> softcap, std::optional<double>,
                     c10::SymInt class_start, std::optional<c10::SymInt> num_classes) {
  check_row_grad(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, parse_reduction(reduction),
                 label_smoothing, lse_square_scale, softcap, class_start, num_classes);
  return empty_logits(logits);
}

void row_grad_over_logits_meta(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                               const Tensor& lse, const OptionalTensor& lse_low, const Tensor& totals,
                               const OptionalTensor& grad_loss, const OptionalTensor& grad_z_loss,
                               std::string_view reduction, int64_t, double label_smoothing, double lse_square_scale,
                               double, std::optional<double> softcap, std::optional<double>, c10::SymInt class_start,
                               std::optional<c10::SymInt> num_classes) {
  check_row_grad(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, parse_reduction(reduction),
                 label_smoothing, lse_square_scale, softcap, class_start, num_classes);
  check_dense(logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("row_grad", row_grad_meta);
  m.impl("row_grad_", row_grad_over_logits_meta);
}

}  // namespace npu_xent::meta
