// The primitives composed of aten operations, for devices without kernels. Same formulas (row_math.h), same results up
// to rounding. Nothing synchronizes with the device, so an out-of-range target cannot raise: its row becomes NaN.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "composite.h"

namespace npu_xent::composite {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The targets [N], classified.
struct Targets {
  Tensor kept;      // a class of some shard
  Tensor bad;       // neither a class nor ignore_index
  Tensor in_shard;  // a class of this shard
  Tensor column;    // its column, 0 if not in this shard
  Tensor safe;      // the target, 0 where it is not a class

  Targets(const RowOptions& o, const Tensor& target, int64_t n_cols) {
    const auto is_class = target.ge(0).logical_and(target.lt(o.num_classes));
    const auto named = target.ne(o.ignore_index);
    kept = is_class.logical_and(named);
    bad = named.logical_and(is_class.logical_not());
    safe = target.masked_fill(kept.logical_not(), 0);
    const auto local = target - o.class_start;
    in_shard = kept.logical_and(local.ge(0)).logical_and(local.lt(n_cols));
    column = local.masked_fill(in_shard.logical_not(), 0);
  }
};

// The argument of the softmax, in the statistics dtype, and what its gradient is multiplied by.
struct Mapped {
  Tensor z;                        // scaled and softcapped logits, divided by the temperature
  Tensor slope;                    // the derivative of the softcap; undefined if it is 1
  OptionalTensor row_temperature;  // [N, 1]

