// Cast: one kernel for each pair of types, with the rounding mode from the host.
#include "api.h"

template <typename D, typename S>
__aicore__ inline void RunCast(const Case& c, GM_ADDR src0, GM_ADDR src1, GM_ADDR src2, GM_ADDR dst) {
  Buffers s(c, src0, src1, src2, dst);
  const auto a = s.Get<S>(0);
  const auto d = s.Get<D>(3);
  const auto mode = static_cast<RoundMode>(c.mode);
  const UnaryRepeatParams p(c.strides[0], c.strides[1], c.strides[2], c.strides[3]);
  using Wide = std::conditional_t<(sizeof(D) > sizeof(S)), D, S>;
  FORMS(Wide, Cast(d, a, mode, c.count), Cast(d, a, mode, mask, c.repeat, p),
        (Cast<D, S, false>(d, a, mode, MASK_PLACEHOLDER, c.repeat, p)))
  s.Store();
}

#define PAIR(S, D, s, d)                     \
  KERNEL(cast_##s##_##d) {                   \
    RunCast<D, S>(c, src0, src1, src2, dst); \
  }

PAIR(int8_t, half, int8, half)
PAIR(uint8_t, half, uint8, half)
PAIR(int16_t, half, int16, half)
PAIR(int16_t, float, int16, float)
PAIR(half, int8_t, half, int8)
PAIR(half, uint8_t, half, uint8)
PAIR(half, int16_t, half, int16)
PAIR(half, int32_t, half, int32)
PAIR(half, float, half, float)
PAIR(bfloat16_t, int32_t, bfloat16, int32)
PAIR(bfloat16_t, float, bfloat16, float)
PAIR(int32_t, int16_t, int32, int16)
PAIR(int32_t, float, int32, float)
PAIR(int32_t, int64_t, int32, int64)
PAIR(float, int16_t, float, int16)
PAIR(float, half, float, half)
PAIR(float, bfloat16_t, float, bfloat16)
PAIR(float, int32_t, float, int32)
PAIR(float, float, float, float)
PAIR(float, int64_t, float, int64)
PAIR(int64_t, int32_t, int64, int32)
PAIR(int64_t, float, int64, float)
