// Memory of large outputs. The page faults of a fresh output cost as much as the arithmetic that fills it; huge pages
// make them 512 times fewer. NPU_XENT_HUGE_PAGES=0 turns this off.
#pragma once

#include <cstddef>

namespace npu_xent::cpu {

// Advises the kernel to back [begin, begin + bytes) with huge pages, from 64 MiB on.
void use_huge_pages(void* begin, size_t bytes);

}  // namespace npu_xent::cpu