  Mapped(const RowOptions& row, const Tensor& logits, const OptionalTensor& temperature) {
    const auto dtype = stats_dtype(logits.scalar_type());
    z = logits.to(dtype);
    if (row.logit_scale != 1) {
      z = z * row.logit_scale;
    }
    if (row.softcap != 0) {
      const auto ratio = (z / row.softcap).tanh();
      z = ratio * row.softcap;
      slope = (1 - ratio) * (1 + ratio);
    }
    if (temperature) {
      const auto rows = temperature->to(dtype).unsqueeze(1);
      const auto usable = rows.gt(0).logical_and(rows.isfinite());
      row_temperature = rows.masked_fill(usable.logical_not(), kNaN);
      z = z / *row_temperature;
    }
  }
};

// Whether each target is the first of the largest scaled logits.
Tensor first_of_largest(const RowOptions& row, const Tensor& logits, const Targets& targets) {
  const auto x = row.logit_scale < 0 ? logits.neg() : row.logit_scale > 0 ? logits : at::zeros_like(logits);
  const auto value = x.gather(1, targets.column.unsqueeze(1));
  const auto columns = at::arange(logits.size(1), targets.column.options());
  const auto beats = x.gt(value).logical_or(x.eq(value).logical_and(columns.lt(targets.column.unsqueeze(1))));
  return targets.in_shard.logical_and(beats.any(1).logical_not());
}

// The weight of each row's target.
Tensor target_weight(const OptionalTensor& weight, const Targets& targets, at::ScalarType dtype) {
  return weight ? weight->to(dtype).index_select(0, targets.safe)
                : at::full({1}, 1.0, targets.kept.options().dtype(dtype));
}

// The gradient, copied over the logits if over_logits.
template <bool over_logits>
GradOf<over_logits> placed(const Tensor& logits, const Tensor& grad) {
  if constexpr (over_logits) {
    logits.copy_(grad);
    logits.unsafeGetTensorImpl()->bump_version();  // autograd runs this below the key that would
  } else {
    return grad;
  }
}

RowStats row_stats_composite(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                             const OptionalTensor& row_temperature, bool need_log_prob, const StatsWanted& wanted) {
  check_row_stats(o, logits, target, weight, row_temperature);
  const int64_t n_cols = logits.size(1);
  const auto row = row_options(o, n_cols);
  const Targets targets(row, target, n_cols);
  const auto x = Mapped(row, logits, row_temperature).z;
  const auto unread = target.eq(row.ignore_index)
                          .logical_and(at::full({}, !(wanted.read_ignored || need_log_prob), targets.kept.options()));
  const auto true_lse = x.logsumexp(1);
  const auto lse = true_lse.masked_fill(unread, 0);
  // Without the rounding of lse, sum exp(x - lse) would be 1.
  const auto undefined = true_lse.isfinite().logical_not();
  const auto low = (x - true_lse.unsqueeze(1)).exp().sum(1).log().masked_fill(undefined, 0);
  const auto picked = x.gather(1, targets.column.unsqueeze(1))
                          .squeeze(1)
                          .masked_fill(targets.in_shard.logical_not(), 0)
                          .masked_fill(targets.bad, kNaN);
  auto wsum = not_wanted(x.options());
  if (wanted.wsum) {
    const auto from_lse = x - true_lse.unsqueeze(1) - low.unsqueeze(1);
    if (weight) {
      const auto w = weight->to(x.scalar_type()).narrow(0, row.class_start, n_cols);
      wsum = (from_lse * w).masked_fill(w.eq(0), 0).sum(1).masked_fill(unread, 0);  // -inf * 0 would be NaN
    } else {
      wsum = from_lse.sum(1).masked_fill(unread, 0);
    }
  }
  auto log_prob = not_wanted(logits.options());
  if (need_log_prob) {
    log_prob = (x - true_lse.masked_fill(undefined, kNaN).unsqueeze(1) - low.unsqueeze(1))
                   .to(logits.scalar_type())
                   .contiguous();
  }
  auto entropy = not_wanted(x.options());
  if (wanted.entropy) {
    const auto y = x - true_lse.unsqueeze(1) - low.unsqueeze(1), p = y.exp();
    entropy = (p * y).masked_fill(p.eq(0), 0).sum(1).neg().masked_fill(undefined, kNaN).masked_fill(unread, 0);
  }
  auto top1 = not_wanted(target.options().dtype(at::kBool));
  if (wanted.top1) {
    top1 = first_of_largest(row, logits, targets).logical_and(undefined.logical_not());
  }
  return {lse, low.masked_fill(unread, 0), picked, wsum, log_prob, entropy, top1};
}

template <bool over_logits>
GradOf<over_logits> row_grad_composite(const Options& o, const Tensor& logits, const Tensor& target,
                                       const OptionalTensor& weight, const ForGrad& operands) {
  check_row_grad(o, logits, target, weight, operands);
  const auto& [lse, lse_low, totals, grad_loss, grad_z_loss, grad_lse, row_temperature, entropy, grad_entropy] =
      operands;
  if (over_logits) {
    check_dense(logits);
  }
  const int64_t n_cols = logits.size(1);
  const auto row = row_options(o, n_cols);
  const Targets targets(row, target, n_cols);
  const auto dtype = lse.scalar_type();
  const auto denominator = [&, &all = totals](int64_t i) { return all->to(dtype).select(0, i); };
  const bool mean = o.reduction == Reduction::mean;
  const auto no_gradient = at::full({1}, 0.0, lse.options());
  const auto upstream = [&](const OptionalTensor& g) { return g ? g->to(dtype).reshape(-1) : no_gradient; };
  const auto from_loss = upstream(grad_loss);
  const auto named = target.eq(row.ignore_index);
  const bool of_lse = grad_lse.has_value();
  const auto of_kept = [&](const Tensor& x) { return of_lse ? x.masked_fill(named, 0) : x; };
  // Not 0 / 0: only the gradient of a mean loss over no weight is undefined.
  const auto g = of_kept(mean && grad_loss ? from_loss / denominator(kKeptWeight) : from_loss);

  // a, b and s of row_math.h, [N] or [1].
  const double per_class = o.label_smoothing / static_cast<double>(row.num_classes);
  const auto b = g * (1 - o.label_smoothing) * target_weight(weight, targets, dtype);
  auto a = b;
  if (o.label_smoothing != 0) {
    a = a + g * per_class * denominator(kClassWeight);
  }
  if (o.lse_square_scale != 0) {
    auto z = from_loss + upstream(grad_z_loss);
    z = mean ? z / denominator(kKeptRows) : z;
    a = a + of_kept(z * (2 * o.lse_square_scale) * lse);
  }
  auto without_gradient = named;
  if (grad_lse) {
    const auto from_lse = upstream(grad_lse);
    a = a + from_lse;
    without_gradient = named.logical_and(from_lse.eq(0));
  }
  const Mapped mapped(row, logits, row_temperature);
  const auto& x = mapped.z;
  const auto low = lse_low ? *lse_low : no_gradient;  // zeros
  const auto y = x - lse.unsqueeze(1);
  auto grad = y.exp() * (a * low.neg().exp()).unsqueeze(1);
  auto h = no_gradient;
  if (grad_entropy) {
    h = upstream(grad_entropy).masked_fill(named, 0);
    const auto from_mean = y - low.unsqueeze(1) + entropy->unsqueeze(1), p = (y - low.unsqueeze(1)).exp();
    grad = grad - (h.unsqueeze(1) * p * from_mean).masked_fill(p.eq(0), 0);  // z may be -inf
  }
  const auto s = g * per_class;
  if (o.label_smoothing != 0) {
    const auto share = s.unsqueeze(1);
    grad = grad - (weight ? share * weight->to(dtype).narrow(0, row.class_start, n_cols) : share);
  }
  // The target's column, avoiding the cancellation of a p - b for confident predictions.
  const auto column = targets.column.unsqueeze(1);
  const auto from_lse = x.gather(1, column).squeeze(1) - lse - low;
  auto at_target = a * from_lse.expm1() + (a - b) - s * target_weight(weight, targets, dtype);
  if (grad_entropy) {
    const auto p = from_lse.exp();
    at_target = at_target - (h * p * (from_lse + *entropy)).masked_fill(p.eq(0), 0);
  }
  grad =
      grad.scatter(1, column, at::where(targets.in_shard, at_target, grad.gather(1, column).squeeze(1)).unsqueeze(1));
  if (mapped.slope.defined()) {
    grad = grad * mapped.slope;
  }
  grad = grad * row.grad_scale;
  if (mapped.row_temperature) {
    grad = grad / *mapped.row_temperature;
  }
  const auto undefined = targets.bad.logical_or(lse.isfinite().logical_not());
  return placed<over_logits>(logits, grad.masked_fill(undefined.unsqueeze(1), kNaN)
                                         .masked_fill(without_gradient.unsqueeze(1), 0)
                                         .to(logits.scalar_type())
                                         .contiguous());
}

template <bool over_logits>
StatsGradOf<over_logits> row_stats_grad_composite(const Options& o, const Tensor& logits, const Tensor& target,
                                                  const OptionalTensor& weight, const Tensor& totals,
                                                  bool read_ignored) {
  check_row_stats_grad(o, logits, target, weight, totals);
  if (over_logits) {
    check_dense(logits);
  }
  StatsWanted wanted;
  wanted.wsum = o.need_wsum();
  wanted.read_ignored = read_ignored;
  auto [lse, lse_low, picked, wsum, log_prob, entropy, top1] =
      row_stats(o, logits, target, weight, std::nullopt, /*need_log_prob=*/false, wanted);
  ForGrad operands;
  operands.lse = lse;
  operands.lse_low = lse_low;
  operands.totals = totals;
  operands.grad_loss = at::ones({}, lse.options());
  if constexpr (over_logits) {
    row_grad<true>(o, logits, target, weight, operands);
    return {lse, lse_low, picked, wsum};
  } else {
    return {lse, lse_low, picked, wsum, row_grad<false>(o, logits, target, weight, operands)};
  }
}

Reduced reduce_rows_composite(const Options& o, const Tensor& target, const OptionalTensor& weight,
                              const OptionalTensor& lse, const OptionalTensor& lse_low, const OptionalTensor& picked,
                              const OptionalTensor& wsum, const OptionalTensor& totals, at::ScalarType loss_dtype) {
  check_reduce_rows(o, target, weight, lse, lse_low, picked, wsum, totals, loss_dtype);
  const auto row = row_options(o, 0);
  const auto dtype = lse ? lse->scalar_type() : stats_dtype(loss_dtype);
  const auto out = target.options().dtype(loss_dtype);
  const Targets targets(row, target, row.num_classes);
  const auto kept_weight = at::where(targets.kept, target_weight(weight, targets, dtype), 0.0);
  if (!lse) {
    const auto class_weight = weight ? weight->to(dtype).sum() : at::full({}, row.num_classes, kept_weight.options());
    return {not_wanted(out), not_wanted(out),
            at::stack({kept_weight.sum(), targets.kept.sum().to(dtype), class_weight})};
  }
  const auto denominator = [&](int64_t i) { return totals->to(dtype).select(0, i); };
  const auto nll = lse_low ? *lse - *picked + *lse_low : *lse - *picked;
  const auto share = (1 - o.label_smoothing) * kept_weight;
  auto loss = (share * nll).masked_fill(share.eq(0), 0);
  if (o.label_smoothing != 0) {
    loss = loss - o.label_smoothing / static_cast<double>(row.num_classes) * *wsum;
  }
  auto z_loss = o.lse_square_scale * lse->square();
  const auto finish = [&](const Tensor& values) {
    return values.masked_fill(lse->isfinite().logical_not().logical_or(targets.bad), kNaN)
        .masked_fill(target.eq(row.ignore_index), 0);
  };
  loss = finish(loss);
  z_loss = finish(z_loss);
  if (o.reduction != Reduction::none) {
    loss = loss.sum();
    z_loss = z_loss.sum();
  }
  if (o.reduction == Reduction::mean) {
    const auto total = denominator(kKeptWeight);
    loss = (loss / total).masked_fill(total.eq(0), kNaN);  // with smoothing the numerator may not be 0
    z_loss = z_loss / denominator(kKeptRows);
  }
  const auto no_totals = not_wanted(target.options().dtype(dtype));
  if (o.lse_square_scale == 0) {
    return {loss.to(loss_dtype), not_wanted(out), no_totals};
  }
  return {(loss + z_loss).to(loss_dtype), z_loss.to(loss_dtype), no_totals};
}

// v_c = w_c ((1 - e) q_c + e / C)
Tensor parts_of(const RowOptions& row, const Tensor& probabilities, const OptionalTensor& weight,
                at::ScalarType dtype) {
  const double e = row.label_smoothing;
  const auto parts = probabilities.to(dtype) * (1 - e) + e / static_cast<double>(row.num_classes);
  return weight ? parts * weight->to(dtype) : parts;
}

void scale_composite(const Tensor& self, const Tensor& factor) {
  check_scale(self, factor);
  // Multiply in the statistics dtype, whatever the dtype of self.
  const auto dtype = stats_dtype(self.scalar_type());
  self.copy_(self.to(dtype) * factor.to(dtype).reshape({}));
  self.unsafeGetTensorImpl()->bump_version();  // autograd runs this below the key that would
}

}  // namespace

