// linear_row_stats without values.
#include <torch/library.h>

#include "meta/shapes.h"

namespace npu_xent::meta {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_row_stats_meta(const Tensor& input, const Tensor& linear_weight,
                                                                 const OptionalTensor& linear_bias,
                                                                 const Tensor& target, const OptionalTensor& weight,
                                                                 int64_t ignore_index, std::optional<double> softcap,
                                                                 std::optional<int64_t> chunk_rows, bool need_wsum,
                                                                 bool) {
  check_linear_rows({input, linear_weight, linear_bias, target, weight, ignore_index, softcap, chunk_rows});
  return {empty_rows(input), empty_rows(input), empty_rows(input), empty_rows(input, need_wsum)};
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("linear_row_stats", linear_row_stats_meta);
}

}  // namespace npu_xent::meta
