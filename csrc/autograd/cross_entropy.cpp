// cross_entropy and cross_entropy_: the loss and its gradient, composed of the primitives; and their autocast rules.
//
// "mean" and "sum" take one sweep: it computes the statistics and the gradient for an upstream gradient of 1, and the
// backward only scales that gradient (free if the upstream gradient is 1). If lse has a gradient too, which is known
// only then, the backward sweeps the logits again. Two sweeps, statistics in the forward and the gradient in the
// backward, are needed for "none", for log_prob and a differentiable z_loss, for an lse whose logits are overwritten,
// and for fp16: stored before loss scaling, small fp16 gradients would underflow.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"
#include "cpu/whole_loss.h"
#include "loss.h"

namespace npu_xent::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kDoubleBackward[] =
    "npu_xent: double backward through cross_entropy is not supported. Use torch.nn.functional.cross_entropy where a "
    "second derivative is needed, without npu_xent.patch_torch(), which replaces it.";

template <bool inplace>
class CrossEntropy : public torch::autograd::Function<CrossEntropy<inplace>> {
 public:
  static constexpr bool is_traceable = !inplace;

  // loss, z_loss, lse, log_prob
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& weight, const Options& options, const Wanted& wanted,
                               Results<4>* results) {
    // Detached above autograd's key, so that it shares the logits' version counter and in-place writes are detected.
    const auto over_logits = inplace ? logits.detach() : Tensor();
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    auto& saved = ctx->saved_data;
    const auto o = of_classes(options, logits.sym_size(-1));
    const bool in_one_sweep = one_sweep(logits.scalar_type(), o, wanted) && !(inplace && wanted.lse);
    saved["one_sweep"] = in_one_sweep;

    LossAndStats out;
    const bool directly = in_one_sweep && !wanted.lse && cpu::unobserved(logits, target, weight);
    if (directly) {
      const auto gradient = inplace ? cpu::Gradient::over_logits : cpu::Gradient::fresh;
      out = cpu::whole_loss(o, inplace ? over_logits : logits, target, weight, wanted, gradient);
    } else if (in_one_sweep) {
      out.totals = totals_of(o, target, weight, logits.scalar_type());
      Tensor picked, wsum;
      if constexpr (inplace) {
        std::tie(out.lse, out.lse_low, picked, wsum) =
            row_stats_grad<true>(o, logits, target, weight, out.totals, /*read_ignored=*/wanted.lse);
        out.grad = over_logits;
      } else {
        std::tie(out.lse, out.lse_low, picked, wsum, out.grad) =
            row_stats_grad<false>(o, logits, target, weight, out.totals, /*read_ignored=*/wanted.lse);
      }
      std::tie(out.loss, out.z_loss) =
          loss_of(o, target, weight, out.lse, out.lse_low, picked, wsum, out.totals, wanted.loss_dtype);
      out.log_prob = not_wanted(logits.options());
    } else {
      out = loss_by_reading(o, logits, target, weight, wanted);
    }
    if (in_one_sweep) {
      // Not save_for_backward: the backward returns this tensor, and must hold the only reference to it.
      saved["version"] = static_cast<int64_t>(inplace ? out.grad._version() : 0);
      saved["grad"] = std::move(out.grad);
    }
    if (!in_one_sweep || wanted.lse) {
      save(o, saved);
      ctx->save_for_backward({inplace ? logits : value_to_save(logits), target, weight.value_or(Tensor()), out.lse,
                              out.lse_low, out.totals});
    }
    if (!wanted.lse) {
      out.lse = directly ? out.lse : not_wanted(out.lse.options());
    }
    results->all = {out.loss, out.z_loss, out.lse, out.log_prob};
    return results->outputs(saved);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto grads = Results<4>::upstream(ctx->saved_data, upstream);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) {
      return variable_list(6);
    }
    const bool was_made = ctx->saved_data["one_sweep"].toBool() && !grads[2].defined();
    const auto grad = was_made ? scaled_grad(ctx, grads[0]) : swept_grad(ctx, grads);
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }

 private:
  static Tensor scaled_grad(AutogradContext* ctx, const Tensor& upstream) {
    const auto found = ctx->saved_data.find("grad");
    TORCH_CHECK(found != ctx->saved_data.end(),
                inplace ? "npu_xent: with consume_logits the first backward has released the gradient; a second one "
                          "needs consume_logits=False."
                        : "npu_xent: trying to backward through cross_entropy a second time, after its gradient has "
                          "been released; pass retain_graph=True to the first backward.");
    Tensor grad = found->second.toTensor();
    TORCH_CHECK(!inplace || grad._version() == ctx->saved_data["version"].toInt(),
                "npu_xent: with consume_logits the logits held their gradient, but they have been written since, by an "
                "in-place "
                "operation or by a second loss with consume_logits (version ",
                grad._version(), ", expected ", ctx->saved_data["version"].toInt(),
                "); do not change them before the backward, or use consume_logits=False.");
    // keep_graph: a second backward may come, so this one gets a copy.
    const bool copy = keeps_graph() && !inplace;
    if (!copy) {
      ctx->saved_data.erase(found);
    }
    grad = scaled(grad, upstream, copy);
    refuse_second_derivative(grad, 0, {upstream}, kDoubleBackward);
    return grad;
  }

  static Tensor swept_grad(AutogradContext* ctx, const variable_list& grads) {
    auto& saved = ctx->saved_data;
    TORCH_CHECK(saved.count("consumed") == 0,
                "npu_xent: with consume_logits the first backward has overwritten the logits; a second one needs "
                "consume_logits=False.");
    const auto tensors = ctx->get_saved_variables();
    if (!keeps_graph()) {
      saved.erase("grad");  // of the loss alone, made in the forward
    }
    const auto& logits = tensors[0];
    ForGrad operands;
    operands.lse = tensors[3];
    operands.lse_low = tensors[4];
    operands.totals = tensors[5];
    operands.grad_loss = optional(grads[0]);
    operands.grad_z_loss = optional(grads[1]);
    operands.grad_lse = optional(grads[2]);
    const auto sweep = [&](const auto& op) {
      return op(saved_options(saved), logits, tensors[1], optional(tensors[2]), operands);
    };
    if constexpr (inplace) {
      TORCH_CHECK(!at::GradMode::is_enabled(), kDoubleBackward);
      at::AutoDispatchBelowADInplaceOrView below;
      saved["consumed"] = true;
      sweep(row_grad<true>);
      return logits.detach();
    } else {
      const auto grad = [&] {
        at::AutoDispatchBelowADInplaceOrView below;
        return sweep(row_grad<false>);
      }();
      refuse_second_derivative(grad, 0, grads, kDoubleBackward);
      return grad;
    }
  }
};

