// Primitives composed of aten operations (composite.cpp) that autograd can differentiate.
#pragma once

#include "ops.h"

namespace npu_xent::composite {

ProbStats prob_row_stats(const Options& o, const Tensor& logits, const Tensor& probabilities,
                         const OptionalTensor& weight);
ProbGrads prob_row_grad(const Options& o, const Tensor& logits, const Tensor& probabilities,
                        const OptionalTensor& weight, const Tensor& lse, const Tensor& lse_low, const Tensor& part_sum,
                        const Tensor& grad_loss, const Tensor& grad_lse, std::array<bool, 2> output_mask);

}  // namespace npu_xent::composite
