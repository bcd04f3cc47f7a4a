// Which variants of chunk_kernels.cpp this library holds. The build defines NPU_XENT_VARIANTS as X(NAME) for each.
#include "cpu/kernels/chunk_kernels.h"

namespace npu_xent::cpu {

#define X(NAME)                   \
  namespace NAME {                \
  extern const KernelTable table; \
  }
NPU_XENT_VARIANTS
#undef X

const KernelTable& kernel_table(const std::string& capability) {
#define X(NAME)              \
  if (capability == #NAME) { \
    return NAME::table;      \
  }
  NPU_XENT_VARIANTS
#undef X
  return DEFAULT::table;
}

std::string variant_name(const std::string& capability) {
#define X(NAME)              \
  if (capability == #NAME) { \
    return #NAME;            \
  }
  NPU_XENT_VARIANTS
#undef X
  return "DEFAULT";
}

std::string compiled_capabilities() {
  std::string names;
#define X(NAME) names += names.empty() ? #NAME : " " #NAME;
  NPU_XENT_VARIANTS
#undef X
  return names;
}

}  // namespace npu_xent::cpu
