// linear_row_grad on every device.
#include <torch/library.h>

#include "composite/linear_rows.h"

namespace npu_xent::composite {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear_row_grad_composite(
    const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target,
    const OptionalTensor& weight, const Tensor& lse, const OptionalTensor& lse_low, const Tensor& totals,
    const OptionalTensor& grad_loss, const OptionalTensor& grad_z_loss, std::string_view reduction,
    int64_t ignore_index, double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::optional<int64_t> chunk_rows, std::array<bool, 3> output_mask) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, ignore_index, softcap, chunk_rows};
  const auto how = parse_reduction(reduction);
  check_linear_row_grad(rows, lse, lse_low, totals, grad_loss, grad_z_loss, how, label_smoothing, lse_square_scale);
  const LinearSweep sweep(rows, /*read_ignored=*/false);
  LinearGrads grads(sweep, output_mask);
  sweep.for_each_chunk([&](const Chunk& chunk, const Tensor& logits) {
    const auto upstream = [&](const OptionalTensor& grad) {
      return grad && how == Reduction::none ? chunk.of(OptionalTensor(grad->reshape(-1))) : grad;
    };
    row_grad_(logits, chunk.target, sweep.rows().weight, chunk.of(lse), chunk.of(lse_low), totals, upstream(grad_loss),
              upstream(grad_z_loss), reduction, ignore_index, label_smoothing, lse_square_scale, 1, softcap,
              std::nullopt, 0, std::nullopt);
    grads.add(chunk, logits);
  });
  return grads.results();
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("linear_row_grad", linear_row_grad_composite);
}

}  // namespace npu_xent::composite
