// Kernels for the dispatcher: operators of npu tensors on the host.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/Device.h>

#include "kernels.h"

namespace cann_sim_torch {

using Stack = std::vector<c10::IValue>;

// Runs the operator's CPU kernel on aliases of its npu tensors, as a task of the current stream.
void host_kernel(const c10::OperatorHandle& op, Stack* stack);
// Raises: the simulator has no implementation of this operator.
void missing_kernel(const c10::OperatorHandle& op, Stack* stack);

// copies.cpp
void keep_copy(Kernel torch_npu_copy);
void copy_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack);
at::Tensor contiguous_kernel(const at::Tensor& self, at::MemoryFormat format);

// recurrent.cpp
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& input_gates, const at::Tensor& hidden_gates,
                                                         const at::Tensor& cell,
                                                         const std::optional<at::Tensor>& input_bias,
                                                         const std::optional<at::Tensor>& hidden_bias);
std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& input_gates, const at::Tensor& hidden_gates,
                                            const at::Tensor& hidden, const std::optional<at::Tensor>& input_bias,
                                            const std::optional<at::Tensor>& hidden_bias);

// tensors.cpp
void allocating_kernel(const Kernel& kernel, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                       Stack* stack);  // calls torch_npu's kernel, which allocates
// Flushes the task queue and reports the device's tensors to the runtime now. Do not call inside a Task.
void settle_tensors(c10::DeviceIndex device);
void settle_all_tensors();

// While alive, this thread's allocations wait for settle_tensors, which is faster than the task queue.
struct SettledLater {
  SettledLater();
  ~SettledLater();
};

}  // namespace cann_sim_torch
