// row_stats_grad and row_stats_grad_ on an NPU.
#include <c10/core/DeviceGuard.h>

#include "npu/common.h"
#include "npu/load.h"

namespace npu_xent::npu {
namespace {

// The statistics and the gradient: over the logits, or in fresh memory.
std::pair<Stats, Tensor> run(bool over_logits, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                             const Tensor& totals_, std::string_view reduction, int64_t ignore_index,
                             double label_smoothing, double lse_square_scale, double logit_scale,
                             std::optional<double> softcap, std::optional<double> grad_scale, bool read_ignored) {
  const auto how = parse_reduction(reduction);
  check_row_stats_grad(logits, target, weight, totals_, how, label_smoothing, lse_square_scale, softcap);
  if (over_logits) {
    check_dense(logits);
    check_overwritable(logits);
  }
  const c10::DeviceGuard guard(logits.device());
  auto options = reduction_args(how, ignore_index, label_smoothing, lse_square_scale, logits.size(1));
  options.read_ignored = read_ignored;
  options.unit_upstream = 1;
  const Sweep sweep(logits, target, weight, options, logit_scale, softcap, grad_scale, 0);
  const Stats stats(sweep, label_smoothing != 0);
  const auto grad = over_logits ? logits : sweep.new_output();
  const auto totals = as_values(totals_);
  if (sweep.empty()) {
    return {stats, grad};
  }
  if (sweep.split()) {
    launch_split_stats(sweep, stats);
    launch_row_grad(sweep, stats.lse, stats.lse_low, totals, {}, {}, grad);
  } else {
    launch(RowStatsGradKernel{.logits = sweep.logits,
                              .target = sweep.target,
                              .weight = sweep.weight,
                              .totals = totals,
                              .lse = stats.lse,
                              .lse_low = stats.lse_low,
                              .picked = stats.picked,
                              .wsum = stats.wsum,
                              .grad = grad},
           sweep.logits.device(), sweep.rows_of_work(), sweep.plan, sweep.args);
  }
  return {stats, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_grad_npu(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale, bool read_ignored) {
  const auto [stats, grad] = run(false, logits, target, weight, totals, reduction, ignore_index, label_smoothing,
                                 lse_square_scale, logit_scale, softcap, grad_scale, read_ignored);
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_grad_over_logits_npu(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& totals,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale, bool read_ignored) {
  const auto [stats, grad] = run(true, logits, target, weight, totals, reduction, ignore_index, label_smoothing,
                                 lse_square_scale, logit_scale, softcap, grad_scale, read_ignored);
  logits.unsafeGetTensorImpl()->bump_version();  // nobody else sees writes through a pointer
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum};
}

}  // namespace

void register_row_stats_grad(torch::Library& m) {
  m.impl("row_stats_grad", row_stats_grad_npu);
  m.impl("row_stats_grad_", row_stats_grad_over_logits_npu);
}

}  // namespace npu_xent::npu
