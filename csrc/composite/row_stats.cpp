// row_stats out of aten operations.
#include <torch/library.h>

#include "composite/rows.h"

namespace npu_xent::composite {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_composite(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t ignore_index, double logit_scale,
    std::optional<double> softcap, int64_t class_start, std::optional<int64_t> num_classes, bool need_wsum,
    bool need_log_prob, bool read_ignored) {
  check_rows(logits, target, weight, softcap, class_start, num_classes);
  const int64_t n_cols = logits.size(1);
  const Targets targets(target, ignore_index, class_start, n_cols, class_count(logits, class_start, num_classes));
  const auto x = mapped(logits, logit_scale, softcap);
  const auto unread =
      target.eq(ignore_index).logical_and(at::full({}, !(read_ignored || need_log_prob), targets.kept.options()));
  const auto true_lse = x.logsumexp(1);
  const auto lse = true_lse.masked_fill(unread, 0);
  // sum exp(x - lse) would be 1, but for the rounding of lse.
  const auto undefined = true_lse.isfinite().logical_not();
  const auto low = (x - true_lse.unsqueeze(1)).exp().sum(1).log().masked_fill(undefined, 0);
  const auto picked = x.gather(1, targets.column.unsqueeze(1))
                          .squeeze(1)
                          .masked_fill(targets.in_shard.logical_not(), 0)
                          .masked_fill(targets.bad, kNaN);
  auto wsum = at::empty({0}, x.options());
  if (need_wsum) {
    const auto from_lse = x - true_lse.unsqueeze(1) - low.unsqueeze(1);
    wsum = (weight ? from_lse * weight->to(x.scalar_type()).narrow(0, class_start, n_cols) : from_lse)
               .sum(1)
               .masked_fill(unread, 0);
  }
  auto log_prob = at::empty({0}, logits.options());
  if (need_log_prob) {
    log_prob = (x - true_lse.masked_fill(undefined, kNaN).unsqueeze(1) - low.unsqueeze(1))
                   .to(logits.scalar_type())
                   .contiguous();
  }
  return {lse, low.masked_fill(unread, 0), picked, wsum, log_prob};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("row_stats", row_stats_composite);
}

}  // namespace npu_xent::composite
