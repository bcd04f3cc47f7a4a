// Reads of bytes that nothing wrote, in UB and in GM. With `right` the bytes are written first and the kernel passes.
#include "scratch.h"

#define KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR y, int32_t right)

// ---- UB ----

KERNEL(vector_read) {
  Scratch s(x, y);
  if (right) {
    s.Fill();
  }
  Adds(s.b, s.a, 1.0f, kCount);  // HERE
}

KERNEL(copy_out_read) {
  Scratch s(x, y);
  if (right) {
    s.Fill();
  }
  DataCopy(s.y, s.a, kCount);  // HERE
}

KERNEL(scalar_read) {
  Scratch s(x, y);
  if (right) {
    s.Fill();
  }
  s.b.SetValue(0, s.a.GetValue(0));  // HERE
}

// All but the last element.
KERNEL(last_element) {
  Scratch s(x, y);
  Duplicate(s.a, 1.0f, right ? kCount : kCount - 1);
  PipeBarrier<PIPE_V>();
  Adds(s.b, s.a, 1.0f, kCount);  // HERE
}

// A hole in the middle of what is read.
KERNEL(hole) {
  Scratch s(x, y);
  Duplicate(s.a, 1.0f, 64);
  Duplicate(s.a[72], 1.0f, 56);
  if (right) {
    Duplicate(s.a[64], 1.0f, 8);
  }
  PipeBarrier<PIPE_V>();
  Adds(s.b, s.a, 1.0f, 128);  // HERE
}

// A copy of 3 floats fills up its 32 bytes, and no more.
KERNEL(behind_the_block) {
  Scratch s(x, y);
  DataCopyPad(s.a, s.x, DataCopyExtParams{1, 12, 0, 0, 0}, NoPad());
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, right ? 8 : 9);  // HERE
}

// Padding is asked for without a value: what it holds is undefined.
KERNEL(padding_without_value) {
  Scratch s(x, y);
  DataCopyPadExtParams<float> pad{static_cast<bool>(right), 0, 5, 7.0f};
  DataCopyPad(s.a, s.x, DataCopyExtParams{1, 12, 0, 0, 0}, pad);
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, 8);  // HERE
}

KERNEL(left_padding_without_value) {
  Scratch s(x, y);
  DataCopyPadExtParams<float> pad{static_cast<bool>(right), 2, 0, 7.0f};
  DataCopyPad(s.a, s.x, DataCopyExtParams{1, 24, 0, 0, 0}, pad);
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, 8);  // HERE
}

// The gap between two rows stays as it was.
KERNEL(gap_between_rows) {
  Scratch s(x, y);
  DataCopyPad(s.a, s.x, DataCopyExtParams{2, 32, 0, static_cast<uint32_t>(right ? 0 : 1), 0}, NoPad());
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, 16);  // HERE
}

// A tensor that is taken again holds nothing, although it is the same memory.
KERNEL(stale) {
  Scratch s(x, y);
  TQue<TPosition::VECIN, 1> queue;
  s.pipe.InitBuffer(queue, 1, kCount * sizeof(float));
  for (int32_t tile = 0; tile < 2; ++tile) {
    LocalTensor<float> in = queue.AllocTensor<float>();
    if (tile == 0 || right) {
      DataCopy(in, s.x, kCount);
    }
    queue.EnQue(in);
    in = queue.DeQue<float>();
    PipeBarrier<PIPE_V>();
    Adds(s.b, in, 1.0f, kCount);  // HERE
    queue.FreeTensor(in);
  }
}

// The tail of the second tile is what the first one left.
KERNEL(stale_tail) {
  Scratch s(x, y);
  TQue<TPosition::VECIN, 1> queue;
  s.pipe.InitBuffer(queue, 1, kCount * sizeof(float));
  uint32_t count = kCount;
  for (int32_t tile = 0; tile < 2; ++tile) {
    LocalTensor<float> in = queue.AllocTensor<float>();
    DataCopy(in, s.x, count);
    queue.EnQue(in);
    in = queue.DeQue<float>();
    PipeBarrier<PIPE_V>();
    Adds(s.b, in, 1.0f, right ? count : kCount);  // HERE
    queue.FreeTensor(in);
    count -= 8;
  }
}

// Of each 64 floats only the first 32 are written.
KERNEL(masked_write) {
  Scratch s(x, y);
  Duplicate(s.a, 1.0f, static_cast<uint64_t>(right ? 64 : 32), 2, 1, 8);
  PipeBarrier<PIPE_V>();
  const uint64_t full = 64;
  Adds(s.b, s.a, 1.0f, full, 2, UnaryRepeatParams{1, 1, 8, 8});  // HERE
}

KERNEL(reduction_read) {
  Scratch s(x, y);
  Duplicate(s.a, 1.0f, right ? 128 : 120);
  PipeBarrier<PIPE_V>();
  WholeReduceSum(s.b, s.a, 64, 2, 1, 1, 8);  // HERE
}

// ---- GM: a workspace or an output that the launch got without contents ----

KERNEL(gm_copy_in_read) {
  Scratch s(x, y);
  if (right) {
    Duplicate(s.b, 1.0f, kCount);
    Order<HardEvent::V_MTE3>();
    DataCopy(s.y, s.b, kCount);
    Order<HardEvent::MTE3_MTE2>();
  }
  DataCopy(s.a, s.y, kCount);  // HERE
}

KERNEL(gm_scalar_read) {
  Scratch s(x, y);
  if (right) {
    s.y.SetValue(5, 1.0f);
  }
  s.a.SetValue(0, s.y.GetValue(5));  // HERE
}

// One element more than was written.
KERNEL(gm_one_beyond) {
  Scratch s(x, y);
  Duplicate(s.b, 1.0f, kCount);
  Order<HardEvent::V_MTE3>();
  DataCopyPad(s.y, s.b, DataCopyExtParams{1, 100, 0, 0, 0});
  Order<HardEvent::MTE3_MTE2>();
  const uint32_t bytes = right ? 100 : 104;
  DataCopyPad(s.a, s.y, DataCopyExtParams{1, bytes, 0, 0, 0}, NoPad());  // HERE
}
