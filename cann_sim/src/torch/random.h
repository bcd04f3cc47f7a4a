// Random numbers: an operator uses a CPU generator seeded by its npu generator's seed and offset, and advances the
// offset. So torch.manual_seed, rng states and checkpointing work, and the CPU's default generator does not advance.
#pragma once

#include <optional>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

namespace cann_sim_torch {

// A CPU generator that replaces `generator`, or the device's default generator if not given.
at::Generator cpu_generator(const std::optional<at::Generator>& generator, c10::Device device);

// While alive, replaces the CPU's default generator by such a generator, for operators that take no generator.
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
