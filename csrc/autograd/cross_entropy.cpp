// cross_entropy and cross_entropy_: the loss, made of the primitives, and its gradient.
//
// One sweep when the upstream gradient can be foreseen: for "mean" and "sum" it is taken as 1, the gradient of the
// logits is made together with the statistics, and the backward only scales it (which costs nothing when it is 1). Two
// sweeps (statistics now, gradient in the backward) for "none"; for log_prob and a differentiable z_loss; and for fp16,
// where a gradient stored at upstream 1 would underflow exactly what a loss scale is there to save.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "autograd/one_sweep.h"
#include "autograd/refuse.h"
#include "loss.h"

namespace npu_xent::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_consumable(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.requires_grad() && at::GradMode::is_enabled(),
                    "npu_xent: consume_logits writes the gradient over the logits, but these logits need no gradient; "
                    "leave it off.");
  const bool leaf =
      logits.is_leaf() || (logits.is_view() && logits._base().is_leaf() && logits._base().requires_grad());
  TORCH_CHECK_VALUE(!leaf,
                    "npu_xent: consume_logits would overwrite a leaf of the autograd graph (a parameter, or a tensor "
                    "whose .grad you asked for); leave it off, or pass the output of an operation.");
  check_dense(logits);
}

constexpr char kDoubleBackward[] =
    "npu_xent: double backward through cross_entropy is not supported. Use torch.nn.functional.cross_entropy where a "
    "second derivative is needed.";

class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& weight, const LossOptions& o, bool inplace) {
    // Made while autograd sees it, so that it shares the logits' version: what overwrites them in the backward counts.
    const auto over_logits = inplace ? logits.detach() : Tensor();
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    auto& saved = ctx->saved_data;
    saved["reduction"] = o.reduction;
    saved["ignore_index"] = o.ignore_index;
    saved["label_smoothing"] = o.label_smoothing;
    saved["lse_square_scale"] = o.lse_square_scale;
    saved["logit_scale"] = o.logit_scale;
    saved["softcap"] = o.softcap;
    saved["grad_scale"] = o.grad_scale;
    saved["inplace"] = inplace;
    const bool in_one_sweep = one_sweep(logits.scalar_type(), o);
    saved["one_sweep"] = in_one_sweep;

