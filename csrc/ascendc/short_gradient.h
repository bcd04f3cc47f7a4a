// The gradient of a tile of short rows, all but its rounding: coefficients a lane a row, then the whole tile.
#pragma once

#include "ascendc/short_tile.h"

namespace npu_xent {

class ShortGradient {
 public:
  __aicore__ inline ShortGradient(const XentArgs& args, const RowTensors& tensors)
      : args_(args), row_scaled_(tensors.row_scale != nullptr), tilted_(tensors.grad_entropy != nullptr) {}

  // Whether the entropy has a gradient.
  __aicore__ inline bool HasTilt() const { return tilted_; }

  // What all rows share, into lanes.
  __aicore__ inline void Prepare(const ShortTile& v, const Upstream& upstream) {
    upstream_ = upstream;
    AscendC::Duplicate(v[kGradLoss], upstream_.loss, v.lane_count);
    AscendC::Duplicate(v[kGradZ], upstream_.z, v.lane_count);
  }

  // u a, u b, u s of row_math.h; kScale, the factor of the exponentials; kAtTarget, the gradient of the target's logit.
  __aicore__ inline void RowCoefficients(const ShortTile& v, const TileFacts& f) const {
    const int64_t n = f.rows;
    const float u = args_.grad_scale;
    AscendC::Mul(v[kB], v[kGradLoss], v.SetLane(kWeightOf, f), n);
    AscendC::Muls(v[kOffset], v[kGradLoss], u * args_.class_share, n);
    AscendC::Muls(v[kA], v[kGradLoss],
                  IsFinite(upstream_.class_weight) ? u * args_.class_share * upstream_.class_weight : NaN(), n);
    if (args_.adds_to_a != 0) {
      AscendC::Muls(v[kScratch], v[kGradZ], u, n);
    } else {  // the smaller factors first: the product of the others may overflow
      AscendC::Muls(v[kScratch], v[kLse], u * 2.0f * args_.lse_square_scale, n);
    }
    PipeBarrier<PIPE_V>();
    AscendC::Muls(v[kB], v[kB], u * args_.target_share, n);
    if (args_.adds_to_a == 0) {
      AscendC::Mul(v[kScratch], v[kScratch], v[kGradZ], n);
    }
    AscendC::Sub(v[kMore], v[kLse], v[kLse], n);  // NaN where lse is not finite, else 0
    PipeBarrier<PIPE_V>();
    AscendC::Add(v[kA], v[kA], v[kB], n);
    AscendC::Add(v[kScratch], v[kScratch], v[kMore], n);
    if (f.any_bad) {
      PipeBarrier<PIPE_V>();
      AscendC::Add(v[kScratch], v[kScratch], v.SetLane(kBadOf, f), n);
    }
    PipeBarrier<PIPE_V>();
    AscendC::Add(v[kA], v[kA], v[kScratch], n);
    AscendC::Sub(v[kScale], v[kMax], v[kLse], n);
    if (tilted_) {
      AscendC::Muls(v[kTilt], v[kTilt], -u, n);
    }
    PipeBarrier<PIPE_V>();
    if (row_scaled_) {
      AscendC::Mul(v[kA], v[kA], v[kRowScale], n);
      AscendC::Mul(v[kB], v[kB], v[kRowScale], n);
      AscendC::Mul(v[kOffset], v[kOffset], v[kRowScale], n);
      if (tilted_) {
        AscendC::Mul(v[kTilt], v[kTilt], v[kRowScale], n);
      }
    }
    AscendC::Sub(v[kScale], v[kScale], v[kLseLow], n);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(v[kScale], v[kScale], n);
    PipeBarrier<PIPE_V>();
    if (tilted_) {
      ScaleAndTilt(v, n);
    } else {
      AscendC::Mul(v[kScale], v[kScale], v[kA], n);
    }
    ProbabilityLessOne(v, n);
    if (tilted_) {
      TargetTilt(v, n);
    }
    // a (p - 1) + (a - b) - s w
    AscendC::Mul(v[kAtTarget], v[kAtTarget], v[kA], n);
    AscendC::Sub(v[kMore], v[kA], v[kB], n);
    AscendC::Mul(v[kScratch], v[kOffset], v.SetLane(kWeightOf, f), n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(v[kAtTarget], v[kAtTarget], v[kMore], n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(v[kAtTarget], v[kAtTarget], v[kScratch], n);
    if (tilted_) {
      PipeBarrier<PIPE_V>();
      AscendC::Add(v[kAtTarget], v[kAtTarget], v[kSum], n);
    }
    if (v.softcap.IsOn()) {
      PipeBarrier<PIPE_V>();
      if (row_scaled_) {
        AscendC::Div(v[kPicked], v[kPicked], v[kRowScale], n);
        PipeBarrier<PIPE_V>();
      }
      v.softcap.DeficitOf(v[kPicked], v[kScratch], n);
      v.softcap.MultiplyBySlope(v[kAtTarget], v[kScratch], n);
    }
  }

  // exps = (kScale + kTilt (x - lse)) exp(x - lse), from x - lse in `exps` and its exponentials. Barriers precede, in
  // RowCoefficients, and follow, in Make.
  __aicore__ inline void Tilt(const ShortTile& v, const LocalTensor<float>& exponentials, const TileFacts& f) const {
    const int64_t n = f.rows;
    AscendC::Maxs(v.exps, v.exps, kFiniteLog, n * v.padded);
    v.MulLanes(v.exps, v.exps, v[kTilt], n);
    v.AddLanes(v.exps, v.exps, v[kScale], n);
    AscendC::Mul(v.exps, v.exps, exponentials, n * v.padded);
  }

  // `grad`, from exponentials in `exps`: kScale of them (or what Tilt made), less kOffset w, and kAtTarget at the
  // target.
  __aicore__ inline void Make(const ShortTile& v, const LocalTensor<float>& grad, const TileFacts& f) const {
    const int64_t n = f.rows;
    if (!tilted_) {
      v.MulLanes(v.exps, v.exps, v[kScale], n);
    }
    if (args_.class_share != 0.0f) {
      // less s w
      v.Spread(v[kOffset], n);
      for (int64_t j = 0; j < v.PaddedBlocks(); ++j) {
        AscendC::Mul(v.x[j * kLanes], v.weight[j * kLanes], v.block, v.PaddedWidth(j), n,
                     AscendC::BinaryRepeatParams(1, 1, 0, v.RowStride(), 0, 1));
      }
      PipeBarrier<PIPE_V>();
      AscendC::Sub(v.exps, v.exps, v.x, n * v.padded);
    }
    if (v.softcap.IsOn()) {
      PipeBarrier<PIPE_V>();
      v.softcap.MultiplyBySlope(v.exps, v.deficit, n * v.padded);
    }
    v.Spread(v[kAtTarget], n);
    for (int64_t j = 0; j < v.PaddedBlocks(); ++j) {
      AscendC::Select(grad[j * kLanes], v.Hot(j), v.block, v.exps[j * kLanes],
                      AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, v.PaddedWidth(j), n,
                      AscendC::BinaryRepeatParams(1, 0, 1, v.RowStride(), 1, v.RowStride()));
    }
    PipeBarrier<PIPE_V>();
  }

 private:
  // With h the gradient of the entropy H: kScale = e (a - u h (H - lse_low)), kTilt = -u h e, e = exp(-lse_low) in
  // kScale.
  __aicore__ inline void ScaleAndTilt(const ShortTile& v, int64_t n) const {
    AscendC::Sub(v[kScratch], v[kEntropy], v[kLseLow], n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(v[kScratch], v[kScratch], v[kTilt], n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(v[kScratch], v[kScratch], v[kA], n);
    AscendC::Mul(v[kTilt], v[kTilt], v[kScale], n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(v[kScale], v[kScale], v[kScratch], n);
    PipeBarrier<PIPE_V>();
  }
  // kSum = -u h p (picked - lse - lse_low + H), from picked - lse - lse_low in kScratch. The exponential is made
  // without lse_low, which kTilt has; p - 1 in kAtTarget would cost a small p its digits.
  __aicore__ inline void TargetTilt(const ShortTile& v, int64_t n) const {
    AscendC::Sub(v[kSum], v[kPicked], v[kLse], n);
    AscendC::Maxs(v[kScratch], v[kScratch], kFiniteLog, n);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(v[kSum], v[kSum], n);
    AscendC::Add(v[kScratch], v[kScratch], v[kEntropy], n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(v[kSum], v[kSum], v[kTilt], n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(v[kSum], v[kSum], v[kScratch], n);
    PipeBarrier<PIPE_V>();
  }

  // kAtTarget = p - 1 = exp(picked - lse) - 1, near 0 by the series of Expm1NearZero, which does not cancel.
  __aicore__ inline void ProbabilityLessOne(const ShortTile& v, int64_t n) const {
    const LocalTensor<float> below = v[kScratch], far = v[kMore], near = v[kAtTarget], z = v[kSum];
    AscendC::Sub(below, v[kPicked], v[kLse], n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(below, below, v[kLseLow], n);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(far, below, n);
    AscendC::Maxs(z, below, kNearZero, n);
    PipeBarrier<PIPE_V>();
    AscendC::Adds(far, far, -1.0f, n);
    AscendC::CompareScalar(v.mask, below, kNearZero, AscendC::CMPMODE::GT, v.lane_count);
    AscendC::Muls(near, z, 1.0f / kExpm1Terms, n);
    PipeBarrier<PIPE_V>();
    for (int32_t k = kExpm1Terms - 1; k > 0; --k) {
      // near = (1 + near) z / k
      AscendC::Adds(near, near, 1.0f, n);
      PipeBarrier<PIPE_V>();
      AscendC::Mul(near, near, z, n);
      PipeBarrier<PIPE_V>();
      if (k > 1) {
        AscendC::Muls(near, near, 1.0f / static_cast<float>(k), n);
        PipeBarrier<PIPE_V>();
      }
    }
    AscendC::Select(near, v.mask, near, far, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, n);
    PipeBarrier<PIPE_V>();
  }

  const XentArgs args_;
  const bool row_scaled_, tilted_;
  Upstream upstream_{};
};

}  // namespace npu_xent
