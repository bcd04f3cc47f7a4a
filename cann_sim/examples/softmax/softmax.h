// Softmax of each row of a matrix, for any row length, in fp32 whatever the type of the data.
//   - A row that fits in UB is read once. A longer row is read twice, in chunks: first for its maximum and the sum of
//     its exponentials (the sum is rescaled when the maximum grows), then for the result.
//   - The next piece is prefetched before this one is processed, so copies in, compute and copies out overlap.
//   - All synchronisation is explicit, so nothing relies on synchronisation inserted by the compiler.
#pragma once

#include "kernel_operator.h"

// Computed by the host and passed to the kernel by value.
struct SoftmaxTiling {
  uint32_t rows;
  uint32_t cols;
  uint32_t chunk;  // elements of a row that UB holds at a time, a multiple of 64
};

template <typename T>
class Softmax {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR x, GM_ADDR y, const SoftmaxTiling& tiling) {
    pipe_ = pipe;
    cols_ = tiling.cols;
    chunk_ = tiling.chunk;
    chunks_ = (cols_ + chunk_ - 1) / chunk_;
    // Each core gets a contiguous range of rows; range sizes differ by at most one.
    const uint32_t cores = AscendC::GetBlockNum();
    const uint32_t core = AscendC::GetBlockIdx();
    const uint32_t each = tiling.rows / cores;
    const uint32_t extra = tiling.rows % cores;
    firstRow_ = core * each + (core < extra ? core : extra);
    rows_ = each + (core < extra ? 1 : 0);

