// A tile of short rows in UB, [rows, cols] in fp32, and the operations on it.
//
// A value for each row is a vector with one lane a row. Operations on the whole tile take blocks of 64 columns with one
// repeat a row. There a row's value is a data block that holds it eight times (Brcb).
#pragma once

#include "ascendc/row_kernel.h"
#include "ascendc/softcap.h"

namespace npu_xent {

// Facts about the rows of a tile, by the scalar unit. Tiles take turns with kSets sets of the lanes that it writes.
constexpr int64_t kSets = 3;
struct TileFacts {
  int64_t first, rows, set;
  bool any_bad, any_ignored, any_unread;
  uint64_t ignored[kMaxTileRows / 64];  // a bit a row

  __aicore__ inline bool IsIgnored(int64_t r) const { return (ignored[r / 64] >> (r % 64)) % 2 != 0; }
  __aicore__ inline bool IsRead(int64_t r) const { return !any_unread || !IsIgnored(r); }
};

// Vectors with a lane a row.
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
  kVectors,
  // Only by row (row_plan.h):
  kRowScale = kVectors,
  kEntropy,
  kTilt,  // the factor of (x - lse) exp(x - lse) in the gradient; before, the gradient of the entropy
  kTop1,
  kVectorsByRow
};
static_assert(kVectors <= kShortLanes && kVectorsByRow - kVectors <= kLanesByRow,
              "row_plan.h keeps memory for so many");

