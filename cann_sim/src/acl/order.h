// Happens-before between the tasks of all streams and the host, and who last touched each byte of device memory.
//
// Every task is a step of its stream. Its clock says which steps of which streams come before it: those before it in
// its own stream, those before the events it waited for, and those the host had waited for when it enqueued the task.
// Clocks are known when a task is enqueued; accesses are compared when it runs, in whatever order the streams run.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cann_sim::acl {

// Of each stream, by its slot, how many steps are known to have completed.
class Clock {
 public:
  uint64_t operator[](uint32_t slot) const { return slot < seen_.size() ? seen_[slot] : 0; }
  void set(uint32_t slot, uint64_t number);
  void join(const Clock& other);

 private:
  std::vector<uint64_t> seen_;
};

constexpr uint32_t kHostSlot = 0;  // copies that the host itself makes, without a stream

struct Step {
  uint32_t slot = kHostSlot;
  uint64_t number = 0;
  std::string name, stream;  // as messages say them
  Clock clock;               // itself included

  bool comes_after(const Step& other) const { return clock[other.slot] >= other.number; }
};
using StepPtr = std::shared_ptr<const Step>;

// Two accesses that nothing orders: what to say, and whose the earlier one was.
struct Race {
  std::string message;
  uint32_t other_slot = kHostSlot;
  explicit operator bool() const { return !message.empty(); }
};

// Notes an access to device memory, and compares it with the earlier ones.
Race access(const StepPtr& step, uint64_t start, uint64_t end, bool writes);
// The memory is given back: nobody has touched what comes there next.
void forget_accesses(uint64_t start, uint64_t end);

}  // namespace cann_sim::acl