    const uint64_t elements = static_cast<uint64_t>(tiling.rows) * cols_;
    xGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x), elements);
    yGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), elements);
    pipe->InitBuffer(inQueue_, kBuffers, chunk_ * sizeof(T));
    pipe->InitBuffer(outQueue_, kBuffers, chunk_ * sizeof(T));
    pipe->InitBuffer(workBuf_, chunk_ * sizeof(float));
    pipe->InitBuffer(tmpBuf_, chunk_ / kRepeat * 2 * sizeof(float) + kBlock);
    pipe->InitBuffer(statBuf_, 4 * kBlock);
    work_ = workBuf_.Get<float>();
    tmp_ = tmpBuf_.Get<float>();
    AscendC::LocalTensor<float> stat = statBuf_.Get<float>();
    max_ = stat[0];
    part_ = stat[kBlockFloats];
    sum_ = stat[2 * kBlockFloats];
    scale_ = stat[3 * kBlockFloats];
  }

  __aicore__ inline void Process() {
    // A row in one chunk is loaded once, a longer one twice.
    pieces_ = static_cast<uint64_t>(rows_) * (chunks_ == 1 ? 1 : 2 * chunks_);
    Fetch();
    for (uint32_t row = 0; row < rows_; ++row) {
      if (chunks_ == 1) {
        Resident(row);
      } else {
        Chunked(row);
      }
    }
  }

 private:
  static constexpr uint32_t kBuffers = 2;
  static constexpr uint32_t kBlock = 32;  // bytes
  static constexpr uint32_t kBlockFloats = kBlock / sizeof(float);
  static constexpr uint32_t kRepeat = 64;  // floats
  static constexpr float kLowest = -3.4028234663852886e38f;
  static constexpr bool kFloat = sizeof(T) == sizeof(float);

  // For a row that fits in UB: max, exp, sum and scaling without reading it again.
  __aicore__ inline void Resident(uint32_t row) {
    Load(cols_);
    const float top = Max(cols_);
    Exponentials(top, cols_);
    const float sum = Sum(cols_);
    Store(row, 0, 1.0f / sum, cols_);
  }

  __aicore__ inline void Chunked(uint32_t row) {
    float top = kLowest;
    AscendC::Duplicate(sum_, 0.0f, 1);
    for (uint32_t c = 0; c < chunks_; ++c) {
      const uint32_t n = Length(c);
      Load(n);
      const float chunkTop = Max(n);
      const float newTop = chunkTop > top ? chunkTop : top;
      Exponentials(newTop, n);
      Reduce(n);
      // sum = sum * exp(top - newTop) + part, on one element: the scalar unit has no exp.
      AscendC::Duplicate(scale_, top - newTop, 1);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Exp(scale_, scale_, 1);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Mul(sum_, sum_, scale_, 1);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Add(sum_, sum_, part_, 1);
      top = newTop;
    }
    const float sum = Value(sum_);
    for (uint32_t c = 0; c < chunks_; ++c) {
      const uint32_t n = Length(c);
      Load(n);
      Exponentials(top, n);
      Store(row, c, 1.0f / sum, n);
    }
  }

  __aicore__ inline uint32_t Length(uint32_t c) const { return c + 1 < chunks_ ? chunk_ : cols_ - c * chunk_; }

  // Starts the copy of the next piece, if any. Pieces are ordered by row, then sweep, then chunk.
  __aicore__ inline void Fetch() {
    if (nextPiece_ == pieces_) {
      return;
    }
    const uint32_t perRow = chunks_ == 1 ? 1 : 2 * chunks_;
    const uint32_t c = static_cast<uint32_t>(nextPiece_ % perRow) % chunks_;
    const uint64_t row = firstRow_ + nextPiece_ / perRow;
    AscendC::LocalTensor<T> x = inQueue_.template AllocTensor<T>();
    AscendC::DataCopyExtParams params{1, static_cast<uint32_t>(Length(c) * sizeof(T)), 0, 0, 0};
    AscendC::DataCopyPadExtParams<T> noPadding;
    AscendC::DataCopyPad(x, xGm_[row * cols_ + static_cast<uint64_t>(c) * chunk_], params, noPadding);
    inQueue_.EnQue(x);
    ++nextPiece_;
  }

  // Loads the prefetched piece into work_ as fp32, and prefetches the next one.
  __aicore__ inline void Load(uint32_t n) {
    AscendC::LocalTensor<T> x = inQueue_.template DeQue<T>();
    Fetch();
    if constexpr (kFloat) {
      AscendC::Adds(work_, x, 0.0f, n);
    } else {
      AscendC::Cast(work_, x, AscendC::RoundMode::CAST_NONE, n);
    }
    inQueue_.FreeTensor(x);
    AscendC::PipeBarrier<PIPE_V>();
  }

  __aicore__ inline float Max(uint32_t n) {
    AscendC::ReduceMax(max_, work_, tmp_, n);
    return Value(max_);
  }

  __aicore__ inline void Reduce(uint32_t n) {
    AscendC::ReduceSum(part_, work_, tmp_, n);
    // The API ends on the scalar unit; part_ is read by vector instructions next.
    Sync<AscendC::HardEvent::S_V>();
  }

  __aicore__ inline float Sum(uint32_t n) {
    AscendC::ReduceSum(part_, work_, tmp_, n);
    return Value(part_);
  }

  __aicore__ inline void Exponentials(float top, uint32_t n) {
    AscendC::Adds(work_, work_, -top, n);
    AscendC::PipeBarrier<PIPE_V>();
    AscendC::Exp(work_, work_, n);
    AscendC::PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void Store(uint32_t row, uint32_t c, float scale, uint32_t n) {
    AscendC::LocalTensor<T> y = outQueue_.template AllocTensor<T>();
    if constexpr (kFloat) {
      AscendC::Muls(y, work_, scale, n);
    } else {
      AscendC::Muls(work_, work_, scale, n);
      AscendC::PipeBarrier<PIPE_V>();
      AscendC::Cast(y, work_, AscendC::RoundMode::CAST_RINT, n);
    }
    AscendC::PipeBarrier<PIPE_V>();
    outQueue_.EnQue(y);
    y = outQueue_.template DeQue<T>();
    AscendC::DataCopyExtParams params{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0};
    const uint64_t start = (static_cast<uint64_t>(firstRow_) + row) * cols_ + static_cast<uint64_t>(c) * chunk_;
    AscendC::DataCopyPad(yGm_[start], y, params);
    outQueue_.FreeTensor(y);
  }

  // Reads a scalar that a vector instruction wrote to UB; later vector instructions are ordered after the read.
  __aicore__ inline float Value(const AscendC::LocalTensor<float>& tensor) {
    Sync<AscendC::HardEvent::V_S>();
    const float value = tensor.GetValue(0);
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
  AscendC::TQue<AscendC::TPosition::VECIN, 1> inQueue_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> outQueue_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> workBuf_, tmpBuf_, statBuf_;
  AscendC::LocalTensor<float> work_, tmp_, max_, part_, sum_, scale_;
  uint32_t cols_ = 0, chunk_ = 0, chunks_ = 0, firstRow_ = 0, rows_ = 0;
  uint64_t pieces_ = 0, nextPiece_ = 0;
};
