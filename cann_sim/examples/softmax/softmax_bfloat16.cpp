// The kernel for bfloat16_t; a file for each type because a kernel is a function without template parameters.
#include "softmax.h"

extern "C" __global__ __aicore__ void softmax_bfloat16(GM_ADDR x, GM_ADDR y, SoftmaxTiling tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  Softmax<bfloat16_t> softmax;
  softmax.Init(&pipe, x, y, tiling);
  softmax.Process();
}
