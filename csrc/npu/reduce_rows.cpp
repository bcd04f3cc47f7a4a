// reduce_rows on an NPU: sums of blocks of rows, and a second launch that adds those up.
#include <c10/core/DeviceGuard.h>

#include "npu/common.h"
#include "npu/load.h"

namespace npu_xent::npu {
namespace {

// What the launches of one call share.
struct Reduce {
  ReduceRowsKernel kernel{};
  XentArgs args;
  at::TensorOptions values;

  Tensor new_values(at::IntArrayRef shape) const { return at::empty(shape, values); }
  void run(Stage stage, int64_t tasks) {
    args.stage = static_cast<int64_t>(stage);
    if (tasks != 0) {
      launch(kernel, kernel.target.device(), tasks, XentPlan{}, args);
    }
  }
  int64_t row_blocks() const { return div_up(args.rows, kReduceRows); }

  Tensor totals() {
    const int64_t tasks = row_blocks() + (kernel.weight.defined() ? div_up(args.num_classes, kReduceWeights) : 0);
    kernel.sums = new_values({tasks, kBlock});
    run(Stage::block_totals, tasks);
    kernel.totals = new_values({kTotals});
    run(Stage::join_totals, 1);
    return kernel.totals;
  }

  // (loss, z_loss); z_loss is undefined unless it has a scale.
  std::pair<Tensor, Tensor> loss() {
    const bool none = args.reduction == static_cast<int64_t>(Reduction::none);
    const at::DimVector shape = none ? at::DimVector{args.rows} : at::DimVector{};
    const auto loss = new_values(shape), z_loss = args.lse_square_scale != 0 ? new_values(shape) : Tensor();
    if (none) {
      kernel.loss = loss;
      kernel.z_loss = z_loss;
      run(Stage::block_loss, row_blocks());
    } else {
      kernel.sums = new_values({row_blocks(), kBlock});
      run(Stage::block_loss, row_blocks());
      kernel.loss = loss;
      kernel.z_loss = z_loss;
      run(Stage::join_loss, 1);
    }
    return {loss, z_loss};
  }
};

std::tuple<Tensor, Tensor, Tensor> reduce_rows_npu(const Tensor& target, const OptionalTensor& weight,
                                                   const OptionalTensor& lse, const OptionalTensor& lse_low,
                                                   const OptionalTensor& picked, const OptionalTensor& wsum,
                                                   const OptionalTensor& totals, std::string_view reduction,
                                                   int64_t ignore_index, double label_smoothing,
                                                   double lse_square_scale, int64_t num_classes,
                                                   at::ScalarType loss_dtype) {
  check_loss_dtype(loss_dtype);
  check_reduce_rows(target, weight, lse, lse_low, picked, wsum, totals, label_smoothing, lse_square_scale, num_classes);
  const c10::DeviceGuard guard(target.device());
  Reduce reduce{
      .args = reduction_args(parse_reduction(reduction), ignore_index, label_smoothing, lse_square_scale, num_classes),
      .values = target.options().dtype(at::kFloat)};
  reduce.args.rows = target.numel();
  reduce.args.cols = num_classes;
  reduce.kernel.target = as_targets(target);
  reduce.kernel.weight = as_values(weight);
  check_targets_on_demand(reduce.kernel.target, num_classes, ignore_index);
  const auto nothing = [&] { return at::empty({0}, target.options().dtype(loss_dtype)); };
  if (!lse) {
    return {nothing(), nothing(), reduce.totals().to(stats_dtype(loss_dtype))};
  }
  reduce.kernel.lse = as_values(lse);
  reduce.kernel.lse_low = as_values(lse_low);
  reduce.kernel.picked = as_values(picked);
  reduce.kernel.wsum = label_smoothing != 0 ? as_values(wsum) : Tensor();
  reduce.kernel.totals = as_values(totals);
  const auto [loss, z_loss] = reduce.loss();
  return {loss.to(loss_dtype), z_loss.defined() ? z_loss.to(loss_dtype) : nothing(), reduce.new_values({0})};
}

}  // namespace

void register_reduce_rows(torch::Library& m) {
  m.impl("reduce_rows", reduce_rows_npu);
}

}  // namespace npu_xent::npu
