// linear_cross_entropy: the loss and its gradients without materializing the logits, and their autocast rules.
//
// "mean" and "sum" take one sweep over chunks: it computes the statistics and all three gradients for an upstream
// gradient of 1, and the backward only scales them (free if it is 1). For "none", for fp16, under hooks on saved
// tensors and if lse has a gradient (see cross_entropy.cpp), the backward recomputes the logits.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"
#include "loss.h"

namespace npu_xent::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kDoubleBackward[] =
    "npu_xent: double backward through linear_cross_entropy is not supported. Use torch.nn.functional.linear and "
    "torch.nn.functional.cross_entropy where a second derivative is needed, without npu_xent.patch_torch(), which "
    "replaces it.";

constexpr std::array<const char*, 3> kGrads{"grad_input", "grad_linear_weight", "grad_linear_bias"};

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static constexpr bool is_traceable = true;

  // Differentiable arguments come first, so that an argument's index is the index of its edge.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                               const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
                               std::optional<int64_t> chunk_rows, const Options& options, const Wanted& wanted,
                               std::array<bool, 3> output_mask, Results<3>* results) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto o = of_classes(options, linear_weight.sym_size(0));
    ctx->set_materialize_grads(false);
    auto& saved = ctx->saved_data;
    const bool in_one_sweep = one_sweep(input.scalar_type(), o, wanted);
    saved["one_sweep"] = in_one_sweep;

    LossAndStats out;
    if (in_one_sweep) {
      std::array<Tensor, 3> grads;
      Tensor picked, wsum;
      out.totals = totals_of(o, target, weight, input.scalar_type());
      std::tie(out.lse, out.lse_low, picked, wsum, grads[0], grads[1], grads[2]) =
          linear_row_stats_grad(o, input, linear_weight, linear_bias, target, weight, out.totals, chunk_rows,
                                /*read_ignored=*/wanted.lse, output_mask);
      std::tie(out.loss, out.z_loss) =
          loss_of(o, target, weight, out.lse, out.lse_low, picked, wsum, out.totals, wanted.loss_dtype);
      // Not save_for_backward: the backward returns these tensors, and must hold the only reference to each.
      for (size_t i = 0; i < grads.size(); ++i) {
        if (output_mask[i]) {
          saved[kGrads[i]] = std::move(grads[i]);
        }
      }
    } else {
      out = loss_by_reading(o, {input, linear_weight, linear_bias, target, weight, chunk_rows}, wanted);
    }
    if (!in_one_sweep || wanted.lse) {
      save(o, saved);
      saved["chunk_rows"] = chunk_rows;
      ctx->save_for_backward({input, linear_weight, linear_bias.value_or(Tensor()), target, weight.value_or(Tensor()),
                              out.lse, out.lse_low, out.totals});
    }
    results->all = {out.loss, out.z_loss, wanted.lse ? out.lse : not_wanted(out.lse.options())};
    return results->outputs(saved);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& of_outputs) {
    variable_list grads(10);
    const auto upstream = Results<3>::upstream(ctx->saved_data, of_outputs);
    if (ctx->saved_data["one_sweep"].toBool() && !upstream[2].defined()) {
      if (upstream[0].defined()) {
        hand_over(ctx, upstream[0], grads);
      }
    } else if (upstream[0].defined() || upstream[2].defined()) {
      sweep_again(ctx, upstream, grads);
    }
    return grads;
  }

 private:
  static void hand_over(AutogradContext* ctx, const Tensor& upstream, variable_list& grads) {
    auto& saved = ctx->saved_data;
    TORCH_CHECK(saved.count("handed_over") == 0,
                "npu_xent: trying to backward through linear_cross_entropy a second time, after its gradients have "
                "been released; pass retain_graph=True to the first backward.");
    // keep_graph: a second backward may come, so this one gets copies.
    const bool copy = keeps_graph();
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
      refuse_second_derivative(grads[i], i, {upstream}, kDoubleBackward);
    }
    if (!copy) {
      saved["handed_over"] = true;
    }
  }

  static void sweep_again(AutogradContext* ctx, const variable_list& upstream, variable_list& grads) {
    auto& saved = ctx->saved_data;
    const auto tensors = ctx->get_saved_variables();
    if (!keeps_graph()) {
      for (const char* name : kGrads) {  // of the loss alone, made in the forward
        saved.erase(name);
      }
      saved["handed_over"] = true;
    }
    const auto linear_bias = optional(tensors[2]);
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     linear_bias && ctx->needs_input_grad(2)};
    ForGrad operands;
    operands.lse = tensors[5];
    operands.lse_low = tensors[6];
    operands.totals = tensors[7];
    operands.grad_loss = optional(upstream[0]);
    operands.grad_lse = optional(upstream[2]);
    auto [grad_input, grad_linear_weight, grad_linear_bias] = [&] {
      at::AutoDispatchBelowADInplaceOrView below;
      return linear_row_grad(saved_options(saved), tensors[0], tensors[1], linear_bias, tensors[3],
                             optional(tensors[4]), operands, saved["chunk_rows"].toOptional<int64_t>(), wanted);
    }();
    const std::array<Tensor, 3> made{grad_input, grad_linear_weight, grad_linear_bias};
    for (size_t i = 0; i < made.size(); ++i) {
      if (wanted[i]) {
        grads[i] = made[i];
        refuse_second_derivative(grads[i], i, upstream, kDoubleBackward);
      }
    }
  }
};

