// Kernel launches on streams, received from libcann_sim.so's launch hook.
#include <vector>

#include "calls.h"
#include "cann_sim/launch.h"
#include "memory.h"
#include "runtime.h"

namespace cann_sim::acl {

namespace {

using Blocks = std::vector<std::shared_ptr<Block>>;

// The device blocks that contain a launch's pointers.
Blocks blocks_of(cann_sim_task* task) {
  Blocks blocks;
  const cann_sim_range* ranges = nullptr;
  const size_t count = cann_sim_task_buffers(task, &ranges);
  for (size_t i = 0; i < count; ++i) {
    if (auto block = find_block(reinterpret_cast<void*>(ranges[i].start)); block != nullptr && block->on_device) {
      blocks.push_back(std::move(block));
    }
  }
  return blocks;
}

// A kernel may only use memory of its own device.
void check_devices(const StepPtr& step, Stream& stream, const Blocks& blocks) {
  for (const auto& block : blocks) {
    if (block->device != stream.device) {
      report_error(
          stream, ACL_ERROR_RT_VECTOR_CORE_EXCEPTION, "wrong-device",
          text("%s on %s is given device block %llu of %zu bytes, which is on device %d: copy the tensor to the "
               "stream's device first",
               step->name.c_str(), step->stream.c_str(), static_cast<unsigned long long>(block->number), block->bytes,
               block->device));
      return;
    }
  }
}

void run(const StepPtr& step, Stream& stream, cann_sim_task* task, const Blocks& blocks) {
  check_devices(step, stream, blocks);
  for (const auto& block : blocks) {
    if (was_freed(*block)) {
      report_error(
          stream, ACL_ERROR_RT_VECTOR_CORE_EXCEPTION, "use-after-free",
          text("%s on %s is given device block %llu of %zu bytes, which was freed after the launch", step->name.c_str(),
               step->stream.c_str(), static_cast<unsigned long long>(block->number), block->bytes));
    }
  }
  if (cann_sim_task_run(task) != 0) {  // it has printed the error
    report_error(stream, ACL_ERROR_RT_VECTOR_CORE_EXCEPTION, "kernel", cann_sim_task_error(task), false);
  }
  const cann_sim_range* uses = nullptr;
  const size_t count = cann_sim_task_uses(task, &uses);
  for (size_t i = 0; i < count; ++i) {
    for (const auto& block : blocks) {
      if (uses[i].start >= block->start() && uses[i].end <= block->end() && !was_freed(*block)) {
        if (check_access(step, stream, uses[i].start, uses[i].end, uses[i].written != 0) != ACL_SUCCESS) {
          return;  // one message per launch
        }
        break;
      }
    }
  }
}

uint32_t submit(void* handle, cann_sim_task* launch) {
  const std::string name = text("launch:%s", cann_sim_task_kernel(launch));
  if (const aclError code = api(name).enter(name.c_str()); code != ACL_SUCCESS) {
    return static_cast<uint32_t>(code);
  }
  const Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const StreamPtr stream = find_stream(handle, code);
  if (stream == nullptr) {
    return static_cast<uint32_t>(code);
  }
  if (current_context() == nullptr) {
    return static_cast<uint32_t>(fail(ACL_ERROR_RT_CONTEXT_NULL, name + ": this thread has set no device"));
  }
  if (current_context()->device != stream->device) {
    return static_cast<uint32_t>(fail(ACL_ERROR_RT_STREAM_CONTEXT,
                                      text("%s: %s is not of this thread's device %d: set the stream's device first",
                                           name.c_str(), stream->name().c_str(), current_context()->device)));
  }
  const StepPtr step = next_step(*stream, text("kernel %s", cann_sim_task_kernel(launch)));
  const std::shared_ptr<cann_sim_task> task(launch, cann_sim_task_free);
  const Blocks blocks = blocks_of(launch);
  Stream* const target = stream.get();  // its worker keeps it alive
  enqueue(*stream, {Task::Kind::work, step, [=] { run(step, *target, task.get(), blocks); }, nullptr});
  return ACL_SUCCESS;
}

[[maybe_unused]] const bool installed = (cann_sim_set_executor(submit), true);

}  // namespace

}  // namespace cann_sim::acl
