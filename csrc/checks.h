// Argument checks of the operators, made before any sweep, with the same messages on every device.
// ValueError for shapes and ranges, TypeError for dtypes.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>

#include "ops.h"
#include "row_math.h"

// Raises ValueError unless cond, which may be symbolic, holds.
#define CHECK_SYM_VALUE(cond, ...) TORCH_CHECK_VALUE((cond).expect_true(__FILE__, __LINE__), __VA_ARGS__)

namespace npu_xent {

// A tensor, perhaps undefined or absent, with its name for messages.
struct Named {
  const char* name;
  const Tensor* tensor;

  Named(const char* name_, const Tensor& t) : name(name_), tensor(&t) {}
  Named(const char* name_, const OptionalTensor& t) : name(name_), tensor(t ? &*t : nullptr) {}
};

// A dtype for messages, as Python names it: torch.float32.
inline std::string name_of(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}

// For kernels, which read memory by its address: a storage can be freed or shrunk (untyped_storage().resize_) behind a
// tensor, to save memory. Tensors without memory, of the meta device or of a compiler, pass.
inline void check_storages(std::initializer_list<Named> tensors) {
  for (const auto& [name, t] : tensors) {
    if (t == nullptr || !t->defined() || t->is_meta() || !t->has_storage() ||
        t->unsafeGetTensorImpl()->has_symbolic_sizes_strides() || t->numel() == 0) {
      continue;
    }
    const size_t needed =
        at::detail::computeStorageNbytes(t->sizes(), t->strides(), t->itemsize(), t->storage_offset());
    TORCH_CHECK(needed <= t->storage().nbytes(), "npu_xent: ", name, " with shape ", t->sizes(), " needs ", needed,
                " bytes of storage, but its storage has been resized to ", t->storage().nbytes(),
                "; keep the storage until npu_xent has read it, in the forward or the backward.");
  }
}

inline void check_loss_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(at::isFloatingType(dtype), "npu_xent: loss_dtype must be a floating-point dtype, but is ",
                   name_of(dtype), ".");
}
inline void check_loss_dtype(at::ScalarType dtype, const Tensor& input) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == input.scalar_type(),
                   "npu_xent: loss_dtype must be float32, float64 or the dtype of the input, ",
                   name_of(input.scalar_type()), ", but is ", name_of(dtype), ".");
  TORCH_CHECK_TYPE(dtype != at::kDouble || !input.is_privateuseone(), "npu_xent: loss_dtype must not be float64 on ",
                   input.device(), ", which has no float64 arithmetic; use float32.");
}

// Checks that `columns` classes from class_start on lie within num_classes, and returns num_classes.
inline c10::SymInt check_shard(const Options& o, const c10::SymInt& columns) {
  CHECK_SYM_VALUE(o.class_start.sym_ge(0), "npu_xent: class_start must not be negative, but is ", o.class_start, ".");
  // Subtract: adding two large numbers could overflow.
  const auto all = o.num_classes.value_or(c10::SymInt(std::numeric_limits<int64_t>::max()));
  CHECK_SYM_VALUE(columns.sym_le(all).sym_and(o.class_start.sym_le(all - columns)), "npu_xent: the ", columns,
                  " classes of the shard, from class_start ", o.class_start,
                  " on, must lie within num_classes, which is ", all, ".");
  return o.num_classes ? *o.num_classes : o.class_start + columns;
}

// For operators that need whole rows: the columns must be all classes.
inline void check_whole_rows(const Options& o, const c10::SymInt& columns, const char* name) {
  CHECK_SYM_VALUE(o.class_start.sym_eq(0).sym_and(o.num_classes.value_or(columns).sym_eq(columns)), "npu_xent: ", name,
                  " needs whole rows, but the logits are a shard of the classes (class_start ", o.class_start,
                  ", num_classes ", o.num_classes.value_or(columns),
                  "); merge the statistics of the shards from row_stats, and call row_grad.");
}

