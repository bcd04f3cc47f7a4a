// The device memory known to the process.
#pragma once

#include "launch_state.h"

namespace cann_sim {

// The allocations that the pointers fall into, as they are now.
std::vector<Buffer> snapshot_buffers(void* const* pointers, size_t count);

// After a launch: what its cores wrote counts as written from now on.
void record_writes(const Launch& launch);

}  // namespace cann_sim
