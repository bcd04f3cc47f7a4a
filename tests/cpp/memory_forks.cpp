// The pool of large outputs across fork(): a child takes memory and gives it back although, at the moment of the fork,
// another thread of its parent may have been in the pool.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "output_memory.h"

namespace {

constexpr int kThreads = 2, kForks = 300;
constexpr unsigned kSeconds = 20;  // after which a child counts as hung
constexpr size_t kBytes = size_t{4} << 20;

void use_pool() {
  void* first = npu_xent::take_memory(kBytes);
  void* second = npu_xent::take_memory(kBytes);
  *static_cast<char*>(first) = *static_cast<char*>(second) = 1;
  npu_xent::give_memory_back(first);
  npu_xent::give_memory_back(second);
}

}  // namespace

int main() {
  test::context = "forks";
  use_pool();
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      while (!done) {
        use_pool();
      }
    });
  }
  int failed = 0;
  for (int i = 0; i < kForks && failed == 0; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(kSeconds);
      use_pool();
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    failed += status != 0;
  }
  test::check(failed == 0, "a child did not get through the pool");
  done = true;
  for (std::thread& thread : threads) {
    thread.join();
  }
  return test::finish("memory_forks");
}
