// Statistics of long rows, a chunk at a time: its maximum m, the sum of exp(x - m), with label smoothing the sums of
// w (x - m) and of w, and for the entropy the sum of (x - m) exp(x - m). With M the row's maximum, S and T its sums:
// entropy = log S - T / S. For top1 also the maxima of the logits themselves, of a chunk and of the columns before the
// target: scale and softcap can make different logits equal. Where they cannot, the mapped logits serve.
//
// The scalar unit reads the maximum and passes it to the next instructions as an operand. So a chunk takes two steps,
// and the vector unit works on another chunk between them. At the end of a row both units join ("fold") its chunks.
#pragma once

#include "ascendc/long_chunks.h"
#include "ascendc/long_pieces.h"

namespace npu_xent {

// The statistics of a row, or of a part of it.
struct RowStatistics {
  TwoFloats lse;
  float wsum, weight;  // with smoothing; the sum of the class weights
  float entropy;
  float top1;  // 1 if no logit beats the target, else 0; of a whole row 0 too if it has no distribution
};
// The target of a row as top1 sees it: its column, or -1, and the value that no other logit may exceed.
struct Contender {
  int64_t column;
  float value;
};

template <typename T>
class LongStatistics {
  static constexpr uint64_t kEverySecond = 0x5555555555555555ull;  // the even lanes

 public:
  __aicore__ inline LongStatistics(const XentArgs& args, const RowTensors& tensors)
      : of_parts_(args.stage == static_cast<int64_t>(Stage::partial_stats)),
        has_weight_(tensors.weight != nullptr),
        smoothing_(tensors.wsum != nullptr),
        entropy_(tensors.entropy != nullptr),
        top1_(tensors.top1 != nullptr) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const LongBuffers& b) {
    reduced_ = ub.GetWithOffset<float>(kMaxChunk / kBlock + kLanes, b.reduced);
    max_out_ = ub.GetWithOffset<float>(2 * kBlock, b.max_out);
    chunk_max_ = ub.GetWithOffset<float>(2 * kLanes, b.chunk_max);
    chunk_sum_ = ub.GetWithOffset<float>(2 * kLanes, b.chunk_sum);
    chunk_wsum_ = ub.GetWithOffset<float>(2 * kLanes, b.chunk_wsum);
    chunk_weight_ = ub.GetWithOffset<float>(2 * kLanes, b.chunk_weight);
    fold_ = ub.GetWithOffset<float>(kLanes, b.fold);
    row_sum_ = ub.GetWithOffset<float>(kBlock, b.row_sum);
    if (entropy_) {
      chunk_tilted_ = ub.GetWithOffset<float>(2 * kLanes, b.chunk_tilted);
      fold_tilted_ = ub.GetWithOffset<float>(kLanes, b.fold_tilted);
      row_tilted_ = ub.GetWithOffset<float>(kBlock, b.row_tilted);
    }
  }

  // Before and after the chunks of a block: both places of max_out_ are free.
  __aicore__ inline void Begin() {
    SetFlag<HardEvent::S_V>(LongFlag::OfMax(0));
    SetFlag<HardEvent::S_V>(LongFlag::OfMax(1));
  }
  __aicore__ inline void End() {
    WaitFlag<HardEvent::S_V>(LongFlag::OfMax(0));
    WaitFlag<HardEvent::S_V>(LongFlag::OfMax(1));
  }

  // First step: the maximum of a chunk, for the scalar unit.
  __aicore__ inline void FindMax(const LongChunks<T>& chunks, int64_t load, const Cursor& at, float row_scale,
                                 const Contender& target) {
    const int32_t flag = LongFlag::OfMax(load);
    const int64_t n = chunks.Size(at.chunk), padded = chunks.PaddedSize(at.chunk);
    const bool contended = top1_ && target.column >= 0, apart = contended && !chunks.KeepsOrder();
    PipeBarrier<PIPE_V>();  // the work space may still be in use
    if (apart) {
      WaitFlag<HardEvent::S_V>(flag);  // the scalar unit has read the maxima there
      FindContenders(chunks, load, at.chunk, target);
    }
    const LocalTensor<float> x = chunks.Mapped(chunks.Slot(load), chunks.Work(load), n, row_scale);
    if (n != padded) {
      PadTail(x, n, padded, -kFloatMax);
      PipeBarrier<PIPE_V>();
    }
    if (!apart) {
      WaitFlag<HardEvent::S_V>(flag);
    }
    Reduce<Maximum>(MaxOut(load, kOfMapped), reduced_, x, padded);
    if (contended && !apart) {
      FindBefore(chunks, load, x, at.chunk, target);
    }
    SetFlag<HardEvent::V_S>(flag);
  }

