// The schemas of all operators. options.h has the options that all but scale_ take.
//
// Shapes: logits [N, C] (copied where neither classes nor, on the CPU, rows are adjacent); on the CPU also [B, R, C],
// for N = B R rows, with adjacent rows instead of classes, and then so are gradient and log_prob; target [N] int64;
// weight [num_classes], fp32 or the logits' dtype; lse, lse_low, picked, wsum [N] and totals [3] in the statistics
// dtype: fp32, or fp64 for fp64 logits. lse_low is the rounding error of lse. An output that was not requested has
// shape [0]. loss_dtype is the dtype of loss and z_loss; default: the logits' dtype; under autocast fp32, or fp64 for
// fp64 logits.
//
// linear_*: the logits are input [N, H] times linear_weight [C, H], plus linear_bias [C], all of one dtype. They are
// computed in chunks of `chunk_rows` rows, all in the same buffer. Gradients of a 16-bit linear_weight and linear_bias
// are accumulated in fp32 and rounded once.
#include "ops.h"

#include <torch/library.h>

#include <string>

namespace npu_xent {

TORCH_LIBRARY(npu_xent, m) {
  const auto def = [&](const std::string& name, const std::string& arguments, const std::string& returns) {
    m.def((name + "(" + arguments + ", " + kOptionsSchema + ") -> " + returns).c_str(), {at::Tag::pt2_compliant_tag});
  };

  // One reading sweep: statistics per row, log_prob [N, C] in the logits' dtype, the entropy of the softmax [N], and
  // top1 [N] bool: whether the target is the first of the largest scaled logits (of this shard).
  const std::string wanted =
      "bool need_wsum=False, bool need_entropy=False, bool need_top1=False, bool read_ignored=False";
  def("row_stats",
      "Tensor logits, Tensor target, Tensor? weight=None, Tensor? row_temperature=None, *, bool need_log_prob=False, " +
          wanted,
      "(Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum, Tensor log_prob, Tensor entropy, Tensor top1)");

  // One sweep that reads and writes: the gradient of the logits from the gradients of loss and z_loss ([N] for "none",
  // else []), and of lse and entropy ([N]); None means zeros. Ignored rows get the gradient that comes through lse:
  // their logits are read only where grad_lse is not 0. row_grad_ writes the gradient over the logits.
  const std::string for_grad =
      ", Tensor lse, Tensor? lse_low, Tensor? totals, Tensor? grad_loss, Tensor? grad_z_loss=None, "
      "Tensor? grad_lse=None, Tensor? row_temperature=None, Tensor? entropy=None, Tensor? grad_entropy=None, *";
  const std::string row_grad = " logits, Tensor target, Tensor? weight" + for_grad;
  def("row_grad", "Tensor" + row_grad, "Tensor");
  def("row_grad_", "Tensor(a!)" + row_grad, "()");

  // Both in one sweep, for reductions "mean" and "sum" and whole rows, with a gradient of the loss of 1.
  const std::string row_stats_grad =
      " logits, Tensor target, Tensor? weight, Tensor totals, *, bool read_ignored=False";
  def("row_stats_grad", "Tensor" + row_stats_grad,
      "(Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum, Tensor grad)");
  def("row_stats_grad_", "Tensor(a!)" + row_stats_grad, "(Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum)");

  // Reductions of size N; num_classes is required. Without lse: totals = (sum of the kept rows' weights, number of kept
  // rows, sum of the class weights). With lse (and lse_low), picked, wsum (for label smoothing) and totals: loss, and
  // z_loss if lse_square_scale is not 0; [N] for "none", else [].
  def("reduce_rows",
      "Tensor target, Tensor? weight, Tensor? lse=None, Tensor? lse_low=None, Tensor? picked=None, Tensor? wsum=None, "
      "Tensor? totals=None, *, ScalarType loss_dtype",
      "(Tensor loss, Tensor z_loss, Tensor totals)");

  // Class probabilities q [N, C] in the logits' dtype instead of a target, for whole rows; with
  // v_c = w_c ((1 - e) q_c + e/C), cross = sum v_c (z_c - lse) = -l, and part_sum = sum v_c.
  def("prob_row_stats", "Tensor logits, Tensor probabilities, Tensor? weight=None, *",
      "(Tensor lse, Tensor lse_low, Tensor cross, Tensor part_sum)");
  // The gradients of logits and probabilities from those of each row's l and lse, [N]; [0] where output_mask is False.
  def("prob_row_grad",
      "Tensor logits, Tensor probabilities, Tensor? weight, Tensor lse, Tensor lse_low, Tensor part_sum, Tensor "
      "grad_loss, "
      "Tensor grad_lse, *, bool[2] output_mask",
      "(Tensor grad_logits, Tensor grad_probabilities)");

  // self *= factor (one value). The kernels return at once when factor is 1; the composite always multiplies.
  m.def("scale_(Tensor(a!) self, Tensor factor) -> ()", {at::Tag::pt2_compliant_tag});

  // The loss of whole rows, composed of the above; differentiable in the logits through `loss`, and through `z_loss` if
  // `differentiable_z_loss`. cross_entropy_ allocates nothing of size N x C: it overwrites the logits with their
  // gradient, in the forward, or for fp16 and reduction "none" in the backward.
  const std::string cross_entropy =
      " logits, Tensor target, Tensor? weight=None, *, ScalarType? loss_dtype=None, bool need_lse=False, "
      "bool need_log_prob=False, bool differentiable_z_loss=False";
  const std::string loss = "(Tensor loss, Tensor z_loss, Tensor lse, Tensor log_prob)";
  def("cross_entropy", "Tensor" + cross_entropy, loss);
  def("cross_entropy_", "Tensor(a!)" + cross_entropy, loss);

  // The loss of class probabilities; differentiable in both, through `loss` and `lse`.
  def("prob_cross_entropy",
      "Tensor logits, Tensor probabilities, Tensor? weight=None, *, ScalarType? loss_dtype=None, bool need_lse=False",
      "(Tensor loss, Tensor z_loss, Tensor lse)");

  // The primitives without materializing the logits. output_mask says which of the three gradients are wanted.
  const std::string linear = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight";
  const std::string linear_grads = "Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)";
  def("linear_row_stats", linear + "=None, Tensor? row_temperature=None, *, int? chunk_rows=None, " + wanted,
      "(Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum, Tensor entropy, Tensor top1)");
  def("linear_row_grad", linear + for_grad + ", int? chunk_rows=None, bool[3] output_mask", "(" + linear_grads);
  def("linear_row_stats_grad",
      linear + ", Tensor totals, *, int? chunk_rows=None, bool read_ignored=False, bool[3] output_mask",
      "(Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum, " + linear_grads);

  // The loss, composed of these and reduce_rows; differentiable in input, linear_weight and linear_bias through `loss`.
  def("linear_cross_entropy",
      linear + "=None, *, int? chunk_rows=None, ScalarType? loss_dtype=None, bool need_lse=False",
      "(Tensor loss, Tensor z_loss, Tensor lse)");

  // The log-probability of each target, the entropy, and top1; differentiable in the logits, or in input, linear_weight
  // and linear_bias, through log_probs and entropy. Of the options they take ignore_index, logit_scale, softcap and
  // temperature. token_log_probs_ writes the gradient over the logits.
  const std::string token =
      "Tensor target, Tensor? row_temperature=None, *, bool need_entropy=False, bool need_top1=False";
  const std::string token_outputs = "(Tensor log_probs, Tensor entropy, Tensor top1)";
  def("token_log_probs", "Tensor logits, " + token, token_outputs);
  def("token_log_probs_", "Tensor(a!) logits, " + token, token_outputs);
  def("linear_token_log_probs",
      "Tensor input, Tensor linear_weight, Tensor? linear_bias, " + token + ", int? chunk_rows=None", token_outputs);

  // The log-probabilities of K classes of each row: index [N, K] int64, result [N, K]. There are no ignored rows.
  def("selected_log_probs", "Tensor logits, Tensor index, Tensor? row_temperature=None, *", "Tensor");
}

RowStats row_stats(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& row_temperature, bool need_log_prob, const StatsWanted& wanted) {
  return call<row_stats>("npu_xent::row_stats", o, logits, target, weight, row_temperature, need_log_prob, wanted);
}

template <bool over_logits>
GradOf<over_logits> row_grad(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                             const ForGrad& operands) {
  return call<row_grad<over_logits>>(over_logits ? "npu_xent::row_grad_" : "npu_xent::row_grad", o, logits, target,
                                     weight, operands);
}
template Tensor row_grad<false>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&, const ForGrad&);
template void row_grad<true>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&, const ForGrad&);

