// row_stats_grad: logits -> statistics and gradient in one sweep, with an upstream gradient of 1. Reads and writes each
// element once; rows too long for UB are read twice.
#include "kernel_operator.h"

#include "ascendc/run_rows.h"

using namespace npu_xent;

extern "C" __global__ __aicore__ void npu_xent_row_stats_grad(GM_ADDR logits, GM_ADDR target, GM_ADDR weight,
                                                              GM_ADDR totals, GM_ADDR lse, GM_ADDR lse_low,
                                                              GM_ADDR picked, GM_ADDR wsum, GM_ADDR grad, XentPlan plan,
                                                              XentArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  const RowTensors tensors{logits,  target,  weight,  totals, lse,     lse_low, picked,  wsum,
                           nullptr, nullptr, nullptr, grad,   nullptr, nullptr, nullptr, nullptr};
  RunRows<Output::grad, true>(pipe, plan, args, tensors);
}
