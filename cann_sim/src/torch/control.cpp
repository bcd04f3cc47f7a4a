// Binds the control interface, and converts tensors to byte ranges.
#include "control.h"

#include <dlfcn.h>
#include <algorithm>
#include <vector>

#include <c10/util/Exception.h>

#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace cann_sim_torch {
namespace {

constexpr int64_t kMostRuns = 1 << 16;  // a tensor with more pieces is not checked for races

struct Control {
  uint64_t (*begin)(void*, const char*);
  void (*touch)(uint64_t, const void*, size_t, int);
  int (*end)(uint64_t);
  void (*allocated)(const void*, size_t);
  void (*freed)(const void*);
  const char* (*message)();
  void (*written)(const void*, uint64_t);  // libcann_sim's, of which libascendcl is a user (cann_sim/launch.h)
};

template <typename Function>
void bind(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  TORCH_CHECK(
      function != nullptr, "cann_sim: the libascendcl.so of this process has no ", name,
      ": it is not the simulator's. Start the program with `python -m cann_sim SCRIPT`, in an environment where "
      "CANN's set_env.sh has not been sourced.");
}

const Control& control() {
  static const Control bound = [] {
    void* library = dlopen("libascendcl.so", RTLD_NOW | RTLD_NOLOAD);
    TORCH_CHECK(library != nullptr,
                "cann_sim: libascendcl.so is not loaded. Start the program with `python -m cann_sim SCRIPT`.");
    Control c{};
    bind(library, "cann_sim_acl_begin", c.begin);
    bind(library, "cann_sim_acl_touch", c.touch);
    bind(library, "cann_sim_acl_end", c.end);
    bind(library, "cann_sim_acl_tensor_allocated", c.allocated);
    bind(library, "cann_sim_acl_tensor_freed", c.freed);
    bind(library, "aclGetRecentErrMsg", c.message);
    bind(library, "cann_sim_written_now", c.written);
    return c;
  }();
  return bound;
}

struct Dimension {
  int64_t size, stride;
};

// Dimensions with more than one element, outermost first; adjacent dense dimensions are merged.
std::vector<Dimension> merged_dimensions(const at::TensorBase& tensor) {
  std::vector<Dimension> dimensions;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) != 0) {
      dimensions.push_back({tensor.size(i), tensor.stride(i)});
    }
  }
  std::stable_sort(dimensions.begin(), dimensions.end(), [](auto& a, auto& b) { return a.stride > b.stride; });
  std::vector<Dimension> merged;
  for (const Dimension& inner : dimensions) {
    if (!merged.empty() && merged.back().stride == inner.size * inner.stride) {
      merged.back() = {merged.back().size * inner.size, inner.stride};
    } else {
      merged.push_back(inner);
    }
  }
  return merged;
}

}  // namespace

void find_control() {
  control();
}
void tensor_allocated(const void* start, size_t bytes) {
  control().allocated(start, bytes);
}
void tensor_freed(const void* start) {
  control().freed(start);
}

Task::Task(c10::Device device, const std::string& name) : name_(name) {
  // stream() flushes torch_npu's task queue to the stream; begin waits for the stream.
  task_ = control().begin(c10_npu::getCurrentNPUStream(device.index()).stream(), name.c_str());
  if (task_ == 0) {
    const char* why = control().message();
    TORCH_CHECK(false, "cann_sim: ", name, " cannot run on the current stream: ", why == nullptr ? "" : why);
  }
}

Task::~Task() {
  if (open_) {
    control().end(task_);
  }
}

void Task::end() {
  open_ = false;
  TORCH_CHECK(control().end(task_) == 0, "cann_sim: ", name_,
              " broke a rule of the device; which one is on stderr and in cann_sim.acl.status().errors");
}

void Task::touch(const at::TensorBase& tensor, bool write) {
  if (!tensor.defined() || tensor.numel() == 0) {
    return;
  }
  std::vector<Dimension> outer = merged_dimensions(tensor);
  int64_t run = 1;  // contiguous elements
  if (!outer.empty() && outer.back().stride == 1) {
    run = outer.back().size;
    outer.pop_back();
  }
  int64_t runs = 1, last = 0;
  for (const Dimension& dimension : outer) {
    runs *= dimension.size;
    last += (dimension.size - 1) * dimension.stride;
  }
  const auto* start = static_cast<const char*>(tensor.const_data_ptr());
  const size_t itemsize = tensor.itemsize();
  if (runs > kMostRuns) {
    if (write) {
      control().written(start, (last + run) * itemsize);
    }
    return;
  }
  for (int64_t i = 0; i < runs; ++i) {
    int64_t offset = 0, rest = i;
    for (auto dimension = outer.rbegin(); dimension != outer.rend(); ++dimension) {
      offset += rest % dimension->size * dimension->stride;
      rest /= dimension->size;
    }
    control().touch(task_, start + offset * itemsize, run * itemsize, write);
  }
}

}  // namespace cann_sim_torch
