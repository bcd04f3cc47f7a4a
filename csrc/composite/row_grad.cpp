// row_grad and row_grad_ out of aten operations.
#include <torch/library.h>

#include "composite/rows.h"

namespace npu_xent::composite {
namespace {

Tensor row_grad_composite(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
                          const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
                          const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index,
                          double label_smoothing, double lse_square_scale, double logit_scale,
                          std::optional<double> softcap, std::optional<double> grad_scale, int64_t class_start,
                          std::optional<int64_t> num_classes) {
  const auto how = parse_reduction(reduction);
  check_row_grad(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, how, label_smoothing,
                 lse_square_scale, softcap, class_start, num_classes);
  const int64_t n_cols = logits.size(1);
  const int64_t n_classes = class_count(logits, class_start, num_classes);
  const Targets targets(target, ignore_index, class_start, n_cols, n_classes);
  const auto dtype = lse.scalar_type();
  const auto denominators = totals.to(dtype);
  const bool mean = how == Reduction::mean;
  const auto upstream = [&](const OptionalTensor& g) {
    return g ? g->to(dtype).reshape(-1) : at::full({1}, 0.0, lse.options());
  };
  const auto from_loss = upstream(grad_loss);
  const auto g = mean ? from_loss / denominators.select(0, kKeptWeight) : from_loss;

  // a, b and s of row_math.h, [N] or [1].
  const double per_class = label_smoothing / static_cast<double>(n_classes);
  const auto b = g * (1 - label_smoothing) * target_weight(weight, targets, dtype);
  auto a = b;
  if (label_smoothing != 0) {
    a = a + g * per_class * denominators.select(0, kClassWeight);
  }
  if (lse_square_scale != 0) {
    auto z = from_loss + upstream(grad_z_loss);
    z = mean ? z / denominators.select(0, kKeptRows) : z;
    a = a + z * (2 * lse_square_scale) * lse;
  }
  const auto x = mapped(logits, logit_scale, softcap);
  const auto low = lse_low ? *lse_low : at::full({}, 0.0, lse.options());
  auto grad = (x - lse.unsqueeze(1)).exp() * (a * low.neg().exp()).unsqueeze(1);
  const auto s = g * per_class;
  if (label_smoothing != 0) {
    const auto row = s.unsqueeze(1);
    grad = grad - (weight ? row * weight->to(dtype).narrow(0, class_start, n_cols) : row);
  }
  // The target's own column, without the cancellation of a p - b for a confident prediction.
  const auto column = targets.column.unsqueeze(1);
  const auto from_lse = x.gather(1, column).squeeze(1) - lse - low;
  const auto at_target = a * from_lse.expm1() + (a - b) - s * target_weight(weight, targets, dtype);
  grad =
      grad.scatter(1, column, at::where(targets.in_shard, at_target, grad.gather(1, column).squeeze(1)).unsqueeze(1));
  if (softcap) {
    const auto ratio = x / *softcap;
    grad = grad * ((1 - ratio) * (1 + ratio));
  }
  grad = grad * grad_scale.value_or(logit_scale);
  const auto undefined = targets.bad.logical_or(lse.isfinite().logical_not());
  return grad.masked_fill(undefined.unsqueeze(1), kNaN)
      .masked_fill(target.eq(ignore_index).unsqueeze(1), 0)
      .to(logits.scalar_type())
      .contiguous();
}

void row_grad_over_logits_composite(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                    const Tensor& lse, const OptionalTensor& lse_low, const Tensor& totals,
                                    const OptionalTensor& grad_loss, const OptionalTensor& grad_z_loss,
                                    std::string_view reduction, int64_t ignore_index, double label_smoothing,
                                    double lse_square_scale, double logit_scale, std::optional<double> softcap,
                                    std::optional<double> grad_scale, int64_t class_start,
                                    std::optional<int64_t> num_classes) {
  check_dense(logits);
  logits.copy_(row_grad_composite(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, reduction,
                                  ignore_index, label_smoothing, lse_square_scale, logit_scale, softcap, grad_scale,
                                  class_start, num_classes));
  logits.unsafeGetTensorImpl()->bump_version();  // autograd calls this below the key that would
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("row_grad", row_grad_composite);
  m.impl("row_grad_", row_grad_over_logits_composite);
}

}  // namespace npu_xent::composite
