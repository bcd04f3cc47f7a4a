// Shared by both losses: when the forward computes the gradient, saved options and tensors, and the graph node that
// raises for unsupported derivatives.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <array>
#include <memory>
#include <string>
#include <type_traits>

#include "cpu/whole_loss.h"
#include "loss.h"

namespace npu_xent::autograd {

// Whether the forward can compute the gradient for logits of this dtype, assuming an upstream gradient of 1.
inline bool one_sweep(at::ScalarType dtype, const Options& o, const Wanted& wanted) {
  // Hooks on saved tensors (activation checkpointing, offloading) must see the saved logits, so save those instead.
  return o.reduction != Reduction::none && dtype != at::kHalf && !wanted.log_prob &&
         !(wanted.differentiable_z_loss && o.lse_square_scale != 0) &&
         !at::SavedTensorDefaultHooks::get_hooks().has_value();
}

inline void check_consumable(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.requires_grad() && at::GradMode::is_enabled(),
                    "npu_xent: consume_logits writes the gradient over the logits, but these logits need no gradient; "
                    "leave it off.");
  const bool leaf =
      logits.is_leaf() || (logits.is_view() && logits._base().is_leaf() && logits._base().requires_grad());
  TORCH_CHECK_VALUE(!leaf,
                    "npu_xent: consume_logits would overwrite a leaf of the autograd graph (a parameter, or a tensor "
                    "whose .grad you asked for); leave it off, or pass the output of an operation.");
  check_dense(logits);
  check_not_negative(logits, "logits");
}

inline void check_no_forward_mode(const OptionalTensor& t, const char* name) {
  TORCH_CHECK(!t || !torch::autograd::isFwGradDefined(*t), "npu_xent: forward-mode derivatives of ", name,
              " are not supported. Use torch.func.jvp of npu_xent.", name, ".");
}

// The options of a log-probability for each row.
inline Options by_row(Options o, c10::SymInt num_classes, const char* name) {
  TORCH_CHECK_VALUE(o.label_smoothing == 0 && o.lse_square_scale == 0 && !o.grad_scale, "npu_xent: ", name,
                    " takes no label_smoothing, lse_square_scale and grad_scale; leave them out.");
  o.reduction = Reduction::none;
  return of_classes(std::move(o), std::move(num_classes));
}

// The gradient times `upstream`. With `copy`, `grad` stays unchanged for a second backward.
inline Tensor scaled(const Tensor& grad, const Tensor& upstream, bool copy) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (upstream.key_set().has_any(
          c10::DispatchKeySet({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched}))) {
    return grad.mul(upstream);  // is_grads_batched: many results of one gradient
  }
  const auto result = copy ? grad.clone() : grad;
  if (cpu::unobserved(result, upstream)) {
    cpu::scale(result, upstream);
  } else {
    scale_(result, upstream.detach());
  }
  return result;
}

// Under autocast, class weights of any floating-point dtype are taken, as F.cross_entropy takes them.
inline OptionalTensor autocast_weight(const OptionalTensor& weight, at::ScalarType logits) {
  if (!weight || !at::isFloatingType(weight->scalar_type()) || weight->scalar_type() == logits) {
    return weight;
  }
  check_storages({{"weight", weight}});
  return weight->to(stats_dtype(logits));
}

// Whether this backward may be followed by another one. Compiled autograd, which has no current node, does not tell.
inline bool keeps_graph() {
  return !torch::autograd::get_current_node() || torch::autograd::get_current_graph_task_keep_graph();
}

// The results of a Function. Those without a gradient leave it beside its outputs, not among them, since compiled
// autograd does not support mark_non_differentiable.
template <size_t n>
struct Results {
  using List = torch::autograd::variable_list;

  std::array<bool, n> differentiable;
  std::array<Tensor, n> all{};

  // In the forward: what it returns.
  template <typename SavedData>
  List outputs(SavedData& saved) const {
    List list;
    c10::List<bool> flags;
    for (size_t i = 0; i < n; ++i) {
      flags.push_back(differentiable[i]);
      if (differentiable[i]) {
        list.push_back(all[i]);
      }
    }
    saved["differentiable"] = flags;
    return list;
  }
  // After it: all of them, the outputs with their history.
  std::array<Tensor, n> with(const List& outputs) && {
    auto next = outputs.begin();
    for (size_t i = 0; i < n; ++i) {
      all[i] = differentiable[i] ? *next++ : all[i];
    }
    return std::move(all);
  }
  // In the backward: the upstream gradient of each.
  template <typename SavedData>
  static List upstream(const SavedData& saved, const List& grads) {
    const auto flags = saved.at("differentiable").toBoolList();
    List list(n);
    auto next = grads.begin();
    for (size_t i = 0; i < n; ++i) {
      list[i] = flags.get(i) ? *next++ : Tensor();
    }
    return list;
  }
};

// The tensor, or, in a compiler's trace, its value of this moment, whatever is written into it later (saved_value.cpp).
Tensor value_to_save(const Tensor& t);

// A saved tensor or an upstream gradient; nullopt if undefined.
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

// Older torch holds nodes in a std::shared_ptr, newer torch in a c10::intrusive_ptr.
template <typename Node>
auto make_node(std::string message, torch::autograd::edge_list edges) {
  using Held = decltype(torch::autograd::get_current_node());
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Node>(std::move(message), std::move(edges));
  } else {
    return c10::make_intrusive<Node>(std::move(message), std::move(edges));
  }
}

// Connects `output` to `edges` in the autograd graph; differentiating it raises `message`.
inline void set_refusing_history(const at::Tensor& output, std::string message, torch::autograd::edge_list edges) {
  torch::autograd::set_history(output, make_node<torch::autograd::Error>(std::move(message), std::move(edges)));
}

// In a backward: connects the gradient of argument `i` to the graphs of that argument and of the upstream gradients, so
// that any second derivative raises `message`.
inline void refuse_second_derivative(const Tensor& grad, size_t i, const torch::autograd::variable_list& upstream,
                                     const std::string& message) {
  if (!at::GradMode::is_enabled()) {
    return;
  }
  torch::autograd::edge_list edges{torch::autograd::get_current_node()->next_edge(i)};
  for (const auto& u : upstream) {
    if (u.defined()) {
      edges.push_back(torch::autograd::impl::gradient_edge(u));
    }
  }
  set_refusing_history(grad, message, std::move(edges));
}

}  // namespace npu_xent::autograd