    LossAndStats out;
    if (in_one_sweep) {
      out.totals = totals_of(target, weight, logits.sym_size(1), logits.scalar_type(), o);
      Tensor picked, wsum, grad;
      if (inplace) {
        std::tie(out.lse, out.lse_low, picked, wsum) =
            row_stats_grad_(logits, target, weight, out.totals, o.reduction, o.ignore_index, o.label_smoothing,
                            o.lse_square_scale, o.logit_scale, o.softcap, o.grad_scale, o.need_lse);
        grad = over_logits;
      } else {
        std::tie(out.lse, out.lse_low, picked, wsum, grad) =
            row_stats_grad(logits, target, weight, out.totals, o.reduction, o.ignore_index, o.label_smoothing,
                           o.lse_square_scale, o.logit_scale, o.softcap, o.grad_scale, o.need_lse);
      }
      std::tie(out.loss, out.z_loss) =
          loss_of(target, weight, out.lse, out.lse_low, picked, wsum, out.totals, logits.sym_size(1), o);
      out.log_prob = not_wanted(logits);
      // Not save_for_backward: the backward gives this tensor away, and must hold the only reference to it.
      saved["grad"] = grad;
      saved["version"] = static_cast<int64_t>(inplace ? grad._version() : 0);
    } else {
      out = loss_by_reading(logits, target, weight, o);
      ctx->save_for_backward({logits, target, weight.value_or(Tensor()), out.lse, out.lse_low, out.totals});
    }
    if (!o.need_lse) {
      out.lse = not_wanted(out.lse);
    }
    variable_list constants{out.lse, out.log_prob};
    if (!o.differentiable_z_loss || o.lse_square_scale == 0) {
      constants.push_back(out.z_loss);
    }
    ctx->mark_non_differentiable(constants);
    return {out.loss, out.z_loss, out.lse, out.log_prob};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined() && !grads[1].defined()) {
      return {Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    }
    const auto grad = ctx->saved_data["one_sweep"].toBool() ? scaled_grad(ctx, grads[0]) : swept_grad(ctx, grads);
    return {grad, Tensor(), Tensor(), Tensor(), Tensor()};
  }

 private:
  static Tensor scaled_grad(AutogradContext* ctx, const Tensor& upstream) {
    const bool inplace = ctx->saved_data["inplace"].toBool();
    const auto found = ctx->saved_data.find("grad");
    TORCH_CHECK(found != ctx->saved_data.end(),
                inplace ? "npu_xent: with consume_logits the gradient has been handed over by the first backward; a "
                          "second one needs consume_logits=False."
                        : "npu_xent: trying to backward through cross_entropy a second time, after its gradient has "
                          "been handed over; pass retain_graph=True to the first backward.");
    Tensor grad = found->second.toTensor();
    TORCH_CHECK(
        !inplace || grad._version() == ctx->saved_data["version"].toInt(),
        "npu_xent: with consume_logits the logits held their gradient, but they have been written since (version ",
        grad._version(), ", expected ", ctx->saved_data["version"].toInt(),
        "); do not change them before the backward, or use consume_logits=False.");
    // keep_graph: a second backward may come, so this one gets a copy.
    const bool copy = torch::autograd::get_current_graph_task_keep_graph() && !inplace;
    if (!copy) {
      ctx->saved_data.erase(found);
    }
    grad = scaled(grad, upstream, copy);
    if (at::GradMode::is_enabled()) {
      // Connected to whatever the logits and the upstream gradient came from, so that a second derivative raises
      // wherever it is asked for.
      set_refusing_history(
          grad, kDoubleBackward,
          {torch::autograd::get_current_node()->next_edge(0), torch::autograd::impl::gradient_edge(upstream)});
    }
    return grad;
  }

  static Tensor swept_grad(AutogradContext* ctx, const variable_list& grads) {
    auto& saved = ctx->saved_data;
    const bool inplace = saved["inplace"].toBool();
    TORCH_CHECK(saved.count("consumed") == 0,
                "npu_xent: with consume_logits the first backward has overwritten the logits; a second one needs "
                "consume_logits=False.");
    const auto tensors = ctx->get_saved_variables();
    const auto& logits = tensors[0];
    const auto arguments = [&](const auto& op) {
      return op(logits, tensors[1], optional(tensors[2]), tensors[3], tensors[4], tensors[5], optional(grads[0]),
                optional(grads[1]), saved["reduction"].toStringView(), saved["ignore_index"].toInt(),
                saved["label_smoothing"].toDouble(), saved["lse_square_scale"].toDouble(),
                saved["logit_scale"].toDouble(), saved["softcap"].toOptional<double>(),
                saved["grad_scale"].toOptional<double>(), 0, std::nullopt);
    };
    if (!inplace) {
      return arguments(row_grad);
    }
    TORCH_CHECK(!at::GradMode::is_enabled(), kDoubleBackward);
    at::AutoDispatchBelowADInplaceOrView below;
    saved["consumed"] = true;
    arguments(row_grad_);
    return logits.detach();
  }
};

template <bool inplace>
Outputs cross_entropy_autograd(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                               std::string_view reduction, int64_t ignore_index, double label_smoothing,
                               double lse_square_scale, double logit_scale, std::optional<double> softcap,
                               std::optional<double> grad_scale, std::optional<at::ScalarType> loss_dtype,
                               bool need_lse, bool need_log_prob, bool differentiable_z_loss) {
  const LossOptions o{std::string(reduction),
                      ignore_index,
                      label_smoothing,
                      lse_square_scale,
                      logit_scale,
                      softcap,
                      grad_scale,
                      loss_dtype.value_or(logits.scalar_type()),
                      need_lse,
                      need_log_prob,
                      differentiable_z_loss};
  check_loss(logits, target, weight, o);
  TORCH_CHECK(!torch::autograd::isFwGradDefined(logits),
              "npu_xent: forward-mode derivatives of cross_entropy are not supported. Use "
              "torch.nn.functional.cross_entropy, or torch.func.jvp of npu_xent.cross_entropy.");
  if (inplace) {
    check_consumable(logits);
  }
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    const auto out = CrossEntropy::apply(logits, target, weight, o, inplace);
    return {out[0], out[1], out[2], out[3]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const auto out = loss_by_reading(logits, target, weight, o);
  return {out.loss, out.z_loss, need_lse ? out.lse : not_wanted(out.lse), out.log_prob};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd<false>);
  m.impl("cross_entropy_", cross_entropy_autograd<true>);
}

// Where autograd does not take part at all (inference mode), the same function finds nothing to differentiate.
TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd<false>);
  m.impl("cross_entropy_", cross_entropy_autograd<true>);
}

}  // namespace npu_xent::autograd
