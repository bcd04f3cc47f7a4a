// scale_ out of aten operations.
#include <torch/library.h>

#include "composite/rows.h"

namespace npu_xent::composite {
namespace {

void scale_composite(const Tensor& self, const Tensor& factor) {
  check_scale(self, factor);
  // One multiplication in the statistics dtype, whatever self's.
  const auto dtype = stats_dtype(self.scalar_type());
  self.copy_(self.to(dtype) * factor.to(dtype).reshape({}));
  self.unsafeGetTensorImpl()->bump_version();  // autograd calls this below the key that would
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("scale_", scale_composite);
}

}  // namespace npu_xent::composite
