// The rows that a core works on at a time when rows are cut into chunks of columns: a block of pieces, the targets,
// which decide which rows are read, and the walk over the chunks of these rows.
#pragma once

#include "ascendc/row_kernel.h"

namespace npu_xent {

// Chunks [begin, end) of a row: all of them, or this core's part.
struct Piece {
  int64_t row, begin, end;
};

// A position on the walk over the chunks that are read: piece by piece, all chunks of a piece, once or twice.
struct Cursor {
  int64_t index, ordinal;  // of the piece, in the block and among those that are read
  int64_t pass, chunk;
  Piece piece;

  __aicore__ inline bool IsFirst() const { return chunk == piece.begin; }
  __aicore__ inline bool IsLast() const { return chunk + 1 == piece.end; }
};

template <bool kStats>
class LongPieces {
 public:
  __aicore__ inline LongPieces(const XentPlan& plan, const XentArgs& args) : plan_(plan), args_(args) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const LongBuffers& b) {
    target_ = ub.GetWithOffset<int64_t>(kFactRows, b.target);
  }

  // The number of items that cores share out: rows or parts of rows with statistics, chunks without.
  __aicore__ inline int64_t Items() const {
    return kStats ? work_items(plan_, args_.rows) : chunk_items(plan_, args_.rows);
  }
  // Makes a block of the items from `first` on, as many as there is memory for facts; returns the next block's first.
  __aicore__ inline int64_t TakeBlock(int64_t first, int64_t end) {
    const int64_t last = kStats ? first + kFactRows : (first / plan_.chunks + kFactRows) * plan_.chunks;
    first_ = first;
    last_ = smaller(last, end);
    count_ = kStats ? last_ - first_ : (last_ - 1) / plan_.chunks - first_ / plan_.chunks + 1;
    first_row_ = At(0).row;
    return last_;
  }

  // ---- the block ----

  __aicore__ inline int64_t Count() const { return count_; }
  __aicore__ inline int64_t First() const { return first_; }
  __aicore__ inline int64_t FirstRow() const { return first_row_; }
  __aicore__ inline int64_t RowCount() const { return At(count_ - 1).row - first_row_ + 1; }
  __aicore__ inline Piece At(int64_t i) const {
    if (kStats) {
      const int64_t row = (first_ + i) / plan_.parts;
      const int64_t begin = (first_ + i - row * plan_.parts) * plan_.chunks_per_part;
      return {row, begin, smaller(plan_.chunks, begin + plan_.chunks_per_part)};
    }
    const int64_t row = first_ / plan_.chunks + i, start = row * plan_.chunks;
    return {row, larger(first_ - start, 0), smaller(last_ - start, plan_.chunks)};
  }

  // ---- targets, once they have been copied in ----

  __aicore__ inline void CopyTargetsIn(GM_ADDR target) { CopyIn(target_, Gm<int64_t>(target, first_row_), RowCount()); }
  __aicore__ inline int64_t TargetOf(int64_t row) const { return target_.GetValue(row - first_row_); }
  __aicore__ inline bool IsRowIgnored(int64_t row) const { return IsIgnored(args_, TargetOf(row)); }
  __aicore__ inline bool IsRowBad(int64_t row) const { return IsBad(args_, TargetOf(row)); }
  __aicore__ inline bool IsRead(int64_t row) const { return !IsRowIgnored(row) || args_.read_ignored != 0; }
  // The target's column if the row, or the piece, has it, else -1.
  __aicore__ inline int64_t ColumnOfRow(int64_t row) const { return ColumnOf(args_, TargetOf(row)); }
  __aicore__ inline int64_t TargetColumn(const Piece& piece) const {
    const int64_t column = ColumnOfRow(piece.row);
    const bool here = column >= piece.begin * plan_.chunk_cols && column < piece.end * plan_.chunk_cols;
    return here ? column : -1;
  }

  // ---- the chunks that are read ----

  __aicore__ inline int64_t CountReadChunks() const {
    int64_t chunks = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const Piece piece = At(i);
      chunks += IsRead(piece.row) ? piece.end - piece.begin : 0;
    }
    return chunks;
  }
  __aicore__ inline Cursor FirstChunk() const {
    Cursor at{0, 0, 0, 0, At(0)};
    SkipUnread(at);
    return at;
  }
  // To the next chunk: every piece is passed over `passes` times.
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
    at.piece = At(++at.index);
    SkipUnread(at);
  }

 private:
  __aicore__ inline void SkipUnread(Cursor& at) const {
    while (at.index < count_ && !IsRead(at.piece.row)) {
      at.piece = At(++at.index);
    }
    at.chunk = at.piece.begin;
  }

  const XentPlan plan_;
  const XentArgs args_;
  int64_t first_ = 0, last_ = 0;  // items of the block
  int64_t count_ = 0, first_row_ = 0;
  LocalTensor<int64_t> target_;
};

}  // namespace npu_xent
