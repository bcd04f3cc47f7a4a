// Operators that write a tensor refuse torch's negative bit there. torch's fallback for the bit clones that tensor, and
// after the call takes the operator's first output for the clone. Ours return nothing or something else, so the
// fallback would read and write behind the end of the stack.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace npu_xent {
namespace {

void refuse_to_write(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t n_arguments = schema.arguments().size();
  for (size_t i = 0; i < n_arguments; ++i) {
    auto& value = torch::jit::peek(*stack, i, n_arguments);
    if (!value.isTensor() || !value.toTensor().defined() || !value.toTensor().is_neg()) {
      continue;
    }
    const auto& argument = schema.arguments()[i];
    if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) {
      check_not_negative(value.toTensor(), argument.name());
    }
    value = value.toTensor().resolve_neg();
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative), stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Negative, m) {
  for (const char* name : {"row_grad_", "row_stats_grad_", "scale_", "cross_entropy_", "token_log_probs_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_to_write>());
  }
}

}  // namespace npu_xent
