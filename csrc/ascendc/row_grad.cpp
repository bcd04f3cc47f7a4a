// row_grad: logits and lse -> the gradient of the logits, into fresh memory or over the logits. Reads and writes each
// element once.
#include "kernel_operator.h"

#include "ascendc/run_rows.h"

using namespace npu_xent;

extern "C" __global__ __aicore__ void npu_xent_row_grad(GM_ADDR logits, GM_ADDR target, GM_ADDR weight,
                                                        GM_ADDR row_scale, GM_ADDR lse, GM_ADDR lse_low,
                                                        GM_ADDR entropy, GM_ADDR totals, GM_ADDR grad_loss,
                                                        GM_ADDR grad_z_loss, GM_ADDR grad_entropy, GM_ADDR grad,
                                                        XentPlan plan, XentArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  const RowTensors tensors{logits,  target,    weight,      totals, lse,       lse_low, nullptr,      nullptr,
                           nullptr, grad_loss, grad_z_loss, grad,   row_scale, entropy, grad_entropy, nullptr};
  RunRows<Output::grad, false>(pipe, plan, args, tensors);
}
