// Ensures that a forked child inherits unlocked mutexes.
#include <pthread.h>

#include "runtime.h"

namespace cann_sim::acl {

namespace {

struct Kept {
  std::mutex mutex;
  std::multimap<int, std::mutex*> mutexes;  // by rank
};

Kept& kept() {
  static auto* all = new Kept;  // outlives static destructors
  return *all;
}

thread_local std::multimap<int, std::mutex*> locked;  // held by the forking thread

void lock_all() {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    locked = kept().mutexes;
  }
  for (const auto& [rank, mutex] : locked) {
    mutex->lock();
  }
}

void unlock_all() {
  for (const auto& [rank, mutex] : locked) {
    mutex->unlock();
  }
}

}  // namespace

void keep_over_fork(int rank, std::mutex& mutex) {
  static const int installed = pthread_atfork(lock_all, unlock_all, unlock_all);
  static_cast<void>(installed);
  const std::lock_guard<std::mutex> lock(kept().mutex);
  kept().mutexes.emplace(rank, &mutex);
}

}  // namespace cann_sim::acl
