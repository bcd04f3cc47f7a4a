// Rows that are cut into chunks of columns: all row modes but `short` (row_plan.h).
//
// A chunk is copied into one slot of a ring in UB (pipe MTE2), read there for its row's statistics, overwritten there
// with its output (pipe V), and copied out from there (MTE3); then the slot is free. Flags go with the chunk: MTE2_V,
// V_MTE3, and MTE3_MTE2 or V_MTE2 when it leaves. Chunk i uses flag number i % kFlags: fewer are ever open at a time.
//
// Statistics of a chunk are its maximum m, the sum of exp(x - m), and with label smoothing the sums of w (x - m) and of
// w. The maximum goes by way of the scalar unit, which hands it to the next instructions as an operand; so that the
// vector unit need not wait for that, it finds the maximum of chunk i + 1 before it sums chunk i. At the end of a row
// the chunks are joined ("folded"), and the scalar unit makes of the result what the row's output needs; outputs trail
// the statistics by more than a row, and nobody waits there either.
#pragma once

#include "ascendc/row_kernel.h"

namespace npu_xent {

template <typename T, Output kOutput, bool kStats>
class LongRows {
  static constexpr bool kHasOutput = kOutput != Output::none;
  static constexpr bool kFp32 = sizeof(T) == sizeof(float);
  static constexpr int64_t kFlags = 6;
  static_assert(kFlags >= kStreamSlots && kFlags > kExtraSlots, "a flag is waited for before it is set again");
  static constexpr event_t kOtherFlag = static_cast<event_t>(6);  // between the same pipes, not of a chunk

 public:
  __aicore__ inline LongRows(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                             const RowTensors& tensors)
      : pipe_(pipe), plan_(plan), args_(args), gm_(tensors) {}

  __aicore__ inline void Run() {
    // With statistics the cores share out rows or parts of rows, without only chunks.
    const int64_t pieces = kStats ? work_items(plan_, args_.rows) : chunk_items(plan_, args_.rows);
    const Share mine = share_of(pieces, AscendC::GetBlockIdx(), AscendC::GetBlockNum());
    if (mine.begin == mine.end) {
      return;
    }
    resident_ = kStats && kHasOutput && plan_.mode == static_cast<int64_t>(RowMode::resident);
    slots_ = resident_ ? plan_.slots : smaller(plan_.slots, kStreamSlots);
    Allocate();
    if constexpr (kOutput == Output::grad) {
      upstream_ = ReadUpstream(args_, gm_);
    }
    for (int64_t first = mine.begin; first < mine.end;) {
      int64_t last = first + kFactRows;
      if (!kStats) {
        last = (first / plan_.chunks + kFactRows) * plan_.chunks;
      }
      first_ = first;
      last_ = smaller(last, mine.end);
      Block();
      first = last_;
    }
  }

 private:
  // A piece is a row, or the part of it that this core has. Chunks [begin, end).
  struct Piece {
    int64_t row, begin, end;
  };
  __aicore__ inline Piece PieceAt(int64_t i) const {
    if (kStats) {
      const int64_t row = (first_ + i) / plan_.parts;
      const int64_t begin = (first_ + i - row * plan_.parts) * plan_.chunks_per_part;
      return {row, begin, smaller(plan_.chunks, begin + plan_.chunks_per_part)};
    }
    const int64_t row = first_ / plan_.chunks + i, start = row * plan_.chunks;
    return {row, larger(first_ - start, 0), smaller(last_ - start, plan_.chunks)};
  }
  __aicore__ inline int64_t PieceCount() const {
    return kStats ? last_ - first_ : (last_ - 1) / plan_.chunks - first_ / plan_.chunks + 1;
  }

  // Goes over the chunks that are read, in order: of each piece all of them, `passes` times.
  struct Cursor {
    int64_t index, ordinal;  // of the piece, in the block and among those that are read
    int64_t pass, chunk;
    Piece piece;
  };
  __aicore__ inline void SkipUnread(Cursor& at) const {
    while (at.index < pieces_ && !IsRead(at.piece.row)) {
      at.piece = PieceAt(++at.index);
    }
    at.chunk = at.piece.begin;
  }
  __aicore__ inline Cursor FirstChunk() const {
    Cursor at{0, 0, 0, 0, PieceAt(0)};
    SkipUnread(at);
    return at;
  }
  __aicore__ inline void Advance(Cursor& at, int64_t passes) const {
    if (++at.chunk < at.piece.end) {
      return;
    }
    at.chunk = at.piece.begin;
    if (++at.pass < passes) {
      return;
    }
    at.pass = 0;
    ++at.ordinal;
    at.piece = PieceAt(++at.index);
    SkipUnread(at);
  }
  __aicore__ inline int64_t CountReadChunks() const {
    int64_t chunks = 0;
    for (int64_t i = 0; i < pieces_; ++i) {
      const Piece piece = PieceAt(i);
      chunks += IsRead(piece.row) ? piece.end - piece.begin : 0;
    }
    return chunks;
  }
  __aicore__ inline int64_t ChunkSize(int64_t chunk) const {
    return smaller(plan_.chunk_cols, args_.cols - chunk * plan_.chunk_cols);
  }

