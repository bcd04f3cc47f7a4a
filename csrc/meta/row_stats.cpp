// row_stats without values.
#include <torch/library.h>

#include "meta/shapes.h"

namespace npu_xent::meta {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_meta(const Tensor& logits, const Tensor& target,
                                                                  const OptionalTensor& weight, int64_t, double,
                                                                  std::optional<double> softcap,
                                                                  c10::SymInt class_start,
                                                                  std::optional<c10::SymInt> num_classes,
                                                                  bool need_wsum, bool need_log_prob, bool) {
  check_rows(logits, target, weight, softcap, class_start, num_classes);
  return {empty_rows(logits), empty_rows(logits), empty_rows(logits), empty_rows(logits, need_wsum),
          need_log_prob ? empty_logits(logits) : at::empty({0}, logits.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("row_stats", row_stats_meta);
}

}  // namespace npu_xent::meta
