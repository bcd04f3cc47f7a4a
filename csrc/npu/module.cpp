// The module npu_xent._npu: importing it registers the operators' kernels for NPUs.
#include <pybind11/pybind11.h>

#include "npu/runtime.h"

PYBIND11_MODULE(_npu, m) {
  m.doc() = "The operators of npu_xent for NPUs. load_kernels comes before the first of them.";
  m.def("load_kernels", &npu_xent::npu::load_kernels, pybind11::arg("path"),
        "Load the device kernels from this library. RuntimeError if that fails.");
}
