// Random numbers: an operator draws on the CPU from a stream that its npu generator's seed and offset determine, and
// moves the offset on. So torch.manual_seed, rng states and checkpointing work, and the CPU's own numbers are not used
// up.
#pragma once

#include <optional>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

namespace cann_sim_torch {

// A CPU generator in the place of `generator`, or of the device's default one where it is not given.
at::Generator cpu_generator(const std::optional<at::Generator>& generator, c10::Device device);

// While alive, the CPU's default generator is such a one: for random operators that take no generator.
class DefaultGeneratorGuard {
 public:
  explicit DefaultGeneratorGuard(c10::Device device);
  ~DefaultGeneratorGuard();
  DefaultGeneratorGuard(const DefaultGeneratorGuard&) = delete;
  DefaultGeneratorGuard& operator=(const DefaultGeneratorGuard&) = delete;

 private:
  at::Tensor saved_;
};

}  // namespace cann_sim_torch
