// Shared by the row kernels: their tensors in global memory (GM), the meaning of targets and upstream gradients,
// copies, and vector operations on fp32 in the unified buffer (UB).
//
// The kernels do not rely on the compiler's automatic synchronisation: a flag (flags.h) makes every order between two
// pipes, and PipeBarrier<PIPE_V> every order between two vector instructions.
#pragma once

#include "ascendc/flags.h"
#include "ascendc/scalar_math.h"
#include "kernel_operator.h"
// After the toolkit's header, by whose __aicore__ they know that this is device code.
#include "tiling/row_args.h"
#include "tiling/row_plan.h"

namespace npu_xent {

using AscendC::GlobalTensor;
using AscendC::HardEvent;
using AscendC::LocalTensor;
using AscendC::PipeBarrier;
using AscendC::SetFlag;
using AscendC::WaitFlag;

template <typename T>
constexpr bool kIsFp32 = sizeof(T) == sizeof(float);
// Numbers of a data block.
template <typename T>
constexpr int64_t kBlockOf = kDataBlock / sizeof(T);

// Memory that the kernels divide up themselves, by the offsets of row_plan.h.
using UnifiedBuffer = AscendC::TBuf<AscendC::TPosition::VECCALC>;

// Addresses of a launch's tensors, null for those that it does not use. row_math.h explains them. (GM_ADDR is a macro
// that ends in a star: one name a line.)
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
  GM_ADDR row_scale;
  GM_ADDR entropy;  // a result of a sweep with statistics, else an operand
  GM_ADDR grad_entropy;
  GM_ADDR top1;  // 1 or 0 (RowStatistics)
};

enum class Output { none, log_prob, grad };

__aicore__ inline bool ReductionIs(const XentArgs& args, Reduction reduction) {
  return args.reduction == static_cast<int64_t>(reduction);
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

// The two operations that vectors are reduced by, as three instructions each: on every data block of `repeats` times 64
// numbers, on every repeat, and on two vectors. Repeats of `src` begin `stride` data blocks apart; results are dense.
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

// out[0] = the reduction of n numbers; n is a multiple of kChunkUnit up to kMaxChunk. Block reductions take one cycle
// for 64 numbers, reductions of whole repeats several. `reduced` is scratch for n / 8 + 64 numbers. Sums are tree sums.
template <typename Operation>
__aicore__ inline void Reduce(const LocalTensor<float>& out, const LocalTensor<float>& reduced,
                              const LocalTensor<float>& x, int64_t n) {
  const LocalTensor<float> again = reduced[kMaxChunk / kBlock];
  const int64_t repeats = n / kLanes;
  Operation::OfBlocks(reduced, x, repeats, kLanes, kBlock);
  PipeBarrier<PIPE_V>();
  Operation::OfBlocks(again, reduced, repeats / kBlock, kLanes, kBlock);
  PipeBarrier<PIPE_V>();
  Operation::OfRepeats(out, again, 1, repeats, kBlock);
}

// out = x between the finite bounds of fp32, so that exp(x - out) is no NaN when both are infinite.
__aicore__ inline void BoundVector(const LocalTensor<float>& out, const LocalTensor<float>& x, int64_t n) {
  AscendC::Maxs(out, x, -kFloatMax, n);
  PipeBarrier<PIPE_V>();
  AscendC::Mins(out, out, kFloatMax, n);
  PipeBarrier<PIPE_V>();
}

// Whether the stored logits can be used as they are: they are fp32, and neither scaled nor capped.
template <typename T>
__aicore__ inline bool IsScaledAlready(const XentArgs& args) {
  return kIsFp32<T> && args.logit_scale == 1.0f && args.softcap == 0.0f && args.row_scaled == 0;
}
// n logits times `scale` in fp32: in `logits` if IsScaledAlready, else in `work`, and then a barrier has to follow. The
// softcap is applied later.
template <typename T>
__aicore__ inline LocalTensor<float> ScaledLogits(const LocalTensor<T>& logits, const LocalTensor<float>& work,
                                                  const XentArgs& args, float scale, int64_t n) {
  if constexpr (kIsFp32<T>) {
    if (IsScaledAlready<T>(args)) {
      return logits;
    }
    AscendC::Muls(work, logits, scale, n);
  } else {
    AscendC::Cast(work, logits, AscendC::RoundMode::CAST_NONE, n);
    if (scale != 1.0f) {
      PipeBarrier<PIPE_V>();
      AscendC::Muls(work, work, scale, n);
    }
  }
  return work;
}

// x, or a number whose exponential is 0 too: x may be -inf, and -inf * 0 would be NaN.
constexpr float kFiniteLog = -128.0f;

// Where an output is computed in fp32: in place, or in `work`, from which RoundOutput takes it.
template <typename T>
__aicore__ inline LocalTensor<float> Fp32Of(const LocalTensor<T>& out, const LocalTensor<float>& work) {
  if constexpr (kIsFp32<T>) {
    return out;
  } else {
    return work;
  }
}
template <typename T>
__aicore__ inline void RoundOutput(const LocalTensor<T>& out, const LocalTensor<float>& work, int64_t n) {
  if constexpr (!kIsFp32<T>) {
    AscendC::Cast(out, work, AscendC::RoundMode::CAST_RINT, n);
  }
}

// A tensor in GM from element `element` on.
template <typename T>
__aicore__ inline GlobalTensor<T> Gm(GM_ADDR base, int64_t element) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(base) + element);
  return tensor;
}

