// linear_row_stats on every device.
#include <torch/library.h>

#include "composite/linear_rows.h"

namespace npu_xent::composite {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_row_stats_composite(
    const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target,
    const OptionalTensor& weight, int64_t ignore_index, std::optional<double> softcap,
    std::optional<int64_t> chunk_rows, bool need_wsum, bool read_ignored) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, ignore_index, softcap, chunk_rows};
  check_linear_rows(rows);
  const LinearSweep sweep(rows, read_ignored);
  LinearStats stats(sweep, need_wsum);
  sweep.for_each_chunk([&](const Chunk& chunk, const Tensor& logits) {
    const auto [lse, lse_low, picked, wsum, _] =
        row_stats(logits, chunk.target, sweep.rows().weight, ignore_index, 1, softcap, 0, std::nullopt, need_wsum,
                  /*need_log_prob=*/false, read_ignored);
    stats.put(chunk, lse, lse_low, picked, wsum);
  });
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("linear_row_stats", linear_row_stats_composite);
}

}  // namespace npu_xent::composite
