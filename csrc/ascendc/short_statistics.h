// Statistics of a tile of short rows: lse and lse_low, picked, wsum and the entropy, one lane a row; and the copies
// out.
#pragma once

#include "ascendc/short_tile.h"

namespace npu_xent {

class ShortStatistics {
 public:
  __aicore__ inline explicit ShortStatistics(const RowTensors& tensors)
      : gm_(tensors), has_weight_(tensors.weight != nullptr), smoothing_(tensors.wsum != nullptr) {}

  __aicore__ inline void Allocate(AscendC::TPipe& pipe) {
    // The queues take flags between the same pipes.
    ready_ = static_cast<event_t>(pipe.AllocEventID<HardEvent::V_MTE3>());
    left_ = static_cast<event_t>(pipe.AllocEventID<HardEvent::MTE3_V>());
  }
  // The sum of this shard's class weights, to the scalar unit, and there.
  __aicore__ inline void SumClassWeights(const ShortTile& v) const {
    if (!smoothing_) {
      return;
    }
    if (has_weight_) {
      const int64_t width = round_up(v.padded, kLanes);
      AscendC::Duplicate(v.floor, 0.0f, width);
      AscendC::CompareScalar(v.hot, v.weight, 0.0f, AscendC::CMPMODE::EQ, width);
      PipeBarrier<PIPE_V>();
      AscendC::Select(v.floor, v.hot, v.floor, MinusInfinity(), AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, width);
    }
    v.ReduceTile<Total>(v[kScratch], v.weight, 1);
  }
  __aicore__ inline void TakeClassWeights(const ShortTile& v) {
    if (smoothing_) {
      shard_weight_ = v[kScratch].GetValue(0);
    }
  }

  // Statistics of the tile x, logits after all scales and softcap. kPicked is known, and kTop1 if it is wanted. Leaves
  // exp(x - kMax) in `exps`; with the entropy neither that nor x.
  __aicore__ inline void Compute(const ShortTile& v, const LocalTensor<float>& x, const TileFacts& f) const {
    const int64_t n = f.rows;
    v.ReduceTile<Maximum>(v[kMax], x, n);
    // Bounded, so that rows of -inf have exponentials 0, not NaN, and +inf gives an infinite sum.
    BoundVector(v[kMax], v[kMax], n);
    v.SubLanes(v.exps, x, v[kMax], n);
    if (smoothing_) {
      WeightedSum(v, x, n);
    }
    AscendC::Exp(v.exps, v.exps, n * v.padded);
    PipeBarrier<PIPE_V>();
    v.ReduceTile<Total>(v[kSum], v.exps, n);
    if (gm_.entropy != nullptr) {
      // kEntropy = T / S, with T = sum (x - max) exp(x - max)
      v.SubLanes(x, x, v[kMax], n);
      AscendC::Maxs(x, x, kFiniteLog, n * v.padded);
      PipeBarrier<PIPE_V>();
      AscendC::Mul(v.exps, v.exps, x, n * v.padded);
      PipeBarrier<PIPE_V>();
      v.ReduceTile<Total>(v[kEntropy], v.exps, n);
      AscendC::Div(v[kEntropy], v[kEntropy], v[kSum], n);
      PipeBarrier<PIPE_V>();
    }
    LogOfSum(v, n);
    if (gm_.entropy != nullptr || gm_.top1 != nullptr) {
      FinishByRow(v, n);
    }
    if (smoothing_ && shard_weight_ != 0.0f) {
      // sum w (x - max) becomes sum w (x - lse)
      AscendC::Sub(v[kScratch], v[kMax], v[kLse], n);
      PipeBarrier<PIPE_V>();
      AscendC::Sub(v[kScratch], v[kScratch], v[kLseLow], n);
      PipeBarrier<PIPE_V>();
      AscendC::Muls(v[kScratch], v[kScratch], shard_weight_, n);
      PipeBarrier<PIPE_V>();
      AscendC::Add(v[kWsum], v[kWsum], v[kScratch], n);
    }
    if (f.any_bad) {
      AscendC::Add(v[kPicked], v[kPicked], v.SetLane(kBadOf, f), n);
    }
    if (f.any_unread) {
      AscendC::CompareScalar(v.mask, v.SetLane(kReadOf, f), 0.5f, AscendC::CMPMODE::GT, v.lane_count);
      PipeBarrier<PIPE_V>();
      DropUnread(v, v[kLse], n);
      DropUnread(v, v[kLseLow], n);
      DropUnread(v, v[kWsum], n);
      if (gm_.entropy != nullptr) {
        DropUnread(v, v[kEntropy], n);
      }
    }
    PipeBarrier<PIPE_V>();
  }