inline void check_weight(const OptionalTensor& weight, const c10::SymInt& num_classes, c10::Device device) {
  if (weight) {
    TORCH_CHECK_VALUE(weight->dim() == 1, "npu_xent: weight must have shape [C], but has ", weight->dim(),
                      " dimensions: ", weight->sym_sizes(), ".");
    CHECK_SYM_VALUE(weight->sym_size(0).sym_eq(num_classes), "npu_xent: weight must have one value for each of the ",
                    num_classes, " classes, but has ", weight->sym_size(0), ".");
    TORCH_CHECK_VALUE(weight->device() == device, "npu_xent: weight must be on the logits' device ", device,
                      ", but is on ", weight->device(), ".");
  }
}

inline void check_target_and_weight(const Tensor& target, const OptionalTensor& weight, const c10::SymInt& num_classes,
                                    c10::Device device) {
  TORCH_CHECK_VALUE(target.dim() == 1, "npu_xent: target must have shape [N], but has ", target.dim(),
                    " dimensions: ", target.sym_sizes(), ".");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "npu_xent: target must be int64, but is ",
                   name_of(target.scalar_type()), "; convert it with target.long().");
  TORCH_CHECK_VALUE(target.device() == device, "npu_xent: target must be on the logits' device ", device,
                    ", but is on ", target.device(), ".");
  check_weight(weight, num_classes, device);
}

inline void check_weight_dtype(const OptionalTensor& weight, at::ScalarType logits) {
  TORCH_CHECK_TYPE(!weight || weight->scalar_type() == at::kFloat || weight->scalar_type() == logits,
                   "npu_xent: weight must be float32 or of the logits' dtype ", name_of(logits), ", but is ",
                   name_of(weight->scalar_type()), ".");
}

// An NPU's vector unit has no float64.
inline void check_npu_dtype(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() != at::kDouble || !tensor.is_privateuseone(), "npu_xent: ", name,
                   " must be float32, bfloat16 or float16 on ", tensor.device(),
                   ", which has no float64 arithmetic, but is ", name_of(tensor.scalar_type()), "; convert it with ",
                   name, ".float(), or compute on the CPU.");
}

// For a target that is neither a class nor ignore_index. Raises IndexError, as F.cross_entropy does on the CPU.
[[noreturn]] inline void raise_bad_target(const RowOptions& o, const int64_t* target, int64_t n) {
  TORCH_CHECK_INDEX(false, "npu_xent: target[", n, "] is ", target[n], ", which is neither a class in [0, ",
                    o.num_classes, ") nor ignore_index (", o.ignore_index, ").");
}

// `target` must be contiguous in host memory.
inline void check_target_range(const RowOptions& o, const Tensor& target) {
  const auto* y = target.const_data_ptr<int64_t>();
  const int64_t n = first_bad_target(o, y, target.numel());
  if (n >= 0) {
    raise_bad_target(o, y, n);
  }
}

// The rows of logits [N, C] or [B, R, C].
inline c10::SymInt n_rows(const Tensor& logits) {
  return logits.dim() == 2 ? logits.sym_size(0) : logits.sym_size(0) * logits.sym_size(1);
}

inline void check_logits(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2 || (logits.dim() == 3 && (logits.is_cpu() || logits.is_meta())),
                    "npu_xent: logits must have shape [N, C], or [B, R, C] on the CPU, but have ", logits.dim(),
                    " dimensions and are on ", logits.device(), ": ", logits.sym_sizes(), ".");
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
                   "npu_xent: logits must be float32, bfloat16, float16 or float64, but are ", name_of(dtype), ".");
  check_npu_dtype(logits, "logits");
  CHECK_SYM_VALUE(logits.sym_size(-1).sym_gt(0), "npu_xent: logits must have at least one class, but have shape ",
                  logits.sym_sizes(), ".");
}

// Arguments common to all sweeps.
inline void check_rows(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight) {
  check_options(o);
  check_logits(logits);
  check_target_and_weight(target, weight, check_shard(o, logits.sym_size(-1)), logits.device());
  check_weight_dtype(weight, logits.scalar_type());
  CHECK_SYM_VALUE(target.sym_size(0).sym_eq(n_rows(logits)), "npu_xent: target must have one value for each of the ",
                  n_rows(logits), " rows of the logits, but has ", target.sym_size(0), ".");
}

