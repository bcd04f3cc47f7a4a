// The options of the loss, defined only here: members with defaults, names, schema and ranges. Kernels take
// `const Options&` as their first argument; adaptor.h converts it for the dispatcher.
//
//   reduction         "none": [N]; "mean" divides by the weight of the kept rows; "sum"
//   ignore_index      rows with this target are ignored; their logits are read only for lse and log_prob
//   label_smoothing   e: the probability mass spread evenly over all classes
//   lse_square_scale  zs: the z-loss zs lse^2 is added to the loss
//   logit_scale       t: softmax(t x)
//   softcap           c > 0: softmax(c tanh(t x / c))
//   temperature       T: softmax(z / T), with z the logits after scale and softcap
//   grad_scale        the outermost factor of the gradient, u = grad_scale / T; default: t
//   class_start       for logits that are one shard of the classes: the class of column 0; num_classes counts the
//                     classes of all shards. A target of another shard has picked = 0 and no [c = y] term here.
//                     Shards i merge into lse = log sum exp lse_i, picked = sum picked_i, and with W_i the sum of the
//                     shard's weights, wsum = sum (wsum_i + W_i (lse_i - lse)); lse_low may then be omitted. The
//                     entropies merge into sum exp(lse_i - lse) (H_i + lse - lse_i) over the shards with exp(lse_i -
//                     lse) > 0, with lse_low in the differences
//
// row_math.h has the formulas.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "row_math.h"

namespace npu_xent {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Options {
  Reduction reduction = Reduction::mean;
  c10::SymInt ignore_index = -100;
  double label_smoothing = 0;
  double lse_square_scale = 0;
  double logit_scale = 1;
  std::optional<double> softcap;
  double temperature = 1;
  std::optional<double> grad_scale;
  c10::SymInt class_start = 0;
  std::optional<c10::SymInt> num_classes;

  // The members of `o` and their names, in the order of the schema.
  template <typename Self>
  static auto tie(Self& o) {
    return std::tie(o.reduction, o.ignore_index, o.label_smoothing, o.lse_square_scale, o.logit_scale, o.softcap,
                    o.temperature, o.grad_scale, o.class_start, o.num_classes);
  }
  static constexpr std::array kNames{"reduction", "ignore_index", "label_smoothing", "lse_square_scale", "logit_scale",
                                     "softcap",   "temperature",  "grad_scale",      "class_start",      "num_classes"};
  // f(name, member) for each member of `o`.
  template <typename Self, typename F>
  static void visit(Self& o, const F& f) {
    std::apply(
        [&](auto&... member) {
          size_t i = 0;
          (f(kNames[i++], member), ...);
        },
        tie(o));
  }

  bool need_wsum() const { return label_smoothing != 0; }
};

inline constexpr char kOptionsSchema[] =
    "str reduction=\"mean\", SymInt ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, "
    "float logit_scale=1.0, float? softcap=None, float temperature=1.0, float? grad_scale=None, SymInt class_start=0, "
    "SymInt? num_classes=None";

// Checks the ranges of the numbers; checks.h has the checks that depend on tensors.
inline void check_options(const Options& o) {
  TORCH_CHECK_VALUE(o.label_smoothing >= 0 && o.label_smoothing <= 1,
                    "npu_xent: label_smoothing must lie in [0, 1], but is ", o.label_smoothing, ".");
  TORCH_CHECK_VALUE(o.lse_square_scale >= 0 && std::isfinite(o.lse_square_scale),
                    "npu_xent: lse_square_scale must be finite and not negative, but is ", o.lse_square_scale, ".");
  TORCH_CHECK_VALUE(std::isfinite(o.logit_scale), "npu_xent: logit_scale must be finite, but is ", o.logit_scale, ".");
  // This range keeps softcap, and logit_scale / softcap for usual logit scales, within float32.
  TORCH_CHECK_VALUE(!o.softcap || (*o.softcap >= 1e-6 && *o.softcap <= 1e6),
                    "npu_xent: softcap must lie in [1e-6, 1e6], but is ", o.softcap.value_or(0),
                    "; leave it at None for no softcap.");
  TORCH_CHECK_VALUE(o.temperature >= 1e-6 && o.temperature <= 1e6,
                    "npu_xent: temperature must lie in [1e-6, 1e6], but is ", o.temperature,
                    "; leave it at 1 for none.");
  TORCH_CHECK_VALUE(std::isfinite(o.grad_scale.value_or(1)), "npu_xent: grad_scale must be finite, but is ",
                    o.grad_scale.value_or(1), ".");
}

// The options as plain numbers, for kernels; n_cols is the number of columns of this shard.
inline RowOptions row_options(const Options& o, int64_t n_cols) {
  const auto number = [](const c10::SymInt& value) { return value.guard_int(__FILE__, __LINE__); };
  RowOptions row;
  row.reduction = o.reduction;
  row.ignore_index = number(o.ignore_index);
  row.label_smoothing = o.label_smoothing;
  row.lse_square_scale = o.lse_square_scale;
  row.class_start = number(o.class_start);
  row.num_classes = o.num_classes ? number(*o.num_classes) : row.class_start + n_cols;
  // c tanh(t x / c) / T is the softcap of c / T of logits scaled by t / T.
  row.logit_scale = o.logit_scale / o.temperature;
  row.softcap = o.softcap.value_or(0) / o.temperature;
  row.grad_scale = o.grad_scale.value_or(o.logit_scale) / o.temperature;
  return row;
}

}  // namespace npu_xent
