// scale_ on an NPU: the kernel looks at the factor, so that the host need not wait for it.
#include <c10/core/DeviceGuard.h>

#include "npu/common.h"
#include "npu/load.h"

namespace npu_xent::npu {
namespace {

void scale_npu(const Tensor& self, const Tensor& factor) {
  check_scale(self, factor);
  check_overwritable(self);
  TORCH_CHECK_VALUE(factor.device() == self.device(), "npu_xent: factor must be on the device of self, ", self.device(),
                    ", but is on ", factor.device(), ".");
  TORCH_CHECK_TYPE(at::isReducedFloatingType(factor.scalar_type()) || factor.scalar_type() == at::kFloat,
                   "npu_xent: factor must be float32, bfloat16 or float16, but is ", factor.scalar_type(),
                   "; convert it with factor.float().");
  XentArgs args{};
  args.dtype = static_cast<int64_t>(logits_type(self.scalar_type()));
  args.factor_dtype = static_cast<int64_t>(logits_type(factor.scalar_type()));
  if (self.numel() == 0) {
    return;
  }
  const c10::DeviceGuard guard(self.device());
  args.cols = self.numel();
  launch(ScaleKernel{.x = self, .factor = factor}, self.device(), div_up(args.cols, kScaleChunk), args);
  self.unsafeGetTensorImpl()->bump_version();  // nobody else sees writes through a pointer
}

}  // namespace

void register_scale(torch::Library& m) {
  m.impl("scale_", scale_npu);
}

}  // namespace npu_xent::npu
