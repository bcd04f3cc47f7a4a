// A kernel of the dispatcher, to keep when another replaces it: c10::SafeKernelFunction, or c10::KernelFunction with
// torch up to 2.8, which has no public way to get one.
#pragma once

#include <utility>

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace cann_sim_torch {

// An explicit instantiation may name a private member.
struct OperatorDefinition {
  friend auto member(OperatorDefinition);
};
template <auto found>
struct Expose {
  friend auto member(OperatorDefinition) { return found; }
};
template struct Expose<&c10::OperatorHandle::operatorDef_>;

// The kernel that a call of `op` with this key runs.
template <typename Handle>
auto computed_kernel(const Handle& op, c10::DispatchKey key) {
  if constexpr (requires { op.getComputedKernelForDispatchKey(key); }) {
    return op.getComputedKernelForDispatchKey(key);
  } else {
    return c10::KernelFunction((op.*member(OperatorDefinition{}))->op.lookup(c10::DispatchKeySet(key)));
  }
}

using Kernel = decltype(computed_kernel(std::declval<const c10::OperatorHandle&>(), std::declval<c10::DispatchKey>()));

}  // namespace cann_sim_torch
