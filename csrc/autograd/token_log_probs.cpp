// token_log_probs, token_log_probs_ and linear_token_log_probs: the log-probability of each row's target and the
// entropy, with their gradients: statistics in the forward, the gradient in the backward.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/rsub.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/common.h"
#include "loss.h"

namespace npu_xent::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kDoubleBackward[] =
    "npu_xent: double backward through token_log_probs and linear_token_log_probs is not supported. Use "
    "torch.log_softmax where a second derivative is needed.";

// The statistics of a forward, and its log-probabilities.
struct RowResults {
  Tensor lse, lse_low, log_probs, entropy, top1;

  RowResults(const Options& o, const Tensor& target, Tensor lse_, Tensor lse_low_, const Tensor& picked,
             Tensor entropy_, Tensor top1_)
      : lse(std::move(lse_)), lse_low(std::move(lse_low_)), entropy(std::move(entropy_)), top1(std::move(top1_)) {
    const auto loss = loss_of(o, target, std::nullopt, lse, lse_low, picked, {}, {}, lse.scalar_type()).first;
    log_probs = at::rsub(loss, 0);  // not -loss, which has -0 for ignored rows
  }
};

StatsWanted wanted_stats(bool need_entropy, bool need_top1) {
  StatsWanted wanted;
  wanted.entropy = need_entropy;
  wanted.top1 = need_top1;
  return wanted;
}

RowResults results_of(const Options& o, const Tensor& logits, const Tensor& target,
                      const OptionalTensor& row_temperature, const StatsWanted& wanted) {
  auto [lse, lse_low, picked, wsum, log_prob, entropy, top1] =
      row_stats(o, logits, target, std::nullopt, row_temperature, /*need_log_prob=*/false, wanted);
  return {o, target, lse, lse_low, picked, entropy, top1};
}
RowResults results_of(const Options& o, const LinearRows& rows, const OptionalTensor& row_temperature,
                      const StatsWanted& wanted) {
  auto [lse, lse_low, picked, wsum, entropy, top1] =
      linear_row_stats(o, rows.input, rows.linear_weight, rows.linear_bias, rows.target, std::nullopt, row_temperature,
                       rows.chunk_rows, wanted);
  return {o, rows.target, lse, lse_low, picked, entropy, top1};
}

// Saves what the backward needs besides its first `tensors`. Returns the forward's outputs.
variable_list save_results(AutogradContext* ctx, const Options& o, variable_list tensors,
                           const OptionalTensor& row_temperature, const RowResults& out, Results<3>* results) {
  save(o, ctx->saved_data);
  // A copy of the entropy, so that callers may change theirs in place.
  tensors.insert(tensors.end(), {out.lse, out.lse_low, row_temperature.value_or(Tensor()),
                                 results->differentiable[1] ? out.entropy.clone() : Tensor()});
  ctx->save_for_backward(std::move(tensors));
  ctx->set_materialize_grads(false);
  results->all = {out.log_probs, out.entropy, out.top1};
  return results->outputs(ctx->saved_data);
}
// The same, from the saved tensor number `begin` on, and the upstream gradients.
ForGrad saved_operands(const variable_list& tensors, size_t begin, const variable_list& upstream) {
  ForGrad operands;
  operands.lse = tensors[begin];
  operands.lse_low = tensors[begin + 1];
  operands.row_temperature = optional(tensors[begin + 2]);
  if (upstream[0].defined()) {
    check_storages({{"the gradient of log_probs", upstream[0]}});  // the negation reads it
    operands.grad_loss = upstream[0].neg();
  }
  if (upstream[1].defined()) {
    operands.entropy = tensors[begin + 3];
    operands.grad_entropy = upstream[1];
  }
  return operands;
}

