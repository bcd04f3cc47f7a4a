// Typed calls of the operators. Every implementation calls the others through these, so that each call is dispatched:
// to the device of its tensors, and to tracing, fake tensors and functionalisation when they are on. The schemas, with
// the meaning of each argument, are in ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace npu_xent {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// (lse, lse_low, picked, wsum, log_prob)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats(const Tensor& logits, const Tensor& target,
                                                             const OptionalTensor& weight, int64_t ignore_index,
                                                             double logit_scale, std::optional<double> softcap,
                                                             c10::SymInt class_start,
                                                             std::optional<c10::SymInt> num_classes, bool need_wsum,
                                                             bool need_log_prob, bool read_ignored);

Tensor row_grad(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
                const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
                const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index,
                double label_smoothing, double lse_square_scale, double logit_scale, std::optional<double> softcap,
                std::optional<double> grad_scale, c10::SymInt class_start, std::optional<c10::SymInt> num_classes);

void row_grad_(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
               const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
               const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index,
               double label_smoothing, double lse_square_scale, double logit_scale, std::optional<double> softcap,
               std::optional<double> grad_scale, c10::SymInt class_start, std::optional<c10::SymInt> num_classes);

// (lse, lse_low, picked, wsum, grad)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_grad(const Tensor& logits, const Tensor& target,
                                                                  const OptionalTensor& weight, const Tensor& totals,
                                                                  std::string_view reduction, int64_t ignore_index,
                                                                  double label_smoothing, double lse_square_scale,
                                                                  double logit_scale, std::optional<double> softcap,
                                                                  std::optional<double> grad_scale, bool read_ignored);

// (lse, lse_low, picked, wsum)
std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_grad_(const Tensor& logits, const Tensor& target,
                                                           const OptionalTensor& weight, const Tensor& totals,
                                                           std::string_view reduction, int64_t ignore_index,
                                                           double label_smoothing, double lse_square_scale,
                                                           double logit_scale, std::optional<double> softcap,
                                                           std::optional<double> grad_scale, bool read_ignored);

// (loss, z_loss, totals)
std::tuple<Tensor, Tensor, Tensor> reduce_rows(const Tensor& target, const OptionalTensor& weight,
                                               const OptionalTensor& lse, const OptionalTensor& lse_low,
                                               const OptionalTensor& picked, const OptionalTensor& wsum,
                                               const OptionalTensor& totals, std::string_view reduction,
                                               int64_t ignore_index, double label_smoothing, double lse_square_scale,
                                               c10::SymInt num_classes, at::ScalarType loss_dtype);

void scale_(const Tensor& self, const Tensor& factor);

// (loss, z_loss, lse, log_prob); `inplace` calls cross_entropy_, which leaves the gradient in the logits.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    bool inplace, const Tensor& logits, const Tensor& target, const OptionalTensor& weight, std::string_view reduction,
    int64_t ignore_index, double label_smoothing, double lse_square_scale, double logit_scale,
    std::optional<double> softcap, std::optional<double> grad_scale, std::optional<at::ScalarType> loss_dtype,
    bool need_lse, bool need_log_prob, bool differentiable_z_loss);

// What the linear_* operators have in common: rows whose logits are input times linear_weight, plus linear_bias.
struct LinearRows {
  Tensor input, linear_weight;
  OptionalTensor linear_bias;
  Tensor target;
  OptionalTensor weight;
  int64_t ignore_index;
  std::optional<double> softcap;
  std::optional<int64_t> chunk_rows;
};

// (lse, lse_low, picked, wsum)
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_row_stats(const LinearRows& rows, bool need_wsum, bool read_ignored);

// (grad_input, grad_linear_weight, grad_linear_bias)
std::tuple<Tensor, Tensor, Tensor> linear_row_grad(const LinearRows& rows, const Tensor& lse,
                                                   const OptionalTensor& lse_low, const Tensor& totals,
                                                   const OptionalTensor& grad_loss, const OptionalTensor& grad_z_loss,
                                                   std::string_view reduction, double label_smoothing,
                                                   double lse_square_scale, std::array<bool, 3> output_mask);

// (lse, lse_low, picked, wsum, grad_input, grad_linear_weight, grad_linear_bias)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_row_stats_grad(
    const LinearRows& rows, const Tensor& totals, std::string_view reduction, double label_smoothing,
    double lse_square_scale, bool read_ignored, std::array<bool, 3> output_mask);

// (loss, z_loss, lse)
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const LinearRows& rows, std::string_view reduction,
                                                        double label_smoothing, double lse_square_scale,
                                                        std::optional<at::ScalarType> loss_dtype, bool need_lse);

// fp32, or fp64 for fp64.
inline at::ScalarType stats_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace npu_xent
