// linear_cross_entropy: the loss of logits that are never all there, and its gradients.
//
// For "mean" and "sum" the upstream gradient is taken as 1: one sweep over chunks makes the statistics and all three
// gradients while a chunk's logits are there, and the backward only scales them (which costs nothing when it is 1). For
// "none", for fp16 and under hooks on saved tensors, cross_entropy.cpp says why, the backward makes the logits again.
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
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

constexpr char kDoubleBackward[] =
    "npu_xent: double backward through linear_cross_entropy is not supported. Use torch.nn.functional.linear and "
    "torch.nn.functional.cross_entropy where a second derivative is needed.";

constexpr std::array<const char*, 3> kGrads{"grad_input", "grad_linear_weight", "grad_linear_bias"};

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  // What is differentiated comes first, so that its place is its edge.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                               const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                               std::optional<int64_t> chunk_rows, const LossOptions& o, std::array<bool, 3> wanted) {
    at::AutoDispatchBelowADInplaceOrView below;
    const LinearRows rows{input, linear_weight, linear_bias, target, weight, o.ignore_index, o.softcap, chunk_rows};
    ctx->set_materialize_grads(false);
    auto& saved = ctx->saved_data;
    const bool in_one_sweep = one_sweep(input.scalar_type(), o);
    saved["one_sweep"] = in_one_sweep;

    LossAndStats out;
    if (in_one_sweep) {
      const auto num_classes = linear_weight.sym_size(0);
      std::array<Tensor, 3> grads;
      Tensor picked, wsum;
      out.totals = totals_of(target, weight, num_classes, input.scalar_type(), o);
      std::tie(out.lse, out.lse_low, picked, wsum, grads[0], grads[1], grads[2]) = linear_row_stats_grad(
          rows, out.totals, o.reduction, o.label_smoothing, o.lse_square_scale, /*read_ignored=*/o.need_lse, wanted);
      std::tie(out.loss, out.z_loss) =
          loss_of(target, weight, out.lse, out.lse_low, picked, wsum, out.totals, num_classes, o);
      // Not save_for_backward: the backward gives these tensors away, and must hold the only reference to each.
      for (size_t i = 0; i < grads.size(); ++i) {
        if (wanted[i]) {
          saved[kGrads[i]] = std::move(grads[i]);
        }
      }
    } else {
      out = loss_by_reading(rows, o);
      saved["reduction"] = o.reduction;
      saved["ignore_index"] = o.ignore_index;
      saved["label_smoothing"] = o.label_smoothing;
      saved["lse_square_scale"] = o.lse_square_scale;
      saved["softcap"] = o.softcap;
      saved["chunk_rows"] = chunk_rows;
      ctx->save_for_backward({input, linear_weight, linear_bias.value_or(Tensor()), target, weight.value_or(Tensor()),
                              out.lse, out.lse_low, out.totals});
    }
    if (!o.need_lse) {
      out.lse = not_wanted(out.lse);
    }
    ctx->mark_non_differentiable({out.z_loss, out.lse});
    return {out.loss, out.z_loss, out.lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    variable_list grads(8);
    if (upstream[0].defined()) {
      if (ctx->saved_data["one_sweep"].toBool()) {
        hand_over(ctx, upstream[0], grads);
      } else {
        sweep_again(ctx, upstream[0], grads);
      }
    }
    return grads;
  }

 private:
  static void hand_over(AutogradContext* ctx, const Tensor& upstream, variable_list& grads) {
    auto& saved = ctx->saved_data;
    TORCH_CHECK(saved.count("handed_over") == 0,
                "npu_xent: trying to backward through linear_cross_entropy a second time, after its gradients have "
                "been handed over; pass retain_graph=True to the first backward.");
    // keep_graph: a second backward may come, so this one gets copies.
    const bool copy = torch::autograd::get_current_graph_task_keep_graph();
    const auto node = torch::autograd::get_current_node();
    for (size_t i = 0; i < kGrads.size(); ++i) {
      const auto found = saved.find(kGrads[i]);
      if (found == saved.end()) {
        continue;
      }
      Tensor grad = found->second.toTensor();
      if (!copy) {
        saved.erase(found);
      }
      if (!ctx->needs_input_grad(i)) {
        continue;
      }
      grads[i] = scaled(grad, upstream, copy);
      if (at::GradMode::is_enabled()) {
        set_refusing_history(grads[i], kDoubleBackward,
                             {node->next_edge(i), torch::autograd::impl::gradient_edge(upstream)});
      }
    }
    if (!copy) {
      saved["handed_over"] = true;
    }
  }

  static void sweep_again(AutogradContext* ctx, const Tensor& upstream, variable_list& grads) {
    auto& saved = ctx->saved_data;
    const auto tensors = ctx->get_saved_variables();
    const LinearRows rows{tensors[0],
                          tensors[1],
                          optional(tensors[2]),
                          tensors[3],
                          optional(tensors[4]),
                          saved["ignore_index"].toInt(),
                          saved["softcap"].toOptional<double>(),
                          saved["chunk_rows"].toOptional<int64_t>()};
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     rows.linear_bias && ctx->needs_input_grad(2)};
    auto [input, linear_weight, linear_bias] = linear_row_grad(
        rows, tensors[5], tensors[6], tensors[7], upstream, std::nullopt, saved["reduction"].toStringView(),
        saved["label_smoothing"].toDouble(), saved["lse_square_scale"].toDouble(), wanted);
    const std::array<Tensor, 3> made{input, linear_weight, linear_bias};
    for (size_t i = 0; i < made.size(); ++i) {
      if (wanted[i]) {
        grads[i] = made[i];
      }
    }
  }
};