template <bool inplace>
class TokenLogProbsOfLogits : public torch::autograd::Function<TokenLogProbsOfLogits<inplace>> {
 public:
  static constexpr bool is_traceable = !inplace;

  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target,
                               const OptionalTensor& row_temperature, const Options& o, bool need_entropy,
                               bool need_top1, Results<3>* results) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto out = results_of(o, logits, target, row_temperature, wanted_stats(need_entropy, need_top1));
    return save_results(ctx, o, {inplace ? logits : value_to_save(logits), target}, row_temperature, out, results);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& of_outputs) {
    const auto upstream = Results<3>::upstream(ctx->saved_data, of_outputs);
    variable_list grads(7);
    if (!upstream[0].defined() && !upstream[1].defined()) {
      return grads;
    }
    auto& saved = ctx->saved_data;
    TORCH_CHECK(saved.count("consumed") == 0,
                "npu_xent: with consume_logits the first backward has overwritten the logits; a second one needs "
                "consume_logits=False.");
    TORCH_CHECK(!inplace || !at::GradMode::is_enabled(), kDoubleBackward);
    const auto tensors = ctx->get_saved_variables();
    {
      at::AutoDispatchBelowADInplaceOrView below;
      const auto operands = saved_operands(tensors, 2, upstream);
      const auto o = saved_options(saved);
      if constexpr (inplace) {
        saved["consumed"] = true;
        row_grad<true>(o, tensors[0], tensors[1], std::nullopt, operands);
        grads[0] = tensors[0].detach();
      } else {
        grads[0] = row_grad<false>(o, tensors[0], tensors[1], std::nullopt, operands);
      }
    }
    refuse_second_derivative(grads[0], 0, upstream, kDoubleBackward);
    return grads;
  }
};

class TokenLogProbsOfInput : public torch::autograd::Function<TokenLogProbsOfInput> {
 public:
  static constexpr bool is_traceable = true;

  // Differentiable arguments come first, so that an argument's index is the index of its edge.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& linear_weight,
                               const OptionalTensor& linear_bias, const Tensor& target,
                               const OptionalTensor& row_temperature, std::optional<int64_t> chunk_rows,
                               const Options& o, bool need_entropy, bool need_top1, Results<3>* results) {
    at::AutoDispatchBelowADInplaceOrView below;
    const LinearRows rows{input, linear_weight, linear_bias, target, std::nullopt, chunk_rows};
    auto out = results_of(o, rows, row_temperature, wanted_stats(need_entropy, need_top1));
    ctx->saved_data["chunk_rows"] = chunk_rows;
    return save_results(ctx, o, {input, linear_weight, linear_bias.value_or(Tensor()), target}, row_temperature, out,
                        results);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& of_outputs) {
    const auto upstream = Results<3>::upstream(ctx->saved_data, of_outputs);
    variable_list grads(10);
    if (!upstream[0].defined() && !upstream[1].defined()) {
      return grads;
    }
    const auto tensors = ctx->get_saved_variables();
    const auto linear_bias = optional(tensors[2]);
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     linear_bias && ctx->needs_input_grad(2)};
    auto [grad_input, grad_linear_weight, grad_linear_bias] = [&] {
      at::AutoDispatchBelowADInplaceOrView below;
      return linear_row_grad(saved_options(ctx->saved_data), tensors[0], tensors[1], linear_bias, tensors[3],
                             std::nullopt, saved_operands(tensors, 4, upstream),
                             ctx->saved_data["chunk_rows"].toOptional<int64_t>(), wanted);
    }();
    const std::array<Tensor, 3> made{grad_input, grad_linear_weight, grad_linear_bias};
    for (size_t i = 0; i < made.size(); ++i) {
      if (wanted[i]) {
        grads[i] = made[i];
        refuse_second_derivative(grads[i], i, upstream, kDoubleBackward);
      }
    }
    return grads;
  }
};

