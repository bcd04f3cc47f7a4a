// See runtime.h.
#include "npu/runtime.h"

#include <acl/acl.h>
#include <dlfcn.h>

#include <array>
#include <atomic>

#include "torch_npu/csrc/core/npu/NPUFormat.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace npu_xent::npu {
namespace {

std::atomic<void*> kernel_library{nullptr};

}  // namespace

void load_kernels(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "npu_xent: the device kernels cannot be loaded: ", dlerror());
  kernel_library = library;
}

void* find_launcher(const char* kernel) {
  void* library = kernel_library;
  TORCH_CHECK(library != nullptr, "npu_xent: the device kernels have not been loaded; import npu_xent first.");
  void* launcher = dlsym(library, (std::string("aclrtlaunch_") + kernel).c_str());
  TORCH_CHECK(launcher != nullptr, "npu_xent: the library of device kernels has no kernel ", kernel,
              ", so it is of another version; rebuild npu_xent.");
  return launcher;
}

int64_t core_count(c10::Device device) {
  static std::array<std::atomic<int64_t>, C10_COMPILE_TIME_MAX_NPUS> counts{};
  auto& count = counts.at(device.index());
  if (count == 0) {
    int64_t found = 0;
    const auto error = aclGetDeviceCapability(device.index(), ACL_DEVICE_INFO_VECTOR_CORE_NUM, &found);
    TORCH_CHECK(error == ACL_SUCCESS && found > 0, "npu_xent: the runtime reports no vector cores for ", device,
                " (error ", error, ", ", found, " cores).");
    count = found;
  }
  return count;
}

void* current_stream(c10::Device device) {
  // false: do not flush the queue first.
  return c10_npu::getCurrentNPUStream(device.index()).stream(false);
}

void enqueue(const char* name, std::function<int()> task) {
  at_npu::native::OpCommand::RunOpApi(name, std::move(task));
}

bool has_plain_format(const at::Tensor& tensor) {
  switch (at_npu::native::get_npu_format(tensor)) {
    case ACL_FORMAT_ND:
    case ACL_FORMAT_NCHW:
    case ACL_FORMAT_NHWC:
    case ACL_FORMAT_NCDHW:
      return true;
    default:
      return false;
  }
}

at::Tensor to_plain_format(const at::Tensor& tensor) {
  return has_plain_format(tensor) ? tensor : at_npu::native::npu_format_cast(tensor, ACL_FORMAT_ND);
}

}  // namespace npu_xent::npu
