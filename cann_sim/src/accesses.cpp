// The hazard checks of each access to the unified buffer and to device memory.
#include "core_state.h"

#include <cstring>

namespace cann_sim {

namespace {

// Whether an instruction may read memory that it writes. Long lists are not searched, and count as overlapping.
bool overlapping(const Accesses& reads, const Accesses& writes) {
  if (uint64_t{reads.size()} * writes.size() > 64) {
    return true;
  }
  for (const Access& read : reads) {
    for (const Access& write : writes) {
      if (read.offset < write.offset + write.bytes && write.offset < read.offset + read.bytes) {
        return true;
      }
    }
  }
  return false;
}

std::string range_text(uint64_t start, uint64_t end) {
  return format("[%llu, %llu)", static_cast<unsigned long long>(start), static_cast<unsigned long long>(end));
}

// The missing synchronisation that would order `later` after `earlier`.
std::string remedy(Pipe earlier, Pipe later) {
  if (earlier == later) {
    return format("a PipeBarrier<PIPE_%s> between them is missing", pipe_name(later));
  }
  return format(
      "a flag %s_%s (SetFlag/WaitFlag, or EnQue/DeQue, FreeTensor/AllocTensor of a queue) between them is missing",
      pipe_name(earlier), pipe_name(later));
}

// A hint if the earlier access is on a later line: probably a previous pass of a loop.
const char* earlier_pass(Place earlier, Place later) {
  const bool same_file = earlier.file == later.file || std::strcmp(earlier.file, later.file) == 0;
  return same_file && earlier.line > later.line ? " (that ran earlier: in the previous pass of a loop?)" : "";
}

}  // namespace

// ---- the unified buffer ----

Instruction CoreState::begin(Pipe pipe, const char* op, Place where) {
  const int p = static_cast<int>(pipe);
  const Instruction self{pipe, ++issued[p], places.intern(op, where)};
  if (pipe == Pipe::S) {
    clocks[p].seen[p] = self.seq;  // the scalar unit is in order with itself
  }
  return self;
}

void CoreState::fail_conflict(Core& core, const Instruction& self, const char* memory, uint64_t start, uint64_t end,
                              bool writes, const Conflict& conflict) {
  const PlaceEntry& place = places[self.place];
  const PlaceEntry& earlier = places[conflict.place];
  core.fail(
      "race", place.where,
      format("%s (pipe %s) %s %s bytes %s that %s (pipe %s) at %s %s, and nothing orders it after that: %s%s", place.op,
             pipe_name(self.pipe), writes ? "writes" : "reads", memory, range_text(start, end).c_str(), earlier.op,
             pipe_name(conflict.pipe), place_text(earlier).c_str(), conflict.earlier_writes ? "writes" : "reads",
             remedy(conflict.pipe, self.pipe).c_str(), earlier_pass(earlier.where, place.where)));
}

void CoreState::check_read(Core& core, const Instruction& self, uint32_t from, uint32_t to, const Record& record) {
  if (record.state != ByteState::written) {
    const PlaceEntry& place = places[self.place];
    if (record.state == ByteState::freed) {
      core.fail("queue", place.where,
                format("%s reads UB bytes %s after FreeTensor gave them back", place.op, range_text(from, to).c_str()));
    }
    core.fail("uninitialised", place.where,
              format("%s (pipe %s) reads UB bytes %s, which nothing has written since they were allocated", place.op,
                     pipe_name(self.pipe), range_text(from, to).c_str()));
  }
  const Conflict conflict = conflict_of_read(record, clocks[static_cast<int>(self.pipe)]);
  if (conflict.found) {
    fail_conflict(core, self, "UB", from, to, false, conflict);
  }
}

void CoreState::check_read_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end) {
  ub.update(start, end,
            [&](uint32_t from, uint32_t to, const Record& record) { check_read(core, self, from, to, record); });
}

