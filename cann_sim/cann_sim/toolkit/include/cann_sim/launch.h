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
void cann_sim_unregister(uint64_t id);

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

// The hook for asynchronous streams: when set, a launch on a non-null stream is passed to it as task(closure), to be
// called exactly once, and returns 0 at once. Without it every launch has finished when it returns.
void cann_sim_set_executor(void (*submit)(void* stream, void (*task)(void* closure), void* closure));

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
