"""What the functions have in common about their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPTIONAL = ("weight", "linear_bias")  # may be None


def check_tensors(function: str, **tensors: Any) -> None:
    """Raise TypeError for what is not a dense tensor. The operators would say it in C++ terms."""
    for argument, value in tensors.items():
        if isinstance(value, Tensor):
            require_dense(function, **{argument: value})
        elif not (argument in _OPTIONAL and value is None):
            raise TypeError(f"npu_xent.{function}: {argument} must be a torch.Tensor, but is a {type(value).__name__}")


def require_dense(function: str, **tensors: Tensor) -> None:
    """Raise TypeError for a tensor whose memory is not one value for each element."""
    for argument, tensor in tensors.items():
        if tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized):
            continue
        kind, remedy = f"of layout {tensor.layout}", "to_dense()"
        if tensor.is_nested:
            kind, remedy = "nested", "to_padded_tensor(0.0)"
        elif tensor.is_quantized:
            kind, remedy = "quantized", "dequantize()"
        raise TypeError(
            f"npu_xent.{function}: {argument} must be a dense tensor, but is {kind}; pass {argument}.{remedy}"
        )


def index_target(target: Tensor) -> Tensor:
    """Any integer dtype as int64, which the operators take; others as they are, for the operators to refuse."""
    if target.dtype == torch.uint64:  # what does not fit in int64 is no class, and must not wrap round to ignore_index
        target = target.view(torch.int64)
        return target.masked_fill(target < 0, torch.iinfo(torch.int64).max)
    return target.long() if target.dtype in INTEGERS else target


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which the C++ autograd functions do not take part in."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def z_loss_like(loss: Tensor, z_loss: Tensor) -> Tensor:
    """The z-loss in the shape of the loss; the operator leaves it out when its scale is 0."""
    return torch.zeros_like(loss, requires_grad=False) if z_loss.numel() != loss.numel() else z_loss.view(loss.shape)
