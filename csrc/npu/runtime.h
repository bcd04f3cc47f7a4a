// What the operators need from torch_npu and from the device's runtime; runtime.cpp alone includes their headers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

namespace npu_xent::npu {

// Opens the library of device kernels, before the first launch; RuntimeError if it cannot be loaded.
void load_kernels(const std::string& path);

// The launcher of a kernel of that library.
void* find_launcher(const char* kernel);

// Vector cores of a device, as its runtime tells.
int64_t core_count(c10::Device device);

// The device's current stream, as launchers take it.
void* current_stream(c10::Device device);

// Puts `task` into the current stream's queue. It launches, and returns 0 or the error it met. Nothing is waited for: a
// launch outside of that queue would overtake the operators that wait in it.
void enqueue(const char* name, std::function<int()> task);

// Whether elements lie in memory in the order of the tensor's strides, as in all formats but the device's own ones.
bool has_plain_format(const at::Tensor& tensor);
at::Tensor to_plain_format(const at::Tensor& tensor);

}  // namespace npu_xent::npu
