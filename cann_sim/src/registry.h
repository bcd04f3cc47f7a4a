// The process's device memory.
#pragma once

#include "launch_state.h"

namespace cann_sim {

// The allocations that currently contain the pointers; a part of an allocation instead of the whole.
std::vector<Buffer> snapshot_buffers(void* const* pointers, size_t count);

// Call before a launch runs: loads which bytes of its buffers have been written.
void load_written(Launch& launch);
// Call after a launch: records its cores' writes.
void record_writes(const Launch& launch);

}  // namespace cann_sim
