// reduce_rows: what is of size N, in the stages of row_args.h. See reduce_rows.h.
#include "kernel_operator.h"

#include "ascendc/reduce_rows.h"

using namespace npu_xent;

extern "C" __global__ __aicore__ void npu_xent_reduce_rows(GM_ADDR target, GM_ADDR weight, GM_ADDR lse, GM_ADDR lse_low,
                                                           GM_ADDR picked, GM_ADDR wsum, GM_ADDR part_lse,
                                                           GM_ADDR part_lse_low, GM_ADDR part_picked, GM_ADDR part_wsum,
                                                           GM_ADDR part_weight, GM_ADDR totals, GM_ADDR loss,
                                                           GM_ADDR z_loss, GM_ADDR sums, GM_ADDR entropy, GM_ADDR top1,
                                                           GM_ADDR part_entropy, GM_ADDR part_top1, XentPlan plan,
                                                           XentArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  const ReduceTensors tensors{target,       weight,      lse,       lse_low,      picked,   wsum, part_lse,
                              part_lse_low, part_picked, part_wsum, part_weight,  totals,   loss, z_loss,
                              sums,         entropy,     top1,      part_entropy, part_top1};
  ReduceRows(pipe, plan, args, tensors).Run();
}