  // Second step: the sums of a chunk.
  __aicore__ inline void SumChunk(const LongChunks<T>& chunks, int64_t load, const Cursor& at,
                                  const Contender& target) {
    const int32_t flag = LongFlag::OfMax(load);
    const int64_t n = chunks.Size(at.chunk), padded = chunks.PaddedSize(at.chunk);
    const LocalTensor<float> work = chunks.Work(load);
    if (at.IsFirst()) {
      filled_ = 0;
      joined_ = Joined{-kFloatMax, -kFloatMax, 0.0f, 0.0f, target.column < 0};
    } else if (filled_ == kFold) {
      Fold(at.ordinal);
      CarryFold(at.ordinal);
    }
    WaitFlag<HardEvent::V_S>(flag);
    // Bounded, so that a chunk of -inf has exponentials 0, not NaN, and +inf gives an infinite sum.
    const float max = Bounded(MaxOut(load, kOfMapped).GetValue(0));
    if (top1_ && target.column >= 0) {
      joined_.beaten = joined_.beaten || IsBeaten(chunks, load, at.chunk, target);
    }
    SetFlag<HardEvent::S_V>(flag);
    const int64_t lane = FoldLane(at.ordinal, filled_++);
    chunk_max_.SetValue(lane, max);
    joined_.max = max > joined_.max ? max : joined_.max;

    AscendC::Adds(work, chunks.MappedBefore(chunks.Slot(load), work), -max, padded);
    PipeBarrier<PIPE_V>();
    if (smoothing_) {
      SumWeighted(chunks, work, lane, at.chunk);
    }
    const LocalTensor<float> exps = entropy_ ? chunks.Scratch() : work;
    AscendC::Exp(exps, work, padded);
    PipeBarrier<PIPE_V>();
    if (n != padded) {
      PadTail(exps, n, padded, 0.0f);
      PipeBarrier<PIPE_V>();
    }
    Reduce<Total>(chunk_sum_[lane], reduced_, exps, padded);
    if (entropy_) {
      AscendC::Maxs(work, work, kFiniteLog, padded);
      PipeBarrier<PIPE_V>();
      AscendC::Mul(work, work, exps, padded);
      PipeBarrier<PIPE_V>();
      Reduce<Total>(chunk_tilted_[lane], reduced_, work, padded);
    }
  }

  // The last fold of a row, for the scalar unit.
  __aicore__ inline void FoldRow(const Cursor& at) {
    Fold(at.ordinal);
    if (entropy_) {
      AscendC::Div(row_tilted_, row_tilted_, row_sum_, 1);
      PipeBarrier<PIPE_V>();
    }
    AscendC::Ln(row_sum_, row_sum_, 1);
    SetFlag<HardEvent::V_S>(LongFlag::kFold);
    folded_ = Folded{at.ordinal, filled_, joined_};
  }
  // The statistics of the row that FoldRow was called for last; sums of further chunks may be under way.
  __aicore__ inline RowStatistics TakeRow() {
    Joined joined = folded_.joined;
    WaitFlag<HardEvent::V_S>(LongFlag::kFold);
    const float log_sum = row_sum_.GetValue(0);  // by FoldRow, as T / S is
    const TwoFloats lse = TwoSum(joined.max, log_sum);
    JoinWeights(folded_.ordinal, folded_.chunks, joined);
    if (IsFinite(lse.high)) {
      joined.wsum = SumOfTwo(joined.wsum, joined.weight * ((joined.max - lse.high) - lse.low));
    }
    const float entropy = entropy_ && IsFinite(lse.high) ? log_sum - row_tilted_.GetValue(0) : NaN();
    const bool first = !joined.beaten && (of_parts_ || IsFinite(lse.high));
    return {lse, joined.wsum, joined.weight, entropy, first ? 1.0f : 0.0f};
  }

 private:
  // The chunks of a row so far: the largest m, with smoothing the sums of w and of w (x - base), and for top1 whether
  // the target is not the first of the largest logits.
  struct Joined {
    float max, base, weight, wsum;
    bool beaten;
  };
  // The maxima of a chunk: of the mapped logits, of the logits, and of those before the target. Each in a lane of 8
  // bytes, to which reductions write.
  enum MaxKind : int64_t { kOfMapped = 0, kOfOrdered = 2, kBefore = 4 };
  __aicore__ inline LocalTensor<float> MaxOut(int64_t load, MaxKind kind) const {
    return max_out_[load % 2 * kBlock + kind];
  }
  // A row that TakeRow has not taken yet.
  struct Folded {
    int64_t ordinal, chunks;
    Joined joined;
  };

