// CPU tensors that alias npu tensors. Simulated device memory is host memory, so a CPU kernel reads and writes the npu
// tensor through the alias. Views of one storage become views of one alias, as overlap checks expect.
#pragma once

#include <unordered_map>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

namespace cann_sim_torch {

class Aliases {
 public:
  struct Pair {
    at::Tensor cpu, npu;
    bool written;
  };

  // The alias of an npu tensor; any other tensor unchanged.
  at::Tensor to_cpu(const at::Tensor& tensor, bool written);
  // The npu tensor of an alias. For any other CPU tensor a new npu tensor, which write() must fill.
  at::Tensor to_npu(const at::Tensor& tensor, c10::Device device);
  // Tensors whose results are still on the CPU: new tensors, and tensors whose aliases the kernel resized (out=), which
  // are resized here. write() must fill all of them.
  std::vector<Pair> arriving() const;
  static void write(const Pair& pair);

  const std::vector<Pair>& pairs() const { return pairs_; }

 private:
  std::vector<Pair> pairs_, new_;
  std::unordered_map<const void*, size_t> by_npu_, by_cpu_;
  std::unordered_map<const void*, c10::Storage> storages_;
};

}  // namespace cann_sim_torch
