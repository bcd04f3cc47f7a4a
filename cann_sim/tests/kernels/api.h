// What the kernels behind test_api_*.py share: up to four buffers come to UB, one vector instruction runs on them with
// parameters from the host, the last buffer goes back. Each core has its own part of every buffer.
#ifndef API_H_
#define API_H_

#include "kernel_operator.h"

using namespace AscendC;

struct Case {
  int32_t op, form, mode, count, repeat;
  int32_t strides[6];
  int32_t bytes[4];  // of a core's part of src0, src1, src2, dst
  int32_t flag;
  float scalar;
  uint64_t mask[2];
};

enum Form { COUNT, PREFIX, BITS, COUNTER, REGISTER };

struct Buffers {
  __aicore__ inline Buffers(const Case& c, GM_ADDR src0, GM_ADDR src1, GM_ADDR src2, GM_ADDR dst) : bytes(c.bytes) {
    GM_ADDR from[4] = {src0, src1, src2, dst};
    for (int i = 0; i < 4; ++i) {
      if (bytes[i] != 0) {
        pipe.InitBuffer(buffers[i], bytes[i]);
        gm[i].SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(from[i]) + GetBlockIdx() * bytes[i], bytes[i]);
        DataCopy(buffers[i].Get<uint8_t>(), gm[i], bytes[i]);
      }
    }
    PipeBarrier<PIPE_ALL>();
  }

  template <typename T>
  __aicore__ inline LocalTensor<T> Get(int i) {
    return bytes[i] != 0 ? buffers[i].Get<T>() : LocalTensor<T>();
  }

  __aicore__ inline void Store() {
    PipeBarrier<PIPE_ALL>();
    DataCopy(gm[3], buffers[3].Get<uint8_t>(), bytes[3]);
  }

  TPipe pipe;
  TBuf<TPosition::VECCALC> buffers[4];
  GlobalTensor<uint8_t> gm[4];
  const int32_t* bytes;
};

// The five ways to say which lanes take part, for an API called as NAME(first arguments..., lanes, repeat parameters).
#define FORMS(T, COUNT_CALL, REPEAT_CALL, REGISTER_CALL)        \
  switch (c.form) {                                             \
    case COUNT: {                                               \
      COUNT_CALL;                                               \
      break;                                                    \
    }                                                           \
    case PREFIX: {                                              \
      const uint64_t mask = c.mask[0];                          \
      REPEAT_CALL;                                              \
      break;                                                    \
    }                                                           \
    case BITS: {                                                \
      uint64_t mask[2] = {c.mask[0], c.mask[1]};                \
      REPEAT_CALL;                                              \
      break;                                                    \
    }                                                           \
    case COUNTER: {                                             \
      SetMaskCount();                                           \
      SetVectorMask<T, MaskMode::COUNTER>(c.count);             \
      REGISTER_CALL;                                            \
      SetMaskNorm();                                            \
      ResetMask();                                              \
      break;                                                    \
    }                                                           \
    case REGISTER: {                                            \
      SetVectorMask<T, MaskMode::NORMAL>(c.mask[1], c.mask[0]); \
      REGISTER_CALL;                                            \
      ResetMask();                                              \
      break;                                                    \
    }                                                           \
  }

#define KERNEL(name) \
  extern "C" __global__ __aicore__ void name(GM_ADDR src0, GM_ADDR src1, GM_ADDR src2, GM_ADDR dst, Case c)

#endif  // API_H_
