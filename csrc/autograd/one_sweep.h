// What the losses share: a gradient that the forward makes as if the upstream gradient were 1, and that the backward
// only scales; and what two sweeps have saved.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clone.h>

#include "loss.h"

namespace npu_xent::autograd {

// Whether that can be done for logits of this dtype.
inline bool one_sweep(at::ScalarType dtype, const LossOptions& o) {
  // Hooks on saved tensors (activation checkpointing, offloading) want to see what is kept: let them have the logits.
  return o.reduction != "none" && dtype != at::kHalf && !o.need_log_prob && !o.differentiable_z_loss &&
         !at::SavedTensorDefaultHooks::get_hooks().has_value();
}

// The gradient, scaled; a copy of it if a second backward may want it as it is.
inline Tensor scaled(const Tensor& grad, const Tensor& upstream, bool copy) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto result = copy ? grad.clone() : grad;
  scale_(result, upstream.detach());
  return result;
}

// A saved tensor or an upstream gradient, of which an undefined one stands for none.
inline OptionalTensor optional(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

}  // namespace npu_xent::autograd
