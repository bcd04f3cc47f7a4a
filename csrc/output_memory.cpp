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

// Sizes and addresses are multiples of it. (Systems with larger huge pages do not use them here.)
constexpr size_t kHugePage = size_t{2} << 20;
// A training step has at most two large outputs alive: a gradient and log_prob.
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
    madvise(begin + before, bytes, MADV_HUGEPAGE);  // failure only costs speed
  }
#endif
  return begin + before;
}

// Lets the system reclaim the block's memory while it is cached; false if the block must be unmapped instead.
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
      block = kept_.front();  // the least recently freed
      kept_.erase(kept_.begin());
    }
    munmap(block.memory, block.bytes);
  }

  // Used around fork(), so that the child has a consistent, unlocked pool.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // The smallest block that is large enough but at most twice as large; larger ones are left to larger outputs. Among
  // equal blocks the most recently freed, which is most likely cached.
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

// Never destroyed: tensors may outlive static objects.
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