// One value per row, in the statistics dtype; `name` is for the message.
inline void check_stats(const Tensor& stats, const char* name, const c10::SymInt& n, at::ScalarType dtype,
                        c10::Device device) {
  TORCH_CHECK_VALUE(stats.dim() == 1 && stats.device() == device, "npu_xent: ", name, " must have shape [N] and be on ",
                    device, ", but has ", stats.dim(), " dimensions and is on ", stats.device(), ".");
  TORCH_CHECK_TYPE(stats.scalar_type() == dtype, "npu_xent: ", name, " must be ", name_of(dtype), ", but is ",
                   name_of(stats.scalar_type()), ".");
  CHECK_SYM_VALUE(stats.sym_size(0).sym_eq(n), "npu_xent: ", name, " must have ", n, " values, but has ",
                  stats.sym_size(0), ".");
}

inline void check_totals(const Tensor& totals, c10::Device device) {
  TORCH_CHECK_VALUE(totals.dim() == 1 && totals.device() == device, "npu_xent: totals must have shape [3] and be on ",
                    device, ", but has ", totals.dim(), " dimensions and is on ", totals.device(), ".");
  TORCH_CHECK_TYPE(totals.scalar_type() == at::kFloat || totals.scalar_type() == at::kDouble,
                   "npu_xent: totals must be float32 or float64, but is ", name_of(totals.scalar_type()), ".");
  CHECK_SYM_VALUE(totals.sym_size(0).sym_eq(kTotals), "npu_xent: totals must have 3 values, but has ",
                  totals.sym_size(0), ".");
}

// The gradient of loss or z_loss: [N] for Reduction::none, else one value.
inline void check_upstream(const OptionalTensor& grad, const char* name, Reduction reduction, const c10::SymInt& n,
                           c10::Device device) {
  if (!grad) {
    return;
  }
  TORCH_CHECK_VALUE(grad->device() == device, "npu_xent: ", name, " must be on ", device, ", but is on ",
                    grad->device(), ".");
  TORCH_CHECK_TYPE(at::isFloatingType(grad->scalar_type()), "npu_xent: ", name,
                   " must be a floating-point tensor, but is ", name_of(grad->scalar_type()), ".");
  CHECK_SYM_VALUE(grad->sym_numel().sym_eq(reduction == Reduction::none ? n : c10::SymInt(1)), "npu_xent: ", name,
                  " must have one value for each loss, but has ", grad->sym_numel(), ".");
}

// Temperatures of n rows. Their values are checked where they can be read (check_temperatures).
inline void check_row_temperature(const OptionalTensor& temperature, const c10::SymInt& n, at::ScalarType logits,
                                  c10::Device device) {
  if (!temperature) {
    return;
  }
  TORCH_CHECK(!(temperature->requires_grad() && at::GradMode::is_enabled()),
              "npu_xent: temperature requires a gradient, which is not computed; pass temperature.detach().");
  TORCH_CHECK_VALUE(temperature->dim() == 1 && temperature->device() == device,
                    "npu_xent: temperature must be a number, or have the shape of target and be on ", device,
                    ", but has ", temperature->dim(), " dimensions and is on ", temperature->device(), ".");
  TORCH_CHECK_TYPE(temperature->scalar_type() == at::kFloat || temperature->scalar_type() == stats_dtype(logits),
                   "npu_xent: temperature must be a number or float32, but is ", name_of(temperature->scalar_type()),
                   "; pass temperature.float().");
  CHECK_SYM_VALUE(temperature->sym_size(0).sym_eq(n), "npu_xent: temperature must have one value for each of the ", n,
                  " rows, but has ", temperature->sym_size(0), ".");
}

// The values of float32 or float64 temperatures, [N], but for ignored rows, if there is a target. Only on the CPU can
// they be read.
inline void check_temperatures(const Tensor& given, const Tensor& target, int64_t ignore_index) {
  if (!given.is_cpu()) {
    return;
  }
  check_storages({{"temperature", given}});
  const auto temperature = given.contiguous(), targets = target.defined() ? target.contiguous() : target;
  const auto* y = targets.defined() ? targets.const_data_ptr<int64_t>() : nullptr;
  const auto check = [&](const auto* values) {
    for (int64_t n = 0; n < temperature.numel(); ++n) {
      const bool ignored = y != nullptr && y[n] == ignore_index;
      TORCH_CHECK_VALUE((values[n] > 0 && std::isfinite(values[n])) || ignored, "npu_xent: temperature[", n, "] is ",
                        values[n], ", but must be positive and finite.");
    }
  };
  temperature.scalar_type() == at::kFloat ? check(temperature.const_data_ptr<float>())
                                          : check(temperature.const_data_ptr<double>());
}

