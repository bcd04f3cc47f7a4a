"""What the patches of frameworks leave to the framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _options
from .._tensors import LOGITS, forward_mode, transformed
from .torch import _is_dense

INDICES = (torch.int64, torch.int32)
NO_CLASS = -(2**31)  # an ignore_index for targets of which none is to be ignored


def serves(logits: Any, *others: Any) -> bool:
    """Whether npu_xent computes from these tensors, of which the first has the dtype that counts.

    They are plain dense tensors of one cpu or npu. Transforms of torch.func and forward-mode derivatives are left to
    the framework, whose functions support them where torch does.
    """
    if not all(isinstance(t, Tensor) and _is_dense(t) for t in (logits, *others)):
        return False
    device = logits.device
    if device.type not in ("cpu", "npu") or any(t.device != device for t in others):
        return False
    dtypes = tuple(d for d in LOGITS if d is not torch.float64 or device.type == "cpu")
    return logits.dtype in dtypes and logits.numel() > 0 and not (transformed() or forward_mode())


def serves_options(**options: Any) -> bool:
    """Whether these are numbers in npu_xent's ranges. A softcap may be None."""
    return all(
        (name == "softcap" and value is None)
        or (isinstance(value, (float, int)) and _RANGES[name][0] <= value <= _RANGES[name][1])
        for name, value in options.items()
    )


_RANGES = {option.name: (option.low, option.high) for option in _options._RANGES}


def serves_rows(logits: Any, target: Any) -> bool:
    """Whether npu_xent takes logits [..., C] and class indices [...]."""
    if not serves(logits, target) or logits.dim() == 0:
        return False
    return target.shape == logits.shape[:-1] and target.dtype in INDICES


def function_class(original: Any, serve: Callable[..., Any]) -> Any:
    """A class with the `apply` of a torch.autograd.Function, `original`: of what `serve` returns None, original's.

    It is no torch.autograd.Function: compilers trace the forward of such a class instead of calling apply.
    """

    def apply(*args: Any) -> Any:
        outputs = serve(*args)
        return original.apply(*args) if outputs is None else outputs

    members = {name: staticmethod(f) for name, f in (("apply", apply), ("forward", original.forward))}
    return type(original.__name__, (), {"__doc__": original.__doc__, "__module__": __name__, **members})
