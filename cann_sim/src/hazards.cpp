// The range maps and conflict rules of hazards.h.
#include "hazards.h"

#include <algorithm>
#include <cstdlib>

namespace cann_sim {

PlaceTable::PlaceTable() {
  reset();
}

void PlaceTable::reset() {
  entries_.clear();
  entries_.push_back({"", {"", 0}});
  slots_.fill(0);
}

uint16_t PlaceTable::intern(const char* op, Place where) {
  const auto mix = reinterpret_cast<uintptr_t>(op) * 31 + reinterpret_cast<uintptr_t>(where.file) * 7 +
                   static_cast<uintptr_t>(where.line) * 0x9E3779B97F4A7C15u;
  uint32_t slot = static_cast<uint32_t>(mix >> 20 ^ mix) % kSlots;
  for (uint32_t probes = 0; probes < kSlots; ++probes, slot = (slot + 1) % kSlots) {
    const uint16_t id = slots_[slot];
    if (id == 0) {
      break;
    }
    const PlaceEntry& entry = entries_[id];
    if (entry.op == op && entry.where.line == where.line && entry.where.file == where.file) {
      return id;
    }
  }
  if (entries_.size() >= kSlots - 1) {  // table full: further places share the last entry
    return static_cast<uint16_t>(entries_.size() - 1);
  }
  slots_[slot] = static_cast<uint16_t>(entries_.size());
  PlaceEntry entry{op, where};
  for (const Removed& site : removed) {
    entry.ignored = entry.ignored || (site.line == where.line && site.kind == op && site.file == where.file);
  }
  entries_.push_back(entry);
  return slots_[slot];
}

Conflict conflict_of_read(const Record& record, const Clock& clock) {
  const int writer = static_cast<int>(record.write_pipe);
  if (record.write_seq > clock.seen[writer]) {
    return {true, true, record.write_pipe, record.write_place};
  }
  return {};
}

Conflict conflict_of_write(const Record& record, const Clock& clock, const Instruction& self) {
  const auto is_self = [&](Pipe pipe, uint32_t seq) { return pipe == self.pipe && seq == self.seq; };
  // Check reads first: they come after the write, so a remedy for them usually orders the write too.
  for (int reader = 0; reader < kPipes; ++reader) {
    if (record.read_seq[reader] > clock.seen[reader] && !is_self(static_cast<Pipe>(reader), record.read_seq[reader])) {
      return {true, false, static_cast<Pipe>(reader), record.read_place[reader]};
    }
  }
  if (record.write_seq > clock.seen[static_cast<int>(record.write_pipe)] &&
      !is_self(record.write_pipe, record.write_seq)) {
    return {true, true, record.write_pipe, record.write_place};
  }
  return {};
}

// ---- UbMap ----

UbMap::UbMap()
    : records_(static_cast<Record*>(std::calloc(kUbBytes + 1, sizeof(Record))),
               [](void* memory) { std::free(memory); }) {
  reset();
}

void UbMap::reset() {
  words_.fill(0);
  summary_.fill(0);
  set(0);
  records_[0] = Record{};
}

uint32_t UbMap::at_or_before(uint32_t offset) const {
  uint32_t word = offset / 64;
  const uint64_t bits = words_[word] & (~uint64_t{0} >> (63 - offset % 64));
  if (bits != 0) {
    return word * 64 + 63 - __builtin_clzll(bits);
  }
  uint32_t group = word / 64;  // offset 0 always starts a range, so the search ends
  uint64_t groups = word % 64 == 0 ? 0 : summary_[group] & (~uint64_t{0} >> (64 - word % 64));
  while (groups == 0) {
    groups = summary_[--group];
  }
  word = group * 64 + 63 - __builtin_clzll(groups);
  return word * 64 + 63 - __builtin_clzll(words_[word]);
}

uint32_t UbMap::after(uint32_t offset) const {
  uint32_t word = offset / 64;
  const uint64_t bits = offset % 64 == 63 ? 0 : words_[word] & (~uint64_t{0} << (offset % 64 + 1));
  if (bits != 0) {
    return word * 64 + __builtin_ctzll(bits);
  }
  uint32_t group = word / 64;
  uint64_t groups = word % 64 == 63 ? 0 : summary_[group] & (~uint64_t{0} << (word % 64 + 1));
  while (groups == 0) {
    if (++group == kSummaries) {
      return kUbBytes;
    }
    groups = summary_[group];
  }
  word = group * 64 + __builtin_ctzll(groups);
  return word * 64 + __builtin_ctzll(words_[word]);
}

void UbMap::split(uint32_t offset) {
  if (offset < kUbBytes && !starts(offset)) {
    records_[offset] = records_[at_or_before(offset)];
    set(offset);
  }
}

void UbMap::merge(uint32_t offset) {
  if (offset != 0 && offset < kUbBytes && starts(offset) && records_[offset] == records_[at_or_before(offset - 1)]) {
    clear(offset);
  }
}

void UbMap::assign(uint32_t start, uint32_t end, const Record& record) {
  split(start);
  split(end);
  for (uint32_t at = after(start); at < end; at = after(at)) {
    clear(at);
  }
  records_[start] = record;
  merge(start);
  merge(end);
}

// ---- GmMap ----

std::map<uint64_t, GmMap::Range>::iterator GmMap::first_touching(uint64_t start) {
  auto range = ranges_.lower_bound(start);
  if (range != ranges_.begin()) {
    auto before = std::prev(range);
    if (before->second.end > start) {
      range = ranges_.emplace_hint(range, start, Range{before->second.end, before->second.record});
      before->second.end = start;
    }
  }
  return range;
}

void GmMap::assign(uint64_t start, uint64_t end, const Record& record) {
  auto range = first_touching(start);
  while (range != ranges_.end() && range->first < end) {
    if (range->second.end > end) {
      ranges_.emplace_hint(std::next(range), end, Range{range->second.end, range->second.record});
    }
    range = ranges_.erase(range);
  }
  if (range != ranges_.begin()) {
    auto before = std::prev(range);
    if (before->second.end == start && before->second.record == record) {
      before->second.end = end;
      return;
    }
  }
  ranges_.emplace_hint(range, start, Range{end, record});
}

// ---- ByteSet ----

void ByteSet::add(uint64_t start, uint64_t end) {
  auto range = ranges_.upper_bound(start);
  if (range != ranges_.begin() && std::prev(range)->second >= start) {
    --range;
    start = range->first;
  }
  while (range != ranges_.end() && range->first <= end) {
    end = std::max(end, range->second);
    range = ranges_.erase(range);
  }
  ranges_.emplace_hint(range, start, end);
}

uint64_t ByteSet::first_missing(uint64_t start, uint64_t end) const {
  auto range = ranges_.upper_bound(start);
  if (range == ranges_.begin()) {
    return start;
  }
  --range;
  return range->second <= start ? start : std::min(end, range->second);
}

}  // namespace cann_sim
