// Operators on the host: tasks of a stream that a host thread runs instead of a kernel. They run in stream order, and
// their accesses follow the same rules.
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
  std::atomic<aclError> code{ACL_SUCCESS};  // of the first broken rule
};
using HostTaskPtr = std::shared_ptr<HostTask>;

struct HostTasks {
  std::mutex mutex;
  std::unordered_map<uint64_t, HostTaskPtr> running;
  uint64_t next = 1;
};

HostTasks& host_tasks() {
  return lasting<HostTasks>(4);
}

// Null if there is none.
HostTaskPtr find_task(uint64_t id, bool remove = false) {
  const std::lock_guard<std::mutex> lock(host_tasks().mutex);
  const auto found = host_tasks().running.find(id);
  if (found == host_tasks().running.end()) {
    return nullptr;
  }
  HostTaskPtr task = found->second;
  if (remove) {
    host_tasks().running.erase(found);
  }
  return task;
}

}  // namespace

}  // namespace cann_sim::acl

uint64_t cann_sim_acl_begin(void* handle, const char* name) {
  const auto task = std::make_shared<HostTask>();
  {
    Lock lock(runtime().mutex);
    aclError code = ACL_SUCCESS;
    task->stream = find_stream(handle, code);
    if (task->stream == nullptr) {
      return 0;
    }
    Stream& stream = *task->stream;
    task->task = {Task::Kind::host, next_step(stream, name), nullptr, nullptr};
    const uint64_t number = task->task.step->number;
    enqueue(stream, task->task);
    if (!wait_until(lock, -1, [&] { return stream.done + 1 == number && !stream.held; })) {
      waited_in_vain(ACL_ERROR_RT_STREAM_NOT_COMPLETE, task->task.step->name + " has not had its turn");
      return 0;
    }
    stream.queue.pop_front();
    stream.running = true;
  }
  const std::lock_guard<std::mutex> lock(host_tasks().mutex);
  const uint64_t id = host_tasks().next++;
  host_tasks().running.emplace(id, task);
  return id;
}

void cann_sim_acl_touch(uint64_t id, const void* start, size_t bytes, int write) {
  const HostTaskPtr task = find_task(id);
  const std::shared_ptr<Block> block = task == nullptr ? nullptr : find_block(start);
  if (block == nullptr || !block->on_device || bytes == 0) {
    return;
  }
  if (write != 0) {
    cann_sim_written_now(start, bytes);
  }
  const auto address = reinterpret_cast<uint64_t>(start);
  const aclError code = check_access(task->task.step, *task->stream, address, address + bytes, write != 0);
  aclError none = ACL_SUCCESS;
  task->code.compare_exchange_strong(none, code);
}

int cann_sim_acl_end(uint64_t id) {
  const HostTaskPtr task = find_task(id, true);
  if (task == nullptr) {
    return ACL_ERROR_RT_INVALID_HANDLE;
  }
  const Lock lock(runtime().mutex);
  finish(*task->stream, task->task);
  return task->code;
}

void cann_sim_acl_tensor_allocated(const void* start, size_t bytes) {
  tensor_allocated(start, bytes);
}

void cann_sim_acl_tensor_freed(const void* start) {
  tensor_freed(start);
}
