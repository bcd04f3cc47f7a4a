// The worker threads, one per stream, which run its tasks in order; and the errors of tasks (runtime.h).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include <pthread.h>
#include <unistd.h>

#include "calls.h"
#include "runtime.h"

namespace cann_sim::acl {

namespace {

uint64_t now_ns() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

void work(const StreamPtr& stream) {
  Lock lock(runtime().mutex);
  for (;;) {
    stream->wake.wait(lock, [&] { return stream->stop || stream->ready(); });
    if (stream->stop) {
      return;
    }
    const Task task = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->running = true;
    if (task.run) {
      lock.unlock();
      task.run();
      lock.lock();
    }
    finish(*stream, task);
  }
}

const pid_t owner = getpid();

// At exit streams stop. Waits up to 5 s for running tasks, since they use memory that exit destroys.
void end_workers() {
  if (getpid() != owner) {  // a child
    return;
  }
  Lock lock(runtime().mutex);
  runtime().ending = true;
  const auto idle = [] {
    const std::vector<StreamPtr> streams = all_streams();
    return std::none_of(streams.begin(), streams.end(), [](const StreamPtr& stream) { return stream->running; });
  };
  wait_until(lock, 5000, idle);
  runtime().ended = true;
  runtime().changed.notify_all();
}

// A forked child has no workers: if its parent had any, tasks of the child never run.
void end_in_child() {
  const std::vector<StreamPtr> streams = all_streams();
  if (std::any_of(streams.begin(), streams.end(), [](const StreamPtr& stream) { return stream->started; })) {
    runtime().ending = runtime().ended = true;
  }
}

// The first error is kept until it is returned.
void set_fault(Stream& stream, const std::shared_ptr<Fault>& fault) {
  if (stream.fault == nullptr || stream.fault->told) {
    stream.fault = fault;
  }
}

constexpr size_t kErrorsKept = 1000;

struct Errors {
  std::mutex mutex;
  std::vector<Error> list;
  std::map<std::pair<std::string, std::string>, size_t> index;  // by kind and message
};

Errors& all_errors() {
  return lasting<Errors>(3);
}

// Counts an error; true if it is a new one. Under the lock.
bool count_error(const std::string& kind, const std::string& message) {
  Errors& all = all_errors();
  const auto [found, is_new] = all.index.emplace(std::make_pair(kind, message), all.list.size());
  if (is_new) {
    all.list.push_back({kind, message, 0});
  }
  ++all.list[found->second].count;
  return is_new;
}

}  // namespace

Runtime& runtime() {
  static auto* all = [] {  // outlives static destructors
    std::atexit(end_workers);
    auto* runtime = new Runtime;
    keep_over_fork(0, runtime->mutex);
    pthread_atfork(nullptr, nullptr, end_in_child);
    return runtime;
  }();
  return *all;
}

bool Stream::ready() const {
  if (held || running || runtime().ending || queue.empty()) {
    return false;
  }
  const Task& task = queue.front();
  return task.kind == Task::Kind::work || (task.kind == Task::Kind::wait && task.recording->done);
}

std::string Stream::name() const {
  return text("stream %d of device %d", id, device);
}

StepPtr next_step(Stream& stream, const std::string& name) {
  auto step = std::make_shared<Step>();
  stream.clock.join(runtime().host);
  stream.clock.set(stream.slot, ++stream.enqueued);
  step->slot = stream.slot;
  step->number = stream.enqueued;
  step->name = name;
  step->stream = stream.name();
  step->clock = stream.clock;
  return step;
}

void enqueue(Stream& stream, Task task) {
  if (!stream.started) {
    stream.started = true;
    std::thread(work, stream.shared_from_this()).detach();
  }
  if (task.kind == Task::Kind::wait && !task.recording->done) {
    task.recording->waiting.push_back(stream.weak_from_this());
  }
  stream.queue.push_back(std::move(task));
  stream.wake.notify_all();
}

aclError enqueue_work(aclrtStream handle, const std::string& name, std::function<void(const StepPtr&, Stream&)> run,
                      bool wait_for_it) {
  Lock lock(runtime().mutex);
  aclError code = ACL_SUCCESS;
  const StreamPtr stream = find_stream(handle, code);
  if (stream == nullptr) {
    return code;
  }
  const StepPtr step = next_step(*stream, name);
  Stream* const target = stream.get();  // its worker keeps it alive
  enqueue(*stream, {Task::Kind::work, step, [run = std::move(run), step, target] { run(step, *target); }, nullptr});
  if (wait_for_it && !wait_until(lock, -1, [&] { return stream->done >= step->number; })) {
    return waited_in_vain(ACL_ERROR_RT_STREAM_NOT_COMPLETE, name + " has not run");
  }
  return ACL_SUCCESS;
}

void finish(Stream& stream, const Task& task) {
  stream.running = false;
  ++stream.done;
  if (task.kind != Task::Kind::wait && task.recording != nullptr) {
    task.recording->done = true;
    task.recording->time_ns = now_ns();
    for (const auto& waiting : task.recording->waiting) {
      if (const StreamPtr other = waiting.lock()) {
        other->wake.notify_all();
      }
    }
  }
  stream.wake.notify_all();
  runtime().changed.notify_all();
}

bool wait_until(Lock& lock, int32_t timeout_ms, const std::function<bool()>& done) {
  const auto over = [&] { return done() || runtime().ended; };
  if (timeout_ms < 0) {
    runtime().changed.wait(lock, over);
  } else {
    runtime().changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), over);
  }
  return done();
}

