// Rows that are cut into chunks of columns: all row modes except `short` (row_plan.h). This file has the order of the
// work; long_statistics.h and long_output.h have the arithmetic on a chunk.
//
// A chunk is copied into one slot of a ring in UB (pipe MTE2), read there for its row's statistics, overwritten there
// with its output (pipe V), and copied out from there (MTE3). Then the slot is free. The chunk's flags follow it:
// MTE2_V when it has arrived, V_MTE3 when its output is made, and MTE3_MTE2 or V_MTE2 when its slot is free (flags.h).
//
// The vector unit finds the maximum of chunk i + 1 before it sums chunk i, so it need not wait for the scalar unit.
// Outputs trail the statistics by more than a row, so no unit waits there either.
#pragma once

#include "ascendc/long_chunks.h"
#include "ascendc/long_facts.h"
#include "ascendc/long_output.h"
#include "ascendc/long_pieces.h"
#include "ascendc/long_results.h"
#include "ascendc/long_statistics.h"

namespace npu_xent {

template <typename T, Output kOutput, bool kStats>
class LongRows {
  static constexpr bool kHasOutput = kOutput != Output::none;
  static constexpr int64_t kFlags = LongFlag::kChunkIds;
  static_assert(kFlags >= kStreamSlots && kFlags > kExtraSlots, "a flag must be waited for before it is set again");

 public:
  __aicore__ inline LongRows(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                             const RowTensors& tensors)
      : pipe_(pipe),
        plan_(plan),
        args_(args),
        gm_top1_(tensors.top1),
        resident_(kStats && kHasOutput && plan.mode == static_cast<int64_t>(RowMode::resident)),
        pieces_(plan, args),
        facts_(args, tensors),
        chunks_(plan, args, tensors),
        statistics_(args, tensors),
        results_(tensors),
        output_(args, tensors) {}

  __aicore__ inline void Run() {
    const Share mine = share_of(pieces_.Items(), AscendC::GetBlockIdx(), AscendC::GetBlockNum());
    if (mine.begin == mine.end) {
      return;
    }
    Allocate();
    facts_.Prepare();
    for (int64_t first = mine.begin; first < mine.end;) {
      first = pieces_.TakeBlock(first, mine.end);
      RunBlock();
    }
  }

 private:
  __aicore__ inline void Allocate() {
    slots_ = resident_ ? plan_.slots : smaller(plan_.slots, kStreamSlots);
    const LongBuffers b = long_buffers(args_.dtype, plan_.chunk_cols, slots_, args_.softcap != 0.0f, args_.by_row != 0);
    pipe_.InitBuffer(ub_, b.total);
    pieces_.Allocate(ub_, b);
    facts_.Allocate(ub_, b);
    chunks_.Allocate(ub_, b, slots_);
    statistics_.Allocate(ub_, b);
    results_.Allocate(ub_, b);
    output_.Allocate(ub_, b);
  }

  __aicore__ inline void RunBlock() {
    facts_.Stage(pieces_, chunks_.Cap());
    loads_ = pieces_.CountReadChunks();
    if constexpr (kStats) {
      statistics_.Begin();
    }
    if (loads_ > 0) {
      if constexpr (kStats && kHasOutput) {
        if (resident_) {
          Resident();
        } else {
          Stream();
        }
      } else {
        Stream();
      }
    }
    if constexpr (kStats) {
      statistics_.End();
      results_.Store(pieces_);
    }
    if constexpr (kOutput == Output::grad) {
      output_.StoreZeros(chunks_, pieces_);
    }
    PipeBarrier<PIPE_ALL>();  // closes all flags, and frees all buffers for the next block
  }

  // ---- the two orders of work ----

  // Every chunk is loaded for statistics, for an output, or once for each.
  __aicore__ inline void Stream() {
    const int64_t passes = kStats && kHasOutput ? 2 : 1, ahead = slots_ - 2;
    loads_ *= passes;
    Cursor in = pieces_.FirstChunk(), now = in;
    for (int64_t i = 0; i < smaller(ahead, loads_); ++i) {
      Load(i, in, passes);
    }
    for (int64_t i = 0; i < loads_; ++i) {
      const bool output = kHasOutput && now.pass + 1 == passes;
      chunks_.WaitLogits(i);
      if constexpr (kStats) {
        if (!output) {
          StatisticsStep(i, now);
        }
      }
      if constexpr (kHasOutput) {
        if (output) {
          if (now.IsFirst()) {
            PrepareOutput(now);
          }
          OutputStep(i, chunks_.Work(i), now);
        }
      }
      const uint64_t bit = uint64_t{1} << (i % kFlags);
      stored_ = output ? stored_ | bit : stored_ & ~bit;
      if (i + ahead < loads_) {
        Load(i + ahead, in, passes);
      }
      pieces_.Advance(now, passes);
    }
    if constexpr (kStats) {
      SumHeld();
      FinishPending();
    }
  }
  __aicore__ inline void PrepareOutput(const Cursor& at) {
    if constexpr (kStats) {
      SumHeld();
      FinishPending();
    } else {
      states_[at.ordinal % 2] = facts_.MakeState(pieces_, chunks_.Cap(), at.index);
    }
  }

