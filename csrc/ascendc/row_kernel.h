// What the row kernels have in common: their tensors in global memory (GM), scalar arithmetic, and vector operations on
// fp32 in the unified buffer (UB).
//
// The kernels are right without the compiler's automatic synchronisation: every order between two pipes is a flag, and
// every dependence between two vector instructions a PipeBarrier<PIPE_V>.
#pragma once

#include "kernel_operator.h"
// After the toolkit's header, which tells them that device code is being compiled.
#include "tiling/row_args.h"
#include "tiling/row_plan.h"

namespace npu_xent {

using AscendC::GlobalTensor;
using AscendC::HardEvent;
using AscendC::LocalTensor;
using AscendC::PipeBarrier;
using AscendC::SetFlag;
using AscendC::WaitFlag;

constexpr float kFloatMax = 3.402823466e+38f;
constexpr uint64_t kEverySecond = 0x5555555555555555ull;  // the even lanes

// GM_ADDR is a macro that ends in a star: one name a line. Where a launch's tensors are; null for what it does not use.
// row_math.h has the meaning.
struct RowTensors {
  GM_ADDR logits;
  GM_ADDR target;
  GM_ADDR weight;
  GM_ADDR totals;
  GM_ADDR lse;  // results of a sweep with statistics, else operands
  GM_ADDR lse_low;
  GM_ADDR picked;
  GM_ADDR wsum;
  GM_ADDR part_weight;
  GM_ADDR grad_loss;
  GM_ADDR grad_z_loss;
  GM_ADDR output;  // log_prob or the gradient
};

enum class Output { none, log_prob, grad };

// The order of the totals, as in row_math.h.
constexpr uint64_t kKeptWeight = 0, kKeptRows = 1, kClassWeight = 2;
constexpr int64_t kReductionNone = 0, kReductionMean = 1;

__aicore__ inline float FloatOfBits(uint32_t bits) {
  union {
    uint32_t from;
    float to;
  } value;
  value.from = bits;
  return value.to;
}
__aicore__ inline float NaN() {
  return FloatOfBits(0x7fc00000u);
}
__aicore__ inline uint32_t BitsOf(float x) {
  union {
    float from;
    uint32_t to;
  } value;
  value.from = x;
  return value.to;
}

// The scalar unit may be set up to report infinities, NaN and divisions by 0 as errors: they are told by their bits and
// kept away from its arithmetic. (The vector unit has no such setting.)
__aicore__ inline bool IsFinite(float x) {
  return (BitsOf(x) & 0x7f800000u) != 0x7f800000u;
}
__aicore__ inline bool IsNaN(float x) {
  return (BitsOf(x) & 0x7fffffffu) > 0x7f800000u;
}
// a + b
__aicore__ inline float SumOfTwo(float a, float b) {
  if (IsFinite(a) && IsFinite(b)) {
    return a + b;
  }
  if (IsFinite(a) || IsFinite(b)) {
    return IsFinite(a) ? b : a;
  }
  return BitsOf(a) == BitsOf(b) ? a : NaN();  // infinities of one sign, or not
}
// a / b for what a mean divides by: NaN where that is 0, a mean over nothing.
__aicore__ inline float Quotient(float a, float b) {
  if ((BitsOf(b) & 0x7fffffffu) == 0 || !IsFinite(b)) {
    return NaN();
  }
  return IsFinite(a) ? a / b : a;
}
// a b, b finite
__aicore__ inline float Product(float a, float b) {
  if (IsFinite(a)) {
    return a * b;
  }
  return b == 0.0f || IsNaN(a) ? NaN() : FloatOfBits(BitsOf(a) ^ (BitsOf(b) & 0x80000000u));
}
// Between the finite bounds of fp32, and 0 for NaN.
__aicore__ inline float Bounded(float x) {
  return IsFinite(x) ? x : IsNaN(x) ? 0.0f : BitsOf(x) >> 31 != 0 ? -kFloatMax : kFloatMax;
}

// One stored number as fp32, on the scalar unit.
__aicore__ inline float ScalarOf(const LocalTensor<float>& x, uint32_t i) {
  return x.GetValue(i);
}
__aicore__ inline float ScalarOf(const LocalTensor<half>& x, uint32_t i) {
  return static_cast<float>(x.GetValue(i));
}
__aicore__ inline float ScalarOf(const LocalTensor<bfloat16_t>& x, uint32_t i) {
  // bfloat16 is the upper half of fp32.
  return FloatOfBits(static_cast<uint32_t>(x.ReinterpretCast<uint16_t>().GetValue(i)) << 16);
}

// exp(x) - 1 for -0.5 <= x <= 0, by its series: the scalar unit has no exp. The first term left out is below 2^-36.
__aicore__ inline float Expm1NearZero(float x) {
  float sum = 1.0f + x * (1.0f / 10);
  for (int32_t k = 9; k > 1; --k) {
    sum = 1.0f + x * sum / static_cast<float>(k);
  }
  return x * sum;
}

// high + low = a + b exactly (Knuth), high the rounded sum; low is 0 when the sum is not finite.
struct TwoFloats {
  float high, low;
};
__aicore__ inline TwoFloats TwoSum(float a, float b) {
  TwoFloats sum;
  sum.high = SumOfTwo(a, b);
  if (!IsFinite(a) || !IsFinite(b)) {
    sum.low = 0.0f;
    return sum;
  }
  const float b_rounded = sum.high - a;
  sum.low = IsFinite(sum.high) ? (a - (sum.high - b_rounded)) + (b - b_rounded) : 0.0f;
  return sum;
}

// n numbers from GM to UB, and back; any n and any GM address.
template <typename T>
__aicore__ inline void CopyIn(const LocalTensor<T>& to, const GlobalTensor<T>& from, int64_t n) {
  const AscendC::DataCopyExtParams copy{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0};
  AscendC::DataCopyPad(to, from, copy, AscendC::DataCopyPadExtParams<T>{false, 0, 0, static_cast<T>(0)});
}
template <typename T>
__aicore__ inline void CopyOut(const GlobalTensor<T>& to, const LocalTensor<T>& from, int64_t n) {
  AscendC::DataCopyPad(to, from, AscendC::DataCopyExtParams{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0});
}

// The bits of lanes [from, 64).
__aicore__ inline uint64_t LanesFrom(uint64_t from) {
  return ~uint64_t{0} << from;
}

// x[n : padded] = value, so that the instructions that follow need no tail; padded is a multiple of 64.
__aicore__ inline void PadTail(const LocalTensor<float>& x, int64_t n, int64_t padded, float value) {
  const int64_t whole = round_up(n, kLanes);
  if (n != whole) {
    uint64_t mask[2] = {LanesFrom(n % kLanes), 0};
    AscendC::Duplicate(x[whole - kLanes], value, mask, 1, 1, 8);
  }
  if (whole != padded) {
    AscendC::Duplicate(x[whole], value, padded - whole);
  }
}

// The two reductions, as the instructions that they are made of: of each data block of `repeats` times 64 numbers, of
// each repeat, and of two vectors. A repeat of `src` begins `stride` data blocks after the one before; results are
// dense.
struct Maximum {
  static __aicore__ inline void OfBlocks(const LocalTensor<float>& out, const LocalTensor<float>& src, int64_t repeats,
                                         int64_t mask, int64_t stride) {
    AscendC::BlockReduceMax(out, src, repeats, mask, 1, 1, stride);
  }
  static __aicore__ inline void OfRepeats(const LocalTensor<float>& out, const LocalTensor<float>& src, int64_t repeats,
                                          int64_t mask, int64_t stride) {
    AscendC::WholeReduceMax(out, src, mask, repeats, 1, 1, stride, AscendC::ReduceOrder::ORDER_ONLY_VALUE);
  }
  static __aicore__ inline void OfTwo(const LocalTensor<float>& out, const LocalTensor<float>& a,
                                      const LocalTensor<float>& b, int64_t n) {
    AscendC::Max(out, a, b, n);
  }
};
struct Total {
  static __aicore__ inline void OfBlocks(const LocalTensor<float>& out, const LocalTensor<float>& src, int64_t repeats,
                                         int64_t mask, int64_t stride) {
    AscendC::BlockReduceSum(out, src, repeats, mask, 1, 1, stride);
  }
  static __aicore__ inline void OfRepeats(const LocalTensor<float>& out, const LocalTensor<float>& src, int64_t repeats,
                                          int64_t mask, int64_t stride) {
    AscendC::WholeReduceSum(out, src, mask, repeats, 1, 1, stride);
  }
  static __aicore__ inline void OfTwo(const LocalTensor<float>& out, const LocalTensor<float>& a,
                                      const LocalTensor<float>& b, int64_t n) {
    AscendC::Add(out, a, b, n);
  }
};

// out[0] = the reduction of n numbers, a multiple of kChunkUnit up to kMaxChunk. Block reductions take one cycle for 64
// numbers, reductions of whole repeats several. `reduced`: scratch, n / 8 + 64 numbers. Sums are made by trees.
template <typename Reduction>
__aicore__ inline void Reduce(const LocalTensor<float>& out, const LocalTensor<float>& reduced,
                              const LocalTensor<float>& x, int64_t n) {
  const LocalTensor<float> again = reduced[kMaxChunk / kBlock];
  const int64_t repeats = n / kLanes;
  Reduction::OfBlocks(reduced, x, repeats, kLanes, kBlock);
  PipeBarrier<PIPE_V>();
  Reduction::OfBlocks(again, reduced, repeats / kBlock, kLanes, kBlock);
  PipeBarrier<PIPE_V>();
  Reduction::OfRepeats(out, again, 1, repeats, kBlock);
}

// Element `element` of a tensor in GM and what follows.
template <typename T>
__aicore__ inline GlobalTensor<T> Gm(GM_ADDR base, int64_t element) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(base) + element);
  return tensor;
}

