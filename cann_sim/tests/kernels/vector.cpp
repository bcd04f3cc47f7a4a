// Vector instructions against the rules for masks, repeats, strides, alignment and rounding modes. `n` is what the case
// is about: one value is refused, another passes.
#include "scratch.h"

#define KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR y, int32_t n)

constexpr uint64_t kFull = 64;  // floats in one repeat

KERNEL(mask_of_float) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, static_cast<uint64_t>(n), 2, UnaryRepeatParams{1, 1, 8, 8});  // HERE
}

KERNEL(mask_of_half) {
  Scratch s(x, y);
  LocalTensor<half> a = s.buffer_a.Get<half>();
  Duplicate(a, static_cast<half>(1.0f), static_cast<uint64_t>(n), 2, 1, 8);  // HERE
}

KERNEL(mask_bits_of_float) {
  Scratch s(x, y);
  s.Fill();
  uint64_t mask[2] = {~0ULL, static_cast<uint64_t>(n)};
  Adds(s.b, s.a, 1.0f, mask, 2, UnaryRepeatParams{1, 1, 8, 8});  // HERE
}

KERNEL(mask_bits_empty) {
  Scratch s(x, y);
  s.Fill();
  uint64_t mask[2] = {static_cast<uint64_t>(n), 0};
  Adds(s.b, s.a, 1.0f, mask, 2, UnaryRepeatParams{1, 1, 8, 8});  // HERE
}

KERNEL(mask_of_binary) {
  Scratch s(x, y);
  s.Fill();
  Add(s.c, s.a, s.b, static_cast<uint64_t>(n), 1, BinaryRepeatParams{1, 1, 1, 8, 8, 8});  // HERE
}

KERNEL(mask_of_reduction) {
  Scratch s(x, y);
  s.Fill();
  WholeReduceSum(s.b, s.a, n, 2, 1, 1, 8);  // HERE
}

KERNEL(repeats_of_reduction) {
  Scratch s(x, y);
  s.Fill();
  WholeReduceMax(s.b, s.a, 8, n, 1, 1, 1);  // HERE
}

// The last repeat leaves the tensor.
KERNEL(repeat_range) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kFull, static_cast<uint8_t>(n), UnaryRepeatParams{1, 1, 8, 8});  // HERE
}

KERNEL(stride_range) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kFull, 2, UnaryRepeatParams{1, 1, 8, static_cast<uint8_t>(n)});  // HERE
}

KERNEL(repeat_alignment) {
  Scratch s(x, y);
  s.Fill();
  Add(s.c, s.a[n], s.b, kFull, 1, BinaryRepeatParams{1, 1, 1, 8, 8, 8});  // HERE
}

KERNEL(reduction_alignment) {
  Scratch s(x, y);
  s.Fill();
  WholeReduceMax(s.b[n], s.a, 64, 1, 1, 1, 8);  // HERE
}

KERNEL(compare_count) {
  Scratch s(x, y);
  s.Fill();
  CompareScalar(s.buffer_b.Get<uint8_t>(), s.a, 0.5f, CMPMODE::GT, static_cast<uint32_t>(n));  // HERE
}

KERNEL(compare_of_int32) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<int32_t> a = s.buffer_a.Get<int32_t>(), b = s.buffer_b.Get<int32_t>();
  Compare(s.buffer_c.Get<uint8_t>(), a, b, n ? CMPMODE::EQ : CMPMODE::LT, 64);  // HERE
}

KERNEL(count_below_zero) {
  Scratch s(x, y);
  s.Fill();
  Abs(s.b, s.a, n);  // HERE
}

KERNEL(shift_distance) {
  Scratch s(x, y);
  s.Fill();
  ShiftLeft(s.buffer_b.Get<int32_t>(), s.buffer_a.Get<int32_t>(), n, 64);  // HERE
}

