// Reductions, by number; the numbers are the order in test_api_reduce.py.
#include "api.h"

#define MASKED(CALL)                                     \
  switch (c.form) {                                      \
    case BITS: {                                         \
      uint64_t mask[2] = {c.mask[0], c.mask[1]};         \
      CALL;                                              \
      break;                                             \
    }                                                    \
    default: {                                           \
      const auto mask = static_cast<int32_t>(c.mask[0]); \
      CALL;                                              \
      break;                                             \
    }                                                    \
  }                                                      \
  break;

template <typename T>
__aicore__ inline void Reduce(const Case& c, GM_ADDR src0, GM_ADDR src1, GM_ADDR src2, GM_ADDR dst) {
  Buffers s(c, src0, src1, src2, dst);
  const auto a = s.Get<T>(0), tmp = s.Get<T>(1), d = s.Get<T>(3);
  const int32_t to = c.strides[0], block = c.strides[1], from = c.strides[2];
  const auto order = static_cast<ReduceOrder>(c.mode);
  const bool index = c.flag != 0;
  switch (c.op) {
    case 0:
      MASKED(WholeReduceSum(d, a, mask, c.repeat, to, block, from))
    case 1:
      MASKED(WholeReduceMax(d, a, mask, c.repeat, to, block, from, order))
    case 2:
      MASKED(WholeReduceMin(d, a, mask, c.repeat, to, block, from, order))
    case 3:
      MASKED(BlockReduceSum(d, a, c.repeat, mask, to, block, from))
    case 4:
      MASKED(BlockReduceMax(d, a, c.repeat, mask, to, block, from))
    case 5:
      MASKED(BlockReduceMin(d, a, c.repeat, mask, to, block, from))
    case 6:
      MASKED(PairReduceSum(d, a, c.repeat, mask, to, block, from))
    case 7:
      MASKED(RepeatReduceSum(d, a, c.repeat, mask, 1, block, to, from))
    case 8:
      if (c.form == COUNT) {
        ReduceSum(d, a, tmp, c.count);
        break;
      }
      MASKED(ReduceSum(d, a, tmp, mask, c.repeat, from))
    case 9:
      if (c.form == COUNT) {
        ReduceMax(d, a, tmp, c.count, index);
        break;
      }
      MASKED(ReduceMax(d, a, tmp, mask, c.repeat, from, index))
    case 10:
      if (c.form == COUNT) {
        ReduceMin(d, a, tmp, c.count, index);
        break;
      }
      MASKED(ReduceMin(d, a, tmp, mask, c.repeat, from, index))
    case 11:
      MASKED((ReduceRepeat<ReduceType::MAX>(d, a, mask, c.repeat, to, block, from, order)))
    case 12:
      MASKED((ReduceDataBlock<ReduceType::SUM>(d, a, mask, c.repeat, to, block, from)))
    case 13:
      MASKED((ReducePairElem<ReduceType::SUM>(d, a, mask, c.repeat, to, block, from)))
  }
  s.Store();
}

KERNEL(reduce_float) {
  Reduce<float>(c, src0, src1, src2, dst);
}
KERNEL(reduce_half) {
  Reduce<half>(c, src0, src1, src2, dst);
}

// No synchronisation of its own after a reduction: the vector unit and the copy out are ordered by the API.
KERNEL(reduce_then_use) {
  Buffers s(c, src0, src1, src2, dst);
  const auto a = s.Get<float>(0), tmp = s.Get<float>(1), d = s.Get<float>(3);
  if (c.op == 0) {
    ReduceSum(d, a, tmp, c.count);
  } else {
    ReduceMax(d, a, tmp, c.count);
  }
  Adds(d, d, 1.0f, 1);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopy(s.gm[3], s.Get<uint8_t>(3), c.bytes[3]);
}
