// row_grad and row_grad_ on the CPU.
#include <torch/library.h>

#include "cpu/common.h"

namespace npu_xent::cpu {
namespace {

// In the statistics dtype; stride 0 when one value serves all rows.
struct UpstreamTensor {
  OptionalTensor values;
  int64_t stride = 0;

  UpstreamTensor(const OptionalTensor& grad, Reduction reduction, at::ScalarType dtype) {
    if (grad) {
      values = grad->to(dtype).reshape(-1);
      stride = reduction == Reduction::none ? values->stride(0) : 0;
    }
  }
  template <typename acc>
  const acc* pointer() const {
    return values ? const_data<acc>(*values) : nullptr;
  }
};

struct RowGrad {
  Inputs in;
  RowOptions options;
  double outer_factor;

  RowGrad(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, Reduction reduction,
          int64_t ignore_index, double label_smoothing, double lse_square_scale, double logit_scale,
          std::optional<double> softcap, std::optional<double> grad_scale, int64_t class_start,
          std::optional<int64_t> num_classes)
      : in(logits, target, weight, ignore_index, logit_scale, softcap, class_start, num_classes),
        options{reduction, ignore_index, label_smoothing, lse_square_scale, in.num_classes},
        outer_factor(grad_scale.value_or(logit_scale)) {}

  void run(const Tensor& lse, const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
           const OptionalTensor& grad_z_loss, const Tensor& grad) const {
    const auto denominators = read_totals(totals);
    const auto high = lse.contiguous();
    const auto low = lse_low ? lse_low->contiguous() : Tensor();
    const UpstreamTensor from_loss(grad_loss, options.reduction, lse.scalar_type());
    const UpstreamTensor from_z(grad_z_loss, options.reduction, lse.scalar_type());
    with_storage_type(grad.scalar_type(), [&](auto* type) {
      using scalar_t = std::remove_pointer_t<decltype(type)>;
      using acc = acc_t<scalar_t>;
      row_grad(kernels().of<scalar_t>(), in.rows<scalar_t>(), {options, outer_factor, denominators.data()},
               {from_loss.pointer<acc>(), from_z.pointer<acc>(), from_loss.stride, from_z.stride},
               const_data<acc>(high), low.defined() ? const_data<acc>(low) : nullptr, data<scalar_t>(grad),
               grad.stride(0), parallel_for_elements(grad.numel()));
    });
  }
};

Tensor row_grad_cpu(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const Tensor& lse,
                    const OptionalTensor& lse_low, const Tensor& totals, const OptionalTensor& grad_loss,
                    const OptionalTensor& grad_z_loss, std::string_view reduction, int64_t ignore_index,
                    double label_smoothing, double lse_square_scale, double logit_scale, std::optional<double> softcap,
                    std::optional<double> grad_scale, int64_t class_start, std::optional<int64_t> num_classes) {
  const auto how = parse_reduction(reduction);
  check_row_grad(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, how, label_smoothing,
                 lse_square_scale, softcap, class_start, num_classes);
  const RowGrad op(logits, target, weight, how, ignore_index, label_smoothing, lse_square_scale, logit_scale, softcap,
                   grad_scale, class_start, num_classes);
  const auto grad = empty_like_logits(op.in);
  op.run(lse, lse_low, totals, grad_loss, grad_z_loss, grad);
  return grad;
}

void row_grad_over_logits_cpu(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                              const Tensor& lse, const OptionalTensor& lse_low, const Tensor& totals,
                              const OptionalTensor& grad_loss, const OptionalTensor& grad_z_loss,
                              std::string_view reduction, int64_t ignore_index, double label_smoothing,
                              double lse_square_scale, double logit_scale, std::optional<double> softcap,
                              std::optional<double> grad_scale, int64_t class_start,
                              std::optional<int64_t> num_classes) {
  const auto how = parse_reduction(reduction);
  check_row_grad(logits, target, weight, lse, lse_low, totals, grad_loss, grad_z_loss, how, label_smoothing,
                 lse_square_scale, softcap, class_start, num_classes);
  check_dense(logits);
  const RowGrad op(logits, target, weight, how, ignore_index, label_smoothing, lse_square_scale, logit_scale, softcap,
                   grad_scale, class_start, num_classes);
  op.run(lse, lse_low, totals, grad_loss, grad_z_loss, logits);
  logits.unsafeGetTensorImpl()->bump_version();  // nobody else sees writes through a pointer
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CPU, m) {
  m.impl("row_grad", row_grad_cpu);
  m.impl("row_grad_", row_grad_over_logits_cpu);
}

}  // namespace npu_xent::cpu
