// Happens-before between the tasks of all streams and the host, and the last accesses of each byte of device memory.
//
// Every task is a step of its stream. Its clock tells which steps happen before it: earlier steps of its own stream,
// steps before the events it waits for, and steps that the host had waited for when it enqueued the task. Clocks are
// computed when a task is enqueued; accesses are compared when it runs, independent of the order in which streams run.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cann_sim::acl {

// The number of steps known to have completed, per stream, by slot.
class Clock {
 public:
  uint64_t operator[](uint32_t slot) const { return slot < seen_.size() ? seen_[slot] : 0; }
  void set(uint32_t slot, uint64_t number);
  void join(const Clock& other);

 private:
  std::vector<uint64_t> seen_;
};

constexpr uint32_t kHostSlot = 0;  // copies by the host, without a stream

struct Step {
  uint32_t slot = kHostSlot;
  uint64_t number = 0;
  std::string name, stream;  // for messages
  Clock clock;               // itself included

  bool comes_after(const Step& other) const { return clock[other.slot] >= other.number; }
};
using StepPtr = std::shared_ptr<const Step>;

// Two unordered accesses: the message, and the stream of the earlier one.
struct Race {
  std::string message;
  uint32_t other_slot = kHostSlot;
  explicit operator bool() const { return !message.empty(); }
};

// Records an access to device memory, and checks it against the earlier ones.
Race access(const StepPtr& step, uint64_t start, uint64_t end, bool writes);
// Forgets all accesses to memory that is freed.
void forget_accesses(uint64_t start, uint64_t end);

}  // namespace cann_sim::acl
