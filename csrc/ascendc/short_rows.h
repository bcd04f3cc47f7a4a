// Several short rows a tile (row mode `short`, row_plan.h): [rows, cols] of them lie in UB at a time.
//
// One value a row is one lane of a vector. What works on the whole tile goes over blocks of 64 columns with one repeat
// a row, and meets a row's value as a data block that holds it eight times (Brcb). Queues carry the tile in and out and
// overlap the copies with the arithmetic; the scalar unit looks up the targets two tiles ahead.
//
// The target's column is found by comparing column numbers, so no target can make anything be read out of bounds.
#pragma once

#include "ascendc/row_kernel.h"

namespace npu_xent {

template <typename T, Output kOutput, bool kStats>
class ShortRows {
  static constexpr bool kHasOutput = kOutput != Output::none;
  static constexpr bool kGrad = kOutput == Output::grad;
  static constexpr bool kFp32 = kIsFp32<T>;

 public:
  __aicore__ inline ShortRows(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                              const RowTensors& tensors)
      : pipe_(pipe), plan_(plan), args_(args), gm_(tensors) {}

  __aicore__ inline void Run() {
    const Share mine = share_of(work_items(plan_, args_.rows), AscendC::GetBlockIdx(), AscendC::GetBlockNum());
    if (mine.begin == mine.end) {
      return;
    }
    Allocate();
    if constexpr (kGrad) {
      upstream_ = ReadUpstream(args_, gm_);
    }
    PrepareConstants();
    for (int64_t tile = mine.begin; tile < smaller(mine.begin + 2, mine.end); ++tile) {
      LookUp(tile);
      CopyTileIn(facts_[tile % kSets]);
    }
    for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
      ComputeTile(facts_[tile % kSets]);
      if (tile + 2 < mine.end) {
        LookUp(tile + 2);
        CopyTileIn(facts_[(tile + 2) % kSets]);
      }
    }
    Drain();
  }

 private:
  // What the scalar unit found about the rows of a tile; there are kSets sets of the lanes it writes, by turns.
  static constexpr int64_t kSets = 3;
  struct Facts {
    int64_t first, rows, set;
    bool any_bad, any_ignored, any_unread;
    uint64_t ignored[kMaxTileRows / 64];  // a bit a row
  };

  // Columns of block j: those of the row, or also the padding that keeps rows aligned.
  __aicore__ inline int64_t Blocks() const { return div_up(args_.cols, kLanes); }
  __aicore__ inline int64_t Width(int64_t j) const { return smaller(kLanes, args_.cols - j * kLanes); }
  __aicore__ inline int64_t PaddedBlocks() const { return div_up(padded_, kLanes); }
  __aicore__ inline int64_t PaddedWidth(int64_t j) const { return smaller(kLanes, padded_ - j * kLanes); }
  __aicore__ inline int64_t RowStride() const { return padded_ / kBlock; }  // of fp32 rows, in data blocks

  // ---- the scalar unit: targets ----

  __aicore__ inline bool IgnoredAt(const Facts& f, int64_t r) const { return (f.ignored[r / 64] >> (r % 64)) % 2 != 0; }
  __aicore__ inline bool ReadAt(const Facts& f, int64_t r) const { return args_.read_ignored != 0 || !IgnoredAt(f, r); }

