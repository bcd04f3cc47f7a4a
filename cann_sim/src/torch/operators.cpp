// The kernel of nearly all operators of npu tensors.
#include "operators.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/enum_tag.h>

#include "aliases.h"
#include "control.h"
#include "random.h"
#include "torch_npu/csrc/core/npu/NPUFunctions.h"
#include "torch_npu/csrc/core/npu/NPUGuard.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace cann_sim_torch {
namespace {

// Arguments that may be on the CPU although others are npu tensors, as torch_npu allows.
bool may_be_on_cpu(const std::string& argument) {
  constexpr std::array<std::string_view, 6> kNames = {"indices",     "lengths",    "batch_sizes",
                                                      "state_steps", "grad_scale", "found_inf"};
  return std::find(kNames.begin(), kNames.end(), argument) != kNames.end();
}

// The device of an operator's npu tensors; raises if they are on several devices.
class OneDevice {
 public:
  explicit OneDevice(const c10::OperatorHandle& op) : op_(op) {}

  void see(const at::Tensor& tensor, const std::string& argument) {
    if (!tensor.defined()) {
      return;
    }
    if (tensor.is_privateuseone()) {
      if (device_ && *device_ != tensor.device()) {
        refuse(tensor.device(), *device_, argument);
      }
      device_ = tensor.device();
    } else if (tensor.is_cpu() && tensor.dim() > 0 && !may_be_on_cpu(argument)) {
      cpu_argument_ = argument;
    }
  }

  void want(c10::Device device) {
    if (device.is_privateuseone() && !device_) {
      device_ = c10::Device(device.type(), device.has_index() ? device.index() : c10_npu::current_device());
    }
  }

  c10::Device device() const {
    TORCH_CHECK(device_, "cann_sim: ", op_.operator_name(), " was called for npu without an npu tensor or device");
    if (cpu_argument_) {
      refuse(c10::Device(at::kCPU), *device_, *cpu_argument_);
    }
    return *device_;
  }

 private:
  [[noreturn]] void refuse(c10::Device seen, c10::Device other, const std::string& argument) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", other,
                " and ", seen, "! (argument ", argument, " of ", op_.operator_name(), ")");
  }

  const c10::OperatorHandle& op_;
  std::optional<c10::Device> device_;
  std::optional<std::string> cpu_argument_;
};

template <typename Visit>
void visit_tensors(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) {
      visit(tensor);
    }
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      if (tensor) {
        visit(*tensor);
      }
    }
  }
}

template <typename Change>
void change_tensors(c10::IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      list.push_back(change(tensor));
    }
    value = std::move(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    }
    value = std::move(list);
  }
}

// On the device, an operator whose result's shape depends on data ends by synchronising its stream.
bool synchronises(const c10::OperatorHandle& op) {
  return op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output);
}

// Runs the operator: replaces npu tensors on the stack by results that are aliases or new CPU tensors.
void run(const c10::OperatorHandle& op, Stack* stack, c10::Device device, Aliases& aliases) {
  const c10::FunctionSchema& schema = op.schema();
  const std::vector<c10::Argument>& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  settle_tensors(device.index());
  Task task(device, schema.name());

  bool takes_generator = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    change_tensors(value, [&](const at::Tensor& tensor) { return aliases.to_cpu(tensor, written); });
    if (value.isDevice() && value.toDevice().is_privateuseone()) {
      value = c10::Device(at::kCPU);
    }
    const c10::TypePtr& type = arguments[i].type();
    if (type->kind() == c10::TypeKind::OptionalType &&
        type->castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType) {
      takes_generator = true;
      value = cpu_generator(value.toOptional<at::Generator>(), device);
    }
  }
  for (const Aliases::Pair& pair : aliases.pairs()) {
    task.touch(pair.npu, pair.written);
  }
  {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    std::optional<DefaultGeneratorGuard> numbers;
    if (!takes_generator && op.hasTag(at::Tag::nondeterministic_seeded)) {
      numbers.emplace(device);
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  task.end();
}

// Writes results that are still on the CPU to npu tensors: new results, and resized aliases (out=). Allocates before
// its task begins, because an allocator that is short of memory waits for all tasks.
void deliver(const c10::OperatorHandle& op, Stack* stack, c10::Device device, Aliases& aliases) {
  {
    const SettledLater later;
    for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
      change_tensors((*stack)[i], [&](const at::Tensor& tensor) { return aliases.to_npu(tensor, device); });
    }
  }
  const std::vector<Aliases::Pair> arriving = aliases.arriving();
  if (arriving.empty()) {
    return;
  }
  settle_tensors(device.index());
  Task task(device, op.schema().name());
  for (const Aliases::Pair& pair : arriving) {
    task.touch(pair.npu, true);
    Aliases::write(pair);
  }
  task.end();
}

}  // namespace

void host_kernel(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::vector<c10::Argument>& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  OneDevice devices(op);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = (*stack)[first + i];
    visit_tensors(value, [&](const at::Tensor& tensor) { devices.see(tensor, arguments[i].name()); });
    if (value.isDevice()) {
      devices.want(value.toDevice());
    }
  }
  const c10::Device device = devices.device();
  const c10_npu::NPUGuard on_device(device);
  Aliases aliases;
  run(op, stack, device, aliases);
  deliver(op, stack, device, aliases);
  if (synchronises(op)) {
    c10_npu::getCurrentNPUStream(device.index()).synchronize();
  }
}

void missing_kernel(const c10::OperatorHandle& op, Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "cann_sim: ", op.operator_name(),
                              " is not simulated: torch_npu runs it with a kernel of CANN, and torch has no CPU kernel "
                              "for it. Compose it of operators that have a CPU kernel, or write a kernel.");
}

}  // namespace cann_sim_torch
