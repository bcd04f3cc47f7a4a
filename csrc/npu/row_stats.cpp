// row_stats on an NPU.
#include <c10/core/DeviceGuard.h>

#include "npu/common.h"
#include "npu/load.h"

namespace npu_xent::npu {
namespace {

void run(const Sweep& sweep, const Stats& stats, const Tensor& log_prob) {
  RowStatsKernel kernel{.logits = sweep.logits,
                        .target = sweep.target,
                        .weight = sweep.weight,
                        .lse = stats.lse,
                        .lse_low = stats.lse_low,
                        .picked = stats.picked,
                        .wsum = stats.wsum,
                        .part_weight = {},
                        .log_prob = log_prob};
  const auto device = sweep.logits.device();
  if (!sweep.split()) {
    launch(kernel, device, sweep.rows_of_work(), sweep.plan, sweep.args);
    return;
  }
  launch_split_stats(sweep, stats);
  if (log_prob.numel() != 0) {
    kernel.picked = kernel.wsum = Tensor();
    launch(kernel, device, sweep.chunks_of_work(), sweep.plan, sweep.at(Stage::log_prob_only));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_npu(const Tensor& logits, const Tensor& target,
                                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                                 double logit_scale, std::optional<double> softcap,
                                                                 int64_t class_start,
                                                                 std::optional<int64_t> num_classes, bool need_wsum,
                                                                 bool need_log_prob, bool read_ignored) {
  check_rows(logits, target, weight, softcap, class_start, num_classes);
  const c10::DeviceGuard guard(logits.device());
  XentArgs options{};
  options.ignore_index = ignore_index;
  options.num_classes = class_count(logits, class_start, num_classes);
  options.read_ignored = read_ignored || need_log_prob;
  const Sweep sweep(logits, target, weight, options, logit_scale, softcap, std::nullopt, class_start);
  const Stats stats(sweep, need_wsum);
  const auto log_prob = need_log_prob ? sweep.new_output() : at::empty({0}, logits.options());
  if (!sweep.empty()) {
    run(sweep, stats, log_prob);
  }
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, log_prob};
}

}  // namespace

void register_row_stats(torch::Library& m) {
  m.impl("row_stats", row_stats_npu);
}

}  // namespace npu_xent::npu
