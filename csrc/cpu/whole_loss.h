// The loss of whole rows on the CPU in one call, without the dispatcher between its parts: for small inputs calls cost
// more than arithmetic.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "loss.h"

namespace npu_xent::cpu {

// Whether operators on these tensors would reach the CPU's kernels at once: no mode, transform or profiler would
// intercept them.
bool unobserved(const Tensor& a, const Tensor& b, const OptionalTensor& c = std::nullopt);

enum class Gradient { none, fresh, over_logits };

// For "mean" and "sum" and checked arguments. `grad` is the gradient for an upstream gradient of 1. log_prob is empty,
// as lse is unless wanted; lse_low and totals are undefined.
LossAndStats whole_loss(const Options& options, const Tensor& logits, const Tensor& target,
                        const OptionalTensor& weight, const Wanted& wanted, Gradient gradient);

// scale_
void scale(const Tensor& self, const Tensor& factor);

}  // namespace npu_xent::cpu
