// Happens-before tracking: a clock per pipe, and the last write and reads of each byte range.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cann_sim/core.h"

namespace cann_sim {

// How many instructions of each pipe are known to have completed.
struct Clock {
  std::array<uint32_t, kPipes> seen{};
  void join(const Clock& other) {
    for (int pipe = 0; pipe < kPipes; ++pipe) {
      seen[pipe] = std::max(seen[pipe], other.seen[pipe]);
    }
  }
};

// Operation and source line, interned to keep access records small.
struct PlaceEntry {
  const char* op;
  Place where;
  bool ignored = false;     // its ordering effect was removed for this launch
  uint32_t executions = 0;  // as a synchronisation
};

class PlaceTable {
 public:
  PlaceTable();
  void reset();
  uint16_t intern(const char* op, Place where);
  const PlaceEntry& operator[](uint16_t id) const { return entries_[id]; }
  PlaceEntry& operator[](uint16_t id) { return entries_[id]; }
  const std::vector<PlaceEntry>& entries() const { return entries_; }

  // A synchronisation whose ordering is ignored.
  struct Removed {
    std::string kind, file;
    int line = 0;
  };
  std::vector<Removed> removed;

 private:
  static constexpr uint32_t kSlots = 1024;
  std::vector<PlaceEntry> entries_;
  std::array<uint16_t, kSlots> slots_;
};

enum class ByteState : uint8_t { unwritten, written, freed };

// The last write and, for each pipe, the last read of a byte range. Sequence numbers start at 1; 0 is "none".
struct Record {
  uint32_t write_seq = 0;
  uint16_t write_place = 0;
  Pipe write_pipe = Pipe::S;
  ByteState state = ByteState::unwritten;
  std::array<uint32_t, kPipes> read_seq{};
  std::array<uint16_t, kPipes> read_place{};

  bool operator==(const Record& other) const { return std::memcmp(this, &other, sizeof(Record)) == 0; }
};
static_assert(sizeof(Record) == 32);

// The instruction being checked.
struct Instruction {
  Pipe pipe;
  uint32_t seq;
  uint16_t place;
};

// An earlier access that is not ordered before the instruction.
struct Conflict {
  bool found = false;
  bool earlier_writes = false;
  Pipe pipe = Pipe::S;
  uint16_t place = 0;
};

Conflict conflict_of_read(const Record& record, const Clock& clock);
Conflict conflict_of_write(const Record& record, const Clock& clock, const Instruction& self);

// The unified buffer as disjoint ranges with one record each. A bitmap of range starts with two summary levels makes
// finding, splitting and merging ranges cheap.
class UbMap {
 public:
  UbMap();
  void reset();

  // Calls visit(start, end, record) for each range inside [start, end), after splitting ranges at its ends; then merges
  // neighbours with equal records.
  template <typename Visit>
  void update(uint32_t start, uint32_t end, Visit visit);

  // Sets one record for all of [start, end).
  void assign(uint32_t start, uint32_t end, const Record& record);

 private:
  static constexpr uint32_t kWords = kUbBytes / 64;
  static constexpr uint32_t kSummaries = kWords / 64;

  bool starts(uint32_t offset) const { return words_[offset / 64] >> (offset % 64) & 1; }
  void set(uint32_t offset) {
    words_[offset / 64] |= uint64_t{1} << offset % 64;
    summary_[offset / 4096] |= uint64_t{1} << offset / 64 % 64;
  }
  void clear(uint32_t offset) {
    if ((words_[offset / 64] &= ~(uint64_t{1} << offset % 64)) == 0) {
      summary_[offset / 4096] &= ~(uint64_t{1} << offset / 64 % 64);
    }
  }
  uint32_t at_or_before(uint32_t offset) const;
  uint32_t after(uint32_t offset) const;
  void split(uint32_t offset);
  void merge(uint32_t offset);

  std::array<uint64_t, kWords> words_;
  std::array<uint64_t, kSummaries> summary_;
  std::unique_ptr<Record[], void (*)(void*)> records_;  // indexed by a range's start; only touched pages use memory
};

template <typename Visit>
void UbMap::update(uint32_t start, uint32_t end, Visit visit) {
  split(start);
  split(end);
  for (uint32_t at = start; at < end;) {
    const uint32_t next = std::min(after(at), end);
    visit(at, next, records_[at]);
    if (at != start) {
      merge(at);
    }
    at = next;
  }
  merge(start);
  merge(end);
}

// The device memory accessed by one core, as disjoint ranges.
class GmMap {
 public:
  struct Range {
    uint64_t end;
    Record record;
  };

  void reset() { ranges_.clear(); }

  // Calls visit(start, end, record) for each range inside [start, end); untouched memory gets a new record.
  template <typename Visit>
  void update(uint64_t start, uint64_t end, Visit visit);
  void assign(uint64_t start, uint64_t end, const Record& record);

  const std::map<uint64_t, Range>& ranges() const { return ranges_; }

 private:
  std::map<uint64_t, Range>::iterator first_touching(uint64_t start);

  std::map<uint64_t, Range> ranges_;
};

template <typename Visit>
void GmMap::update(uint64_t start, uint64_t end, Visit visit) {
  auto range = first_touching(start);
  for (uint64_t at = start; at < end;) {
    if (range == ranges_.end() || range->first > at) {  // a gap
      const uint64_t next = range == ranges_.end() ? end : std::min(end, range->first);
      range = ranges_.emplace_hint(range, at, Range{next, Record{}});
    } else if (range->second.end > end) {  // split at the end
      ranges_.emplace_hint(std::next(range), end, Range{range->second.end, range->second.record});
      range->second.end = end;
    }
    visit(at, range->second.end, range->second.record);
    at = range->second.end;
    ++range;
  }
}

// A set of bytes as disjoint ranges: the written part of an allocation.
class ByteSet {
 public:
  void add(uint64_t start, uint64_t end);
  // The first byte of [start, end) that is not in the set, or `end`.
  uint64_t first_missing(uint64_t start, uint64_t end) const;

 private:
  std::map<uint64_t, uint64_t> ranges_;
};

}  // namespace cann_sim
