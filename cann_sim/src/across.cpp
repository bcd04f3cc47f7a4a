// Checks across cores: two cores that access the same device memory in one launch.
#include <algorithm>

#include "launch_state.h"

namespace cann_sim {

namespace {

using Kind = GmUse::Kind;

// The use with the furthest end, and the furthest of any other core.
struct Furthest {
  const GmUse* first = nullptr;
  const GmUse* second = nullptr;

  void add(const GmUse& use) {
    if (first != nullptr && first->core == use.core) {
      first = use.end > first->end ? &use : first;
    } else if (first == nullptr || use.end > first->end) {
      second = first;
      first = &use;
    } else if (second == nullptr || use.end > second->end) {
      second = &use;
    }
  }
  const GmUse* other_core(const GmUse& use) const {
    for (const GmUse* candidate : {first, second}) {
      if (candidate != nullptr && candidate->core != use.core && candidate->end > use.start) {
        return candidate;
      }
    }
    return nullptr;
  }
};

struct Pair {
  const GmUse* a = nullptr;
  const GmUse* b = nullptr;
};

// The first two overlapping uses of different cores of which at least one is `strong`; `uses` sorted by start.
Pair first_overlap(const std::vector<GmUse>& uses, Kind strong, Kind weak) {
  Furthest strongs, weaks;
  for (const GmUse& use : uses) {
    if (use.kind != strong && use.kind != weak) {
      continue;
    }
    const GmUse* other = strongs.other_core(use);
    if (other == nullptr && use.kind == strong) {
      other = weaks.other_core(use);
    }
    if (other != nullptr) {
      return {other, &use};
    }
    (use.kind == strong ? strongs : weaks).add(use);
  }
  return {};
}

const char* verb(const GmUse& use) {
  return use.kind == Kind::read ? "reads" : "writes";
}

std::string side(const Launch& launch, const GmUse& use) {
  const PlaceEntry& place = launch.results[use.core].places[use.place];
  return format("core %u %s (%s at %s)", use.core, verb(use), place.op, place_text(place).c_str());
}

std::string bytes_text(const Launch& launch, uint64_t start, uint64_t end) {
  for (const Buffer& buffer : launch.buffers) {
    if (start >= buffer.start && start < buffer.end) {
      return format("bytes [%lld, %lld) of a GM buffer of %llu bytes", static_cast<long long>(start - buffer.start),
                    static_cast<long long>(end - buffer.start),
                    static_cast<unsigned long long>(buffer.end - buffer.start));
    }
  }
  return format("GM bytes at %#llx", static_cast<unsigned long long>(start));
}

void report(Launch& launch, const Pair& pair, const char* rule) {
  const GmUse& low = pair.a->core < pair.b->core ? *pair.a : *pair.b;
  const GmUse& high = pair.a->core < pair.b->core ? *pair.b : *pair.a;
  const PlaceEntry& place = launch.results[low.core].places[low.place];
  launch.error_core = static_cast<int>(low.core);
  launch.error.kind = "cross-core";
  launch.error.file = place.where.file;
  launch.error.line = place.where.line;
  launch.error.message =
      format("%s and %s: %s; %s", side(launch, low).c_str(), side(launch, high).c_str(),
             bytes_text(launch, std::max(low.start, high.start), std::min(low.end, high.end)).c_str(), rule);
}

std::vector<GmUse> sorted_uses(const Launch& launch) {
  std::vector<GmUse> uses;
  for (const CoreResult& core : launch.results) {
    uses.insert(uses.end(), core.uses.begin(), core.uses.end());
  }
  std::sort(uses.begin(), uses.end(), [](const GmUse& a, const GmUse& b) {
    return a.start != b.start ? a.start < b.start : a.core != b.core ? a.core < b.core : a.kind < b.kind;
  });
  return uses;
}

const char* kOrderRule = "nothing orders two cores within a launch";

// Decides which error to report for a core that read unwritten bytes, or failed afterwards.
void report_core(Launch& launch, CoreResult& core, uint32_t index) {
  launch.error_core = static_cast<int>(index);
  if (!core.unwritten.found) {
    launch.error = core.error;
    return;
  }
  const UnwrittenRead& read = core.unwritten;
  for (const CoreResult& other : launch.results) {
    for (const GmUse& use : other.uses) {
      if (use.core != index && use.kind == Kind::write && use.start < read.end && use.end > read.start) {
        const GmUse reader{read.start, read.end, Kind::read, read.place, index};
        report(launch, {&use, &reader}, kOrderRule);
        return;
      }
    }
  }
  const PlaceEntry& place = core.places[read.place];
  launch.error.kind = "uninitialised";
  launch.error.file = place.where.file;
  launch.error.line = place.where.line;
  launch.error.message = format("%s reads %s, which no earlier launch and nothing in this one has written", place.op,
                                bytes_text(launch, read.start, read.end).c_str());
}

}  // namespace

void check_across_cores(Launch& launch) {
  for (uint32_t index = 0; index < launch.blocks; ++index) {
    CoreResult& core = launch.results[index];
    if (core.error || core.unwritten.found) {
      report_core(launch, core, index);
      return;
    }
  }
  if (launch.blocks < 2 || !launch.config.check) {
    return;
  }
  const std::vector<GmUse> uses = sorted_uses(launch);
  Pair pair = first_overlap(uses, Kind::write, Kind::read);
  if (pair.a != nullptr) {
    report(launch, pair, kOrderRule);
    return;
  }
  pair = first_overlap(uses, Kind::line, Kind::write);
  if (pair.a != nullptr) {
    report(launch, pair,
           "scalar writes go through 64-byte lines of the core's data cache, so cores that share a line overwrite each "
           "other");
  }
}

}  // namespace cann_sim
