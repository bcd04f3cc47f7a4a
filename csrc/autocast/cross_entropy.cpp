// cross_entropy under autocast: the 16-bit logits are read as they are, and the loss comes in fp32 unless the caller
// named its dtype. (F.cross_entropy copies the logits to fp32 there.) For the devices that npu_xent has kernels for,
// and cuda, where its composite runs.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops.h"

namespace npu_xent::autocast {
namespace {

template <c10::DispatchKey key, bool inplace>
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_autocast(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, std::string_view reduction,
    int64_t ignore_index, double label_smoothing, double lse_square_scale, double logit_scale,
    std::optional<double> softcap, std::optional<double> grad_scale, std::optional<at::ScalarType> loss_dtype,
    bool need_lse, bool need_log_prob, bool differentiable_z_loss) {
  c10::impl::ExcludeDispatchKeyGuard below(key);
  return cross_entropy(inplace, logits, target, weight, reduction, ignore_index, label_smoothing, lse_square_scale,
                       logit_scale, softcap, grad_scale, loss_dtype.value_or(stats_dtype(logits.scalar_type())),
                       need_lse, need_log_prob, differentiable_z_loss);
}

}  // namespace

#define AUTOCAST(KEY)                                                              \
  TORCH_LIBRARY_IMPL(npu_xent, KEY, m) {                                           \
    m.impl("cross_entropy", cross_entropy_autocast<c10::DispatchKey::KEY, false>); \
    m.impl("cross_entropy_", cross_entropy_autocast<c10::DispatchKey::KEY, true>); \
  }
AUTOCAST(AutocastCPU)
AUTOCAST(AutocastPrivateUse1)
AUTOCAST(AutocastCUDA)

}  // namespace npu_xent::autocast
