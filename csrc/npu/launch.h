// Launching the device kernels. Each kernel has a struct that lists its tensors in the order of the kernel's
// parameters; undefined tensors are passed as null.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <utility>

#include "npu/runtime.h"
#include "tiling/row_args.h"
#include "tiling/row_plan.h"

namespace npu_xent::npu {

using at::Tensor;

struct RowStatsKernel {
  static constexpr const char* kName = "npu_xent_row_stats";
  Tensor logits, target, weight, row_scale, lse, lse_low, picked, wsum, part_weight, entropy, top1, log_prob;

  auto tensors() const {
    return std::array{&logits, &target, &weight,      &row_scale, &lse,  &lse_low,
                      &picked, &wsum,   &part_weight, &entropy,   &top1, &log_prob};
  }
};

struct RowGradKernel {
  static constexpr const char* kName = "npu_xent_row_grad";
  Tensor logits, target, weight, row_scale, lse, lse_low, entropy, totals, grad_loss, grad_z_loss, grad_entropy, grad;

  auto tensors() const {
    return std::array{&logits,  &target, &weight,    &row_scale,   &lse,          &lse_low,
                      &entropy, &totals, &grad_loss, &grad_z_loss, &grad_entropy, &grad};
  }
};

struct RowStatsGradKernel {
  static constexpr const char* kName = "npu_xent_row_stats_grad";
  Tensor logits, target, weight, totals, lse, lse_low, picked, wsum, grad;

  auto tensors() const { return std::array{&logits, &target, &weight, &totals, &lse, &lse_low, &picked, &wsum, &grad}; }
};

struct ReduceRowsKernel {
  static constexpr const char* kName = "npu_xent_reduce_rows";
  Tensor target, weight, lse, lse_low, picked, wsum, part_lse, part_lse_low, part_picked, part_wsum, part_weight,
      totals, loss, z_loss, sums, entropy, top1, part_entropy, part_top1;

  auto tensors() const {
    return std::array{&target,       &weight,      &lse,       &lse_low,      &picked,   &wsum, &part_lse,
                      &part_lse_low, &part_picked, &part_wsum, &part_weight,  &totals,   &loss, &z_loss,
                      &sums,         &entropy,     &top1,      &part_entropy, &part_top1};
  }
};

struct ScaleKernel {
  static constexpr const char* kName = "npu_xent_scale";
  Tensor x, factor;

  auto tensors() const { return std::array{&x, &factor}; }
};

template <size_t>
using Pointer = void*;

// Calls the launcher that the toolkit generates for a kernel. It takes the kernel's struct parameters by address.
template <typename... Structs, size_t... I>
uint32_t call_launcher(void* launcher, uint32_t blocks, void* stream, const std::array<void*, sizeof...(I)>& pointers,
                       std::index_sequence<I...>, Structs&... structs) {
  using Launcher = uint32_t (*)(uint32_t, void*, Pointer<I>..., Structs*...);
  return reinterpret_cast<Launcher>(launcher)(blocks, stream, pointers[I]..., &structs...);
}

// Launches on the current stream of `device`, on at most `work` cores. `structs`: XentPlan and XentArgs, or XentArgs
// alone.
template <typename Kernel, typename... Structs>
void launch(const Kernel& kernel, c10::Device device, int64_t work, const Structs&... structs) {
  static void* const launcher = find_launcher(Kernel::kName);
  const auto tensors = kernel.tensors();
  constexpr size_t n = std::tuple_size_v<std::decay_t<decltype(tensors)>>;
  const auto blocks = static_cast<uint32_t>(std::clamp<int64_t>(work, 1, core_count(device)));
  void* const stream = current_stream(device);
  // Capture pointers, not tensors, as torch_npu's own operators do. Memory freed before the launch can only be reused
  // by later work of the same queue and stream; holding it until the launch would delay that reuse.
  std::array<void*, n> pointers{};
  for (size_t i = 0; i < n; ++i) {
    if (tensors[i]->defined() && tensors[i]->numel() != 0) {
      pointers[i] = tensors[i]->data_ptr();
    }
  }
  enqueue(Kernel::kName, [blocks, stream, pointers, structs...]() mutable -> int {
    return static_cast<int>(
        call_launcher(launcher, blocks, stream, pointers, std::make_index_sequence<n>(), structs...));
  });
}

}  // namespace npu_xent::npu
