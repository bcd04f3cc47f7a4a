// Fills, copies, compares, selects and gathers, by number; the numbers are the order in test_api_move.py.
#include "api.h"

template <typename T>
__aicore__ inline void Move(const Case& c, LocalTensor<T> a, LocalTensor<T> d) {
  const T scalar = static_cast<T>(c.scalar);
  switch (c.op) {
    case 0:
      FORMS(T, Duplicate(d, scalar, c.count), Duplicate(d, scalar, mask, c.repeat, c.strides[0], c.strides[2]),
            (Duplicate<T, false>(d, scalar, MASK_PLACEHOLDER, c.repeat, c.strides[0], c.strides[2])))
      break;
    case 1: {
      const CopyRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]);
      FORMS(T, , Copy(d, a, mask, c.repeat, p), (Copy<T, false>(d, a, MASK_PLACEHOLDER, c.repeat, p)))
      break;
    }
    case 2:
      Brcb(d, a, c.repeat, {c.strides[0], c.strides[2]});
      break;
  }
}

template <typename T>
__aicore__ inline void Index(const Case& c, LocalTensor<T> d) {
  if (c.op == 3) {
    const T first = static_cast<T>(c.scalar);
    FORMS(T, CreateVecIndex(d, first, c.count), CreateVecIndex(d, first, mask, c.repeat, c.strides[0], c.strides[2]), )
  }
}

template <typename T>
__aicore__ inline void Gathers(const Case& c, LocalTensor<T> a, LocalTensor<uint32_t> offsets, LocalTensor<T> d) {
  if (c.op == 4) {
    const auto base = static_cast<uint32_t>(c.scalar);
    FORMS(T, Gather(d, a, offsets, base, c.count), Gather(d, a, offsets, base, mask, c.repeat, c.strides[2]), )
  }
}

#define MOVE(T, name)                                            \
  KERNEL(move_##name) {                                          \
    Buffers s(c, src0, src1, src2, dst);                         \
    Move<T>(c, s.Get<T>(0), s.Get<T>(3));                        \
    Gathers<T>(c, s.Get<T>(0), s.Get<uint32_t>(1), s.Get<T>(3)); \
    s.Store();                                                   \
  }
MOVE(bfloat16_t, bfloat16)
MOVE(uint32_t, uint32)

#define MOVE_AND_INDEX(T, name)                                  \
  KERNEL(move_##name) {                                          \
    Buffers s(c, src0, src1, src2, dst);                         \
    Move<T>(c, s.Get<T>(0), s.Get<T>(3));                        \
    Gathers<T>(c, s.Get<T>(0), s.Get<uint32_t>(1), s.Get<T>(3)); \
    Index<T>(c, s.Get<T>(3));                                    \
    s.Store();                                                   \
  }
MOVE_AND_INDEX(int16_t, int16)
MOVE_AND_INDEX(half, half)
MOVE_AND_INDEX(float, float)
MOVE_AND_INDEX(int32_t, int32)

template <typename T>
__aicore__ inline void CompareAll(const Case& c, GM_ADDR src0, GM_ADDR src1, GM_ADDR src2, GM_ADDR dst) {
  Buffers s(c, src0, src1, src2, dst);
  const auto a = s.Get<T>(0), b = s.Get<T>(1);
  const auto d = s.Get<uint8_t>(3);
  const auto mode = static_cast<CMPMODE>(c.mode);
  const T scalar = static_cast<T>(c.scalar);
  const BinaryRepeatParams two(c.strides[0], c.strides[1], c.strides[2], c.strides[3], c.strides[4], c.strides[5]);
  const UnaryRepeatParams one(c.strides[0], c.strides[1], c.strides[2], c.strides[3]);
  switch (c.op) {
    case 5:
      FORMS(T, Compare(d, a, b, mode, c.count), Compare(d, a, b, mode, mask, c.repeat, two), ) break;
    case 6:
      FORMS(T, Compares(d, a, scalar, mode, c.count), Compares(d, a, scalar, mode, mask, c.repeat, one), ) break;
    case 7:
      FORMS(T, CompareScalar(d, a, scalar, mode, c.count), CompareScalar(d, a, scalar, mode, mask, c.repeat, one), )
      break;
  }
  s.Store();
}

KERNEL(compare_float) {
  CompareAll<float>(c, src0, src1, src2, dst);
}
KERNEL(compare_half) {
  CompareAll<half>(c, src0, src1, src2, dst);
}
KERNEL(compare_int32) {
  CompareAll<int32_t>(c, src0, src1, src2, dst);
}

template <typename T>
__aicore__ inline void SelectAll(const Case& c, GM_ADDR src0, GM_ADDR src1, GM_ADDR src2, GM_ADDR dst) {
  Buffers s(c, src0, src1, src2, dst);
  const auto a = s.Get<T>(0), b = s.Get<T>(1), d = s.Get<T>(3);
  const auto bits = s.Get<uint8_t>(2);
  const auto mode = static_cast<SELMODE>(c.mode);
  const T scalar = static_cast<T>(c.scalar);
  const BinaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3], c.strides[4], c.strides[5]);
  if (c.flag != 0) {
    FORMS(T, Select(d, bits, a, scalar, mode, c.count), Select(d, bits, a, scalar, mode, mask, c.repeat, p), )
  } else {
    FORMS(T, Select(d, bits, a, b, mode, c.count), Select(d, bits, a, b, mode, mask, c.repeat, p), )
  }
  s.Store();
}

KERNEL(select_float) {
  SelectAll<float>(c, src0, src1, src2, dst);
}
KERNEL(select_half) {
  SelectAll<half>(c, src0, src1, src2, dst);
}
