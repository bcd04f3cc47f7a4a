// selected_log_probs: the log-probabilities of K classes of each row. The sweeps over the logits are the primitives';
// what is added here has size N x K.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd/common.h"

namespace npu_xent::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kDoubleBackward[] =
    "npu_xent: double backward through selected_log_probs is not supported. Use torch.log_softmax where a second "
    "derivative is needed.";

constexpr int64_t kIgnored = -1;

// To the primitives every row is an ignored one, whose lse is read and may have a gradient.
Tensor ignored_targets(const Tensor& index) {
  return at::full_symint({index.sym_size(0)}, kIgnored, index.options());
}

Tensor is_bad(const Tensor& index, const Tensor& logits) {
  return index.lt(0).logical_or(index.ge(c10::Scalar(logits.sym_size(-1))));
}

// Not t.to(dtype), which may return t itself: an operator below autograd must not return its input.
Tensor in_dtype(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

// The selected logits as the softmax takes them, and the factor of their gradient; both [N, K].
class Selected {
 public:
  Tensor z, slope;

  Selected(const Options& o, const Tensor& logits, const Tensor& index, const OptionalTensor& row_temperature) {
    const auto dtype = stats_dtype(logits.scalar_type());
    const auto x = in_dtype(logits.gather(1, index), dtype);
    slope = scale(o.logit_scale / o.temperature, row_temperature, x);
    if (!o.softcap) {
      z = x * slope;
      return;
    }
    z = capped(o, x, row_temperature);
    const auto ratio = z / scale(*o.softcap / o.temperature, row_temperature, x);
    slope = slope * (1 - ratio) * (1 + ratio);
  }

 private:
  // number / temperature, [N, 1] or []; rounded as the sweeps round it, so that errors cancel in z - lse.
  static Tensor scale(double number, const OptionalTensor& row_temperature, const Tensor& like) {
    if (like.scalar_type() == at::kFloat) {  // out of its range: infinite
      number = like.is_cpu() && row_temperature ? number : double{static_cast<float>(number)};
    }
    if (!row_temperature) {
      return at::full({}, number, like.options());
    }
    const auto temperature = row_temperature->unsqueeze(1);
    return like.is_cpu() ? in_dtype(number / in_dtype(temperature, at::kDouble), like.scalar_type())
                         : temperature.reciprocal() * number;
  }
  // The softcap as the device's sweep computes it: each selected logit as a row of one class.
  static Tensor capped(const Options& options, const Tensor& x, const OptionalTensor& row_temperature) {
    const auto rows = x.reshape_symint({-1, 1});
    OptionalTensor temperature;
    if (row_temperature) {
      temperature = row_temperature->unsqueeze(1).expand_symint(x.sym_sizes()).reshape(-1);
    }
    const auto target = at::full_symint({rows.sym_size(0)}, 0, x.options().dtype(at::kLong));
    auto [lse, lse_low, picked, wsum, log_prob, entropy, top1] =
        row_stats(of_classes(options, 1), rows, target, std::nullopt, temperature, /*need_log_prob=*/false, {});
    return picked.reshape_symint(x.sym_sizes());
  }
};

// out[n, k] = the sum of x[n, j] over all j with index[n, j] == index[n, k]; both sorted along K.
Tensor sums_of_equal(const Tensor& x, const Tensor& sorted) {
  if (TORCH_GUARD_SIZE_OBLIVIOUS(x.sym_size(1).sym_eq(1))) {
    return x;  // also because the compiler of torch 2.7 computes the gather before the scatter_add here
  }
  const auto differs = sorted.slice(1, 1).ne(sorted.slice(1, 0, -1));
  const auto first = at::zeros_like(sorted.slice(1, 0, 1));
  const auto run = at::cat({first, differs.cumsum(1)}, 1);
  return at::zeros_like(x).scatter_add(1, run, x).gather(1, run);
}

class SelectedLogProbs : public torch::autograd::Function<SelectedLogProbs> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& index,
                        const OptionalTensor& row_temperature, const Options& o) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [log_probs, lse, lse_low] = compute(o, logits, index, row_temperature);
    save(o, ctx->saved_data);
    ctx->save_for_backward({value_to_save(logits), index, row_temperature.value_or(Tensor()), lse, lse_low});
    return log_probs;
  }

  static std::tuple<Tensor, Tensor, Tensor> compute(const Options& o, const Tensor& logits, const Tensor& index,
                                                    const OptionalTensor& row_temperature) {
    StatsWanted wanted;
    wanted.read_ignored = true;
    auto [lse, lse_low, picked, wsum, log_prob, entropy, top1] =
        row_stats(o, logits, ignored_targets(index), std::nullopt, row_temperature, /*need_log_prob=*/false, wanted);
    const auto bad = is_bad(index, logits);
    const auto z = Selected(o, logits, index.masked_fill(bad, 0), row_temperature).z;
    const auto undefined = bad.logical_or(lse.isfinite().logical_not().unsqueeze(1));
    const auto log_probs = ((z - lse.unsqueeze(1)) - lse_low.unsqueeze(1))
                               .masked_fill(undefined, std::numeric_limits<double>::quiet_NaN());
    return {log_probs, lse, lse_low};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto tensors = ctx->get_saved_variables();  // above autograd's key: hooks may run operations
    const auto grad = gradient(saved_options(ctx->saved_data), tensors, upstream);
    refuse_second_derivative(grad, 0, upstream, kDoubleBackward);
    return {grad, Tensor(), Tensor(), Tensor()};
  }

 private:
  static Tensor gradient(const Options& o, const variable_list& tensors, const variable_list& upstream) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto &logits = tensors[0], &index = tensors[1];
    check_storages({{"the gradient of the log-probabilities", upstream[0]}, {"index", index}});
    const auto bad = is_bad(index, logits);
    const auto g = upstream[0].masked_fill(bad, std::numeric_limits<double>::quiet_NaN());
    const auto total = g.sum(1);
    ForGrad operands;
    operands.row_temperature = optional(tensors[2]);
    operands.lse = tensors[3];
    operands.lse_low = tensors[4];
    operands.grad_lse = total.neg();
    auto grad = row_grad<false>(o, logits, ignored_targets(index), std::nullopt, operands);
    // The selected entries anew, in the statistics' dtype: g - G p, with g the sum over equal indices and G over all;
    // (g - G) - G (p - 1) where p is near 1 and the first form may cancel.
    const auto [sorted, order] = index.masked_fill(bad, 0).sort(1);
    const Selected selected(o, logits, sorted, operands.row_temperature);
    const auto log_p = (selected.z - operands.lse.unsqueeze(1)) - tensors[4].unsqueeze(1);
    const auto all = total.unsqueeze(1);
    const auto sums = sums_of_equal(g.gather(1, order), sorted);
    const auto entries =
        at::where(log_p.gt(-0.5), (sums - all) - all * log_p.expm1(), sums - all * log_p.exp())
            .masked_fill(operands.lse.isfinite().logical_not().unsqueeze(1), std::numeric_limits<double>::quiet_NaN());
    const auto rows = at::arange(c10::Scalar(index.sym_size(0)), index.options()).unsqueeze(1);
    // Not scatter_, which copies 16-bit tensors to float32 on the CPU.
    at::index_put_(grad, {rows, sorted}, in_dtype(entries * selected.slope, grad.scalar_type()));
    return grad;
  }
};

