// Tensors in the memory of output_memory.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace npu_xent {

// at::empty({rows, columns}, options), but large CPU tensors use the memory of output_memory.h.
at::Tensor empty_output(int64_t rows, int64_t columns, const at::TensorOptions& options);

}  // namespace npu_xent
