// Meta kernels: shapes and dtypes of the outputs, as in eager execution; sizes may be symbolic.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "ops.h"

namespace npu_xent::meta {
namespace {

// [N] in the statistics dtype, or [0] when not wanted.
Tensor empty_rows(const Tensor& logits, bool wanted = true) {
  return at::empty_symint({wanted ? n_rows(logits) : c10::SymInt(0)},
                          logits.options().dtype(stats_dtype(logits.scalar_type())));
}

// [N, C], contiguous; or [B, R, C] with adjacent rows.
Tensor empty_logits(const Tensor& logits) {
  if (logits.dim() == 2) {
    return at::empty_symint(logits.sym_sizes(), logits.options());
  }
  return at::empty_symint({logits.sym_size(0), logits.sym_size(2), logits.sym_size(1)}, logits.options())
      .transpose(1, 2);
}

// The gradients of input, linear_weight and linear_bias, contiguous; [0] where not wanted.
LinearGrad empty_linear_grads(const LinearRows& rows, std::array<bool, 3> wanted) {
  const auto& options = rows.input.options();
  const auto empty = [&](bool is_wanted, c10::SymIntArrayRef sizes) {
    return is_wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  return {empty(wanted[0], rows.input.sym_sizes()), empty(wanted[1], rows.linear_weight.sym_sizes()),
          empty(wanted[2], {rows.linear_weight.sym_size(0)})};
}

// [N] bool, or [0].
Tensor empty_top1(const Tensor& logits, bool wanted) {
  return at::empty_symint({wanted ? n_rows(logits) : c10::SymInt(0)}, logits.options().dtype(at::kBool));
}

RowStats row_stats_meta(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                        const OptionalTensor& row_temperature, bool need_log_prob, const StatsWanted& wanted) {
  check_row_stats(o, logits, target, weight, row_temperature);
  return {empty_rows(logits),
          empty_rows(logits),
          empty_rows(logits),
          empty_rows(logits, wanted.wsum),
          need_log_prob ? empty_logits(logits) : not_wanted(logits.options()),
          empty_rows(logits, wanted.entropy),
          empty_top1(logits, wanted.top1)};
}

template <bool over_logits>
GradOf<over_logits> row_grad_meta(const Options& o, const Tensor& logits, const Tensor& target,
                                  const OptionalTensor& weight, const ForGrad& operands) {
  check_row_grad(o, logits, target, weight, operands);
  if constexpr (over_logits) {
    check_dense(logits);
  } else {
    return empty_logits(logits);
  }
}

template <bool over_logits>
StatsGradOf<over_logits> row_stats_grad_meta(const Options& o, const Tensor& logits, const Tensor& target,
                                             const OptionalTensor& weight, const Tensor& totals, bool) {
  check_row_stats_grad(o, logits, target, weight, totals);
  const auto lse = empty_rows(logits), lse_low = empty_rows(logits), picked = empty_rows(logits);
  const auto wsum = empty_rows(logits, o.need_wsum());
  if constexpr (over_logits) {
    check_dense(logits);
    return {lse, lse_low, picked, wsum};
  } else {
    return {lse, lse_low, picked, wsum, empty_logits(logits)};
  }
}

ProbStats prob_row_stats_meta(const Options& o, const Tensor& logits, const Tensor& probabilities,
                              const OptionalTensor& weight) {
  check_prob_rows(o, logits, probabilities, weight);
  return {empty_rows(logits), empty_rows(logits), empty_rows(logits), empty_rows(logits)};
}

ProbGrads prob_row_grad_meta(const Options& o, const Tensor& logits, const Tensor& probabilities,
                             const OptionalTensor& weight, const Tensor& lse, const Tensor& lse_low,
                             const Tensor& part_sum, const Tensor& grad_loss, const Tensor& grad_lse,
                             std::array<bool, 2> wanted) {
  check_prob_row_grad(
      o, logits, probabilities, weight,
      {{"lse", lse}, {"lse_low", lse_low}, {"part_sum", part_sum}, {"grad_loss", grad_loss}, {"grad_lse", grad_lse}});
  const auto grad = [&](bool is_wanted) { return is_wanted ? empty_logits(logits) : not_wanted(logits.options()); };
  return {grad(wanted[0]), grad(wanted[1])};
}

Reduced reduce_rows_meta(const Options& o, const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& lse, const OptionalTensor& lse_low, const OptionalTensor& picked,
                         const OptionalTensor& wsum, const OptionalTensor& totals, at::ScalarType loss_dtype) {
  check_reduce_rows(o, target, weight, lse, lse_low, picked, wsum, totals, loss_dtype);
  const auto out = target.options().dtype(loss_dtype);
  const auto stats = target.options().dtype(lse ? lse->scalar_type() : stats_dtype(loss_dtype));
  const auto empty_loss = [&](bool wanted) {
    if (!wanted) {
      return not_wanted(out);
    }
    return o.reduction == Reduction::none ? at::empty_symint({target.sym_size(0)}, out) : at::empty({}, out);
  };
  return {empty_loss(lse.has_value()), empty_loss(lse.has_value() && o.lse_square_scale != 0),
          at::empty({lse ? int64_t{0} : kTotals}, stats)};
}

LinearStats linear_row_stats_meta(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                  const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                                  const OptionalTensor& row_temperature, std::optional<int64_t> chunk_rows,
                                  const StatsWanted& wanted) {
  check_linear_row_stats(o, {input, linear_weight, linear_bias, target, weight, chunk_rows}, row_temperature);
  return {empty_rows(input),
          empty_rows(input),
          empty_rows(input),
          empty_rows(input, wanted.wsum),
          empty_rows(input, wanted.entropy),
          empty_top1(input, wanted.top1)};
}

LinearGrad linear_row_grad_meta(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                                const ForGrad& operands, std::optional<int64_t> chunk_rows,
                                std::array<bool, 3> output_mask) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, chunk_rows};
  check_linear_row_grad(o, rows, operands);
  return empty_linear_grads(rows, output_mask);
}

LinearStatsGrad linear_row_stats_grad_meta(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                           const OptionalTensor& linear_bias, const Tensor& target,
                                           const OptionalTensor& weight, const Tensor& totals,
                                           std::optional<int64_t> chunk_rows, bool, std::array<bool, 3> output_mask) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, chunk_rows};
  check_linear_row_stats_grad(o, rows, totals);
  return std::tuple_cat(
      std::tuple{empty_rows(input), empty_rows(input), empty_rows(input), empty_rows(input, o.need_wsum())},
      empty_linear_grads(rows, output_mask));
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("row_stats", flat<row_stats_meta>);
  m.impl("row_grad", flat<row_grad_meta<false>>);
  m.impl("row_grad_", flat<row_grad_meta<true>>);
  m.impl("row_stats_grad", flat<row_stats_grad_meta<false>>);
  m.impl("row_stats_grad_", flat<row_stats_grad_meta<true>>);
  m.impl("reduce_rows", flat<reduce_rows_meta>);
  m.impl("prob_row_stats", flat<prob_row_stats_meta>);
  m.impl("prob_row_grad", flat<prob_row_grad_meta>);
  m.impl("scale_", check_scale);
  m.impl("linear_row_stats", flat<linear_row_stats_meta>);
  m.impl("linear_row_grad", flat<linear_row_grad_meta>);
  m.impl("linear_row_stats_grad", flat<linear_row_stats_grad_meta>);
}

}  // namespace npu_xent::meta
