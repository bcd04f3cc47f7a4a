// See memory.h.
#include "cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace npu_xent::cpu {

void use_huge_pages(void* begin, size_t bytes) {
  constexpr size_t kWorthIt = size_t{64} << 20;
  static const bool enabled = [] {
    const char* value = std::getenv("NPU_XENT_HUGE_PAGES");
    return value == nullptr || std::string_view(value) != "0";
  }();
  if (!enabled || bytes < kWorthIt) {
    return;
  }
#ifdef MADV_HUGEPAGE
  // Only whole pages inside the allocation: what else lies on the first and the last is not ours. A refusal (no such
  // pages on this system) costs nothing but speed.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace npu_xent::cpu
