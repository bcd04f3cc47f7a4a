// Which variants of the CPU's loops this processor can run.
#pragma once

#include <string>

#ifdef __aarch64__
#include <sys/prctl.h>
#endif

namespace test {

inline bool processor_has(const std::string& variant) {
#ifdef __aarch64__
  // The length of its vectors is compiled into the variant.
  return variant == "DEFAULT" || (prctl(PR_SVE_GET_VL) & PR_SVE_VL_LEN_MASK) == 32;
#else
  if (variant == "AVX2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (variant == "AVX512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  return variant == "DEFAULT";
#endif
}

}  // namespace test