  // ---- facts of rows: targets and what else comes a row at a time ----

  __aicore__ inline int64_t TargetOf(int64_t row) const { return target_.GetValue(row - fact_row_); }
  __aicore__ inline bool IsIgnored(int64_t row) const { return npu_xent::IsIgnored(args_, TargetOf(row)); }
  __aicore__ inline bool IsRead(int64_t row) const { return !IsIgnored(row) || args_.read_ignored != 0; }
  __aicore__ inline bool IsBad(int64_t row) const { return npu_xent::IsBad(args_, TargetOf(row)); }
  // The target's column if it is one of the piece's, else -1.
  __aicore__ inline int64_t TargetColumn(const Piece& piece) const {
    const int64_t y = TargetOf(piece.row);
    if (!IsKept(args_, y) || y < args_.class_start) {
      return -1;
    }
    const int64_t column = y - args_.class_start;
    const bool here = column >= piece.begin * plan_.chunk_cols && column < piece.end * plan_.chunk_cols;
    return here && column < args_.cols ? column : -1;
  }

  __aicore__ inline void StageFacts() {
    pieces_ = PieceCount();
    fact_row_ = PieceAt(0).row;
    const int64_t rows = PieceAt(pieces_ - 1).row - fact_row_ + 1;
    CopyIn(target_, Gm<int64_t>(gm_.target, fact_row_), rows);
    if (!kStats) {
      CopyIn(lse_, Gm<float>(gm_.lse, fact_row_), rows);
      if (gm_.lse_low != nullptr) {
        CopyIn(lse_low_, Gm<float>(gm_.lse_low, fact_row_), rows);
      }
      if (args_.reduction == kReductionNone && gm_.grad_loss != nullptr) {
        CopyIn(grad_loss_, Gm<float>(gm_.grad_loss, fact_row_), rows);
      }
      if (args_.reduction == kReductionNone && gm_.grad_z_loss != nullptr) {
        CopyIn(grad_z_loss_, Gm<float>(gm_.grad_z_loss, fact_row_), rows);
      }
    }
    SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
    // A target's logit and weight come by copies of their own: a scalar read of GM would wait for each.
    for (int64_t i = 0; i < pieces_; ++i) {
      const Piece piece = PieceAt(i);
      const int64_t column = TargetColumn(piece);
      if (column >= 0) {
        CopyIn(picked_[i * kBlockOf<T>], Gm<T>(gm_.logits, piece.row * args_.logits_stride + column), 1);
      }
      if (kOutput == Output::grad && gm_.weight != nullptr && IsKept(args_, TargetOf(piece.row))) {
        CopyIn(target_weight_[i * kBlock], Gm<float>(gm_.weight, TargetOf(piece.row)), 1);
      }
    }
    SetFlag<HardEvent::MTE2_S>(EVENT_ID1);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID1);
  }

  // ---- scalar arithmetic of a row ----

  // What the output of a row is made of.
  struct RowState {
    bool zero, undefined;  // an ignored row; a row without a distribution
    float lse, lse_low;
    float scale, offset;  // gradient = scale exp(t x - lse) - offset w
    int64_t target;       // column, or -1
    bool target_known;    // the gradient there is `target_value`, else `target_step` is to be added
    float target_value, target_step;
  };

