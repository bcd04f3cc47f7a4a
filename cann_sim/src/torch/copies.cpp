// Copies. torch_npu transfers dense tensors of one type (aclrtMemcpy, its queue and synchronisation); conversions of
// strides and types, which would need a device kernel, run on the host.
#include "operators.h"

#include <ATen/ops/clone_ops.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/empty_like.h>

namespace cann_sim_torch {
namespace {

std::optional<Kernel> torch_npu_copy;

bool transferable(const at::Tensor& to, const at::Tensor& from) {
  return to.scalar_type() == from.scalar_type() && to.sizes() == from.sizes() && to.is_contiguous() &&
         from.is_contiguous() && to.is_conj() == from.is_conj() && to.is_neg() == from.is_neg();
}

at::Tensor copied(at::Tensor to, const at::Tensor& from, bool non_blocking) {
  return at::_ops::copy_::call(to, from, non_blocking);
}

// A dense tensor with the type and sizes of `to` and the values of `from`, on the device of `from`.
at::Tensor prepared(const at::Tensor& from, const at::Tensor& to) {
  const at::Tensor like = at::empty_like(to, from.options().dtype(to.scalar_type()), at::MemoryFormat::Contiguous);
  return copied(like, from, false);
}

}  // namespace

void keep_copy(Kernel kernel) {
  torch_npu_copy.emplace(std::move(kernel));
}

void copy_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::Tensor self = torch::jit::peek(*stack, 0, 3).toTensor();
  const at::Tensor from = torch::jit::peek(*stack, 1, 3).toTensor();
  const bool non_blocking = torch::jit::peek(*stack, 2, 3).toBool();
  if (self.numel() == 0 && from.numel() <= 1) {
    torch::jit::drop(*stack, 3);
    stack->emplace_back(self);
  } else if (transferable(self, from)) {
    torch_npu_copy->callBoxed(op, keys, stack);
  } else if (self.device() == from.device()) {
    host_kernel(op, stack);
  } else {
    const at::Tensor ready = from.is_contiguous() && from.sizes() == self.sizes() &&
                                     from.scalar_type() == self.scalar_type() && !from.is_conj() && !from.is_neg()
                                 ? from
                                 : prepared(from, self);
    torch::jit::drop(*stack, 3);
    if (transferable(self, ready)) {
      stack->emplace_back(copied(self, ready, non_blocking && ready.is_same(from)));
    } else {
      const at::Tensor arrived = at::empty_like(ready, self.options(), at::MemoryFormat::Contiguous);
      copied(arrived, ready, false);
      stack->emplace_back(copied(self, arrived, non_blocking));
    }
  }
}

at::Tensor contiguous_kernel(const at::Tensor& self, at::MemoryFormat format) {
  return self.is_contiguous(format) ? self : at::_ops::clone::call(self, format);
}

}  // namespace cann_sim_torch
