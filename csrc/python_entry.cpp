// _C.cross_entropy: a call of the operator from Python without torch.ops, whose conversion of arguments by schema takes
// longer than the loss of a small input. Only for the usual call; for every other one it returns None, and the caller
// then calls torch.ops. Both go through the dispatcher.
#include "python_entry.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <optional>

#include "ops.h"

namespace npu_xent {
namespace {

// A dense tensor of the CPU, of torch's own class.
const Tensor* usual_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) {
    return nullptr;
  }
  const Tensor& t = THPVariable_Unpack(object);
  const auto keys = t.key_set() - c10::autograd_dispatch_keyset - c10::autocast_dispatch_keyset -
                    c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU) ? &t : nullptr;
}

bool take(PyObject* object, double& number) {
  if (!PyFloat_CheckExact(object)) {
    return false;
  }
  number = PyFloat_AS_DOUBLE(object);
  return true;
}
bool take(PyObject* object, std::optional<double>& number) {
  return object == Py_None || (PyFloat_CheckExact(object) && take(object, number.emplace()));
}
bool take(PyObject* object, c10::SymInt& number) {
  int overflow = 1;
  const int64_t value = PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
  number = value;
  return overflow == 0;
}
bool take(PyObject* object, Reduction& reduction) {
  const auto is = [&](const char* name) {
    return PyUnicode_CheckExact(object) && PyUnicode_CompareWithASCIIString(object, name) == 0;
  };
  reduction = is("mean") ? Reduction::mean : is("sum") ? Reduction::sum : Reduction::none;
  return reduction != Reduction::none || is("none");
}
bool take(PyObject* object, std::optional<at::ScalarType>& dtype) {
  if (object != Py_None && THPDtype_Check(object)) {
    dtype = reinterpret_cast<THPDtype*>(object)->scalar_type;
  }
  return object == Py_None || dtype;
}

// Whether a mode for torch functions, a trace or a transform of torch.func has to see the call.
bool python_observes() {
  return at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing() ||
         c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Class probabilities that the operator serves; the others and forward-mode derivatives are left to Python.
bool are_usual_probabilities(const Tensor& logits, const Tensor& target, const Options& o) {
  return target.scalar_type() == logits.scalar_type() && target.sizes() == logits.sizes() && o.ignore_index < 0 &&
         !torch::autograd::isFwGradDefined(logits) && !torch::autograd::isFwGradDefined(target);
}

// (input, target, weight, ignore_index, reduction, label_smoothing, lse_square_scale, logit_scale, softcap, loss_dtype)
PyObject* cross_entropy_entry(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  HANDLE_TH_ERRORS
  if (n_args != 10 || python_observes()) {
    Py_RETURN_NONE;
  }
  const Tensor* logits = usual_tensor(args[0]);
  const Tensor* target = usual_tensor(args[1]);
  const Tensor* weight = args[2] == Py_None ? nullptr : usual_tensor(args[2]);
  Options o;
  std::optional<at::ScalarType> loss_dtype;
  const bool usual = logits && logits->dim() == 2 && target && (weight || args[2] == Py_None) &&
                     take(args[3], o.ignore_index) && take(args[4], o.reduction) && take(args[5], o.label_smoothing) &&
                     take(args[6], o.lse_square_scale) && take(args[7], o.logit_scale) && take(args[8], o.softcap) &&
                     take(args[9], loss_dtype);
  if (!usual || logits->size(1) == 0) {
    Py_RETURN_NONE;
  }
  const bool of_classes = target->dim() == 1 && target->scalar_type() == at::kLong;
  if (!of_classes && !are_usual_probabilities(*logits, *target, o)) {
    Py_RETURN_NONE;
  }
  Tensor loss;
  {
    pybind11::gil_scoped_release no_gil;
    const auto weights = weight ? OptionalTensor(*weight) : std::nullopt;
    loss = of_classes ? std::get<0>(cross_entropy<false>(o, *logits, *target, weights, loss_dtype, false, false, false))
                      : std::get<0>(prob_cross_entropy(o, *logits, *target, weights, loss_dtype, false));
  }
  return THPVariable_Wrap(std::move(loss));
  END_HANDLE_TH_ERRORS
}

PyMethodDef method{"cross_entropy", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cross_entropy_entry)),
                   METH_FASTCALL, nullptr};

}  // namespace

PyObject* new_python_entry() {
  return PyCFunction_New(&method, nullptr);
}

}  // namespace npu_xent
