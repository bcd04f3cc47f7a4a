// scale: x *= factor, for n contiguous numbers. The factor is in global memory; the kernel returns at once if it is 1.
// So a gradient that was computed for an upstream gradient of 1 costs no second pass if it is 1, and the host does not
// wait for the value.
#include "kernel_operator.h"

#include "ascendc/row_kernel.h"

using namespace npu_xent;

namespace {

// args.cols: n. Chunks of kScaleChunk go round in two buffers; the factor and the products are fp32.
template <typename T>
class Scale {
 public:
  __aicore__ inline Scale(AscendC::TPipe& pipe, const XentArgs& args, GM_ADDR x, float factor)
      : n_(args.cols), factor_(factor), x_(Gm<T>(x, 0)) {
    pipe.InitBuffer(in_, 2, kScaleChunk * sizeof(T));
    pipe.InitBuffer(out_, 2, kScaleChunk * sizeof(T));
    pipe.InitBuffer(work_, kIsFp32<T> ? kDataBlock : kScaleChunk * 4);
  }

  __aicore__ inline void Run() {
    const Share mine = share_of(div_up(n_, kScaleChunk), AscendC::GetBlockIdx(), AscendC::GetBlockNum());
    if (mine.begin < mine.end) {
      Load(mine.begin);
    }
    for (int64_t chunk = mine.begin; chunk < mine.end; ++chunk) {
      if (chunk + 1 < mine.end) {
        Load(chunk + 1);
      }
      Multiply(chunk);
    }
  }

 private:
  __aicore__ inline int64_t Size(int64_t chunk) const { return smaller(kScaleChunk, n_ - chunk * kScaleChunk); }
  __aicore__ inline void Load(int64_t chunk) {
    const LocalTensor<T> in = in_.template AllocTensor<T>();
    CopyIn(in, x_[chunk * kScaleChunk], Size(chunk));
    in_.EnQue(in);
  }
  __aicore__ inline void Multiply(int64_t chunk) {
    const int64_t n = Size(chunk);
    LocalTensor<T> in = in_.template DeQue<T>();
    const LocalTensor<T> out = out_.template AllocTensor<T>();
    if constexpr (kIsFp32<T>) {
      AscendC::Muls(out, in, factor_, n);
    } else {
      const LocalTensor<float> work = work_.Get<float>();
      AscendC::Cast(work, in, AscendC::RoundMode::CAST_NONE, n);
      PipeBarrier<PIPE_V>();
      AscendC::Muls(work, work, factor_, n);
      PipeBarrier<PIPE_V>();
      AscendC::Cast(out, work, AscendC::RoundMode::CAST_RINT, n);
      PipeBarrier<PIPE_V>();  // the next chunk's work
    }
    in_.FreeTensor(in);
    out_.EnQue(out);
    LocalTensor<T> done = out_.template DeQue<T>();
    CopyOut(x_[chunk * kScaleChunk], done, n);
    out_.FreeTensor(done);
  }

  const int64_t n_;
  const float factor_;
  const GlobalTensor<T> x_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> in_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> out_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> work_;
};

__aicore__ inline float ReadFactor(const XentArgs& args, GM_ADDR factor) {
  if (args.factor_dtype == static_cast<int64_t>(LogitsType::fp32)) {
    return Gm<float>(factor, 0).GetValue(0);
  }
  if (args.factor_dtype == static_cast<int64_t>(LogitsType::fp16)) {
    return static_cast<float>(Gm<half>(factor, 0).GetValue(0));
  }
  return FloatOfBits(static_cast<uint32_t>(Gm<uint16_t>(factor, 0).GetValue(0)) << 16);
}

}  // namespace

extern "C" __global__ __aicore__ void npu_xent_scale(GM_ADDR x, GM_ADDR factor, XentArgs args) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  const float value = ReadFactor(args, factor);
  if (BitsOf(value) == BitsOf(1.0f)) {
    return;
  }
  AscendC::TPipe pipe;
  if (args.dtype == static_cast<int64_t>(LogitsType::fp32)) {
    Scale<float>(pipe, args, x, value).Run();
  } else if (args.dtype == static_cast<int64_t>(LogitsType::fp16)) {
    Scale<half>(pipe, args, x, value).Run();
  } else {
    Scale<bfloat16_t>(pipe, args, x, value).Run();
  }
}
