// Short rows (row mode `short`, row_plan.h): tiles of several rows, [rows, cols], are in UB at a time. This file has
// the order of the work; short_tile.h has a tile and its vectors, and the other files included below the arithmetic.
#pragma once

#include "ascendc/short_copies.h"
#include "ascendc/short_gradient.h"
#include "ascendc/short_statistics.h"
#include "ascendc/short_targets.h"
#include "ascendc/short_tile.h"

namespace npu_xent {

template <typename T, Output kOutput, bool kStats>
class ShortRows {
  static constexpr bool kHasOutput = kOutput != Output::none;
  static constexpr bool kGrad = kOutput == Output::grad;

 public:
  __aicore__ inline ShortRows(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                              const RowTensors& tensors)
      : pipe_(pipe),
        plan_(plan),
        args_(args),
        gm_(tensors),
        tile_(args),
        targets_(plan, args, tensors),
        copies_(args, tensors),
        statistics_(tensors),
        gradient_(args, tensors) {}

  __aicore__ inline void Run() {
    const Share mine = share_of(work_items(plan_, args_.rows), AscendC::GetBlockIdx(), AscendC::GetBlockNum());
    if (mine.begin == mine.end) {
      return;
    }
    Allocate();
    Prepare();
    for (int64_t tile = mine.begin; tile < smaller(mine.begin + 2, mine.end); ++tile) {
      LoadTile(tile);
    }
    for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
      ComputeTile(targets_.Of(tile));
      if (tile + 2 < mine.end) {
        LoadTile(tile + 2);
      }
    }
    if constexpr (kStats) {
      statistics_.WaitStore();
    }
    statistics_.Release(pipe_);
  }

 private:
  __aicore__ inline void Allocate() {
    const ShortBuffers b =
        short_buffers(args_.dtype, plan_.rows_per_tile, args_.cols, args_.softcap != 0.0f, args_.by_row != 0);
    copies_.Allocate(pipe_, b);
    pipe_.InitBuffer(ub_, b.rest);
    statistics_.Allocate(pipe_);
    tile_.Allocate(ub_, b, plan_.rows_per_tile);
    targets_.Allocate(ub_, b);
  }

  // Constants and operands that all tiles share.
  __aicore__ inline void Prepare() {
    Upstream upstream{};
    if constexpr (kGrad) {
      upstream = ReadUpstream(args_, gm_);
    }
    tile_.PutConstants(gm_.weight != nullptr);
    gradient_.Prepare(tile_, upstream);
    if (gm_.weight != nullptr) {
      copies_.CopyWeightIn(pipe_, tile_);
    }
    if constexpr (kStats) {
      statistics_.SumClassWeights(tile_);
    }
    SetFlag<HardEvent::V_S>(ShortFlag::kPrepared);  // from here the scalar unit writes its lanes
    WaitFlag<HardEvent::V_S>(ShortFlag::kPrepared);
    if constexpr (kStats) {
      statistics_.TakeClassWeights(tile_);
    }
  }

  __aicore__ inline void LoadTile(int64_t tile) {
    targets_.LookUp(tile_, tile);
    copies_.CopyTileIn(tile_, targets_.Of(tile));
  }

  __aicore__ inline void ComputeTile(const TileFacts& f) {
    LocalTensor<T> in = copies_.TakeTile();
    WaitFlag<HardEvent::S_V>(ShortFlag::OfSet(f.set));
    if constexpr (kStats) {
      statistics_.WaitStore();
    }
    if (copies_.HasOperands()) {
      copies_.TakeOperands(tile_, f);
    }
    ClearUnread(in, f);
    if constexpr (kStats) {
      if (gm_.top1 != nullptr) {
        targets_.FindTop1(tile_, Ordered(in, f.rows), f);
      }
    }
    const LocalTensor<float> x = Mapped(in, f.rows);
    if constexpr (kStats || kGrad) {
      targets_.FindTargets(tile_, x, f);
    }
    if constexpr (kStats) {
      statistics_.Compute(tile_, x, f);
      statistics_.Store(tile_, f);
    }
    if constexpr (kGrad) {
      if constexpr (!kStats) {
        tile_.SubLanes(tile_.exps, x, tile_[kMax], f.rows);
        // Many barriers precede the next use. With a tilt x - lse is needed too, and the logits are not.
        AscendC::Exp(gradient_.HasTilt() ? x : tile_.exps, tile_.exps, f.rows * tile_.padded);
      }
      gradient_.RowCoefficients(tile_, f);
      if (gradient_.HasTilt()) {
        gradient_.Tilt(tile_, x, f);
      }
    }
    if constexpr (kHasOutput) {
      LocalTensor<T> out = copies_.NewOutput();
      if constexpr (kGrad) {
        MakeGrad(out, f);
      } else {
        MakeLogProb(out, x, f);
      }
      copies_.OutputMade(out);
    }
    copies_.FreeTile(in);
    if constexpr (kHasOutput) {
      copies_.CopyTileOut(tile_, f);
    }
  }

