"""unit_scaling's cross_entropy: the usual loss with a gradient of unit scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as torch_cross_entropy

from .. import functional
from .._loading import prepare
from .._options import as_number
from .._tensors import LOGITS, check_float64, check_tensors, index_target, is_autocast_on, require_storages, transformed


class _ScaleForward(torch.autograd.Function):
    """x * factor with the gradient of x: unit scaling's forward factors do not reach the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScaleBackward(torch.autograd.Function):
    """The identity, with its gradient multiplied by factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


# Typed aliases: `apply` has no types.
_scale_forward: Callable[[Tensor, float], Tensor] = _ScaleForward.apply
_scale_backward: Callable[[Tensor, float], Tensor] = _ScaleBackward.apply


def _derived_from(value: Tensor, x: Tensor, factor: float) -> Tensor:
    """`value`, with the derivatives of factor * x where x is finite, for torch.func, which refuses both classes."""
    value = value.detach()
    return torch.where(x.isfinite(), value + (x - x.detach()) * factor, value)


def _require_defaults(
    name: str, weight: Tensor | None, size_average: bool | None, reduce: bool | None, label_smoothing: float
) -> None:
    """Raise ValueError for an argument that unit_scaling does not support."""
    for argument, value, default in (
        ("weight", weight, None),
        ("size_average", size_average, None),
        ("reduce", reduce, None),
        ("label_smoothing", label_smoothing, 0.0),
    ):
        if not (value is default or (isinstance(value, (int, float)) and value == default)):
            raise ValueError(
                f"unit_scaling.{name}: {argument} is not supported and must keep its default {default}, but is "
                f"{value!r}; use npu_xent.{name} for it"
            )


def _numbers(name: str, mult: Any, ignore_index: Any) -> tuple[float, int]:
    """Return both as plain numbers, or raise."""
    mult = as_number(f"compat.unit_scaling.{name}", "mult", mult, float)
    if not -math.inf < mult < math.inf:
        raise ValueError(f"unit_scaling.{name}: mult must be finite, but is {mult}")
    return mult, as_number(f"compat.unit_scaling.{name}", "ignore_index", ignore_index, int)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mult: float = 1.0,
) -> Tensor:
    """Cross entropy of mult * input with a unit-scaled gradient, as unit_scaling.functional.cross_entropy computes it.

    Args:
        input: logits, [N, V], or [V] for one row; float32, bfloat16, float16 or float64 (not on an NPU).
        target: class indices in [0, V) or ignore_index, [N] or []; or class probabilities in the shape of input.
        weight, size_average, reduce, label_smoothing: must keep their defaults.
        ignore_index: rows with this target are ignored, but N counts them.
        reduction: "mean" divides by N, ignored rows included; "sum" does not.
        mult: the inverse temperature; it does not scale the gradient.

    Returns:
        The loss, [], in the dtype of input (float32 under autocast). Its gradient, equal for "mean" and "sum" and in
        the dtype of input, is V / sqrt(V - 1) * (softmax(mult * input) - one_hot(target)) * upstream, with a standard
        deviation of about 1 at initialisation (unit scaling, https://arxiv.org/abs/2303.11257).

    Raises:
        ValueError: weight, size_average, reduce or label_smoothing is not at its default; target has another shape;
            V = 0; mult is not finite.
        AssertionError: a rank other than 1 or 2, or a reduction other than "mean" and "sum".
        ZeroDivisionError: V = 1, or "mean" over N = 0 rows.
        IndexError, TypeError, RuntimeError: as npu_xent.cross_entropy.

    Differs from the original on purpose: statistics are float32 for every dtype but float64; with class indices the
    fused kernel scales the gradient, without a separate multiplication; target may have any integer dtype. The
    transforms of torch.func work; they see a scaled derivative as the gradient is.

    Where the original's documentation page and its code differ, this function does what the code does:

    - The page lists reduction "none" and inputs [N, C, d_1, ...]. The code raises AssertionError for both.
    - The page says that "mean" divides by the number of rows that are not ignored (for CrossEntropyLoss). The code
      divides by N, ignored rows included.
    - The page does not say that the gradient is not multiplied by mult, nor divided by N for "mean".
    """
    check_tensors("compat.unit_scaling.cross_entropy", input=input, target=target)
    _require_defaults("cross_entropy", weight, size_average, reduce, label_smoothing)
    if reduction not in ("mean", "sum"):
        raise AssertionError(f'unit_scaling.cross_entropy: reduction must be "mean" or "sum", but is {reduction!r}')
    if input.dim() not in (1, 2):
        raise AssertionError(
            f"unit_scaling.cross_entropy: input must have shape [N, V] or [V], but has shape {list(input.shape)}"
        )
    mult, ignore_index = _numbers("cross_entropy", mult, ignore_index)
    require_storages(input=input, target=target)
    rows, classes = (1, input.shape[0]) if input.dim() == 1 else input.shape
    if classes == 0:
        raise ValueError(
            f"unit_scaling.cross_entropy: input must have at least one class, but has shape {list(input.shape)}"
        )
    if input.dtype not in LOGITS:
        raise TypeError(
            f"unit_scaling.cross_entropy: input must be float32, bfloat16, float16 or float64, but is {input.dtype}"
        )
    check_float64("unit_scaling.cross_entropy", input=input)
    if target.is_floating_point() and target.shape != input.shape:
        raise ValueError(
            "unit_scaling.cross_entropy: floating point target holds class probabilities and must have the shape of "
            f"input, {list(input.shape)}, but has shape {list(target.shape)}; class indices are integers"
        )
    grad_scale = classes / math.sqrt(classes - 1)
    loss_scale = 1.0 / rows if reduction == "mean" else 1.0
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if transformed():
        logits = input.to(dtype)
        logits = _derived_from(logits * mult, logits, grad_scale)
        if target.is_floating_point():
            target = target.to(dtype)
        elif input.dim() == 1 and target.numel() == 1:
            target = target.reshape(())
        total: Tensor = functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        loss = _derived_from(total * loss_scale, total, 1.0)
        return loss if is_autocast_on(input) else loss.to(input.dtype)
    if target.is_floating_point():
        # Class probabilities use torch's cross_entropy; the two scalings around it keep mult out of the gradient.
        scaled = _scale_backward(input.to(dtype), grad_scale)
        scaled = scaled if mult == 1.0 else _scale_forward(scaled, mult)
        loss = torch_cross_entropy(scaled, target.to(dtype), ignore_index=ignore_index, reduction="sum")
    else:
        prepare(input)
        target = index_target(target)
        loss, _, _, _ = torch.ops.npu_xent.cross_entropy.default(
            input.reshape(rows, classes),
            target.reshape(1) if input.dim() == 1 and target.numel() == 1 else target,
            reduction="sum",
            ignore_index=ignore_index,
            logit_scale=mult,
            grad_scale=grad_scale,
            loss_dtype=dtype,
        )
    loss = _scale_forward(loss, loss_scale)
    return loss if is_autocast_on(input) else loss.to(input.dtype)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`cross_entropy` as a module; drop-in replacement for unit_scaling.CrossEntropyLoss, with mult first.

    Raises:
        ValueError: weight, size_average, reduce or label_smoothing is not at its default; mult is not finite.
        TypeError: mult or ignore_index is not a number, or would be trained.
    """

    __constants__: list[str] = [*nn.CrossEntropyLoss.__constants__, "mult"]  # noqa: RUF012

    def __init__(
        self,
        mult: float = 1.0,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        _require_defaults("CrossEntropyLoss", weight, size_average, reduce, label_smoothing)
        # Plain numbers: torch would register a constant parameter as one of the module's.
        mult, ignore_index = _numbers("CrossEntropyLoss", mult, ignore_index)
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        self.mult = mult

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `input` against `target`: same results and errors as `cross_entropy`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            mult=self.mult,
        )