  __aicore__ inline RowState MakeState(int64_t index, const Piece& piece, float lse, float lse_low) const {
    RowState s;
    s.lse = lse;
    s.lse_low = lse_low;
    s.zero = kOutput == Output::grad && IsIgnored(piece.row);
    s.undefined = !IsFinite(lse);
    s.target = -1;
    if (kOutput != Output::grad || s.zero) {
      return s;
    }
    Upstream up = upstream_;
    if (args_.reduction == kReductionNone) {
      up.loss = gm_.grad_loss != nullptr ? grad_loss_.GetValue(piece.row - fact_row_) : 0.0f;
      if (args_.lse_square_scale != 0.0f) {
        up.z = gm_.grad_z_loss != nullptr ? grad_z_loss_.GetValue(piece.row - fact_row_) : 0.0f;
        up.z = SumOfTwo(up.z, up.loss);
      }
    }
    const bool is_bad = IsBad(piece.row);
    const float weight = gm_.weight != nullptr && !is_bad ? target_weight_.GetValue(index * kBlock) : 1.0f;
    s.undefined = s.undefined || is_bad || !IsFinite(weight) || !IsFinite(up.class_weight) || !IsFinite(up.loss) ||
                  !IsFinite(up.z);
    if (s.undefined) {
      return s;
    }
    const Coefficients k = MakeCoefficients(args_, weight, up, lse);
    s.scale = k.a * (1.0f - lse_low + 0.5f * lse_low * lse_low);  // a exp(-lse_low): lse_low is a rounding error
    s.offset = k.s;
    s.target = TargetColumn(piece);
    s.target_known = false;
    s.target_step = -k.b;
    const float picked = s.target >= 0 ? Picked(index) : 0.0f;
    if (s.target >= 0 && IsFinite(picked)) {
      // a p - b would cancel for a confident prediction, where p is near 1.
      const float below = (picked - lse) - lse_low;
      s.target_known = below > -0.5f;
      if (s.target_known) {
        s.target_value = k.a * Expm1NearZero(below) + (k.a - k.b) - k.s * weight;
      }
    }
    return s;
  }
  __aicore__ inline float Picked(int64_t index) const {
    return Product(ScalarOf(picked_, index * kBlockOf<T>), args_.logit_scale);
  }

  // What the chunks of a row have come to: the largest m, and with smoothing the sums of w and of w (x - base).
  struct Joined {
    float max, base, weight, wsum;
  };
  // A row that is folded and that the scalar unit has not seen yet; index -1 for none.
  struct Pending {
    int64_t index, ordinal, chunks;
    Joined joined;
  };

  // Takes a folded row from the vector unit: stores its statistics, and prepares its output.
  __aicore__ inline void FinishPending() {
    if (!kStats || pending_.index < 0) {
      return;
    }
    const int64_t index = pending_.index;
    const Piece piece = PieceAt(index);
    Joined joined = pending_.joined;
    WaitFlag<HardEvent::V_S>(EVENT_ID2);
    const TwoFloats lse = TwoSum(joined.max, row_sum_.GetValue(0));  // the vector unit has left the logarithm there
    JoinWeights(pending_.ordinal, pending_.chunks, joined);
    if (IsFinite(lse.high)) {
      joined.wsum = SumOfTwo(joined.wsum, joined.weight * ((joined.max - lse.high) - lse.low));
    }
    out_lse_.SetValue(index, lse.high);
    out_lse_low_.SetValue(index, lse.low);
    out_picked_.SetValue(index, IsBad(piece.row) ? NaN() : TargetColumn(piece) >= 0 ? Picked(index) : 0.0f);
    out_wsum_.SetValue(index, joined.wsum);
    out_weight_.SetValue(index, joined.weight);
    if (kHasOutput) {
      states_[pending_.ordinal % 2] = MakeState(index, piece, lse.high, lse.low);
    }
    pending_.index = -1;
  }

  // ---- one chunk ----

  __aicore__ inline bool Smoothing() const { return kStats && gm_.wsum != nullptr; }
  __aicore__ inline LocalTensor<T> Slot(int64_t load) const { return ring_[(load % slots_) * plan_.chunk_cols]; }

  __aicore__ inline void Load(int64_t load, Cursor& at, int64_t passes) {
    const event_t flag = static_cast<event_t>(load % kFlags);
    if (load >= slots_) {
      const int64_t before = load - slots_;
      const event_t free = static_cast<event_t>(before % kFlags);
      if ((stored_ >> (before % kFlags)) % 2 != 0) {
        WaitFlag<HardEvent::MTE3_MTE2>(free);
      } else {
        WaitFlag<HardEvent::V_MTE2>(free);
      }
    }
    CopyIn(Slot(load), Gm<T>(gm_.logits, at.piece.row * args_.logits_stride + at.chunk * plan_.chunk_cols),
           ChunkSize(at.chunk));
    SetFlag<HardEvent::MTE2_V>(flag);
    Advance(at, passes);
  }

  // weight_[0:n] = the class weights of a chunk. Rare, so it is not worth a second buffer.
  __aicore__ inline void LoadWeight(int64_t chunk, int64_t n) {
    SetFlag<HardEvent::V_MTE2>(kOtherFlag);
    WaitFlag<HardEvent::V_MTE2>(kOtherFlag);
    CopyIn(weight_, Gm<float>(gm_.weight, args_.class_start + chunk * plan_.chunk_cols), n);
    SetFlag<HardEvent::MTE2_V>(kOtherFlag);
    WaitFlag<HardEvent::MTE2_V>(kOtherFlag);
  }