  // The logits after scale and softcap, in fp32: in the queue's tensor if IsScaledAlready. No barrier at the end: the
  // operations that follow begin with Spread, which has one.
  __aicore__ inline LocalTensor<float> Mapped(const LocalTensor<T>& in, int64_t rows) const {
    const int64_t n = rows * tile_.padded;
    const LocalTensor<float> x = ScaledLogits(in, tile_.x, args_, args_.logit_scale, n);
    if (tile_.softcap.IsOn()) {
      PipeBarrier<PIPE_V>();
      if constexpr (kGrad) {
        tile_.softcap.Apply(x, tile_.deficit, n);
      } else {
        tile_.softcap.Apply(x, n);
      }
    }
    if (args_.row_scaled != 0) {
      tile_.MulLanes(x, x, tile_[kRowScale], rows);
    }
    return x;
  }
  // The logits in fp32, with the sign of the logit scale: their order is that of the scaled logits.
  __aicore__ inline LocalTensor<float> Ordered(const LocalTensor<T>& in, int64_t rows) const {
    const float sign = args_.logit_scale > 0.0f ? 1.0f : args_.logit_scale < 0.0f ? -1.0f : 0.0f;
    if constexpr (kIsFp32<T>) {
      if (sign == 1.0f) {
        return in;
      }
    }
    return ScaledLogits(in, tile_.x, args_, sign, rows * tile_.padded);
  }

  __aicore__ inline void MakeGrad(const LocalTensor<T>& out, const TileFacts& f) const {
    gradient_.Make(tile_, Fp32Of(out, tile_.exps), f);
    Round(out, f.rows);
    for (int64_t r = 0; f.any_ignored && r < f.rows; ++r) {
      if (f.IsIgnored(r)) {
        ClearRow(out, r);
      }
    }
  }
  __aicore__ inline void MakeLogProb(const LocalTensor<T>& out, const LocalTensor<float>& x, const TileFacts& f) const {
    const ShortTile& v = tile_;
    // lse, NaN where it is not finite
    AscendC::Sub(v[kScratch], v[kLse], v[kLse], f.rows);
    PipeBarrier<PIPE_V>();
    AscendC::Add(v[kScratch], v[kScratch], v[kLse], f.rows);
    PipeBarrier<PIPE_V>();
    v.SubLanes(v.exps, x, v[kScratch], f.rows);
    v.SubLanes(Fp32Of(out, v.exps), v.exps, v[kLseLow], f.rows);
    Round(out, f.rows);
  }
  __aicore__ inline void Round(const LocalTensor<T>& out, int64_t rows) const {
    RoundOutput(out, tile_.exps, rows * tile_.padded);
    if constexpr (!kIsFp32<T>) {
      PipeBarrier<PIPE_V>();
    }
  }

  // Rows that were not copied in become zeros.
  __aicore__ inline void ClearUnread(const LocalTensor<T>& in, const TileFacts& f) const {
    for (int64_t r = 0; f.any_unread && r < f.rows; ++r) {
      if (!f.IsRead(r)) {
        ClearRow(in, r);
      }
    }
    if (f.any_unread) {
      PipeBarrier<PIPE_V>();
    }
  }
  __aicore__ inline void ClearRow(const LocalTensor<T>& tile, int64_t r) const {
    AscendC::Duplicate(tile[r * tile_.padded].template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
                       tile_.padded * sizeof(T) / sizeof(int16_t));
  }

  AscendC::TPipe& pipe_;
  const XentPlan plan_;
  const XentArgs args_;
  const RowTensors gm_;

  UnifiedBuffer ub_;
  ShortTile tile_;
  ShortTargets<kGrad> targets_;
  ShortCopies<T, kOutput, kStats> copies_;
  ShortStatistics statistics_;
  ShortGradient gradient_;
};

}  // namespace npu_xent
