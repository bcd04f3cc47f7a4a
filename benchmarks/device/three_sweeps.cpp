// Cross entropy as an ordinary operator computes it, to compare npu_xent with: a training step of fp32 or bf16 rows,
// reduction mean, no options.
//
//   forward   three sweeps over each row: its maximum, the sum of its exponentials, log_prob (3 reads, 1 write)
//   backward  one sweep: gradient = (exp(log_prob) - [target]) / rows (1 read, 1 write)
//
// Rows are shared out over the cores and taken one at a time, in chunks, with single buffers. The vector instructions
// are those a careful author would choose, and all synchronisation is explicit.
#include "kernel_operator.h"

struct ThreeSweepsArgs {
  int64_t is_bf16;  // else fp32
  int64_t rows;
  int64_t cols;
  float grad_scale;  // the gradient of the mean, over the rows
  float reserved;
};

namespace {

using AscendC::DataCopyExtParams;
using AscendC::GlobalTensor;
using AscendC::HardEvent;
using AscendC::LocalTensor;
using AscendC::PipeBarrier;

constexpr int32_t kBufferNum = 1;
constexpr int64_t kChunk = 4096;
constexpr int64_t kLanes = 64;        // fp32 numbers in one repeat of a vector instruction
constexpr int64_t kBlock = 8;         // fp32 numbers in a data block
constexpr int64_t kChunkUnit = 512;   // two block reductions make whole instructions of so many numbers
constexpr int64_t kTargetRows = 256;  // rows whose targets and losses are in UB at a time
constexpr float kFloatMax = 3.402823466e+38f;

template <typename T>
class ThreeSweeps {
  static constexpr bool kFp32 = sizeof(T) == sizeof(float);