struct ShortTile {
  __aicore__ inline explicit ShortTile(const XentArgs& args)
      : cols(args.cols), padded(short_row_cols(args.dtype, args.cols)), by_row(args.by_row != 0), softcap(args) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const ShortBuffers& b, int64_t rows) {
    lane_count = round_up(rows, kLanes);
    const int64_t width = round_up(padded, kLanes);
    x = ub.GetWithOffset<float>(b.tile, b.x);
    exps = ub.GetWithOffset<float>(b.tile, b.exps);
    hot = ub.GetWithOffset<uint8_t>(width / kLanes * lane_count * 8, b.hot);
    columns = ub.GetWithOffset<float>(width, b.columns);
    weight = ub.GetWithOffset<float>(width, b.weight);
    floor = ub.GetWithOffset<float>(width, b.floor);
    parts = ub.GetWithOffset<float>(larger(1, cols / kLanes) * rows * kBlock, b.parts);
    block = ub.GetWithOffset<float>(lane_count * kBlock, b.block);
    mask = ub.GetWithOffset<uint8_t>(lane_count / 8, b.mask);
    lanes = ub.GetWithOffset<float>((kShortLanes + (by_row ? kLanesByRow : 0)) * lane_count, b.lanes);
    if (softcap.IsOn()) {
      deficit = ub.GetWithOffset<float>(b.tile, b.cap);
      softcap.Allocate(exps, deficit, hot, b.tile);  // not in use yet when the softcap is applied
    }
  }

  // Zeros in all lanes, column numbers, and class weights: 1, or 0 where given weights follow.
  __aicore__ inline void PutConstants(bool has_weight) const {
    const int64_t width = round_up(padded, kLanes);
    AscendC::Duplicate(lanes, 0.0f, (by_row ? kVectorsByRow : kVectors) * lane_count);
    AscendC::CreateVecIndex(columns, 0.0f, width);
    AscendC::Duplicate(weight, has_weight ? 0.0f : 1.0f, width);
    PipeBarrier<PIPE_V>();
    for (int64_t set = 0; !has_weight && set < kSets; ++set) {
      AscendC::Duplicate(lanes[(set * kSetLanes + kWeightOf) * lane_count], 1.0f, lane_count);
    }
  }

  // The columns of block j, without and with the padding that keeps rows aligned.
  __aicore__ inline int64_t Blocks() const { return div_up(cols, kLanes); }
  __aicore__ inline int64_t Width(int64_t j) const { return smaller(kLanes, cols - j * kLanes); }
  __aicore__ inline int64_t PaddedBlocks() const { return div_up(padded, kLanes); }
  __aicore__ inline int64_t PaddedWidth(int64_t j) const { return smaller(kLanes, padded - j * kLanes); }
  __aicore__ inline int64_t RowStride() const { return padded / kBlock; }  // of fp32 rows, in data blocks

  // Vectors and bits.
  __aicore__ inline LocalTensor<float> SetLane(Lane lane, const TileFacts& f) const {
    return lanes[(f.set * kSetLanes + lane) * lane_count];
  }
  __aicore__ inline LocalTensor<float> operator[](Vector v) const { return lanes[v * lane_count]; }
  __aicore__ inline LocalTensor<uint8_t> Hot(int64_t j) const { return hot[j * lane_count * 8]; }

  // out[r] = the reduction of the columns of row r. Block reductions turn each 64 columns into 8 numbers a row, a tree
  // turns those of all blocks into 8, and one more block reduction turns these into one. A remainder of less than 64
  // columns is reduced separately: block reductions would have blocks without a lane.
  template <typename Operation>
  __aicore__ inline void ReduceTile(const LocalTensor<float>& out, const LocalTensor<float>& a, int64_t rows) const {
    const int64_t blocks = cols / kLanes, tail = cols % kLanes;
    for (int64_t j = 0; j < blocks; ++j) {
      Operation::OfBlocks(Part(j, rows), a[j * kLanes], rows, kLanes, RowStride());
    }
    if (tail != 0) {
      Operation::OfRepeats(blocks > 0 ? (*this)[kTail] : out, a[blocks * kLanes], rows, tail, RowStride());
    }
    PipeBarrier<PIPE_V>();
    if (blocks == 0) {
      return;
    }
    for (int64_t left = blocks; left > 1; left -= left / 2) {
      Operation::OfTwo(parts, parts, Part(left - left / 2, rows), left / 2 * rows * kBlock);
      PipeBarrier<PIPE_V>();
    }
    const int64_t repeats = rows / kBlock, rest = rows % kBlock;
    if (repeats > 0) {
      Operation::OfBlocks(out, parts, repeats, kLanes, kBlock);
    }
    if (rest > 0) {
      Operation::OfBlocks(out[repeats * kBlock], parts[repeats * kLanes], 1, rest * kBlock, kBlock);
    }
    PipeBarrier<PIPE_V>();
    if (tail != 0) {
      Operation::OfTwo(out, out, (*this)[kTail], rows);
      PipeBarrier<PIPE_V>();
    }
  }
  __aicore__ inline LocalTensor<float> Part(int64_t j, int64_t rows) const { return parts[j * rows * kBlock]; }

  // block[r] = v[r] eight times
  __aicore__ inline void Spread(const LocalTensor<float>& v, int64_t rows) const {
    AscendC::Brcb(block, v, div_up(rows, kBlock), AscendC::BrcbRepeatParams(1, 8));
    PipeBarrier<PIPE_V>();
  }
  // out = a - v, v[r] from the whole of row r; out = a + v; and out = a v.
  __aicore__ inline void SubLanes(const LocalTensor<float>& out, const LocalTensor<float>& a,
                                  const LocalTensor<float>& v, int64_t rows) const {
    Spread(v, rows);
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Sub(out[j * kLanes], a[j * kLanes], block, PaddedWidth(j), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, RowStride(), RowStride(), 1));
    }
    PipeBarrier<PIPE_V>();
  }
  __aicore__ inline void AddLanes(const LocalTensor<float>& out, const LocalTensor<float>& a,
                                  const LocalTensor<float>& v, int64_t rows) const {
    Spread(v, rows);
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Add(out[j * kLanes], a[j * kLanes], block, PaddedWidth(j), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, RowStride(), RowStride(), 1));
    }
    PipeBarrier<PIPE_V>();
  }
  __aicore__ inline void MulLanes(const LocalTensor<float>& out, const LocalTensor<float>& a,
                                  const LocalTensor<float>& v, int64_t rows) const {
    Spread(v, rows);
    for (int64_t j = 0; j < PaddedBlocks(); ++j) {
      AscendC::Mul(out[j * kLanes], a[j * kLanes], block, PaddedWidth(j), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, RowStride(), RowStride(), 1));
    }
    PipeBarrier<PIPE_V>();
  }

  const int64_t cols, padded;  // of a row, and in UB
  const bool by_row;           // whether there are the vectors from kRowScale on
  int64_t lane_count = 0;      // rows of a tile, rounded up to whole instructions

  Softcap softcap;

  LocalTensor<float> x, exps;          // tiles: logits after scale and softcap; their exponentials, then the output
  LocalTensor<float> deficit;          // another tile, with a softcap (softcap.h)
  LocalTensor<uint8_t> hot, mask;      // a bit an element: is it the target's? a bit a row
  LocalTensor<float> columns, weight;  // column numbers and class weights
  LocalTensor<float> floor;            // 0 where the class weight is 0, else -inf
  LocalTensor<float> parts, block;     // of reductions; a data block a row
  LocalTensor<float> lanes;
};

}  // namespace npu_xent