template <bool inplace>
Loss cross_entropy_autograd(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                            std::optional<at::ScalarType> loss_dtype, bool need_lse, bool need_log_prob,
                            bool differentiable_z_loss) {
  if (!inplace && logits.dim() == 3 && !logits.is_cpu() && !logits.is_meta()) {  // from a program exported on the CPU
    auto out = cross_entropy_autograd<inplace>(o, logits.flatten(0, 1), target, weight, loss_dtype, need_lse,
                                               need_log_prob, differentiable_z_loss);
    std::get<3>(out) = need_log_prob ? std::get<3>(out).view_symint(logits.sym_sizes()) : std::get<3>(out);
    return out;
  }
  const Wanted wanted{loss_dtype.value_or(logits.scalar_type()), need_lse, need_log_prob, differentiable_z_loss};
  check_loss(o, logits, target, weight, wanted);
  TORCH_CHECK(!torch::autograd::isFwGradDefined(logits),
              "npu_xent: forward-mode derivatives of cross_entropy are not supported. Use "
              "torch.nn.functional.cross_entropy, or torch.func.jvp of npu_xent.cross_entropy.");
  if (inplace) {
    check_consumable(logits);
  }
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    Results<4> results{{true, differentiable_z_loss && o.lse_square_scale != 0, need_lse, false}};
    const auto outputs = CrossEntropy<inplace>::apply(logits, target, weight, o, wanted, &results);
    return std::tuple_cat(std::move(results).with(outputs));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const bool one_number = o.reduction != Reduction::none && !need_log_prob;
  if (one_number && cpu::unobserved(logits, target, weight)) {
    const auto out =
        cpu::whole_loss(of_classes(o, logits.sym_size(-1)), logits, target, weight, wanted, cpu::Gradient::none);
    return {out.loss, out.z_loss, out.lse, out.log_prob};
  }
  const auto out = loss_by_reading(o, logits, target, weight, wanted);
  return {out.loss, out.z_loss, need_lse ? out.lse : not_wanted(out.lse.options()), out.log_prob};
}

// Under autocast 16-bit logits are read as they are, and the loss comes in fp32 unless the caller named its dtype.
// (F.cross_entropy copies the logits to fp32 there.)
template <c10::DispatchKey key, bool inplace>
Loss cross_entropy_autocast(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                            std::optional<at::ScalarType> loss_dtype, bool need_lse, bool need_log_prob,
                            bool differentiable_z_loss) {
  c10::impl::ExcludeDispatchKeyGuard below(key);
  return cross_entropy<inplace>(o, logits, target, autocast_weight(weight, logits.scalar_type()),
                                loss_dtype.value_or(stats_dtype(logits.scalar_type())), need_lse, need_log_prob,
                                differentiable_z_loss);
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  m.impl("cross_entropy", flat<cross_entropy_autograd<false>>);
  m.impl("cross_entropy_", flat<cross_entropy_autograd<true>>);
}

// For inference mode, where autograd's key is excluded; the same function then saves nothing.
TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", flat<cross_entropy_autograd<false>>);
  m.impl("cross_entropy_", flat<cross_entropy_autograd<true>>);
}

// The devices with kernels, and cuda, where the composite runs.
#define AUTOCAST(KEY)                                                                    \
  TORCH_LIBRARY_IMPL(npu_xent, KEY, m) {                                                 \
    m.impl("cross_entropy", flat<cross_entropy_autocast<c10::DispatchKey::KEY, false>>); \
    m.impl("cross_entropy_", flat<cross_entropy_autocast<c10::DispatchKey::KEY, true>>); \
  }
AUTOCAST(AutocastCPU)
AUTOCAST(AutocastPrivateUse1)
AUTOCAST(AutocastCUDA)

}  // namespace npu_xent::autograd