// What reaches all rows alike: G and Z of row_math.h, if not a row at a time, and the sum of the class weights (0 where
// no term has it).
struct Upstream {
  float loss, z, class_weight;
};
__aicore__ inline Upstream ReadUpstream(const XentArgs& args, const RowTensors& gm) {
  Upstream up{0.0f, 0.0f, 0.0f};
  const GlobalTensor<float> totals = Gm<float>(gm.totals, 0);
  if (args.class_share != 0.0f) {
    up.class_weight = totals.GetValue(kClassWeight);
  }
  if (args.reduction == kReductionNone) {
    return up;
  }
  const bool mean = args.reduction == kReductionMean;
  up.loss = args.unit_upstream != 0 ? 1.0f : gm.grad_loss != nullptr ? Gm<float>(gm.grad_loss, 0).GetValue(0) : 0.0f;
  if (args.lse_square_scale != 0.0f) {
    const float from_z = gm.grad_z_loss != nullptr ? Gm<float>(gm.grad_z_loss, 0).GetValue(0) : 0.0f;
    up.z = SumOfTwo(up.loss, from_z);
    up.z = mean ? Quotient(up.z, totals.GetValue(kKeptRows)) : up.z;
  }
  up.loss = mean ? Quotient(up.loss, totals.GetValue(kKeptWeight)) : up.loss;
  return up;
}

// What a target is: ignored; a class of some shard; or neither, which makes its row NaN.
__aicore__ inline bool IsIgnored(const XentArgs& args, int64_t target) {
  return target == args.ignore_index;
}
__aicore__ inline bool IsKept(const XentArgs& args, int64_t target) {
  return !IsIgnored(args, target) && target >= 0 && target < args.num_classes;
}
__aicore__ inline bool IsBad(const XentArgs& args, int64_t target) {
  return !IsIgnored(args, target) && !IsKept(args, target);
}

// u a, u b and u s of row_math.h, on the scalar unit.
struct Coefficients {
  float a, b, s;
};
__aicore__ inline Coefficients MakeCoefficients(const XentArgs& args, float weight, const Upstream& up, float lse) {
  Coefficients k;
  k.b = up.loss * args.target_share * weight;
  k.a = k.b + up.loss * args.class_share * up.class_weight + up.z * 2.0f * args.lse_square_scale * lse;
  k.s = up.loss * args.class_share;
  k.a *= args.grad_scale;
  k.b *= args.grad_scale;
  k.s *= args.grad_scale;
  return k;
}

}  // namespace npu_xent
