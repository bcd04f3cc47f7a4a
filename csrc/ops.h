// Typed calls of the operators. Implementations call each other through these, so that every call is dispatched to the
// device of its tensors, and to tracing, fake tensors and functionalization if active. ops.cpp has the schemas and the
// meaning of each argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <tuple>
#include <type_traits>

#include "adaptor.h"

namespace npu_xent {

// Operands of the gradient besides the logits, the target and the weight.
struct ForGrad {
  Tensor lse;
  OptionalTensor lse_low, totals;                         // totals: for a mean or label smoothing
  OptionalTensor grad_loss, grad_z_loss, grad_lse;        // upstream gradients; none: zeros
  OptionalTensor row_temperature, entropy, grad_entropy;  // entropy: if it has a gradient

  template <typename Self>
  static auto tie(Self& s) {
    return std::tie(s.lse, s.lse_low, s.totals, s.grad_loss, s.grad_z_loss, s.grad_lse, s.row_temperature, s.entropy,
                    s.grad_entropy);
  }
};

// The requested statistics besides lse, lse_low and picked.
struct StatsWanted {
  bool wsum = false, entropy = false, top1 = false;
  bool read_ignored = false;  // ignored rows have lse, lse_low and entropy too

  template <typename Self>
  static auto tie(Self& s) {
    return std::tie(s.wsum, s.entropy, s.top1, s.read_ignored);
  }
};

// lse, lse_low, picked, wsum, log_prob, entropy, top1
using RowStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using RowStatsGrad = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // lse, lse_low, picked, wsum, grad
using StatsOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;          // lse, lse_low, picked, wsum
using Reduced = std::tuple<Tensor, Tensor, Tensor>;                       // loss, z_loss, totals
using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;                  // loss, z_loss, lse, log_prob
using LossWithLse = std::tuple<Tensor, Tensor, Tensor>;                   // loss, z_loss, lse
using TokenLogProbs = std::tuple<Tensor, Tensor, Tensor>;                 // log_probs, entropy, top1
using LinearGrad = std::tuple<Tensor, Tensor, Tensor>;  // grad_input, grad_linear_weight, grad_linear_bias
// lse, lse_low, picked, wsum, entropy, top1
using LinearStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// StatsOutputs, then LinearGrad.
using LinearStatsGrad = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The return type of an operator's two variants: with `over_logits` the gradient is written over the logits.
template <bool over_logits>
using GradOf = std::conditional_t<over_logits, void, Tensor>;
template <bool over_logits>
using StatsGradOf = std::conditional_t<over_logits, StatsOutputs, RowStatsGrad>;

RowStats row_stats(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& row_temperature, bool need_log_prob, const StatsWanted& wanted);

// row_grad, row_grad_
template <bool over_logits>
GradOf<over_logits> row_grad(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                             const ForGrad& operands);

// row_stats_grad, row_stats_grad_
template <bool over_logits>
StatsGradOf<over_logits> row_stats_grad(const Options& o, const Tensor& logits, const Tensor& target,
                                        const OptionalTensor& weight, const Tensor& totals, bool read_ignored);

Reduced reduce_rows(const Options& o, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& lse,
                    const OptionalTensor& lse_low, const OptionalTensor& picked, const OptionalTensor& wsum,
                    const OptionalTensor& totals, at::ScalarType loss_dtype);

// lse, lse_low, cross, part_sum
using ProbStats = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ProbGrads = std::tuple<Tensor, Tensor>;  // grad_logits, grad_probabilities

ProbStats prob_row_stats(const Options& o, const Tensor& logits, const Tensor& probabilities,
                         const OptionalTensor& weight);
ProbGrads prob_row_grad(const Options& o, const Tensor& logits, const Tensor& probabilities,
                        const OptionalTensor& weight, const Tensor& lse, const Tensor& lse_low, const Tensor& part_sum,
                        const Tensor& grad_loss, const Tensor& grad_lse, std::array<bool, 2> output_mask);

void scale_(const Tensor& self, const Tensor& factor);

// cross_entropy, cross_entropy_
template <bool over_logits>
Loss cross_entropy(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   std::optional<at::ScalarType> loss_dtype, bool need_lse, bool need_log_prob,
                   bool differentiable_z_loss);

// The first arguments of the linear_* operators: the logits are input times linear_weight, plus linear_bias.
struct LinearRows {
  Tensor input, linear_weight;
  OptionalTensor linear_bias;
  Tensor target;
  OptionalTensor weight;
  std::optional<int64_t> chunk_rows;
};

LinearStats linear_row_stats(const Options& o, const Tensor& input, const Tensor& linear_weight,
                             const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                             const OptionalTensor& row_temperature, std::optional<int64_t> chunk_rows,
                             const StatsWanted& wanted);

LinearGrad linear_row_grad(const Options& o, const Tensor& input, const Tensor& linear_weight,
                           const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                           const ForGrad& operands, std::optional<int64_t> chunk_rows, std::array<bool, 3> output_mask);

LinearStatsGrad linear_row_stats_grad(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                      const OptionalTensor& linear_bias, const Tensor& target,
                                      const OptionalTensor& weight, const Tensor& totals,
                                      std::optional<int64_t> chunk_rows, bool read_ignored,
                                      std::array<bool, 3> output_mask);

LossWithLse prob_cross_entropy(const Options& o, const Tensor& logits, const Tensor& probabilities,
                               const OptionalTensor& weight, std::optional<at::ScalarType> loss_dtype, bool need_lse);

LossWithLse linear_cross_entropy(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                 const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                                 std::optional<int64_t> chunk_rows, std::optional<at::ScalarType> loss_dtype,
                                 bool need_lse);

// token_log_probs, token_log_probs_
template <bool over_logits>
TokenLogProbs token_log_probs(const Options& o, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& row_temperature, bool need_entropy, bool need_top1);

TokenLogProbs linear_token_log_probs(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                     const OptionalTensor& linear_bias, const Tensor& target,
                                     const OptionalTensor& row_temperature, bool need_entropy, bool need_top1,
                                     std::optional<int64_t> chunk_rows);

Tensor selected_log_probs(const Options& o, const Tensor& logits, const Tensor& index,
                          const OptionalTensor& row_temperature);

// fp32, or fp64 for fp64 logits.
inline at::ScalarType stats_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// An output that was not requested.
inline Tensor not_wanted(const at::TensorOptions& options) {
  return at::empty({0}, options);
}

}  // namespace npu_xent
