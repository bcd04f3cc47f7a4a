// From a launch to the code that its rows need: by the plan's row mode and the logits' dtype.
#pragma once

#include "ascendc/long_rows.h"
#include "ascendc/short_rows.h"

namespace npu_xent {

template <Output kOutput, bool kStats, typename T>
__aicore__ inline void RunRowsOf(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                                 const RowTensors& tensors) {
  if (plan.mode == static_cast<int64_t>(RowMode::short_rows)) {
    ShortRows<T, kOutput, kStats>(pipe, plan, args, tensors).Run();
  } else {
    LongRows<T, kOutput, kStats>(pipe, plan, args, tensors).Run();
  }
}

// `pipe` is a variable of the kernel's, outside of objects: the toolkit keeps its address, which would pin all the
// members of an object to memory.
template <Output kOutput, bool kStats>
__aicore__ inline void RunRows(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                               const RowTensors& tensors) {
  if (args.dtype == static_cast<int64_t>(LogitsType::fp32)) {
    RunRowsOf<kOutput, kStats, float>(pipe, plan, args, tensors);
  } else if (args.dtype == static_cast<int64_t>(LogitsType::fp16)) {
    RunRowsOf<kOutput, kStats, half>(pipe, plan, args, tensors);
  } else {
    RunRowsOf<kOutput, kStats, bfloat16_t>(pipe, plan, args, tensors);
  }
}

}  // namespace npu_xent
