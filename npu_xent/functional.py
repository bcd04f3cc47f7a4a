"""Public functions: thin wrappers over torch.ops.npu_xent. The C++ code checks all arguments before using them."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.overrides import has_torch_function_variadic

from . import _C
from ._constraints import Lifted, check_documented_constraints, target_errors_as_constraints, warn_of_lifted
from ._func import fused_gradient, one_compiled_gradient, one_gradient, whole
from ._loading import prepare
from ._options import check_flags, check_loss_dtype, check_ranges, check_types, legacy_reduction
from ._overrides import not_scriptable, output_type, overridden
from ._tensors import (
    INTEGERS,
    LOGITS,
    check_logits_dtype,
    check_overwritable,
    check_tensors,
    forward_mode,
    has_dtensor,
    index_target,
    is_autocast_on,
    require_storages,
    transformed,
    z_loss_like,
)


@output_type
class CrossEntropyOutput(NamedTuple):
    """Output of cross_entropy with return_lse or return_z_loss. An output that was not requested is None."""

    loss: Tensor
    lse: Tensor | None
    z_loss: Tensor | None


# Overloads for type checkers: the return type depends on return_lse and return_z_loss.
# fmt: off
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ..., *,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., return_lse: Literal[False] = ..., return_z_loss: Literal[False] = ...,
    consume_logits: bool = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ..., *,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., return_lse: Literal[True], return_z_loss: bool = ...,
    consume_logits: bool = ...,
) -> CrossEntropyOutput: ...
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ..., *,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., return_lse: bool = ..., return_z_loss: Literal[True],
    consume_logits: bool = ...,
) -> CrossEntropyOutput: ...
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ..., *,
    lse_square_scale: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    loss_dtype: torch.dtype | None = ..., return_lse: bool = ..., return_z_loss: bool = ...,
    consume_logits: bool = ...,
) -> Tensor | CrossEntropyOutput: ...
# fmt: on
@not_scriptable("cross_entropy")
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    return_z_loss: bool = False,
    consume_logits: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy between logits and targets; drop-in replacement for torch.nn.functional.cross_entropy.

    With lp = log_softmax(input), e = label_smoothing, class weights w, and k_n = 0 for ignored rows and 1 for others::

        l_n = k_n [ (1 - e) w[target_n] (-lp[n, target_n]) + e/C sum_c(-w_c lp[n, c]) ]
        "none": l_n      "sum": sum of l_n      "mean": sum of l_n / sum of k_n w[target_n]

    With class probabilities q: q' = (1 - e) q + e/C, l_n = -sum_c w_c q'[n, c] lp[n, c], and "mean" divides by N.

    Of DTensors the loss is a DTensor: the page of npu_xent.distributed has the placements.

    Args:
        input: logits, [N, C], [C] or [N, C, d1, ...], C > 0, float32, bfloat16, float16 or float64. Rows may be
            strided. The CPU reads [N, C, d1, ...] as it lies, if d1, ... together have a single stride. Otherwise, and
            on other devices if the classes are not adjacent in memory, the logits are copied once.
        target: class indices in [0, C) or ignore_index, any integer dtype, in the shape of input without C: [N], [] or
            [N, d1, ...]; or class probabilities, floating point, in the shape of input. Probabilities are also
            differentiable. On the CPU, their loss is fused if they have the dtype of input; otherwise torch operations
            compute it.
        weight: one weight per class, [C], float32 or the dtype of input (any floating-point dtype under autocast). It
            must not require a gradient.
        size_average, reduce: deprecated by torch, which warns. Unless both are None they replace reduction: "none" for
            reduce=False, else "sum" for size_average=False, else "mean".
        ignore_index: rows with this target are ignored: loss 0, gradient 0, not counted. Their logits are not read
            (except for return_lse), so NaN in them does not propagate; in torch it reaches the gradient. With class
            probabilities ignore_index must be negative and has no effect.
        reduction: "mean", "sum" or "none".
        label_smoothing: e above, in [0, 1].
        lse_square_scale: scale of the z-loss, finite and >= 0. z_n = k_n * scale * logsumexp(input_n)^2 is **added to
            the loss**; "mean" divides it by the number of rows not ignored. (PaLM, https://arxiv.org/abs/2204.02311,
            sec. 5.)
        logit_scale: finite. Replaces input by logit_scale * input in the loss, lse and z-loss: the inverse of a
            temperature. The gradient is with respect to the unscaled input. A tensor raises: it would get no gradient.
        softcap: in [1e-6, 1e6], or None. Replaces input by softcap * tanh(input / softcap), after logit_scale, in the
            loss, lse and z-loss. The gradient is with respect to the uncapped input. An infinite logit becomes softcap
            or -softcap, so -inf masks nothing. (Gemma 2, https://arxiv.org/abs/2408.00118, sec. 2.)
        loss_dtype: dtype of loss and z_loss: float32, float64 (not on an NPU) or the dtype of input. Default: float32
            under autocast (float64 for float64 input), otherwise the dtype of input. A float32 loss of 16-bit
            logits costs no copy.
        return_lse: also return logsumexp of every row, ignored rows included. It is differentiable. The gradient of the
            loss is computed in one sweep as without it; only if lse gets a gradient, the backward reads the logits
            once more. To log it, use lse.detach(), which does not keep the logits in memory; compiled code always
            assumes a gradient for an lse that it returns.
        return_z_loss: also return the z-loss separately, for logging. The loss already includes it: do not add it.
        consume_logits: overwrite the logits with their gradient instead of allocating memory for it: in the forward, or
            in the backward for float16, for reduction "none" and with return_lse. Later reads of `input` see the
            gradient; operations that saved `input` for their own backward raise. A second backward raises. Where no
            gradient is needed, nothing is overwritten.

    Returns:
        The loss, [] or for "none" [N] (input's shape without C), in loss_dtype. With return_lse or return_z_loss, a
        CrossEntropyOutput(loss, lse, z_loss): lse [N] in float32 (float64 for float64 input), z_loss in the shape of
        the loss. Loss and lse are differentiable, once; a second derivative raises. (Class probabilities and
        transforms of torch.func support all derivatives. Of the latter, one gradient is fused, and all else runs on
        torch operations.)

        Statistics are accumulated in float32 (float64 for float64) and rounded once. If all rows are ignored, or N = 0,
        "mean" is NaN, with gradient 0. A row that is not ignored is NaN if it has a NaN, or, without softcap, a +inf or
        only -inf.

    Raises:
        ValueError: a shape, reduction, label_smoothing, lse_square_scale, logit_scale or softcap that breaks the rules
            above; tensors on different devices; consume_logits for a leaf, for memory that is not contiguous (or, on
            an NPU, in a private format), for a view with torch's negative bit, with class probabilities, or in a
            transform of torch.func.
        TypeError: an argument that must be a tensor, a number, a bool or a string and is not; a dtype that is not
            listed, or float64 on an NPU.
        IndexError: a target that is out of range and not ignore_index, on the CPU. Other devices do not check, because
            checking would synchronize: the row's loss and gradient are NaN, and nothing is read out of bounds.
            (The environment variable NPU_XENT_DEBUG=1 makes an NPU check.)
        RuntimeError: weight requires a gradient; a second backward after consume_logits; a backward after the consumed
            logits were modified, or after logits that it reads were modified or freed; a tensor whose storage was freed
            or shrunk; a second or a forward-mode derivative; ignore_index >= 0 with class probabilities.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
        size_average = reduce = None
    plain = return_lse is False and return_z_loss is False and consume_logits is False
    if plain and not torch.compiler.is_compiling():
        usual: Tensor | None = _C.cross_entropy(
            input,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            lse_square_scale,
            logit_scale,
            softcap,
            loss_dtype,
        )
        if usual is not None:
            return usual
    if has_torch_function_variadic(input, target, weight) and not torch.compiler.is_compiling():
        output: Tensor | CrossEntropyOutput = overridden(cross_entropy, locals())
        return output
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "loss_dtype": loss_dtype,
    }
    check_tensors("cross_entropy", input=input, target=target, weight=weight)
    check_types("cross_entropy", options)
    check_flags("cross_entropy", return_lse=return_lse, return_z_loss=return_z_loss, consume_logits=consume_logits)
    if has_dtensor(input, target, weight):
        from . import _dtensor

        options.update({"return_lse": return_lse, "return_z_loss": return_z_loss, "consume_logits": consume_logits})
        return _dtensor.cross_entropy(input, target, weight, **options)
    _check_shapes(input, target)
    overwrite = consume_logits and input.requires_grad and torch.is_grad_enabled()
    if target.is_floating_point() or transformed():
        if overwrite:
            raise ValueError(
                "npu_xent.cross_entropy: consume_logits needs class indices and no torch.func transform, since only "
                "the fused operator can write over the logits; leave it off"
            )
        check_ranges(options)
        extras = return_lse or return_z_loss or input.dtype not in (torch.float32, torch.bfloat16, torch.float64)
        if not (target.is_floating_point() or extras):
            loss: Tensor
            if one_compiled_gradient():
                loss = whole("cross_entropy", input, target, weight, **options)
                return loss
            if one_gradient(input, weight):
                tensors, class_dim = (input, target, weight), min(input.dim() - 1, 1)
                (loss,) = fused_gradient(lambda *t, o=options: (cross_entropy(*t, **o),), tensors, class_dim)
                return loss
        fused = input.dtype == target.dtype and input.dtype in LOGITS
        fused = fused and not (transformed() or forward_mode())
        compute = _of_probabilities if fused else _by_torch_operations
        loss, z_loss, lse = compute(input, target, weight, **options, return_lse=return_lse)
    else:
        prepare(input)
        check_overwritable("cross_entropy", "input", input, overwrite)
        rows, indices = _as_rows(input, target, overwrite)
        op = torch.ops.npu_xent.cross_entropy_ if overwrite else torch.ops.npu_xent.cross_entropy
        loss, z_loss, lse, _ = op.default(rows, index_target(indices), weight, **options, need_lse=bool(return_lse))
    shape = _shape_of_rows(input)
    if reduction == "none":
        loss = loss.view(shape)
    if not (return_lse or return_z_loss):
        return loss
    return CrossEntropyOutput(
        loss, lse.view(shape) if return_lse else None, z_loss_like(loss, z_loss.detach()) if return_z_loss else None
    )


@not_scriptable("cross_entropy")
def npu_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
    *,
    loss_dtype: torch.dtype | None = None,
    need_log_prob: bool = True,
    strict: bool | None = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drop-in replacement for torch_npu.npu_cross_entropy_loss, with its documented contract.

    The loss is the same as in `cross_entropy`. strict=True (the default) enforces every documented constraint, so that
    a call that passes here is documented to run on the vendor's operator; (strict) marks the constraints below. One
    exception: rows whose target is a negative ignore_index, -100 by default, are ignored as in torch. The vendor's page
    allows targets in [0, C) only; its kernel also ignores such rows (read in its published sources).

    Args:
        input: logits, [N, C], float16, float32 or bfloat16, C > 0; (strict) 0 < N <= 200000. float64 without strict.
        target: class indices in [0, C) or ignore_index, [N], int64; any integer dtype without strict.
        weight: one weight per class, [C], float32, (strict) values in (0, 1]. Values are checked on the CPU; on an NPU
            only with the environment variable NPU_XENT_DEBUG=1, because the check synchronizes.
        reduction: "mean", "sum" or "none".
        ignore_index: rows with this target are ignored; (strict) less than C.
        label_smoothing: in [0, 1]; (strict) in [0, 1).
        lse_square_scale_for_zloss: scale of the z-loss, which is added to the loss; (strict) must be 0, since the
            vendor has not enabled it.
        return_zloss: also return the z-loss, which the loss includes; (strict) must be False.
        loss_dtype: dtype of loss, zloss and lse_for_zloss: float32, float64 or the dtype of input, which is the
            default, also under autocast. Ours, not the vendor's.
        need_log_prob: False leaves log_prob out, which saves its memory and, for "mean" and "sum" of float32 and
            bfloat16 logits, a sweep over the logits. Ours, not the vendor's.
        strict: enforce the documented constraints. If input requires a gradient and gradients are enabled, they also
            demand: for "mean", weight, ignore_index and label_smoothing at their defaults; for "sum" and "none",
            label_smoothing at its default. None warns of constraints that are restrictions of the vendor's alone, once
            of each in a process, and computes the call; False says nothing.

    Returns:
        (loss, log_prob, zloss, lse_for_zloss), log_prob in the dtype of input, the others in loss_dtype: loss [1], or
        [N] for "none"; log_prob [N, C] = log_softmax(input), or [0] without need_log_prob; zloss of shape [0], or of
        the loss's shape with return_zloss; lse_for_zloss of shape [0], or [N] if lse_square_scale_for_zloss is not 0.
        Only loss and zloss are differentiable, once.

    Raises:
        ConstraintError: (strict) a documented constraint is broken. It is a ValueError. For a target out of range, on
            the CPU or with NPU_XENT_DEBUG=1, it is also an IndexError (compiled code raises a plain IndexError).
        ValueError, TypeError, IndexError, RuntimeError: as cross_entropy does.
    """
    if has_torch_function_variadic(input, target, weight) and not torch.compiler.is_compiling():
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = overridden(npu_cross_entropy_loss, locals())
        return outputs
    check_tensors("npu_cross_entropy_loss", input=input, target=target, weight=weight)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "lse_square_scale_for_zloss": lse_square_scale_for_zloss,
        "loss_dtype": loss_dtype,
    }
    check_types("npu_cross_entropy_loss", options)
    flags = {"return_zloss": return_zloss, "need_log_prob": need_log_prob}
    check_flags("npu_cross_entropy_loss", **flags, strict=True if strict is None else strict)
    if loss_dtype is None:
        options["loss_dtype"] = input.dtype
    lse_square_scale = options.pop("lse_square_scale_for_zloss")
    if strict is None or strict:
        lifted: Lifted | None = [] if strict is None else None
        check_documented_constraints(
            input,
            target,
            weight,
            reduction,
            options["ignore_index"],
            options["label_smoothing"],
            lse_square_scale,
            return_zloss,
            lifted,
        )
        if lifted:
            warn_of_lifted(lifted)
    if input.dim() != 2:
        raise ValueError(
            f"npu_xent: logits must have shape [N, C], but have shape {list(input.shape)}; flatten them, and target, "
            "to one row for each prediction, or call npu_xent.cross_entropy, which takes any rank."
        )
    fusable = not return_zloss and input.dtype is not torch.float16
    if fusable and one_compiled_gradient():
        options.update(
            {"lse_square_scale_for_zloss": lse_square_scale, "need_log_prob": need_log_prob, "strict": False}
        )
        outputs = whole("npu_cross_entropy_loss", input, target, weight, **options)
        return outputs
    prepare(input)
    options["lse_square_scale"] = lse_square_scale
    fused = functools.partial(
        torch.ops.npu_xent.cross_entropy.default,
        **options,
        need_lse=lse_square_scale != 0.0,
        need_log_prob=bool(need_log_prob),
        differentiable_z_loss=bool(return_zloss),
    )
    tensors = (input, index_target(target), weight)
    # A compiled graph raises when it runs, outside of any Python that could be traced here.
    checked = strict and not torch.compiler.is_compiling()
    with target_errors_as_constraints() if checked else contextlib.nullcontext():
        if not transformed():
            loss, z_loss, lse, log_prob = fused(*tensors)
        elif fusable and one_gradient(input, weight):
            loss, z_loss, lse, log_prob = fused_gradient(fused, tensors, class_dim=1)
        else:
            check_ranges(options)
            _check_shapes(input, target)
            loss, z_loss, lse = _by_torch_operations(
                *tensors, **options, logit_scale=1.0, softcap=None, return_lse=lse_square_scale != 0.0
            )
            log_prob = input.detach().log_softmax(1) if need_log_prob else input.new_empty(0)
    if reduction != "none":
        loss = loss.view(1)
    z_loss = z_loss_like(loss, z_loss) if return_zloss else z_loss.new_empty(0)
    return loss, log_prob, z_loss, lse.detach().to(loss.dtype)


