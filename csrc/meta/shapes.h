// Outputs without values, in the shapes and dtypes of eager execution; sizes may be symbolic.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "checks.h"
#include "ops.h"

namespace npu_xent::meta {

inline at::TensorOptions stats_options(const Tensor& logits) {
  return logits.options().dtype(stats_dtype(logits.scalar_type()));
}

// [N], or [0] when not wanted.
inline Tensor empty_rows(const Tensor& logits, bool wanted = true) {
  return at::empty_symint({wanted ? logits.sym_size(0) : c10::SymInt(0)}, stats_options(logits));
}

// [N, C], contiguous.
inline Tensor empty_logits(const Tensor& logits) {
  return at::empty_symint({logits.sym_size(0), logits.sym_size(1)}, logits.options());
}

// The gradients of input, linear_weight and linear_bias, contiguous; [0] where not wanted.
inline std::tuple<Tensor, Tensor, Tensor> empty_linear_grads(const LinearRows& rows, std::array<bool, 3> wanted) {
  const auto& options = rows.input.options();
  const auto empty = [&](bool is_wanted, c10::SymIntArrayRef sizes) {
    return is_wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  return {empty(wanted[0], rows.input.sym_sizes()), empty(wanted[1], rows.linear_weight.sym_sizes()),
          empty(wanted[2], {rows.linear_weight.sym_size(0)})};
}

}  // namespace npu_xent::meta
