"""Tensor checks and conversions that the public functions share."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPTIONAL = ("weight", "linear_bias")  # may be None


def check_tensors(function: str, **tensors: Any) -> None:
    """Raise TypeError for an argument that is not a dense tensor, with a clearer message than the C++ operators'."""
    for argument, value in tensors.items():
        if isinstance(value, Tensor):
            _check_dense(function, argument, value)
        elif not (argument in _OPTIONAL and value is None):
            raise TypeError(f"npu_xent.{function}: {argument} must be a torch.Tensor, but is a {type(value).__name__}")


def has_dtensor(*tensors: Any) -> bool:
    """Whether one is a DTensor. Its module is looked up, not imported, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    for tensor in tensors:  # noqa: SIM110  a third of the time of any()
        if isinstance(tensor, module.DTensor):
            return True
    return False


def _check_dense(function: str, argument: str, tensor: Tensor) -> None:
    if tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized):
        return
    kind, remedy = f"of layout {tensor.layout}", f"{argument}.to_dense()"
    if tensor.is_nested:  # not padded: padding with 0 would count as class 0
        joined = f"{argument}.values()" if tensor.layout is torch.jagged else f"torch.cat({argument}.unbind())"
        kind, remedy = "nested", f"its rows, {joined}"
    elif tensor.is_quantized:
        kind, remedy = "quantized", f"{argument}.dequantize()"
    raise TypeError(f"npu_xent.{function}: {argument} must be a dense tensor, but is {kind}; pass {remedy}")


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def require_storage(argument: str, tensor: Tensor) -> None:
    """Raise RuntimeError for a freed or shrunk storage, as the operators do, where torch reads it before them."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not (_is_tracing() or transformed())
    if torch.compiler.is_compiling() or not plain or tensor.is_meta or tensor.numel() == 0:
        return
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed, seen = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > seen:
        raise RuntimeError(
            f"npu_xent: {argument} with shape {list(tensor.shape)} needs {needed} bytes of storage, but its storage "
            f"has been resized to {seen}; keep the storage until npu_xent has read it, in the forward or the backward."
        )


def _full_stop(function: str) -> str:
    """The end of a message: the operators' messages, which name no function, are sentences."""
    return "." if function == "npu_xent" else ""


def check_device(function: str, input: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor of a linear layer that is not on the device of input."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{function}: {argument} must be on the device of input, {input.device}, but is on {tensor.device}; "
                f"move it with {argument}.to(input.device){_full_stop(function)}"
            )


def check_float64(function: str, **tensors: Tensor) -> None:
    """Raise TypeError for float64 tensors of an NPU, as the operators do, where torch computes."""
    for argument, tensor in tensors.items():
        if tensor.dtype is torch.float64 and tensor.device.type == "npu":
            raise TypeError(
                f"{function}: {argument} must be float32, bfloat16 or float16 on {tensor.device}, which has no float64 "
                f"arithmetic, but is {tensor.dtype}; convert it with {argument}.float(), or compute on the CPU"
                f"{_full_stop(function)}"
            )


def check_logits_dtype(logits: Tensor) -> None:
    """Raise the operators' TypeError, where torch operations compute."""
    if logits.dtype not in LOGITS:
        raise TypeError(f"npu_xent: logits must be float32, bfloat16, float16 or float64, but are {logits.dtype}.")
    check_float64("npu_xent", logits=logits)


def require_storages(**tensors: Tensor | None) -> None:
    """require_storage for each argument that is given."""
    for argument, tensor in tensors.items():
        if tensor is not None:
            require_storage(argument, tensor)


def check_not_leaf(function: str, logits: Tensor) -> None:
    """Raise ValueError if consume_logits would overwrite a leaf, or what a view shows of one."""
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            f"npu_xent.{function}: consume_logits would overwrite a leaf of the autograd graph; leave it off, or pass "
            "the output of an operation"
        )


def check_overwritable(function: str, argument: str, logits: Tensor, overwrite: bool) -> None:
    """Raise ValueError where consume_logits cannot write over the logits; the operator checks their memory."""
    if not overwrite:
        return
    if transformed():
        raise ValueError(
            f"npu_xent.{function}: consume_logits needs class indices and no torch.func transform, since only "
            "the fused operator can write over the logits; leave it off"
        )
    if torch.compiler.is_compiling():
        return
    check_not_leaf(function, logits)  # the operator cannot tell from a view of a leaf that is a view itself
    check_not_negative(function, argument, logits)


def check_not_negative(function: str, argument: str, logits: Tensor) -> None:
    """Raise ValueError if consume_logits would write over a view with torch's negative bit."""
    if logits.is_neg():
        raise ValueError(
            f"npu_xent.{function}: consume_logits cannot write over a view with torch's negative bit (torch.is_neg), "
            f"such as the imaginary part of a conjugate; pass {argument}.resolve_neg(), or leave it off"
        )


def index_target(target: Tensor, argument: str = "target") -> Tensor:
    """Convert integer dtypes to int64, which the operators take, or raise TypeError."""
    if target.dtype is torch.int64:
        return target
    if target.dtype not in INTEGERS:
        raise TypeError(
            f"npu_xent: {argument} must be int64 or another integer dtype, but is {target.dtype}; "
            f"convert it with {argument}.long()."
        )
    require_storage(argument, target)
    if target.dtype == torch.uint64:  # values above int64 must not wrap to ignore_index
        target = target.view(torch.int64)
        return target.masked_fill(target < 0, torch.iinfo(torch.int64).max)
    return target.long()


def transformed() -> bool:
    """Whether a torch.func transform is active. The C++ autograd functions do not support them."""
    return torch._C._are_functorch_transforms_active()


# A constant to Dynamo, which compiles a transform with the transform active. torch.compiler.assume_constant_result does
# this too, but takes a second to import torch._dynamo.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_autocast_on(tensor: Tensor) -> bool:
    """Whether operations on the tensor's device are under autocast, which torch does not know for meta tensors."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def forward_mode() -> bool:
    """Whether forward-mode derivatives (torch.autograd.forward_ad) are computed."""
    return forward_ad._current_level >= 0


def z_loss_like(loss: Tensor, z_loss: Tensor) -> Tensor:
    """Return the z-loss in the shape of the loss: zeros if its scale is 0, where the operator returns none."""
    return torch.zeros_like(loss, requires_grad=False) if z_loss.numel() != loss.numel() else z_loss.view(loss.shape)