// The operands of the gradient of n rows of logits of this dtype.
inline void check_for_gradient(const Options& o, const ForGrad& x, const c10::SymInt& n, at::ScalarType logits,
                               c10::Device device) {
  check_stats(x.lse, "lse", n, stats_dtype(logits), device);
  if (x.lse_low) {
    check_stats(*x.lse_low, "lse_low", n, x.lse.scalar_type(), device);
  }
  TORCH_CHECK_VALUE(
      x.totals || (o.reduction == Reduction::none && o.label_smoothing == 0),
      "npu_xent: totals may be left out only for reduction \"none\" without label_smoothing; pass those of "
      "reduce_rows.");
  if (x.grad_entropy) {  // otherwise entropy is not read, and may be an output that was not requested
    TORCH_CHECK_VALUE(x.entropy, "npu_xent: grad_entropy needs entropy; pass that of row_stats with need_entropy.");
    check_stats(*x.entropy, "entropy", n, x.lse.scalar_type(), device);
  }
  if (x.totals) {
    check_totals(*x.totals, device);
  }
  check_upstream(x.grad_loss, "grad_loss", o.reduction, n, device);
  check_upstream(x.grad_z_loss, "grad_z_loss", o.reduction, n, device);
  check_upstream(x.grad_lse, "grad_lse", Reduction::none, n, device);
  check_upstream(x.grad_entropy, "grad_entropy", Reduction::none, n, device);
  check_row_temperature(x.row_temperature, n, logits, device);
}

inline void check_row_stats(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                            const OptionalTensor& row_temperature) {
  check_rows(o, logits, target, weight);
  check_row_temperature(row_temperature, n_rows(logits), logits.scalar_type(), logits.device());
}

inline void check_row_grad(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                           const ForGrad& operands) {
  check_rows(o, logits, target, weight);
  check_for_gradient(o, operands, n_rows(logits), logits.scalar_type(), logits.device());
}

inline void check_row_stats_grad(const Options& o, const Tensor& logits, const Tensor& target,
                                 const OptionalTensor& weight, const Tensor& totals) {
  check_rows(o, logits, target, weight);
  check_whole_rows(o, logits.sym_size(-1), "row_stats_grad");
  check_totals(totals, logits.device());
  TORCH_CHECK_VALUE(o.reduction != Reduction::none,
                    "npu_xent: row_stats_grad needs the upstream gradient beforehand, so reduction must be \"mean\" or "
                    "\"sum\"; call row_stats and row_grad instead.");
}

// The arguments of the prob_* operators.
inline void check_prob_rows(const Options& o, const Tensor& logits, const Tensor& probabilities,
                            const OptionalTensor& weight) {
  check_options(o);
  check_logits(logits);
  TORCH_CHECK_VALUE(probabilities.dim() == logits.dim() && probabilities.device() == logits.device(),
                    "npu_xent: probabilities must have the shape and the device of the logits, which have ",
                    logits.dim(), " dimensions and are on ", logits.device(), ", but have ", probabilities.dim(),
                    " dimensions and are on ", probabilities.device(), ".");
  TORCH_CHECK_TYPE(probabilities.scalar_type() == logits.scalar_type(),
                   "npu_xent: probabilities must have the dtype of the logits, ", name_of(logits.scalar_type()),
                   ", but are ", name_of(probabilities.scalar_type()), ".");
  for (int64_t d = 0; d < logits.dim(); ++d) {
    CHECK_SYM_VALUE(probabilities.sym_size(d).sym_eq(logits.sym_size(d)),
                    "npu_xent: probabilities must have the shape of the logits, ", logits.sym_sizes(), ", but have ",
                    probabilities.sym_sizes(), ".");
  }
  check_whole_rows(o, logits.sym_size(-1), "prob_cross_entropy");
  check_weight(weight, logits.sym_size(-1), logits.device());
  check_weight_dtype(weight, logits.scalar_type());
}

