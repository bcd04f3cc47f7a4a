"""The documented constraints of torch_npu.npu_cross_entropy_loss, checked before any work.

Source: the operator's page in the documentation of torch_npu (Ascend Extension for PyTorch). What passes here also runs
on the vendor's operator unchanged.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

MAX_ROWS = 200_000
DTYPES = (torch.float16, torch.float32, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")


class ConstraintError(ValueError):
    """A documented constraint of npu_cross_entropy_loss was broken: which one, the value seen, and the way out."""


def _broken(rule: str, seen: str) -> ConstraintError:
    return ConstraintError(
        f"npu_cross_entropy_loss: {rule}, but {seen}. Pass strict=False to lift the documented restrictions, or call "
        "npu_xent.cross_entropy."
    )


def _require(condition: bool, rule: str, seen: str, *values: object) -> None:
    """Raise unless condition; `seen` is formatted with `values` only then, which keeps it out of a compiler's sight."""
    if not condition:
        raise _broken(rule, seen.format(*values))


def check_documented_constraints(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale_for_zloss: float,
    return_zloss: bool,
) -> None:
    """Raise ConstraintError for the first documented rule that the arguments break."""
    _require(input.dim() == 2, "input must have shape [N, C]", "its shape is {}", list(input.shape))
    _require(input.dtype in DTYPES, "the dtype of input must be float16, float32 or bfloat16", "it is {}", input.dtype)
    rows, classes = input.shape
    _require(0 < rows <= MAX_ROWS, f"N, the rows of input, must lie in (0, {MAX_ROWS}]", "N is {}", rows)
    _require(classes > 0, "C, the columns of input, must be greater than 0", "C is {}", classes)
    _require(
        target.dim() == 1 and target.shape[0] == rows,
        "target must have shape [N], one value for each row of input",
        "its shape is {} and N is {}",
        list(target.shape),
        rows,
    )
    _require(target.dtype == torch.int64, "the dtype of target must be int64", "it is {}", target.dtype)
    if weight is not None:
        _check_weight(weight, classes)
    _require(reduction in REDUCTIONS, 'reduction must be "mean", "sum" or "none"', "it is {!r}", reduction)
    _require(ignore_index < classes, "ignore_index must be less than C", "it is {} and C is {}", ignore_index, classes)
    _require(0.0 <= label_smoothing < 1.0, "label_smoothing must lie in [0, 1)", "it is {}", label_smoothing)
    _require(
        lse_square_scale_for_zloss == 0.0,
        "lse_square_scale_for_zloss is documented with the range [0, 1) but not enabled and must be 0",
        "it is {}",
        lse_square_scale_for_zloss,
    )
    _require(not return_zloss, "return_zloss is documented but not enabled and must be False", "it is True")
    if input.requires_grad and torch.is_grad_enabled():
        _check_training(weight, reduction, ignore_index, label_smoothing)


def _check_weight(weight: Tensor, classes: int) -> None:
    _require(
        weight.dim() == 1 and weight.shape[0] == classes,
        "weight must have shape [C], one value for each column of input",
        "its shape is {} and C is {}",
        list(weight.shape),
        classes,
    )
    _require(weight.dtype == torch.float32, "the dtype of weight must be float32", "it is {}", weight.dtype)
    # Values are looked at where there are any and that is free: not under a compiler, in a fake tensor, or on a device
    # that would have to be waited for (unless that was asked for).
    if not torch.compiler.is_compiling() and may_look(weight.device.type) and not is_fake(weight):
        outside = ((weight > 0) & (weight <= 1)).logical_not()
        if outside.any():
            first = int(outside.nonzero()[0])
            raise _broken("the values of weight must lie in (0, 1]", f"weight[{first}] is {float(weight[first])}")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values, as when a compiler traces."""
    # Not above: torch brings it in late, and warns then if there is no numpy. A plain tensor is none.
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def may_look(device: str) -> bool:
    """Whether values on this device are checked: on the CPU always, on an NPU if NPU_XENT_DEBUG says so."""
    return device == "cpu" or (device == "npu" and os.environ.get("NPU_XENT_DEBUG", "0") not in ("", "0"))


def _check_training(weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float) -> None:
    """When input requires a gradient, "mean" takes three options at their defaults only, "sum" and "none" one."""
    rule = f"with input.requires_grad and reduction {reduction!r}, {{}} must keep its default"
    if reduction == "mean":
        _require(weight is None, rule.format("weight") + " None", "a tensor was given")
        _require(ignore_index == -100, rule.format("ignore_index") + " -100", "it is {}", ignore_index)
    _require(label_smoothing == 0.0, rule.format("label_smoothing") + " 0.0", "it is {}", label_smoothing)
