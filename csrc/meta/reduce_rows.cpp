// reduce_rows without values.
#include <torch/library.h>

#include "meta/shapes.h"

namespace npu_xent::meta {
namespace {

std::tuple<Tensor, Tensor, Tensor> reduce_rows_meta(const Tensor& target, const OptionalTensor& weight,
                                                    const OptionalTensor& lse, const OptionalTensor& lse_low,
                                                    const OptionalTensor& picked, const OptionalTensor& wsum,
                                                    const OptionalTensor& totals, std::string_view reduction, int64_t,
                                                    double label_smoothing, double lse_square_scale,
                                                    c10::SymInt num_classes, at::ScalarType loss_dtype) {
  check_loss_dtype(loss_dtype);
  check_reduce_rows(target, weight, lse, lse_low, picked, wsum, totals, label_smoothing, lse_square_scale, num_classes);
  const auto how = parse_reduction(reduction);
  const auto out = target.options().dtype(loss_dtype);
  const auto stats = target.options().dtype(lse ? lse->scalar_type() : stats_dtype(loss_dtype));
  const auto empty_loss = [&](bool wanted) {
    if (!wanted) {
      return at::empty({0}, out);
    }
    return how == Reduction::none ? at::empty_symint({target.sym_size(0)}, out) : at::empty({}, out);
  };
  return {empty_loss(lse.has_value()), empty_loss(lse.has_value() && lse_square_scale != 0),
          at::empty({lse ? int64_t{0} : kTotals}, stats)};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("reduce_rows", reduce_rows_meta);
}

}  // namespace npu_xent::meta
