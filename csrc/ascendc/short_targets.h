// Targets of short rows. The scalar unit looks them up two tiles ahead of the vector unit, and writes its findings to
// lanes (enum Lane). The vector unit finds their columns by comparing column numbers, so no target can cause a read out
// of bounds.
#pragma once

#include "ascendc/short_tile.h"

namespace npu_xent {

template <bool kGrad>
class ShortTargets {
 public:
  __aicore__ inline ShortTargets(const XentPlan& plan, const XentArgs& args, const RowTensors& tensors)
      : plan_(plan), args_(args), gm_(tensors) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const ShortBuffers& b) {
    target_ = ub.GetWithOffset<int64_t>(round_up(plan_.rows_per_tile, kLanes), b.target);
    target_weight_ = ub.GetWithOffset<float>(plan_.rows_per_tile * kBlock, b.target_weight);
  }

  // Valid after LookUp.
  __aicore__ inline const TileFacts& Of(int64_t tile) const { return facts_[tile % kSets]; }

  __aicore__ inline void LookUp(const ShortTile& v, int64_t tile) {
    TileFacts& f = facts_[tile % kSets];
    f.first = tile * plan_.rows_per_tile;
    f.rows = smaller(plan_.rows_per_tile, args_.rows - f.first);
    f.set = tile % kSets;
    f.any_bad = f.any_ignored = false;
    for (int64_t word = 0; word < kMaxTileRows / 64; ++word) {
      f.ignored[word] = 0;
    }
    SetFlag<HardEvent::S_MTE2>(ShortFlag::kTileTargets);  // the targets of the tile before have been read
    WaitFlag<HardEvent::S_MTE2>(ShortFlag::kTileTargets);
    CopyIn(target_, Gm<int64_t>(gm_.target, f.first), f.rows);
    SetFlag<HardEvent::MTE2_S>(ShortFlag::kTileTargets);
    WaitFlag<HardEvent::MTE2_S>(ShortFlag::kTileTargets);
    // The vector unit has read this set of lanes: the copy above was issued after one into the buffer of the tile that
    // used the set before.
    const LocalTensor<float> column = v.SetLane(kColumnOf, f);
    for (int64_t r = 0; r < f.rows; ++r) {
      const int64_t y = target_.GetValue(r);
      const bool ignored = IsIgnored(args_, y), bad = IsBad(args_, y);
      f.any_bad = f.any_bad || bad;
      if (ignored) {
        f.any_ignored = true;
        f.ignored[r / 64] |= uint64_t{1} << (r % 64);
      }
      column.SetValue(r, static_cast<float>(ColumnOf(args_, y)));
    }
    f.any_unread = f.any_ignored && args_.read_ignored == 0;
    if (f.any_bad || f.any_unread) {
      LookUpExceptions(v, f);
    }
    if (kGrad && gm_.weight != nullptr) {
      LookUpWeights(v, f);
    }
    SetFlag<HardEvent::S_V>(ShortFlag::OfSet(f.set));
  }

  // On the vector unit: a bit at each row's target, and kPicked, x at the target (0 for targets of other shards). x is
  // the logits after scale and softcap; `exps` is scratch.
  __aicore__ inline void FindTargets(const ShortTile& v, const LocalTensor<float>& x, const TileFacts& f) const {
    v.Spread(v.SetLane(kColumnOf, f), f.rows);
    for (int64_t j = 0; j < v.PaddedBlocks(); ++j) {
      AscendC::Compare(v.Hot(j), v.columns[j * kLanes], v.block, AscendC::CMPMODE::EQ, kLanes, f.rows,
                       AscendC::BinaryRepeatParams(1, 1, 0, 8, 0, 1));
    }
    PipeBarrier<PIPE_V>();
    for (int64_t j = 0; j < v.Blocks(); ++j) {
      AscendC::Select(v.exps[j * kLanes], v.Hot(j), x[j * kLanes], 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE,
                      v.Width(j), f.rows, AscendC::BinaryRepeatParams(1, 1, 1, v.RowStride(), v.RowStride(), 0));
    }
    PipeBarrier<PIPE_V>();
    v.ReduceTile<Total>(v[kPicked], v.exps, f.rows);
  }

