// reduce_rows out of aten operations.
#include <torch/library.h>

#include "composite/rows.h"

namespace npu_xent::composite {
namespace {

std::tuple<Tensor, Tensor, Tensor> reduce_rows_composite(const Tensor& target, const OptionalTensor& weight,
                                                         const OptionalTensor& lse, const OptionalTensor& lse_low,
                                                         const OptionalTensor& picked, const OptionalTensor& wsum,
                                                         const OptionalTensor& totals, std::string_view reduction,
                                                         int64_t ignore_index, double label_smoothing,
                                                         double lse_square_scale, int64_t num_classes,
                                                         at::ScalarType loss_dtype) {
  check_loss_dtype(loss_dtype);
  check_reduce_rows(target, weight, lse, lse_low, picked, wsum, totals, label_smoothing, lse_square_scale, num_classes);
  const auto how = parse_reduction(reduction);
  const auto dtype = lse ? lse->scalar_type() : stats_dtype(loss_dtype);
  const auto out = target.options().dtype(loss_dtype);
  const Targets targets(target, ignore_index, 0, num_classes, num_classes);
  const auto kept_weight = at::where(targets.kept, target_weight(weight, targets, dtype), 0.0);
  if (!lse) {
    const auto class_weight = weight ? weight->to(dtype).sum() : at::full({}, num_classes, kept_weight.options());
    return {at::empty({0}, out), at::empty({0}, out),
            at::stack({kept_weight.sum(), targets.kept.sum().to(dtype), class_weight})};
  }
  const auto denominators = totals->to(dtype);
  const auto nll = lse_low ? *lse - *picked + *lse_low : *lse - *picked;
  auto loss = (1 - label_smoothing) * kept_weight * nll;
  if (label_smoothing != 0) {
    loss = loss - label_smoothing / static_cast<double>(num_classes) * *wsum;
  }
  auto z_loss = lse_square_scale * lse->square();
  const auto finish = [&](const Tensor& row) {
    return row.masked_fill(lse->isfinite().logical_not().logical_or(targets.bad), kNaN)
        .masked_fill(target.eq(ignore_index), 0);
  };
  loss = finish(loss);
  z_loss = finish(z_loss);
  if (how != Reduction::none) {
    loss = loss.sum();
    z_loss = z_loss.sum();
  }
  if (how == Reduction::mean) {
    const auto total = denominators.select(0, kKeptWeight);
    loss = (loss / total).masked_fill(total.eq(0), kNaN);  // with smoothing, the sum need not be 0
    z_loss = z_loss / denominators.select(0, kKeptRows);
  }
  const auto no_totals = at::empty({0}, target.options().dtype(dtype));
  if (lse_square_scale == 0) {
    return {loss.to(loss_dtype), at::empty({0}, out), no_totals};
  }
  return {(loss + z_loss).to(loss_dtype), z_loss.to(loss_dtype), no_totals};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("reduce_rows", reduce_rows_composite);
}

}  // namespace npu_xent::composite