Outputs linear_cross_entropy_autograd(const Tensor& input, const Tensor& linear_weight,
                                      const OptionalTensor& linear_bias, const Tensor& target,
                                      const OptionalTensor& weight, std::string_view reduction, int64_t ignore_index,
                                      double label_smoothing, double lse_square_scale, std::optional<double> softcap,
                                      std::optional<int64_t> chunk_rows, std::optional<at::ScalarType> loss_dtype,
                                      bool need_lse) {
  LossOptions o{};
  o.reduction = reduction;
  o.ignore_index = ignore_index;
  o.label_smoothing = label_smoothing;
  o.lse_square_scale = lse_square_scale;
  o.logit_scale = 1;
  o.softcap = softcap;
  o.loss_dtype = loss_dtype.value_or(input.scalar_type());
  o.need_lse = need_lse;
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, ignore_index, softcap, chunk_rows};
  check_linear_rows(rows);
  check_loss_options(weight, o);
  const auto any = [&](const auto& f) { return f(input) || f(linear_weight) || (linear_bias && f(*linear_bias)); };
  TORCH_CHECK(!any([](const Tensor& t) { return torch::autograd::isFwGradDefined(t); }),
              "npu_xent: forward-mode derivatives of linear_cross_entropy are not supported. Use "
              "torch.nn.functional.linear and torch.nn.functional.cross_entropy, or torch.func.jvp of "
              "npu_xent.linear_cross_entropy.");
  if (at::GradMode::is_enabled() && any([](const Tensor& t) { return t.requires_grad(); })) {
    const std::array<bool, 3> wanted{input.requires_grad(), linear_weight.requires_grad(),
                                     linear_bias && linear_bias->requires_grad()};
    const auto out =
        LinearCrossEntropy::apply(input, linear_weight, linear_bias, target, weight, chunk_rows, o, wanted);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const auto out = loss_by_reading(rows, o);
  return {out.loss, out.z_loss, need_lse ? out.lse : not_wanted(out.lse)};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autograd);
}

// Where autograd does not take part at all (inference mode), the same function finds nothing to differentiate.
TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autograd);
}

}  // namespace npu_xent::autograd
