// linear_cross_entropy under autocast: input, linear_weight and linear_bias in the dtype of autocast, as
// torch.nn.functional.linear takes them there; the loss in fp32 unless the caller named its dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace npu_xent::autocast {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_autocast(
    const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target,
    const OptionalTensor& weight, std::string_view reduction, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::optional<int64_t> chunk_rows,
    std::optional<at::ScalarType> loss_dtype, bool need_lse) {
  c10::impl::ExcludeDispatchKeyGuard below(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, device); };
  const LinearRows rows{cast(input), cast(linear_weight), cast(linear_bias), target,
                        weight,      ignore_index,        softcap,           chunk_rows};
  return linear_cross_entropy(rows, reduction, label_smoothing, lse_square_scale,
                              loss_dtype.value_or(stats_dtype(rows.input.scalar_type())), need_lse);
}

}  // namespace

#define AUTOCAST(KEY, DEVICE)                                                                                      \
  TORCH_LIBRARY_IMPL(npu_xent, KEY, m) {                                                                           \
    m.impl("linear_cross_entropy", linear_cross_entropy_autocast<c10::DispatchKey::KEY, c10::DeviceType::DEVICE>); \
  }
AUTOCAST(AutocastCPU, CPU)
AUTOCAST(AutocastPrivateUse1, PrivateUse1)
AUTOCAST(AutocastCUDA, CUDA)

}  // namespace npu_xent::autocast
