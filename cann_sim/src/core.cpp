// The core: runs one block of a kernel, collects its results, and raises its errors. accesses.cpp has the checks of
// memory accesses.
#include "core_state.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace cann_sim {

__thread Core* current_core = nullptr;

namespace {

const char* kPipeNames[kPipes] = {"S", "V", "MTE2", "MTE3"};

}  // namespace

const char* pipe_name(Pipe pipe) {
  return kPipeNames[static_cast<int>(pipe)];
}

std::string format(const char* text, ...) {
  va_list arguments, again;
  va_start(arguments, text);
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, text, arguments);
  va_end(arguments);
  std::string result(static_cast<size_t>(length) + 1, '\0');
  std::vsnprintf(result.data(), result.size(), text, again);
  va_end(again);
  result.pop_back();
  return result;
}

std::string place_text(const PlaceEntry& place) {
  return format("%s:%d", place.where.file, place.where.line);
}

void Core::fail(const char* kind, Place where, const std::string& message) {
  Error error;
  error.kind = kind;
  error.file = where.file == nullptr ? "" : where.file;
  error.line = where.line;
  error.message = message;
  throw CoreFailure{std::move(error)};
}

void fail_range(const char* op, Place where, const char* name, const LocalTensorBase& tensor, uint64_t offset,
                uint64_t bytes, uint32_t element_bytes) {
  if (!tensor.valid()) {
    core().fail("bounds", where,
                format("%s: tensor %s was never given memory (not from AllocTensor, DeQue or TBuf::Get)", op, name));
  }
  const auto wide = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  core().fail("bounds", where,
              format("%s: %s needs bytes [%llu, %llu) of a tensor of %u bytes (elements up to %llu of %u)", op, name,
                     wide(offset), wide(offset + bytes), tensor.bytes(), wide((offset + bytes) / element_bytes),
                     tensor.bytes() / element_bytes));
}

void fail_alignment(const char* op, Place where, const char* name, const LocalTensorBase& tensor, uint32_t alignment) {
  core().fail(
      "alignment", where,
      format("%s: %s starts at byte %u of UB, which is not a multiple of %u", op, name, tensor.address(), alignment));
}

RunningCore::RunningCore() {
  ub_ = static_cast<uint8_t*>(std::aligned_alloc(64, kUbBytes));
  state_ = new CoreState;
}

RunningCore::~RunningCore() {
  delete state_;
  std::free(ub_);
}

void RunningCore::reset(const Launch& launch, CoreResult& result, uint32_t index) {
  index_ = index;
  blocks_ = launch.blocks;
  checking_ = launch.config.check;
  mask = Mask{};
  std::memset(ub_, 0xFF, kUbBytes);  // NaN in every floating type
  CoreState& state = *state_;
  state.launch = &launch;
  state.result = &result;
  state.check = checking_;
  for (int pipe = 0; pipe < kPipes; ++pipe) {
    state.clocks[pipe] = Clock{};
    state.issued[pipe] = 0;
  }
  state.places.reset();
  state.places.removed = launch.config.removed;
  state.ub.reset();
  state.gm.reset();
  state.scalar_lines.clear();
  state.last_line = ~uint64_t{0};
  for (auto& event : state.flags) {
    for (Flag& flag : event) {
      flag = Flag{};
    }
  }
  std::memset(state.taken_ids, 0, sizeof(state.taken_ids));
  std::memset(state.id_places, 0, sizeof(state.id_places));
  state.queues.clear();
  state.empty_ub();
  state.pipe = nullptr;
  state.last_buffer = nullptr;
  state.timing.reset(&launch, &result, launch.config.trace_core == static_cast<int>(index));
}

void RunningCore::run(Launch& launch, uint32_t index) {
  CoreResult& result = launch.results[index];
  reset(launch, result, index);
  Core* const outer = current_core;
  current_core = this;
  try {
    launch.run(launch.args);
    if (checking_) {
      const Place end{"", 0};
      check_leaks(*this, end, "when the kernel ended");
      check_flags(*this);
    }
  } catch (CoreFailure& failure) {
    result.error = std::move(failure.error);
  } catch (const std::exception& exception) {
    result.error.kind = "exception";
    result.error.message = format("the kernel threw a C++ exception: %s", exception.what());
  }
  current_core = outer;
  result.time = state_->timing.finish();
  collect(result);
}

void RunningCore::collect(CoreResult& result) {
  const CoreState& state = *state_;
  const auto add = [&](uint64_t start, uint64_t end, GmUse::Kind kind, uint16_t place) {
    if (!result.uses.empty()) {
      GmUse& last = result.uses.back();
      if (last.end == start && last.kind == kind && last.place == place) {
        last.end = end;
        return;
      }
    }
    result.uses.push_back({start, end, kind, place, index_});
  };
  for (const auto& [start, range] : state.gm.ranges()) {
    if (range.record.write_seq != 0) {
      add(start, range.end, GmUse::Kind::write, range.record.write_place);
      continue;  // across cores, a write conflicts with everything that a read conflicts with
    }
    for (int pipe = 0; pipe < kPipes; ++pipe) {
      if (range.record.read_seq[pipe] != 0) {
        add(start, range.end, GmUse::Kind::read, range.record.read_place[pipe]);
        break;
      }
    }
  }
  for (const auto& [line, place] : state.scalar_lines) {
    add(line, line + 64, GmUse::Kind::line, place);
  }
  result.places = state.places.entries();
}

}  // namespace cann_sim