 public:
  // `from` is what the rows are read from, `to` what they are written to: logits and log_prob, log_prob and gradient.
  __aicore__ inline ThreeSweeps(AscendC::TPipe* pipe, GM_ADDR from, GM_ADDR target, GM_ADDR to, GM_ADDR loss,
                                const ThreeSweepsArgs& args)
      : pipe_(pipe), args_(args), chunks_((args.cols + kChunk - 1) / kChunk) {
    const int64_t cores = AscendC::GetBlockNum(), core = AscendC::GetBlockIdx();
    begin_ = args.rows * core / cores;
    end_ = args.rows * (core + 1) / cores;
    from_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(from), args.rows * args.cols);
    to_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(to), args.rows * args.cols);
    targets_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(target), args.rows);
    losses_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(loss), args.rows);
    pipe->InitBuffer(in_, kBufferNum, kChunk * sizeof(T));
    pipe->InitBuffer(out_, kBufferNum, kChunk * sizeof(T));
    pipe->InitBuffer(work_buffer_, kChunk * sizeof(float));
    pipe->InitBuffer(reduced_buffer_, (kChunk / kBlock + 2 * kLanes + kBlock) * sizeof(float));
    pipe->InitBuffer(target_buffer_, kTargetRows * sizeof(int64_t));
    pipe->InitBuffer(loss_buffer_, kTargetRows * sizeof(float));
    work_ = work_buffer_.template Get<float>();
    reduced_ = reduced_buffer_.template Get<float>();
    again_ = reduced_[kChunk / kBlock];
    best_ = again_[kLanes];
    value_ = best_[kLanes];
    target_ = target_buffer_.template Get<int64_t>();
    loss_ = loss_buffer_.template Get<float>();
  }

  __aicore__ inline void Forward() {
    for (int64_t first = begin_; first < end_; first += kTargetRows) {
      const int64_t rows = RowsFrom(first);
      LoadTargets(first, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const float max = RowMax(first + i);
        const float log_sum = LogSum(first + i, max);
        loss_.SetValue(i, -StoreLogProb(first + i, target_.GetValue(i), max + log_sum));
      }
      Sync<HardEvent::S_MTE3>();
      const DataCopyExtParams copy{1, static_cast<uint32_t>(rows * sizeof(float)), 0, 0, 0};
      AscendC::DataCopyPad(losses_[first], loss_, copy);
      Sync<HardEvent::MTE3_S>();
    }
  }

  __aicore__ inline void Backward() {
    for (int64_t first = begin_; first < end_; first += kTargetRows) {
      const int64_t rows = RowsFrom(first);
      LoadTargets(first, rows);
      for (int64_t i = 0; i < rows; ++i) {
        StoreGrad(first + i, target_.GetValue(i));
      }
    }
  }

 private:
  // ---- sweeps ----

  __aicore__ inline float RowMax(int64_t row) {
    Clear(-kFloatMax);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t n = Size(chunk), padded = Padded(n);
      LocalTensor<T> in = Load(row, chunk);
      const LocalTensor<float> x = ToFloat(in, n);
      PadTail(x, n, padded, -kFloatMax);
      AscendC::BlockReduceMax(reduced_, x, padded / kLanes, kLanes, 1, 1, 8);
      in_.FreeTensor(in);
      PipeBarrier<PIPE_V>();
      AscendC::BlockReduceMax(again_, reduced_, padded / kChunkUnit, kLanes, 1, 1, 8);
      PipeBarrier<PIPE_V>();
      AscendC::Max(best_, best_, again_, padded / kLanes);
      PipeBarrier<PIPE_V>();
    }
    AscendC::WholeReduceMax(value_, best_, kLanes, 1, 1, 1, 8, AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    return ScalarOf(value_, 0);
  }

  // log(sum(exp(x - max)))
  __aicore__ inline float LogSum(int64_t row, float max) {
    Clear(0.0f);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t n = Size(chunk), padded = Padded(n);
      LocalTensor<T> in = Load(row, chunk);
      AscendC::Adds(work_, ToFloat(in, n), -max, n);
      in_.FreeTensor(in);
      PipeBarrier<PIPE_V>();
      AscendC::Exp(work_, work_, n);
      PipeBarrier<PIPE_V>();
      PadTail(work_, n, padded, 0.0f);
      AscendC::BlockReduceSum(reduced_, work_, padded / kLanes, kLanes, 1, 1, 8);
      PipeBarrier<PIPE_V>();
      AscendC::BlockReduceSum(again_, reduced_, padded / kChunkUnit, kLanes, 1, 1, 8);
      PipeBarrier<PIPE_V>();
      AscendC::Add(best_, best_, again_, padded / kLanes);
      PipeBarrier<PIPE_V>();
    }
    AscendC::WholeReduceSum(value_, best_, kLanes, 1, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    AscendC::Ln(value_, value_, 1);
    return ScalarOf(value_, 0);
  }

  // Writes x - lse, and returns it for the target.
  __aicore__ inline float StoreLogProb(int64_t row, int64_t target, float lse) {
    float picked = 0.0f;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t n = Size(chunk), here = target - chunk * kChunk;
      LocalTensor<T> in = Load(row, chunk), out = out_.template AllocTensor<T>();
      const LocalTensor<float> y = FloatOf(out);
      AscendC::Adds(y, ToFloat(in, n), -lse, n);
      in_.FreeTensor(in);
      if (here >= 0 && here < n) {
        picked = ScalarOf(y, here);
      }
      Store(row, chunk, out, n);
    }
    return picked;
  }

  __aicore__ inline void StoreGrad(int64_t row, int64_t target) {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const int64_t n = Size(chunk), here = target - chunk * kChunk;
      LocalTensor<T> in = Load(row, chunk), out = out_.template AllocTensor<T>();
      const LocalTensor<float> y = FloatOf(out);
      AscendC::Exp(y, ToFloat(in, n), n);
      in_.FreeTensor(in);
      PipeBarrier<PIPE_V>();
      AscendC::Muls(y, y, args_.grad_scale, n);
      if (here >= 0 && here < n) {
        PipeBarrier<PIPE_V>();
        const LocalTensor<float> block = y[here - here % kBlock];
        uint64_t mask[2] = {uint64_t{1} << (here % kBlock), 0};
        AscendC::Adds(block, block, -args_.grad_scale, mask, 1, AscendC::UnaryRepeatParams(1, 1, 8, 8));
      }
      Store(row, chunk, out, n);
    }
  }

  // ---- a chunk ----

  __aicore__ inline int64_t RowsFrom(int64_t first) const {
    return end_ - first < kTargetRows ? end_ - first : kTargetRows;
  }
  __aicore__ inline int64_t Size(int64_t chunk) const {
    return args_.cols - chunk * kChunk < kChunk ? args_.cols - chunk * kChunk : kChunk;
  }
  __aicore__ inline int64_t Padded(int64_t n) const { return (n + kChunkUnit - 1) / kChunkUnit * kChunkUnit; }

  __aicore__ inline LocalTensor<T> Load(int64_t row, int64_t chunk) {
    LocalTensor<T> in = in_.template AllocTensor<T>();
    const DataCopyExtParams copy{1, static_cast<uint32_t>(Size(chunk) * sizeof(T)), 0, 0, 0};
    const AscendC::DataCopyPadExtParams<T> no_padding{false, 0, 0, static_cast<T>(0)};
    AscendC::DataCopyPad(in, from_[row * args_.cols + chunk * kChunk], copy, no_padding);
    in_.EnQue(in);
    return in_.template DeQue<T>();
  }
  // Takes the fp32 numbers in FloatOf(out), whose instruction may be under way.
  __aicore__ inline void Store(int64_t row, int64_t chunk, LocalTensor<T>& out, int64_t n) {
    PipeBarrier<PIPE_V>();
    if constexpr (!kFp32) {
      AscendC::Cast(out, work_, AscendC::RoundMode::CAST_RINT, n);
      PipeBarrier<PIPE_V>();
    }
    out_.EnQue(out);
    out = out_.template DeQue<T>();
    const DataCopyExtParams copy{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0};
    AscendC::DataCopyPad(to_[row * args_.cols + chunk * kChunk], out, copy);
    out_.FreeTensor(out);
  }

  // The chunk in fp32: as it came in, or in work_.
  __aicore__ inline LocalTensor<float> ToFloat(const LocalTensor<T>& in, int64_t n) {
    if constexpr (kFp32) {
      return in;
    } else {
      AscendC::Cast(work_, in, AscendC::RoundMode::CAST_NONE, n);
      PipeBarrier<PIPE_V>();
      return work_;
    }
  }
  // Where results in fp32 go: out, or work_ to be rounded from.
  __aicore__ inline LocalTensor<float> FloatOf(const LocalTensor<T>& out) const {
    if constexpr (kFp32) {
      return out;
    } else {
      return work_;
    }
  }

  // x[n : padded] = value
  __aicore__ inline void PadTail(const LocalTensor<float>& x, int64_t n, int64_t padded, float value) {
    const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
    if (n != whole) {
      uint64_t mask[2] = {~uint64_t{0} << (n % kLanes), 0};
      AscendC::Duplicate(x[whole - kLanes], value, mask, 1, 1, 8);
    }
    if (whole != padded) {
      AscendC::Duplicate(x[whole], value, padded - whole);
    }
    if (n != padded) {
      PipeBarrier<PIPE_V>();
    }
  }
  __aicore__ inline void Clear(float value) {
    AscendC::Duplicate(best_, value, kLanes);
    PipeBarrier<PIPE_V>();
  }

  // ---- the scalar unit ----

  __aicore__ inline void LoadTargets(int64_t first, int64_t rows) {
    Sync<HardEvent::S_MTE2>();
    const DataCopyExtParams copy{1, static_cast<uint32_t>(rows * sizeof(int64_t)), 0, 0, 0};
    AscendC::DataCopyPad(target_, targets_[first], copy, AscendC::DataCopyPadExtParams<int64_t>{false, 0, 0, 0});
    Sync<HardEvent::MTE2_S>();
  }
  // What the vector unit left in x[i]; whatever follows on the vector unit comes after the read.
  __aicore__ inline float ScalarOf(const LocalTensor<float>& x, int64_t i) {
    Sync<HardEvent::V_S>();
    const float value = x.GetValue(i);
    Sync<HardEvent::S_V>();
    return value;
  }
  template <HardEvent event>
  __aicore__ inline void Sync() {
    const event_t id = static_cast<event_t>(pipe_->FetchEventID(event));
    AscendC::SetFlag<event>(id);
    AscendC::WaitFlag<event>(id);
  }

  AscendC::TPipe* pipe_;
  const ThreeSweepsArgs args_;
  const int64_t chunks_;
  int64_t begin_ = 0, end_ = 0;  // rows of this core
  GlobalTensor<T> from_, to_;
  GlobalTensor<int64_t> targets_;
  GlobalTensor<float> losses_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> in_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> work_buffer_, reduced_buffer_, target_buffer_, loss_buffer_;
  LocalTensor<float> work_, reduced_, again_, best_, value_, loss_;
  LocalTensor<int64_t> target_;
};

}  // namespace

extern "C" __global__ __aicore__ void three_sweeps_forward(GM_ADDR logits, GM_ADDR target, GM_ADDR log_prob,
                                                           GM_ADDR row_loss, ThreeSweepsArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  if (args.is_bf16 != 0) {
    ThreeSweeps<bfloat16_t>(&pipe, logits, target, log_prob, row_loss, args).Forward();
  } else {
    ThreeSweeps<float>(&pipe, logits, target, log_prob, row_loss, args).Forward();
  }
}

extern "C" __global__ __aicore__ void three_sweeps_backward(GM_ADDR log_prob, GM_ADDR target, GM_ADDR grad,
                                                            ThreeSweepsArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  if (args.is_bf16 != 0) {
    ThreeSweeps<bfloat16_t>(&pipe, log_prob, target, grad, nullptr, args).Backward();
  } else {
    ThreeSweeps<float>(&pipe, log_prob, target, grad, nullptr, args).Backward();
  }
}
