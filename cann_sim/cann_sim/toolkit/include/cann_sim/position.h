// The names kernels are written with: address-space macros, positions, pipes, events. No behaviour.
#pragma once

#include <cstdint>

#ifndef CANN_SIM_SCAN  // the launcher generator looks for these words in the preprocessed source
#define __global__
#define __aicore__
#endif
#define __gm__
#define __ubuf__
#define __inout_pipe__(...)
#define __in_pipe__(...)
#define __out_pipe__(...)
#define GM_ADDR __gm__ uint8_t*

enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_ALL, PIPE_FIX };
enum event_t {
  EVENT_ID0,
  EVENT_ID1,
  EVENT_ID2,
  EVENT_ID3,
  EVENT_ID4,
  EVENT_ID5,
  EVENT_ID6,
  EVENT_ID7,
};

namespace AscendC {

using TEventID = int8_t;

enum class TPosition : uint8_t {
  GM,
  A1,
  A2,
  B1,
  B2,
  C1,
  C2,
  CO1,
  CO2,
  VECIN,
  VECOUT,
  VECCALC,
  LCM = VECCALC,
  SPM,
  SHM = SPM,
  TSCM,
  C2PIPE2GM,
  C2PIPE2LOCAL,
  MAX,
};
using QuePosition = TPosition;

enum class HardEvent : uint8_t {
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  MTE2_MTE3,
  MTE3_MTE2,
  S_V,
  V_S,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S,
  V_V,
  MTE2_MTE1,
  MTE1_MTE2,
  MTE1_M,
  M_MTE1,
  MTE1_V,
  V_MTE1,
  MTE1_MTE3,
  MTE3_MTE1,
  M_V,
  V_M,
  M_S,
  S_M,
  M_FIX,
  FIX_M,
  FIX_MTE2,
  MTE2_FIX,
  FIX_MTE3,
  FIX_S,
  FIX_V,
  MAX,
};

}  // namespace AscendC
