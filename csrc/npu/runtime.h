// The operators' interface to torch_npu and the device runtime; only runtime.cpp includes their headers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

namespace npu_xent::npu {

// Opens the library of device kernels; call it before the first launch. RuntimeError if it cannot be loaded.
void load_kernels(const std::string& path);

// The launcher of a kernel of that library.
void* find_launcher(const char* kernel);

// The number of vector cores of a device, from the runtime.
int64_t core_count(c10::Device device);

// The device's current stream.
void* current_stream(c10::Device device);

// Puts `task` into the current stream's queue, without waiting; the task launches a kernel and returns 0 or an error
// code. A launch outside the queue would overtake the operators in it.
void enqueue(const char* name, std::function<int()> task);

// Whether the tensor's strides describe its memory; false for the device's own formats.
bool has_plain_format(const at::Tensor& tensor);
at::Tensor to_plain_format(const at::Tensor& tensor);

}  // namespace npu_xent::npu
