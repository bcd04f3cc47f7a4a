// Two ways to write a double-buffered z = x + 1 and one z = x + y, each line of synchronisation marked with the name of
// what it belongs to: the tests compile these kernels again and again, each time without the lines of one name.
#include "scratch.h"

constexpr uint32_t kTile = 64;

// With queues. FreeTensor and AllocTensor cannot be left out: they say which buffer is whose.
extern "C" __global__ __aicore__ void by_queues(GM_ADDR x, GM_ADDR y, GM_ADDR z, uint32_t tiles) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in_x, in_y;
  TQue<TPosition::VECOUT, 1> out;
  pipe.InitBuffer(in_x, 2, kTile * sizeof(float));
  pipe.InitBuffer(in_y, 2, kTile * sizeof(float));
  pipe.InitBuffer(out, 2, kTile * sizeof(float));
  GlobalTensor<float> from_x, from_y, to;
  from_x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  from_y.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(z));
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    LocalTensor<float> a = in_x.AllocTensor<float>();
    LocalTensor<float> b = in_y.AllocTensor<float>();
    DataCopy(a, from_x[tile * kTile], kTile);
    in_x.EnQue(a);  // sync x
    DataCopy(b, from_y[tile * kTile], kTile);
    in_y.EnQue(b);            // sync y
    a = in_x.DeQue<float>();  // sync x
    b = in_y.DeQue<float>();  // sync y
    LocalTensor<float> c = out.AllocTensor<float>();
    Add(c, a, b, kTile);
    in_x.FreeTensor(a);
    in_y.FreeTensor(b);
    out.EnQue(c);            // sync z
    c = out.DeQue<float>();  // sync z
    DataCopy(to[tile * kTile], c, kTile);
    out.FreeTensor(c);
  }
}

// With flags: two buffers each way, and an event id for each of them.
extern "C" __global__ __aicore__ void by_flags(GM_ADDR x, GM_ADDR y, GM_ADDR z, uint32_t tiles) {
  Scratch s(x, z);
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    const int32_t id = tile % 2;
    LocalTensor<float> a = s.a[id * kTile];
    LocalTensor<float> b = s.b[id * kTile];
    if (tile >= 2) {
      WaitFlag<HardEvent::V_MTE2>(id);  // sync input free
    }
    DataCopy(a, s.x[tile * kTile], kTile);
    SetFlag<HardEvent::MTE2_V>(id);   // sync input full
    WaitFlag<HardEvent::MTE2_V>(id);  // sync input full
    if (tile >= 2) {
      WaitFlag<HardEvent::MTE3_V>(id);  // sync output free
    }
    Muls(b, a, 1.0f, kTile);
    if (tile + 2 < tiles) {
      SetFlag<HardEvent::V_MTE2>(id);  // sync input free
    }
    PipeBarrier<PIPE_V>();  // sync barrier
    Adds(b, b, 1.0f, kTile);
    SetFlag<HardEvent::V_MTE3>(id);   // sync output full
    WaitFlag<HardEvent::V_MTE3>(id);  // sync output full
    DataCopy(s.y[tile * kTile], b, kTile);
    if (tile + 2 < tiles) {
      SetFlag<HardEvent::MTE3_V>(id);  // sync output free
    }
  }
}
