// What the losses share: the gradient that a forward makes and a backward scales, saved options and tensors, and a
// history that raises where a derivative is not supported.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <string>
#include <type_traits>

#include "loss.h"

namespace npu_xent::autograd {

// Whether the forward can make the gradient, as if the upstream gradient were 1, for logits of this dtype.
inline bool one_sweep(at::ScalarType dtype, const Options& o, const Wanted& wanted) {
  // Hooks on saved tensors (activation checkpointing, offloading) want to see what is kept: let them have the logits.
  return o.reduction != Reduction::none && dtype != at::kHalf && !wanted.log_prob && !wanted.differentiable_z_loss &&
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

inline at::IValue to_saved(Reduction reduction) {
  return static_cast<int64_t>(reduction);
}
template <typename T>
at::IValue to_saved(const T& value) {
  return value;
}
inline void from_saved(const at::IValue& saved, Reduction& reduction) {
  reduction = static_cast<Reduction>(saved.toInt());
}
template <typename T>
void from_saved(const at::IValue& saved, T& value) {
  value = saved.to<T>();
}

template <typename SavedData>
void save(const Options& o, SavedData& saved) {
  Options::visit(o, [&](const char* name, const auto& value) { saved[name] = to_saved(value); });
}
template <typename SavedData>
Options saved_options(SavedData& saved) {
  Options o;
  Options::visit(o, [&](const char* name, auto& value) { from_saved(saved[name], value); });
  return o;
}

// Nodes are held by std::shared_ptr in older torch, by c10::intrusive_ptr in newer.
template <typename Node>
auto make_node(std::string message, torch::autograd::edge_list edges) {
  using Held = decltype(torch::autograd::get_current_node());
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Node>(std::move(message), std::move(edges));
  } else {
    return c10::make_intrusive<Node>(std::move(message), std::move(edges));
  }
}

// `output` becomes a function of whatever `edges` lead to; its derivative raises `message`.
inline void set_refusing_history(const at::Tensor& output, std::string message, torch::autograd::edge_list edges) {
  torch::autograd::set_history(output, make_node<torch::autograd::Error>(std::move(message), std::move(edges)));
}

}  // namespace npu_xent::autograd
