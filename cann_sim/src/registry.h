// The device memory known to the process.
#pragma once

#include "launch_state.h"

namespace cann_sim {

// The allocations that the pointers fall into now: those cut out of another one in the place of that one.
std::vector<Buffer> snapshot_buffers(void* const* pointers, size_t count);

// Before a launch runs: what has been written to its buffers by now.
void load_written(Launch& launch);
// After it: what its cores wrote counts as written from now on.
void record_writes(const Launch& launch);

}  // namespace cann_sim
