"""linear_cross_entropy: a thin wrapper over torch.ops.npu_xent.linear_cross_entropy."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import has_torch_function_variadic

from ._func import fused_gradient, one_compiled_gradient, one_gradient, whole
from ._loading import prepare
from ._options import check_flags, check_types
from ._overrides import not_scriptable, overridden
from ._tensors import (
    check_device,
    check_float64,
    check_tensors,
    has_dtensor,
    index_target,
    is_autocast_on,
    require_storages,
    transformed,
    z_loss_like,
)
from .functional import CrossEntropyOutput, cross_entropy


# Overloads for type checkers: the return type depends on return_lse and return_z_loss.
# fmt: off
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: int | None = ..., label_smoothing: float = ...,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., chunk_rows: int | None = ...,
    return_lse: Literal[False] = ..., return_z_loss: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: int | None = ..., label_smoothing: float = ...,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., chunk_rows: int | None = ...,
    return_lse: Literal[True], return_z_loss: bool = ...,
) -> CrossEntropyOutput: ...
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: int | None = ..., label_smoothing: float = ...,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., chunk_rows: int | None = ...,
    return_lse: bool = ..., return_z_loss: Literal[True],
) -> CrossEntropyOutput: ...
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: int | None = ..., label_smoothing: float = ...,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., chunk_rows: int | None = ...,
    return_lse: bool = ..., return_z_loss: bool = ...,
) -> Tensor | CrossEntropyOutput: ...
# fmt: on
@not_scriptable("linear_cross_entropy")
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    return_lse: bool = False,
    return_z_loss: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`cross_entropy` of F.linear(input, linear_weight, linear_bias), without materializing the N x C logits.

    Rows are processed in chunks. The gradient of a chunk overwrites its logits, and the gradients of input,
    linear_weight and linear_bias are computed from it. The formulas of the loss, z-loss and softcap are those of
    `cross_entropy`. ("mean" and "sum" compute the gradients in the forward, of those tensors that need one, and scale
    them in the backward: Liger Kernel, https://arxiv.org/abs/2410.10989, sec. 3.2. "none", float16, and hooks on saved
    tensors such as activation checkpointing recompute the logits in the backward.)

    Of DTensors the loss is a DTensor: the page of npu_xent.distributed has the placements, and a warning about FSDP2.

    Args:
        input: [..., H], any number of leading dimensions, N rows in all; float32, bfloat16, float16 or float64.
        linear_weight: [C, H], C > 0, in the dtype of input.
        target: class indices in [0, C) or ignore_index, any integer dtype, in the shape of input without H; or class
            probabilities, floating point, in the shape of the logits. Probabilities, which are as large as the logits,
            and the transforms of torch.func use F.linear and `cross_entropy`, with all logits in memory (but not for
            one gradient of "mean" and "sum").
        linear_bias: [C], in the dtype of input.
        weight: one weight per class, [C], float32 or the dtype of input. It must not require a gradient.
        reduction: "mean", "sum" or "none".
        ignore_index: rows with this target are ignored, as in `cross_entropy`. None, the default of
            F.linear_cross_entropy, is -100. The CPU also skips these rows in the matrix products, unless return_lse
            needs their lse. NaN in ignored rows does not propagate.
        label_smoothing: in [0, 1].
        lse_square_scale: scale of the z-loss, finite and >= 0, which is added to the loss.
        logit_scale: finite. Replaces the logits by logit_scale * logits. A tensor raises: it would get no gradient.
        softcap: c in [1e-6, 1e6], or None. Replaces the logits by c * tanh(logits / c), after logit_scale.
        loss_dtype: dtype of loss and z_loss: float32, float64 (not on an NPU) or the dtype of input. Default: float32
            under autocast (float64 for float64 input), otherwise the dtype of input.
        chunk_rows: rows per chunk, at least 1. Larger chunks are faster up to some hundreds of rows, and need more
            memory. Default: 4 % of the memory of all logits in float32, clamped to [128, 512] rows ([256, 512] in 16
            bits); or the rows that fit in 32 MiB, if those are more.
        return_lse: also return logsumexp of every row, ignored rows included. It is differentiable; only if it gets a
            gradient, the backward computes the logits again. To log it, use lse.detach().
        return_z_loss: also return the z-loss separately, for logging. The loss already includes it.

    Returns:
        The same as `cross_entropy`: the loss, [] or for "none" in the shape of target, in loss_dtype; with return_lse
        or return_z_loss, a CrossEntropyOutput(loss, lse, z_loss). Loss and lse are differentiable, once, in input,
        linear_weight and linear_bias. A backward with retain_graph=True returns copies of the gradients, so that a
        second backward is correct.

        Logits are rounded to the dtype of input, as in F.linear. Gradients of linear_weight and linear_bias are
        accumulated over chunks in float32 (float64) and rounded once. For 16-bit inputs in several chunks, the
        contribution of each chunk is also rounded, as the output of a matrix product. Under autocast input,
        linear_weight and linear_bias are cast as F.linear casts them.

    Raises:
        ValueError: a shape, reduction, label_smoothing, lse_square_scale, logit_scale, softcap or chunk_rows that
            breaks the rules above; tensors on different devices.
        TypeError: an argument that must be a tensor, a number, a bool or a string and is not; a dtype that is not
            listed; different dtypes of input, linear_weight and linear_bias; float64 on an NPU.
        IndexError: a target that is out of range and not ignore_index, on the CPU. Other devices do not check, because
            checking would synchronize: the row's loss is NaN, and so is every gradient that the row contributes to.
        RuntimeError: weight requires a gradient; a second backward without retain_graph=True in the first; a second or
            a forward-mode derivative. (The transforms of torch.func support all derivatives.)
    """
    if (
        has_torch_function_variadic(input, linear_weight, target, linear_bias, weight)
        and not torch.compiler.is_compiling()
    ):
        output: Tensor | CrossEntropyOutput = overridden(linear_cross_entropy, locals())
        return output
    options: dict[str, Any] = {
        "reduction": reduction,
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "loss_dtype": loss_dtype,
        "chunk_rows": chunk_rows,
    }
    check_tensors(
        "linear_cross_entropy",
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
    )
    check_types("linear_cross_entropy", options)
    check_flags("linear_cross_entropy", return_lse=return_lse, return_z_loss=return_z_loss)
    chunk_rows = options.pop("chunk_rows")
    if has_dtensor(input, linear_weight, target, linear_bias, weight):
        from . import _dtensor

        options.update({"chunk_rows": chunk_rows, "return_lse": return_lse, "return_z_loss": return_z_loss})
        return _dtensor.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, **options
        )
    if linear_weight.dim() != 2:  # the operator's words, before those about target
        raise ValueError(
            f"npu_xent: linear_weight must have shape [C, H], but has {linear_weight.dim()} dimensions: "
            f"{list(linear_weight.shape)}."
        )
    probabilities = target.is_floating_point()
    expected = input.shape[:-1] + (linear_weight.shape[:1] if probabilities else ())
    if input.dim() == 0 or target.shape != expected:
        raise ValueError(
            "npu_xent.linear_cross_entropy: target must have the shape of input without its last dimension (class "
            "indices), or with the classes in its place (probabilities), but input has "
            f"{list(input.shape)}, linear_weight {list(linear_weight.shape)} and target {list(target.shape)} "
            f"of {target.dtype}"
        )
    shape = input.shape[:-1]
    loss: Tensor
    extras = probabilities or return_lse or return_z_loss or reduction == "none" or input.dtype == torch.float16
    if transformed() and not extras and one_compiled_gradient():
        options["chunk_rows"] = chunk_rows
        loss = whole(
            "linear_cross_entropy", input, linear_weight, target, linear_bias=linear_bias, weight=weight, **options
        )
        return loss
    if transformed() and not extras and one_gradient(input, linear_weight, linear_bias, weight):
        (loss,) = fused_gradient(
            lambda x, layer, y, bias, w, o=options, chunk=chunk_rows: (
                linear_cross_entropy(x, layer, y, linear_bias=bias, weight=w, chunk_rows=chunk, **o),
            ),
            (input, linear_weight, target, linear_bias, weight),
            class_dim=0,
        )
        return loss
    if probabilities or input.dim() != 2 or is_autocast_on(input):  # torch reads them before the operator
        require_storages(input=input, target=target, linear_weight=linear_weight, linear_bias=linear_bias)
    if input.dim() != 2:
        input = input.unsqueeze(0) if input.dim() == 1 else input.flatten(0, -2)
    if probabilities or transformed():
        check_as_the_operator_does(
            input, linear_weight, linear_bias, weight, options["ignore_index"], softcap, chunk_rows
        )
        target = target.reshape(shape.numel(), *target.shape[len(shape) :])
        if not (probabilities or return_lse):  # ignored rows have an lse
            input = without_ignored(input, target, options["ignore_index"])
        loss, lse, z_loss = cross_entropy(
            linear(input, linear_weight, linear_bias),
            target,
            weight,
            **options,
            return_lse=True,
            return_z_loss=True,
        )
    else:
        prepare(input)
        loss, z_loss, lse = torch.ops.npu_xent.linear_cross_entropy.default(
            input,
            linear_weight,
            linear_bias,
            index_target(target.reshape(-1)),
            weight,
            **options,
            chunk_rows=chunk_rows,
            need_lse=bool(return_lse),
        )
    if reduction == "none":
        loss = loss.view(shape)
    if not (return_lse or return_z_loss):
        return loss
    return CrossEntropyOutput(
        loss,
        lse.view(shape) if return_lse else None,
        z_loss_like(loss, z_loss) if return_z_loss else None,
    )