void CoreState::read_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end) {
  const int p = static_cast<int>(self.pipe);
  ub.update(start, end, [&](uint32_t from, uint32_t to, Record& record) {
    check_read(core, self, from, to, record);
    record.read_seq[p] = self.seq;
    record.read_place[p] = self.place;
  });
}

void CoreState::check_write_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end) {
  ub.update(start, end, [&](uint32_t from, uint32_t to, const Record& record) {
    if (record.state == ByteState::freed) {
      const PlaceEntry& place = places[self.place];
      core.fail(
          "queue", place.where,
          format("%s writes UB bytes %s after FreeTensor gave them back", place.op, range_text(from, to).c_str()));
    }
    const Conflict conflict = conflict_of_write(record, clocks[static_cast<int>(self.pipe)], self);
    if (conflict.found) {
      fail_conflict(core, self, "UB", from, to, true, conflict);
    }
  });
}

void CoreState::write_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end, ByteState state) {
  check_write_ub(core, self, start, end);
  Record record;
  record.write_seq = self.seq;
  record.write_place = self.place;
  record.write_pipe = self.pipe;
  record.state = state;
  ub.assign(start, end, record);
}

void CoreState::hazards_ub(Core& core, const Instruction& self, const Accesses& reads, const Accesses& writes) {
  for (const Accesses* list : {&reads, &writes}) {
    for (const Access& access : *list) {
      if (uint64_t{access.offset} + access.bytes > kUbBytes) {
        core.fail("bounds", places[self.place].where,
                  format("%s touches UB bytes %s, but UB has %u", places[self.place].op,
                         range_text(access.offset, uint64_t{access.offset} + access.bytes).c_str(), kUbBytes));
      }
    }
  }
  if (overlapping(reads, writes)) {  // check before recording the reads, which replace earlier reads of the same pipe
    for (const Access& access : reads) {
      check_read_ub(core, self, access.offset, access.offset + access.bytes);
    }
    for (const Access& access : writes) {
      check_write_ub(core, self, access.offset, access.offset + access.bytes);
    }
  }
  for (const Access& access : reads) {
    read_ub(core, self, access.offset, access.offset + access.bytes);
  }
  for (const Access& access : writes) {
    write_ub(core, self, access.offset, access.offset + access.bytes);
  }
}

void Core::vector(const char* op, Place where, VectorClass kind, uint32_t repeats, uint32_t element_bytes,
                  const Accesses& reads, const Accesses& writes) {
  CoreState& state = *state_;
  const Instruction self = state.begin(Pipe::V, op, where);
  if (checking_) {
    state.hazards_ub(*this, self, reads, writes);
  }
  state.timing.vector(kind, op, repeats, element_bytes, self.place);
}

void Core::scalar(const char* op, Place where, const Accesses& reads, const Accesses& writes) {
  CoreState& state = *state_;
  const Instruction self = state.begin(Pipe::S, op, where);
  if (checking_) {
    state.hazards_ub(*this, self, reads, writes);
  }
  state.timing.scalar(state.launch->cost.scalar_ub_cycles, self.place);
}

void Core::order(Pipe from, Pipe to) {
  CoreState& state = *state_;
  const int f = static_cast<int>(from), t = static_cast<int>(to);
  Clock carried = state.clocks[f];
  carried.seen[f] = state.issued[f];
  state.clocks[t].join(carried);
  if (from == to) {
    if (from != Pipe::S) {
      state.timing.barrier(from);
    }
  } else {
    state.timing.wait_flag(to, state.timing.set_flag(from));
  }
}

// ---- device memory ----

constexpr uint64_t kNullBytes = 1 << 20;  // addresses below this are offsets from a null pointer

