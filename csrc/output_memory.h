// Memory of large outputs. The page faults of fresh memory cost more than the arithmetic, so such memory comes in huge
// pages, and what is given back is kept for the next output of about that size: a training step writes its gradient
// where the last one was. Kept memory is marked as free for the system to take when it runs short (MADV_FREE); until
// then it counts as resident, and its addresses count as used.
//
// NPU_XENT_HUGE_PAGES=0 turns the former off, NPU_XENT_KEEP_MEMORY=0 the latter.
#pragma once

#include <cstddef>

namespace npu_xent {

// Smaller outputs are left to the usual allocator.
constexpr size_t kLargeOutput = size_t{32} << 20;

// At least `bytes` bytes, aligned to a huge page, with any contents; null if there is no memory. Thread-safe.
void* take_memory(size_t bytes);
// Gives back what take_memory returned.
void give_memory_back(void* memory);

}  // namespace npu_xent
