// row_stats on the CPU.
#include <torch/library.h>

#include "cpu/common.h"

namespace npu_xent::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_cpu(const Tensor& logits, const Tensor& target,
                                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                                 double logit_scale, std::optional<double> softcap,
                                                                 int64_t class_start,
                                                                 std::optional<int64_t> num_classes, bool need_wsum,
                                                                 bool need_log_prob, bool read_ignored) {
  check_rows(logits, target, weight, softcap, class_start, num_classes);
  const Inputs in(logits, target, weight, ignore_index, logit_scale, softcap, class_start, num_classes);
  const StatsTensors stats(in, need_wsum);
  const auto log_prob = need_log_prob ? empty_like_logits(in) : at::empty({0}, logits.options());
  with_storage_type(logits.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    row_stats(kernels().of<scalar_t>(), in.rows<scalar_t>(), read_ignored || need_log_prob, stats.pointers<scalar_t>(),
              need_log_prob ? data<scalar_t>(log_prob) : nullptr, parallel_for_elements(logits.numel()));
  });
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, log_prob};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CPU, m) {
  m.impl("row_stats", row_stats_cpu);
}

}  // namespace npu_xent::cpu
