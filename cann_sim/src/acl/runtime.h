// Streams, events, devices and errors, shared by the files of this folder.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "acl/acl.h"
#include "order.h"

namespace cann_sim::acl {

// ---- devices and contexts ----

struct Context {
  int32_t device = 0;
};

int32_t device_count();
const Context* current_context();  // of this thread; null if it has none
int32_t core_count(bool vector);

// ---- streams and events ----

// One recording of an event: done when its stream reaches it.
struct Recording {
  bool done = false;
  uint64_t time_ns = 0;
  Clock clock;
  std::weak_ptr<struct Stream> stream;
  std::vector<std::weak_ptr<struct Stream>> waiting;  // streams whose next task waits for it
};

struct Task {
  enum class Kind { work, wait, host } kind = Kind::work;
  StepPtr step;
  std::function<void()> run;             // work
  std::shared_ptr<Recording> recording;  // waited for by a wait, or else completed by the task
};

// An error for the next synchronisation to return. Both streams of a race share one; it is returned once.
struct Fault {
  aclError code;
  std::string message;
  bool told = false;
};

// All members are protected by runtime().mutex.
struct Stream : std::enable_shared_from_this<Stream> {
  int32_t device = 0, id = 0;
  uint32_t slot = 0, overflow = 0, priority = 0, flags = 0;
  bool held = false, running = false, stop = false, started = false;
  std::deque<Task> queue;
  uint64_t enqueued = 0, done = 0;
  Clock clock;
  std::shared_ptr<Fault> fault;
  std::condition_variable wake;

  bool ready() const;
  std::string name() const;
};
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  std::shared_ptr<Recording> recording;  // the last one
};

struct Runtime {
  std::mutex mutex;
  std::condition_variable changed;  // a task has finished, or a stream may go on
  std::map<const void*, StreamPtr> streams;
  std::map<const void*, std::shared_ptr<Event>> events;
  std::map<int32_t, StreamPtr> default_streams;
  Clock host;
  uint64_t host_steps = 0;
  uint32_t next_slot = kHostSlot + 1;
  int32_t next_stream = 0;
  bool hold_all = false;
  // At exit: first no more tasks are started (ending), then none are waited for (ended).
  bool ending = false, ended = false;
};

Runtime& runtime();
using Lock = std::unique_lock<std::mutex>;

// The stream of a handle; a null handle is the current device's default stream. Returns null if there is none, with
// `code` and the error text set. Under the lock.
StreamPtr find_stream(aclrtStream handle, aclError& code);
// Created and default streams, sorted by number. Under the lock.
std::vector<StreamPtr> all_streams();
// Creates the next step of a stream. Under the lock.
StepPtr next_step(Stream& stream, const std::string& name);
// Puts a task in a stream's queue. Under the lock.
void enqueue(Stream& stream, Task task);
// Finds the stream, creates the step and enqueues work, which calls `run` with the step.
aclError enqueue_work(aclrtStream handle, const std::string& name, std::function<void(const StepPtr&, Stream&)> run,
                      bool wait_for_it = false);
// Marks a task as finished. Under the lock.
void finish(Stream& stream, const Task& task);
// Waits for `done`; false after the timeout (negative: none) or if the process has ended its streams.
bool wait_until(Lock& lock, int32_t timeout_ms, const std::function<bool()>& done);
// The error of a failed wait: the given one, or that the process has ended its streams. Under the lock.
aclError waited_in_vain(aclError code, const std::string& message);
// Waits for all tasks enqueued on a device.
aclError synchronize_device(int32_t device, int32_t timeout_ms);
// Returns the error of a stream's tasks, once. Under the lock.
aclError take_fault(Stream& stream);

// ---- asynchronous errors ----

struct Error {
  std::string kind, message;
  uint64_t count = 0;
};

// Records an error for the status and, the first time, prints it to standard error; the stream's next synchronisation
// returns the code. Only the first kErrorsKept different errors keep their messages.
void report_error(const std::string& kind, const std::string& message, bool print = true);
void report_error(Stream& stream, aclError code, const std::string& kind, const std::string& message,
                  bool print = true);
std::vector<Error> errors();
void clear_errors();

// Records an access of a task and reports a race. Non-zero if there is one.
aclError check_access(const StepPtr& step, Stream& stream, uint64_t start, uint64_t end, bool writes);

// ---- fork ----

// Registers a mutex that must be unlocked in a forked child. Mutexes are locked in ascending order of rank.
void keep_over_fork(int rank, std::mutex& mutex);

// The process's only State, whose mutex is kept over fork. It outlives static destructors.
template <typename State>
State& lasting(int rank) {
  static State* const state = [rank] {
    auto* made = new State;
    keep_over_fork(rank, made->mutex);
    return made;
  }();
  return *state;
}

}  // namespace cann_sim::acl
