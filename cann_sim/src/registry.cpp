// The process's device memory, and which of its bytes have been written (registry.h).
#include "registry.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#include <pthread.h>

#include "cann_sim/launch.h"

namespace cann_sim {

namespace {

std::mutex mutex;
// A forked child inherits the lock's state, so fork holds the lock and both processes release it.
[[maybe_unused]] const int kept_over_fork =
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });

// Allocations by address. Overlapping allocations, which are rare, are in different layers, so that one lookup per
// layer finds all allocations with an address.
class AddressMap {
 public:
  void add(const std::shared_ptr<Allocation>& allocation) {
    if (allocation->bytes == 0) {  // contains no address
      return;
    }
    const auto fits = [&](const Layer& layer) {
      const auto after = layer.lower_bound(allocation->start);
      return (after == layer.end() || after->first >= allocation->start + allocation->bytes) &&
             (after == layer.begin() || end(*std::prev(after)->second) <= allocation->start);
    };
    auto layer = std::find_if(layers_.begin(), layers_.end(), fits);
    if (layer == layers_.end()) {
      layer = layers_.emplace(layer);
    }
    layer->emplace(allocation->start, allocation);
  }

  void remove(const std::shared_ptr<Allocation>& allocation) {
    for (Layer& layer : layers_) {
      const auto found = layer.find(allocation->start);
      if (found != layer.end() && found->second == allocation) {
        layer.erase(found);
        return;
      }
    }
  }

  // Calls `visit` with each allocation that contains the address.
  template <typename Visit>
  void at(uint64_t address, Visit visit) const {
    for (const Layer& layer : layers_) {
      auto found = layer.upper_bound(address);
      if (found != layer.begin() && address < end(*(--found)->second)) {
        visit(found->second);
      }
    }
  }

 private:
  using Layer = std::map<uint64_t, std::shared_ptr<Allocation>>;  // disjoint, by start
  static uint64_t end(const Allocation& allocation) { return allocation.start + allocation.bytes; }

  std::vector<Layer> layers_;
};

// All under the lock.
struct Registry {
  std::unordered_map<uint64_t, std::shared_ptr<Allocation>> by_id;
  AddressMap wholes, parts;
  uint64_t next_id = 1;

  AddressMap& map_of(const Allocation& allocation) { return allocation.part ? parts : wholes; }
};

Registry& registry() {
  static auto* all = new Registry;  // outlives static destructors
  return *all;
}

// Under the lock: visits the allocations that contain an address, parts in preference to their wholes.
template <typename Visit>
void visit_allocations_at(uint64_t address, Visit visit) {
  bool parts = false;
  registry().parts.at(address, [&](const auto& allocation) {
    parts = true;
    visit(allocation);
  });
  if (!parts) {
    registry().wholes.at(address, visit);
  }
}

void add_written(Allocation* allocation, uint64_t start, uint64_t end) {
  for (; allocation != nullptr; allocation = allocation->whole.get()) {
    if (!allocation->all_written) {
      allocation->written.add(start, end);
    }
  }
}

}  // namespace

std::vector<Buffer> snapshot_buffers(void* const* pointers, size_t count) {
  std::vector<Buffer> buffers;
  const std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < count; ++i) {
    visit_allocations_at(reinterpret_cast<uint64_t>(pointers[i]), [&](const std::shared_ptr<Allocation>& allocation) {
      const auto same = [&](const Buffer& buffer) { return buffer.allocation == allocation; };
      if (std::none_of(buffers.begin(), buffers.end(), same)) {
        buffers.push_back({allocation->start, allocation->start + allocation->bytes, allocation, false, {}});
      }
    });
  }
  // Largest first, so that overlapping registrations act as one; then by address, so that messages are deterministic.
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) {
    return a.end - a.start != b.end - b.start ? a.end - a.start > b.end - b.start : a.start < b.start;
  });
  return buffers;
}

void load_written(Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (Buffer& buffer : launch.buffers) {
    buffer.all_written = buffer.allocation->all_written;
    buffer.written = buffer.allocation->written;
  }
}

void record_writes(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Buffer& buffer : launch.buffers) {
    Allocation& allocation = *buffer.allocation;
    if (allocation.all_written) {
      continue;
    }
    if (!launch.config.check) {  // writes were not tracked
      add_written(allocation.whole.get(), buffer.start, buffer.end);
      allocation.all_written = true;
      continue;
    }
    for (const CoreResult& core : launch.results) {
      for (const GmUse& use : core.uses) {
        if (use.kind == GmUse::Kind::write && use.start >= buffer.start && use.end <= buffer.end) {
          add_written(&allocation, use.start, use.end);
        }
      }
    }
  }
}

}  // namespace cann_sim

struct cann_sim_place {
  std::vector<std::shared_ptr<cann_sim::Allocation>> allocations;
};

namespace {

uint64_t add(std::shared_ptr<cann_sim::Allocation> allocation) {
  cann_sim::Registry& all = cann_sim::registry();
  all.map_of(*allocation).add(allocation);
  all.by_id.emplace(all.next_id, std::move(allocation));
  return all.next_id++;
}

}  // namespace

uint64_t cann_sim_register(const void* start, uint64_t bytes, int written) {
  using namespace cann_sim;
  const std::lock_guard<std::mutex> lock(mutex);
  return add(std::make_shared<Allocation>(
      Allocation{reinterpret_cast<uint64_t>(start), bytes, written != 0, ByteSet{}, false, nullptr}));
}

uint64_t cann_sim_register_part(const void* start, uint64_t bytes) {
  using namespace cann_sim;
  const auto address = reinterpret_cast<uint64_t>(start);
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Allocation> whole;
  registry().wholes.at(address, [&](const std::shared_ptr<Allocation>& allocation) {
    if (address + bytes <= allocation->start + allocation->bytes) {
      whole = allocation;
    }
  });
  return add(std::make_shared<Allocation>(Allocation{address, bytes, false, ByteSet{}, true, std::move(whole)}));
}

void cann_sim_unregister(uint64_t id) {
  using namespace cann_sim;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = registry().by_id.find(id);
  if (found != registry().by_id.end()) {
    registry().map_of(*found->second).remove(found->second);
    registry().by_id.erase(found);
  }
}

struct cann_sim_place* cann_sim_find(const void* address) {
  using namespace cann_sim;
  auto* place = new cann_sim_place;
  const std::lock_guard<std::mutex> lock(mutex);
  visit_allocations_at(reinterpret_cast<uint64_t>(address),
                       [&](const auto& allocation) { place->allocations.push_back(allocation); });
  return place;
}

void cann_sim_written(struct cann_sim_place* place, const void* start, uint64_t bytes) {
  using namespace cann_sim;
  const auto address = reinterpret_cast<uint64_t>(start);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& allocation : place->allocations) {
    add_written(allocation.get(), address, address + bytes);
  }
}

void cann_sim_written_now(const void* start, uint64_t bytes) {
  using namespace cann_sim;
  const auto address = reinterpret_cast<uint64_t>(start);
  const std::lock_guard<std::mutex> lock(mutex);
  visit_allocations_at(address,
                       [&](const auto& allocation) { add_written(allocation.get(), address, address + bytes); });
}

void cann_sim_forget(struct cann_sim_place* place) {
  delete place;
}
