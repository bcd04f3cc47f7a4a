// The primitives are not differentiable. Without an Autograd kernel their outputs would silently be constants; this
// kernel runs them and connects their outputs to a graph node that raises when it is differentiated.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"

namespace npu_xent::autograd {
namespace {

using torch::jit::Stack;

void refuse_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const auto& schema = op.schema();
  const size_t n_arguments = schema.arguments().size();
  std::vector<at::Tensor> differentiable, written;
  for (size_t i = 0; i < n_arguments; ++i) {
    const auto& value = torch::jit::peek(*stack, i, n_arguments);
    if (!value.isTensor() || !value.toTensor().defined()) {
      continue;
    }
    const auto& tensor = value.toTensor();
    TORCH_CHECK(!torch::autograd::isFwGradDefined(tensor), schema.operator_name().name,
                " has no forward-mode derivative; use torch.nn.functional.cross_entropy.");
    if (at::GradMode::is_enabled() && tensor.requires_grad()) {
      differentiable.push_back(tensor);
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias != nullptr && alias->isWrite()) {
        written.push_back(tensor);
      }
    }
  }
  const auto message = schema.operator_name().name +
                       " is not differentiable: double backward through npu_xent is not supported, and the first "
                       "derivative comes from the functions of npu_xent, such as npu_xent.cross_entropy. Use "
                       "torch.nn.functional.cross_entropy where a second derivative is needed, without "
                       "npu_xent.patch_torch(), which replaces it.";
  // Traces of a forward and its backward scale a gradient that they take for differentiable.
  const bool scales = schema.operator_name().name == "npu_xent::scale_";
  for (const auto& tensor : written) {
    TORCH_CHECK(scales && !tensor.is_leaf(), message);
  }
  {
    at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (differentiable.empty()) {
    return;
  }
  const auto edges = torch::autograd::collect_next_edges(differentiable);
  for (auto& value : torch::jit::last(*stack, schema.returns().size())) {
    const auto& output = value.toTensor();
    if (output.defined() && at::isFloatingType(output.scalar_type())) {
      set_refusing_history(output, message, edges);
    }
  }
  for (const auto& tensor : written) {
    const auto node = make_node<torch::autograd::Error>(message, edges);
    node->add_input_metadata(tensor);
    torch::autograd::impl::rebase_history(tensor, torch::autograd::Edge(node, 0));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  for (const char* name :
       {"row_stats", "row_grad", "row_grad_", "row_stats_grad", "row_stats_grad_", "reduce_rows", "scale_",
        "prob_row_stats", "prob_row_grad", "linear_row_stats", "linear_row_grad", "linear_row_stats_grad"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_gradient>());
  }
}

}  // namespace npu_xent::autograd
