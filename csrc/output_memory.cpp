// See output_memory.h.
#include "output_memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace npu_xent {
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
  Pool() { kept_.reserve(kKept + 1); }

  void* take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = fitting(bytes);
      if (found != kept_.end()) {
        const Block block = *found;
        taken_.emplace(block.memory, block.bytes);
        kept_.erase(found);
        return block.memory;
      }
    }
    void* memory = map(bytes);
    if (memory == nullptr) {
      unmap_kept();
      memory = map(bytes);
    }
    if (memory != nullptr) {
      const std::lock_guard<std::mutex> lock(mutex_);
      taken_.emplace(memory, bytes);
    }
    return memory;
  }

  void give_back(void* memory) {
    Block block{memory, 0};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = taken_.find(memory);
      block.bytes = found->second;
      taken_.erase(found);
    }
    if (offer(block)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      kept_.push_back(block);
      if (kept_.size() <= kKept) {
        return;
      }
      block = kept_.front();  // the one that nobody has wanted for the longest time
      kept_.erase(kept_.begin());
    }
    munmap(block.memory, block.bytes);
  }

  // A child of fork() finds the pool whole and unlocked.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // The smallest block that is large enough, but no more than twice as large, so that a larger output will not miss it.
  // Of equals the last, which is the likeliest to be in a cache.
  std::vector<Block>::iterator fitting(size_t bytes) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
      if (fits && (best == kept_.end() || block->bytes <= best->bytes)) {
        best = block;
      }
    }
    return best;
  }
  void unmap_kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : kept_) {
      munmap(block.memory, block.bytes);
    }
    kept_.clear();
  }

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

}  // namespace npu_xent
