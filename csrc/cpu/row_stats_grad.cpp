// row_stats_grad and row_stats_grad_ on the CPU.
#include <torch/library.h>

#include "cpu/common.h"

namespace npu_xent::cpu {
namespace {

StatsTensors run(const Inputs& in, const Tensor& totals, Reduction reduction, double label_smoothing,
                 double lse_square_scale, std::optional<double> grad_scale, bool read_ignored, const Tensor& grad) {
  StatsTensors stats(in, /*need_wsum=*/label_smoothing != 0);
  const auto denominators = read_totals(totals);
  const GradOptions options{{reduction, in.ignore_index, label_smoothing, lse_square_scale, in.num_classes},
                            grad_scale.value_or(in.logit_scale),
                            denominators.data()};
  with_storage_type(grad.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    row_stats_grad(kernels().of<scalar_t>(), in.rows<scalar_t>(), read_ignored, options, stats.pointers<scalar_t>(),
                   data<scalar_t>(grad), grad.stride(0), parallel_for_elements(grad.numel()));
  });
  return stats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_grad_cpu(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale, bool read_ignored) {
  const auto how = parse_reduction(reduction);
  check_row_stats_grad(logits, target, weight, totals, how, label_smoothing, lse_square_scale, softcap);
  const Inputs in(logits, target, weight, ignore_index, logit_scale, softcap, 0, std::nullopt);
  const auto grad = empty_like_logits(in);
  const auto stats = run(in, totals, how, label_smoothing, lse_square_scale, grad_scale, read_ignored, grad);
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_grad_over_logits_cpu(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale, bool read_ignored) {
  const auto how = parse_reduction(reduction);
  check_row_stats_grad(logits, target, weight, totals, how, label_smoothing, lse_square_scale, softcap);
  check_dense(logits);
  const Inputs in(logits, target, weight, ignore_index, logit_scale, softcap, 0, std::nullopt);
  const auto stats = run(in, totals, how, label_smoothing, lse_square_scale, grad_scale, read_ignored, logits);
  logits.unsafeGetTensorImpl()->bump_version();  // nobody else sees writes through a pointer
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CPU, m) {
  m.impl("row_stats_grad", row_stats_grad_cpu);
  m.impl("row_stats_grad_", row_stats_grad_over_logits_cpu);
}

}  // namespace npu_xent::cpu
