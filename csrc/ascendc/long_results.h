// The results of statistics: the scalar unit gathers those of a block of pieces in UB, and one copy each takes them
// out.
#pragma once

#include "ascendc/long_statistics.h"

namespace npu_xent {

class LongResults {
 public:
  __aicore__ inline explicit LongResults(const RowTensors& tensors) : gm_(tensors) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const LongBuffers& b) {
    lse_ = ub.GetWithOffset<float>(kFactRows, b.out_lse);
    lse_low_ = ub.GetWithOffset<float>(kFactRows, b.out_lse_low);
    picked_ = ub.GetWithOffset<float>(kFactRows, b.out_picked);
    wsum_ = ub.GetWithOffset<float>(kFactRows, b.out_wsum);
    weight_ = ub.GetWithOffset<float>(kFactRows, b.out_weight);
    if (gm_.entropy != nullptr || gm_.top1 != nullptr) {
      entropy_ = ub.GetWithOffset<float>(kFactRows, b.out_entropy);
      top1_ = ub.GetWithOffset<float>(kFactRows, b.out_top1);
    }
  }

  __aicore__ inline void Set(int64_t index, const RowStatistics& statistics, float picked) {
    lse_.SetValue(index, statistics.lse.high);
    lse_low_.SetValue(index, statistics.lse.low);
    picked_.SetValue(index, picked);
    wsum_.SetValue(index, statistics.wsum);
    weight_.SetValue(index, statistics.weight);
    if (gm_.entropy != nullptr) {
      entropy_.SetValue(index, statistics.entropy);
    }
    if (gm_.top1 != nullptr) {
      top1_.SetValue(index, statistics.top1);
    }
  }

  // Copies out the statistics of all pieces of a block, zeros for those that were not read.
  __aicore__ inline void Store(const LongPieces<true>& pieces) {
    for (int64_t i = 0; i < pieces.Count(); ++i) {
      if (!pieces.IsRead(pieces.At(i).row)) {
        Set(i, RowStatistics{{0.0f, 0.0f}, 0.0f, 0.0f, 0.0f, 0.0f}, 0.0f);
      }
    }
    SetFlag<HardEvent::S_MTE3>(LongFlag::kResults);
    WaitFlag<HardEvent::S_MTE3>(LongFlag::kResults);
    CopyOut(Gm<float>(gm_.lse, pieces.First()), lse_, pieces.Count());
    CopyOut(Gm<float>(gm_.lse_low, pieces.First()), lse_low_, pieces.Count());
    CopyOut(Gm<float>(gm_.picked, pieces.First()), picked_, pieces.Count());
    if (gm_.wsum != nullptr) {
      CopyOut(Gm<float>(gm_.wsum, pieces.First()), wsum_, pieces.Count());
    }
    if (gm_.part_weight != nullptr) {
      CopyOut(Gm<float>(gm_.part_weight, pieces.First()), weight_, pieces.Count());
    }
    if (gm_.entropy != nullptr) {
      CopyOut(Gm<float>(gm_.entropy, pieces.First()), entropy_, pieces.Count());
    }
    if (gm_.top1 != nullptr) {
      CopyOut(Gm<float>(gm_.top1, pieces.First()), top1_, pieces.Count());
    }
  }

 private:
  const RowTensors gm_;
  LocalTensor<float> lse_, lse_low_, picked_, wsum_, weight_, entropy_, top1_;
};

}  // namespace npu_xent