inline void check_prob_row_grad(const Options& o, const Tensor& logits, const Tensor& probabilities,
                                const OptionalTensor& weight, std::initializer_list<Named> of_rows) {
  check_prob_rows(o, logits, probabilities, weight);
  for (const auto& [name, t] : of_rows) {
    check_stats(*t, name, n_rows(logits), stats_dtype(logits.scalar_type()), logits.device());
  }
}

// The arguments of the linear_* operators.
inline void check_linear_rows(const Options& o, const LinearRows& rows) {
  const auto& [input, linear_weight, linear_bias, target, weight, chunk_rows] = rows;
  check_options(o);
  TORCH_CHECK_VALUE(chunk_rows.value_or(1) >= 1, "npu_xent: chunk_rows must be at least 1, but is ",
                    chunk_rows.value_or(1), "; leave it at None for a number that suits the shape.");
  TORCH_CHECK_VALUE(input.dim() == 2, "npu_xent: input must have shape [N, H], but has ", input.dim(),
                    " dimensions: ", input.sym_sizes(), ".");
  TORCH_CHECK_VALUE(linear_weight.dim() == 2, "npu_xent: linear_weight must have shape [C, H], but has ",
                    linear_weight.dim(), " dimensions: ", linear_weight.sym_sizes(), ".");
  const auto dtype = input.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
                   "npu_xent: input must be float32, bfloat16, float16 or float64, but is ", name_of(dtype), ".");
  check_npu_dtype(input, "input");
  const auto alike = [&](const Tensor& other, const char* name) {
    TORCH_CHECK_TYPE(other.scalar_type() == dtype, "npu_xent: ", name, " must have the dtype of input, ",
                     name_of(dtype), ", but is ", name_of(other.scalar_type()),
                     "; convert one of them, or call it under autocast.");
    TORCH_CHECK_VALUE(other.device() == input.device(), "npu_xent: ", name, " must be on the device of input, ",
                      input.device(), ", but is on ", other.device(), "; move it with ", name, ".to(input.device).");
  };
  alike(linear_weight, "linear_weight");
  const auto classes = linear_weight.sym_size(0);
  CHECK_SYM_VALUE(linear_weight.sym_size(1).sym_eq(input.sym_size(1)),
                  "npu_xent: linear_weight must have a column for each of the ", input.sym_size(1),
                  " features of input, but has shape ", linear_weight.sym_sizes(),
                  "; if it is [H, C], pass linear_weight.t().");
  CHECK_SYM_VALUE(classes.sym_gt(0), "npu_xent: linear_weight must have at least one class, but has shape ",
                  linear_weight.sym_sizes(), ".");
  if (linear_bias) {
    alike(*linear_bias, "linear_bias");
    TORCH_CHECK_VALUE(linear_bias->dim() == 1, "npu_xent: linear_bias must have shape [C], but has ",
                      linear_bias->dim(), " dimensions: ", linear_bias->sym_sizes(), ".");
    CHECK_SYM_VALUE(linear_bias->sym_size(0).sym_eq(classes),
                    "npu_xent: linear_bias must have one value for each of the ", classes, " classes, but has ",
                    linear_bias->sym_size(0), ".");
  }
  check_target_and_weight(target, weight, check_shard(o, classes), input.device());
  check_weight_dtype(weight, dtype);
  CHECK_SYM_VALUE(target.sym_size(0).sym_eq(input.sym_size(0)), "npu_xent: target must have one value for each of the ",
                  input.sym_size(0), " rows of input, but has ", target.sym_size(0), ".");
}

inline void check_linear_row_stats(const Options& o, const LinearRows& rows, const OptionalTensor& row_temperature) {
  check_linear_rows(o, rows);
  check_row_temperature(row_temperature, rows.input.sym_size(0), rows.input.scalar_type(), rows.input.device());
}

