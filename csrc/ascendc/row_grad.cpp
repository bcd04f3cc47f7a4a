// row_grad: logits and lse -> the gradient of the logits, into fresh memory or over the logits. Reads and writes each
// element once.
#include "kernel_operator.h"

#include "ascendc/long_rows.h"
#include "ascendc/short_rows.h"

using namespace npu_xent;

namespace {

template <typename T>
__aicore__ inline void Run(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                           const RowTensors& tensors) {
  if (plan.mode == static_cast<int64_t>(RowMode::short_rows)) {
    ShortRows<T, Output::grad, false>(pipe, plan, args, tensors).Run();
  } else {
    LongRows<T, Output::grad, false>(pipe, plan, args, tensors).Run();
  }
}

}  // namespace

extern "C" __global__ __aicore__ void npu_xent_row_grad(GM_ADDR logits, GM_ADDR target, GM_ADDR weight, GM_ADDR lse,
                                                        GM_ADDR lse_low, GM_ADDR totals, GM_ADDR grad_loss,
                                                        GM_ADDR grad_z_loss, GM_ADDR grad, XentPlan plan,
                                                        XentArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe
      pipe;  // outside of objects: the toolkit keeps its address, which would pin all their members to memory
  const RowTensors tensors{logits,  target,  weight,  totals,    lse,         lse_low,
                           nullptr, nullptr, nullptr, grad_loss, grad_z_loss, grad};
  if (args.dtype == static_cast<int64_t>(LogitsType::fp32)) {
    Run<float>(pipe, plan, args, tensors);
  } else if (args.dtype == static_cast<int64_t>(LogitsType::fp16)) {
    Run<half>(pipe, plan, args, tensors);
  } else {
    Run<bfloat16_t>(pipe, plan, args, tensors);
  }
}
