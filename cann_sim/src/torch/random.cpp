// See random.h.
#include "random.h"

#include <mutex>

#include <ATen/CPUGeneratorImpl.h>

#include "torch_npu/csrc/aten/NPUGeneratorImpl.h"

namespace cann_sim_torch {
namespace {

constexpr uint64_t kStep = 4;  // torch_npu's offsets are multiples of four

std::recursive_mutex default_generator_mutex;

uint64_t mixed(uint64_t seed, uint64_t offset) {  // splitmix64
  uint64_t z = seed + 0x9e3779b97f4a7c15u * (offset / kStep + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace

at::Generator cpu_generator(const std::optional<at::Generator>& generator, c10::Device device) {
  if (generator && generator->defined() && generator->device().is_cpu()) {
    TORCH_CHECK(false, "Expected a 'npu' device type for generator but found 'cpu'");
  }
  const bool given = generator && generator->defined();
  at::Generator npu = given ? *generator : at_npu::detail::getDefaultNPUGenerator(device.index());
  auto* impl = at::check_generator<at_npu::NPUGeneratorImpl>(npu);
  std::lock_guard<std::mutex> lock(impl->mutex_);
  const auto [seed, offset] = impl->philox_engine_inputs(kStep);
  return at::detail::createCPUGenerator(mixed(seed, offset));
}

DefaultGeneratorGuard::DefaultGeneratorGuard(c10::Device device) {
  const at::Generator drawn = cpu_generator(std::nullopt, device);
  default_generator_mutex.lock();
  at::Generator shared = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> lock(shared.mutex());
  saved_ = shared.get_state();
  shared.set_state(drawn.get_state());
}

DefaultGeneratorGuard::~DefaultGeneratorGuard() {
  at::Generator shared = at::detail::getDefaultCPUGenerator();
  {
    std::lock_guard<std::mutex> lock(shared.mutex());
    shared.set_state(saved_);
  }
  default_generator_mutex.unlock();
}

}  // namespace cann_sim_torch
