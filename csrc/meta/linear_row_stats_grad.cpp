// linear_row_stats_grad without values.
#include <torch/library.h>

#include "meta/shapes.h"

namespace npu_xent::meta {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_row_stats_grad_meta(
    const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target,
    const OptionalTensor& weight, const Tensor& totals, std::string_view reduction, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap, std::optional<int64_t> chunk_rows,
    bool, std::array<bool, 3> output_mask) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, ignore_index, softcap, chunk_rows};
  check_linear_row_stats_grad(rows, totals, parse_reduction(reduction), label_smoothing, lse_square_scale);
  const auto [grad_input, grad_linear_weight, grad_linear_bias] = empty_linear_grads(rows, output_mask);
  return {empty_rows(input), empty_rows(input),  empty_rows(input), empty_rows(input, label_smoothing != 0),
          grad_input,        grad_linear_weight, grad_linear_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("linear_row_stats_grad", linear_row_stats_grad_meta);
}

}  // namespace npu_xent::meta