  // The lane of the statistics of the j-th chunk since the last fold. Rows alternate between two sets: the scalar unit
  // writes one while the vector unit may still read the other.
  __aicore__ inline int64_t FoldLane(int64_t ordinal, int64_t j) const { return ordinal % 2 * kLanes + 2 * j; }

  // The maxima for top1, from the logits in their slot. No barrier at the end, nor of FindBefore: Reduce has read x and
  // its own scratch before it ends, all but what another Reduce overwrites behind a barrier.
  __aicore__ inline void FindContenders(const LongChunks<T>& chunks, int64_t load, int64_t chunk,
                                        const Contender& target) {
    const int64_t n = chunks.Size(chunk), padded = chunks.PaddedSize(chunk);
    const LocalTensor<float> x = chunks.Ordered(chunks.Slot(load), chunks.Work(load), n);
    if (n != padded) {
      PadTail(x, n, padded, -kFloatMax);
      PipeBarrier<PIPE_V>();
    }
    Reduce<Maximum>(MaxOut(load, kOfOrdered), reduced_, x, padded);
    FindBefore(chunks, load, x, chunk, target);
  }
  // The maximum of the columns before the target, if it is in this chunk.
  __aicore__ inline void FindBefore(const LongChunks<T>& chunks, int64_t load, const LocalTensor<float>& x,
                                    int64_t chunk, const Contender& target) {
    const int64_t n = chunks.Size(chunk), padded = chunks.PaddedSize(chunk);
    const int64_t column = target.column - chunks.FirstColumn(chunk);
    if (column > 0 && column < n) {
      const LocalTensor<float> before = chunks.Scratch();
      AscendC::Duplicate(before, -kFloatMax, padded);
      PipeBarrier<PIPE_V>();
      AscendC::Adds(before, x, 0.0f, column);
      PipeBarrier<PIPE_V>();
      Reduce<Maximum>(MaxOut(load, kBefore), reduced_, before, padded);
    }
  }
  // Whether a logit of this chunk exceeds the target's, or equals it before the target.
  __aicore__ inline bool IsBeaten(const LongChunks<T>& chunks, int64_t load, int64_t chunk,
                                  const Contender& target) const {
    const int64_t column = target.column - chunks.FirstColumn(chunk);
    const float max = Bounded(MaxOut(load, chunks.KeepsOrder() ? kOfMapped : kOfOrdered).GetValue(0));
    if (column >= chunks.Size(chunk)) {
      return max >= target.value;
    }
    const bool before = column > 0 && Bounded(MaxOut(load, kBefore).GetValue(0)) >= target.value;
    return before || max > target.value;
  }

  // The sums of w (x - m), from x - m in `work`, and of w.
  __aicore__ inline void SumWeighted(const LongChunks<T>& chunks, const LocalTensor<float>& work, int64_t lane,
                                     int64_t chunk) {
    const int64_t n = chunks.Size(chunk), padded = chunks.PaddedSize(chunk);
    if (n != padded) {
      PadTail(work, n, padded, 0.0f);
    }
    if (!has_weight_) {
      chunk_weight_.SetValue(lane, static_cast<float>(n));
      PipeBarrier<PIPE_V>();
      Reduce<Total>(chunk_wsum_[lane], reduced_, work, padded);
      return;
    }
    const LocalTensor<float> weight = chunks.CopyWeightIn(chunk);
    if (n != padded) {
      PadTail(weight, n, padded, 0.0f);
    }
    PipeBarrier<PIPE_V>();
    Reduce<Total>(chunk_weight_[lane], reduced_, weight, padded);  // ends its reads of `weight` with a barrier
    // x - m may be -inf, which must be no factor where w is 0.
    const LocalTensor<uint8_t> weighted = reduced_.ReinterpretCast<uint8_t>();
    AscendC::CompareScalar(weighted, weight, 0.0f, AscendC::CMPMODE::NE, padded);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(weight, weight, work, padded);
    PipeBarrier<PIPE_V>();
    AscendC::Select(weight, weighted, weight, 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, padded);
    PipeBarrier<PIPE_V>();
    Reduce<Total>(chunk_wsum_[lane], reduced_, weight, padded);
  }

