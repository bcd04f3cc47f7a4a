// Launching the device kernels: one struct for each, which names its tensors in the order of the kernel's parameters.
// Undefined tensors are passed as null.
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
  Tensor logits, target, weight, lse, lse_low, picked, wsum, part_weight, log_prob;

  auto tensors() const {
    return std::array{&logits, &target, &weight, &lse, &lse_low, &picked, &wsum, &part_weight, &log_prob};
  }
};

struct RowGradKernel {
  static constexpr const char* kName = "npu_xent_row_grad";
  Tensor logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, grad;

  auto tensors() const {
    return std::array{&logits, &target, &weight, &lse, &lse_low, &totals, &grad_loss, &grad_z_loss, &grad};
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
      totals, loss, z_loss, sums;

  auto tensors() const {
    return std::array{&target,      &weight,    &lse,         &lse_low, &picked, &wsum,   &part_lse, &part_lse_low,
                      &part_picked, &part_wsum, &part_weight, &totals,  &loss,   &z_loss, &sums};
  }
};

struct ScaleKernel {
  static constexpr const char* kName = "npu_xent_scale";
  Tensor x, factor;

  auto tensors() const { return std::array{&x, &factor}; }
};

template <size_t>
using Pointer = void*;

// The launcher that the toolkit generates for a kernel: structs that it takes by value are passed by address.
template <typename... Structs, size_t... I>
uint32_t call_launcher(void* launcher, uint32_t blocks, void* stream, const std::array<void*, sizeof...(I)>& pointers,
                       std::index_sequence<I...>, Structs&... structs) {
  using Launcher = uint32_t (*)(uint32_t, void*, Pointer<I>..., Structs*...);
  return reinterpret_cast<Launcher>(launcher)(blocks, stream, pointers[I]..., &structs...);
}

// Launches on the current stream of `device`, on as many cores as there are pieces of work. `structs`: XentPlan and
// XentArgs, or XentArgs alone.
template <typename Kernel, typename... Structs>
void launch(const Kernel& kernel, c10::Device device, int64_t work, const Structs&... structs) {
  static void* const launcher = find_launcher(Kernel::kName);
  const auto tensors = kernel.tensors();
  constexpr size_t n = std::tuple_size_v<std::decay_t<decltype(tensors)>>;
  const auto blocks = static_cast<uint32_t>(std::clamp<int64_t>(work, 1, core_count(device)));
  void* const stream = current_stream(device);
  // Pointers alone: memory that is given back meanwhile is taken again in the order of the queue and the stream, as
  // with torch_npu's own operators. Holding it until the launch would keep it from whoever comes next.
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
