// Kernels that the tests of streams launch.
#include "kernel_operator.h"
using namespace AscendC;

// Core i copies `count` floats from from + i * count to to + i * count and adds `plus`.
extern "C" __global__ __aicore__ void shift(GM_ADDR from, GM_ADDR to, uint32_t count, float plus) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, count * sizeof(float));
  LocalTensor<float> tile = buffer.Get<float>();
  GlobalTensor<float> source, target;
  source.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(from) + GetBlockIdx() * count);
  target.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(to) + GetBlockIdx() * count);
  DataCopy(tile, source, count);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  Adds(tile, tile, plus, count);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopy(target, tile, count);
}
