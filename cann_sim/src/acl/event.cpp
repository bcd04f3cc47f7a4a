// Events. A recording is a point in a stream that other streams or the host can wait for.
#include "calls.h"
#include "runtime.h"

using namespace cann_sim::acl;

namespace cann_sim::acl {

namespace {

aclError create(aclrtEvent* handle) {
  if (handle == nullptr) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "an event is to be created into a null pointer");
  }
  if (current_context() == nullptr) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "an event is to be created, but this thread has set no device");
  }
  const auto event = std::make_shared<Event>();
  const Lock lock(runtime().mutex);
  runtime().events[event.get()] = event;
  *handle = event.get();
  return ACL_SUCCESS;
}

std::shared_ptr<Event> find_event(aclrtEvent handle, aclError& code) {
  const auto found = runtime().events.find(handle);
  if (found == runtime().events.end()) {
    code = fail(ACL_ERROR_RT_INVALID_HANDLE, text("%p is no event, or one that was destroyed", handle));
    return nullptr;
  }
  return found->second;
}

// Returns at once for an event that was never recorded.
aclError synchronize(aclrtEvent handle, int32_t timeout_ms) {
  Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const std::shared_ptr<Event> event = find_event(handle, code);
  if (event == nullptr || event->recording == nullptr) {
    return code;
  }
  const std::shared_ptr<Recording> recording = event->recording;
  if (!wait_until(lock, timeout_ms, [&] { return recording->done; })) {
    return waited_in_vain(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, text("the event was not recorded within %d ms", timeout_ms));
  }
  runtime().host.join(recording->clock);
  const StreamPtr stream = recording->stream.lock();
  return stream == nullptr ? ACL_SUCCESS : take_fault(*stream);
}

// Whether the last recording is done; if so, the host is ordered after it.
aclError query(aclrtEvent handle, bool& done) {
  const Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const std::shared_ptr<Event> event = find_event(handle, code);
  if (event == nullptr) {
    return code;
  }
  done = event->recording != nullptr && event->recording->done;
  if (done) {
    runtime().host.join(event->recording->clock);
  }
  return ACL_SUCCESS;
}

aclError time_of(aclrtEvent handle, uint64_t& time_ns) {
  aclError code = ACL_SUCCESS;
  const std::shared_ptr<Event> event = find_event(handle, code);
  if (event == nullptr) {
    return code;
  }
  if (event->recording == nullptr) {
    return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "the time of an event that was never recorded");
  }
  if (!event->recording->done) {
    return fail(ACL_ERROR_RT_EVENT_NOT_COMPLETE, "the time of an event whose stream has not come to it: synchronise");
  }
  time_ns = event->recording->time_ns;
  return ACL_SUCCESS;
}

}  // namespace

}  // namespace cann_sim::acl

extern "C" {

aclError aclrtCreateEvent(aclrtEvent* event) {
  CANN_SIM_API();
  return create(event);
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t /*flag*/) {
  CANN_SIM_API();
  return create(event);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t /*flag*/) {
  CANN_SIM_API();
  return create(event);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  CANN_SIM_API();
  const Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  if (find_event(event, code) != nullptr) {
    runtime().events.erase(event);
  }
  return code;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  CANN_SIM_API();
  const Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const std::shared_ptr<Event> event = find_event(handle, code);
  const StreamPtr stream = event == nullptr ? nullptr : find_stream(stream_handle, code);
  if (stream == nullptr) {
    return code;
  }
  const StepPtr step = next_step(*stream, "an event's recording");
  event->recording = std::make_shared<Recording>();
  event->recording->clock = step->clock;
  event->recording->stream = stream;
  enqueue(*stream, {Task::Kind::work, step, nullptr, event->recording});
  return ACL_SUCCESS;
}

// Drops the recording: the event is then as newly created.
aclError aclrtResetEvent(aclrtEvent handle, aclrtStream /*stream*/) {
  CANN_SIM_API();
  const Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  if (const std::shared_ptr<Event> event = find_event(handle, code)) {
    event->recording = nullptr;
  }
  return code;
}

aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  CANN_SIM_API();
  const Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const std::shared_ptr<Event> event = find_event(handle, code);
  const StreamPtr stream = event == nullptr ? nullptr : find_stream(stream_handle, code);
  if (stream == nullptr || event->recording == nullptr) {
    return code;
  }
  stream->clock.join(event->recording->clock);
  const StepPtr step = next_step(*stream, "a wait for an event");
  enqueue(*stream, {Task::Kind::wait, step, nullptr, event->recording});
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  CANN_SIM_API();
  return synchronize(event, -1);
}

aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout) {
  CANN_SIM_API();
  return synchronize(event, timeout);
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  CANN_SIM_API();
  bool done = false;
  const aclError code = query(event, done);
  *status = done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return code;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus* status) {
  CANN_SIM_API();
  bool done = false;
  const aclError code = query(event, done);
  *status = done ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return code;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  CANN_SIM_API();
  const Lock lock(runtime().mutex);
  uint64_t from = 0, to = 0;
  aclError code = time_of(start, from);
  code = code == ACL_SUCCESS ? time_of(end, to) : code;
  if (code == ACL_SUCCESS) {
    *milliseconds = static_cast<float>((static_cast<double>(to) - static_cast<double>(from)) / 1e6);
  }
  return code;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
  CANN_SIM_API();
  const Lock lock(runtime().mutex);
  uint64_t time_ns = 0;
  const aclError code = time_of(event, time_ns);
  *microseconds = time_ns / 1000;
  return code;
}

}  // extern "C"
