// reduce_rows on the CPU.
#include <torch/library.h>

#include "cpu/common.h"

namespace npu_xent::cpu {
namespace {

template <typename acc>
void run(const RowOptions& options, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& lse,
         const OptionalTensor& lse_low, const OptionalTensor& picked, const OptionalTensor& wsum, const double* totals,
         const Tensor& loss, const Tensor& z_loss, const Tensor& new_totals) {
  const auto dtype = c10::CppTypeToScalarType<acc>::value;
  const auto values = [&](const OptionalTensor& t) { return t ? t->to(dtype).contiguous() : Tensor(); };
  const auto pointer = [](const Tensor& t) { return t.defined() ? const_data<acc>(t) : nullptr; };
  const auto y = target.contiguous();
  const auto w = values(weight);
  const int64_t n = target.numel();
  check_target_range(y, options.num_classes, options.ignore_index);
  const auto parallel = parallel_for_elements(n);
  if (!lse) {
    reduce_totals(options, const_data<int64_t>(y), n, pointer(w), data<double>(new_totals), parallel);
    return;
  }
  const auto row_lse = values(lse), row_low = values(lse_low), row_picked = values(picked);
  const auto row_wsum = options.label_smoothing != 0 ? values(wsum) : Tensor();
  reduce_loss(options, const_data<int64_t>(y), n, pointer(w), pointer(row_lse), pointer(row_low), pointer(row_picked),
              pointer(row_wsum), totals, data<double>(loss), data<double>(z_loss), parallel);
}

std::tuple<Tensor, Tensor, Tensor> reduce_rows_cpu(const Tensor& target, const OptionalTensor& weight,
                                                   const OptionalTensor& lse, const OptionalTensor& lse_low,
                                                   const OptionalTensor& picked, const OptionalTensor& wsum,
                                                   const OptionalTensor& totals, std::string_view reduction,
                                                   int64_t ignore_index, double label_smoothing,
                                                   double lse_square_scale, int64_t num_classes,
                                                   at::ScalarType loss_dtype) {
  check_loss_dtype(loss_dtype);
  check_reduce_rows(target, weight, lse, lse_low, picked, wsum, totals, label_smoothing, lse_square_scale, num_classes);
  const RowOptions options{parse_reduction(reduction), ignore_index, label_smoothing, lse_square_scale, num_classes};
  const auto exact = target.options().dtype(at::kDouble);
  const auto out = target.options().dtype(loss_dtype);
  const auto stats = lse ? lse->scalar_type() : stats_dtype(loss_dtype);
  if (!lse) {
    const auto sums = at::empty({kTotals}, exact);
    run<double>(options, target, weight, lse, lse_low, picked, wsum, nullptr, {}, {}, sums);
    return {at::empty({0}, out), at::empty({0}, out), sums.to(stats)};
  }
  // Sums are made in double and rounded once.
  const auto shape = options.reduction == Reduction::none ? target.sizes() : at::IntArrayRef{};
  const auto loss = at::empty(shape, exact), z_loss = at::empty(shape, exact);
  const auto denominators = read_totals(*totals);
  if (stats == at::kDouble) {
    run<double>(options, target, weight, lse, lse_low, picked, wsum, denominators.data(), loss, z_loss, {});
  } else {
    run<float>(options, target, weight, lse, lse_low, picked, wsum, denominators.data(), loss, z_loss, {});
  }
  return {loss.to(loss_dtype), lse_square_scale == 0 ? at::empty({0}, out) : z_loss.to(loss_dtype),
          at::empty({0}, target.options().dtype(stats))};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CPU, m) {
  m.impl("reduce_rows", reduce_rows_cpu);
}

}  // namespace npu_xent::cpu
