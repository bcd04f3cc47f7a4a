// Streams: creating, destroying, synchronising, querying, and host functions in stream order.
#include <algorithm>
#include <vector>

#include "calls.h"
#include "runtime.h"

using namespace cann_sim::acl;

namespace cann_sim::acl {

namespace {

StreamPtr make_stream(int32_t device) {
  auto stream = std::make_shared<Stream>();
  stream->device = device;
  stream->id = runtime().next_stream++;
  stream->slot = runtime().next_slot++;
  stream->held = runtime().hold_all;
  return stream;
}

aclError create(aclrtStream* handle, uint32_t priority, uint32_t flags) {
  if (handle == nullptr) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a stream is to be created into a null pointer");
  }
  if (current_context() == nullptr) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "a stream is to be created, but this thread has set no device");
  }
  const Lock lock(runtime().mutex);
  const StreamPtr stream = make_stream(current_context()->device);
  stream->priority = priority;
  stream->flags = flags;
  runtime().streams[stream.get()] = stream;
  *handle = stream.get();
  return ACL_SUCCESS;
}

// Waits for everything enqueued so far on these streams, and orders the host after it.
aclError synchronize(const std::vector<StreamPtr>& streams, int32_t timeout_ms, Lock& lock) {
  std::vector<uint64_t> targets;
  std::vector<Clock> clocks;
  for (const StreamPtr& stream : streams) {
    targets.push_back(stream->enqueued);
    clocks.push_back(stream->clock);
  }
  const auto done = [&] {
    for (size_t i = 0; i < streams.size(); ++i) {
      if (streams[i]->done < targets[i]) {
        return false;
      }
    }
    return true;
  };
  if (!wait_until(lock, timeout_ms, done)) {
    return waited_in_vain(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, text("not done within %d ms", timeout_ms));
  }
  aclError code = ACL_SUCCESS;
  for (size_t i = 0; i < streams.size(); ++i) {
    runtime().host.join(clocks[i]);
    if (code == ACL_SUCCESS) {
      code = take_fault(*streams[i]);
    }
    streams[i]->fault = nullptr;  // the first is returned, all are cleared
  }
  return code;
}

aclError synchronize_stream(aclrtStream handle, int32_t timeout_ms) {
  Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const StreamPtr stream = find_stream(handle, code);
  return stream == nullptr ? code : synchronize({stream}, timeout_ms, lock);
}

// Calls `use` with the stream of the handle, under the lock.
template <typename Use>
aclError with_stream(aclrtStream handle, const Use& use) {
  const Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  if (const StreamPtr stream = find_stream(handle, code)) {
    use(*stream);
  }
  return code;
}

aclError synchronize_current_device(int32_t timeout_ms) {
  if (current_context() == nullptr) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "a device is to be synchronised, but this thread has set none");
  }
  return synchronize_device(current_context()->device, timeout_ms);
}

// Turns queued tasks into no-ops. Running tasks finish; operators on the host stay, since a thread runs or awaits them.
void drop_tasks(Stream& stream) {
  for (Task& task : stream.queue) {
    if (task.kind == Task::Kind::wait) {
      task.recording = nullptr;
    }
    if (task.kind != Task::Kind::host) {
      task.kind = Task::Kind::work;
      task.run = nullptr;
    }
  }
  stream.held = false;
  stream.wake.notify_all();
  runtime().changed.notify_all();
}

aclError destroy(aclrtStream handle, bool force) {
  Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const StreamPtr stream = handle == nullptr ? nullptr : find_stream(handle, code);
  if (stream == nullptr) {
    return handle == nullptr ? fail(ACL_ERROR_RT_PARAM_INVALID, "the default stream cannot be destroyed") : code;
  }
  if (!force && stream->held) {
    return fail(ACL_ERROR_RT_STREAM_NOT_COMPLETE,
                stream->name() + " is held and cannot be destroyed: release it first");
  }
  if (force) {
    drop_tasks(*stream);
  }
  if (!wait_until(lock, -1, [&] { return stream->done == stream->enqueued; })) {
    return waited_in_vain(ACL_ERROR_RT_STREAM_NOT_COMPLETE, stream->name() + " has tasks");
  }
  runtime().streams.erase(handle);
  stream->stop = true;
  stream->wake.notify_all();
  return ACL_SUCCESS;
}

}  // namespace