// All blocks of a repeat would go to one.
KERNEL(block_stride_of_destination) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kFull, 1, UnaryRepeatParams{static_cast<uint16_t>(n), 1, 8, 8});  // HERE
}

KERNEL(stride_of_reduction) {
  Scratch s(x, y);
  s.Fill();
  WholeReduceSum(s.b, s.a, 64, 2, n, 1, 8);  // HERE
}

// The first result lands on what the second repeat reads.
KERNEL(reduction_overlap) {
  Scratch s(x, y);
  s.Fill();
  WholeReduceSum(s.a[n], s.a, 64, 2, 1, 1, 8);  // HERE
}

KERNEL(mask_length) {
  Scratch s(x, y);
  s.Fill();
  SetVectorMask<float>(n);  // HERE
  ResetMask();
}

KERNEL(counted_elements) {
  Scratch s(x, y);
  s.Fill();
  SetMaskCount();
  Adds(s.b, s.a, 1.0f, static_cast<uint64_t>(n), 1, UnaryRepeatParams{1, 1, 8, 8});  // HERE
  SetMaskNorm();
  ResetMask();
}

KERNEL(compare_overlap) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<uint8_t> bits = n ? s.buffer_c.Get<uint8_t>() : s.buffer_a.Get<uint8_t>();
  Compare(bits, s.a, s.b, CMPMODE::LT, 64);  // HERE
}

KERNEL(select_overlap) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<uint8_t> bits = n ? s.buffer_c.Get<uint8_t>() : s.buffer_b.Get<uint8_t>();
  Select(s.b, bits, s.a, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);  // HERE
}

KERNEL(select_mode_of_scalar) {
  Scratch s(x, y);
  s.Fill();
  SELMODE mode = n ? SELMODE::VSEL_TENSOR_SCALAR_MODE : SELMODE::VSEL_CMPMASK_SPR;
  Select(s.b, s.buffer_c.Get<uint8_t>(), s.a, 0.0f, mode, 64);  // HERE
}

KERNEL(select_mode_of_tensors) {
  Scratch s(x, y);
  s.Fill();
  SELMODE mode = n ? SELMODE::VSEL_TENSOR_TENSOR_MODE : SELMODE::VSEL_TENSOR_SCALAR_MODE;
  Select(s.b, s.buffer_c.Get<uint8_t>(), s.a, s.a[64], mode, 64);  // HERE
}

KERNEL(broadcast_overlap) {
  Scratch s(x, y);
  s.Fill();
  Brcb(s.a[n], s.a, 1, BrcbRepeatParams{1, 8});  // HERE
}

// ---- rounding modes ----

KERNEL(cast_half_to_float) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<half> from = s.buffer_a.Get<half>();
  if (n) {
    Cast(s.b, from, RoundMode::CAST_NONE, 64);
  } else {
    Cast(s.b, from, RoundMode::CAST_RINT, 64);  // HERE
  }
}

KERNEL(cast_float_to_bfloat16) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<bfloat16_t> to = s.buffer_b.Get<bfloat16_t>();
  if (n) {
    Cast(to, s.a, RoundMode::CAST_RINT, 64);
  } else {
    Cast(to, s.a, RoundMode::CAST_NONE, 64);  // HERE
  }
}

KERNEL(cast_bfloat16_to_float) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<bfloat16_t> from = s.buffer_a.Get<bfloat16_t>();
  if (n) {
    Cast(s.b, from, RoundMode::CAST_NONE, 64);
  } else {
    Cast(s.b, from, RoundMode::CAST_FLOOR, 64);  // HERE
  }
}

KERNEL(cast_float_to_bfloat16_odd) {
  Scratch s(x, y);
  s.Fill();
  LocalTensor<bfloat16_t> to = s.buffer_b.Get<bfloat16_t>();
  Cast(to, s.a, n ? RoundMode::CAST_TRUNC : RoundMode::CAST_ODD, 64);  // HERE
}
