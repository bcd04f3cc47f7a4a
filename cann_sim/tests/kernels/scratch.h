// What the small kernels of these tests share: a pipe, three tensors in UB and the launch's two buffers, as floats.
// A line marked HERE is where the error is expected, FIRST the other place that its message has to name.
#ifndef SCRATCH_H_
#define SCRATCH_H_

#include "kernel_operator.h"

using namespace AscendC;

constexpr uint32_t kTensor = 1024;  // elements of a tensor in UB, and of a buffer in GM
constexpr uint32_t kCount = 256;    // elements that one instruction works on

// GM buffers have no length of their own here: what bounds them is the launch.
struct Scratch {
  __aicore__ inline Scratch(GM_ADDR x_address, GM_ADDR y_address) {
    x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x_address));
    y.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y_address));
    pipe.InitBuffer(buffer_a, kTensor * sizeof(float));
    pipe.InitBuffer(buffer_b, kTensor * sizeof(float));
    pipe.InitBuffer(buffer_c, kTensor * sizeof(float));
    a = buffer_a.Get<float>();
    b = buffer_b.Get<float>();
    c = buffer_c.Get<float>();
  }

  // All three tensors hold ones, and everything is ordered after that.
  __aicore__ inline void Fill() {
    Duplicate(a, 1.0f, kTensor);
    Duplicate(b, 1.0f, kTensor);
    Duplicate(c, 1.0f, kTensor);
    PipeBarrier<PIPE_ALL>();
  }

  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer_a, buffer_b, buffer_c;
  LocalTensor<float> a, b, c;
  GlobalTensor<float> x, y;
};

// Pads the last 32 bytes of a block with the block's first element, as a copy without padding does.
__aicore__ inline DataCopyPadExtParams<float> NoPad() {
  return DataCopyPadExtParams<float>{false, 0, 0, 0.0f};
}

// Orders what the event's first pipe was given so far before what its second pipe is given from now on.
template <HardEvent event>
__aicore__ inline void Order() {
  SetFlag<event>(EVENT_ID0);
  WaitFlag<event>(EVENT_ID0);
}

#endif  // SCRATCH_H_
