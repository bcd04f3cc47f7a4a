// Layer norm of each row of a matrix with weight and bias, statistics in fp32, two-pass variance. A row is read once
// and must fit in UB. Copies in, compute and copies out overlap; all synchronisation is explicit.
// DTYPE is the type of x and y; weight and bias are fp32.
#include "kernel_operator.h"

#ifndef DTYPE
#define DTYPE float
#endif

struct LayerNormTiling {
  uint32_t rows;
  uint32_t cols;
  float epsilon;
};

template <typename T>
class LayerNorm {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR x, GM_ADDR weight, GM_ADDR bias, GM_ADDR y,
                              const LayerNormTiling& tiling) {
    pipe_ = pipe;
    cols_ = tiling.cols;
    epsilon_ = tiling.epsilon;
    const uint32_t cores = AscendC::GetBlockNum(), core = AscendC::GetBlockIdx();
    firstRow_ = static_cast<uint32_t>(static_cast<uint64_t>(tiling.rows) * core / cores);
    lastRow_ = static_cast<uint32_t>(static_cast<uint64_t>(tiling.rows) * (core + 1) / cores);
    const uint64_t elements = static_cast<uint64_t>(tiling.rows) * cols_;
    xGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x), elements);
    yGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), elements);
    weightGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(weight), cols_);
    biasGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(bias), cols_);

    pipe->InitBuffer(inQueue_, 2, cols_ * sizeof(T));
    pipe->InitBuffer(outQueue_, 2, cols_ * sizeof(T));
    pipe->InitBuffer(weightQueue_, 1, cols_ * sizeof(float));
    pipe->InitBuffer(biasQueue_, 1, cols_ * sizeof(float));
    pipe->InitBuffer(workBuf_, cols_ * sizeof(float));
    pipe->InitBuffer(squareBuf_, cols_ * sizeof(float));
    pipe->InitBuffer(tmpBuf_, (cols_ / 64 + 1) * 2 * sizeof(float) + 32);
    pipe->InitBuffer(statBuf_, 32);
    work_ = workBuf_.Get<float>();
    square_ = squareBuf_.Get<float>();
    tmp_ = tmpBuf_.Get<float>();
    stat_ = statBuf_.Get<float>();
  }

  __aicore__ inline void Process() {
    if (firstRow_ == lastRow_) {
      return;
    }
    CopyIn(weightQueue_, weightGm_, 0);
    CopyIn(biasQueue_, biasGm_, 0);
    CopyIn(inQueue_, xGm_, firstRow_);
    AscendC::LocalTensor<float> weight = weightQueue_.DeQue<float>();
    AscendC::LocalTensor<float> bias = biasQueue_.DeQue<float>();
    for (uint32_t row = firstRow_; row < lastRow_; ++row) {
      Normalise(row, weight, bias);
    }
    weightQueue_.FreeTensor(weight);
    biasQueue_.FreeTensor(bias);
  }

 private:
  template <typename Queue, typename U>
  __aicore__ inline void CopyIn(Queue& queue, AscendC::GlobalTensor<U>& from, uint32_t row) {
    AscendC::LocalTensor<U> to = queue.template AllocTensor<U>();
    AscendC::DataCopyExtParams params{1, static_cast<uint32_t>(cols_ * sizeof(U)), 0, 0, 0};
    AscendC::DataCopyPadExtParams<U> noPadding;
    AscendC::DataCopyPad(to, from[static_cast<uint64_t>(row) * cols_], params, noPadding);
    queue.EnQue(to);
  }

  __aicore__ inline void Normalise(uint32_t row, const AscendC::LocalTensor<float>& weight,
                                   const AscendC::LocalTensor<float>& bias) {
    AscendC::LocalTensor<T> x = inQueue_.template DeQue<T>();
    if (row + 1 < lastRow_) {
      CopyIn(inQueue_, xGm_, row + 1);  // overlaps with the computation of this row
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      AscendC::Adds(work_, x, 0.0f, cols_);
    } else {
      AscendC::Cast(work_, x, AscendC::RoundMode::CAST_NONE, cols_);
    }
    inQueue_.FreeTensor(x);
    AscendC::PipeBarrier<PIPE_V>();

    AscendC::ReduceSum(stat_, work_, tmp_, cols_);
    const float mean = Value() / cols_;
    AscendC::Adds(work_, work_, -mean, cols_);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Mul(square_, work_, work_, cols_);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::ReduceSum(stat_, square_, tmp_, cols_);
    Sync<AscendC::HardEvent::S_V>();  // ReduceSum ends on the scalar unit
    // A vector square root of one element: the scalar unit has none.
    AscendC::Muls(stat_, stat_, 1.0f / cols_, 1);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Adds(stat_, stat_, epsilon_, 1);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Sqrt(stat_, stat_, 1);
    const float scale = 1.0f / Value();

    AscendC::Muls(work_, work_, scale, cols_);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Mul(work_, work_, weight, cols_);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::LocalTensor<T> y = outQueue_.template AllocTensor<T>();
    if constexpr (sizeof(T) == sizeof(float)) {
      AscendC::Add(y, work_, bias, cols_);
    } else {
      AscendC::Add(work_, work_, bias, cols_);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Cast(y, work_, AscendC::RoundMode::CAST_RINT, cols_);
    }
    AscendC::PipeBarrier<PIPE_V>();
    outQueue_.EnQue(y);
    y = outQueue_.template DeQue<T>();
    AscendC::DataCopyExtParams params{1, static_cast<uint32_t>(cols_ * sizeof(T)), 0, 0, 0};
    AscendC::DataCopyPad(yGm_[static_cast<uint64_t>(row) * cols_], y, params);
    outQueue_.FreeTensor(y);
  }

  // Reads the number in stat_; later vector instructions are ordered after the read.
  __aicore__ inline float Value() {
    Sync<AscendC::HardEvent::V_S>();
    const float value = stat_.GetValue(0);
    Sync<AscendC::HardEvent::S_V>();
    return value;
  }

  template <AscendC::HardEvent event>
  __aicore__ inline void Sync() {
    const auto id = static_cast<event_t>(pipe_->FetchEventID(event));
    AscendC::SetFlag<event>(id);
    AscendC::WaitFlag<event>(id);
  }

  AscendC::TPipe* pipe_ = nullptr;
  AscendC::GlobalTensor<T> xGm_, yGm_;
  AscendC::GlobalTensor<float> weightGm_, biasGm_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> inQueue_, weightQueue_, biasQueue_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> outQueue_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> workBuf_, squareBuf_, tmpBuf_, statBuf_;
  AscendC::LocalTensor<float> work_, square_, tmp_, stat_;
  uint32_t cols_ = 0, firstRow_ = 0, lastRow_ = 0;
  float epsilon_ = 0;
};

extern "C" __global__ __aicore__ void layer_norm(GM_ADDR x, GM_ADDR weight, GM_ADDR bias, GM_ADDR y,
                                                 LayerNormTiling tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  AscendC::TPipe pipe;
  LayerNorm<DTYPE> norm;
  norm.Init(&pipe, x, weight, bias, y, tiling);
  norm.Process();
}
