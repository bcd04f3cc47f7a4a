// The chunks of long rows in UB: a ring of slots in the logits' dtype, work space for two chunks in fp32, and one chunk
// of the class weights.
#pragma once

#include "ascendc/row_kernel.h"
#include "ascendc/softcap.h"

namespace npu_xent {

template <typename T>
class LongChunks {
 public:
  __aicore__ inline LongChunks(const XentPlan& plan, const XentArgs& args, const RowTensors& tensors)
      : plan_(plan), args_(args), gm_(tensors), softcap_(args) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const LongBuffers& b, int64_t slots) {
    slots_ = slots;
    ring_ = ub.GetWithOffset<T>(slots * plan_.chunk_cols, b.ring);
    work_ = ub.GetWithOffset<float>(2 * plan_.chunk_cols, b.work);
    weight_ = ub.GetWithOffset<float>(plan_.chunk_cols, b.weight);
    if (softcap_.IsOn()) {
      const int64_t half = plan_.chunk_cols / 2;
      cap_ = ub.GetWithOffset<float>(plan_.chunk_cols, b.cap);
      softcap_.Allocate(cap_, cap_[half], ub.GetWithOffset<uint8_t>(half / 8, b.cap_mask), half);
    }
  }

  // The slot of load number `load`, and its work space.
  __aicore__ inline LocalTensor<T> Slot(int64_t load) const { return ring_[(load % slots_) * plan_.chunk_cols]; }
  __aicore__ inline LocalTensor<float> Work(int64_t load) const { return work_[load % 2 * plan_.chunk_cols]; }

  __aicore__ inline int64_t FirstColumn(int64_t chunk) const { return chunk * plan_.chunk_cols; }
  __aicore__ inline int64_t Size(int64_t chunk) const {
    return smaller(plan_.chunk_cols, args_.cols - FirstColumn(chunk));
  }
  __aicore__ inline int64_t PaddedSize(int64_t chunk) const { return round_up(Size(chunk), kChunkUnit); }

  __aicore__ inline void CopyLogitsIn(int64_t load, int64_t row, int64_t chunk) const {
    CopyIn(Slot(load), Gm<T>(gm_.logits, row * args_.logits_stride + FirstColumn(chunk)), Size(chunk));
    SetFlag<HardEvent::MTE2_V>(LongFlag::OfChunk(load));
  }
  __aicore__ inline void WaitLogits(int64_t load) {
    WaitFlag<HardEvent::MTE2_V>(LongFlag::OfChunk(load));
    arrived_ = load;
  }
  __aicore__ inline void CopyOutputOut(int64_t load, int64_t row, int64_t chunk) const {
    CopyOut(Gm<T>(gm_.output, row * args_.output_stride + FirstColumn(chunk)), Slot(load), Size(chunk));
  }
  // The class weights of a chunk, for the vector unit. It waits for the copy: weights with label smoothing are rare, so
  // there is no second buffer.
  __aicore__ inline LocalTensor<float> CopyWeightIn(int64_t chunk) const {
    const int32_t flag = LongFlag::OfChunk(arrived_);
    SetFlag<HardEvent::V_MTE2>(flag);
    WaitFlag<HardEvent::V_MTE2>(flag);
    CopyIn(weight_, Gm<float>(gm_.weight, args_.class_start + FirstColumn(chunk)), Size(chunk));
    SetFlag<HardEvent::MTE2_V>(flag);
    WaitFlag<HardEvent::MTE2_V>(flag);
    return weight_;
  }

  // The logits after all scales and the softcap, in fp32: in the slot if IsScaledAlready, else in `work`. With a
  // softcap and `with_deficit`, Deficit() then holds the deficit of softcap.h.
  __aicore__ inline LocalTensor<float> Mapped(const LocalTensor<T>& slot, const LocalTensor<float>& work, int64_t n,
                                              float row_scale, bool with_deficit = false) const {
    const float scale = softcap_.IsOn() ? args_.logit_scale : Product(row_scale, args_.logit_scale);
    const LocalTensor<float> x = ScaledLogits(slot, work, args_, scale, n);
    if (!IsScaledAlready<T>(args_)) {
      PipeBarrier<PIPE_V>();
    }
    if (softcap_.IsOn()) {
      with_deficit ? softcap_.Apply(x, cap_, n) : softcap_.Apply(x, n);
      if (args_.row_scaled != 0) {
        AscendC::Muls(x, x, row_scale, n);
        PipeBarrier<PIPE_V>();
      }
    }
    return x;
  }
  // Whether different logits stay different in Mapped, which then orders them as Ordered does: a softcap and a scale of
  // fp32 logits may round them to one number, a scale of 16-bit logits does not.
  __aicore__ inline bool KeepsOrder() const {
    return !softcap_.IsOn() && args_.logit_scale != 0.0f && (!kIsFp32<T> || IsScaledAlready<T>(args_));
  }
  // The logits in fp32, with the sign of the logit scale: their order is that of the scaled logits.
  __aicore__ inline LocalTensor<float> Ordered(const LocalTensor<T>& slot, const LocalTensor<float>& work,
                                               int64_t n) const {
    const float sign = args_.logit_scale > 0.0f ? 1.0f : args_.logit_scale < 0.0f ? -1.0f : 0.0f;
    if constexpr (kIsFp32<T>) {
      if (sign == 1.0f) {
        return slot;
      }
    }
    const LocalTensor<float> x = ScaledLogits(slot, work, args_, sign, n);
    PipeBarrier<PIPE_V>();
    return x;
  }
  // The result of an earlier Mapped.
  __aicore__ inline LocalTensor<float> MappedBefore(const LocalTensor<T>& slot, const LocalTensor<float>& work) const {
    return IsScaledAlready<T>(args_) ? Fp32Of(slot, work) : work;
  }

  // A chunk of scratch, in the memory of the class weights: free after CopyWeightIn's user, and until the next.
  __aicore__ inline LocalTensor<float> Scratch() const { return weight_; }

  __aicore__ inline const Softcap& Cap() const { return softcap_; }
  // Of the chunk last given to Mapped.
  __aicore__ inline LocalTensor<float> Deficit() const { return cap_; }

 private:
  const XentPlan plan_;
  const XentArgs args_;
  const RowTensors gm_;
  int64_t slots_ = 0;
  int64_t arrived_ = 0;  // the load that the vector unit waited for last
  Softcap softcap_;
  LocalTensor<T> ring_;
  LocalTensor<float> work_, weight_, cap_;
};

}  // namespace npu_xent
