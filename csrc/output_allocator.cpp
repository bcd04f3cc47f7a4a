// See output_allocator.h.
#include "output_allocator.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include "output_memory.h"

namespace npu_xent {
namespace {

void release(void* memory) {
  c10::profiledCPUMemoryReporter().Delete(memory);
  give_memory_back(memory);
}

// An allocator, so that its storages can be resized. Falls back to torch's for small sizes, and when mapping memory
// fails.
class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes < kLargeOutput ? nullptr : take_memory(bytes);
    if (memory == nullptr) {
      return c10::GetCPUAllocator()->allocate(bytes);  // reports out-of-memory
    }
    c10::profiledCPUMemoryReporter().New(memory, bytes);
    return {memory, memory, release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

at::Tensor empty_output(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) {
    return at::empty({rows, columns}, options);
  }
  static auto& allocator = *new OutputAllocator;  // never destroyed: storages may outlive static objects
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  return at::detail::empty_generic({rows, columns}, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   std::nullopt);
}

}  // namespace npu_xent