  // t x in fp32: in the slot itself when it is that already, else in `work`.
  __aicore__ inline bool IsInPlace() const { return kFp32 && args_.logit_scale == 1.0f; }
  __aicore__ inline LocalTensor<float> Scaled(const LocalTensor<T>& slot, const LocalTensor<float>& work, int64_t n) {
    if constexpr (kFp32) {
      if (IsInPlace()) {
        return slot;
      }
      AscendC::Muls(work, slot, args_.logit_scale, n);
    } else {
      AscendC::Cast(work, slot, AscendC::RoundMode::CAST_NONE, n);
      if (args_.logit_scale != 1.0f) {
        PipeBarrier<PIPE_V>();
        AscendC::Muls(work, work, args_.logit_scale, n);
      }
    }
    PipeBarrier<PIPE_V>();
    return work;
  }
  __aicore__ inline LocalTensor<float> Work(int64_t load) const { return work_[load % 2 * plan_.chunk_cols]; }
  __aicore__ inline int64_t PaddedSize(int64_t chunk) const { return round_up(ChunkSize(chunk), kChunkUnit); }

  // First half: the maximum of a chunk, to the scalar unit.
  __aicore__ inline void FindMax(int64_t load, const Cursor& at) {
    const event_t flag = static_cast<event_t>(load % 2);
    const int64_t n = ChunkSize(at.chunk), padded = PaddedSize(at.chunk);
    PipeBarrier<PIPE_V>();  // what was left to do in this work_
    const LocalTensor<float> x = Scaled(Slot(load), Work(load), n);
    if (n != padded) {
      PadTail(x, n, padded, -kFloatMax);
      PipeBarrier<PIPE_V>();
    }
    WaitFlag<HardEvent::S_V>(flag);  // it has read the maximum that was there
    Reduce<Maximum>(max_out_[load % 2 * kBlock], reduced_, x, padded);
    SetFlag<HardEvent::V_S>(flag);
  }

  // Second half: the sums of a chunk.
  __aicore__ inline void SumChunk(int64_t load, const Cursor& at) {
    const event_t flag = static_cast<event_t>(load % 2);
    const int64_t n = ChunkSize(at.chunk), padded = PaddedSize(at.chunk);
    const LocalTensor<float> work = Work(load);
    if (at.chunk == at.piece.begin) {
      filled_ = 0;
      joined_ = Joined{-kFloatMax, -kFloatMax, 0.0f, 0.0f};
    } else if (filled_ == kFold) {
      Fold(at.ordinal);
      CarryFold(at.ordinal);
    }
    WaitFlag<HardEvent::V_S>(flag);
    // Bounded: a chunk of -inf has exponentials 0 then and not NaN, +inf an infinite sum.
    const float max = Bounded(max_out_.GetValue(load % 2 * kBlock));
    SetFlag<HardEvent::S_V>(flag);
    const int64_t lane = FoldLane(at.ordinal, filled_++);
    chunk_max_.SetValue(lane, max);
    joined_.max = max > joined_.max ? max : joined_.max;

    if (IsInPlace()) {
      if constexpr (kFp32) {
        AscendC::Adds(work, Slot(load), -max, padded);
      }
    } else {
      AscendC::Adds(work, work, -max, padded);
    }
    PipeBarrier<PIPE_V>();
    if (Smoothing()) {
      WeightedSums(work, lane, at.chunk, n, padded);
    }
    AscendC::Exp(work, work, padded);
    PipeBarrier<PIPE_V>();
    if (n != padded) {
      PadTail(work, n, padded, 0.0f);
      PipeBarrier<PIPE_V>();
    }
    Reduce<Total>(chunk_sum_[lane], reduced_, work, padded);
  }
  // Where the statistics of the j-th chunk since the last fold are. Rows take turns with two sets: the scalar unit
  // writes one while the vector unit may still read the other.
  __aicore__ inline int64_t FoldLane(int64_t ordinal, int64_t j) const { return ordinal % 2 * kLanes + 2 * j; }

  // The sums of w (x - m), from x - m in `work`, and of w.
  __aicore__ inline void WeightedSums(const LocalTensor<float>& work, int64_t lane, int64_t chunk, int64_t n,
                                      int64_t padded) {
    if (n != padded) {
      PadTail(work, n, padded, 0.0f);
    }
    if (gm_.weight == nullptr) {
      chunk_weight_.SetValue(lane, static_cast<float>(n));
      PipeBarrier<PIPE_V>();
      Reduce<Total>(chunk_wsum_[lane], reduced_, work, padded);
    } else {
      LoadWeight(chunk, n);
      if (n != padded) {
        PadTail(weight_, n, padded, 0.0f);
      }
      PipeBarrier<PIPE_V>();
      Reduce<Total>(chunk_weight_[lane], reduced_, weight_, padded);  // has read weight_ and passed a barrier
      AscendC::Mul(weight_, weight_, work, padded);
      PipeBarrier<PIPE_V>();
      Reduce<Total>(chunk_wsum_[lane], reduced_, weight_, padded);
    }
  }

