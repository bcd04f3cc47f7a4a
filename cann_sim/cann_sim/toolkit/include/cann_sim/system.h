// What a kernel asks of the machine around it: its block, its kernel type; printing and assertions.
#pragma once

#include <cstdio>

#include "cann_sim/core.h"
#include "cann_sim/position.h"

namespace AscendC {

inline int64_t GetBlockIdx() {
  return ::cann_sim::core().index();
}
inline int64_t GetBlockNum() {
  return ::cann_sim::core().blocks();
}
inline int64_t GetSubBlockIdx() {
  return 0;
}
inline int64_t GetSubBlockNum() {
  return 1;
}
inline int64_t GetTaskRation() {
  return 1;
}
constexpr uint32_t GetDataBlockSizeInBytes() {
  return 32;
}
constexpr uint32_t GetVecLen() {
  return 256;
}
constexpr uint32_t GetUBSizeInBytes() {
  return ::cann_sim::kUbBytes;
}

constexpr uint32_t ONE_BLK_SIZE = 32;
constexpr uint32_t ONE_REPEAT_BYTE_SIZE = 256;
constexpr uint32_t DEFAULT_BLK_NUM = 8;
constexpr uint32_t MAX_REPEAT_TIMES = 255;

template <typename T>
T AlignUp(T value, T unit) {
  return unit == 0 ? 0 : (value + unit - 1) / unit * unit;
}
template <typename T>
T CeilDivision(T value, T unit) {
  return unit == 0 ? 0 : (value + unit - 1) / unit;
}

template <typename... Arguments>
void PRINTF(const char* text, Arguments... arguments) {
  if constexpr (sizeof...(Arguments) == 0) {
    std::fputs(text, stdout);
  } else {
    std::printf(text, arguments...);
  }
}
using ::printf;

// There is no system workspace, so the user's starts where the kernel's argument does.
inline GM_ADDR GetUserWorkspace(GM_ADDR workspace) {
  return workspace;
}

inline void kernel_assert(bool holds, const char* text, ::cann_sim::Place where) {
  if (!holds) {
    ::cann_sim::core().fail("assert", where, text);
  }
}

}  // namespace AscendC

// The kernel type decides which cores run a launch; only vector cores are modelled.
#define KERNEL_TYPE_AIV_ONLY 0
#define KERNEL_TYPE_MIX_AIV_1_0 0
#define KERNEL_TYPE_AIC_ONLY cann_sim_does_not_model_kernels_that_use_the_cube_unit
#define KERNEL_TYPE_MIX_AIC_1_0 cann_sim_does_not_model_kernels_that_use_the_cube_unit
#define KERNEL_TYPE_MIX_AIC_1_1 cann_sim_does_not_model_kernels_that_use_the_cube_unit
#define KERNEL_TYPE_MIX_AIC_1_2 cann_sim_does_not_model_kernels_that_use_the_cube_unit
#define KERNEL_TASK_TYPE_DEFAULT(type) static_assert((type) == 0)
#define KERNEL_TASK_TYPE(key, type) static_assert((type) == 0)

#define ASCENDC_ASSERT(condition, ...) \
  AscendC::kernel_assert(static_cast<bool>(condition), "ASCENDC_ASSERT(" #condition ")", {__FILE__, __LINE__})
#define ascendc_assert(condition, ...) \
  AscendC::kernel_assert(static_cast<bool>(condition), "ascendc_assert(" #condition ")", {__FILE__, __LINE__})
