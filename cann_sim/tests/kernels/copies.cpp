// Copy parameters that the hardware does not take, and GM accesses outside the buffers of the launch. `n` is what the
// case is about: one value is refused, another, just inside the rule, passes.
#include "scratch.h"

#define KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR y, int32_t n)

// ---- parameters ----

KERNEL(block_count_in) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 4096 * 32);
  GlobalTensor<float> source;
  source.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  DataCopyExtParams copy{static_cast<uint16_t>(n), 4, 0, 0, 0};
  DataCopyPad(buffer.Get<float>(), source, copy, NoPad());  // HERE
}

KERNEL(block_count_out) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 4096 * 32);
  LocalTensor<float> source = buffer.Get<float>();
  GlobalTensor<float> destination;
  destination.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  Duplicate(source, 0.0f, 4096 * 8);
  Order<HardEvent::V_MTE3>();
  DataCopyPad(destination, source, DataCopyExtParams{static_cast<uint16_t>(n), 4, 0, 0, 0});  // HERE
}

KERNEL(block_count_plain) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 4096 * 32);
  GlobalTensor<float> source;
  source.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  DataCopy(buffer.Get<float>(), source, DataCopyParams{static_cast<uint16_t>(n), 1, 0, 0});  // HERE
}

KERNEL(block_len_in) {
  Scratch s(x, y);
  DataCopyPad(s.a, s.x, DataCopyExtParams{1, static_cast<uint32_t>(n), 0, 0, 0}, NoPad());  // HERE
}

KERNEL(block_len_out) {
  Scratch s(x, y);
  s.Fill();
  DataCopyPad(s.y, s.a, DataCopyExtParams{1, static_cast<uint32_t>(n), 0, 0, 0});  // HERE
}

KERNEL(left_padding) {
  Scratch s(x, y);
  DataCopyPadExtParams<float> pad{true, static_cast<uint8_t>(n), 0, 0.0f};
  DataCopyPad(s.a, s.x, DataCopyExtParams{1, 64, 0, 0, 0}, pad);  // HERE
}

KERNEL(right_padding) {
  Scratch s(x, y);
  DataCopyPadExtParams<float> pad{true, 0, static_cast<uint8_t>(n), 0.0f};
  DataCopyPad(s.a, s.x, DataCopyExtParams{1, 64, 0, 0, 0}, pad);  // HERE
}

KERNEL(padding_value_of_8_bytes) {
  Scratch s(x, y);
  GlobalTensor<int64_t> source;
  source.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(x));
  DataCopyPadExtParams<int64_t> pad{true, 0, 3, n};
  DataCopyPad(s.buffer_a.Get<int64_t>(), source, DataCopyExtParams{1, 8, 0, 0, 0}, pad);  // HERE
}

KERNEL(plain_count_in) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, n);  // HERE
}

KERNEL(plain_count_out) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, n);  // HERE
}

// ---- outside the buffers of the launch ----

KERNEL(gm_read_end) {
  Scratch s(x, y);
  DataCopyPad(s.a, s.x[8], DataCopyExtParams{1, static_cast<uint32_t>(n) * 4, 0, 0, 0}, NoPad());  // HERE
}

KERNEL(gm_plain_read_end) {
  Scratch s(x, y);
  DataCopy(s.a, s.x[n], 8);  // HERE
}

// The last of the rows, and only the end of it.
KERNEL(gm_read_last_row) {
  Scratch s(x, y);
  DataCopyPad(s.a, s.x, DataCopyExtParams{4, 12, static_cast<uint32_t>(n), 0, 0}, NoPad());  // HERE
}

KERNEL(gm_write_end) {
  Scratch s(x, y);
  s.Fill();
  DataCopyPad(s.y[8], s.a, DataCopyExtParams{1, static_cast<uint32_t>(n) * 4, 0, 0, 0});  // HERE
}

KERNEL(gm_read_start) {
  Scratch s(x, y);
  GlobalTensor<float> before;
  before.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x) + n);
  DataCopy(s.a, before, kCount);  // HERE
}

KERNEL(gm_write_start) {
  Scratch s(x, y);
  s.Fill();
  GlobalTensor<float> before;
  before.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y) + n);
  DataCopy(before, s.a, kCount);  // HERE
}

KERNEL(gm_scalar_read) {
  Scratch s(x, y);
  GlobalTensor<float> shifted;
  shifted.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x) + n);
  s.a.SetValue(0, shifted.GetValue(0));  // HERE
}

KERNEL(gm_scalar_write) {
  Scratch s(x, y);
  GlobalTensor<float> shifted;
  shifted.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y) + n);
  shifted.SetValue(0, 1.0f);  // HERE
}

KERNEL(gm_null_read) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, n);  // HERE
}

KERNEL(gm_null_scalar_read) {
  Scratch s(x, y);
  s.a.SetValue(0, s.x.GetValue(n));  // HERE
}

KERNEL(gm_null_write) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, n);  // HERE
}

// What a copy of nothing would touch does not matter.
KERNEL(copies_of_nothing) {
  Scratch s(x, y);
  DataCopyPad(s.a, s.x[n], DataCopyExtParams{0, 64, 0, 0, 0}, NoPad());
  DataCopyPad(s.a, s.x[n], DataCopyExtParams{4, 0, 0, 0, 0}, NoPad());
  DataCopyPad(s.y[n], s.a, DataCopyExtParams{0, 64, 0, 0, 0});
  DataCopyPad(s.y[n], s.a, DataCopyExtParams{4, 0, 0, 0, 0});
}
