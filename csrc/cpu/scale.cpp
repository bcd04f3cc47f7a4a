// scale_ on the CPU, and the choice of the kernels.
#include <ATen/Version.h>
#include <torch/library.h>

#include "cpu/common.h"

namespace npu_xent::cpu {

const KernelTable& kernels() {
  static const KernelTable& table = kernel_table(at::get_cpu_capability());
  return table;
}

namespace {

void scale_cpu(const Tensor& self, const Tensor& factor) {
  check_scale(self, factor);
  const double value = factor.to(at::kDouble).item<double>();
  if (value == 1) {
    return;
  }
  with_storage_type(self.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    scale(kernels().of<scalar_t>(), data<scalar_t>(self), self.numel(), value, parallel_for_elements(self.numel()));
  });
  self.unsafeGetTensorImpl()->bump_version();  // nobody else sees writes through a pointer
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CPU, m) {
  m.impl("scale_", scale_cpu);
}

}  // namespace npu_xent::cpu