  // Waits until the lanes of the tile before have left; at the end, takes the flag of the last tile.
  __aicore__ inline void WaitStore() {
    if (under_way_) {
      WaitFlag<HardEvent::MTE3_V>(left_);
    }
    under_way_ = false;
  }
  __aicore__ inline void Store(const ShortTile& v, const TileFacts& f) {
    SetFlag<HardEvent::V_MTE3>(ready_);
    WaitFlag<HardEvent::V_MTE3>(ready_);
    CopyOut(Gm<float>(gm_.lse, f.first), v[kLse], f.rows);
    CopyOut(Gm<float>(gm_.lse_low, f.first), v[kLseLow], f.rows);
    CopyOut(Gm<float>(gm_.picked, f.first), v[kPicked], f.rows);
    if (smoothing_) {
      CopyOut(Gm<float>(gm_.wsum, f.first), v[kWsum], f.rows);
    }
    if (gm_.entropy != nullptr) {
      CopyOut(Gm<float>(gm_.entropy, f.first), v[kEntropy], f.rows);
    }
    if (gm_.top1 != nullptr) {
      CopyOut(Gm<float>(gm_.top1, f.first), v[kTop1], f.rows);
    }
    SetFlag<HardEvent::MTE3_V>(left_);
    under_way_ = true;
  }
  __aicore__ inline void Release(AscendC::TPipe& pipe) {
    pipe.ReleaseEventID<HardEvent::V_MTE3>(ready_);
    pipe.ReleaseEventID<HardEvent::MTE3_V>(left_);
  }

 private:
  // out = 0 where a row has not been read, by v.mask.
  __aicore__ inline void DropUnread(const ShortTile& v, const LocalTensor<float>& out, int64_t n) const {
    AscendC::Select(out, v.mask, out, 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
  }
  // kEntropy = log S - T / S, NaN where lse is not finite; kTop1 = 0 there. kSum holds log S.
  __aicore__ inline void FinishByRow(const ShortTile& v, int64_t n) const {
    AscendC::Sub(v[kScratch], v[kLse], v[kLse], n);  // NaN where lse is not finite, else 0
    PipeBarrier<PIPE_V>();
    if (gm_.entropy != nullptr) {
      AscendC::Sub(v[kEntropy], v[kSum], v[kEntropy], n);
      PipeBarrier<PIPE_V>();
      AscendC::Add(v[kEntropy], v[kEntropy], v[kScratch], n);
    }
    if (gm_.top1 != nullptr) {
      AscendC::CompareScalar(v.mask, v[kScratch], 0.0f, AscendC::CMPMODE::EQ, v.lane_count);
      PipeBarrier<PIPE_V>();
      AscendC::Select(v[kTop1], v.mask, v[kTop1], 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    }
    PipeBarrier<PIPE_V>();
  }

  // kWsum = sum w (x - max), from x - max in `exps`, which is made anew if the weights have been in it.
  __aicore__ inline void WeightedSum(const ShortTile& v, const LocalTensor<float>& x, int64_t n) const {
    if (!has_weight_) {
      v.ReduceTile<Total>(v[kWsum], v.exps, n);
      return;
    }
    // x - max may be -inf, which must be no factor where w is 0.
    for (int64_t j = 0; j < v.PaddedBlocks(); ++j) {
      AscendC::Max(v.exps[j * kLanes], v.exps[j * kLanes], v.floor[j * kLanes], v.PaddedWidth(j), n,
                   AscendC::BinaryRepeatParams(1, 1, 1, v.RowStride(), v.RowStride(), 0));
    }
    PipeBarrier<PIPE_V>();
    for (int64_t j = 0; j < v.PaddedBlocks(); ++j) {
      AscendC::Mul(v.exps[j * kLanes], v.exps[j * kLanes], v.weight[j * kLanes], v.PaddedWidth(j), n,
                   AscendC::BinaryRepeatParams(1, 1, 1, v.RowStride(), v.RowStride(), 0));
    }
    PipeBarrier<PIPE_V>();
    v.ReduceTile<Total>(v[kWsum], v.exps, n);
    v.SubLanes(v.exps, x, v[kMax], n);
  }

  // kLse + kLseLow = kMax + log(kSum) exactly (Knuth's sum of two numbers); kLseLow is 0 where kLse is not finite.
  __aicore__ inline void LogOfSum(const ShortTile& v, int64_t n) const {
    const LocalTensor<float> max = v[kMax], log = v[kSum], lse = v[kLse], low = v[kLseLow];
    const LocalTensor<float> log_rounded = v[kScratch], max_rounded = v[kMore];
    AscendC::Ln(log, log, n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(lse, max, log, n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(log_rounded, lse, max, n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(max_rounded, lse, log_rounded, n);
    AscendC::Sub(low, log, log_rounded, n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(max_rounded, max, max_rounded, n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(low, low, max_rounded, n);
    AscendC::Abs(log_rounded, lse, n);
    PipeBarrier<PIPE_V>();
    AscendC::CompareScalar(v.mask, log_rounded, kFloatMax, AscendC::CMPMODE::LE, v.lane_count);
    PipeBarrier<PIPE_V>();
    AscendC::Select(low, v.mask, low, 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    PipeBarrier<PIPE_V>();
  }

  const RowTensors gm_;
  const bool has_weight_, smoothing_;
  float shard_weight_ = 0;
  bool under_way_ = false;
  event_t ready_, left_;
};

}  // namespace npu_xent
