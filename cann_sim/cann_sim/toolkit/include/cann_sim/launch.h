// The C interface of libcann_sim.so: launching, memory registration, configuration, reports. Generated launchers and
// the Python package call it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

extern "C" {

// Runs `blocks` cores of a kernel. `run` is called once per core with `args`, of which `args_bytes` are copied when the
// launch is handed to an executor. `pointers` are the kernel's pointer arguments: the registered allocations they fall
// into are the device memory it may touch. Returns 0, or non-zero with cann_sim_last_error set.
uint32_t cann_sim_launch(const char* kernel, uint32_t blocks, void* stream, void (*run)(void* args), const void* args,
                         size_t args_bytes, void* const* pointers, size_t pointer_count);

// Device memory. `written` says that its contents count as written; otherwise reading before writing is an error.
uint64_t cann_sim_register(const void* start, uint64_t bytes, int written);
// A piece cut out of registered memory, as a caching allocator does: pointers into it are bounded by it, and nothing in
// it counts as written.
uint64_t cann_sim_register_part(const void* start, uint64_t bytes);
void cann_sim_unregister(uint64_t id);
// Writes that no kernel does. The allocations that an address falls into now, so that what is written there later
// counts for them and for no allocation that takes their place; to be given back to cann_sim_forget.
struct cann_sim_place;
struct cann_sim_place* cann_sim_find(const void* address);
void cann_sim_written(struct cann_sim_place* place, const void* start, uint64_t bytes);
void cann_sim_forget(struct cann_sim_place* place);
// The same for what the address falls into now, at once.
void cann_sim_written_now(const void* start, uint64_t bytes);

// How this thread's launches run; null goes back to the defaults. The environment has its say on top: CANN_SIM_CHECK=0,
// CANN_SIM_THREADS, CANN_SIM_BANDWIDTH_SCALE, CANN_SIM_VECTOR_SCALE, CANN_SIM_SCALAR_SCALE, CANN_SIM_QUIET.
struct cann_sim_site {
  const char* kind;
  const char* file;
  int32_t line;
};
struct cann_sim_config {
  int32_t check, trace_core, threads, quiet;
  double bandwidth_scale, vector_scale, scalar_scale;
  const struct cann_sim_site* removed;  // synchronisation sites to ignore, as the report lists them
  uint32_t removed_count;
};
void cann_sim_configure(const struct cann_sim_config* config);

// The hook for asynchronous streams: when set, a launch on a non-null stream is passed to it as a task, and the launch
// returns at once what it returns. Non-zero refuses the task; else it is the hook's, to be run at most once and freed.
// Without a hook every launch has finished when it returns. Setting it returns the one before.
struct cann_sim_task;
typedef uint32_t (*cann_sim_submit)(void* stream, struct cann_sim_task* task);
cann_sim_submit cann_sim_set_executor(cann_sim_submit submit);
uint32_t cann_sim_task_run(struct cann_sim_task* task);  // what a launch without a hook returns
void cann_sim_task_free(struct cann_sim_task* task);
const char* cann_sim_task_kernel(const struct cann_sim_task* task);
const char* cann_sim_task_error(const struct cann_sim_task* task);  // after it has run; "" if it broke no rule
// Device memory, valid until the next call for this task: the allocations that its pointers fell into when it was
// launched, and what its cores read (written 0) and wrote (1), known after it has run and unless checks are off.
struct cann_sim_range {
  uint64_t start, end;
  int32_t written;
};
size_t cann_sim_task_buffers(struct cann_sim_task* task, const struct cann_sim_range** ranges);
size_t cann_sim_task_uses(struct cann_sim_task* task, const struct cann_sim_range** ranges);

// Of this thread's last launch: a JSON text with counts, times and the error if any; the error as one line, or "".
const char* cann_sim_last_report(void);
const char* cann_sim_last_error(void);

// What a kernel library says of each kernel's parameters: kind 'p' pointer, 'i' signed, 'u' unsigned, 'f' floating,
// 's' struct by value; the list ends with kind 0.
struct cann_sim_parameter {
  char kind;
  uint32_t bytes;
};
}

namespace cann_sim {

template <typename T>
constexpr cann_sim_parameter parameter() {
  using Plain = std::remove_cv_t<T>;
  if constexpr (std::is_pointer_v<Plain>) {
    return {'p', sizeof(Plain)};
  } else if constexpr (std::is_floating_point_v<Plain>) {
    return {'f', sizeof(Plain)};
  } else if constexpr (std::is_integral_v<Plain>) {
    return {std::is_signed_v<Plain> ? 'i' : 'u', sizeof(Plain)};
  } else {
    static_assert(std::is_trivially_copyable_v<Plain>, "a kernel's by-value struct must be trivially copyable");
    return {'s', sizeof(Plain)};
  }
}

}  // namespace cann_sim