def without_ignored(input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The rows, with 0 for the ignored ones: the gradient of linear_weight multiplies them by 0, and 0 * NaN is NaN."""
    return input.masked_fill((index_target(target) == ignore_index).unsqueeze(-1), 0.0)


def check_as_the_operator_does(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk_rows: int | None,
) -> None:
    """Raise the operator's errors where torch computes, using meta tensors; input is [N, H]."""
    check_device("npu_xent", input, linear_weight=linear_weight, linear_bias=linear_bias, weight=weight)
    check_float64("npu_xent", input=input)  # the operator allows it on the meta device
    cast = torch.get_autocast_dtype(input.device.type) if is_autocast_on(input) else None

    def on_meta(tensor: Tensor | None, cast: torch.dtype | None) -> Tensor | None:
        if tensor is None:
            return None
        casts = cast is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
        return torch.empty(tensor.shape, dtype=cast if casts else tensor.dtype, device="meta")

    target = torch.empty(input.shape[:1], dtype=torch.int64, device="meta")
    torch.ops.npu_xent.linear_row_stats.default(
        *(on_meta(tensor, cast) for tensor in (input, linear_weight, linear_bias)),
        target,
        on_meta(weight, None if cast is None else torch.float32),
        ignore_index=ignore_index,
        softcap=softcap,
        chunk_rows=chunk_rows,
    )
