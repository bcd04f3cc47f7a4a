// The output of long rows, log_prob or the gradient, a chunk at a time: computed in fp32 from the chunk's logits and
// the row's RowState, and left in the chunk's slot, over the logits.
#pragma once

#include "ascendc/long_chunks.h"
#include "ascendc/long_facts.h"

namespace npu_xent {

template <typename T, Output kOutput>
class LongOutput {
 public:
  __aicore__ inline LongOutput(const XentArgs& args, const RowTensors& tensors) : args_(args), gm_(tensors) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const LongBuffers& b) {
    zeros_ = ub.GetWithOffset<T>(kZeroBytes / sizeof(T), b.zeros);
  }

  // Replaces the logits in `slot` by the output; `work` is scratch.
  __aicore__ inline void Make(const LongChunks<T>& chunks, const LocalTensor<T>& slot, const LocalTensor<float>& work,
                              int64_t chunk, const RowState& s) {
    const int64_t n = chunks.Size(chunk);
    const LocalTensor<float> y = Fp32Of(slot, work);
    if (s.zero || s.undefined) {
      AscendC::Duplicate(y, s.zero ? 0.0f : NaN(), n);
    } else {
      AscendC::Adds(y, chunks.Mapped(slot, work, n, s.row_scale, kOutput == Output::grad), -s.lse, n);
      PipeBarrier<PIPE_V>();
      if constexpr (kOutput == Output::log_prob) {
        AscendC::Adds(y, y, -s.lse_low, n);
      } else {
        MakeGrad(y, chunks, chunk, s);
      }
    }
    if constexpr (!kIsFp32<T>) {
      PipeBarrier<PIPE_V>();
    }
    RoundOutput(slot, work, n);
  }

  // The gradient of rows that were not read.
  template <typename Pieces>
  __aicore__ inline void StoreZeros(const LongChunks<T>& chunks, const Pieces& pieces) {
    bool filled = false;
    for (int64_t i = 0; i < pieces.Count(); ++i) {
      const Piece piece = pieces.At(i);
      if (pieces.IsRead(piece.row)) {
        continue;
      }
      if (!filled) {
        AscendC::Duplicate(zeros_.template ReinterpretCast<float>(), 0.0f, kZeroBytes / sizeof(float));
        SetFlag<HardEvent::V_S>(LongFlag::kZeros);
        WaitFlag<HardEvent::V_S>(LongFlag::kZeros);
        SetFlag<HardEvent::S_MTE3>(LongFlag::kZeros);
        WaitFlag<HardEvent::S_MTE3>(LongFlag::kZeros);
        filled = true;
      }
      const int64_t end = smaller(chunks.FirstColumn(piece.end), args_.cols);
      const int64_t most = kZeroBytes / sizeof(T);
      for (int64_t column = chunks.FirstColumn(piece.begin); column < end; column += most) {
        CopyOut(Gm<T>(gm_.output, piece.row * args_.output_stride + column), zeros_, smaller(most, end - column));
      }
    }
  }

 private:
  // y = the gradient of a chunk in fp32, before rounding, from y = x - lse: (scale + tilt y) exp(y) - offset w, times
  // the slope of a softcap, and the target's element corrected.
  __aicore__ inline void MakeGrad(const LocalTensor<float>& y, const LongChunks<T>& chunks, int64_t chunk,
                                  const RowState& s) {
    const int64_t n = chunks.Size(chunk);
    if (s.tilt != 0.0f) {
      const LocalTensor<float> exps = chunks.Scratch();
      AscendC::Exp(exps, y, n);
      PipeBarrier<PIPE_V>();
      AscendC::Maxs(y, y, kFiniteLog, n);
      PipeBarrier<PIPE_V>();
      AscendC::Muls(y, y, s.tilt, n);
      PipeBarrier<PIPE_V>();
      AscendC::Adds(y, y, s.scale, n);
      PipeBarrier<PIPE_V>();
      AscendC::Mul(y, y, exps, n);
    } else {
      AscendC::Exp(y, y, n);
      PipeBarrier<PIPE_V>();
      AscendC::Muls(y, y, s.scale, n);
    }
    if (args_.class_share != 0.0f) {
      SubtractOffset(y, chunks, chunk, s.offset);
    }
    if (chunks.Cap().IsOn()) {
      PipeBarrier<PIPE_V>();
      chunks.Cap().MultiplyBySlope(y, chunks.Deficit(), n);
    }
    const int64_t target = s.target - chunks.FirstColumn(chunk);
    if (s.target >= 0 && target >= 0 && target < n) {
      PipeBarrier<PIPE_V>();
      PutTarget(y, target, s);
    }
  }
  __aicore__ inline void SubtractOffset(const LocalTensor<float>& y, const LongChunks<T>& chunks, int64_t chunk,
                                        float offset) {
    const int64_t n = chunks.Size(chunk);
    if (gm_.weight == nullptr) {
      PipeBarrier<PIPE_V>();
      AscendC::Adds(y, y, -offset, n);
      return;
    }
    const LocalTensor<float> weight = chunks.CopyWeightIn(chunk);
    AscendC::Muls(weight, weight, offset, n);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(y, y, weight, n);
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

  const XentArgs args_;
  const RowTensors gm_;
  LocalTensor<T> zeros_;
};

}  // namespace npu_xent
