// Tensors and buffers in UB that do not fit, are not aligned, or are left behind by an instruction. `n` is the size,
// offset or count that the case is about, so that one value is refused and another, just inside the rule, passes.
#include "scratch.h"

#define KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR y, int32_t n)

// ---- room ----

KERNEL(buffer_bytes) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, n);  // HERE
}

KERNEL(queue_bytes) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(buffer, 8192);
  pipe.InitBuffer(queue, 2, n);  // HERE
}

KERNEL(buffers_of_a_position) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> first, second;
  pipe.InitBuffer(first, 4, 32);
  pipe.InitBuffer(second, n, 32);  // HERE
}

KERNEL(buffers_of_a_kernel) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffers[65];
  for (int32_t i = 0; i < n; ++i) {
    pipe.InitBuffer(buffers[i], 32);  // HERE
  }
}

KERNEL(buffer_of_nothing) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, n);  // HERE
}

KERNEL(queue_of_nothing) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, n, 32);  // HERE
}

KERNEL(queue_twice) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> first, second;
  pipe.InitBuffer(first, 1, 32);
  pipe.InitBuffer(n ? second : first, 1, 32);  // HERE
}

KERNEL(get_before_init) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  if (n) {
    pipe.InitBuffer(buffer, 32);
  }
  LocalTensor<float> all = buffer.Get<float>();  // HERE
  Duplicate(all, 0.0f, 8);
}

KERNEL(tensor_without_memory) {
  Scratch s(x, y);
  LocalTensor<float> nowhere;
  if (n) {
    nowhere = s.a;
  }
  Duplicate(nowhere, 0.0f, 8);  // HERE
}

// A tensor at an address of the kernel's own choice.
KERNEL(placed_tensor) {
  LocalTensor<float> tensor(TPosition::VECCALC, n, 8);  // HERE
  Duplicate(tensor, 0.0f, 8);
}

// ---- alignment ----

KERNEL(vector_source_alignment) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a[n], 1.0f, kCount);  // HERE
}

KERNEL(vector_destination_alignment) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b[n], s.a, 1.0f, kCount);  // HERE
}

KERNEL(copy_in_alignment) {
  Scratch s(x, y);
  DataCopy(s.a[n], s.x, kCount);  // HERE
}

KERNEL(copy_out_alignment) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a[n], kCount);  // HERE
}

KERNEL(pad_in_alignment) {
  Scratch s(x, y);
  DataCopyPad(s.a[n], s.x, DataCopyExtParams{1, 4, 0, 0, 0}, NoPad());  // HERE
}

KERNEL(pad_out_alignment) {
  Scratch s(x, y);
  s.Fill();
  DataCopyPad(s.y, s.a[n], DataCopyExtParams{1, 4, 0, 0, 0});  // HERE
}

KERNEL(gm_element_alignment) {
  Scratch s(x, y);
  GlobalTensor<float> shifted;
  shifted.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x + n));
  DataCopy(s.a, shifted, kCount);  // HERE
}

KERNEL(gm_scalar_alignment) {
  Scratch s(x, y);
  GlobalTensor<float> shifted;
  shifted.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x + n));
  shifted.SetValue(0, 1.0f);  // HERE
}

KERNEL(offset_alignment) {
  Scratch s(x, y);
  LocalTensor<float> part = s.buffer_a.GetWithOffset<float>(8, n);  // HERE
  Duplicate(part, 0.0f, 8);
}

// ---- range ----

KERNEL(offset_range) {
  Scratch s(x, y);
  LocalTensor<float> part = s.buffer_a.GetWithOffset<float>(8, n);  // HERE
  Duplicate(part, 0.0f, 8);
}

KERNEL(get_range) {
  Scratch s(x, y);
  LocalTensor<float> part = s.buffer_a.Get<float>(n);  // HERE
  Duplicate(part, 0.0f, 8);
}

KERNEL(index_range) {
  Scratch s(x, y);
  LocalTensor<float> part = s.a[n];  // HERE
  Duplicate(part, 0.0f, 8);
}

KERNEL(vector_write_range) {
  Scratch s(x, y);
  s.Fill();
  Duplicate(s.a[kCount], 0.0f, n);  // HERE
}

KERNEL(vector_read_range) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<float> part = s.buffer_a.Get<float>(kCount);
  Adds(s.b, part, 1.0f, n);  // HERE
}

// The pads of the rows count too: each row of one float takes 32 bytes of UB.
KERNEL(copy_in_range) {
  Scratch s(x, y);
  LocalTensor<float> part = s.buffer_a.Get<float>(kCount);
  DataCopyExtParams copy{static_cast<uint16_t>(n), 4, 0, 0, 0};
  DataCopyPad(part, s.x, copy, DataCopyPadExtParams<float>{false, 0, 0, 0.0f});  // HERE
}

KERNEL(copy_out_range) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<float> part = s.buffer_a.Get<float>(kCount);
  DataCopy(s.y, part, n);  // HERE
}

KERNEL(scalar_read_range) {
  Scratch s(x, y);
  s.Fill();
  s.b.SetValue(0, s.a.GetValue(n));  // HERE
}

KERNEL(scalar_write_range) {
  Scratch s(x, y);
  s.Fill();
  s.a.SetValue(n, 2.0f);  // HERE
}

// ---- overlap: a source and a destination are the same bytes or none of the same ----

KERNEL(vector_overlap) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.a[n], s.a, 1.0f, kCount);  // HERE
}

KERNEL(vector_second_source_overlap) {
  Scratch s(x, y);
  s.Fill();
  Add(s.b[n], s.a, s.b, kCount);  // HERE
}

KERNEL(copy_overlap) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.a[n], s.a, kCount);  // HERE
}
