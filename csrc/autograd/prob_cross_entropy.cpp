// prob_cross_entropy: the loss of class probabilities. The forward reads logits and probabilities once, the backward
// reads them again and writes the gradients; the rest works on one value a row.
#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"
#include "composite.h"
#include "loss.h"

namespace npu_xent::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ProbLoss {
  Tensor loss, z_loss, lse, lse_low, part_sum;
};

ProbLoss prob_loss(const Options& o, const Tensor& logits, const Tensor& probabilities, const OptionalTensor& weight,
                   const Wanted& wanted) {
  auto [lse, lse_low, cross, part_sum] = prob_row_stats(o, logits, probabilities, weight);
  // Reduced as rows of a single class with label smoothing 1, whose loss is -wsum.
  auto single = of_classes(o, 1);
  single.label_smoothing = 1;
  single.ignore_index = -1;
  const auto target = at::zeros_symint({n_rows(logits)}, logits.options().dtype(at::kLong));
  const auto totals = totals_of(single, target, std::nullopt, logits.scalar_type());
  auto [loss, z_loss] = loss_of(single, target, std::nullopt, lse, lse_low, lse, cross, totals, wanted.loss_dtype);
  return {loss, z_loss, lse, lse_low, part_sum};
}

class ProbCrossEntropy : public torch::autograd::Function<ProbCrossEntropy> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& probabilities,
                               const OptionalTensor& weight, const Options& o, const Wanted& wanted,
                               Results<3>* results) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    auto out = prob_loss(o, logits, probabilities, weight, wanted);
    save(o, ctx->saved_data);
    ctx->save_for_backward({logits, probabilities, weight.value_or(Tensor()), out.lse, out.lse_low, out.part_sum});
    // An output must not be a saved tensor below autograd.
    results->all = {out.loss, out.z_loss, wanted.lse ? out.lse.clone() : not_wanted(out.lse.options())};
    return results->outputs(ctx->saved_data);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& of_outputs) {
    const auto tensors = ctx->get_saved_variables();
    const auto upstream = Results<3>::upstream(ctx->saved_data, of_outputs);
    variable_list grads(6);
    if (!upstream[0].defined() && !upstream[2].defined()) {
      return grads;
    }
    const auto o = saved_options(ctx->saved_data);
    auto logits = tensors[0], probabilities = tensors[1];
    const auto weight = optional(tensors[2]);
    check_storages({{"logits", logits}, {"probabilities", probabilities}, {"weight", weight}});
    const auto shape = logits.sym_sizes().vec();
    // Where a second derivative may follow, autograd records the gradient's own operations, from the logits on.
    const bool differentiable = at::GradMode::is_enabled();
    if (differentiable && logits.dim() == 3) {
      logits = logits.flatten(0, 1);
      probabilities = probabilities.flatten(0, 1);
    }
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    auto lse = tensors[3], lse_low = tensors[4], part_sum = tensors[5];
    if (differentiable) {
      std::tie(lse, lse_low, std::ignore, part_sum) = composite::prob_row_stats(o, logits, probabilities, weight);
    } else {
      below.emplace();
    }
    const auto of_rows = [&](const Tensor& grad) {
      check_storages({{"the upstream gradient", grad}});
      return grad.defined() ? grad.to(lse.scalar_type()).expand_symint(lse.sym_sizes()) : at::zeros_like(lse);
    };
    auto grad_loss = of_rows(upstream[0]), grad_lse = of_rows(upstream[2]);
    if (o.reduction == Reduction::mean) {
      grad_loss = grad_loss / c10::Scalar(lse.sym_numel());
    }
    if (o.lse_square_scale != 0) {
      grad_lse = grad_lse + grad_loss * lse * (2 * o.lse_square_scale);
    }
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1) && upstream[0].defined()};
    const auto compute = differentiable ? &composite::prob_row_grad : &prob_row_grad;
    auto [grad_logits, grad_probabilities] =
        compute(o, logits, probabilities, weight, lse, lse_low, part_sum, grad_loss, grad_lse, wanted);
    grads[0] = wanted[0] ? grad_logits.view_symint(shape) : Tensor();
    grads[1] = wanted[1] ? grad_probabilities.view_symint(shape) : Tensor();
    return grads;
  }
};

LossWithLse prob_cross_entropy_autograd(const Options& options, const Tensor& logits, const Tensor& probabilities,
                                        const OptionalTensor& weight, std::optional<at::ScalarType> loss_dtype,
                                        bool need_lse) {
  if (logits.dim() == 3 && !logits.is_cpu() && !logits.is_meta()) {  // from a program exported on the CPU
    return prob_cross_entropy_autograd(options, logits.flatten(0, 1), probabilities.flatten(0, 1), weight, loss_dtype,
                                       need_lse);
  }
  const Wanted wanted{loss_dtype.value_or(logits.scalar_type()), need_lse};
  check_prob_rows(options, logits, probabilities, weight);
  check_loss_options(weight, wanted, logits);
  check_no_forward_mode(logits, "cross_entropy");
  check_no_forward_mode(probabilities, "cross_entropy");
  const auto o = of_classes(options, logits.sym_size(-1));
  if (at::GradMode::is_enabled() && (logits.requires_grad() || probabilities.requires_grad())) {
    Results<3> results{{true, false, need_lse}};
    const auto outputs = ProbCrossEntropy::apply(logits, probabilities, weight, o, wanted, &results);
    return std::tuple_cat(std::move(results).with(outputs));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const auto out = prob_loss(o, logits, probabilities, weight, wanted);
  return {out.loss, out.z_loss, need_lse ? out.lse : not_wanted(out.lse.options())};
}

// As cross_entropy's.
template <c10::DispatchKey key>
LossWithLse prob_cross_entropy_autocast(const Options& o, const Tensor& logits, const Tensor& probabilities,
                                        const OptionalTensor& weight, std::optional<at::ScalarType> loss_dtype,
                                        bool need_lse) {
  c10::impl::ExcludeDispatchKeyGuard below(key);
  return prob_cross_entropy(o, logits, probabilities, autocast_weight(weight, logits.scalar_type()),
                            loss_dtype.value_or(stats_dtype(logits.scalar_type())), need_lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  m.impl("prob_cross_entropy", flat<prob_cross_entropy_autograd>);
}

// For inference mode, where autograd's key is excluded; the same function then saves nothing.
TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("prob_cross_entropy", flat<prob_cross_entropy_autograd>);
}

// The devices with kernels, and cuda, where the composite runs.
#define AUTOCAST(KEY)                                                                       \
  TORCH_LIBRARY_IMPL(npu_xent, KEY, m) {                                                    \
    m.impl("prob_cross_entropy", flat<prob_cross_entropy_autocast<c10::DispatchKey::KEY>>); \
  }
AUTOCAST(AutocastCPU)
AUTOCAST(AutocastPrivateUse1)
AUTOCAST(AutocastCUDA)

}  // namespace npu_xent::autograd
