// See allocator.h.
#include "cpu/allocator.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/memory.h"

namespace npu_xent::cpu {
namespace {

void release(void* memory) {
  c10::profiledCPUMemoryReporter().Delete(memory);
  give_memory_back(memory);
}

// An allocator, so that storages may be resized as others may. What is not large it leaves to torch's.
class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes < kLargeOutput ? nullptr : take_memory(bytes);
    if (memory == nullptr) {
      return c10::GetCPUAllocator()->allocate(bytes);  // which has words for a lack of memory
    }
    c10::profiledCPUMemoryReporter().New(memory, bytes);
    return {memory, memory, release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

at::Tensor empty_output(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  static auto& allocator = *new OutputAllocator;  // never destroyed: storages may outlive what is destroyed at exit
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  return at::detail::empty_generic({rows, columns}, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   std::nullopt);
}

}  // namespace npu_xent::cpu