  // row_sum_ = the sum of s exp(m - M) over the chunks since the last fold.
  __aicore__ inline void Fold(int64_t ordinal) {
    const LocalTensor<float> maxima = chunk_max_[ordinal % 2 * kLanes], sums = chunk_sum_[ordinal % 2 * kLanes];
    uint64_t mask[2] = {kEverySecond >> (kLanes - 2 * filled_), 0};
    SetFlag<HardEvent::S_V>(EVENT_ID2);  // the maxima are there, and row_sum_ of the row before has been read
    WaitFlag<HardEvent::S_V>(EVENT_ID2);
    const AscendC::UnaryRepeatParams once(1, 1, 8, 8);
    AscendC::Adds(fold_, maxima, -joined_.max, mask, 1, once);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(fold_, fold_, mask, 1, once);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(fold_, fold_, sums, mask, 1, AscendC::BinaryRepeatParams(1, 1, 1, 8, 8, 8));
    PipeBarrier<PIPE_V>();
    AscendC::WholeReduceSum(row_sum_, fold_, mask, 1, 1, 1, 8);
    PipeBarrier<PIPE_V>();
  }
  // The scalar unit's part of a fold, once the vector unit is through with the chunks.
  __aicore__ inline void JoinWeights(int64_t ordinal, int64_t chunks, Joined& joined) const {
    if (joined.weight != 0.0f) {
      joined.wsum = SumOfTwo(joined.wsum, joined.weight * (joined.base - joined.max));
    }
    joined.base = joined.max;
    for (int64_t j = 0; Smoothing() && j < chunks; ++j) {
      const int64_t lane = FoldLane(ordinal, j);
      const float weight = chunk_weight_.GetValue(lane);
      const float moved = weight * (chunk_max_.GetValue(lane) - joined.max);
      joined.wsum = SumOfTwo(joined.wsum, SumOfTwo(chunk_wsum_.GetValue(lane), moved));
      joined.weight += weight;
    }
  }
  // In rows of more than kFold chunks the fold so far becomes chunk 0 of the next one.
  __aicore__ inline void CarryFold(int64_t ordinal) {
    const int64_t lane = FoldLane(ordinal, 0);
    AscendC::Adds(chunk_sum_[lane], row_sum_, 0.0f, uint64_t{1}, 1, AscendC::UnaryRepeatParams(1, 1, 8, 8));
    SetFlag<HardEvent::V_S>(EVENT_ID2);
    WaitFlag<HardEvent::V_S>(EVENT_ID2);
    JoinWeights(ordinal, filled_, joined_);
    chunk_max_.SetValue(lane, joined_.max);
    chunk_wsum_.SetValue(lane, 0.0f);  // joined_ has them
    chunk_weight_.SetValue(lane, 0.0f);
    SetFlag<HardEvent::S_V>(EVENT_ID3);
    WaitFlag<HardEvent::S_V>(EVENT_ID3);
    filled_ = 1;
  }

  // The last fold of a row, handed to the scalar unit.
  __aicore__ inline void FoldRow(const Cursor& at) {
    Fold(at.ordinal);
    AscendC::Ln(row_sum_, row_sum_, 1);
    SetFlag<HardEvent::V_S>(EVENT_ID2);
    pending_ = Pending{at.index, at.ordinal, filled_, joined_};
  }