// The same for all rows: G and Z of row_math.h, unless there is one for each row, and the sum of the class weights (0
// if no term needs it). With adds_to_a, z is what is added to a.
struct Upstream {
  float loss, z, class_weight;
};
__aicore__ inline Upstream ReadUpstream(const XentArgs& args, const RowTensors& gm) {
  Upstream up{0.0f, 0.0f, 0.0f};
  const GlobalTensor<float> totals = Gm<float>(gm.totals, 0);
  if (args.class_share != 0.0f) {
    up.class_weight = totals.GetValue(kClassWeight);
  }
  if (ReductionIs(args, Reduction::none)) {
    return up;
  }
  const bool mean = ReductionIs(args, Reduction::mean);
  up.loss = args.unit_upstream != 0 ? 1.0f : gm.grad_loss != nullptr ? Gm<float>(gm.grad_loss, 0).GetValue(0) : 0.0f;
  if (args.lse_square_scale != 0.0f) {
    const float from_z = gm.grad_z_loss != nullptr ? Gm<float>(gm.grad_z_loss, 0).GetValue(0) : 0.0f;
    up.z = SumOfTwo(up.loss, from_z);
    up.z = mean ? Quotient(up.z, totals.GetValue(kKeptRows)) : up.z;
  }
  // Not 0 / 0: only the gradient of a mean loss over no weight is undefined.
  const bool has_loss = args.unit_upstream != 0 || gm.grad_loss != nullptr;
  up.loss = mean && has_loss ? Quotient(up.loss, totals.GetValue(kKeptWeight)) : up.loss;
  return up;
}

// A target is ignored, kept (a class of some shard), none (kNoTarget), or bad, which makes its row NaN.
__aicore__ inline bool IsIgnored(const XentArgs& args, int64_t target) {
  return target == args.ignore_index;
}
__aicore__ inline bool IsKept(const XentArgs& args, int64_t target) {
  return !IsIgnored(args, target) && target >= 0 && target < args.num_classes;
}
__aicore__ inline bool IsBad(const XentArgs& args, int64_t target) {
  return !IsIgnored(args, target) && !IsKept(args, target) && !(args.adds_to_a != 0 && target == kNoTarget);
}
// The column of a target that is a class of this shard, else -1.
__aicore__ inline int64_t ColumnOf(const XentArgs& args, int64_t target) {
  const bool here = IsKept(args, target) && target >= args.class_start && target - args.class_start < args.cols;
  return here ? target - args.class_start : -1;
}

// to[r * kBlock] = the class weight of row r, for the scalar unit, if its target is a class. Copies can overlap; scalar
// reads of GM would wait for each other.
__aicore__ inline void CopyTargetWeights(const LocalTensor<float>& to, GM_ADDR weight, const XentArgs& args,
                                         const LocalTensor<int64_t>& target, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = target.GetValue(r);
    if (IsKept(args, y)) {
      CopyIn(to[r * kBlock], Gm<float>(weight, y), 1);
    }
  }
  SetFlag<HardEvent::MTE2_S>(kTargetWeightsFlag);
  WaitFlag<HardEvent::MTE2_S>(kTargetWeightsFlag);
}

// u a, u b and u s of row_math.h, on the scalar unit.
struct Coefficients {
  float a, b, s;
};
__aicore__ inline Coefficients MakeCoefficients(const XentArgs& args, float weight, const Upstream& up, float lse,
                                                float row_scale) {
  Coefficients k;
  k.b = up.loss * args.target_share * weight;
  const float added = args.adds_to_a != 0 ? up.z : up.z * 2.0f * args.lse_square_scale * lse;
  k.a = k.b + up.loss * args.class_share * up.class_weight + added;
  k.s = up.loss * args.class_share;
  const float u = args.grad_scale * row_scale;
  k.a *= u;
  k.b *= u;
  k.s *= u;
  return k;
}

}  // namespace npu_xent
