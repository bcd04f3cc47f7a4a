// Registers the kernels, replacing those of torch_npu that would call CANN.
#include <memory>
#include <set>
#include <string>
#include <utility>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/to_ops.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "control.h"
#include "operators.h"

namespace cann_sim_torch {
namespace {

using c10::DispatchKey;

// Operators that keep torch_npu's kernel: they only change metadata, or call runtime functions that are simulated.
const std::set<std::string>& kept() {
  static const std::set<std::string> names = {"aten::_copy_from_and_resize",
                                              "aten::_fused_sdp_choice",
                                              "aten::_lazy_clone",
                                              "aten::_local_scalar_dense",
                                              "aten::_pin_memory",
                                              "aten::_to_copy",
                                              "aten::as_strided_",
                                              "aten::contiguous",
                                              "aten::copy_",
                                              "aten::is_pinned",
                                              "aten::is_set_to",
                                              "aten::record_stream",
                                              "aten::set_"};
  return names;
}

// Operators that allocate: they call torch_npu's kernel, and then report the tensor to the runtime.
const std::set<std::string>& allocating() {
  static const std::set<std::string> names = {"aten::empty",   "aten::empty_like", "aten::empty_strided",
                                              "aten::resize_", "aten::resize_as_", "aten::new_empty_strided"};
  return names;
}

bool is_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns()) {
    if (result.alias_info() && !result.alias_info()->isWrite()) {
      return true;
    }
  }
  return false;
}

bool runs_on_cpu(const c10::OperatorHandle& op) {
  for (DispatchKey key :
       {DispatchKey::CPU, DispatchKey::CompositeExplicitAutograd, DispatchKey::CompositeExplicitAutogradNonFunctional,
        DispatchKey::CompositeImplicitAutograd}) {
    if (op.hasKernelForDispatchKey(key)) {
      return true;
    }
  }
  return false;
}

// A dispatcher kernel that calls another kernel with the dispatch keys of the call.
class Calling : public c10::OperatorKernel {
 public:
  Calling(Kernel kernel, bool allocates) : kernel_(std::move(kernel)), allocates_(allocates) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    if (allocates_) {
      allocating_kernel(kernel_, op, keys, stack);
    } else {
      kernel_.callBoxed(op, keys, stack);
    }
  }

 private:
  Kernel kernel_;
  bool allocates_;
};

torch::CppFunction calling(Kernel kernel, bool allocates) {
  return torch::CppFunction::makeFromBoxedFunctor<Calling>(std::make_unique<Calling>(std::move(kernel), allocates));
}

at::Tensor cast_kernel(const at::Tensor& self, int64_t dtype, std::optional<int64_t> own_dtype) {
  constexpr int64_t kOfTorchNpu = 256;  // from here on, types that torch does not have
  TORCH_CHECK_NOT_IMPLEMENTED(dtype < kOfTorchNpu && !own_dtype, "cann_sim: npu::npu_dtype_cast to the type ", dtype,
                              " is not simulated: the CPU has no kernels for it");
  return at::_ops::to_dtype::call(self, static_cast<at::ScalarType>(dtype), false, false, std::nullopt);
}

at::Tensor cast_backward_kernel(const at::Tensor& grad, at::ScalarType dtype, std::optional<int64_t>,
                                std::optional<int64_t>) {
  return at::_ops::to_dtype::call(grad, dtype, false, false, std::nullopt);
}

std::string full_name(const c10::OperatorName& name) {
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// Gives operators the CPU's derivatives where torch_npu registers its own: those call backward operators of CANN, or
// replace a composition of other operators.
void install_derivatives(torch::Library& library) {
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::AutogradPrivateUse1)) {
    auto op = dispatcher.findSchema(name);
    if (name.name.rfind("aten::", 0) == 0 && op && runs_on_cpu(*op)) {
      library.impl(full_name(name).c_str(), calling(computed_kernel(*op, DispatchKey::AutogradCPU), false));
    }
  }
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);
  library.impl("_thnn_fused_gru_cell", &gru_cell);
}

void install_kernels(torch::Library& library) {
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  auto torch_npu_kernel = [](const c10::OperatorHandle& op) { return computed_kernel(op, DispatchKey::PrivateUse1); };
  keep_copy(torch_npu_kernel(dispatcher.findSchemaOrThrow("aten::copy_", "")));
  for (const c10::OperatorName& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::PrivateUse1)) {
    auto op = dispatcher.findSchema(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || kept().count(name.name) || is_view(op->schema())) {
      continue;
    }
    const std::string full = full_name(name);
    if (allocating().count(name.name)) {
      library.impl(full.c_str(), calling(torch_npu_kernel(*op), true));
    } else if (runs_on_cpu(*op)) {
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&host_kernel>());
    } else {
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&missing_kernel>());
    }
  }
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&copy_kernel>());
  library.impl("contiguous", &contiguous_kernel);
  library.impl("_thnn_fused_lstm_cell", &lstm_cell);  // in inference mode
  library.impl("_thnn_fused_gru_cell", &gru_cell);
}

// torch_npu's own operators raise, since they would call CANN, except the ones listed here.
void install_own_operators(torch::Library& library) {
  // Metadata, formats, and memory moves that torch_npu's copies are composed of.
  static const std::set<std::string> names = {
      "npu::_npu_format_cast", "npu::copy_memory_",     "npu::get_npu_format",
      "npu::get_storage_size", "npu::npu_broadcast",    "npu::npu_change_data_ptr",
      "npu::npu_format_cast",  "npu::npu_format_cast_", "npu::npu_prefetch",
      "npu::npu_reshape",      "npu::npu_slice",        "npu::npu_stride_copy",
      "npu::npu_transpose",    "npu::npu_view_copy",    "npu::one_",
      "npu::set_op_timeout_ms"};
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::PrivateUse1)) {
    if (name.name.rfind("npu::", 0) == 0 && !names.count(name.name) && dispatcher.findSchema(name)) {
      library.impl(full_name(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&missing_kernel>());
    }
  }
  library.impl("npu_dtype_cast", &cast_kernel);
  library.impl("npu_dtype_cast_backward", &cast_backward_kernel);
}

void install() {
  static bool installed = false;
  if (std::exchange(installed, true)) {
    return;
  }
  find_control();
  // Never destroyed: a Library's destructor removes its registrations.
  auto* kernels = new torch::Library(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto* own = new torch::Library(torch::Library::IMPL, "npu", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto* derivatives =
      new torch::Library(torch::Library::IMPL, "aten", DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  install_derivatives(*derivatives);
  install_kernels(*kernels);
  install_own_operators(*own);
}

}  // namespace

TORCH_LIBRARY(cann_sim, library) {
  library.def("install() -> ()", &install);
  library.def("settle() -> ()", &settle_all_tensors);
}

}  // namespace cann_sim_torch
