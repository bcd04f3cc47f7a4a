"""Log-probabilities and entropy of rows: thin wrappers over torch.ops.npu_xent."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import has_torch_function_variadic

from ._linear import check_as_the_operator_does, without_ignored
from ._loading import prepare
from ._options import LINEAR_LOG_PROBS, LOG_PROBS, SELECTED, check_flags, check_ranges, check_types
from ._overrides import not_scriptable, output_type, overridden
from ._tensors import (
    check_logits_dtype,
    check_overwritable,
    check_tensors,
    has_dtensor,
    index_target,
    require_storage,
    require_storages,
    transformed,
)


@output_type
class TokenLogProbs(NamedTuple):
    """Output of token_log_probs with return_entropy or return_top1. An output that was not requested is None."""

    log_probs: Tensor
    entropy: Tensor | None
    top1: Tensor | None


# Overloads for type checkers: the return type depends on return_entropy and return_top1.
# fmt: off
@overload
def token_log_probs(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor = ..., softcap: float | None = ...,
    logit_scale: float = ..., ignore_index: int = ..., return_entropy: Literal[False] = ...,
    return_top1: Literal[False] = ..., consume_logits: bool = ...,
) -> Tensor: ...
@overload
def token_log_probs(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor = ..., softcap: float | None = ...,
    logit_scale: float = ..., ignore_index: int = ..., return_entropy: Literal[True],
    return_top1: bool = ..., consume_logits: bool = ...,
) -> TokenLogProbs: ...
@overload
def token_log_probs(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor = ..., softcap: float | None = ...,
    logit_scale: float = ..., ignore_index: int = ..., return_entropy: bool = ...,
    return_top1: Literal[True], consume_logits: bool = ...,
) -> TokenLogProbs: ...
@overload
def token_log_probs(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor = ..., softcap: float | None = ...,
    logit_scale: float = ..., ignore_index: int = ..., return_entropy: bool = ...,
    return_top1: bool = ..., consume_logits: bool = ...,
) -> Tensor | TokenLogProbs: ...
# fmt: on
@not_scriptable("token_log_probs")
def token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_top1: bool = False,
    consume_logits: bool = False,
) -> Tensor | TokenLogProbs:
    """Log-probability of each target, and the entropy of each row's distribution, both differentiable.

    With z = softcap * tanh(logit_scale * logits / softcap) / temperature and lp = log_softmax(z), in float32::

        log_probs_n = lp[n, target_n]        entropy_n = -sum_c exp(lp[n, c]) lp[n, c]

    Of DTensors the outputs are DTensors: the page of npu_xent.distributed has the placements.

    Args:
        logits: [..., C], C > 0, float32, bfloat16, float16 or float64, classes last. They are copied once if the
            classes are not adjacent in memory.
        target: class indices in [0, C) or ignore_index, [...], any integer dtype.
        temperature: a number in [1e-6, 1e6]; or a tensor in the shape of target or [], float32 (or float64 for float64
            logits), with a positive temperature for each row that is not ignored. It must not require a gradient.
        softcap: in [1e-6, 1e6], or None for no softcap.
        logit_scale: finite. z is scaled first, then capped, then divided by the temperature.
        ignore_index: rows with this target are ignored: log-probability 0, entropy 0, top1 False, gradient 0. Their
            logits are not read.
        return_entropy: also return the entropy.
        return_top1: also return whether the target is the argmax of logit_scale * logits, the first of equals: the
            accuracy of the token.
        consume_logits: the backward overwrites the logits with their gradient instead of allocating memory for it.
            Later reads of `logits` see the gradient; a second backward raises. Where no gradient is needed, nothing is
            overwritten.

    Returns:
        log_probs, in the shape of target, float32 (float64 for float64 logits). With return_entropy or return_top1, a
        TokenLogProbs(log_probs, entropy, top1): entropy as log_probs, top1 bool. log_probs and entropy are
        differentiable in the logits, once; a second derivative raises. (The transforms of torch.func run on torch
        operations, which support all derivatives.)

        Logits of -inf have probability 0, add nothing to the entropy, and get gradient 0 (except at the target, whose
        log-probability is -inf, and whose gradient is the upstream gradient times logit_scale / temperature). A row
        that is not ignored has log-probability and entropy NaN, top1 False and gradient NaN if it has a NaN, or,
        without softcap, a +inf or only -inf.

    Raises:
        ValueError: a shape, temperature, softcap or logit_scale that breaks the rules above (the values of a tensor of
            temperatures are checked on the CPU; on an NPU a row whose temperature is not positive is NaN); tensors on
            different devices; consume_logits for a leaf, for memory that is not contiguous, for a view with torch's
            negative bit, or in a transform of torch.func.
        TypeError: an argument of a wrong type or dtype; float64 on an NPU.
        IndexError: a target that is out of range and not ignore_index, on the CPU. On other devices its row is NaN.
        RuntimeError: temperature requires a gradient; a second backward after consume_logits; a tensor whose storage
            was freed or shrunk; a second or a forward-mode derivative.
    """
    if has_torch_function_variadic(logits, target, temperature) and not torch.compiler.is_compiling():
        output: Tensor | TokenLogProbs = overridden(token_log_probs, locals())
        return output
    check_tensors(LOG_PROBS, logits=logits, target=target)
    check_flags(LOG_PROBS, return_entropy=return_entropy, return_top1=return_top1, consume_logits=consume_logits)
    if has_dtensor(logits, target, temperature):
        from . import _dtensor

        return _dtensor.token_log_probs(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
            return_top1=return_top1,
            consume_logits=consume_logits,
        )
    if logits.dim() == 0 or target.shape != logits.shape[:-1]:
        second = logits.dim() > 2 and target.shape == logits.shape[:1] + logits.shape[2:]
        hint = "; for classes in dimension 1 pass logits.movedim(1, -1)" if second else ""
        raise ValueError(
            "npu_xent.token_log_probs: target must have the shape of logits without the classes, which come last, but "
            f"logits has {list(logits.shape)} and target {list(target.shape)}{hint}"
        )
    options = _options(LOG_PROBS, temperature, softcap, logit_scale, ignore_index)
    row_temperature = _row_temperature(LOG_PROBS, temperature, target.shape, logits=logits)
    overwrite = consume_logits and logits.requires_grad and torch.is_grad_enabled()
    if transformed():
        check_overwritable(LOG_PROBS, "logits", logits, overwrite)
        check_ranges(options)
        return _returned(
            _by_torch_operations(logits, target, row_temperature, options), target, return_entropy, return_top1
        )
    prepare(logits)
    check_overwritable(LOG_PROBS, "logits", logits, overwrite)
    require_storage("logits", logits)
    op = torch.ops.npu_xent.token_log_probs_ if overwrite else torch.ops.npu_xent.token_log_probs
    outputs = op.default(
        _rows(logits, overwrite),
        index_target(target).reshape(-1),
        row_temperature,
        **options,
        need_entropy=bool(return_entropy),
        need_top1=bool(return_top1),
    )
    return _returned(outputs, target, return_entropy, return_top1)


# fmt: off
@overload
def linear_token_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    temperature: float | Tensor = ..., softcap: float | None = ..., logit_scale: float = ..., ignore_index: int = ...,
    return_entropy: Literal[False] = ..., return_top1: Literal[False] = ..., chunk_rows: int | None = ...,
) -> Tensor: ...
@overload
def linear_token_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    temperature: float | Tensor = ..., softcap: float | None = ..., logit_scale: float = ..., ignore_index: int = ...,
    return_entropy: Literal[True], return_top1: bool = ..., chunk_rows: int | None = ...,
) -> TokenLogProbs: ...
@overload
def linear_token_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    temperature: float | Tensor = ..., softcap: float | None = ..., logit_scale: float = ..., ignore_index: int = ...,
    return_entropy: bool = ..., return_top1: Literal[True], chunk_rows: int | None = ...,
) -> TokenLogProbs: ...
@overload
def linear_token_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    temperature: float | Tensor = ..., softcap: float | None = ..., logit_scale: float = ..., ignore_index: int = ...,
    return_entropy: bool = ..., return_top1: bool = ..., chunk_rows: int | None = ...,
) -> Tensor | TokenLogProbs: ...
# fmt: on
@not_scriptable("linear_token_log_probs")
def linear_token_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_top1: bool = False,
    chunk_rows: int | None = None,
) -> Tensor | TokenLogProbs:
    """`token_log_probs` of F.linear(input, linear_weight, linear_bias), without materializing the N x C logits.

    The logits are computed in chunks of rows, in the forward and again in the backward.

    Args:
        input: [..., H], any number of leading dimensions, N rows in all; float32, bfloat16, float16 or float64.
        linear_weight: [C, H], C > 0, in the dtype of input.
        target: class indices in [0, C) or ignore_index, [...], any integer dtype.
        linear_bias: [C], in the dtype of input.
        temperature, softcap, logit_scale, return_entropy, return_top1: as in `token_log_probs`.
        ignore_index: rows with this target are ignored, as in `token_log_probs`. The CPU also skips them in the matrix
            products.
        chunk_rows: rows per chunk, at least 1. Default: as in `linear_cross_entropy`.

    Returns:
        The same as `token_log_probs`; differentiable in input, linear_weight and linear_bias, once. Logits are rounded
        to the dtype of input, as in F.linear. Gradients of linear_weight and linear_bias are accumulated over chunks in
        float32 (float64) and rounded once. Under autocast input, linear_weight and linear_bias are cast as F.linear
        casts them.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `token_log_probs` and `linear_cross_entropy` do.
    """
    if (
        has_torch_function_variadic(input, linear_weight, target, linear_bias, temperature)
        and not torch.compiler.is_compiling()
    ):
        output: Tensor | TokenLogProbs = overridden(linear_token_log_probs, locals())
        return output
    check_tensors(LINEAR_LOG_PROBS, input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias)
    check_flags(LINEAR_LOG_PROBS, return_entropy=return_entropy, return_top1=return_top1)
    if input.dim() == 0 or target.shape != input.shape[:-1]:
        raise ValueError(
            "npu_xent.linear_token_log_probs: target must have the shape of input without its last dimension, but "
            f"input has {list(input.shape)} and target {list(target.shape)}"
        )
    options = _options(LINEAR_LOG_PROBS, temperature, softcap, logit_scale, ignore_index, chunk_rows=chunk_rows)
    row_temperature = _row_temperature(LINEAR_LOG_PROBS, temperature, target.shape, input=input)
    if transformed():
        chunk_rows = options.pop("chunk_rows")
        check_ranges(options)
        check_as_the_operator_does(_rows(input), linear_weight, linear_bias, None, ignore_index, softcap, chunk_rows)
        logits = linear(without_ignored(input, target, ignore_index), linear_weight, linear_bias)
        return _returned(
            _by_torch_operations(logits, target, row_temperature, options), target, return_entropy, return_top1
        )
    prepare(input)
    # Autocast reads the layer before the operator.
    require_storages(input=input, target=target, linear_weight=linear_weight, linear_bias=linear_bias)
    outputs = torch.ops.npu_xent.linear_token_log_probs.default(
        _rows(input),
        linear_weight,
        linear_bias,
        index_target(target).reshape(-1),
        row_temperature,
        **options,
        need_entropy=bool(return_entropy),
        need_top1=bool(return_top1),
    )
    return _returned(outputs, target, return_entropy, return_top1)


@not_scriptable("selected_log_probs")
def selected_log_probs(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-probabilities of K classes of each row, as for top-k distillation: log_softmax(z).gather(-1, index).

    z is that of `token_log_probs`.

    Args:
        logits: [..., C], C > 0, float32, bfloat16, float16 or float64.
        index: class indices in [0, C), [..., K], any integer dtype. Equal indices in a row are allowed: their gradients
            add up.
        temperature, softcap, logit_scale: as in `token_log_probs`; a tensor of temperatures has the shape of logits
            without C.

    Returns:
        [..., K], float32 (float64 for float64 logits); differentiable in the logits, once. A row is NaN if it has a
        NaN, or, without softcap, a +inf or only -inf.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_log_probs` does.
        IndexError: an index out of range, on the CPU in eager mode. Elsewhere the log-probability is NaN, and so is the
            gradient of its row.
    """
    if has_torch_function_variadic(logits, index, temperature) and not torch.compiler.is_compiling():
        output: Tensor = overridden(selected_log_probs, locals())
        return output
    check_tensors(SELECTED, logits=logits, index=index)
    if logits.dim() == 0 or index.dim() == 0 or index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            "npu_xent.selected_log_probs: index must have the shape of logits with K indices instead of the classes, "
            f"but logits has {list(logits.shape)} and index {list(index.shape)}"
        )
    options = _options(SELECTED, temperature, softcap, logit_scale)
    row_temperature = _row_temperature(SELECTED, temperature, logits.shape[:-1], logits=logits)
    if transformed():
        check_ranges(options)
        check_logits_dtype(logits)
        return _log_softmax(logits, row_temperature, options).gather(-1, index_target(index, "index"))
    prepare(logits)
    require_storage("logits", logits)
    require_storage("index", index)
    log_probs: Tensor = torch.ops.npu_xent.selected_log_probs.default(
        _rows(logits), _rows(index_target(index, "index")), row_temperature, **options
    )
    return log_probs.view(index.shape)


