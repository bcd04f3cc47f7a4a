// What is not an operator: how this library was built, what it runs on, and the planner of the device kernels.
// Importing the module registers the operators, as every library with a TORCH_LIBRARY block does.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu/kernels/chunk_kernels.h"
#include "tiling/row_plan.h"

namespace {

pybind11::dict plan_rows(int64_t rows, int64_t cols, int64_t dtype, bool softcap) {
  if (rows < 1 || cols < 1 || dtype < 0 || dtype > 2) {
    throw std::invalid_argument("plan_rows wants rows > 0, cols > 0 and a dtype of 0 (fp32), 1 (fp16) or 2 (bf16)");
  }
  using namespace npu_xent;
  const XentPlan p = npu_xent::plan_rows(rows, cols, dtype, softcap);
  const bool is_short = p.mode == static_cast<int64_t>(RowMode::short_rows);
  pybind11::dict plan;
  plan["mode"] = p.mode;
  plan["rows_per_tile"] = p.rows_per_tile;
  plan["chunk_cols"] = p.chunk_cols;
  plan["chunks"] = p.chunks;
  plan["parts"] = p.parts;
  plan["chunks_per_part"] = p.chunks_per_part;
  plan["slots"] = p.slots;
  plan["ub_bytes"] = is_short ? short_buffers(dtype, p.rows_per_tile, cols, softcap).total
                              : long_buffers(dtype, p.chunk_cols, p.slots, softcap).total;
  plan["work_items"] = work_items(p, rows);
  plan["chunk_items"] = chunk_items(p, rows);
  return plan;
}

pybind11::tuple share_of(int64_t total, int64_t core, int64_t cores) {
  if (total < 0 || cores < 1 || core < 0 || core >= cores) {
    throw std::invalid_argument("share_of wants total >= 0 and 0 <= core < cores");
  }
  const auto share = npu_xent::share_of(total, core, cores);
  return pybind11::make_tuple(share.begin, share.end);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The operators of npu_xent, under torch.ops.npu_xent once this is imported.";
  m.attr("compiler") = __VERSION__;
  m.def("compiled_cpu_capabilities", &npu_xent::cpu::compiled_capabilities,
        "The instruction sets this library has kernels for, separated by spaces.");
  m.attr("UB_BYTES") = npu_xent::kUbBytes;
  m.def("plan_rows", &plan_rows, pybind11::arg("rows"), pybind11::arg("cols"), pybind11::arg("dtype"),
        pybind11::kw_only(), pybind11::arg("softcap") = false,
        "How a device kernel cuts logits [rows, cols], with or without a softcap: the planner of "
        "csrc/tiling/row_plan.h, as a dict.");
  m.def("share_of", &share_of, pybind11::arg("total"), pybind11::arg("core"), pybind11::arg("cores"),
        "The pieces (begin, end) that one core takes.");
  m.def("cpu_capability", &at::get_cpu_capability, "The instruction set chosen at run time, by torch's name.");
}
