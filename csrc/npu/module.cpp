// The module npu_xent._npu: the operators' kernels for NPUs, registered by load().
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <stdexcept>

#include "npu/operators.h"
#include "npu/runtime.h"

namespace {

void load(const std::string& path) {
  try {
    npu_xent::npu::load_kernels(path);
    npu_xent::npu::try_a_kernel();
    static torch::Library library(torch::Library::IMPL, "npu_xent", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
    npu_xent::npu::register_operators(library);
  } catch (const c10::Error& error) {
    throw std::runtime_error(error.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(_npu, m) {
  m.doc() = "The operators of npu_xent for NPUs, registered by load().";
  m.def(
      "load", &load, pybind11::arg("path"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Load the device kernels from this library, try one on the current device, and register the operators; once per "
      "process. RuntimeError if that fails: nothing is registered then, and npu tensors stay with the composite.");
}