  // row_sum_ = the sum of s exp(m - M) over the chunks since the last fold.
  __aicore__ inline void Fold(int64_t ordinal) {
    const LocalTensor<float> maxima = chunk_max_[ordinal % 2 * kLanes], sums = chunk_sum_[ordinal % 2 * kLanes];
    uint64_t mask[2] = {kEverySecond >> (kLanes - 2 * filled_), 0};
    SetFlag<HardEvent::S_V>(LongFlag::kFold);  // the maxima are written, and row_sum_ of the row before has been read
    WaitFlag<HardEvent::S_V>(LongFlag::kFold);
    const AscendC::UnaryRepeatParams once(1, 1, 8, 8);
    const AscendC::BinaryRepeatParams both(1, 1, 1, 8, 8, 8);
    AscendC::Adds(fold_, maxima, -joined_.max, mask, 1, once);
    PipeBarrier<PIPE_V>();
    if (entropy_) {
      AscendC::Maxs(fold_tilted_, fold_, kFiniteLog, mask, 1, once);
      PipeBarrier<PIPE_V>();
    }
    AscendC::Exp(fold_, fold_, mask, 1, once);
    PipeBarrier<PIPE_V>();
    if (entropy_) {
      FoldTilted(chunk_tilted_[ordinal % 2 * kLanes], sums, mask);
    }
    AscendC::Mul(fold_, fold_, sums, mask, 1, both);
    PipeBarrier<PIPE_V>();
    AscendC::WholeReduceSum(row_sum_, fold_, mask, 1, 1, 1, 8);
    PipeBarrier<PIPE_V>();
  }
  // row_tilted_ = the sum of (t + (m - M) s) exp(m - M), from m - M in fold_tilted_ and its exponential in fold_. No
  // barrier behind.
  __aicore__ inline void FoldTilted(const LocalTensor<float>& tilted, const LocalTensor<float>& sums, uint64_t* mask) {
    const AscendC::BinaryRepeatParams both(1, 1, 1, 8, 8, 8);
    AscendC::Mul(fold_tilted_, fold_tilted_, sums, mask, 1, both);
    PipeBarrier<PIPE_V>();
    AscendC::Add(fold_tilted_, fold_tilted_, tilted, mask, 1, both);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(fold_tilted_, fold_tilted_, fold_, mask, 1, both);
    PipeBarrier<PIPE_V>();
    AscendC::WholeReduceSum(row_tilted_, fold_tilted_, mask, 1, 1, 1, 8);
  }
  // The scalar unit's part of a fold, when the vector unit has finished the chunks.
  __aicore__ inline void JoinWeights(int64_t ordinal, int64_t chunks, Joined& joined) const {
    if (joined.weight != 0.0f) {
      joined.wsum = SumOfTwo(joined.wsum, joined.weight * (joined.base - joined.max));
    }
    joined.base = joined.max;
    for (int64_t j = 0; smoothing_ && j < chunks; ++j) {
      const int64_t lane = FoldLane(ordinal, j);
      const float weight = chunk_weight_.GetValue(lane);
      // A chunk of only -inf has no maximum, which must be no factor where w is 0.
      const float moved = weight == 0.0f ? 0.0f : weight * (chunk_max_.GetValue(lane) - joined.max);
      joined.wsum = SumOfTwo(joined.wsum, SumOfTwo(chunk_wsum_.GetValue(lane), moved));
      joined.weight += weight;
    }
  }
  // In rows of more than kFold chunks, a fold becomes chunk 0 of the next one.
  __aicore__ inline void CarryFold(int64_t ordinal) {
    const int64_t lane = FoldLane(ordinal, 0);
    AscendC::Adds(chunk_sum_[lane], row_sum_, 0.0f, uint64_t{1}, 1, AscendC::UnaryRepeatParams(1, 1, 8, 8));
    if (entropy_) {
      AscendC::Adds(chunk_tilted_[lane], row_tilted_, 0.0f, uint64_t{1}, 1, AscendC::UnaryRepeatParams(1, 1, 8, 8));
    }
    SetFlag<HardEvent::V_S>(LongFlag::kFold);
    WaitFlag<HardEvent::V_S>(LongFlag::kFold);
    JoinWeights(ordinal, filled_, joined_);
    chunk_max_.SetValue(lane, joined_.max);
    chunk_wsum_.SetValue(lane, 0.0f);  // joined_ has the weights
    chunk_weight_.SetValue(lane, 0.0f);
    SetFlag<HardEvent::S_V>(LongFlag::kCarry);
    WaitFlag<HardEvent::S_V>(LongFlag::kCarry);
    filled_ = 1;
  }

  const bool of_parts_, has_weight_, smoothing_, entropy_, top1_;
  int64_t filled_ = 0;  // chunks since the last fold
  Joined joined_{};
  Folded folded_{};
  LocalTensor<float> reduced_, max_out_;
  LocalTensor<float> chunk_max_, chunk_sum_, chunk_wsum_, chunk_weight_;  // of the chunks of two rows
  LocalTensor<float> fold_, row_sum_;
  LocalTensor<float> chunk_tilted_, fold_tilted_, row_tilted_;
};

}  // namespace npu_xent
