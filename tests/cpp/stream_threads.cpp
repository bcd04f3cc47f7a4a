// cann_sim's AscendCL from many threads: streams, events, copies, kernels, functions and operators of the host, and
// memory, while another thread holds streams and reads the status. Run with ThreadSanitizer too, which sees accesses
// that the streams and events do not order.
#include <aclrtlaunch_shift.h>

#include <array>
#include <atomic>
#include <thread>

#include "acl/acl.h"
#include "cann_sim/acl_control.h"
#include "check.h"

namespace {

using namespace test;

constexpr int kThreads = 6, kDevices = 2, kRounds = 40;
constexpr uint32_t kCores = 2, kCount = 256;
constexpr size_t kElements = kCores * kCount, kBytes = kElements * sizeof(float);

// What the threads of a device use together: a stream, and memory in which each of its tasks adds 1.
struct Shared {
  aclrtStream stream = nullptr;
  float* sum = nullptr;
};

// The first call of a thread that fails; later ones are left out.
struct Calls {
  aclError code = ACL_SUCCESS;
  const char* name = "";
  int line = 0;
  void made(aclError result, const char* call, int at) {
    if (code == ACL_SUCCESS && result != ACL_SUCCESS) {
      code = result, name = call, line = at;
    }
  }
};
#define CALL(function, ...) calls.made(function(__VA_ARGS__), #function, __LINE__)

float* allocated(Calls& calls, aclError (*allocate)(void**, size_t)) {
  void* memory = nullptr;
  CALL(allocate, &memory, kBytes);
  return static_cast<float*>(memory);
}
aclError device_memory(void** memory, size_t bytes) {
  return aclrtMalloc(memory, bytes, ACL_MEM_MALLOC_HUGE_FIRST);
}

void add_one(void* number) {
  ++*static_cast<int*>(number);
}

// Waits for the event or its stream, in one of the ways that a program has.
void wait(Calls& calls, int round, aclrtStream stream, aclrtEvent event) {
  aclrtStreamStatus status = ACL_STREAM_STATUS_NOT_READY;
  switch (round % 4) {
    case 0:
      CALL(aclrtSynchronizeStream, stream);
      break;
    case 1:
      CALL(aclrtSynchronizeEvent, event);
      break;
    case 2:
      CALL(aclrtSynchronizeDevice);
      break;
    default:
      while (calls.code == ACL_SUCCESS && status != ACL_STREAM_STATUS_COMPLETE) {
        CALL(aclrtStreamQuery, stream, &status);
      }
  }
}

struct Result {
  Calls calls;
  int wrong = 0;
};

void work(int thread, const std::array<Shared, kDevices>& all, Result& result) {
  Calls& calls = result.calls;
  const Shared& shared = all[thread % kDevices];
  CALL(aclrtSetDevice, thread % kDevices);
  float* const in = allocated(calls, aclrtMallocHost);
  float* const out = allocated(calls, aclrtMallocHost);
  for (int round = 0; round < kRounds && calls.code == ACL_SUCCESS; ++round) {
    aclrtStream first = nullptr, second = nullptr;
    aclrtEvent ready = nullptr, done = nullptr;
    CALL(aclrtCreateStream, &first);
    CALL(aclrtCreateStream, &second);
    CALL(aclrtCreateEvent, &ready);
    CALL(aclrtCreateEvent, &done);
    float* const source = allocated(calls, device_memory);
    float* const target = allocated(calls, device_memory);
    const auto value = static_cast<float>(100 * thread + round);
    int functions = 0;
    std::fill_n(in, kElements, value);
    CALL(aclrtMemcpyAsync, source, kBytes, in, kBytes, ACL_MEMCPY_HOST_TO_DEVICE, first);
    CALL(aclrtlaunch_shift, kCores, first, source, target, kCount, 0.5f);
    CALL(aclrtRecordEvent, ready, first);
    CALL(aclrtStreamWaitEvent, second, ready);
    CALL(aclrtMemcpyAsync, out, kBytes, target, kBytes, ACL_MEMCPY_DEVICE_TO_HOST, second);
    CALL(aclrtLaunchHostFunc, second, add_one, &functions);
    CALL(aclrtRecordEvent, done, second);

    CALL(aclrtlaunch_shift, kCores, shared.stream, shared.sum, shared.sum, kCount, 1.0f);
    const uint64_t task = cann_sim_acl_begin(shared.stream, "add 1");
    cann_sim_acl_touch(task, shared.sum, kBytes, 0);
    cann_sim_acl_touch(task, shared.sum, kBytes, 1);
    for (size_t i = 0; i < kElements; ++i) {
      shared.sum[i] += 1;
    }
    CALL(cann_sim_acl_end, task);

    wait(calls, round, second, done);
    result.wrong += functions != 1;
    for (size_t i = 0; i < kElements; ++i) {
      result.wrong += out[i] != value + 0.5f;
    }
    for (float* memory : {source, target}) {
      CALL(aclrtFree, memory);
    }
    for (aclrtEvent event : {ready, done}) {
      CALL(aclrtDestroyEvent, event);
    }
    for (aclrtStream stream : {first, second}) {
      CALL(aclrtDestroyStream, stream);
    }
  }
  for (float* memory : {in, out}) {
    CALL(aclrtFreeHost, memory);
  }
}

// Meanwhile: streams are held for a moment, the status is read, and calls are counted.
void watch(const std::array<Shared, kDevices>& all, const std::atomic<bool>& over, Result& result) {
  Calls& calls = result.calls;
  CALL(aclrtSetDevice, 0);
  while (!over) {
    size_t free_bytes = 0, total = 0;
    cann_sim_acl_hold(all[0].stream);
    CALL(aclrtGetMemInfo, ACL_HBM_MEM, &free_bytes, &total);
    result.wrong += std::strstr(cann_sim_acl_status(), "\"errors\":[]") == nullptr;
    cann_sim_acl_release(all[0].stream);
    result.wrong += free_bytes > total || cann_sim_acl_calls("aclrtCreateStream") == 0;
    std::this_thread::yield();
  }
}

}  // namespace

