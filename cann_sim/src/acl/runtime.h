// Streams, events, devices and errors: what the files of this folder share.
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
const Context* current_context();  // of this thread; null when it has none
int32_t core_count(bool vector);

// ---- streams and events ----

// One recording of an event: done when its stream has come to it.
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
  std::shared_ptr<Recording> recording;  // what a wait waits for, or what completes when the task has run
};

// An error that a synchronisation has yet to tell; a race is shared by both streams, and told once.
struct Fault {
  aclError code;
  std::string message;
  bool told = false;
};

// All under runtime().mutex.
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
  // At exit first no more tasks are begun, then no more are waited for.
  bool ending = false, ended = false;
};

Runtime& runtime();
using Lock = std::unique_lock<std::mutex>;

// The stream of a handle; null is the default stream of the current device. Null when there is none, with the error
// text set and `code` to return. Under the lock.
StreamPtr find_stream(aclrtStream handle, aclError& code);
// Those that were created and the default ones, in the order of their numbers. Under the lock.
std::vector<StreamPtr> all_streams();
// The next step of a stream. Under the lock.
StepPtr next_step(Stream& stream, const std::string& name);
// Puts a task in a stream's queue. Under the lock.
void enqueue(Stream& stream, Task task);
// The whole of it: looks the stream up, makes the step, enqueues work. `run` gets the step when it runs.
aclError enqueue_work(aclrtStream handle, const std::string& name, std::function<void(const StepPtr&, Stream&)> run,
                      bool wait_for_it = false);
// A task is over; under the lock.
void finish(Stream& stream, const Task& task);
// Waits for `done`; false when the time is up (negative: no limit) or the process has ended its streams.
bool wait_until(Lock& lock, int32_t timeout_ms, const std::function<bool()>& done);
// The error of a wait that came to nothing: its own, or that the process has ended its streams. Under the lock.
aclError waited_in_vain(aclError code, const std::string& message);
// Waits for all that was enqueued on a device.
aclError synchronize_device(int32_t device, int32_t timeout_ms);
// The error that a stream's tasks left, once. Under the lock.
aclError take_fault(Stream& stream);

// ---- errors that no return value could tell ----

struct Error {
  std::string kind, message;
  uint64_t count = 0;
};

// Keeps an error for the status and says it on standard error, the first time; the stream's next synchronisation
// returns the code. Of very many different errors only the first are kept word by word.
void report_error(const std::string& kind, const std::string& message, bool print = true);
void report_error(Stream& stream, aclError code, const std::string& kind, const std::string& message,
                  bool print = true);
std::vector<Error> errors();
void clear_errors();

// Notes an access of a task and reports a race. Non-zero: there is one.
aclError check_access(const StepPtr& step, Stream& stream, uint64_t start, uint64_t end, bool writes);

// ---- fork ----

// A mutex that a child process must not find locked by a thread that it does not have. A lower rank is locked before a
// higher one where both are held.
void keep_over_fork(int rank, std::mutex& mutex);

// The process's one State, which has such a mutex. It outlives static destructors.
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
