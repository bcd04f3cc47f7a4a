// row_stats: logits -> lse, lse_low, picked, wsum, and log_prob on request. Reads each element once, and writes it once
// for log_prob; rows too long for UB are read twice for log_prob.
//
// Stages: whole; partial_stats (statistics of parts of rows, [rows, parts] each, and the weights they stand for);
// log_prob_only (from statistics [rows]).
#include "kernel_operator.h"

#include "ascendc/long_rows.h"
#include "ascendc/short_rows.h"

using namespace npu_xent;

namespace {

template <template <typename, Output, bool> class Rows, typename T>
__aicore__ inline void RunRows(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                               const RowTensors& tensors) {
  if (args.stage == static_cast<int64_t>(Stage::log_prob_only)) {
    Rows<T, Output::log_prob, false>(pipe, plan, args, tensors).Run();
  } else if (tensors.output != nullptr) {
    Rows<T, Output::log_prob, true>(pipe, plan, args, tensors).Run();
  } else {
    Rows<T, Output::none, true>(pipe, plan, args, tensors).Run();
  }
}

template <typename T>
__aicore__ inline void Run(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                           const RowTensors& tensors) {
  if (plan.mode == static_cast<int64_t>(RowMode::short_rows)) {
    RunRows<ShortRows, T>(pipe, plan, args, tensors);
  } else {
    RunRows<LongRows, T>(pipe, plan, args, tensors);
  }
}

}  // namespace

extern "C" __global__ __aicore__ void npu_xent_row_stats(GM_ADDR logits, GM_ADDR target, GM_ADDR weight, GM_ADDR lse,
                                                         GM_ADDR lse_low, GM_ADDR picked, GM_ADDR wsum,
                                                         GM_ADDR part_weight, GM_ADDR log_prob, XentPlan plan,
                                                         XentArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe
      pipe;  // outside of objects: the toolkit keeps its address, which would pin all their members to memory
  const RowTensors tensors{logits, target, weight,      nullptr, lse,     lse_low,
                           picked, wsum,   part_weight, nullptr, nullptr, log_prob};
  if (args.dtype == static_cast<int64_t>(LogitsType::fp32)) {
    Run<float>(pipe, plan, args, tensors);
  } else if (args.dtype == static_cast<int64_t>(LogitsType::fp16)) {
    Run<half>(pipe, plan, args, tensors);
  } else {
    Run<bfloat16_t>(pipe, plan, args, tensors);
  }
}
