"""Replaces torch.nn.functional.cross_entropy for code that calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.nn import functional as F
from torch.nn.functional import cross_entropy as _torchs
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function_variadic

from .. import functional
from .._tensors import LOGITS, forward_mode, transformed
from ._patch import PatchHandle


def patch_torch() -> PatchHandle:
    """Replace torch.nn.functional.cross_entropy with npu_xent.cross_entropy, for all callers::

        npu_xent.patch_torch()              # from here on

        with npu_xent.patch_torch():        # for a while
            ...

    Callers are torch.nn.CrossEntropyLoss and all code that looks the function up when it calls it,
    `F.cross_entropy(...)`. Code that imported the function earlier (`from torch.nn.functional import cross_entropy`)
    keeps torch's function, and so do programs exported or traced earlier. torch.compile notices the patch and its
    removal, and compiles again.

    npu_xent serves dense cpu and npu tensors: logits in float32, bfloat16, float16 or float64 (not on an NPU), targets
    that torch takes, a weight that torch takes. torch's function gets all other calls with the arguments as given, so
    that torch raises its own errors: other devices and dtypes; sparse and nested tensors; subclasses such as DTensor,
    whose `__torch_function__` sees torch's function; transforms of torch.func; forward-mode derivatives;
    torch.jit.script. It also gets calls that arrive after other code has replaced F.cross_entropy in its turn.

    Results are the same as of npu_xent.cross_entropy: torch's up to rounding, except that NaN in ignored rows does not
    propagate, and that a second derivative raises RuntimeError.

    Returns:
        A handle, also a context manager, whose remove() undoes the patch. Patches nest: the latest one that has not
        been removed is in effect.
    """
    return PatchHandle(F, "cross_entropy", cross_entropy)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy under patch_torch: npu_xent's function for the calls that it serves, otherwise torch's."""
    if is_scripting():  # torch.jit.script compiles this branch alone
        return _torchs(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    else:
        loss: Tensor = _choose(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        return loss


def _choose(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    if has_torch_function_variadic(input, target, weight):
        # Not left to torch's function, which would pass on the function that it finds under its name: always this one.
        loss: Tensor = handle_torch_function(
            cross_entropy if _passes_through(input, target, weight) else _torchs,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return loss
    serve = F.cross_entropy is cross_entropy and _serves(
        input, target, weight, ignore_index, reduction, label_smoothing
    )
    function = functional.cross_entropy if serve else _torchs
    return function(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def _passes_through(*tensors: Any) -> bool:
    """Whether only modes of torch itself, such as torch.set_default_device's and a compiler's, override functions."""
    plain = all(t is None or _is_traced_or_plain(t) for t in tensors)
    return plain and all(_module(mode).startswith("torch.") for mode in _get_current_function_mode_stack())


def _serves(input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any) -> bool:
    """Whether torch takes these arguments, and npu_xent computes the same from them."""
    if not (_is_dense(input) and _is_dense(target)) or input.dim() == 0:
        return False
    dtype, device, classes = input.dtype, input.device, input.shape[min(input.dim() - 1, 1)]
    if device.type not in ("cpu", "npu") or target.device != device or classes == 0:
        return False
    if dtype not in LOGITS or (dtype is torch.float64 and device.type == "npu"):
        return False
    # torch takes no bool.
    numbers = type(ignore_index) is int and type(label_smoothing) in (float, int)
    if not (numbers and 0 <= label_smoothing <= 1):
        return False
    if target.is_floating_point():
        if target.dtype is not dtype or target.shape != input.shape or ignore_index >= 0:
            return False
    else:
        # torch takes uint8 only in nll_loss for [N, C] and [C].
        takes = target.dtype is torch.int64 or (
            target.dtype is torch.uint8 and input.dim() < 3 and label_smoothing == 0
        )
        if not takes or target.shape != (input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()):
            return False
    if weight is not None and not (
        _is_dense(weight)
        and weight.device == device
        and weight.shape == (classes,)
        and not weight.requires_grad
        and (weight.dtype is dtype or _autocast_makes_equal(weight, input))
    ):
        return False
    # The C++ operators have no rules for these two.
    return reduction in ("mean", "sum", "none") and not (transformed() or forward_mode())


def _is_dense(tensor: Any) -> bool:
    if not _is_traced_or_plain(tensor) or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    return torch.compiler.is_compiling() or not tensor.is_neg()  # compilers cannot trace is_neg


def _is_traced_or_plain(value: Any) -> bool:
    """Whether it is a tensor of torch's own class, or of the classes that compilers trace with."""
    return type(value) in (Tensor, nn.Parameter) or _module(value).startswith("torch._subclasses.")


def _module(value: object) -> str:
    """The module of its class."""
    return type(value).__module__


def _autocast_makes_equal(weight: Tensor, input: Tensor) -> bool:
    """Whether autocast casts both to float32. It leaves float64 alone."""
    return torch.is_autocast_enabled(input.device.type) and all(
        t.dtype in LOGITS and t.dtype is not torch.float64 for t in (weight, input)
    )