template <bool over_logits>
StatsGradOf<over_logits> row_stats_grad(const Options& o, const Tensor& logits, const Tensor& target,
                                        const OptionalTensor& weight, const Tensor& totals, bool read_ignored) {
  return call<row_stats_grad<over_logits>>(over_logits ? "npu_xent::row_stats_grad_" : "npu_xent::row_stats_grad", o,
                                           logits, target, weight, totals, read_ignored);
}
template RowStatsGrad row_stats_grad<false>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const Tensor&, bool);
template StatsOutputs row_stats_grad<true>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&,
                                           const Tensor&, bool);

Reduced reduce_rows(const Options& o, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& lse,
                    const OptionalTensor& lse_low, const OptionalTensor& picked, const OptionalTensor& wsum,
                    const OptionalTensor& totals, at::ScalarType loss_dtype) {
  return call<reduce_rows>("npu_xent::reduce_rows", o, target, weight, lse, lse_low, picked, wsum, totals, loss_dtype);
}

ProbStats prob_row_stats(const Options& o, const Tensor& logits, const Tensor& probabilities,
                         const OptionalTensor& weight) {
  return call<prob_row_stats>("npu_xent::prob_row_stats", o, logits, probabilities, weight);
}

ProbGrads prob_row_grad(const Options& o, const Tensor& logits, const Tensor& probabilities,
                        const OptionalTensor& weight, const Tensor& lse, const Tensor& lse_low, const Tensor& part_sum,
                        const Tensor& grad_loss, const Tensor& grad_lse, std::array<bool, 2> output_mask) {
  return call<prob_row_grad>("npu_xent::prob_row_grad", o, logits, probabilities, weight, lse, lse_low, part_sum,
                             grad_loss, grad_lse, output_mask);
}

