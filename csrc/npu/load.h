// Taking the device kernels into use.
#pragma once

#include <torch/library.h>

#include <string>

namespace npu_xent::npu {

// Loads the library of device kernels, runs one of them to see that they run here, and only then registers the
// operators. RuntimeError otherwise, with nothing registered: npu tensors stay with the composite. Once per process.
void load(const std::string& path);

void register_row_stats(torch::Library& m);
void register_row_grad(torch::Library& m);
void register_row_stats_grad(torch::Library& m);
void register_reduce_rows(torch::Library& m);
void register_scale(torch::Library& m);

}  // namespace npu_xent::npu
