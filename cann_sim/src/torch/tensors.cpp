// Follows torch_npu's caching allocator, which cuts tensors out of large segments: each tensor becomes an allocation of
// its own for the runtime, so that a kernel is held to the tensor's bytes and to what was written in them.
// The allocator reports while it holds its lock, and hands memory on while launches that use it still wait in
// torch_npu's task queue. So reports are noted down, and told to the runtime in the order of that queue.
#include <mutex>
#include <utility>
#include <vector>

#include "control.h"
#include "operators.h"
#include "torch_npu/csrc/core/npu/NPUCachingAllocator.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace cann_sim_torch {
namespace {

using c10_npu::NPUCachingAllocator::TraceEntry;

struct Note {
  const void* start;
  size_t bytes;
  bool allocated;
};

std::mutex notes_mutex;
std::vector<Note> notes;
thread_local bool settling = false;

void note(const TraceEntry& entry) {
  // FREE_COMPLETED, not FREE_REQUESTED: record_stream keeps a block back until its other streams are done with it.
  if (entry.action_ != TraceEntry::ALLOC && entry.action_ != TraceEntry::FREE_COMPLETED) {
    return;
  }
  std::lock_guard<std::mutex> lock(notes_mutex);
  notes.push_back({reinterpret_cast<const void*>(entry.addr_), static_cast<size_t>(entry.size_),
                   entry.action_ == TraceEntry::ALLOC});
}

std::vector<Note> taken_notes() {
  std::lock_guard<std::mutex> lock(notes_mutex);
  return std::exchange(notes, {});
}

void tell(const std::vector<Note>& taken) {
  for (const Note& note : taken) {
    if (note.allocated) {
      tensor_allocated(note.start, note.bytes);
    } else {
      tensor_freed(note.start);
    }
  }
}

void enqueue_tensors() {
  if (settling) {
    settle_tensors();
    return;
  }
  std::vector<Note> taken = taken_notes();
  if (!taken.empty()) {
    at_npu::native::OpCommand::RunOpApi("cann_sim_tensors", [taken = std::move(taken)]() -> int {
      tell(taken);
      return 0;
    });
  }
}

}  // namespace

void settle_tensors() {
  tell(taken_notes());
}

SettlingGuard::SettlingGuard() {
  settling = true;
}
SettlingGuard::~SettlingGuard() {
  settling = false;
}

void allocating_kernel(const c10::SafeKernelFunction& kernel, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                       Stack* stack) {
  // The allocator has no devices to follow before the first allocation.
  static std::once_flag followed;
  auto* allocator = c10_npu::NPUCachingAllocator::get();
  if (allocator->initialized()) {
    std::call_once(followed, [&] { allocator->attachAllocatorTraceTracker(&note); });
    kernel.callBoxed(op, keys, stack);
  } else {
    kernel.callBoxed(op, keys, stack);
    std::call_once(followed, [&] {
      allocator->attachAllocatorTraceTracker(&note);
      const c10::Storage& first = stack->back().toTensor().storage();
      if (first.nbytes() != 0) {
        note(TraceEntry(TraceEntry::ALLOC, 0, reinterpret_cast<int64_t>(first.data()), first.nbytes(), nullptr));
      }
    });
  }
  enqueue_tensors();
}

}  // namespace cann_sim_torch
