// What operands may share, and what the mask register holds: each kernel works on one tensor of floats.
#include "api.h"

#define ONE_TENSOR                                                                                                \
  Buffers s(c, src0, src1, src2, dst);                                                                            \
  const auto d = s.Get<float>(3);                                                                                 \
  const auto a = d[c.flag];                                                                                       \
  const BinaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3], c.strides[4], c.strides[5]); \
  [[maybe_unused]] const uint64_t mask = c.mask[0];

KERNEL(overlap_count) {
  ONE_TENSOR
  Adds(d, a, 1.0f, c.count);
  s.Store();
}

KERNEL(overlap_repeat) {
  ONE_TENSOR
  Mul(d, a, a, mask, c.repeat, p);
  s.Store();
}

KERNEL(accumulate_add) {
  ONE_TENSOR
  Add(d, a, d, mask, c.repeat, p);
  s.Store();
}

KERNEL(accumulate_div) {
  ONE_TENSOR
  Div(d, a, d, mask, c.repeat, p);
  s.Store();
}

KERNEL(overlap_cast) {
  ONE_TENSOR
  Cast(d.ReinterpretCast<half>(), a, RoundMode::CAST_RINT, c.count);
  s.Store();
}

KERNEL(reduce_in_place) {
  ONE_TENSOR
  WholeReduceSum(d, a, mask, c.repeat, c.strides[0], 1, 8);
  s.Store();
}

// A mask that an API was given stays in the register; a count form leaves the full mask.
KERNEL(mask_register) {
  ONE_TENSOR
  Adds(d, d, 1.0f, mask, 1, {1, 1, 8, 8});
  PipeBarrier<PIPE_V>();
  if (c.mode == 1) {
    Adds(d[64], d[64], 1.0f, 8);
  } else if (c.mode == 2) {
    ResetMask();
  }
  PipeBarrier<PIPE_V>();
  Adds<float, false>(d, d, 1.0f, MASK_PLACEHOLDER, 1, {1, 1, 8, 8});
  s.Store();
}
