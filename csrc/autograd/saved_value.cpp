// What a compiler's trace keeps of a tensor for the backward.
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/common.h"

namespace npu_xent::autograd {

// Under functionalization an in-place change gives a FunctionalTensor a new value. Another FunctionalTensor around the
// present value keeps that, at no cost in the graph, where a clone could cost a copy of the logits.
Tensor value_to_save(const Tensor& t) {
  using c10::impl::TorchDispatchModeKey;
  if (!c10::impl::TorchDispatchModeTLS::get_mode(TorchDispatchModeKey::FUNCTIONAL).has_value()) {
    return t;
  }
  pybind11::gil_scoped_acquire gil;
  const auto functional = pybind11::cast(t);
  if (!pybind11::hasattr(functional, "from_functional")) {
    return t;
  }
  return functional.attr("to_functional")(functional.attr("from_functional")()).cast<Tensor>();
}

}  // namespace npu_xent::autograd