LossWithLse linear_cross_entropy_autograd(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                          const OptionalTensor& linear_bias, const Tensor& target,
                                          const OptionalTensor& weight, std::optional<int64_t> chunk_rows,
                                          std::optional<at::ScalarType> loss_dtype, bool need_lse) {
  const Wanted wanted{loss_dtype.value_or(input.scalar_type()), need_lse};
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, chunk_rows};
  check_loss(o, rows, wanted);
  const auto any = [&](const auto& f) { return f(input) || f(linear_weight) || (linear_bias && f(*linear_bias)); };
  TORCH_CHECK(!any([](const Tensor& t) { return torch::autograd::isFwGradDefined(t); }),
              "npu_xent: forward-mode derivatives of linear_cross_entropy are not supported. Use "
              "torch.nn.functional.linear and torch.nn.functional.cross_entropy, or torch.func.jvp of "
              "npu_xent.linear_cross_entropy.");
  if (at::GradMode::is_enabled() && any([](const Tensor& t) { return t.requires_grad(); })) {
    const std::array<bool, 3> output_mask{input.requires_grad(), linear_weight.requires_grad(),
                                          linear_bias && linear_bias->requires_grad()};
    Results<3> results{{true, false, need_lse}};
    const auto outputs = LinearCrossEntropy::apply(input, linear_weight, linear_bias, target, weight, chunk_rows, o,
                                                   wanted, output_mask, &results);
    return std::tuple_cat(std::move(results).with(outputs));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const auto out = loss_by_reading(o, rows, wanted);
  return {out.loss, out.z_loss, need_lse ? out.lse : not_wanted(out.lse.options())};
}

// Under autocast input, linear_weight and linear_bias are cast to autocast's dtype, as in torch.nn.functional.linear;
// the loss is fp32 unless the caller named its dtype.
template <c10::DispatchKey key, c10::DeviceType device>
LossWithLse linear_cross_entropy_autocast(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                          const OptionalTensor& linear_bias, const Tensor& target,
                                          const OptionalTensor& weight, std::optional<int64_t> chunk_rows,
                                          std::optional<at::ScalarType> loss_dtype, bool need_lse) {
  c10::impl::ExcludeDispatchKeyGuard below(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, device); };
  const auto features = cast(input);
  return linear_cross_entropy(o, features, cast(linear_weight), cast(linear_bias), target,
                              autocast_weight(weight, features.scalar_type()), chunk_rows,
                              loss_dtype.value_or(stats_dtype(features.scalar_type())), need_lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  m.impl("linear_cross_entropy", flat<linear_cross_entropy_autograd>);
}

// For inference mode, where autograd's key is excluded; the same function then saves nothing.
TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("linear_cross_entropy", flat<linear_cross_entropy_autograd>);
}

#define AUTOCAST(KEY, DEVICE)                                                                    \
  TORCH_LIBRARY_IMPL(npu_xent, KEY, m) {                                                         \
    m.impl("linear_cross_entropy",                                                               \
           flat<linear_cross_entropy_autocast<c10::DispatchKey::KEY, c10::DeviceType::DEVICE>>); \
  }
AUTOCAST(AutocastCPU, CPU)
AUTOCAST(AutocastPrivateUse1, PrivateUse1)
AUTOCAST(AutocastCUDA, CUDA)

}  // namespace npu_xent::autograd
