// The gradient of a tile of short rows, all but its rounding: coefficients a lane a row, then the whole tile.
#pragma once

#include "ascendc/short_tile.h"

namespace npu_xent {

class ShortGradient {
 public:
  __aicore__ inline explicit ShortGradient(const XentArgs& args) : args_(args) {}

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
    } else {
      AscendC::Mul(v[kScratch], v[kGradZ], v[kLse], n);
    }
    PipeBarrier<PIPE_V>();
    AscendC::Muls(v[kB], v[kB], u * args_.target_share, n);
    if (args_.adds_to_a == 0) {
      AscendC::Muls(v[kScratch], v[kScratch], u * 2.0f * args_.lse_square_scale, n);
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
    PipeBarrier<PIPE_V>();
    AscendC::Sub(v[kScale], v[kScale], v[kLseLow], n);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(v[kScale], v[kScale], n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(v[kScale], v[kScale], v[kA], n);
    ProbabilityLessOne(v, n);
    // a (p - 1) + (a - b) - s w
    AscendC::Mul(v[kAtTarget], v[kAtTarget], v[kA], n);
    AscendC::Sub(v[kMore], v[kA], v[kB], n);
    AscendC::Mul(v[kScratch], v[kOffset], v.SetLane(kWeightOf, f), n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(v[kAtTarget], v[kAtTarget], v[kMore], n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(v[kAtTarget], v[kAtTarget], v[kScratch], n);
    if (v.softcap.IsOn()) {
      PipeBarrier<PIPE_V>();
      v.softcap.DeficitOf(v[kPicked], v[kScratch], n);
      v.softcap.MultiplyBySlope(v[kAtTarget], v[kScratch], n);
    }
  }

  // `grad`, from exponentials in `exps`: kScale of them, less kOffset w, and kAtTarget at the target.
  __aicore__ inline void Make(const ShortTile& v, const LocalTensor<float>& grad, const TileFacts& f) const {
    const int64_t n = f.rows;
    v.MulLanes(v.exps, v.exps, v[kScale], n);
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
  Upstream upstream_{};
};

}  // namespace npu_xent
