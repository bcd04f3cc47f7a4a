// The copies of short rows: tiles of logits and operands in, tiles of the output out. Queues of two buffers each order
// them, and let them overlap with the arithmetic.
#pragma once

#include "ascendc/short_tile.h"

namespace npu_xent {

template <typename T, Output kOutput, bool kStats>
class ShortCopies {
  static constexpr bool kGrad = kOutput == Output::grad;

 public:
  __aicore__ inline ShortCopies(const XentArgs& args, const RowTensors& tensors) : args_(args), gm_(tensors) {}

  __aicore__ inline void Allocate(AscendC::TPipe& pipe, const ShortBuffers& b) {
    pipe.InitBuffer(in_, 2, b.tile_bytes);
    if constexpr (kOutput != Output::none) {
      pipe.InitBuffer(out_, 2, b.tile_bytes);
    }
    if (HasOperands()) {
      pipe.InitBuffer(operands_, 2, b.row_bytes);
    }
  }
  // Whether vectors [rows] come in with each tile.
  __aicore__ inline bool HasOperands() const { return !kStats || gm_.row_scale != nullptr; }

  // The class weights, once for all tiles.
  __aicore__ inline void CopyWeightIn(AscendC::TPipe& pipe, const ShortTile& v) const {
    const event_t cleared = static_cast<event_t>(pipe.FetchEventID(HardEvent::V_MTE2));
    SetFlag<HardEvent::V_MTE2>(cleared);
    WaitFlag<HardEvent::V_MTE2>(cleared);
    CopyIn(v.weight, Gm<float>(gm_.weight, args_.class_start), args_.cols);
    const event_t loaded = static_cast<event_t>(pipe.FetchEventID(HardEvent::MTE2_V));
    SetFlag<HardEvent::MTE2_V>(loaded);
    WaitFlag<HardEvent::MTE2_V>(loaded);
  }

  // The rows that are read, one copy for each run of adjacent rows, and the operands of a gradient.
  __aicore__ inline void CopyTileIn(const ShortTile& v, const TileFacts& f) {
    LocalTensor<T> in = in_.template AllocTensor<T>();
    const AscendC::DataCopyPadExtParams<T> pad{true, 0, static_cast<uint8_t>(v.padded - args_.cols), static_cast<T>(0)};
    const int64_t most = FarApart(args_.logits_stride) ? 1 : f.rows;
    for (int64_t r = 0; r < f.rows;) {
      int64_t end = r;
      while (end < f.rows && end - r < most && f.IsRead(end)) {
        ++end;
      }
      if (end > r) {
        AscendC::DataCopyPad(in[r * v.padded], Gm<T>(gm_.logits, (f.first + r) * args_.logits_stride),
                             RowsOf(end - r, GapBytes(args_.logits_stride), 0), pad);
      }
      r = larger(end, r + 1);
    }
    in_.EnQue(in);
    if (HasOperands()) {
      LocalTensor<float> operands = operands_.AllocTensor<float>();
      if constexpr (!kStats) {
        CopyIn(operands, Gm<float>(gm_.lse, f.first), f.rows);
        CopyOperand(operands[v.lane_count], gm_.lse_low, f);
        if (ReductionIs(args_, Reduction::none)) {
          CopyOperand(operands[2 * v.lane_count], gm_.grad_loss, f);
          CopyOperand(operands[3 * v.lane_count], gm_.grad_z_loss, f);
        }
        if (gm_.grad_entropy != nullptr) {
          CopyOperand(operands[4 * v.lane_count], gm_.entropy, f);
          CopyOperand(operands[5 * v.lane_count], gm_.grad_entropy, f);
        }
      }
      if (gm_.row_scale != nullptr) {
        CopyOperand(operands[6 * v.lane_count], gm_.row_scale, f);
      }
      operands_.EnQue(operands);
    }
  }
  // Statistics, gradients and scales that came in with the tile.
  __aicore__ inline void TakeOperands(const ShortTile& v, const TileFacts& f) {
    const int64_t n = f.rows;
    LocalTensor<float> operands = operands_.DeQue<float>();
    if (gm_.row_scale != nullptr) {
      AscendC::Adds(v[kRowScale], operands[6 * v.lane_count], 0.0f, n);
    }
    if constexpr (!kStats) {
      TakeGradOperands(v, operands, n);
    }
    PipeBarrier<PIPE_V>();
    operands_.FreeTensor(operands);
  }

