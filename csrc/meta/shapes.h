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

}  // namespace npu_xent::meta