  // Leaves the output of a chunk in its slot; `work` is free.
  __aicore__ inline void MakeOutput(const LocalTensor<T>& slot, const LocalTensor<float>& work, const Cursor& at,
                                    const RowState& s) {
    const int64_t n = ChunkSize(at.chunk);
    if (s.zero || s.undefined) {
      FillSlot(slot, work, s.zero ? 0.0f : NaN(), n);
      return;
    }
    const LocalTensor<float> x = Scaled(slot, work, n), y = OutputIn(slot, work);
    AscendC::Adds(y, x, -s.lse, n);
    PipeBarrier<PIPE_V>();
    if constexpr (kOutput == Output::log_prob) {
      AscendC::Adds(y, y, -s.lse_low, n);
    } else {
      AscendC::Exp(y, y, n);
      PipeBarrier<PIPE_V>();
      AscendC::Muls(y, y, s.scale, n);
      if (args_.class_share != 0.0f) {
        SubtractOffset(y, at.chunk, n, s.offset);
      }
      const int64_t target = s.target - at.chunk * plan_.chunk_cols;
      if (s.target >= 0 && target >= 0 && target < n) {
        PipeBarrier<PIPE_V>();
        PutTarget(y, target, s);
      }
    }
    if constexpr (!kFp32) {
      PipeBarrier<PIPE_V>();
      AscendC::Cast(slot, work, AscendC::RoundMode::CAST_RINT, n);
    }
  }
  // Where the output is made in fp32.
  __aicore__ inline LocalTensor<float> OutputIn(const LocalTensor<T>& slot, const LocalTensor<float>& work) const {
    if constexpr (kFp32) {
      return slot;
    } else {
      return work;
    }
  }
  __aicore__ inline void SubtractOffset(const LocalTensor<float>& y, int64_t chunk, int64_t n, float offset) {
    if (gm_.weight == nullptr) {
      PipeBarrier<PIPE_V>();
      AscendC::Adds(y, y, -offset, n);
      return;
    }
    LoadWeight(chunk, n);
    AscendC::Muls(weight_, weight_, offset, n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(y, y, weight_, n);
  }
  __aicore__ inline void PutTarget(const LocalTensor<float>& y, int64_t target, const RowState& s) {
    uint64_t mask[2] = {uint64_t{1} << (target % kBlock), 0};
    const LocalTensor<float> block = y[target - target % kBlock];
    if (s.target_known) {
      AscendC::Duplicate(block, s.target_value, mask, 1, 1, 8);
    } else {
      AscendC::Adds(block, block, s.target_step, mask, 1, AscendC::UnaryRepeatParams(1, 1, 8, 8));
    }
  }
  __aicore__ inline void FillSlot(const LocalTensor<T>& slot, const LocalTensor<float>& work, float value, int64_t n) {
    if constexpr (kFp32) {
      AscendC::Duplicate(slot, value, n);
    } else {
      AscendC::Duplicate(work, value, n);
      PipeBarrier<PIPE_V>();
      AscendC::Cast(slot, work, AscendC::RoundMode::CAST_RINT, n);
    }
  }

  // Copies the output of load number `load` out of its slot.
  __aicore__ inline void Store(int64_t load, int64_t loads, const Cursor& at) {
    const event_t flag = static_cast<event_t>(load % kFlags);
    // Where no load waits for a copy out any more, nothing else keeps V from setting the flag twice before MTE3 takes
    // it.
    if (load >= kFlags && load - kFlags + slots_ >= loads) {
      WaitFlag<HardEvent::MTE3_V>(flag);
    }
    SetFlag<HardEvent::V_MTE3>(flag);
    WaitFlag<HardEvent::V_MTE3>(flag);
    CopyOut(Gm<T>(gm_.output, at.piece.row * args_.output_stride + at.chunk * plan_.chunk_cols), Slot(load),
            ChunkSize(at.chunk));
    if (load + slots_ < loads) {
      SetFlag<HardEvent::MTE3_MTE2>(flag);
    } else if (load + kFlags < loads) {
      SetFlag<HardEvent::MTE3_V>(flag);
    }
  }

  // ---- the two orders of work ----

  __aicore__ inline void WaitLoad(int64_t load) { WaitFlag<HardEvent::MTE2_V>(static_cast<event_t>(load % kFlags)); }

  // The statistics of a chunk: its maximum now, its sums when the maximum of the next has been asked for.
  struct Held {
    int64_t load;  // -1 for none
    Cursor at;
  };
  // Sums the chunk that is held, with what the start and the end of a row ask for.
  __aicore__ inline void SumHeld(int64_t loads) {
    if (held_.load < 0) {
      return;
    }
    const Cursor& at = held_.at;
    if (at.chunk == at.piece.begin) {
      FinishPending();
    }
    SumChunk(held_.load, at);
    if (!resident_ && held_.load + slots_ < loads) {
      SetFlag<HardEvent::V_MTE2>(static_cast<event_t>(held_.load % kFlags));
    }
    if (at.chunk + 1 == at.piece.end) {
      FoldRow(at);
    }
    held_.load = -1;
  }
  __aicore__ inline void StatisticsStep(int64_t load, const Cursor& at, int64_t loads) {
    FindMax(load, at);
    SumHeld(loads);
    held_ = Held{load, at};
  }

  // Every chunk passes once for statistics, or once for an output, or once for each.
  __aicore__ inline void Stream(int64_t chunks) {
    const int64_t passes = kStats && kHasOutput ? 2 : 1, loads = chunks * passes;
    const int64_t ahead = slots_ - 2;
    Cursor in = FirstChunk(), now = in;
    for (int64_t i = 0; i < smaller(ahead, loads); ++i) {
      Load(i, in, passes);
    }
    for (int64_t i = 0; i < loads; ++i) {
      const bool output = kHasOutput && now.pass + 1 == passes;
      WaitLoad(i);
      if constexpr (kStats) {
        if (!output) {
          StatisticsStep(i, now, loads);
        }
      }
      if constexpr (kHasOutput) {
        if (output) {
          OutputStep(i, now, loads);
        }
      }
      const uint64_t bit = uint64_t{1} << (i % kFlags);
      stored_ = output ? stored_ | bit : stored_ & ~bit;
      if (i + ahead < loads) {
        Load(i + ahead, in, passes);
      }
      Advance(now, passes);
    }
    if constexpr (kStats) {
      SumHeld(loads);
      FinishPending();
    }
  }
  __aicore__ inline void OutputStep(int64_t load, const Cursor& at, int64_t loads) {
    if constexpr (kStats) {
      if (at.chunk == at.piece.begin) {
        SumHeld(loads);
        FinishPending();
      }
    } else if (at.chunk == at.piece.begin) {
      const int64_t fact = at.piece.row - fact_row_;
      const float lse_low = gm_.lse_low != nullptr ? lse_low_.GetValue(fact) : 0.0f;
      states_[at.ordinal % 2] = MakeState(at.index, at.piece, lse_.GetValue(fact), lse_low);
    }
    MakeOutput(Slot(load), Work(load), at, states_[at.ordinal % 2]);
    Store(load, loads, at);
  }

  // Every chunk is loaded once and stays until its output is made, a row and kOutputLag chunks later.
  __aicore__ inline void Resident(int64_t loads) {
    const int64_t lag = plan_.chunks + kOutputLag;
    Cursor in = FirstChunk(), now = in, out = in;
    stored_ = ~uint64_t{0};
    for (int64_t i = 0; i < smaller(kPrefetch, loads); ++i) {
      Load(i, in, 1);
    }
    for (int64_t i = 0; i < loads + lag; ++i) {
      if (i + kPrefetch < loads) {
        Load(i + kPrefetch, in, 1);
      }
      if (i < loads) {
        WaitLoad(i);
        StatisticsStep(i, now, loads);
        Advance(now, 1);
      } else {
        SumHeld(loads);
      }
      if (i > loads) {
        FinishPending();
      }
      if (i >= lag) {
        MakeOutput(Slot(i - lag), Work(i + 1), out, states_[out.ordinal % 2]);
        Store(i - lag, loads, out);
        Advance(out, 1);
      }
    }
  }

  __aicore__ inline void Block() {
    StageFacts();
    const int64_t chunks = CountReadChunks();
    if (kStats) {
      // Both places of max_out_ are free.
      SetFlag<HardEvent::S_V>(EVENT_ID0);
      SetFlag<HardEvent::S_V>(EVENT_ID1);
    }
    if (chunks > 0) {
      if constexpr (kStats && kHasOutput) {
        if (resident_) {
          Resident(chunks);
        } else {
          Stream(chunks);
        }
      } else {
        Stream(chunks);
      }
    }
    if (kStats) {
      WaitFlag<HardEvent::S_V>(EVENT_ID0);
      WaitFlag<HardEvent::S_V>(EVENT_ID1);
      StoreStatistics();
    }
    if (kOutput == Output::grad) {
      StoreZeros();
    }
    PipeBarrier<PIPE_ALL>();  // the next block starts from scratch
  }

  __aicore__ inline void StoreStatistics() {
    for (int64_t i = 0; i < pieces_; ++i) {
      if (!IsRead(PieceAt(i).row)) {
        out_lse_.SetValue(i, 0.0f);
        out_lse_low_.SetValue(i, 0.0f);
        out_picked_.SetValue(i, 0.0f);
        out_wsum_.SetValue(i, 0.0f);
        out_weight_.SetValue(i, 0.0f);
      }
    }
    SetFlag<HardEvent::S_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::S_MTE3>(EVENT_ID0);
    CopyOut(Gm<float>(gm_.lse, first_), out_lse_, pieces_);
    CopyOut(Gm<float>(gm_.lse_low, first_), out_lse_low_, pieces_);
    CopyOut(Gm<float>(gm_.picked, first_), out_picked_, pieces_);
    if (gm_.wsum != nullptr) {
      CopyOut(Gm<float>(gm_.wsum, first_), out_wsum_, pieces_);
    }
    if (gm_.part_weight != nullptr) {
      CopyOut(Gm<float>(gm_.part_weight, first_), out_weight_, pieces_);
    }
  }

  // The gradient of rows that were not read.
  __aicore__ inline void StoreZeros() {
    bool filled = false;
    for (int64_t i = 0; i < pieces_; ++i) {
      const Piece piece = PieceAt(i);
      if (IsRead(piece.row)) {
        continue;
      }
      if (!filled) {
        AscendC::Duplicate(zeros_.template ReinterpretCast<float>(), 0.0f, kZeroBytes / sizeof(float));
        SetFlag<HardEvent::V_MTE3>(kOtherFlag);
        WaitFlag<HardEvent::V_MTE3>(kOtherFlag);
        filled = true;
      }
      const int64_t end = smaller(piece.end * plan_.chunk_cols, args_.cols);
      const int64_t most = kZeroBytes / sizeof(T);
      for (int64_t column = piece.begin * plan_.chunk_cols; column < end; column += most) {
        CopyOut(Gm<T>(gm_.output, piece.row * args_.output_stride + column), zeros_, smaller(most, end - column));
      }
    }
  }

  // ---- memory ----

  template <typename U>
  static constexpr int64_t kBlockOf = kDataBlock / sizeof(U);

  template <typename U>
  __aicore__ inline LocalTensor<U> Ub(int64_t offset, int64_t n) {
    return ub_.GetWithOffset<U>(n, offset);
  }

  __aicore__ inline void Allocate() {
    const LongBuffers b = long_buffers(args_.dtype, plan_.chunk_cols, slots_);
    pipe_.InitBuffer(ub_, b.total);
    ring_ = Ub<T>(b.ring, slots_ * plan_.chunk_cols);
    work_ = Ub<float>(b.work, 2 * plan_.chunk_cols);
    weight_ = Ub<float>(b.weight, plan_.chunk_cols);
    zeros_ = Ub<T>(b.zeros, kZeroBytes / sizeof(T));
    reduced_ = Ub<float>(b.reduced, kMaxChunk / kBlock + kLanes);
    max_out_ = Ub<float>(b.max_out, 2 * kBlock);
    chunk_max_ = Ub<float>(b.chunk_max, 2 * kLanes);
    chunk_sum_ = Ub<float>(b.chunk_sum, 2 * kLanes);
    chunk_wsum_ = Ub<float>(b.chunk_wsum, 2 * kLanes);
    chunk_weight_ = Ub<float>(b.chunk_weight, 2 * kLanes);
    fold_ = Ub<float>(b.fold, kLanes);
    row_sum_ = Ub<float>(b.row_sum, kBlock);
    target_ = Ub<int64_t>(b.target, kFactRows);
    picked_ = Ub<T>(b.picked, kFactRows * kBlockOf<T>);
    target_weight_ = Ub<float>(b.target_weight, kFactRows * kBlock);
    lse_ = Ub<float>(b.lse, kFactRows);
    lse_low_ = Ub<float>(b.lse_low, kFactRows);
    grad_loss_ = Ub<float>(b.grad_loss, kFactRows);
    grad_z_loss_ = Ub<float>(b.grad_z_loss, kFactRows);
    out_lse_ = Ub<float>(b.out_lse, kFactRows);
    out_lse_low_ = Ub<float>(b.out_lse_low, kFactRows);
    out_picked_ = Ub<float>(b.out_picked, kFactRows);
    out_wsum_ = Ub<float>(b.out_wsum, kFactRows);
    out_weight_ = Ub<float>(b.out_weight, kFactRows);
  }

  AscendC::TPipe& pipe_;
  const XentPlan plan_;
  const XentArgs args_;
  const RowTensors gm_;

  bool resident_ = false;
  int64_t slots_ = 0;             // of the ring
  int64_t first_ = 0, last_ = 0;  // of the pieces, without statistics of the chunks, of the block at hand
  int64_t pieces_ = 0, fact_row_ = 0;
  Joined joined_{};
  Pending pending_{-1, 0, 0, {}};
  Held held_{-1, {}};
  int64_t filled_ = 0;   // chunks since the last fold
  uint64_t stored_ = 0;  // bit i % kFlags: chunk i leaves by a copy out
  Upstream upstream_{};
  RowState states_[2];

  AscendC::TBuf<AscendC::TPosition::VECCALC> ub_;
  LocalTensor<T> ring_, zeros_, picked_;
  LocalTensor<float> work_, weight_, reduced_, max_out_;
  LocalTensor<float> chunk_max_, chunk_sum_, chunk_wsum_, chunk_weight_, fold_, row_sum_;
  LocalTensor<int64_t> target_;
  LocalTensor<float> target_weight_, lse_, lse_low_, grad_loss_, grad_z_loss_;
  LocalTensor<float> out_lse_, out_lse_low_, out_picked_, out_wsum_, out_weight_;
};

}  // namespace npu_xent
