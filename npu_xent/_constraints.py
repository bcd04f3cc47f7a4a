"""The documented constraints of torch_npu.npu_cross_entropy_loss, checked before any computation.

Source: the operator's page in the documentation of torch_npu (Ascend Extension for PyTorch). A call that passes here is
documented to run on the vendor's operator, with one exception: a row whose target is a negative ignore_index. The page
allows only targets in [0, C) and says that a negative ignore_index ignores nothing. The vendor's kernel does ignore
such rows, as torch does (read in its published sources).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ._tensors import INTEGERS, require_storage

MAX_ROWS = 200_000
DTYPES = (torch.float16, torch.float32, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")


# Broken rules that strict=None only warns of: the rule, and the value seen.
Lifted = list[tuple[str, str]]
_warned: set[str] = set()  # rules

# The advice where strict=False accepts the call; other rules have their own.
LIFT = "Pass strict=False to lift the documented restrictions, or call npu_xent.cross_entropy."


class ConstraintError(ValueError):
    """A documented constraint of npu_cross_entropy_loss is broken; the message gives rule, value and remedy."""


class TargetConstraintError(ConstraintError, IndexError):
    """A target is out of range: a broken constraint, and an IndexError as in torch."""


def _require(
    lifted: Lifted | None, condition: bool, rule: str, seen: str, *values: object, way_out: str = LIFT
) -> None:
    """Raise unless condition holds, or add the rule to `lifted` if strict=False would lift it."""
    if condition:
        return
    if lifted is None or way_out != LIFT:
        raise ConstraintError(f"npu_cross_entropy_loss: {rule}, but {seen.format(*values)}. {way_out}")
    # Compilers need constants here, and the values may be symbols to them.
    lifted.append((rule, "" if torch.compiler.is_compiling() else f", but {seen.format(*values)}"))


def warn_of_lifted(lifted: Lifted) -> None:
    """Warn of the rules, once of each in a process, at the caller of the public function."""
    for rule, seen in lifted:
        _warn_once(rule, seen)


def _warn_once(rule: str, seen: str) -> None:
    if rule in _warned:
        return
    _warned.add(rule)
    warnings.warn(
        f"npu_cross_entropy_loss: {rule}{seen}. npu_xent computes this call, but the vendor does not document that its "
        "operator does. strict=False silences this warning, and strict=True raises an error instead (arguments of this "
        "function and of npu_xent.patch_torch_npu).",
        stacklevel=4,
    )


_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called, not traced: see _loading


def check_documented_constraints(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale_for_zloss: float,
    return_zloss: bool,
    lifted: Lifted | None = None,
) -> None:
    """Raise ConstraintError for the first documented rule that the arguments break.

    Rules that are restrictions of the vendor's alone are added to `lifted`, if it is given, instead of raising.
    """
    _require(
        lifted,
        input.dim() == 2,
        "input must have shape [N, C]",
        "its shape is {}",
        list(input.shape),
        way_out="Flatten it, and target, to one row for each prediction.",
    )
    _require(
        lifted,
        input.dtype in DTYPES,
        "the dtype of input must be float16, float32 or bfloat16",
        "it is {}",
        input.dtype,
        way_out=LIFT if input.dtype is torch.float64 else "Pass logits of one of these dtypes.",
    )
    rows, classes = input.shape
    _require(lifted, 0 < rows <= MAX_ROWS, f"N, the rows of input, must lie in (0, {MAX_ROWS}]", "N is {}", rows)
    _require(
        lifted,
        classes > 0,
        "C, the columns of input, must be greater than 0",
        "C is {}",
        classes,
        way_out="Pass logits with at least one class.",
    )
    _require(
        lifted,
        target.dim() == 1 and target.shape[0] == rows,
        "target must have shape [N], one value for each row of input",
        "its shape is {} and N is {}",
        list(target.shape),
        rows,
        way_out="Flatten it, or cut it to the rows of input.",
    )
    _require(
        lifted,
        target.dtype == torch.int64,
        "the dtype of target must be int64",
        "it is {}",
        target.dtype,
        way_out=LIFT if target.dtype in INTEGERS else "Convert class indices with target.long().",
    )
    if weight is not None:
        _check_weight(weight, input, lifted)
    _require(
        lifted,
        reduction in REDUCTIONS,
        'reduction must be "mean", "sum" or "none"',
        "it is {!r}",
        reduction,
        way_out="Pass one of these names.",
    )
    _require(
        lifted,
        ignore_index < classes,
        "ignore_index must be less than C",
        "it is {} and C is {}",
        ignore_index,
        classes,
    )
    _require(
        lifted,
        0.0 <= label_smoothing < 1.0,
        "label_smoothing must lie in [0, 1)",
        "it is {}",
        label_smoothing,
        way_out=LIFT if label_smoothing == 1.0 else "Pass a value in that range.",
    )
    _require(
        lifted,
        lse_square_scale_for_zloss == 0.0,
        "lse_square_scale_for_zloss is documented with the range [0, 1) but not enabled and must be 0",
        "it is {}",
        lse_square_scale_for_zloss,
        way_out=LIFT if 0.0 < lse_square_scale_for_zloss < math.inf else "Leave it at 0.",
    )
    _require(lifted, not return_zloss, "return_zloss is documented but not enabled and must be False", "it is True")
    if input.requires_grad and torch.is_grad_enabled():
        _check_training(weight, reduction, ignore_index, label_smoothing, lifted)


def _check_weight(weight: Tensor, input: Tensor, lifted: Lifted | None) -> None:
    classes = input.shape[1]
    _require(
        lifted,
        weight.dim() == 1 and weight.shape[0] == classes,
        "weight must have shape [C], one value for each column of input",
        "its shape is {} and C is {}",
        list(weight.shape),
        classes,
        way_out="Pass one weight for each class.",
    )
    _require(
        lifted,
        weight.dtype == torch.float32,
        "the dtype of weight must be float32",
        "it is {}",
        weight.dtype,
        way_out=LIFT if weight.dtype == input.dtype else "Convert it with weight.float().",
    )
    # Values are not checked under a compiler, in a fake tensor, or on a device where checking would synchronize (unless
    # NPU_XENT_DEBUG asks for it).
    if not torch.compiler.is_compiling() and may_look(weight.device.type) and not is_fake(weight):
        require_storage("weight", weight)
        outside = ((weight > 0) & (weight <= 1)).logical_not()
        if outside.any():
            first = int(outside.nonzero()[0])
            seen = f"weight[{first}] is {weight[first].item()}"
            _require(lifted, False, "the values of weight must lie in (0, 1]", seen)


@contextlib.contextmanager
def target_errors_as_constraints() -> Iterator[None]:
    """Turn the operator's IndexError for a target into a TargetConstraintError, which is an IndexError too."""
    try:
        yield
    except IndexError as error:
        raise TargetConstraintError(str(error)) from None


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values, as during a compiler's tracing."""
    # FakeTensor is imported late, because the import warns if numpy is missing. A plain tensor is never fake.
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def may_look(device: str) -> bool:
    """Whether values on this device are checked: always on the CPU, on an NPU only with NPU_XENT_DEBUG."""
    return device == "cpu" or (device == "npu" and os.environ.get("NPU_XENT_DEBUG", "0") not in ("", "0"))


def _check_training(
    weight: Tensor | None, reduction: str, ignore_index: int, label_smoothing: float, lifted: Lifted | None
) -> None:
    """With a gradient, "mean" takes three options at their defaults only, "sum" and "none" only label_smoothing."""
    rule = f"with input.requires_grad and reduction {reduction!r}, {{}} must keep its default"
    if reduction == "mean":
        _require(lifted, weight is None, rule.format("weight") + " None", "a tensor was given")
        _require(lifted, ignore_index == -100, rule.format("ignore_index") + " -100", "it is {}", ignore_index)
    _require(lifted, label_smoothing == 0.0, rule.format("label_smoothing") + " 0.0", "it is {}", label_smoothing)
