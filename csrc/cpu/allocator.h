// Tensors in the memory of memory.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace npu_xent::cpu {

// As at::empty({rows, columns}, options) on the CPU.
at::Tensor empty_output(int64_t rows, int64_t columns, const at::TensorOptions& options);

}  // namespace npu_xent::cpu