  // Every chunk is loaded once, and stays until its output is made, a row and kOutputLag chunks later.
  __aicore__ inline void Resident() {
    const int64_t lag = plan_.chunks + kOutputLag;
    Cursor in = pieces_.FirstChunk(), now = in, out = in;
    stored_ = ~uint64_t{0};
    for (int64_t i = 0; i < smaller(kPrefetch, loads_); ++i) {
      Load(i, in, 1);
    }
    for (int64_t i = 0; i < loads_ + lag; ++i) {
      if (i + kPrefetch < loads_) {
        Load(i + kPrefetch, in, 1);
      }
      if (i < loads_) {
        chunks_.WaitLogits(i);
        StatisticsStep(i, now);
        pieces_.Advance(now, 1);
      } else {
        SumHeld();
      }
      if (i > loads_) {
        FinishPending();
      }
      if (i >= lag) {
        OutputStep(i - lag, chunks_.Work(i + 1), out);
        pieces_.Advance(out, 1);
      }
    }
  }

  // ---- statistics: the maximum of a chunk at once, its sums after the maximum of the next chunk ----

  __aicore__ inline void StatisticsStep(int64_t load, const Cursor& at) {
    statistics_.FindMax(chunks_, load, at, facts_.RowScale(pieces_, at.piece.row), ContenderOf(at));
    SumHeld();
    held_ = Held{load, at};
  }
  __aicore__ inline Contender ContenderOf(const Cursor& at) const {
    if (gm_top1_ == nullptr) {
      return {-1, 0.0f};
    }
    const int64_t column = pieces_.ColumnOfRow(at.piece.row);
    if (column < 0) {
      return {column, 0.0f};
    }
    return {column,
            chunks_.KeepsOrder() ? Bounded(facts_.MappedPicked(pieces_, at.index)) : facts_.OrderedPicked(at.index)};
  }
  // Sums the held chunk. At the start of a row it finishes the row before, at the end it folds the row.
  __aicore__ inline void SumHeld() {
    if (held_.load < 0) {
      return;
    }
    const Cursor& at = held_.at;
    if (at.IsFirst()) {
      FinishPending();
    }
    statistics_.SumChunk(chunks_, held_.load, at, ContenderOf(at));
    if (!resident_ && held_.load + slots_ < loads_) {
      SetFlag<HardEvent::V_MTE2>(LongFlag::OfChunk(held_.load));
    }
    if (at.IsLast()) {
      statistics_.FoldRow(at);
      pending_ = Pending{at.index, at.ordinal};
    }
    held_.load = -1;
  }
  // Takes the statistics of a row from the vector unit, and prepares its output.
  __aicore__ inline void FinishPending() {
    if (pending_.index < 0) {
      return;
    }
    const RowStatistics row = statistics_.TakeRow();
    results_.Set(pending_.index, row, facts_.Picked(pieces_, pending_.index));
    if constexpr (kHasOutput) {
      states_[pending_.ordinal % 2] =
          facts_.MakeState(pieces_, chunks_.Cap(), pending_.index, row.lse.high, row.lse.low);
    }
    pending_.index = -1;
  }

  // ---- copies of chunks, and their flags ----

  __aicore__ inline void Load(int64_t load, Cursor& at, int64_t passes) {
    if (load >= slots_) {
      const int64_t before = load - slots_;
      if ((stored_ >> (before % kFlags)) % 2 != 0) {
        WaitFlag<HardEvent::MTE3_MTE2>(LongFlag::OfChunk(before));
      } else {
        WaitFlag<HardEvent::V_MTE2>(LongFlag::OfChunk(before));
      }
    }
    chunks_.CopyLogitsIn(load, at.piece.row, at.chunk);
    pieces_.Advance(at, passes);
  }

  // Makes the output of load number `load` and copies it out of its slot.
  __aicore__ inline void OutputStep(int64_t load, const LocalTensor<float>& work, const Cursor& at) {
    const int32_t flag = LongFlag::OfChunk(load);
    output_.Make(chunks_, chunks_.Slot(load), work, at.chunk, states_[at.ordinal % 2]);
    // Loads wait for copies out. The last outputs have no such load: nothing else would keep V from setting the flag
    // twice before MTE3 takes it.
    if (load >= kFlags && load - kFlags + slots_ >= loads_) {
      WaitFlag<HardEvent::MTE3_V>(flag);
    }
    SetFlag<HardEvent::V_MTE3>(flag);
    WaitFlag<HardEvent::V_MTE3>(flag);
    chunks_.CopyOutputOut(load, at.piece.row, at.chunk);
    if (load + slots_ < loads_) {
      SetFlag<HardEvent::MTE3_MTE2>(flag);
    } else if (load + kFlags < loads_) {
      SetFlag<HardEvent::MTE3_V>(flag);
    }
  }

  // A chunk that has been searched and not summed; load -1 for none.
  struct Held {
    int64_t load;
    Cursor at;
  };
  // A row that is folded and not finished; index -1 for none.
  struct Pending {
    int64_t index, ordinal;
  };

  AscendC::TPipe& pipe_;
  const XentPlan plan_;
  const XentArgs args_;
  const GM_ADDR gm_top1_;
  const bool resident_;
  int64_t slots_ = 0, loads_ = 0;  // of the ring; chunks to load in this block
  uint64_t stored_ = 0;            // bit i % kFlags: chunk i has an output, so MTE3 frees its slot
  Held held_{-1, {}};
  Pending pending_{-1, 0};
  RowState states_[2];

  UnifiedBuffer ub_;
  LongPieces<kStats> pieces_;
  LongFacts<T, kOutput, kStats> facts_;
  LongChunks<T> chunks_;
  LongStatistics<T> statistics_;
  LongResults results_;
  LongOutput<T, kOutput> output_;
};

}  // namespace npu_xent