inline void check_linear_row_grad(const Options& o, const LinearRows& rows, const ForGrad& operands) {
  check_linear_rows(o, rows);
  check_for_gradient(o, operands, rows.input.sym_size(0), rows.input.scalar_type(), rows.input.device());
}

inline void check_linear_row_stats_grad(const Options& o, const LinearRows& rows, const Tensor& totals) {
  check_linear_rows(o, rows);
  check_whole_rows(o, rows.linear_weight.sym_size(0), "linear_row_stats_grad");
  check_totals(totals, rows.input.device());
  TORCH_CHECK_VALUE(o.reduction != Reduction::none,
                    "npu_xent: linear_row_stats_grad needs the upstream gradient beforehand, so reduction must be "
                    "\"mean\" or \"sum\"; call linear_row_stats and linear_row_grad instead.");
}

// Logits that will be overwritten must be contiguous.
inline void check_dense(const Tensor& logits) {
  TORCH_CHECK_VALUE(
      logits.is_contiguous(),
      "npu_xent: consume_logits overwrites logits with their gradient, so they must be contiguous, but have shape ",
      logits.sym_sizes(), " and strides ", logits.sym_strides(), "; leave it off, or pass logits.contiguous().");
}

// Nor with torch's negative bit, which other tensors of the same memory do not have.
inline void check_not_negative(const Tensor& written, const std::string& name) {
  TORCH_CHECK_VALUE(!written.is_neg(), "npu_xent: ", name,
                    " is overwritten, and must not be a view with torch's negative bit (torch.is_neg), such as the "
                    "imaginary part of a conjugate; pass ",
                    name, ".resolve_neg().");
}

inline void check_scale(const Tensor& self, const Tensor& factor) {
  const auto dtype = self.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
                   "npu_xent: scale_ takes float32, bfloat16, float16 or float64, but self is ", name_of(dtype), ".");
  check_npu_dtype(self, "self");
  TORCH_CHECK_VALUE(self.is_non_overlapping_and_dense(),
                    "npu_xent: scale_ needs memory without gaps, but self has shape ", self.sym_sizes(),
                    " and strides ", self.sym_strides(), ".");
  CHECK_SYM_VALUE(factor.sym_numel().sym_eq(1), "npu_xent: factor must have one value, but has ", factor.sym_numel(),
                  ".");
}

inline void check_reduce_rows(const Options& o, const Tensor& target, const OptionalTensor& weight,
                              const OptionalTensor& lse, const OptionalTensor& lse_low, const OptionalTensor& picked,
                              const OptionalTensor& wsum, const OptionalTensor& totals, at::ScalarType loss_dtype) {
  check_loss_dtype(loss_dtype);
  check_options(o);
  TORCH_CHECK_VALUE(o.num_classes, "npu_xent: reduce_rows needs num_classes, the number of all classes.");
  CHECK_SYM_VALUE(o.num_classes->sym_gt(0), "npu_xent: num_classes must be positive, but is ", *o.num_classes, ".");
  check_target_and_weight(target, weight, *o.num_classes, target.device());
  TORCH_CHECK_TYPE(!weight || at::isFloatingType(weight->scalar_type()),
                   "npu_xent: weight must be a floating-point tensor, but is ", name_of(weight->scalar_type()),
                   "; convert it with weight.float().");
  if (!lse) {
    return;
  }
  TORCH_CHECK_VALUE(
      picked && (totals || o.reduction != Reduction::mean) && (wsum || !o.need_wsum()),
      "npu_xent: reduce_rows with lse also needs picked, totals for a mean, and wsum when label_smoothing "
      "is not 0.");
  const auto dtype = lse->scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "npu_xent: lse must be float32 or float64, but is ",
                   name_of(dtype), ".");
  check_npu_dtype(*lse, "lse");
  const auto n = target.sym_size(0);
  check_stats(*lse, "lse", n, dtype, target.device());
  if (lse_low) {
    check_stats(*lse_low, "lse_low", n, dtype, target.device());
  }
  check_stats(*picked, "picked", n, dtype, target.device());
  if (o.need_wsum()) {
    check_stats(*wsum, "wsum", n, dtype, target.device());
  }
  if (totals) {
    check_totals(*totals, target.device());
  }
}

}  // namespace npu_xent