aclError waited_in_vain(aclError code, const std::string& message) {
  return runtime().ended ? fail(ACL_ERROR_RT_STREAM_NOT_COMPLETE,
                                "the process is at its end, or was forked: its streams do not run what is queued; "
                                "synchronise before")
                         : fail(code, message);
}

aclError take_fault(Stream& stream) {
  const std::shared_ptr<Fault> fault = std::move(stream.fault);
  stream.fault = nullptr;
  if (fault == nullptr || fault->told) {
    return ACL_SUCCESS;
  }
  fault->told = true;
  return fail(fault->code, fault->message);
}

void report_error(const std::string& kind, const std::string& message, bool print) {
  const std::lock_guard<std::mutex> lock(all_errors().mutex);
  const bool known = all_errors().index.count({kind, message}) != 0;
  const bool full = !known && all_errors().list.size() >= kErrorsKept;
  const std::string& words =
      full ? text("further errors, of which only the number is kept: there are %zu others", kErrorsKept) : message;
  if (count_error(kind, words) && (print || full) && std::getenv("CANN_SIM_QUIET") == nullptr) {
    std::fprintf(stderr, "cann_sim: %s: %s\n", kind.c_str(), words.c_str());
  }
}

void report_error(Stream& stream, aclError code, const std::string& kind, const std::string& message, bool print) {
  report_error(kind, message, print);
  const Lock lock(runtime().mutex);
  set_fault(stream, std::make_shared<Fault>(Fault{code, kind + ": " + message}));
}

std::vector<Error> errors() {
  const std::lock_guard<std::mutex> lock(all_errors().mutex);
  return all_errors().list;
}

void clear_errors() {
  {
    const std::lock_guard<std::mutex> lock(all_errors().mutex);
    all_errors().list.clear();
    all_errors().index.clear();
  }
  const Lock lock(runtime().mutex);
  for (const StreamPtr& stream : all_streams()) {
    stream->fault = nullptr;
  }
}

aclError check_access(const StepPtr& step, Stream& stream, uint64_t start, uint64_t end, bool writes) {
  const Race race = access(step, start, end, writes);
  if (!race) {
    return ACL_SUCCESS;
  }
  report_error("stream-race", race.message);
  const Lock lock(runtime().mutex);
  const auto fault = std::make_shared<Fault>(Fault{ACL_ERROR_RT_INTERNAL_ERROR, "stream-race: " + race.message});
  set_fault(stream, fault);
  for (const StreamPtr& other : all_streams()) {
    if (other->slot == race.other_slot) {
      set_fault(*other, fault);
    }
  }
  return ACL_ERROR_RT_INTERNAL_ERROR;
}

}  // namespace cann_sim::acl
