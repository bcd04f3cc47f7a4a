// The primitives on an NPU, registered by module.cpp.
#pragma once

#include <torch/library.h>

namespace npu_xent::npu {

// Raises RuntimeError unless a kernel runs. A launcher whose binary does not suit this chip returns 0 without
// launching, so this checks a result.
void try_a_kernel();

void register_operators(torch::Library& m);

}  // namespace npu_xent::npu
