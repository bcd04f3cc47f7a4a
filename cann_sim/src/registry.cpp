// The device memory known to the process, and which of its bytes have been written (registry.h).
#include "registry.h"

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

}  // namespace

std::vector<Buffer> snapshot_buffers(void* const* pointers, size_t count) {
  std::vector<Buffer> buffers;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [id, allocation] : allocations()) {
    for (size_t i = 0; i < count; ++i) {
      const auto address = reinterpret_cast<uint64_t>(pointers[i]);
      if (address >= allocation->start && address < allocation->start + allocation->bytes) {
        buffers.push_back({allocation->start, allocation->start + allocation->bytes, allocation->all_written,
                           allocation->written, allocation});
        break;
      }
    }
  }
  // Largest first, so that overlapping registrations act as one; by address, so that messages do not vary.
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) {
    return a.end - a.start != b.end - b.start ? a.end - a.start > b.end - b.start : a.start < b.start;
  });
  return buffers;
}

void record_writes(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Buffer& buffer : launch.buffers) {
    Allocation& allocation = *buffer.allocation;
    if (allocation.all_written) {
      continue;
    }
    if (!launch.config.check) {  // nobody kept book
      allocation.all_written = true;
      continue;
    }
    for (const CoreResult& core : launch.results) {
      for (const GmUse& use : core.uses) {
        if (use.kind == GmUse::Kind::write && use.start >= buffer.start && use.end <= buffer.end) {
          allocation.written.add(use.start, use.end);
        }
      }
    }
  }
}

}  // namespace cann_sim

uint64_t cann_sim_register(const void* start, uint64_t bytes, int written) {
  using namespace cann_sim;
  auto allocation =
      std::make_shared<Allocation>(Allocation{reinterpret_cast<uint64_t>(start), bytes, written != 0, ByteSet{}});
  const std::lock_guard<std::mutex> lock(mutex);
  allocations().emplace(next_id, std::move(allocation));
  return next_id++;
}

void cann_sim_unregister(uint64_t id) {
  using namespace cann_sim;
  const std::lock_guard<std::mutex> lock(mutex);
  allocations().erase(id);
}
