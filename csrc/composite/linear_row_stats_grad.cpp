// linear_row_stats_grad on every device.
#include <torch/library.h>

#include "composite/linear_rows.h"

namespace npu_xent::composite {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_row_stats_grad_composite(
    const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target,
    const OptionalTensor& weight, const Tensor& totals, std::string_view reduction, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap, std::optional<int64_t> chunk_rows,
    bool read_ignored, std::array<bool, 3> output_mask) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, ignore_index, softcap, chunk_rows};
  check_linear_row_stats_grad(rows, totals, parse_reduction(reduction), label_smoothing, lse_square_scale);
  const LinearSweep sweep(rows, read_ignored);
  LinearStats stats(sweep, /*need_wsum=*/label_smoothing != 0);
  LinearGrads grads(sweep, output_mask);
  sweep.for_each_chunk([&](const Chunk& chunk, const Tensor& logits) {
    const auto [lse, lse_low, picked, wsum] =
        row_stats_grad_(logits, chunk.target, sweep.rows().weight, totals, reduction, ignore_index, label_smoothing,
                        lse_square_scale, 1, softcap, std::nullopt, read_ignored);
    stats.put(chunk, lse, lse_low, picked, wsum);
    grads.add(chunk, logits);
  });
  const auto [grad_input, grad_linear_weight, grad_linear_bias] = grads.results();
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, grad_input, grad_linear_weight, grad_linear_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("linear_row_stats_grad", linear_row_stats_grad_composite);
}

}  // namespace npu_xent::composite