void scale_(const Tensor& self, const Tensor& factor) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("npu_xent::scale_", "").typed<decltype(scale_)>();
  op.call(self, factor);
}

template <bool over_logits>
Loss cross_entropy(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   std::optional<at::ScalarType> loss_dtype, bool need_lse, bool need_log_prob,
                   bool differentiable_z_loss) {
  return call<cross_entropy<over_logits>>(over_logits ? "npu_xent::cross_entropy_" : "npu_xent::cross_entropy", o,
                                          logits, target, weight, loss_dtype, need_lse, need_log_prob,
                                          differentiable_z_loss);
}
template Loss cross_entropy<false>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&,
                                   std::optional<at::ScalarType>, bool, bool, bool);
template Loss cross_entropy<true>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&,
                                  std::optional<at::ScalarType>, bool, bool, bool);

LinearStats linear_row_stats(const Options& o, const Tensor& input, const Tensor& linear_weight,
                             const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                             const OptionalTensor& row_temperature, std::optional<int64_t> chunk_rows,
                             const StatsWanted& wanted) {
  return call<linear_row_stats>("npu_xent::linear_row_stats", o, input, linear_weight, linear_bias, target, weight,
                                row_temperature, chunk_rows, wanted);
}

LinearGrad linear_row_grad(const Options& o, const Tensor& input, const Tensor& linear_weight,
                           const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                           const ForGrad& operands, std::optional<int64_t> chunk_rows,
                           std::array<bool, 3> output_mask) {
  return call<linear_row_grad>("npu_xent::linear_row_grad", o, input, linear_weight, linear_bias, target, weight,
                               operands, chunk_rows, output_mask);
}

LinearStatsGrad linear_row_stats_grad(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                      const OptionalTensor& linear_bias, const Tensor& target,
                                      const OptionalTensor& weight, const Tensor& totals,
                                      std::optional<int64_t> chunk_rows, bool read_ignored,
                                      std::array<bool, 3> output_mask) {
  return call<linear_row_stats_grad>("npu_xent::linear_row_stats_grad", o, input, linear_weight, linear_bias, target,
                                     weight, totals, chunk_rows, read_ignored, output_mask);
}

LossWithLse prob_cross_entropy(const Options& o, const Tensor& logits, const Tensor& probabilities,
                               const OptionalTensor& weight, std::optional<at::ScalarType> loss_dtype, bool need_lse) {
  return call<prob_cross_entropy>("npu_xent::prob_cross_entropy", o, logits, probabilities, weight, loss_dtype,
                                  need_lse);
}

LossWithLse linear_cross_entropy(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                 const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                                 std::optional<int64_t> chunk_rows, std::optional<at::ScalarType> loss_dtype,
                                 bool need_lse) {
  return call<linear_cross_entropy>("npu_xent::linear_cross_entropy", o, input, linear_weight, linear_bias, target,
                                    weight, chunk_rows, loss_dtype, need_lse);
}

template <bool over_logits>
TokenLogProbs token_log_probs(const Options& o, const Tensor& logits, const Tensor& target,
                              const OptionalTensor& row_temperature, bool need_entropy, bool need_top1) {
  return call<token_log_probs<over_logits>>(over_logits ? "npu_xent::token_log_probs_" : "npu_xent::token_log_probs", o,
                                            logits, target, row_temperature, need_entropy, need_top1);
}
template TokenLogProbs token_log_probs<false>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&, bool,
                                              bool);
template TokenLogProbs token_log_probs<true>(const Options&, const Tensor&, const Tensor&, const OptionalTensor&, bool,
                                             bool);

TokenLogProbs linear_token_log_probs(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                     const OptionalTensor& linear_bias, const Tensor& target,
                                     const OptionalTensor& row_temperature, bool need_entropy, bool need_top1,
                                     std::optional<int64_t> chunk_rows) {
  return call<linear_token_log_probs>("npu_xent::linear_token_log_probs", o, input, linear_weight, linear_bias, target,
                                      row_temperature, need_entropy, need_top1, chunk_rows);
}

Tensor selected_log_probs(const Options& o, const Tensor& logits, const Tensor& index,
                          const OptionalTensor& row_temperature) {
  return call<selected_log_probs>("npu_xent::selected_log_probs", o, logits, index, row_temperature);
}

}  // namespace npu_xent