const Buffer& CoreState::find_buffer(Core& core, const Instruction& self, uint64_t start, uint64_t end, bool writes) {
  if (last_buffer != nullptr && last_buffer->start <= start && end <= last_buffer->end) {
    return *last_buffer;
  }
  const Buffer* nearest = nullptr;
  uint64_t distance = 1 << 20;  // addresses further away are not attributed to a buffer
  for (const Buffer& buffer : launch->buffers) {
    if (buffer.start <= start && end <= buffer.end) {
      last_buffer = &buffer;
      return buffer;
    }
    const uint64_t gap = start < buffer.start ? buffer.start - start : start > buffer.end ? start - buffer.end : 0;
    if (gap < distance) {
      distance = gap;
      nearest = &buffer;
    }
  }
  const PlaceEntry& place = places[self.place];
  const char* verb = writes ? "writes" : "reads";
  if (nearest == nullptr) {
    core.fail("gm-bounds", place.where,
              format("%s (pipe %s) %s %llu bytes of GM at %#llx, which is %s", place.op, pipe_name(self.pipe), verb,
                     static_cast<unsigned long long>(end - start), static_cast<unsigned long long>(start),
                     start < kNullBytes ? "behind a null pointer" : "in no buffer of this launch"));
  }
  core.fail("gm-bounds", place.where,
            format("%s (pipe %s) %s bytes [%lld, %lld) of a GM buffer of %llu bytes", place.op, pipe_name(self.pipe),
                   verb, static_cast<long long>(start - nearest->start), static_cast<long long>(end - nearest->start),
                   static_cast<unsigned long long>(nearest->end - nearest->start)));
}

void CoreState::read_gm(Core& core, const Instruction& self, uint64_t start, uint64_t end) {
  const Buffer& buffer = find_buffer(core, self, start, end, false);
  if (!check) {
    return;
  }
  const int p = static_cast<int>(self.pipe);
  gm.update(start, end, [&](uint64_t from, uint64_t to, Record& record) {
    if (record.state == ByteState::unwritten && !buffer.all_written && !result->unwritten.found &&
        buffer.written.first_missing(from, to) < to) {
      result->unwritten = {true, from, to, self.place};
    }
    const Conflict conflict = conflict_of_read(record, clocks[p]);
    if (conflict.found) {
      fail_conflict(core, self, "GM", from - buffer.start, to - buffer.start, false, conflict);
    }
    record.read_seq[p] = self.seq;
    record.read_place[p] = self.place;
  });
}

void CoreState::write_gm(Core& core, const Instruction& self, uint64_t start, uint64_t end) {
  const Buffer& buffer = find_buffer(core, self, start, end, true);
  if (!check) {
    return;
  }
  gm.update(start, end, [&](uint64_t from, uint64_t to, Record& record) {
    const Conflict conflict = conflict_of_write(record, clocks[static_cast<int>(self.pipe)], self);
    if (conflict.found) {
      fail_conflict(core, self, "GM", from - buffer.start, to - buffer.start, true, conflict);
    }
  });
  Record record;
  record.write_seq = self.seq;
  record.write_place = self.place;
  record.write_pipe = self.pipe;
  record.state = ByteState::written;
  gm.assign(start, end, record);
}

void scalar_gm(const char* op, Place where, const void* address, uint32_t bytes, bool writes) {
  Core& self = core();
  CoreState& state = self.state();
  const Instruction instruction = state.begin(Pipe::S, op, where);
  const auto start = reinterpret_cast<uint64_t>(address);
  if (start % bytes != 0) {
    self.fail("alignment", where,
              format("%s of a %u-byte element at a GM address that is not a multiple of that", op, bytes));
  }
  if (writes) {
    state.write_gm(self, instruction, start, start + bytes);
    const uint64_t line = start / 64 * 64;
    if (state.check && line != state.last_line) {
      state.scalar_lines.emplace_back(line, instruction.place);
      state.last_line = line;
    }
    state.result->written_bytes += bytes;
  } else {
    state.read_gm(self, instruction, start, start + bytes);
    state.result->read_bytes += bytes;
  }
  state.timing.scalar(state.launch->cost.scalar_gm_cycles, instruction.place);
}

void clean_cache(Place where) {
  CoreState& state = core().state();
  const Instruction instruction = state.begin(Pipe::S, "DataCacheCleanAndInvalid", where);
  state.timing.scalar(state.launch->cost.scalar_gm_cycles, instruction.place);
}

}  // namespace cann_sim
