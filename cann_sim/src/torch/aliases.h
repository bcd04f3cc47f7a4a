// CPU tensors over the memory of npu tensors: simulated device memory is host memory, so a CPU kernel given the alias
// reads and writes the npu tensor itself. Views of one storage become views of one alias, as overlap checks expect.
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

  // The alias of an npu tensor; any other tensor as it is.
  at::Tensor to_cpu(const at::Tensor& tensor, bool written);
  // The npu tensor that an alias stands for; a CPU tensor that is no alias becomes a new npu tensor, which wants write.
  at::Tensor to_npu(const at::Tensor& tensor, c10::Device device);
  // What a kernel left on the CPU: the new tensors, and those whose aliases it has resized (out=), which get the
  // aliases' sizes here. All of them want write.
  std::vector<Pair> arriving() const;
  static void write(const Pair& pair);

  const std::vector<Pair>& pairs() const { return pairs_; }

 private:
  std::vector<Pair> pairs_, new_;
  std::unordered_map<const void*, size_t> by_npu_, by_cpu_;
  std::unordered_map<const void*, c10::Storage> storages_;
};

}  // namespace cann_sim_torch
