// The pool of large outputs from many threads: blocks are taken, written, handed to another thread and given back. Run
// with ThreadSanitizer too, which sees unordered accesses to the pool and to the blocks.
#include <array>
#include <mutex>
#include <thread>
#include <utility>

#include "check.h"
#include "output_memory.h"

namespace {

using namespace test;

constexpr int kThreads = 4, kRounds = 25;
constexpr size_t kHugePage = size_t{2} << 20, kPage = 4096;

// A block with the same number at the start of each page and in its last bytes.
struct Block {
  char* memory = nullptr;
  size_t bytes = 0;
  uint64_t number = 0;

  void take(size_t size, uint64_t mark) {
    *this = {static_cast<char*>(npu_xent::take_memory(size)), size, mark};
    for_each_place([&](char* place) { std::memcpy(place, &number, sizeof(number)); });
  }
  // Gives the block back; the number of places that another thread has overwritten.
  int give_back() {
    int changed = 0;
    if (memory != nullptr) {
      for_each_place([&](const char* place) { changed += std::memcmp(place, &number, sizeof(number)) != 0; });
      npu_xent::give_memory_back(memory);
      memory = nullptr;
    }
    return changed;
  }

 private:
  template <typename Use>
  void for_each_place(const Use& use) const {
    for (size_t offset = 0; offset + sizeof(number) <= bytes; offset += kPage) {
      use(memory + offset);
    }
    use(memory + bytes - sizeof(number));
  }
};

struct Exchange {
  std::mutex mutex;
  std::array<Block, 3> blocks;
};

void work(int thread, Exchange& exchange, int& changed) {
  for (int round = 0; round < kRounds; ++round) {
    Block kept, other;
    kept.take(kHugePage * (1 + (thread + round) % 3) - 100, static_cast<uint64_t>(thread * kRounds + round));
    other.take(kHugePage, ~kept.number);
    {
      const std::lock_guard<std::mutex> lock(exchange.mutex);
      std::swap(other, exchange.blocks[static_cast<size_t>(round) % exchange.blocks.size()]);
    }
    changed += kept.give_back() + other.give_back();
  }
}

}  // namespace

int main() {
  context = "threads";
  Exchange exchange;
  std::array<int, kThreads> changed{};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back(work, i, std::ref(exchange), std::ref(changed[i]));
  }
  for (int i = 0; i < kThreads; ++i) {
    threads[i].join();
    check(changed[i] == 0, "thread %d found %d numbers that it or the owner before it had not written", i, changed[i]);
  }
  for (Block& block : exchange.blocks) {
    check(block.give_back() == 0, "a block that was handed over has changed");
  }
  return finish("memory_threads");
}
