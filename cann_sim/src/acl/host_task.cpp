// Tasks that a thread of the host runs in the place of a kernel: operators on the host. They have their turn in the
// stream, and their accesses are held to the same rules.
#include <unordered_map>

#include "calls.h"
#include "cann_sim/acl_control.h"
#include "cann_sim/launch.h"
#include "memory.h"
#include "runtime.h"

using namespace cann_sim::acl;

namespace cann_sim::acl {

namespace {

struct HostTask {
  StreamPtr stream;
  Task task;
  aclError code = ACL_SUCCESS;  // the first rule that was broken
};

struct HostTasks {
  std::mutex mutex;
  std::unordered_map<uint64_t, HostTask> running;
  uint64_t next = 1;
};

HostTasks& host_tasks() {
  static auto* all = new HostTasks;  // outlives static destructors
  return *all;
}

}  // namespace

}  // namespace cann_sim::acl

uint64_t cann_sim_acl_begin(void* handle, const char* name) {
  HostTask task;
  {
    Lock lock(runtime().mutex);
    aclError code = ACL_SUCCESS;
    task.stream = find_stream(handle, code);
    if (task.stream == nullptr) {
      return 0;
    }
    Stream& stream = *task.stream;
    task.task = {Task::Kind::host, next_step(stream, name), nullptr, nullptr};
    const uint64_t number = task.task.step->number;
    enqueue(stream, task.task);
    wait_until(lock, -1, [&] { return stream.done + 1 == number && !stream.held; });
    stream.queue.pop_front();
    stream.running = true;
  }
  const std::lock_guard<std::mutex> lock(host_tasks().mutex);
  const uint64_t id = host_tasks().next++;
  host_tasks().running.emplace(id, std::move(task));
  return id;
}

void cann_sim_acl_touch(uint64_t id, const void* start, size_t bytes, int write) {
  StreamPtr stream;
  StepPtr step;
  {
    const std::lock_guard<std::mutex> lock(host_tasks().mutex);
    const auto found = host_tasks().running.find(id);
    if (found == host_tasks().running.end()) {
      return;
    }
    stream = found->second.stream;
    step = found->second.task.step;
  }
  const std::shared_ptr<Block> block = find_block(start);
  if (block == nullptr || !block->on_device || bytes == 0) {
    return;
  }
  if (write != 0) {
    cann_sim_place* place = cann_sim_find(start);
    cann_sim_written(place, start, bytes);
    cann_sim_forget(place);
  }
  const auto address = reinterpret_cast<uint64_t>(start);
  const aclError code = check_access(step, *stream, address, address + bytes, write != 0);
  const std::lock_guard<std::mutex> lock(host_tasks().mutex);
  const auto found = host_tasks().running.find(id);
  if (found != host_tasks().running.end() && found->second.code == ACL_SUCCESS) {
    found->second.code = code;
  }
}

int cann_sim_acl_end(uint64_t id) {
  HostTask task;
  {
    const std::lock_guard<std::mutex> lock(host_tasks().mutex);
    const auto found = host_tasks().running.find(id);
    if (found == host_tasks().running.end()) {
      return ACL_ERROR_RT_INVALID_HANDLE;
    }
    task = std::move(found->second);
    host_tasks().running.erase(found);
  }
  const Lock lock(runtime().mutex);
  finish(*task.stream, task.task);
  return task.code;
}

void cann_sim_acl_tensor_allocated(const void* start, size_t bytes) {
  tensor_allocated(start, bytes);
}

void cann_sim_acl_tensor_freed(const void* start) {
  tensor_freed(start);
}