aclError synchronize_device(int32_t device, int32_t timeout_ms) {
  Lock lock(runtime().mutex);
  std::vector<StreamPtr> streams;
  for (const StreamPtr& stream : all_streams()) {
    if (stream->device == device) {
      streams.push_back(stream);
    }
  }
  return synchronize(streams, timeout_ms, lock);
}

std::vector<StreamPtr> all_streams() {
  std::vector<StreamPtr> all;
  for (const auto& [handle, stream] : runtime().streams) {
    all.push_back(stream);
  }
  for (const auto& [device, stream] : runtime().default_streams) {
    all.push_back(stream);
  }
  std::sort(all.begin(), all.end(), [](const StreamPtr& a, const StreamPtr& b) { return a->id < b->id; });
  return all;
}

StreamPtr find_stream(aclrtStream handle, aclError& code) {
  if (handle == nullptr) {
    if (current_context() == nullptr) {
      code = fail(ACL_ERROR_RT_CONTEXT_NULL, "the default stream is wanted, but this thread has set no device");
      return nullptr;
    }
    StreamPtr& stream = runtime().default_streams[current_context()->device];
    if (stream == nullptr) {
      stream = make_stream(current_context()->device);
    }
    return stream;
  }
  const auto found = runtime().streams.find(handle);
  if (found == runtime().streams.end()) {
    code = fail(ACL_ERROR_RT_INVALID_HANDLE, text("%p is no stream, or one that was destroyed", handle));
    return nullptr;
  }
  return found->second;
}

}  // namespace cann_sim::acl

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
  CANN_SIM_API();
  return create(stream, 0, 0);
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t priority, uint32_t flag) {
  CANN_SIM_API();
  return create(stream, priority, flag);
}

aclError aclrtDestroyStream(aclrtStream stream) {
  CANN_SIM_API();
  return destroy(stream, false);
}

aclError aclrtDestroyStreamForce(aclrtStream stream) {
  CANN_SIM_API();
  return destroy(stream, true);
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  CANN_SIM_API();
  return synchronize_stream(stream, -1);
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
  CANN_SIM_API();
  return synchronize_stream(stream, timeout);
}

aclError aclrtSynchronizeDevice() {
  CANN_SIM_API();
  return synchronize_current_device(-1);
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  CANN_SIM_API();
  return synchronize_current_device(timeout);
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  CANN_SIM_API();
  return with_stream(handle, [&](const Stream& stream) {
    const bool done = stream.done == stream.enqueued;
    if (done) {
      runtime().host.join(stream.clock);
    }
    *status = done ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  });
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  CANN_SIM_API();
  *id = -1;
  return with_stream(handle, [&](const Stream& stream) { *id = stream.id; });
}

aclError aclrtStreamGetPriority(aclrtStream handle, uint32_t* priority) {
  CANN_SIM_API();
  *priority = 0;
  return with_stream(handle, [&](const Stream& stream) { *priority = stream.priority; });
}

aclError aclrtStreamGetFlags(aclrtStream handle, uint32_t* flags) {
  CANN_SIM_API();
  *flags = 0;
  return with_stream(handle, [&](const Stream& stream) { *flags = stream.flags; });
}

// Accepts the mode. Streams continue after a failed task, which is mode 0.
aclError aclrtSetStreamFailureMode(aclrtStream handle, uint64_t /*mode*/) {
  CANN_SIM_API();
  return with_stream(handle, [](const Stream&) {});
}

aclError aclrtSetStreamOverflowSwitch(aclrtStream handle, uint32_t flag) {
  CANN_SIM_API();
  return with_stream(handle, [&](Stream& stream) { stream.overflow = flag; });
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream handle, uint32_t* flag) {
  CANN_SIM_API();
  *flag = 0;
  return with_stream(handle, [&](const Stream& stream) { *flag = stream.overflow; });
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* args) {
  CANN_SIM_API();
  if (function == nullptr) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtLaunchHostFunc of a null pointer");
  }
  return enqueue_work(stream, "a host function", [=](const StepPtr&, Stream&) { function(args); });
}

}  // extern "C"
