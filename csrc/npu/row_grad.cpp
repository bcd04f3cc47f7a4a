// row_grad and row_grad_ on an NPU.
#include <c10/core/DeviceGuard.h>

#include "npu/common.h"
#include "npu/load.h"

namespace npu_xent::npu {
namespace {

// The gradient: over the logits, or in fresh memory.
Tensor run(bool over_logits, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
           const Tensor& lse, const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
           const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index, double label_smoothing,
           double lse_square_scale, double logit_scale, std::optional<double> softcap, std::optional<double> grad_scale,
           int64_t class_start, std::optional<int64_t> num_classes) {
  const auto how = parse_reduction(reduction);
  check_row_grad(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, how, label_smoothing,
                 lse_square_scale, softcap, class_start, num_classes);
  if (over_logits) {
    check_dense(logits);
    check_overwritable(logits);
  }
  const c10::DeviceGuard guard(logits.device());
  const auto options = reduction_args(how, ignore_index, label_smoothing, lse_square_scale,
                                      class_count(logits, class_start, num_classes));
  const Sweep sweep(logits, target, weight, options, logit_scale, softcap, grad_scale, class_start);
  const auto grad = over_logits ? logits : sweep.new_output();
  if (!sweep.empty()) {
    launch_row_grad(sweep, as_values(lse), as_values(lse_low), as_values(totals), as_values(grad_loss),
                    as_values(grad_z_loss), grad);
  }
  return grad;
}

Tensor row_grad_npu(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
                    const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
                    const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index,
                    double label_smoothing, double lse_square_scale, double logit_scale, std::optional<double> softcap,
                    std::optional<double> grad_scale, int64_t class_start, std::optional<int64_t> num_classes) {
  return run(false, logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, reduction, ignore_index,
             label_smoothing, lse_square_scale, logit_scale, softcap, grad_scale, class_start, num_classes);
}

void row_grad_over_logits_npu(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                              const Tensor& lse, const OptionalTensor& lse_low, const Tensor& totals,
                              const OptionalTensor& grad_loss, const OptionalTensor& grad_z_loss,
                              std::string_view reduction, int64_t ignore_index, double label_smoothing,
                              double lse_square_scale, double logit_scale, std::optional<double> softcap,
                              std::optional<double> grad_scale, int64_t class_start,
                              std::optional<int64_t> num_classes) {
  run(true, logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, reduction, ignore_index,
      label_smoothing, lse_square_scale, logit_scale, softcap, grad_scale, class_start, num_classes);
  logits.unsafeGetTensorImpl()->bump_version();  // nobody else sees writes through a pointer
}

}  // namespace

void register_row_grad(torch::Library& m) {
  m.impl("row_grad", row_grad_npu);
  m.impl("row_grad_", row_grad_over_logits_npu);
}

}  // namespace npu_xent::npu