def _shape_of_rows(input: Tensor) -> torch.Size:
    """Shape of [C] or [N, C, d1, ...] without the classes."""
    class_dim = min(input.dim() - 1, 1)
    return input.shape[:class_dim] + input.shape[class_dim + 1 :]


def _as_rows(input: Tensor, target: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """Reshape [C] or [N, C, d1, ...] to rows [M, C], and target to [M]; views where the strides allow it.

    On the CPU, whose kernels read classes that are not adjacent, rows of [N, C, d1, ...] become [N, d1 * ..., C].
    """
    if input.dim() == 2:
        return input, target
    require_storages(input=input, target=target)
    if input.dim() == 1:
        return input.unsqueeze(0), target.reshape(1)
    classes_last = input.movedim(1, -1)
    if in_place and not classes_last.is_contiguous():
        raise ValueError(
            "npu_xent.cross_entropy: consume_logits needs the classes of each row adjacent in memory, but input has "
            f"shape {list(input.shape)} and strides {list(input.stride())}; leave it off, or pass logits whose "
            "movedim(1, -1) is contiguous"
        )
    images = _as_images(input)
    return images if _read_as_images(images) else images.flatten(0, 1), target.reshape(-1)


def _as_images(x: Tensor) -> Tensor:
    """[N, C, d1, ...] as [N, d1 * ..., C]: a view, or a copy with adjacent classes."""
    return x.movedim(1, -1).flatten(1, -2)


def _read_as_images(images: Tensor) -> bool:
    """Whether kernels read classes that are not adjacent where they lie."""
    return images.device.type == "cpu" and images.shape[2] != 1 and images.stride(2) != 1


def _check_shapes(input: Tensor, target: Tensor) -> None:
    """Raise ValueError unless target has the shape of input (probabilities) or of input without C (indices)."""
    if target.shape == input.shape and target.dtype in (torch.int64, *INTEGERS) and input.dim() > 1:
        raise ValueError(
            f"npu_xent.cross_entropy: an integer target holds class indices, but this one has the shape of input, "
            f"{list(target.shape)}; for one-hot rows pass target.argmax(1), or target.float() as probabilities"
        )
    if input.dim() > 0 and input.shape[min(input.dim() - 1, 1)] == 0:
        raise ValueError(f"npu_xent: logits must have at least one class, but have shape {list(input.shape)}.")
    expected = input.shape
    if not target.is_floating_point():
        if input.dim() == 2 and target.dim() == 1 and not transformed():
            return  # the operator compares their lengths itself
        expected = _shape_of_rows(input)
    if input.dim() == 0 or target.shape != expected:
        hint = ""
        if target.is_floating_point() and not input.is_floating_point():
            hint = f"; input is {input.dtype} and target {target.dtype}, so they may be swapped"
        elif target.is_floating_point():
            hint = f"; class indices are integers, and this target is {target.dtype}"
        elif target.shape == input.shape:  # bool or complex
            hint = "; probabilities are floating point: target.float()"
        elif input.dim() == 2 and target.numel() == input.shape[0]:
            hint = "; pass target.flatten()"
        elif input.dim() > 2 and target.dim() == 1 and target.numel() == input.shape[:-1].numel():
            hint = "; classes are dimension 1, so for classes last, flatten input too: input.flatten(0, -2)"
        elif input.dim() > 2 and target.shape == input.shape[:-1]:
            hint = (
                "; classes are dimension 1, so for classes last, flatten both: input.flatten(0, -2), target.flatten()"
            )
        raise ValueError(
            "npu_xent.cross_entropy: target must have the shape of input without its classes (class indices), or the "
            f"shape of input (probabilities), but input has {list(input.shape)} and target {list(target.shape)}{hint}"
        )


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _product(factor: Tensor, log_prob: Tensor) -> Tensor:
    """factor * log_prob, but 0 where factor is 0, even if log_prob is -inf there."""
    return factor * log_prob.masked_fill((factor == 0) & (log_prob == -math.inf), 0.0)


def _require_no_ignored_class(ignore_index: int) -> None:
    if ignore_index >= 0:
        raise RuntimeError(
            "npu_xent.cross_entropy: ignore_index has no effect on class probabilities and must be negative, but is "
            f"{ignore_index}; leave it out"
        )


def _of_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, *, ignore_index: int, return_lse: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, z-loss and lse of class probabilities, by the fused operator."""
    _require_no_ignored_class(ignore_index)
    logits, probabilities = input, target
    if input.dim() != 2:
        require_storages(input=input, target=target)
    if input.dim() == 1:
        logits, probabilities = input.unsqueeze(0), target.unsqueeze(0)
    elif input.dim() > 2:
        logits, probabilities = _as_images(input), _as_images(target)
        if not (_read_as_images(logits) or _read_as_images(probabilities)):
            logits, probabilities = logits.flatten(0, 1), probabilities.flatten(0, 1)
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.npu_xent.prob_cross_entropy.default(
        logits, probabilities, weight, **options, need_lse=bool(return_lse)
    )
    return outputs


def _by_torch_operations(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    lse_square_scale: float,
    logit_scale: float,
    softcap: float | None,
    loss_dtype: torch.dtype | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, z-loss and lse by torch operations, in float32 (float64): for probabilities and for torch.func."""
    require_storages(input=input, target=target, weight=weight)
    classes = input.shape[min(input.dim() - 1, 1)]
    check_logits_dtype(input)
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"npu_xent: weight must have one value for each of the {classes} classes, but has {list(weight.shape)}."
        )
    autocast = is_autocast_on(input)
    allowed = weight is None or weight.dtype in (torch.float32, input.dtype)
    if weight is not None and not (allowed or (autocast and weight.is_floating_point())):
        raise TypeError(
            f"npu_xent: weight must be float32 or of the logits' dtype {input.dtype}, but is {weight.dtype}."
        )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "npu_xent: weight requires a gradient, which cross entropy does not compute; pass weight.detach()."
        )
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    check_loss_dtype(loss_dtype, input)
    loss_dtype = loss_dtype or (dtype if autocast else input.dtype)
    class_dim = min(input.dim() - 1, 1)
    logits = input.to(dtype)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    lse = _capped(logits, softcap).logsumexp(class_dim) if return_lse else logits.new_empty(0)
    if target.is_floating_point():
        _require_no_ignored_class(ignore_index)
        target = target.to(dtype)
        kept = torch.ones(target.select(class_dim, 0).shape, dtype=torch.bool, device=target.device)
    else:
        target = index_target(target)
        kept = target != ignore_index
        logits = logits.masked_fill(kept.logical_not().unsqueeze(class_dim), 0.0)  # 0 * NaN would be NaN
    logits = _capped(logits, softcap)
    log_prob = logits.log_softmax(class_dim)
    weights = torch.ones(classes, dtype=dtype, device=input.device) if weight is None else weight.to(dtype)
    by_class = weights.view(-1, *[1] * (logits.dim() - 1 - class_dim))
    if target.is_floating_point():
        share = by_class * ((1 - label_smoothing) * target + label_smoothing / classes)
        loss, total = -_product(share, log_prob).sum(class_dim), kept.sum()
    else:
        total = weights[target.masked_fill(kept.logical_not(), 0)].masked_fill(kept.logical_not(), 0.0).sum()
        loss, weighted = torch.zeros_like(kept, dtype=dtype), _product(by_class, log_prob)
        if label_smoothing != 1.0:
            nll = nll_loss(weighted, target, ignore_index=ignore_index, reduction="none")
            loss = loss + (1 - label_smoothing) * nll
        if label_smoothing != 0.0:
            smoothed = weighted.sum(class_dim).masked_fill(kept.logical_not(), 0.0)
            loss = loss - label_smoothing / classes * smoothed
    if reduction != "none":
        loss = loss.sum() / total * (total / total) if reduction == "mean" else loss.sum()  # NaN for a total of 0
    z_loss = torch.zeros_like(loss)
    if lse_square_scale != 0.0:
        lse_of_z = logits.logsumexp(class_dim)
        lse_of_z = lse_of_z + (lse_of_z - lse_of_z)  # NaN where it is infinite
        z_loss = torch.where(kept, lse_square_scale * lse_of_z.square(), 0.0)
        if reduction != "none":
            z_loss = z_loss.sum() / (kept.sum() if reduction == "mean" else 1)
        loss = loss + z_loss
    return loss.to(loss_dtype), z_loss.to(loss_dtype), lse
