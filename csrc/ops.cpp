// The schemas of the operators, and nothing else defines one.
//
// Shapes: logits [N, C] (one copy if not dense along C); target [N] int64; weight [num_classes], fp32 or the logits'
// dtype; lse, lse_low, picked, wsum [N] and totals [3] in the statistics dtype: fp32, fp64 for fp64 logits. row_math.h
// has the formulas. lse_low is what rounding took from lse. An output that was not asked for has shape [0].
//
//   ignore_index   rows with this target take no part; their logits are read only if `read_ignored`
//   logit_scale    t: the softmax is that of t x
//   softcap        c > 0: the softmax is that of c tanh(t x / c)
//   grad_scale     u: the outermost factor of the gradient, t unless given
//   class_start    the class of column 0, and num_classes the classes of all shards together, when the logits are one
//                  shard of the classes; a target of another shard has no picked logit (0) and no [c = y] term here.
//                  Shards i merge into lse = log sum exp lse_i, picked = sum picked_i, and with W_i the sum of the
//                  shard's weights, wsum = sum (wsum_i + W_i (lse_i - lse)); lse_low may then be left out
//   loss_dtype     of the loss and z_loss; the logits' dtype unless given (under autocast fp32)
//
// linear_*: the logits are input [N, H] times linear_weight [C, H], plus linear_bias [C], all of one dtype; they exist
// in chunks of `chunk_rows` rows (a number is picked unless given), one after another in the same memory. Gradients of
// a 16-bit linear_weight and linear_bias are added up in fp32 and rounded once.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace npu_xent {

