// What is not an operator: how this library was built, what it runs on, and the planner of the device kernels.
// Importing the module registers the operators, as every library with a TORCH_LIBRARY block does.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "cpu/kernels/chunk_kernels.h"
#include "python_entry.h"
#include "tiling/row_args.h"
#include "tiling/row_plan.h"

namespace {

pybind11::dict plan_rows(int64_t rows, int64_t cols, int64_t dtype, bool softcap, bool by_row) {
  if (rows < 1 || cols < 1 || dtype < 0 || dtype > 2) {
    throw std::invalid_argument("plan_rows wants rows > 0, cols > 0 and a dtype of 0 (fp32), 1 (fp16) or 2 (bf16)");
  }
  using namespace npu_xent;
  const XentPlan p = npu_xent::plan_rows(rows, cols, dtype, softcap, by_row);
  const bool is_short = p.mode == static_cast<int64_t>(RowMode::short_rows);
  pybind11::dict plan;
#define XENT_ENTRY(name) plan[#name] = p.name;
  XENT_PLAN_MEMBERS(XENT_ENTRY)
#undef XENT_ENTRY
  plan["ub_bytes"] = is_short ? short_buffers(dtype, p.rows_per_tile, cols, softcap, by_row).total
                              : long_buffers(dtype, p.chunk_cols, p.slots, softcap, by_row).total;
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

// A struct that kernels take by value: its size, and its members as (name, offset, type).
struct Member {
  const char* name;
  size_t offset;
  const char* type;
};
template <typename T>
constexpr const char* type_name() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, int64_t>, "benchmarks/device/kernels.py knows no other");
  return std::is_same_v<T, float> ? "float32" : "int64";
}
pybind11::dict layout(size_t size, std::initializer_list<Member> list) {
  pybind11::list members;
  for (const auto& [name, offset, type] : list) {
    members.append(pybind11::make_tuple(name, offset, type));
  }
  return pybind11::dict(pybind11::arg("size") = size, pybind11::arg("members") = members);
}
#define XENT_MEMBER(name) {#name, offsetof(Struct, name), type_name<decltype(Struct::name)>()},
pybind11::dict args_layout() {
  using Struct = XentArgs;
  return layout(sizeof(Struct), {XENT_ARGS_MEMBERS(XENT_MEMBER)});
}
pybind11::dict plan_layout() {
  using Struct = XentPlan;
  return layout(sizeof(Struct), {XENT_PLAN_MEMBERS(XENT_MEMBER)});
}
#undef XENT_MEMBER

// Numbers by their names.
template <typename Number>
pybind11::dict numbers(std::initializer_list<std::pair<const char*, Number>> list) {
  pybind11::dict result;
  for (const auto& [name, number] : list) {
    result[name] = static_cast<int64_t>(number);
  }
  return result;
}

// How kernels are launched, for Python programs that do so themselves: benchmarks/device/kernels.py.
pybind11::dict kernel_interface() {
  using namespace npu_xent;
  pybind11::dict result;
  result["XentArgs"] = args_layout();
  result["XentPlan"] = plan_layout();
  result["Stage"] = numbers<Stage>({{"whole", Stage::whole},
                                    {"partial_stats", Stage::partial_stats},
                                    {"log_prob_only", Stage::log_prob_only},
                                    {"join_parts", Stage::join_parts},
                                    {"block_totals", Stage::block_totals},
                                    {"join_totals", Stage::join_totals},
                                    {"block_loss", Stage::block_loss},
                                    {"join_loss", Stage::join_loss}});
  result["Reduction"] =
      numbers<Reduction>({{"none", Reduction::none}, {"mean", Reduction::mean}, {"sum", Reduction::sum}});
  result["RowMode"] = numbers<RowMode>({{"short", RowMode::short_rows},
                                        {"resident", RowMode::resident},
                                        {"streaming", RowMode::streaming},
                                        {"split", RowMode::split}});
  result["LogitsType"] =
      numbers<LogitsType>({{"fp32", LogitsType::fp32}, {"fp16", LogitsType::fp16}, {"bf16", LogitsType::bf16}});
  result["constants"] = numbers<int64_t>({{"reduce_rows", kReduceRows},
                                          {"reduce_weights", kReduceWeights},
                                          {"scale_chunk", kScaleChunk},
                                          {"block", kBlock},
                                          {"totals", kTotals}});
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The operators of npu_xent, under torch.ops.npu_xent once this is imported.";
  m.attr("compiler") = __VERSION__;
  m.attr("cross_entropy") = pybind11::reinterpret_steal<pybind11::object>(npu_xent::new_python_entry());
  m.def("compiled_cpu_capabilities", &npu_xent::cpu::compiled_capabilities,
        "The instruction sets this library has kernels for, separated by spaces.");
  m.attr("UB_BYTES") = npu_xent::kUbBytes;
  m.attr("KERNEL_INTERFACE") = kernel_interface();
  m.def("plan_rows", &plan_rows, pybind11::arg("rows"), pybind11::arg("cols"), pybind11::arg("dtype"),
        pybind11::kw_only(), pybind11::arg("softcap") = false, pybind11::arg("by_row") = false,
        "How a device kernel cuts logits [rows, cols], with or without a softcap: the planner of "
        "csrc/tiling/row_plan.h, as a dict.");
  m.def("share_of", &share_of, pybind11::arg("total"), pybind11::arg("core"), pybind11::arg("cores"),
        "The pieces (begin, end) that one core takes.");
  m.def(
      "cpu_capability", [] { return npu_xent::cpu::variant_name(at::get_cpu_capability()); },
      "The instruction set chosen at run time, by the name that torch from 2.8 on gives it.");
}
