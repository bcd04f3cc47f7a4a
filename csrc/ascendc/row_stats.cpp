// row_stats: logits -> lse, lse_low, picked, wsum, entropy, top1, and log_prob on request. Reads each element once, and
// writes it once for log_prob; rows too long for UB, or with a scale by row, are read twice for log_prob. Entropy and
// top1 do not go with log_prob in one launch.
//
// Stages: whole; partial_stats (statistics of parts of rows, [rows, parts] each, and the weights they stand for);
// log_prob_only (from statistics [rows]).
#include "kernel_operator.h"

#include "ascendc/run_rows.h"

using namespace npu_xent;

extern "C" __global__ __aicore__ void npu_xent_row_stats(GM_ADDR logits, GM_ADDR target, GM_ADDR weight,
                                                         GM_ADDR row_scale, GM_ADDR lse, GM_ADDR lse_low,
                                                         GM_ADDR picked, GM_ADDR wsum, GM_ADDR part_weight,
                                                         GM_ADDR entropy, GM_ADDR top1, GM_ADDR log_prob, XentPlan plan,
                                                         XentArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  const RowTensors tensors{logits,      target,  weight,  nullptr,  lse,       lse_low, picked,  wsum,
                           part_weight, nullptr, nullptr, log_prob, row_scale, entropy, nullptr, top1};
  if (args.stage == static_cast<int64_t>(Stage::log_prob_only)) {
    RunRows<Output::log_prob, false>(pipe, plan, args, tensors);
  } else if (log_prob != nullptr) {
    RunRows<Output::log_prob, true>(pipe, plan, args, tensors);
  } else {
    RunRows<Output::none, true>(pipe, plan, args, tensors);
  }
}
