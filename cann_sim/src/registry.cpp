// The device memory known to the process, and which of its bytes have been written (registry.h).
#include "registry.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "cann_sim/launch.h"

namespace cann_sim {

namespace {

std::mutex mutex;
std::unordered_map<uint64_t, std::shared_ptr<Allocation>>& allocations() {
  static auto* all = new std::unordered_map<uint64_t, std::shared_ptr<Allocation>>;  // outlives static destructors
  return *all;
}
uint64_t next_id = 1;

// Under the lock: what an address falls into. Parts go before the wholes they are cut out of.
std::vector<std::shared_ptr<Allocation>> allocations_at(uint64_t address) {
  std::vector<std::shared_ptr<Allocation>> found;
  bool parts = false;
  for (const auto& [id, allocation] : allocations()) {
    if (address >= allocation->start && address < allocation->start + allocation->bytes) {
      parts = parts || allocation->part;
      found.push_back(allocation);
    }
  }
  if (parts) {
    found.erase(std::remove_if(found.begin(), found.end(), [](const auto& allocation) { return !allocation->part; }),
                found.end());
  }
  return found;
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
    for (const auto& allocation : allocations_at(reinterpret_cast<uint64_t>(pointers[i]))) {
      const auto same = [&](const Buffer& buffer) { return buffer.allocation == allocation; };
      if (std::none_of(buffers.begin(), buffers.end(), same)) {
        buffers.push_back({allocation->start, allocation->start + allocation->bytes, allocation, false, {}});
      }
    }
  }
  // Largest first, so that overlapping registrations act as one; by address, so that messages do not vary.
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
    if (!launch.config.check) {  // nobody kept book
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
  cann_sim::allocations().emplace(cann_sim::next_id, std::move(allocation));
  return cann_sim::next_id++;
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
  for (const auto& [id, allocation] : allocations()) {
    if (!allocation->part && address >= allocation->start && address + bytes <= allocation->start + allocation->bytes) {
      whole = allocation;
    }
  }
  return add(std::make_shared<Allocation>(Allocation{address, bytes, false, ByteSet{}, true, std::move(whole)}));
}

void cann_sim_unregister(uint64_t id) {
  using namespace cann_sim;
  const std::lock_guard<std::mutex> lock(mutex);
  allocations().erase(id);
}

struct cann_sim_place* cann_sim_find(const void* address) {
  using namespace cann_sim;
  const std::lock_guard<std::mutex> lock(mutex);
  return new cann_sim_place{allocations_at(reinterpret_cast<uint64_t>(address))};
}

void cann_sim_written(struct cann_sim_place* place, const void* start, uint64_t bytes) {
  using namespace cann_sim;
  const auto address = reinterpret_cast<uint64_t>(start);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& allocation : place->allocations) {
    add_written(allocation.get(), address, address + bytes);
  }
}

void cann_sim_forget(struct cann_sim_place* place) {
  delete place;
}
