// See memory.h.
#include "cpu/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace npu_xent::cpu {
namespace {

// Sizes are multiples of it, and addresses too. (Where huge pages are larger, they are not used.)
constexpr size_t kHugePage = size_t{2} << 20;
// As many are alive at a time in a training step: a gradient, and log_prob.
constexpr size_t kKept = 2;

bool is_on(const char* value) {
  return value == nullptr || std::string_view(value) != "0";
}

struct Block {
  void* memory;
  size_t bytes;
};

void* map(size_t bytes) {
  static const bool huge_pages = is_on(std::getenv("NPU_XENT_HUGE_PAGES"));
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return nullptr;
  }
  char* begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before != 0) {
    munmap(begin, before);
  }
  munmap(begin + before + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  if (huge_pages) {
    madvise(begin + before, bytes, MADV_HUGEPAGE);  // a refusal costs nothing but speed
  }
#endif
  return begin + before;
}

// Whether the system may take the block's memory while it lies here.
bool offer(const Block& block) {
#ifdef MADV_FREE
  static const bool keep = is_on(std::getenv("NPU_XENT_KEEP_MEMORY"));
  return keep && madvise(block.memory, block.bytes, MADV_FREE) == 0;
#else
  return false;
#endif
}

class Pool {
 public:
  void* take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that is large enough, and not so large that a larger output would miss it; of equals the last, which
    // is the likeliest to be in a cache.
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      if (block->bytes >= bytes && block->bytes / 2 <= bytes && (best == kept_.end() || block->bytes <= best->bytes)) {
        best = block;
      }
    }
    Block taken{nullptr, bytes};
    if (best != kept_.end()) {
      taken = *best;
      kept_.erase(best);
    } else {
      taken.memory = map(bytes);
      if (taken.memory == nullptr) {
        return nullptr;
      }
    }
    taken_.emplace(taken.memory, taken.bytes);
    return taken.memory;
  }

  void give_back(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = taken_.find(memory);
    const Block block{memory, found->second};
    taken_.erase(found);
    if (!offer(block)) {
      munmap(block.memory, block.bytes);
      return;
    }
    kept_.push_back(block);
    if (kept_.size() > kKept) {
      munmap(kept_.front().memory, kept_.front().bytes);  // the one that nobody wanted for the longest time
      kept_.erase(kept_.begin());
    }
  }

  // A child of fork() finds the pool whole and unlocked.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  std::vector<Block> kept_;
  std::unordered_map<void*, size_t> taken_;
};

// Never destroyed: tensors may outlive whatever is destroyed at exit.
Pool& pool() {
  static Pool& instance = *[] {
    auto* created = new Pool;
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
    return created;
  }();
  return instance;
}

}  // namespace

void* take_memory(size_t bytes) {
  return pool().take(bytes);
}
void give_memory_back(void* memory) {
  pool().give_back(memory);
}

}  // namespace npu_xent::cpu
