// The primitives on an NPU, for module.cpp to take into use.
#pragma once

#include <torch/library.h>

namespace npu_xent::npu {

// RuntimeError unless a kernel runs: a launcher returns 0 without a launch when its binary was not accepted for this
// chip, so only a result tells.
void try_a_kernel();

void register_operators(torch::Library& m);

}  // namespace npu_xent::npu