TORCH_LIBRARY(npu_xent, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};

  // One sweep that reads: row -> lse, lse_low, picked, wsum, and log_prob [N, C] in the logits' dtype.
  m.def(
      "row_stats(Tensor logits, Tensor target, Tensor? weight=None, *, int ignore_index=-100, float logit_scale=1.0, "
      "float? softcap=None, SymInt class_start=0, SymInt? num_classes=None, bool need_wsum=False, "
      "bool need_log_prob=False, bool read_ignored=False) -> (Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum, "
      "Tensor log_prob)",
      tags);

  // One sweep that reads and writes: the gradient of the logits, from the gradients of loss and z_loss ([N] for "none",
  // else []; None stands for zeros). row_grad_ leaves it in the logits.
  m.def(
      "row_grad(Tensor logits, Tensor target, Tensor? weight, Tensor lse, Tensor? lse_low, Tensor totals, "
      "Tensor? grad_loss, Tensor? grad_z_loss=None, *, str reduction=\"mean\", int ignore_index=-100, "
      "float label_smoothing=0.0, float lse_square_scale=0.0, float logit_scale=1.0, float? softcap=None, "
      "float? grad_scale=None, SymInt class_start=0, SymInt? num_classes=None) -> Tensor",
      tags);
  m.def(
      "row_grad_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor lse, Tensor? lse_low, Tensor totals, "
      "Tensor? grad_loss, Tensor? grad_z_loss=None, *, str reduction=\"mean\", int ignore_index=-100, "
      "float label_smoothing=0.0, float lse_square_scale=0.0, float logit_scale=1.0, float? softcap=None, "
      "float? grad_scale=None, SymInt class_start=0, SymInt? num_classes=None) -> ()",
      tags);

  // Both in one sweep, for reductions "mean" and "sum", as if the gradient of the loss were 1.
  m.def(
      "row_stats_grad(Tensor logits, Tensor target, Tensor? weight, Tensor totals, *, str reduction=\"mean\", "
      "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, float logit_scale=1.0, "
      "float? softcap=None, float? grad_scale=None, bool read_ignored=False) -> (Tensor lse, Tensor lse_low, "
      "Tensor picked, Tensor wsum, Tensor grad)",
      tags);
  m.def(
      "row_stats_grad_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor totals, *, str reduction=\"mean\", "
      "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, float logit_scale=1.0, "
      "float? softcap=None, float? grad_scale=None, bool read_ignored=False) -> (Tensor lse, Tensor lse_low, "
      "Tensor picked, Tensor wsum)",
      tags);

  // What is of size N. Without statistics: totals = (sum of the kept rows' weights, number of kept rows, sum of the
  // class weights). With lse (and lse_low), picked, wsum (for label smoothing) and totals: loss, and z_loss if
  // lse_square_scale is not 0; [N] for "none", else [].
  m.def(
      "reduce_rows(Tensor target, Tensor? weight, Tensor? lse=None, Tensor? lse_low=None, Tensor? picked=None, "
      "Tensor? wsum=None, Tensor? totals=None, *, str reduction=\"mean\", int ignore_index=-100, "
      "float label_smoothing=0.0, float lse_square_scale=0.0, SymInt num_classes, ScalarType loss_dtype) -> "
      "(Tensor loss, Tensor z_loss, Tensor totals)",
      tags);

  // self *= factor (one value); the kernels return without touching self when factor is 1 (the composite cannot know).
  m.def("scale_(Tensor(a!) self, Tensor factor) -> ()", tags);

  // The loss, made of the above; differentiable in the logits through `loss`, and through `z_loss` if
  // `differentiable_z_loss`. cross_entropy_ needs no memory of size N x C: the logits are overwritten with their
  // gradient, during the forward, or for fp16 and reduction "none" during the backward.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, *, str reduction=\"mean\", "
      "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, float logit_scale=1.0, "
      "float? softcap=None, float? grad_scale=None, ScalarType? loss_dtype=None, bool need_lse=False, "
      "bool need_log_prob=False, bool differentiable_z_loss=False) -> (Tensor loss, Tensor z_loss, Tensor lse, "
      "Tensor log_prob)",
      tags);
  m.def(
      "cross_entropy_(Tensor(a!) logits, Tensor target, Tensor? weight=None, *, str reduction=\"mean\", "
      "int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, float logit_scale=1.0, "
      "float? softcap=None, float? grad_scale=None, ScalarType? loss_dtype=None, bool need_lse=False, "
      "bool need_log_prob=False, bool differentiable_z_loss=False) -> (Tensor loss, Tensor z_loss, Tensor lse, "
      "Tensor log_prob)",
      tags);

  // The primitives for logits that are never all there at once. output_mask says which of the three gradients are
  // wanted.
  m.def(
      "linear_row_stats(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight=None, "
      "*, int ignore_index=-100, float? softcap=None, int? chunk_rows=None, bool need_wsum=False, "
      "bool read_ignored=False) -> (Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum)",
      tags);
  m.def(
      "linear_row_grad(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
      "Tensor lse, Tensor? lse_low, Tensor totals, Tensor? grad_loss, Tensor? grad_z_loss=None, *, "
      "str reduction=\"mean\", int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, "
      "float? softcap=None, int? chunk_rows=None, bool[3] output_mask) -> (Tensor grad_input, "
      "Tensor grad_linear_weight, Tensor grad_linear_bias)",
      tags);
  m.def(
      "linear_row_stats_grad(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
      "Tensor totals, *, str reduction=\"mean\", int ignore_index=-100, float label_smoothing=0.0, "
      "float lse_square_scale=0.0, float? softcap=None, int? chunk_rows=None, bool read_ignored=False, "
      "bool[3] output_mask) -> (Tensor lse, Tensor lse_low, Tensor picked, Tensor wsum, Tensor grad_input, "
      "Tensor grad_linear_weight, Tensor grad_linear_bias)",
      tags);

  // The loss, made of those and of reduce_rows; differentiable in input, linear_weight and linear_bias through `loss`.
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
      "Tensor? weight=None, *, str reduction=\"mean\", int ignore_index=-100, float label_smoothing=0.0, "
      "float lse_square_scale=0.0, float? softcap=None, int? chunk_rows=None, ScalarType? loss_dtype=None, "
      "bool need_lse=False) -> (Tensor loss, Tensor z_loss, Tensor lse)",
      tags);
}

namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats(const Tensor& logits, const Tensor& target,
                                                             const OptionalTensor& weight, int64_t ignore_index,
                                                             double logit_scale, std::optional<double> softcap,
                                                             c10::SymInt class_start,
                                                             std::optional<c10::SymInt> num_classes, bool need_wsum,
                                                             bool need_log_prob, bool read_ignored) {
  static const auto op = find<decltype(row_stats)>("npu_xent::row_stats");
  return op.call(logits, target, weight, ignore_index, logit_scale, softcap, std::move(class_start),
                 std::move(num_classes), need_wsum, need_log_prob, read_ignored);
}

Tensor row_grad(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
                const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
                const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index,
                double label_smoothing, double lse_square_scale, double logit_scale, std::optional<double> softcap,
                std::optional<double> grad_scale, c10::SymInt class_start, std::optional<c10::SymInt> num_classes) {
  static const auto op = find<decltype(row_grad)>("npu_xent::row_grad");
  return op.call(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, reduction, ignore_index,
                 label_smoothing, lse_square_scale, logit_scale, softcap, grad_scale, std::move(class_start),
                 std::move(num_classes));
}

void row_grad_(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
               const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
               const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index,
               double label_smoothing, double lse_square_scale, double logit_scale, std::optional<double> softcap,
               std::optional<double> grad_scale, c10::SymInt class_start, std::optional<c10::SymInt> num_classes) {
  static const auto op = find<decltype(row_grad_)>("npu_xent::row_grad_");
  op.call(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, reduction, ignore_index,
          label_smoothing, lse_square_scale, logit_scale, softcap, grad_scale, std::move(class_start),
          std::move(num_classes));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_grad(const Tensor& logits, const Tensor& target,
                                                                  const OptionalTensor& weight, const Tensor& totals,
                                                                  std::string_view reduction, int64_t ignore_index,
                                                                  double label_smoothing, double lse_square_scale,
                                                                  double logit_scale, std::optional<double> softcap,
                                                                  std::optional<double> grad_scale, bool read_ignored) {
  static const auto op = find<decltype(row_stats_grad)>("npu_xent::row_stats_grad");
  return op.call(logits, target, weight, totals, reduction, ignore_index, label_smoothing, lse_square_scale,
                 logit_scale, softcap, grad_scale, read_ignored);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_stats_grad_(const Tensor& logits, const Tensor& target,
                                                           const OptionalTensor& weight, const Tensor& totals,
                                                           std::string_view reduction, int64_t ignore_index,
                                                           double label_smoothing, double lse_square_scale,
                                                           double logit_scale, std::optional<double> softcap,
                                                           std::optional<double> grad_scale, bool read_ignored) {
  static const auto op = find<decltype(row_stats_grad_)>("npu_xent::row_stats_grad_");
  return op.call(logits, target, weight, totals, reduction, ignore_index, label_smoothing, lse_square_scale,
                 logit_scale, softcap, grad_scale, read_ignored);
}

std::tuple<Tensor, Tensor, Tensor> reduce_rows(const Tensor& target, const OptionalTensor& weight,
                                               const OptionalTensor& lse, const OptionalTensor& lse_low,
                                               const OptionalTensor& picked, const OptionalTensor& wsum,
                                               const OptionalTensor& totals, std::string_view reduction,
                                               int64_t ignore_index, double label_smoothing, double lse_square_scale,
                                               c10::SymInt num_classes, at::ScalarType loss_dtype) {
  static const auto op = find<decltype(reduce_rows)>("npu_xent::reduce_rows");
  return op.call(target, weight, lse, lse_low, picked, wsum, totals, reduction, ignore_index, label_smoothing,
                 lse_square_scale, std::move(num_classes), loss_dtype);
}

void scale_(const Tensor& self, const Tensor& factor) {
  static const auto op = find<decltype(scale_)>("npu_xent::scale_");
  op.call(self, factor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    bool inplace, const Tensor& logits, const Tensor& target, const OptionalTensor& weight, std::string_view reduction,
    int64_t ignore_index, double label_smoothing, double lse_square_scale, double logit_scale,
    std::optional<double> softcap, std::optional<double> grad_scale, std::optional<at::ScalarType> loss_dtype,
    bool need_lse, bool need_log_prob, bool differentiable_z_loss) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, int64_t, double, double, double,
      std::optional<double>, std::optional<double>, std::optional<at::ScalarType>, bool, bool, bool);
  static const auto fresh = find<Signature>("npu_xent::cross_entropy");
  static const auto over_logits = find<Signature>("npu_xent::cross_entropy_");
  return (inplace ? over_logits : fresh)
      .call(logits, target, weight, reduction, ignore_index, label_smoothing, lse_square_scale, logit_scale, softcap,
            grad_scale, loss_dtype, need_lse, need_log_prob, differentiable_z_loss);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_row_stats(const LinearRows& rows, bool need_wsum, bool read_ignored) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, int64_t,
      std::optional<double>, std::optional<int64_t>, bool, bool);
  static const auto op = find<Signature>("npu_xent::linear_row_stats");
  return op.call(rows.input, rows.linear_weight, rows.linear_bias, rows.target, rows.weight, rows.ignore_index,
                 rows.softcap, rows.chunk_rows, need_wsum, read_ignored);
}