int main() {
  context = "streams";
  Calls calls;
  std::array<Shared, kDevices> all;
  for (int device = 0; device < kDevices; ++device) {
    CALL(aclrtSetDevice, device);
    CALL(aclrtCreateStream, &all[device].stream);
    all[device].sum = allocated(calls, device_memory);
    CALL(aclrtMemset, all[device].sum, kBytes, 0, kBytes);
  }
  std::array<Result, kThreads + 1> results;
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back(work, i, std::cref(all), std::ref(results[i]));
  }
  std::thread watcher(watch, std::cref(all), std::cref(over), std::ref(results[kThreads]));
  for (std::thread& thread : threads) {
    thread.join();
  }
  over = true;
  watcher.join();
  for (const Result& result : results) {
    const auto number = static_cast<int>(&result - results.data());
    check(result.calls.code == ACL_SUCCESS, "thread %d, line %d: %s returned %d", number, result.calls.line,
          result.calls.name, result.calls.code);
    check(result.wrong == 0, "thread %d found %d wrong values", number, result.wrong);
  }
  for (int device = 0; device < kDevices; ++device) {
    CALL(aclrtSetDevice, device);
    CALL(aclrtSynchronizeStream, all[device].stream);
    constexpr float expected = 2 * kRounds * (kThreads / kDevices);
    check(std::count(all[device].sum, all[device].sum + kElements, expected) == kElements, "device %d: %g, expected %g",
          device, all[device].sum[0], expected);
    CALL(aclrtFree, all[device].sum);
    CALL(aclrtDestroyStream, all[device].stream);
  }
  check(calls.code == ACL_SUCCESS, "line %d: %s returned %d: %s", calls.line, calls.name, calls.code,
        aclGetRecentErrMsg());
  return finish("stream_threads");
}
