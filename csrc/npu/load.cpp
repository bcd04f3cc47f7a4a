// See load.h.
#include "npu/load.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>

#include "npu/common.h"
#include "npu/runtime.h"

namespace npu_xent::npu {
namespace {

// A launcher returns 0 without a launch when its binary was not accepted for this chip: only a result tells.
void check_that_kernels_run() {
  const auto values = at::arange(64, at::kFloat);
  const auto x = values.to(c10::Device(at::kPrivateUse1)), factor = at::full({}, 2.0, at::kFloat).to(x.device());
  XentArgs args{};
  args.dtype = args.factor_dtype = static_cast<int64_t>(LogitsType::fp32);
  args.cols = values.numel();
  launch(ScaleKernel{.x = x, .factor = factor}, x.device(), 1, args);
  TORCH_CHECK(x.to(at::kCPU).equal(values * 2.0),
              "npu_xent: a kernel that was launched to try it has not run; the device's log says why.");
}

}  // namespace

void load(const std::string& path) {
  load_kernels(path);
  check_that_kernels_run();
  static torch::Library library(torch::Library::IMPL, "npu_xent", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  register_row_stats(library);
  register_row_grad(library);
  register_row_stats_grad(library);
  register_reduce_rows(library);
  register_scale(library);
}

}  // namespace npu_xent::npu