void check_index(const Tensor& index, const Tensor& logits) {
  TORCH_CHECK_VALUE(index.dim() == 2 && index.device() == logits.device(),
                    "npu_xent: index must have shape [N, K] and be on the logits' device ", logits.device(),
                    ", but has ", index.dim(), " dimensions and is on ", index.device(), ".");
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "npu_xent: index must be int64, but is ",
                   name_of(index.scalar_type()), "; convert it with index.long().");
  CHECK_SYM_VALUE(index.sym_size(0).sym_eq(n_rows(logits)), "npu_xent: index must have a row for each of the ",
                  n_rows(logits), " rows of the logits, but has ", index.sym_size(0), ".");
}

// On the CPU, but not in a compiler's tensors.
bool has_readable_values(const Tensor& t) {
  return t.is_cpu() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
         !t.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

void check_index_range(const Tensor& index, const Tensor& logits) {
  if (!has_readable_values(index)) {
    return;
  }
  const int64_t classes = logits.size(1);
  const auto dense = index.contiguous();
  const auto* values = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < classes, "npu_xent: index[", i / dense.size(1), ", ",
                      i % dense.size(1), "] is ", values[i], ", which is not a class in [0, ", classes, ").");
  }
}

Tensor selected_log_probs_autograd(const Options& options, const Tensor& logits, const Tensor& index,
                                   const OptionalTensor& row_temperature) {
  check_logits(logits);
  check_index(index, logits);
  check_storages({{"index", index}});
  auto o = by_row(options, logits.sym_size(-1), "selected_log_probs");
  o.ignore_index = kIgnored;
  check_options(o);
  check_row_temperature(row_temperature, n_rows(logits), logits.scalar_type(), logits.device());
  check_whole_rows(options, logits.sym_size(-1), "selected_log_probs");
  check_no_forward_mode(logits, "selected_log_probs");
  check_no_forward_mode(row_temperature, "selected_log_probs");
  check_index_range(index, logits);
  if (row_temperature && has_readable_values(*row_temperature)) {
    check_temperatures(row_temperature->resolve_neg(), {}, kIgnored);  // above the key that resolves it
  }
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    return SelectedLogProbs::apply(logits, index, row_temperature, o);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(SelectedLogProbs::compute(o, logits, index, row_temperature));
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  m.impl("selected_log_probs", flat<selected_log_probs_autograd>);
}

// For inference mode, where autograd's key is excluded; the same function then saves nothing.
TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("selected_log_probs", flat<selected_log_probs_autograd>);
}

}  // namespace npu_xent::autograd