  __aicore__ inline void LookUp(int64_t tile) {
    Facts& f = facts_[tile % kSets];
    f.first = tile * plan_.rows_per_tile;
    f.rows = smaller(plan_.rows_per_tile, args_.rows - f.first);
    f.set = tile % kSets;
    f.any_bad = f.any_ignored = false;
    for (int64_t word = 0; word < kMaxTileRows / 64; ++word) {
      f.ignored[word] = 0;
    }
    SetFlag<HardEvent::S_MTE2>(EVENT_ID0);  // the targets of the tile before have been read
    WaitFlag<HardEvent::S_MTE2>(EVENT_ID0);
    CopyIn(target_, Gm<int64_t>(gm_.target, f.first), f.rows);
    SetFlag<HardEvent::MTE2_S>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID0);
    // The vector unit has read this set: the copy above came after one into the buffer of the tile that had it.
    const LocalTensor<float> column = SetLane(kColumnOf, f);
    for (int64_t r = 0; r < f.rows; ++r) {
      const int64_t y = target_.GetValue(r);
      const bool ignored = IsIgnored(args_, y), bad = IsBad(args_, y);
      f.any_bad = f.any_bad || bad;
      if (ignored) {
        f.any_ignored = true;
        f.ignored[r / 64] |= uint64_t{1} << (r % 64);
      }
      const bool here = !ignored && !bad && y >= args_.class_start && y - args_.class_start < args_.cols;
      column.SetValue(r, here ? static_cast<float>(y - args_.class_start) : -1.0f);
    }
    f.any_unread = f.any_ignored && args_.read_ignored == 0;
    if (f.any_bad || f.any_unread) {
      LookUpExceptions(f);
    }
    if (kGrad && gm_.weight != nullptr) {
      LookUpWeights(f);
    }
    SetFlag<HardEvent::S_V>(static_cast<event_t>(f.set));
  }
  __aicore__ inline void LookUpExceptions(const Facts& f) {
    const LocalTensor<float> bad = SetLane(kBadOf, f), read = SetLane(kReadOf, f);
    for (int64_t r = 0; r < f.rows; ++r) {
      bad.SetValue(r, IsBad(args_, target_.GetValue(r)) ? NaN() : 0.0f);
      read.SetValue(r, ReadAt(f, r) ? 1.0f : 0.0f);
    }
  }
  __aicore__ inline void LookUpWeights(const Facts& f) {
    for (int64_t r = 0; r < f.rows; ++r) {
      const int64_t y = target_.GetValue(r);
      if (IsKept(args_, y)) {
        CopyIn(target_weight_[r * kBlock], Gm<float>(gm_.weight, y), 1);
      }
    }
    SetFlag<HardEvent::MTE2_S>(EVENT_ID1);
    WaitFlag<HardEvent::MTE2_S>(EVENT_ID1);
    const LocalTensor<float> weight = SetLane(kWeightOf, f);
    for (int64_t r = 0; r < f.rows; ++r) {
      const int64_t y = target_.GetValue(r);
      weight.SetValue(r, IsKept(args_, y) ? target_weight_.GetValue(r * kBlock) : 0.0f);
    }
  }

  // ---- copies ----

  // Rows so far apart that one copy cannot tell the gap, or that overlap, are copied one by one.
  __aicore__ inline bool FarApart(int64_t stride) const {
    return stride < args_.cols || (stride - args_.cols) * static_cast<int64_t>(sizeof(T)) > int64_t{1} << 31;
  }
  __aicore__ inline uint32_t GapBytes(int64_t stride) const {
    return FarApart(stride) ? 0 : static_cast<uint32_t>((stride - args_.cols) * sizeof(T));
  }
  __aicore__ inline AscendC::DataCopyExtParams RowsOf(int64_t rows, uint32_t gap_in, uint32_t gap_out) const {
    return {static_cast<uint16_t>(rows), static_cast<uint32_t>(args_.cols * sizeof(T)), gap_in, gap_out, 0};
  }

  // The rows that are read, a run of neighbours at a time, and the operands of a gradient.
  __aicore__ inline void CopyTileIn(const Facts& f) {
    LocalTensor<T> in = in_.template AllocTensor<T>();
    const AscendC::DataCopyPadExtParams<T> pad{true, 0, static_cast<uint8_t>(padded_ - args_.cols), static_cast<T>(0)};
    const int64_t most = FarApart(args_.logits_stride) ? 1 : f.rows;
    for (int64_t r = 0; r < f.rows;) {
      int64_t end = r;
      while (end < f.rows && end - r < most && ReadAt(f, end)) {
        ++end;
      }
      if (end > r) {
        AscendC::DataCopyPad(in[r * padded_], Gm<T>(gm_.logits, (f.first + r) * args_.logits_stride),
                             RowsOf(end - r, GapBytes(args_.logits_stride), 0), pad);
      }
      r = larger(end, r + 1);
    }
    in_.EnQue(in);
    if constexpr (!kStats) {
      LocalTensor<float> operands = operands_.AllocTensor<float>();
      CopyIn(operands, Gm<float>(gm_.lse, f.first), f.rows);
      CopyOperand(operands[lane_count_], gm_.lse_low, f);
      if (args_.reduction == kReductionNone) {
        CopyOperand(operands[2 * lane_count_], gm_.grad_loss, f);
        CopyOperand(operands[3 * lane_count_], gm_.grad_z_loss, f);
      }
      operands_.EnQue(operands);
    }
  }
  __aicore__ inline void CopyOperand(const LocalTensor<float>& to, GM_ADDR from, const Facts& f) {
    if (from != nullptr) {
      CopyIn(to, Gm<float>(from, f.first), f.rows);
    }
  }
  __aicore__ inline void CopyTileOut(const Facts& f) {
    LocalTensor<T> out = out_.template DeQue<T>();
    const int64_t most = FarApart(args_.output_stride) ? 1 : f.rows;
    for (int64_t r = 0; r < f.rows; r += most) {
      AscendC::DataCopyPad(Gm<T>(gm_.output, (f.first + r) * args_.output_stride), out[r * padded_],
                           RowsOf(most, 0, GapBytes(args_.output_stride)));
    }
    out_.FreeTensor(out);
  }
  __aicore__ inline void StoreStatistics(const Facts& f) {
    SetFlag<HardEvent::V_MTE3>(statistics_ready_);
    WaitFlag<HardEvent::V_MTE3>(statistics_ready_);
    CopyOut(Gm<float>(gm_.lse, f.first), V(kLse), f.rows);
    CopyOut(Gm<float>(gm_.lse_low, f.first), V(kLseLow), f.rows);
    CopyOut(Gm<float>(gm_.picked, f.first), V(kPicked), f.rows);
    if (Smoothing()) {
      CopyOut(Gm<float>(gm_.wsum, f.first), V(kWsum), f.rows);
    }
    SetFlag<HardEvent::MTE3_V>(statistics_left_);
  }

  // ---- vector unit: vectors with a lane a row, and the tile ----

  enum Lane : int64_t { kColumnOf, kWeightOf, kBadOf, kReadOf, kSetLanes };  // written by the scalar unit
  enum Vector : int64_t {
    kMax = kSets * kSetLanes,  // what was subtracted before exp
    kSum,
    kLse,
    kLseLow,
    kPicked,
    kWsum,
    kGradLoss,
    kGradZ,
    kA,
    kB,
    kOffset,
    kScale,
    kAtTarget,
    kScratch,
    kMore,
    kTail,  // of a reduction
    kVectors
  };
  static_assert(kVectors <= kShortLanes, "row_plan.h keeps memory for so many");

  __aicore__ inline LocalTensor<float> SetLane(Lane lane, const Facts& f) const {
    return lanes_[(f.set * kSetLanes + lane) * lane_count_];
  }
  __aicore__ inline LocalTensor<float> V(Vector v) const { return lanes_[v * lane_count_]; }
  __aicore__ inline LocalTensor<uint8_t> Hot(int64_t j) const { return hot_[j * lane_count_ * 8]; }
  __aicore__ inline bool Smoothing() const { return kStats && gm_.wsum != nullptr; }

  __aicore__ inline void PrepareConstants() {
    const int64_t width = round_up(padded_, kLanes);
    AscendC::Duplicate(lanes_, 0.0f, kShortLanes * lane_count_);
    AscendC::CreateVecIndex(columns_, 0.0f, width);
    AscendC::Duplicate(weight_, gm_.weight == nullptr ? 1.0f : 0.0f, width);
    PipeBarrier<PIPE_V>();
    for (int64_t set = 0; gm_.weight == nullptr && set < kSets; ++set) {
      AscendC::Duplicate(lanes_[(set * kSetLanes + kWeightOf) * lane_count_], 1.0f, lane_count_);
    }
    AscendC::Duplicate(V(kGradLoss), upstream_.loss, lane_count_);
    AscendC::Duplicate(V(kGradZ), upstream_.z, lane_count_);
    if (gm_.weight != nullptr) {
      const event_t cleared = static_cast<event_t>(pipe_.FetchEventID(HardEvent::V_MTE2));
      SetFlag<HardEvent::V_MTE2>(cleared);
      WaitFlag<HardEvent::V_MTE2>(cleared);
      CopyIn(weight_, Gm<float>(gm_.weight, args_.class_start), args_.cols);
      const event_t loaded = static_cast<event_t>(pipe_.FetchEventID(HardEvent::MTE2_V));
      SetFlag<HardEvent::MTE2_V>(loaded);
      WaitFlag<HardEvent::MTE2_V>(loaded);
    }
    if (Smoothing()) {
      ReduceTile<Total>(V(kScratch), weight_, 1);
    }
    SetFlag<HardEvent::V_S>(EVENT_ID4);  // from here the scalar unit writes its lanes
    WaitFlag<HardEvent::V_S>(EVENT_ID4);
    if (Smoothing()) {
      shard_weight_ = V(kScratch).GetValue(0);
    }
  }

  // out[r] = the reduction of the columns of row r. Block reductions bring each 64 columns to 8 numbers a row, a tree
  // over these makes 8 of them all, and one more block reduction one. What is left of less than 64 columns is reduced
  // by itself: in a block reduction it could leave blocks without any lane.
  template <typename Reduction>
  __aicore__ inline void ReduceTile(const LocalTensor<float>& out, const LocalTensor<float>& x, int64_t rows) {
    const int64_t blocks = args_.cols / kLanes, tail = args_.cols % kLanes;
    for (int64_t j = 0; j < blocks; ++j) {
      Reduction::OfBlocks(Part(j, rows), x[j * kLanes], rows, kLanes, RowStride());
    }
    if (tail != 0) {
      Reduction::OfRepeats(blocks > 0 ? V(kTail) : out, x[blocks * kLanes], rows, tail, RowStride());
    }
    PipeBarrier<PIPE_V>();
    if (blocks == 0) {
      return;
    }
    for (int64_t parts = blocks; parts > 1; parts -= parts / 2) {
      Reduction::OfTwo(parts_, parts_, Part(parts - parts / 2, rows), parts / 2 * rows * kBlock);
      PipeBarrier<PIPE_V>();
    }
    const int64_t repeats = rows / kBlock, rest = rows % kBlock;
    if (repeats > 0) {
      Reduction::OfBlocks(out, parts_, repeats, kLanes, kBlock);
    }
    if (rest > 0) {
      Reduction::OfBlocks(out[repeats * kBlock], parts_[repeats * kLanes], 1, rest * kBlock, kBlock);
    }
    PipeBarrier<PIPE_V>();
    if (tail != 0) {
      Reduction::OfTwo(out, out, V(kTail), rows);
      PipeBarrier<PIPE_V>();
    }
  }
  __aicore__ inline LocalTensor<float> Part(int64_t j, int64_t rows) const { return parts_[j * rows * kBlock]; }

  // block_[r] = v[r] eight times
  __aicore__ inline void Spread(const LocalTensor<float>& v, int64_t rows) {
    AscendC::Brcb(block_, v, div_up(rows, kBlock), AscendC::BrcbRepeatParams(1, 8));
    PipeBarrier<PIPE_V>();
  }
  // out = x - v, v[r] from the whole of row r; and out = x v.
  __aicore__ inline void SubLanes(const LocalTensor<float>& out, const LocalTensor<float>& x,
                                  const LocalTensor<float>& v, int64_t rows) {
    Spread(v, rows);
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Sub(out[j * kLanes], x[j * kLanes], block_, PaddedWidth(j), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, RowStride(), RowStride(), 1));
    }
    PipeBarrier<PIPE_V>();
  }
  __aicore__ inline void MulLanes(const LocalTensor<float>& out, const LocalTensor<float>& x,
                                  const LocalTensor<float>& v, int64_t rows) {
    Spread(v, rows);
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Mul(out[j * kLanes], x[j * kLanes], block_, PaddedWidth(j), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, RowStride(), RowStride(), 1));
    }
    PipeBarrier<PIPE_V>();
  }

  // ---- one tile ----

  __aicore__ inline void ComputeTile(const Facts& f) {
    LocalTensor<T> in = in_.template DeQue<T>();
    WaitFlag<HardEvent::S_V>(static_cast<event_t>(f.set));
    if (kStats && tiles_ > 0) {
      WaitFlag<HardEvent::MTE3_V>(statistics_left_);  // the statistics of the tile before have left
    }
    ClearUnread(in, f);
    const LocalTensor<float> x = Scaled(in, f.rows);
    if constexpr (kStats || kGrad) {
      FindTargets(x, f);
    }
    if constexpr (kStats) {
      Statistics(x, f);
      StoreStatistics(f);
    } else {
      TakeOperands(f);
    }
    if constexpr (kGrad) {
      if constexpr (!kStats) {
        SubLanes(exps_, x, V(kMax), f.rows);
        AscendC::Exp(exps_, exps_, f.rows * padded_);  // needed again after many a barrier
      }
      RowCoefficients(f);
    }
    if constexpr (kHasOutput) {
      LocalTensor<T> out = out_.template AllocTensor<T>();
      if constexpr (kGrad) {
        MakeGrad(out, f);
      } else {
        MakeLogProb(out, x, f);
      }
      out_.EnQue(out);
    }
    in_.FreeTensor(in);
    if constexpr (kHasOutput) {
      CopyTileOut(f);
    }
    ++tiles_;
  }

  // Rows that were not copied in become zeros.
  __aicore__ inline void ClearUnread(const LocalTensor<T>& in, const Facts& f) {
    for (int64_t r = 0; f.any_unread && r < f.rows; ++r) {
      if (!ReadAt(f, r)) {
        ClearRow(in, r);
      }
    }
    if (f.any_unread) {
      PipeBarrier<PIPE_V>();
    }
  }
  __aicore__ inline void ClearRow(const LocalTensor<T>& tile, int64_t r) {
    AscendC::Duplicate(tile[r * padded_].template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
                       padded_ * sizeof(T) / sizeof(int16_t));
  }

  // t x in fp32, in the queue's tensor itself when it is that already. What follows spreads something first, and has a
  // barrier there.
  __aicore__ inline LocalTensor<float> Scaled(const LocalTensor<T>& in, int64_t rows) {
    const int64_t n = rows * padded_;
    if constexpr (kFp32) {
      if (args_.logit_scale == 1.0f) {
        return in;
      }
      AscendC::Muls(x_, in, args_.logit_scale, n);
    } else {
      AscendC::Cast(x_, in, AscendC::RoundMode::CAST_NONE, n);
      if (args_.logit_scale != 1.0f) {
        PipeBarrier<PIPE_V>();
        AscendC::Muls(x_, x_, args_.logit_scale, n);
      }
    }
    return x_;
  }

  // hot_, and kPicked by way of exps_, which nothing else needs yet.
  __aicore__ inline void FindTargets(const LocalTensor<float>& x, const Facts& f) {
    Spread(SetLane(kColumnOf, f), f.rows);
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Compare(Hot(j), columns_[j * kLanes], block_, AscendC::CMPMODE::EQ, kLanes, f.rows,
                       AscendC::BinaryRepeatParams(1, 1, 0, 8, 0, 1));
    }
    PipeBarrier<PIPE_V>();
    for (int64_t j = 0; j < Blocks(); ++j) {
      AscendC::Select(exps_[j * kLanes], Hot(j), x[j * kLanes], 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE,
                      Width(j), f.rows, AscendC::BinaryRepeatParams(1, 1, 1, RowStride(), RowStride(), 0));
    }
    PipeBarrier<PIPE_V>();
    ReduceTile<Total>(V(kPicked), exps_, f.rows);
  }

  __aicore__ inline void Statistics(const LocalTensor<float>& x, const Facts& f) {
    const int64_t n = f.rows;
    ReduceTile<Maximum>(V(kMax), x, n);
    // Between the finite bounds of fp32: rows of -inf have exponentials 0 then and not NaN, +inf an infinite sum.
    AscendC::Maxs(V(kMax), V(kMax), -kFloatMax, n);
    PipeBarrier<PIPE_V>();
    AscendC::Mins(V(kMax), V(kMax), kFloatMax, n);
    PipeBarrier<PIPE_V>();
    SubLanes(exps_, x, V(kMax), n);
    if (Smoothing()) {
      WeightedSum(x, n);
    }
    AscendC::Exp(exps_, exps_, n * padded_);
    PipeBarrier<PIPE_V>();
    ReduceTile<Total>(V(kSum), exps_, n);
    LogOfSum(n);
    if (Smoothing()) {
      // sum w (x - max) becomes sum w (x - lse)
      AscendC::Sub(V(kScratch), V(kMax), V(kLse), n);
      PipeBarrier<PIPE_V>();
      AscendC::Sub(V(kScratch), V(kScratch), V(kLseLow), n);
      PipeBarrier<PIPE_V>();
      AscendC::Muls(V(kScratch), V(kScratch), shard_weight_, n);
      PipeBarrier<PIPE_V>();
      AscendC::Add(V(kWsum), V(kWsum), V(kScratch), n);
      PipeBarrier<PIPE_V>();
    }
    if (f.any_bad) {
      AscendC::Add(V(kPicked), V(kPicked), SetLane(kBadOf, f), n);
    }
    if (f.any_unread) {
      // They were taken for zeros, so all of this is finite.
      AscendC::Mul(V(kLse), V(kLse), SetLane(kReadOf, f), n);
      AscendC::Mul(V(kLseLow), V(kLseLow), SetLane(kReadOf, f), n);
      AscendC::Mul(V(kWsum), V(kWsum), SetLane(kReadOf, f), n);
    }
    PipeBarrier<PIPE_V>();
  }

  // kWsum = sum w (x - max), from x - max in exps_, which is made anew if the weights have been in it.
  __aicore__ inline void WeightedSum(const LocalTensor<float>& x, int64_t n) {
    if (gm_.weight == nullptr) {
      ReduceTile<Total>(V(kWsum), exps_, n);
      return;
    }
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Mul(exps_[j * kLanes], exps_[j * kLanes], weight_[j * kLanes], PaddedWidth(j), n,
                   AscendC::BinaryRepeatParams(1, 1, 1, RowStride(), RowStride(), 0));
    }
    PipeBarrier<PIPE_V>();
    ReduceTile<Total>(V(kWsum), exps_, n);
    SubLanes(exps_, x, V(kMax), n);
  }

  // kLse + kLseLow = kMax + log(kSum) exactly (Knuth's sum of two numbers); kLseLow is 0 where kLse is not finite.
  __aicore__ inline void LogOfSum(int64_t n) {
    const LocalTensor<float> max = V(kMax), log = V(kSum), lse = V(kLse), low = V(kLseLow);
    const LocalTensor<float> log_rounded = V(kScratch), max_rounded = V(kMore);
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
    AscendC::CompareScalar(mask_, log_rounded, kFloatMax, AscendC::CMPMODE::LE, lane_count_);
    PipeBarrier<PIPE_V>();
    AscendC::Select(low, mask_, low, 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    PipeBarrier<PIPE_V>();
  }

  // Statistics and gradients that came in with the tile.
  __aicore__ inline void TakeOperands(const Facts& f) {
    const int64_t n = f.rows;
    LocalTensor<float> operands = operands_.DeQue<float>();
    AscendC::Adds(V(kLse), operands, 0.0f, n);
    AscendC::Adds(V(kMax), operands, 0.0f, n);
    if (gm_.lse_low != nullptr) {
      AscendC::Adds(V(kLseLow), operands[lane_count_], 0.0f, n);
    }
    if (kGrad && args_.reduction == kReductionNone) {
      if (gm_.grad_loss != nullptr) {
        AscendC::Adds(V(kGradLoss), operands[2 * lane_count_], 0.0f, n);
        AscendC::Adds(V(kGradZ), operands[2 * lane_count_], 0.0f, n);
        PipeBarrier<PIPE_V>();
      }
      if (gm_.grad_z_loss != nullptr) {
        if (gm_.grad_loss != nullptr) {
          AscendC::Add(V(kGradZ), V(kGradZ), operands[3 * lane_count_], n);
        } else {
          AscendC::Adds(V(kGradZ), operands[3 * lane_count_], 0.0f, n);
        }
      }
    }
    PipeBarrier<PIPE_V>();
    operands_.FreeTensor(operands);
  }

  // u a, u b, u s of row_math.h; kScale, the factor of the exponentials; kAtTarget, the gradient of the target's logit.
  __aicore__ inline void RowCoefficients(const Facts& f) {
    const int64_t n = f.rows;
    const float u = args_.grad_scale;
    AscendC::Mul(V(kB), V(kGradLoss), SetLane(kWeightOf, f), n);
    AscendC::Muls(V(kOffset), V(kGradLoss), u * args_.class_share, n);
    AscendC::Muls(V(kA), V(kGradLoss),
                  IsFinite(upstream_.class_weight) ? u * args_.class_share * upstream_.class_weight : NaN(), n);
    AscendC::Mul(V(kScratch), V(kGradZ), V(kLse), n);
    PipeBarrier<PIPE_V>();
    AscendC::Muls(V(kB), V(kB), u * args_.target_share, n);
    AscendC::Muls(V(kScratch), V(kScratch), u * 2.0f * args_.lse_square_scale, n);
    AscendC::Sub(V(kMore), V(kLse), V(kLse), n);  // NaN where lse is not finite, else 0
    PipeBarrier<PIPE_V>();
    AscendC::Add(V(kA), V(kA), V(kB), n);
    AscendC::Add(V(kScratch), V(kScratch), V(kMore), n);
    if (f.any_bad) {
      PipeBarrier<PIPE_V>();
      AscendC::Add(V(kScratch), V(kScratch), SetLane(kBadOf, f), n);
    }
    PipeBarrier<PIPE_V>();
    AscendC::Add(V(kA), V(kA), V(kScratch), n);
    AscendC::Sub(V(kScale), V(kMax), V(kLse), n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(V(kScale), V(kScale), V(kLseLow), n);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(V(kScale), V(kScale), n);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(V(kScale), V(kScale), V(kA), n);
    ProbabilityLessOne(n);
    // a (p - 1) + (a - b) - s w
    AscendC::Mul(V(kAtTarget), V(kAtTarget), V(kA), n);
    AscendC::Sub(V(kMore), V(kA), V(kB), n);
    AscendC::Mul(V(kScratch), V(kOffset), SetLane(kWeightOf, f), n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(V(kAtTarget), V(kAtTarget), V(kMore), n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(V(kAtTarget), V(kAtTarget), V(kScratch), n);
  }

  // kAtTarget = p - 1 = exp(picked - lse) - 1, near 0 by the series of Expm1NearZero, which does not cancel.
  __aicore__ inline void ProbabilityLessOne(int64_t n) {
    const LocalTensor<float> below = V(kScratch), far = V(kMore), near = V(kAtTarget), z = V(kSum);
    AscendC::Sub(below, V(kPicked), V(kLse), n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(below, below, V(kLseLow), n);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(far, below, n);
    AscendC::Maxs(z, below, -0.5f, n);
    PipeBarrier<PIPE_V>();
    AscendC::Adds(far, far, -1.0f, n);
    AscendC::CompareScalar(mask_, below, -0.5f, AscendC::CMPMODE::GT, lane_count_);
    AscendC::Muls(near, z, 1.0f / 10, n);
    PipeBarrier<PIPE_V>();
    for (int32_t k = 9; k > 0; --k) {
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
    AscendC::Select(near, mask_, near, far, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, n);
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void MakeGrad(const LocalTensor<T>& out, const Facts& f) {
    const int64_t n = f.rows;
    MulLanes(exps_, exps_, V(kScale), n);
    if (args_.class_share != 0.0f) {
      // less s w
      Spread(V(kOffset), n);
      for (int64_t j = 0; j < PaddedBlocks(); ++j) {
        AscendC::Mul(x_[j * kLanes], weight_[j * kLanes], block_, PaddedWidth(j), n,
                     AscendC::BinaryRepeatParams(1, 1, 0, RowStride(), 0, 1));
      }
      PipeBarrier<PIPE_V>();
      AscendC::Sub(exps_, exps_, x_, n * padded_);
    }
    Spread(V(kAtTarget), n);
    const LocalTensor<float> grad = Fp32Of(out);
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Select(grad[j * kLanes], Hot(j), block_, exps_[j * kLanes], AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE,
                      PaddedWidth(j), n, AscendC::BinaryRepeatParams(1, 0, 1, RowStride(), 1, RowStride()));
    }
    PipeBarrier<PIPE_V>();
    Round(out, n);
    for (int64_t r = 0; f.any_ignored && r < n; ++r) {
      if (IgnoredAt(f, r)) {
        ClearRow(out, r);
      }
    }
  }

  __aicore__ inline void MakeLogProb(const LocalTensor<T>& out, const LocalTensor<float>& x, const Facts& f) {
    const int64_t n = f.rows;
    // lse, NaN where it is not finite
    AscendC::Sub(V(kScratch), V(kLse), V(kLse), n);
    PipeBarrier<PIPE_V>();
    AscendC::Add(V(kScratch), V(kScratch), V(kLse), n);
    PipeBarrier<PIPE_V>();
    SubLanes(exps_, x, V(kScratch), n);
    SubLanes(Fp32Of(out), exps_, V(kLseLow), n);
    Round(out, n);
  }

  // Where the output is made in fp32, and its rounding.
  __aicore__ inline LocalTensor<float> Fp32Of(const LocalTensor<T>& out) const {
    if constexpr (kFp32) {
      return out;
    } else {
      return exps_;
    }
  }
  __aicore__ inline void Round(const LocalTensor<T>& out, int64_t rows) {
    if constexpr (!kFp32) {
      AscendC::Cast(out, exps_, AscendC::RoundMode::CAST_RINT, rows * padded_);
      PipeBarrier<PIPE_V>();
    }
  }

  // Flags that nobody will wait for any more.
  __aicore__ inline void Drain() {
    if (kStats) {
      WaitFlag<HardEvent::MTE3_V>(statistics_left_);
    }
    pipe_.ReleaseEventID<HardEvent::V_MTE3>(statistics_ready_);
    pipe_.ReleaseEventID<HardEvent::MTE3_V>(statistics_left_);
  }

  // ---- memory ----

  template <typename U>
  __aicore__ inline LocalTensor<U> Ub(int64_t offset, int64_t n) {
    return ub_.GetWithOffset<U>(n, offset);
  }

  __aicore__ inline void Allocate() {
    const int64_t rows = plan_.rows_per_tile;
    const ShortBuffers b = short_buffers(args_.dtype, rows, args_.cols);
    padded_ = short_row_cols(args_.dtype, args_.cols);
    lane_count_ = round_up(rows, kLanes);
    const int64_t width = round_up(padded_, kLanes);
    pipe_.InitBuffer(in_, 2, b.tile_bytes);
    if constexpr (kHasOutput) {
      pipe_.InitBuffer(out_, 2, b.tile_bytes);
    }
    if constexpr (!kStats) {
      pipe_.InitBuffer(operands_, 2, b.row_bytes);
    }
    pipe_.InitBuffer(ub_, b.rest);
    // The queues take flags between the same pipes.
    statistics_ready_ = static_cast<event_t>(pipe_.AllocEventID<HardEvent::V_MTE3>());
    statistics_left_ = static_cast<event_t>(pipe_.AllocEventID<HardEvent::MTE3_V>());
    x_ = Ub<float>(b.x, rows * padded_);
    exps_ = Ub<float>(b.exps, rows * padded_);
    hot_ = Ub<uint8_t>(b.hot, width / kLanes * lane_count_ * 8);
    columns_ = Ub<float>(b.columns, width);
    weight_ = Ub<float>(b.weight, width);
    parts_ = Ub<float>(b.parts, larger(1, args_.cols / kLanes) * rows * kBlock);
    block_ = Ub<float>(b.block, lane_count_ * kBlock);
    mask_ = Ub<uint8_t>(b.mask, lane_count_ / 8);
    target_ = Ub<int64_t>(b.target, lane_count_);
    target_weight_ = Ub<float>(b.target_weight, rows * kBlock);
    lanes_ = Ub<float>(b.lanes, kShortLanes * lane_count_);
  }

  AscendC::TPipe& pipe_;
  const XentPlan plan_;
  const XentArgs args_;
  const RowTensors gm_;

  int64_t padded_ = 0;      // columns of a row in UB
  int64_t lane_count_ = 0;  // rows of a tile, rounded up to whole instructions
  int64_t tiles_ = 0;
  Upstream upstream_{};
  float shard_weight_ = 0;  // the sum of this shard's class weights
  Facts facts_[kSets];
  event_t statistics_ready_, statistics_left_;

  AscendC::TQue<AscendC::TPosition::VECIN, 2> in_, operands_;  // two tiles are on their way at a time
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> ub_;
  LocalTensor<float> x_, exps_, columns_, weight_, parts_, block_, target_weight_, lanes_;
  LocalTensor<uint8_t> hot_, mask_;
  LocalTensor<int64_t> target_;
};

}  // namespace npu_xent
