// A kernel that runs a program of copies, vector and scalar instructions, flags and barriers given as numbers, so that
// random programs can be checked against a model of what is ordered. UB and GM are 32 blocks of 32 bytes each.
#include "scratch.h"

constexpr uint32_t kBlock = 8;  // floats in 32 bytes

// Each step: the operation, then its operands, a byte each.
struct Program {
  uint32_t count;
  uint32_t steps[120];
};

template <bool set>
__aicore__ inline void Flag(uint32_t event, int32_t id) {
  switch (event) {
#define EVENT(number, name)          \
  case number:                       \
    if constexpr (set) {             \
      SetFlag<HardEvent::name>(id);  \
    } else {                         \
      WaitFlag<HardEvent::name>(id); \
    }                                \
    break;
    EVENT(0, S_V)
    EVENT(1, S_MTE2)
    EVENT(2, S_MTE3)
    EVENT(3, V_S)
    EVENT(4, V_MTE2)
    EVENT(5, V_MTE3)
    EVENT(6, MTE2_S)
    EVENT(7, MTE2_V)
    EVENT(8, MTE2_MTE3)
    EVENT(9, MTE3_S)
    EVENT(10, MTE3_V)
    EVENT(11, MTE3_MTE2)
#undef EVENT
  }
}

__aicore__ inline void Barrier(uint32_t pipe) {
  switch (pipe) {
    case 1:
      PipeBarrier<PIPE_V>();
      break;
    case 2:
      PipeBarrier<PIPE_MTE2>();
      break;
    case 3:
      PipeBarrier<PIPE_MTE3>();
      break;
    default:
      PipeBarrier<PIPE_ALL>();
  }
}

extern "C" __global__ __aicore__ void interpret(GM_ADDR gm, Program program) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 32 * 32);
  LocalTensor<float> ub = buffer.Get<float>();
  GlobalTensor<float> data;
  data.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(gm));
  Duplicate(ub, 1.0f, 32 * kBlock);
  PipeBarrier<PIPE_ALL>();
  for (uint32_t i = 0; i < program.count; ++i) {
    const uint32_t step = program.steps[i];
    const uint32_t to = (step >> 8 & 255) * kBlock, from = (step >> 16 & 255) * kBlock, count = (step >> 24) * kBlock;
    switch (step & 255) {
      case 0:
        DataCopy(ub[to], data[from], count);
        break;
      case 1:
        DataCopy(data[to], ub[from], count);
        break;
      case 2:
        Adds(ub[to], ub[from], 1.0f, count);
        break;
      case 3:
        Duplicate(ub[to], 2.0f, count);
        break;
      case 4:
        (void)ub.GetValue(from);
        break;
      case 5:
        ub.SetValue(to, 3.0f);
        break;
      case 6:
        (void)data.GetValue(from);
        break;
      case 7:
        data.SetValue(to, 3.0f);
        break;
      case 8:
        Flag<true>(step >> 8 & 255, step >> 16 & 255);
        break;
      case 9:
        Flag<false>(step >> 8 & 255, step >> 16 & 255);
        break;
      default:
        Barrier(step >> 8 & 255);
    }
  }
}

// Steps of several cores, in floats of GM: bits 4 to 7 of a step say whose it is. In a core all is ordered.
extern "C" __global__ __aicore__ void interpret_on_cores(GM_ADDR gm, Program program) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 256);
  LocalTensor<float> ub = buffer.Get<float>();
  GlobalTensor<float> data;
  data.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(gm));
  Duplicate(ub, 1.0f, 64);
  for (uint32_t i = 0; i < program.count; ++i) {
    const uint32_t step = program.steps[i];
    if ((step >> 4 & 15) != GetBlockIdx()) {
      continue;
    }
    const uint32_t to = step >> 8 & 255, from = step >> 16 & 255, bytes = (step >> 24) * sizeof(float);
    PipeBarrier<PIPE_ALL>();
    switch (step & 15) {
      case 0:
        DataCopyPad(ub, data[from], DataCopyExtParams{1, bytes, 0, 0, 0}, NoPad());
        break;
      case 1:
        DataCopyPad(data[to], ub, DataCopyExtParams{1, bytes, 0, 0, 0});
        break;
      case 6:
        (void)data.GetValue(from);
        break;
      case 7:
        data.SetValue(to, 3.0f);
        break;
    }
  }
}