template <bool inplace>
TokenLogProbs token_log_probs_autograd(const Options& options, const Tensor& logits, const Tensor& target,
                                       const OptionalTensor& row_temperature, bool need_entropy, bool need_top1) {
  check_row_stats(options, logits, target, std::nullopt, row_temperature);
  check_whole_rows(options, logits.sym_size(-1), "token_log_probs");
  check_no_forward_mode(logits, "token_log_probs");
  check_no_forward_mode(row_temperature, "token_log_probs");
  const auto o = by_row(options, logits.sym_size(-1), "token_log_probs");
  if (inplace) {
    check_consumable(logits);
  }
  if (at::GradMode::is_enabled() && logits.requires_grad()) {
    Results<3> results{{true, need_entropy, false}};
    const auto outputs =
        TokenLogProbsOfLogits<inplace>::apply(logits, target, row_temperature, o, need_entropy, need_top1, &results);
    return std::tuple_cat(std::move(results).with(outputs));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const auto out = results_of(o, logits, target, row_temperature, wanted_stats(need_entropy, need_top1));
  return {out.log_probs, out.entropy, out.top1};
}

TokenLogProbs linear_token_log_probs_autograd(const Options& options, const Tensor& input, const Tensor& linear_weight,
                                              const OptionalTensor& linear_bias, const Tensor& target,
                                              const OptionalTensor& row_temperature, bool need_entropy, bool need_top1,
                                              std::optional<int64_t> chunk_rows) {
  const LinearRows rows{input, linear_weight, linear_bias, target, std::nullopt, chunk_rows};
  check_linear_row_stats(options, rows, row_temperature);
  check_whole_rows(options, linear_weight.sym_size(0), "linear_token_log_probs");
  const auto o = by_row(options, linear_weight.sym_size(0), "linear_token_log_probs");
  bool needs_grad = false;
  for (const auto& t : {OptionalTensor(input), OptionalTensor(linear_weight), linear_bias, row_temperature}) {
    check_no_forward_mode(t, "linear_token_log_probs");
    needs_grad |= t && t->requires_grad();
  }
  if (at::GradMode::is_enabled() && needs_grad) {
    Results<3> results{{true, need_entropy, false}};
    const auto outputs = TokenLogProbsOfInput::apply(input, linear_weight, linear_bias, target, row_temperature,
                                                     chunk_rows, o, need_entropy, need_top1, &results);
    return std::tuple_cat(std::move(results).with(outputs));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const auto out = results_of(o, rows, row_temperature, wanted_stats(need_entropy, need_top1));
  return {out.log_probs, out.entropy, out.top1};
}

// Under autocast input, linear_weight and linear_bias are cast to autocast's dtype, as in torch.nn.functional.linear.
template <c10::DispatchKey key, c10::DeviceType device>
TokenLogProbs linear_token_log_probs_autocast(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                              const OptionalTensor& linear_bias, const Tensor& target,
                                              const OptionalTensor& row_temperature, bool need_entropy, bool need_top1,
                                              std::optional<int64_t> chunk_rows) {
  c10::impl::ExcludeDispatchKeyGuard below(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, device); };
  return linear_token_log_probs(o, cast(input), cast(linear_weight), cast(linear_bias), target, row_temperature,
                                need_entropy, need_top1, chunk_rows);
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Autograd, m) {
  m.impl("token_log_probs", flat<token_log_probs_autograd<false>>);
  m.impl("token_log_probs_", flat<token_log_probs_autograd<true>>);
  m.impl("linear_token_log_probs", flat<linear_token_log_probs_autograd>);
}

// For inference mode, where autograd's key is excluded; the same functions then save nothing.
TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("token_log_probs", flat<token_log_probs_autograd<false>>);
  m.impl("token_log_probs_", flat<token_log_probs_autograd<true>>);
  m.impl("linear_token_log_probs", flat<linear_token_log_probs_autograd>);
}

#define AUTOCAST(KEY, DEVICE)                                                                      \
  TORCH_LIBRARY_IMPL(npu_xent, KEY, m) {                                                           \
    m.impl("linear_token_log_probs",                                                               \
           flat<linear_token_log_probs_autocast<c10::DispatchKey::KEY, c10::DeviceType::DEVICE>>); \
  }
AUTOCAST(AutocastCPU, CPU)
AUTOCAST(AutocastPrivateUse1, PrivateUse1)
AUTOCAST(AutocastCUDA, CUDA)

}  // namespace npu_xent::autograd