def _options(
    function: str,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the operator's options, of checked types."""
    options: dict[str, Any] = {
        "temperature": 1.0 if isinstance(temperature, Tensor) else temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
    } | more
    if function != SELECTED:
        options["ignore_index"] = ignore_index
    check_types(function, options)
    return options


def _row_temperature(function: str, temperature: float | Tensor, shape: torch.Size, **of_rows: Tensor) -> Tensor | None:
    """Return the temperature of each row, [N], or None if it is a number. `of_rows` is what has the rows, by name."""
    if not isinstance(temperature, Tensor):
        return None
    check_tensors(function, temperature=temperature)
    if transformed() and (temperature.dtype not in (torch.float32, torch.float64) or temperature.requires_grad):
        raise TypeError(
            f"npu_xent.{function}: temperature must be a number or float32 and must not require a gradient, but is "
            f"{temperature.dtype}; pass temperature.float().detach()"
        )
    if temperature.dim() != 0 and temperature.shape != shape:
        raise ValueError(
            f"npu_xent.{function}: temperature must be a number, or a tensor with one value for each row, of shape "
            f"{list(shape)}, but has shape {list(temperature.shape)}; expand a temperature of each sequence"
        )
    ((argument, tensor),) = of_rows.items()
    if temperature.device != tensor.device:
        raise ValueError(
            f"npu_xent.{function}: temperature must be on the device of {argument}, {tensor.device}, but is on "
            f"{temperature.device}; move it with temperature.to({argument}.device)"
        )
    require_storage("temperature", temperature)
    return temperature.expand(shape).reshape(-1)


def _rows(tensor: Tensor, in_place: bool = False) -> Tensor:
    """Reshape [..., C] to [N, C]; a view where the strides allow it, or `in_place` demands it."""
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    if in_place and not tensor.is_contiguous():
        raise ValueError(
            "npu_xent.token_log_probs: consume_logits needs contiguous logits, but these have shape "
            f"{list(tensor.shape)} and strides {list(tensor.stride())}; leave it off, or pass logits.contiguous()"
        )
    return tensor.flatten(0, -2)


def _returned(
    outputs: tuple[Tensor, Tensor | None, Tensor | None], target: Tensor, return_entropy: bool, return_top1: bool
) -> Tensor | TokenLogProbs:
    log_probs, entropy, top1 = outputs
    log_probs = log_probs.view(target.shape)
    if not (return_entropy or return_top1):
        return log_probs
    return TokenLogProbs(
        log_probs,
        entropy.view(target.shape) if return_entropy and entropy is not None else None,
        top1.view(target.shape) if return_top1 and top1 is not None else None,
    )


def _log_softmax(logits: Tensor, row_temperature: Tensor | None, options: dict[str, Any]) -> Tensor:
    """log_softmax(z) of [..., C] by torch operations, for torch.func."""
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) * options["logit_scale"]
    softcap = options["softcap"]
    if softcap is not None:
        z = (z / softcap).tanh() * softcap
    z = z / options["temperature"]
    if row_temperature is not None:
        rows = row_temperature.to(z.dtype).view(*logits.shape[:-1], 1)
        z = z / rows.masked_fill(~((rows > 0) & rows.isfinite()), torch.nan)
    log_prob: Tensor = z.log_softmax(-1)
    return log_prob


def _by_torch_operations(
    logits: Tensor, target: Tensor, row_temperature: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """token_log_probs by torch operations, for torch.func."""
    check_logits_dtype(logits)
    target = index_target(target)
    kept = target != options["ignore_index"]
    logits = logits.masked_fill(kept.logical_not().unsqueeze(-1), 0.0)  # 0 * NaN would be NaN
    log_prob = _log_softmax(logits, row_temperature, options)
    column = target.masked_fill(kept.logical_not(), 0).unsqueeze(-1)
    log_probs = log_prob.gather(-1, column).squeeze(-1).masked_fill(kept.logical_not(), 0.0)
    # -inf * 0 would be NaN, in the derivative too.
    finite = log_prob.masked_fill(log_prob == -torch.inf, 0.0)
    entropy = -(finite.exp() * finite).sum(-1).masked_fill(kept.logical_not(), 0.0)
    scaled = logits * options["logit_scale"]
    top1 = (scaled.argmax(-1) == target) & kept & log_probs.isnan().logical_not()
    return log_probs, entropy, top1
