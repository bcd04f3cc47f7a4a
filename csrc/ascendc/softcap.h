// The softcap, c tanh(x / c), on fp32 numbers in UB by the vector unit, and its derivative.
//
// Near 0 tanh y = y + y^3 P(y^2), with the coefficients of Cephes' tanhf (S. L. Moshier); further out it is
// 1 - 2 / (exp(2 y) + 1), which does not cancel there. Within 1.6 units in the last place, if exp is. NaN is no number
// near 0, and stays; infinities become c and -c.
#pragma once

#include "ascendc/row_kernel.h"

namespace npu_xent {

class Softcap {
 public:
  __aicore__ inline explicit Softcap(const XentArgs& args) : cap_(args.softcap) {}

  __aicore__ inline bool IsOn() const { return cap_ != 0.0f; }

  // Scratch: two times `size` numbers, a multiple of 64, and a bit for each of `size`. Free between calls.
  __aicore__ inline void Allocate(const LocalTensor<float>& a, const LocalTensor<float>& b,
                                  const LocalTensor<uint8_t>& mask, int64_t size) {
    a_ = a;
    b_ = b;
    mask_ = mask;
    size_ = size;
  }

  // x = z = c tanh(x / c) for n numbers; those behind them, up to a multiple of 64, are overwritten.
  __aicore__ inline void Apply(const LocalTensor<float>& x, int64_t n) const {
    Ratio(x, n);
    AscendC::Muls(x, x, cap_, n);
    PipeBarrier<PIPE_V>();
  }
  // And deficit = (z / c)^2, by which the slope of z, its derivative, is less than 1; it may be the scratch.
  __aicore__ inline void Apply(const LocalTensor<float>& x, const LocalTensor<float>& deficit, int64_t n) const {
    Ratio(x, n);
    AscendC::Mul(deficit, x, x, n);
    PipeBarrier<PIPE_V>();
    AscendC::Muls(x, x, cap_, n);
    PipeBarrier<PIPE_V>();
  }
  // The same from z.
  __aicore__ inline void DeficitOf(const LocalTensor<float>& z, const LocalTensor<float>& deficit, int64_t n) const {
    AscendC::Muls(deficit, z, 1.0f / cap_, n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(deficit, deficit, deficit, n);
    PipeBarrier<PIPE_V>();
  }
  // y times the slope; `deficit` is overwritten. No barrier behind.
  __aicore__ inline void MultiplyBySlope(const LocalTensor<float>& y, const LocalTensor<float>& deficit,
                                         int64_t n) const {
    AscendC::Mul(deficit, deficit, y, n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(y, y, deficit, n);
  }
  // The slope where z has this value, 1 without a softcap; on the scalar unit.
  __aicore__ inline float SlopeAt(float z) const { return IsOn() ? (1.0f - z / cap_) * (1.0f + z / cap_) : 1.0f; }

 private:
  static constexpr float kNear = 0.625f;

  // x = tanh(x / c)
  __aicore__ inline void Ratio(const LocalTensor<float>& x, int64_t n) const {
    const int64_t whole = round_up(n, kLanes);  // as a comparison takes them
    if (n != whole) {
      PadTail(x, n, whole, 0.0f);
    }
    AscendC::Muls(x, x, 1.0f / cap_, n);
    PipeBarrier<PIPE_V>();
    for (int64_t i = 0; i < whole; i += size_) {
      Tanh(x[i], smaller(size_, whole - i));
    }
  }

  // x = tanh x, n numbers, a multiple of 64.
  __aicore__ inline void Tanh(const LocalTensor<float>& x, int64_t n) const {
    AscendC::Mul(a_, x, x, n);
    PipeBarrier<PIPE_V>();
    AscendC::CompareScalar(mask_, a_, kNear * kNear, AscendC::CMPMODE::LT, n);
    AscendC::Muls(b_, a_, -5.70498872745e-3f, n);
    PipeBarrier<PIPE_V>();
    NextTerm(2.06390887954e-2f, n);
    NextTerm(-5.37397155531e-2f, n);
    NextTerm(1.33314422036e-1f, n);
    NextTerm(-3.33332819422e-1f, n);
    AscendC::Mul(b_, b_, x, n);
    AscendC::Muls(a_, x, 2.0f, n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(b_, b_, x, n);
    AscendC::Exp(a_, a_, n);
    PipeBarrier<PIPE_V>();
    AscendC::Duplicate(x, -2.0f, n);
    AscendC::Adds(a_, a_, 1.0f, n);
    PipeBarrier<PIPE_V>();
    AscendC::Div(a_, x, a_, n);
    PipeBarrier<PIPE_V>();
    AscendC::Adds(a_, a_, 1.0f, n);
    PipeBarrier<PIPE_V>();
    AscendC::Select(x, mask_, b_, a_, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, n);
    PipeBarrier<PIPE_V>();
  }
  // b = (b + coefficient) a
  __aicore__ inline void NextTerm(float coefficient, int64_t n) const {
    AscendC::Adds(b_, b_, coefficient, n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(b_, b_, a_, n);
    PipeBarrier<PIPE_V>();
  }

  const float cap_;
  int64_t size_ = 0;
  LocalTensor<float> a_, b_;
  LocalTensor<uint8_t> mask_;
};

}  // namespace npu_xent
