// Unary, binary, scalar and multiply-add operations, by number; the numbers are the order in test_api_arithmetic.py.
#include "api.h"

#define UNARY(NAME)                                                                    \
  {                                                                                    \
    const UnaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]); \
    FORMS(T, NAME(d, a, c.count), NAME(d, a, mask, c.repeat, p),                       \
          (NAME<T, false>(d, a, MASK_PLACEHOLDER, c.repeat, p)))                       \
    break;                                                                             \
  }
#define SCALAR(NAME)                                                                   \
  {                                                                                    \
    const UnaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]); \
    const T scalar = static_cast<T>(c.scalar);                                         \
    FORMS(T, NAME(d, a, scalar, c.count), NAME(d, a, scalar, mask, c.repeat, p),       \
          (NAME<T, false>(d, a, scalar, MASK_PLACEHOLDER, c.repeat, p)))               \
    break;                                                                             \
  }
#define BINARY(NAME)                                                                                                \
  {                                                                                                                 \
    const BinaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3], c.strides[4], c.strides[5]); \
    FORMS(T, NAME(d, a, b, c.count), NAME(d, a, b, mask, c.repeat, p),                                              \
          (NAME<T, false>(d, a, b, MASK_PLACEHOLDER, c.repeat, p)))                                                 \
    break;                                                                                                          \
  }
#define OPEN                           \
  Buffers s(c, src0, src1, src2, dst); \
  const auto a = s.Get<T>(0), b = s.Get<T>(1), d = s.Get<T>(3);

// Operations that exist for every type of the four that have arithmetic.
template <typename T>
__aicore__ inline bool Common(const Case& c, LocalTensor<T> a, LocalTensor<T> b, LocalTensor<T> d) {
  switch (c.op) {
    case 0:
      BINARY(Add)
    case 1:
      BINARY(Sub)
    case 2:
      BINARY(Mul)
    case 3:
      BINARY(Max)
    case 4:
      BINARY(Min)
    case 5:
      SCALAR(Adds)
    case 6:
      SCALAR(Muls)
    case 7:
      SCALAR(Maxs)
    case 8:
      SCALAR(Mins)
    default:
      return false;
  }
  return true;
}

template <typename T>
__aicore__ inline void Floating(const Case& c, LocalTensor<T> a, LocalTensor<T> b, LocalTensor<T> d) {
  if (Common(c, a, b, d)) {
    return;
  }
  switch (c.op) {
    case 9:
      BINARY(Div)
    case 10:
      UNARY(Exp)
    case 11:
      UNARY(Ln)
    case 12:
      UNARY(Abs)
    case 13:
      UNARY(Reciprocal)
    case 14:
      UNARY(Sqrt)
    case 15:
      UNARY(Rsqrt)
    case 16:
      UNARY(Relu)
    case 17:
      SCALAR(LeakyRelu)
    case 18:
      BINARY(FusedMulAdd)
    case 19: {
      const UnaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]);
      const T scalar = static_cast<T>(c.scalar);
      FORMS(T, Axpy(d, a, scalar, c.count), Axpy(d, a, scalar, mask, c.repeat, p),
            (Axpy<T, T, false>(d, a, scalar, MASK_PLACEHOLDER, c.repeat, p)))
      break;
    }
    case 20: {
      const BinaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3], c.strides[4], c.strides[5]);
      FORMS(T, MulAddDst(d, a, b, c.count), MulAddDst(d, a, b, mask, c.repeat, p),
            (MulAddDst<T, T, false>(d, a, b, MASK_PLACEHOLDER, c.repeat, p)))
      break;
    }
  }
}

KERNEL(arithmetic_float) {
  using T = float;
  OPEN Floating<T>(c, a, b, d);
  s.Store();
}

KERNEL(arithmetic_half) {
  using T = half;
  OPEN Floating<T>(c, a, b, d);
  s.Store();
}

// half sources, float destination
KERNEL(arithmetic_mixed) {
  Buffers s(c, src0, src1, src2, dst);
  const auto a = s.Get<half>(0), b = s.Get<half>(1);
  const auto d = s.Get<float>(3);
  if (c.op == 19) {
    const UnaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]);
    const half scalar = c.scalar;
    FORMS(float, Axpy(d, a, scalar, c.count), Axpy(d, a, scalar, mask, c.repeat, p),
          (Axpy<float, half, false>(d, a, scalar, MASK_PLACEHOLDER, c.repeat, p)))
  } else {
    const BinaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3], c.strides[4], c.strides[5]);
    FORMS(float, MulAddDst(d, a, b, c.count), MulAddDst(d, a, b, mask, c.repeat, p),
          (MulAddDst<float, half, false>(d, a, b, MASK_PLACEHOLDER, c.repeat, p)))
  }
  s.Store();
}

template <typename T>
__aicore__ inline void Shifts(const Case& c, LocalTensor<T> a, LocalTensor<T> d) {
  const T scalar = static_cast<T>(c.scalar);
  const UnaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]);
  switch (c.op) {
    case 21:
      SCALAR(ShiftLeft)
    case 22:
      FORMS(T, ShiftRight(d, a, scalar, c.count), ShiftRight(d, a, scalar, mask, c.repeat, p, c.flag != 0),
            (ShiftRight<T, false>(d, a, scalar, MASK_PLACEHOLDER, c.repeat, p, c.flag != 0)))
      break;
  }
}

template <typename T>
__aicore__ inline void Bits(const Case& c, LocalTensor<T> a, LocalTensor<T> b, LocalTensor<T> d) {
  Shifts(c, a, d);
  switch (c.op) {
    case 23:
      BINARY(And)
    case 24:
      BINARY(Or)
    case 25:
      UNARY(Not)
  }
}

KERNEL(arithmetic_int16) {
  using T = int16_t;
  OPEN if (!Common<T>(c, a, b, d)) {
    Bits<T>(c, a, b, d);
  }
  s.Store();
}

KERNEL(arithmetic_uint16) {
  using T = uint16_t;
  OPEN Bits<T>(c, a, b, d);
  s.Store();
}

KERNEL(arithmetic_int32) {
  using T = int32_t;
  OPEN if (!Common<T>(c, a, b, d)) {
    Shifts<T>(c, a, d);
    if (c.op == 16) {
      const UnaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]);
      FORMS(T, Relu(d, a, c.count), Relu(d, a, mask, c.repeat, p),
            (Relu<T, false>(d, a, MASK_PLACEHOLDER, c.repeat, p)))
    }
  }
  s.Store();
}
