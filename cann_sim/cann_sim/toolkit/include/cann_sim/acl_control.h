// The control interface of the simulated libascendcl.so: operators that the host computes in a stream's turn, the
// tensors of a caching allocator, and what tests need. The Python side of it is cann_sim.acl.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A task that the calling thread runs in the place of a kernel on `stream`. begin returns when everything enqueued on
// the stream before has run and the stream is not held; that counts as no synchronisation: it orders nothing else. It
// returns the task's id, or 0 with aclGetRecentErrMsg set when there is no such stream. Until end, the stream runs
// nothing else.
uint64_t cann_sim_acl_begin(void* stream, const char* name);
// Device memory that the task reads or writes; what it writes counts as written. Other memory is ignored.
void cann_sim_acl_touch(uint64_t task, const void* start, size_t bytes, int write);
// Non-zero: the task broke a rule, which the stream's next synchronisation says too.
int cann_sim_acl_end(uint64_t task);

// Tensors that a caching allocator cuts out of device memory. While one is alive, a kernel pointer into it is bounded
// by it; its bytes count as unwritten until something writes them.
void cann_sim_acl_tensor_allocated(const void* start, size_t bytes);
void cann_sim_acl_tensor_freed(const void* start);

// A held stream runs nothing. Null: all streams, those to be created included.
void cann_sim_acl_hold(void* stream);
void cann_sim_acl_release(void* stream);

// The calls [skip, skip + count) of an API function, or of "launch:<kernel>", counted from now on, return `code` and do
// nothing else. A count of 0 ends it.
void cann_sim_acl_fail(const char* api, int64_t skip, int64_t count, int32_t code);
// Every call of this API function, or of "launch:<kernel>", sleeps first; 0 ends it.
void cann_sim_acl_delay(const char* api, double milliseconds);
// How often it was called, those included that were made to fail.
uint64_t cann_sim_acl_calls(const char* api);

// JSON, valid until this thread's next call: of each device its memory, live blocks and tensors; streams (the default
// ones, once used, with the handle 0), events, errors (races, overwritten canaries, kernel errors; the first 1000
// different ones, and how many there were beyond) and call counts. Looks at all canaries.
const char* cann_sim_acl_status(void);
// Forgets errors, those included that a synchronisation has yet to return.
void cann_sim_acl_clear_errors(void);

#ifdef __cplusplus
}
#endif
