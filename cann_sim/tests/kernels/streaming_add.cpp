// z = x + y in half, the element-wise add whose measurements on a device are published: BUFFERS of TILE elements each
// way, the rows of tiles dealt out to the cores in contiguous ranges. Everything is a whole number of tiles.
#include "kernel_operator.h"

#ifndef BUFFERS
#define BUFFERS 2
#endif
#ifndef TILE
#define TILE 16384
#endif

extern "C" __global__ __aicore__ void streaming_add(GM_ADDR x, GM_ADDR y, GM_ADDR z, uint32_t tiles) {
  AscendC::TPipe pipe;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> xQueue, yQueue;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> zQueue;
  pipe.InitBuffer(xQueue, BUFFERS, TILE * sizeof(half));
  pipe.InitBuffer(yQueue, BUFFERS, TILE * sizeof(half));
  pipe.InitBuffer(zQueue, BUFFERS, TILE * sizeof(half));
  AscendC::GlobalTensor<half> xGm, yGm, zGm;
  xGm.SetGlobalBuffer((__gm__ half*)x);
  yGm.SetGlobalBuffer((__gm__ half*)y);
  zGm.SetGlobalBuffer((__gm__ half*)z);
  const uint32_t cores = AscendC::GetBlockNum(), core = AscendC::GetBlockIdx();
  const uint32_t first = tiles * core / cores, last = tiles * (core + 1) / cores;
  for (uint32_t tile = first; tile < last; ++tile) {
    AscendC::LocalTensor<half> xLocal = xQueue.AllocTensor<half>();
    AscendC::LocalTensor<half> yLocal = yQueue.AllocTensor<half>();
    AscendC::DataCopy(xLocal, xGm[tile * TILE], TILE);
    AscendC::DataCopy(yLocal, yGm[tile * TILE], TILE);
    xQueue.EnQue(xLocal);
    yQueue.EnQue(yLocal);
    xLocal = xQueue.DeQue<half>();
    yLocal = yQueue.DeQue<half>();
    AscendC::LocalTensor<half> zLocal = zQueue.AllocTensor<half>();
    AscendC::Add(zLocal, xLocal, yLocal, TILE);
    xQueue.FreeTensor(xLocal);
    yQueue.FreeTensor(yLocal);
    zQueue.EnQue(zLocal);
    zLocal = zQueue.DeQue<half>();
    AscendC::DataCopy(zGm[tile * TILE], zLocal, TILE);
    zQueue.FreeTensor(zLocal);
  }
}