  // kTop1 = 1 where the target is the first of the row's largest numbers, else 0. `exps` is scratch. No barrier behind.
  __aicore__ inline void FindTop1(const ShortTile& v, const LocalTensor<float>& x, const TileFacts& f) const {
    const int64_t n = f.rows;
    const LocalTensor<float> value = v[kScratch], before = v[kMore];
    FindTargets(v, x, f);
    // Bounded, so that -inf marks the columns that do not count.
    AscendC::Maxs(value, v[kPicked], -kFloatMax, n);
    // The largest number before the target.
    v.Spread(v.SetLane(kColumnOf, f), n);
    for (int64_t j = 0; j < v.PaddedBlocks(); ++j) {
      AscendC::Compare(v.Hot(j), v.columns[j * kLanes], v.block, AscendC::CMPMODE::LT, kLanes, n,
                       AscendC::BinaryRepeatParams(1, 1, 0, 8, 0, 1));
    }
    AscendC::Maxs(v.exps, x, -kFloatMax, n * v.padded);
    PipeBarrier<PIPE_V>();
    for (int64_t j = 0; j < v.Blocks(); ++j) {
      AscendC::Select(v.exps[j * kLanes], v.Hot(j), v.exps[j * kLanes], MinusInfinity(),
                      AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, v.Width(j), n,
                      AscendC::BinaryRepeatParams(1, 1, 1, v.RowStride(), v.RowStride(), 0));
    }
    PipeBarrier<PIPE_V>();
    v.ReduceTile<Maximum>(before, v.exps, n);
    v.ReduceTile<Maximum>(v[kTop1], x, n);
    // In turn: 1 if the largest is the target's, 0 if one before is as large, 0 without a target.
    AscendC::Compare(v.mask, value, v[kTop1], AscendC::CMPMODE::GE, v.lane_count);
    PipeBarrier<PIPE_V>();
    AscendC::Duplicate(v[kTop1], 1.0f, n);
    PipeBarrier<PIPE_V>();
    AscendC::Select(v[kTop1], v.mask, v[kTop1], 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    PipeBarrier<PIPE_V>();
    AscendC::Compare(v.mask, before, value, AscendC::CMPMODE::LT, v.lane_count);
    PipeBarrier<PIPE_V>();
    AscendC::Select(v[kTop1], v.mask, v[kTop1], 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    PipeBarrier<PIPE_V>();
    AscendC::CompareScalar(v.mask, v.SetLane(kColumnOf, f), 0.0f, AscendC::CMPMODE::GE, v.lane_count);
    PipeBarrier<PIPE_V>();
    AscendC::Select(v[kTop1], v.mask, v[kTop1], 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
  }

 private:
  __aicore__ inline void LookUpExceptions(const ShortTile& v, const TileFacts& f) {
    const LocalTensor<float> bad = v.SetLane(kBadOf, f), read = v.SetLane(kReadOf, f);
    for (int64_t r = 0; r < f.rows; ++r) {
      bad.SetValue(r, IsBad(args_, target_.GetValue(r)) ? NaN() : 0.0f);
      read.SetValue(r, f.IsRead(r) ? 1.0f : 0.0f);
    }
  }
  __aicore__ inline void LookUpWeights(const ShortTile& v, const TileFacts& f) {
    CopyTargetWeights(target_weight_, gm_.weight, args_, target_, f.rows);
    const LocalTensor<float> weight = v.SetLane(kWeightOf, f);
    for (int64_t r = 0; r < f.rows; ++r) {
      const int64_t y = target_.GetValue(r);
      weight.SetValue(r, IsKept(args_, y) ? target_weight_.GetValue(r * kBlock) : 0.0f);
    }
  }

  const XentPlan plan_;
  const XentArgs args_;
  const RowTensors gm_;
  TileFacts facts_[kSets];
  LocalTensor<int64_t> target_;
  LocalTensor<float> target_weight_;
};

}  // namespace npu_xent