std::tuple<Tensor, Tensor, Tensor> linear_row_grad(const LinearRows& rows, const Tensor& lse,
                                                   const OptionalTensor& lse_low, const Tensor& totals,
                                                   const OptionalTensor& grad_loss, const OptionalTensor& grad_z_loss,
                                                   std::string_view reduction, double label_smoothing,
                                                   double lse_square_scale, std::array<bool, 3> output_mask) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&,
      const OptionalTensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, std::string_view, int64_t,
      double, double, std::optional<double>, std::optional<int64_t>, std::array<bool, 3>);
  static const auto op = find<Signature>("npu_xent::linear_row_grad");
  return op.call(rows.input, rows.linear_weight, rows.linear_bias, rows.target, rows.weight, lse, lse_low, totals,
                 grad_loss, grad_z_loss, reduction, rows.ignore_index, label_smoothing, lse_square_scale, rows.softcap,
                 rows.chunk_rows, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_row_stats_grad(
    const LinearRows& rows, const Tensor& totals, std::string_view reduction, double label_smoothing,
    double lse_square_scale, bool read_ignored, std::array<bool, 3> output_mask) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&,
      std::string_view, int64_t, double, double, std::optional<double>, std::optional<int64_t>, bool,
      std::array<bool, 3>);
  static const auto op = find<Signature>("npu_xent::linear_row_stats_grad");
  return op.call(rows.input, rows.linear_weight, rows.linear_bias, rows.target, rows.weight, totals, reduction,
                 rows.ignore_index, label_smoothing, lse_square_scale, rows.softcap, rows.chunk_rows, read_ignored,
                 output_mask);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const LinearRows& rows, std::string_view reduction,
                                                        double label_smoothing, double lse_square_scale,
                                                        std::optional<at::ScalarType> loss_dtype, bool need_lse) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, std::string_view,
      int64_t, double, double, std::optional<double>, std::optional<int64_t>, std::optional<at::ScalarType>, bool);
  static const auto op = find<Signature>("npu_xent::linear_cross_entropy");
  return op.call(rows.input, rows.linear_weight, rows.linear_bias, rows.target, rows.weight, reduction,
                 rows.ignore_index, label_smoothing, lse_square_scale, rows.softcap, rows.chunk_rows, loss_dtype,
                 need_lse);
}

}  // namespace npu_xent
