// Memory for large outputs. Page faults of fresh memory cost more than the arithmetic, so it is allocated in huge
// pages, and freed memory is cached for the next output of about that size: each training step reuses the memory of the
// last gradient. The system may reclaim cached memory when it runs short (MADV_FREE); until then it counts as resident,
// and its address space stays reserved.
//
// NPU_XENT_HUGE_PAGES=0 disables huge pages, NPU_XENT_KEEP_MEMORY=0 the cache.
#pragma once

#include <cstddef>

namespace npu_xent {

// Smaller outputs use torch's allocator.
constexpr size_t kLargeOutput = size_t{32} << 20;

// At least `bytes` uninitialized bytes, aligned to a huge page; null if out of memory. Thread-safe.
void* take_memory(size_t bytes);
// Gives back what take_memory returned.
void give_memory_back(void* memory);

}  // namespace npu_xent
