// The primitives out of aten operations, for every device that has no kernels of its own. Same formulas (row_math.h),
// same results up to rounding; nothing waits for the device, so a target out of range cannot raise: it makes its row
// NaN.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include <limits>

#include "checks.h"
#include "ops.h"

namespace npu_xent::composite {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What each target is, as masks [N].
struct Targets {
  Tensor kept;      // a class of some shard
  Tensor bad;       // neither a class nor ignore_index
  Tensor in_shard;  // one of these columns,
  Tensor column;    // this one (0 if not)
  Tensor safe;      // the target, 0 where it is not a class

  Targets(const Tensor& target, int64_t ignore_index, int64_t class_start, int64_t n_cols, int64_t num_classes) {
    const auto is_class = target.ge(0).logical_and(target.lt(num_classes));
    const auto named = target.ne(ignore_index);
    kept = is_class.logical_and(named);
    bad = named.logical_and(is_class.logical_not());
    safe = target.masked_fill(kept.logical_not(), 0);
    const auto local = target - class_start;
    in_shard = kept.logical_and(local.ge(0)).logical_and(local.lt(n_cols));
    column = local.masked_fill(in_shard.logical_not(), 0);
  }
};

// What the softmax sees of the logits, in the statistics dtype.
inline Tensor mapped(const Tensor& logits, double logit_scale, std::optional<double> softcap) {
  const auto x = logits.to(stats_dtype(logits.scalar_type()));
  const auto scaled = logit_scale == 1 ? x : x * logit_scale;
  return softcap ? (scaled / *softcap).tanh() * *softcap : scaled;
}

// The weight of each row's target.
inline Tensor target_weight(const OptionalTensor& weight, const Targets& targets, at::ScalarType dtype) {
  return weight ? weight->to(dtype).index_select(0, targets.safe)
                : at::full({1}, 1.0, targets.kept.options().dtype(dtype));
}

}  // namespace npu_xent::composite