  // The tile that has arrived, and the buffer for the output.
  __aicore__ inline LocalTensor<T> TakeTile() { return in_.template DeQue<T>(); }
  __aicore__ inline void FreeTile(LocalTensor<T>& in) { in_.FreeTensor(in); }
  __aicore__ inline LocalTensor<T> NewOutput() { return out_.template AllocTensor<T>(); }
  __aicore__ inline void OutputMade(const LocalTensor<T>& out) { out_.EnQue(out); }
  __aicore__ inline void CopyTileOut(const ShortTile& v, const TileFacts& f) {
    LocalTensor<T> out = out_.template DeQue<T>();
    const int64_t most = FarApart(args_.output_stride) ? 1 : f.rows;
    for (int64_t r = 0; r < f.rows; r += most) {
      AscendC::DataCopyPad(Gm<T>(gm_.output, (f.first + r) * args_.output_stride), out[r * v.padded],
                           RowsOf(most, 0, GapBytes(args_.output_stride)));
    }
    out_.FreeTensor(out);
  }

 private:
  // Whether rows are copied one by one: the gap between them does not fit a copy's fields, or they overlap.
  __aicore__ inline bool FarApart(int64_t stride) const {
    return stride < args_.cols || (stride - args_.cols) * static_cast<int64_t>(sizeof(T)) > int64_t{1} << 31;
  }
  __aicore__ inline uint32_t GapBytes(int64_t stride) const {
    return FarApart(stride) ? 0 : static_cast<uint32_t>((stride - args_.cols) * sizeof(T));
  }
  __aicore__ inline AscendC::DataCopyExtParams RowsOf(int64_t rows, uint32_t gap_in, uint32_t gap_out) const {
    return {static_cast<uint16_t>(rows), static_cast<uint32_t>(args_.cols * sizeof(T)), gap_in, gap_out, 0};
  }

  __aicore__ inline void TakeGradOperands(const ShortTile& v, const LocalTensor<float>& operands, int64_t n) const {
    AscendC::Adds(v[kLse], operands, 0.0f, n);
    AscendC::Adds(v[kMax], operands, 0.0f, n);
    if (gm_.lse_low != nullptr) {
      AscendC::Adds(v[kLseLow], operands[v.lane_count], 0.0f, n);
    }
    if (kGrad && ReductionIs(args_, Reduction::none)) {
      if (gm_.grad_loss != nullptr) {
        AscendC::Adds(v[kGradLoss], operands[2 * v.lane_count], 0.0f, n);
        AscendC::Adds(v[kGradZ], operands[2 * v.lane_count], 0.0f, n);
        PipeBarrier<PIPE_V>();
      }
      if (gm_.grad_z_loss != nullptr) {
        if (gm_.grad_loss != nullptr && args_.adds_to_a == 0) {
          AscendC::Add(v[kGradZ], v[kGradZ], operands[3 * v.lane_count], n);
        } else {
          AscendC::Adds(v[kGradZ], operands[3 * v.lane_count], 0.0f, n);
        }
      }
    }
    if (gm_.grad_entropy != nullptr) {
      AscendC::Adds(v[kEntropy], operands[4 * v.lane_count], 0.0f, n);
      AscendC::Adds(v[kTilt], operands[5 * v.lane_count], 0.0f, n);
    }
  }

  __aicore__ inline void CopyOperand(const LocalTensor<float>& to, GM_ADDR from, const TileFacts& f) {
    if (from != nullptr) {
      CopyIn(to, Gm<float>(from, f.first), f.rows);
    }
  }

  const XentArgs args_;
  const RowTensors gm_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> in_, operands_;  // two tiles are on their way at a time
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
};

}  // namespace npu_xent
