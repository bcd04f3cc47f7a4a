// Follows torch_npu's caching allocator, which places tensors in large segments. Each tensor is reported to the runtime
// as an allocation, so that kernels are checked for bounds and initialization per tensor.
// The allocator reports while it holds its lock, and reuses memory while launches that use it still wait in torch_npu's
// task queue. So its reports are stored as notes, and passed to the runtime in the order of that queue.
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "control.h"
#include "operators.h"
#include "torch_npu/csrc/core/npu/NPUCachingAllocator.h"
#include "torch_npu/csrc/core/npu/NPUGuard.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace cann_sim_torch {
namespace {

using c10_npu::NPUCachingAllocator::TraceEntry;

struct Note {
  const void* start;
  size_t bytes;
  bool allocated;
};

// The notes of one device, which has one allocator and one task queue. `queueing` may be held for long, so the
// allocator must never wait for it: a full task queue is emptied by a thread that frees memory.
struct Notes {
  std::mutex queueing;  // held from taking notes until they are reported or queued, to keep their order
  std::vector<Note> list;
};

struct AllNotes {
  std::mutex mutex;  // protects the map and the lists
  std::map<c10::DeviceIndex, Notes> devices;
};

AllNotes& all_notes() {
  static auto* all = new AllNotes;  // outlives static destructors
  return *all;
}

void note(const TraceEntry& entry) {
  // FREE_COMPLETED, not FREE_REQUESTED: record_stream keeps a block back until its other streams are done with it.
  if (entry.action_ != TraceEntry::ALLOC && entry.action_ != TraceEntry::FREE_COMPLETED) {
    return;
  }
  const std::lock_guard<std::mutex> lock(all_notes().mutex);
  all_notes().devices[static_cast<c10::DeviceIndex>(entry.device_)].list.push_back(
      {reinterpret_cast<const void*>(entry.addr_), static_cast<size_t>(entry.size_),
       entry.action_ == TraceEntry::ALLOC});
}

Notes& notes_of(c10::DeviceIndex device) {
  const std::lock_guard<std::mutex> lock(all_notes().mutex);
  return all_notes().devices[device];
}

std::vector<Note> taken(Notes& notes) {
  const std::lock_guard<std::mutex> lock(all_notes().mutex);
  return std::exchange(notes.list, {});
}

void tell(const std::vector<Note>& notes) {
  for (const Note& note : notes) {
    if (note.allocated) {
      tensor_allocated(note.start, note.bytes);
    } else {
      tensor_freed(note.start);
    }
  }
}

thread_local bool settled_later = false;

void enqueue_tensors(c10::DeviceIndex device) {
  Notes& notes = notes_of(device);
  const c10_npu::NPUGuard on_device(device);  // selects the device's queue
  const std::lock_guard<std::mutex> lock(notes.queueing);
  std::vector<Note> now = taken(notes);
  if (!now.empty()) {
    at_npu::native::OpCommand::RunOpApi("cann_sim_tensors", [now = std::move(now)]() -> int {
      tell(now);
      return 0;
    });
  }
}

}  // namespace

void settle_tensors(c10::DeviceIndex device) {
  Notes& notes = notes_of(device);
  const std::lock_guard<std::mutex> lock(notes.queueing);
  const std::vector<Note> now = taken(notes);
  if (!now.empty()) {
    c10_npu::getCurrentNPUStream(device).stream();  // flushes the tasks queued before these notes
    tell(now);
  }
}

void settle_all_tensors() {
  std::vector<c10::DeviceIndex> devices;
  {
    const std::lock_guard<std::mutex> lock(all_notes().mutex);
    for (const auto& [device, notes] : all_notes().devices) {
      devices.push_back(device);
    }
  }
  for (const c10::DeviceIndex device : devices) {
    settle_tensors(device);
  }
}

SettledLater::SettledLater() {
  settled_later = true;
}
SettledLater::~SettledLater() {
  settled_later = false;
}

void allocating_kernel(const Kernel& kernel, const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  // The allocator has no devices before the first allocation.
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
        note(TraceEntry(TraceEntry::ALLOC, first.device().index(), reinterpret_cast<int64_t>(first.data()),
                        first.nbytes(), nullptr));
      }
    });
  }
  if (!settled_later) {
    enqueue_tensors(stack->back().toTensor().device().index());
  }
}

}  // namespace cann_sim_torch
