// The module npu_xent._npu: the operators' kernels for NPUs, registered by load().
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "npu/load.h"

namespace {

void load(const std::string& path) {
  try {
    npu_xent::npu::load(path);
  } catch (const c10::Error& error) {
    throw std::runtime_error(error.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(_npu, m) {
  m.doc() = "The operators of npu_xent for NPUs, which load() takes into use.";
  m.def("load", &load, pybind11::arg("path"), pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Load the device kernels from this library, try one on the current device, and register the operators. "
        "RuntimeError if that fails: nothing is registered then.");
}
