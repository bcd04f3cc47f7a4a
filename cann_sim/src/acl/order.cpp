// Clocks, and the record of accesses (order.h).
#include "order.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "calls.h"
#include "memory.h"
#include "runtime.h"

namespace cann_sim::acl {

namespace {

// The last write of a range, and the later reads, except those that another read is ordered after.
struct Record {
  StepPtr write;
  std::vector<StepPtr> reads;
};

struct Range {
  uint64_t end;
  Record record;
};

struct History {
  std::mutex mutex;
  std::map<uint64_t, Range> ranges;  // disjoint, by start
};

History& history() {
  return lasting<History>(1);
}

void split(std::map<uint64_t, Range>& ranges, uint64_t at) {
  auto range = ranges.upper_bound(at);
  if (range == ranges.begin()) {
    return;
  }
  --range;
  if (range->first < at && range->second.end > at) {
    ranges.emplace(at, Range{range->second.end, range->second.record});
    range->second.end = at;
  }
}

bool same(const Record& a, const Record& b) {
  return a.write == b.write && a.reads == b.reads;
}

void merge(std::map<uint64_t, Range>& ranges, uint64_t start, uint64_t end) {
  auto range = ranges.lower_bound(start);
  if (range != ranges.begin()) {
    --range;
  }
  while (range != ranges.end() && range->first <= end) {
    const auto next = std::next(range);
    if (next != ranges.end() && next->first == range->second.end && same(range->second.record, next->second.record)) {
      range->second.end = next->second.end;
      ranges.erase(next);
    } else {
      range = next;
    }
  }
}

const Step* unordered(const Record& record, const Step& step, bool writes) {
  if (record.write != nullptr && !step.comes_after(*record.write)) {
    return record.write.get();
  }
  if (writes) {
    for (const StepPtr& read : record.reads) {
      if (!step.comes_after(*read)) {
        return read.get();
      }
    }
  }
  return nullptr;
}

std::string side(const Step& step, const char* verb) {
  return text("%s on %s %s", step.name.c_str(), step.stream.c_str(), verb);
}

std::string conflict(const Step& step, bool writes, const Step& other, bool other_writes, uint64_t start,
                     uint64_t end) {
  const char* remedy =
      step.slot == kHostSlot || other.slot == kHostSlot
          ? "synchronise the stream, or an event recorded on it, before the host touches the memory"
          : "record an event after the first and let the other stream wait for it (wait_stream, wait_event); if the "
            "memory was freed in between, call record_stream so that it is not reused earlier";
  return text("%s %s that %s, and nothing orders one after the other: %s",
              side(step, writes ? "writes" : "reads").c_str(), describe_memory(start, end).c_str(),
              side(other, other_writes ? "writes" : "reads").c_str(), remedy);
}

void note(Record& record, const StepPtr& step, bool writes) {
  if (writes) {
    record.write = step;
    record.reads.clear();
    return;
  }
  const auto covered = [&](const StepPtr& read) { return step->comes_after(*read); };
  record.reads.erase(std::remove_if(record.reads.begin(), record.reads.end(), covered), record.reads.end());
  record.reads.push_back(step);
}

}  // namespace

void Clock::set(uint32_t slot, uint64_t number) {
  if (slot >= seen_.size()) {
    seen_.resize(slot + 1);
  }
  seen_[slot] = std::max(seen_[slot], number);
}

void Clock::join(const Clock& other) {
  seen_.resize(std::max(seen_.size(), other.seen_.size()));
  for (size_t slot = 0; slot < other.seen_.size(); ++slot) {
    seen_[slot] = std::max(seen_[slot], other.seen_[slot]);
  }
}

Race access(const StepPtr& step, uint64_t start, uint64_t end, bool writes) {
  Race race;
  if (start >= end) {
    return race;
  }
  const std::lock_guard<std::mutex> lock(history().mutex);
  std::map<uint64_t, Range>& ranges = history().ranges;
  split(ranges, start);
  split(ranges, end);
  auto range = ranges.lower_bound(start);
  for (uint64_t at = start; at < end;) {
    if (range == ranges.end() || range->first > at) {
      const uint64_t until = range == ranges.end() ? end : std::min(end, range->first);
      range = ranges.emplace_hint(range, at, Range{until, {}});
    }
    Record& record = range->second.record;
    if (!race) {
      if (const Step* other = unordered(record, *step, writes)) {
        race = {conflict(*step, writes, *other, other == record.write.get(), at, range->second.end), other->slot};
      }
    }
    note(record, step, writes);
    at = range->second.end;
    ++range;
  }
  merge(ranges, start, end);
  return race;
}

void forget_accesses(uint64_t start, uint64_t end) {
  const std::lock_guard<std::mutex> lock(history().mutex);
  std::map<uint64_t, Range>& ranges = history().ranges;
  split(ranges, start);
  split(ranges, end);
  ranges.erase(ranges.lower_bound(start), ranges.lower_bound(end));
}

}  // namespace cann_sim::acl
