// What is not an operator: how this library was built, and what it runs on. Importing the module registers the
// operators, as every library with a TORCH_LIBRARY block does.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>

#include "cpu/kernels/chunk_kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The operators of npu_xent, under torch.ops.npu_xent once this is imported.";
  m.attr("compiler") = __VERSION__;
  m.def("compiled_cpu_capabilities", &npu_xent::cpu::compiled_capabilities,
        "The instruction sets this library has kernels for, separated by spaces.");
  m.def("cpu_capability", &at::get_cpu_capability, "The instruction set chosen at run time, by torch's name.");
}
