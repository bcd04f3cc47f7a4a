// Tensors in the memory of output_memory.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace npu_xent {

// As at::empty({rows, columns}, options), with the memory of output_memory.h for large tensors on the CPU.
at::Tensor empty_output(int64_t rows, int64_t columns, const at::TensorOptions& options);

}  // namespace npu_xent