ProbStats prob_row_stats(const Options& o, const Tensor& logits, const Tensor& probabilities,
                         const OptionalTensor& weight) {
  check_prob_rows(o, logits, probabilities, weight);
  const auto row = row_options(o, logits.size(1));
  const auto x = Mapped(row, logits, std::nullopt).z;
  const auto parts = parts_of(row, probabilities, weight, x.scalar_type());
  const auto lse = x.logsumexp(1), y = x - lse.unsqueeze(1);
  const auto low = y.exp().sum(1).log().masked_fill(lse.isfinite().logical_not(), 0);
  const auto cross = ((y - low.unsqueeze(1)).masked_fill(parts.eq(0), 0) * parts).sum(1);  // -inf * 0 would be NaN
  return {lse, low, cross, parts.sum(1)};
}

ProbGrads prob_row_grad(const Options& o, const Tensor& logits, const Tensor& probabilities,
                        const OptionalTensor& weight, const Tensor& lse, const Tensor& lse_low, const Tensor& part_sum,
                        const Tensor& grad_loss, const Tensor& grad_lse, std::array<bool, 2> wanted) {
  check_prob_row_grad(
      o, logits, probabilities, weight,
      {{"lse", lse}, {"lse_low", lse_low}, {"part_sum", part_sum}, {"grad_loss", grad_loss}, {"grad_lse", grad_lse}});
  const auto row = row_options(o, logits.size(1));
  const Mapped mapped(row, logits, std::nullopt);
  const auto parts = parts_of(row, probabilities, weight, mapped.z.scalar_type());
  const auto y = mapped.z - lse.unsqueeze(1) - lse_low.unsqueeze(1), from_loss = grad_loss.unsqueeze(1);
  const auto undefined = lse.isfinite().logical_not().unsqueeze(1);
  const auto stored = [&](bool is_wanted, const auto& grad) {
    return is_wanted ? grad().masked_fill(undefined, kNaN).to(logits.scalar_type()).contiguous()
                     : not_wanted(logits.options());
  };
  const auto of_logits = [&] {
    const auto grad = y.exp() * (grad_loss * part_sum + grad_lse).unsqueeze(1) - from_loss * parts;
    return (mapped.slope.defined() ? grad * mapped.slope : grad) * row.grad_scale;
  };
  const auto of_probabilities = [&] {
    const auto masked = parts.eq(0).logical_and(y.eq(-std::numeric_limits<double>::infinity()));
    const auto grad = y.masked_fill(masked, 0) * from_loss * (row.label_smoothing - 1);
    return weight ? grad * weight->to(grad.scalar_type()) : grad;
  };
  return {stored(wanted[0], of_logits), stored(wanted[1], of_probabilities)};
}

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("row_stats", flat<row_stats_composite>);
  m.impl("row_grad", flat<row_grad_composite<false>>);
  m.impl("row_grad_", flat<row_grad_composite<true>>);
  m.impl("row_stats_grad", flat<row_stats_grad_composite<false>>);
  m.impl("row_stats_grad_", flat<row_stats_grad_composite<true>>);
  m.impl("reduce_rows", flat<reduce_rows_composite>);
  m.impl("scale_", scale_composite);
  m.impl("prob_row_stats", flat<prob_row_stats>);
  m.impl("prob_row_grad", flat<prob_row_grad>);
}

}  // namespace npu_xent::composite
