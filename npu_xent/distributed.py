"""Losses of logits whose classes are sharded over the ranks of a process group (tensor parallelism)::

    vocab_parallel_cross_entropy        the loss
    vocab_parallel_token_log_probs      log-probabilities, entropy and accuracy of tokens
    vocab_parallel_linear_cross_entropy the loss of a linear layer's output, without materializing the logits

Each rank passes its classes of every row, and the same target. Every rank gets the same results, bit for bit. The
forward makes one all_gather of a few numbers a row, the backward no communication at all (with a linear layer, one
all_gather for each chunk of rows, and in the backward the sum of the input's gradient). torch.distributed moves the
data; its backend must support all_gather_into_tensor on the tensors' device (gloo, HCCL, NCCL).

How the statistics of shards merge is in csrc/options.h.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import has_torch_function_variadic

from ._linear import without_ignored
from ._loading import prepare
from ._log_probs import TokenLogProbs
from ._options import as_number, check_flags, check_loss_dtype, check_ranges, check_types
from ._overrides import overridden
from ._tensors import (
    LOGITS,
    check_device,
    check_not_leaf,
    check_not_negative,
    check_tensors,
    has_dtensor,
    index_target,
    is_autocast_on,
    require_storages,
    z_loss_like,
)
from .functional import CrossEntropyOutput

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_token_log_probs",
]

ALONE: Any = object()  # instead of a group, for _dtensor.py: this rank has all classes, so it gathers nothing

_ops = torch.ops.npu_xent
# The names in newer torch, where the older ones warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
    class_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    reduction: str = "none",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype = torch.float32,
    consume_logits: bool = False,
    return_lse: bool = False,
    return_z_loss: bool = False,
    normalizer: Tensor | dist.ProcessGroup | tuple[dist.ProcessGroup, ...] | None = None,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of logits whose classes are sharded over the ranks of a process group.

    The loss is that of npu_xent.cross_entropy on the whole logits: smoothing and z-loss are of the whole vocabulary.
    All ranks must call it, with the same target and options.

    Args:
        logits: [..., C_local], this rank's classes, last; float32, bfloat16, float16 or float64. C_local may be 0.
        target: class indices in [0, num_classes) or ignore_index, [...], any integer dtype; the same on all ranks.
        weight: one weight for each class of the whole vocabulary, [num_classes], the same on all ranks.
        group: the ranks that share the classes, in the order of the classes unless class_range says otherwise.
            Default: all.
        num_classes: the number of classes of all ranks. None: C_local times the number of ranks, which then must have
            equally many; where they have not, a rank may take a target for one out of range, and raise alone.
        class_range: (begin, end), the classes of this rank. None: if C_local is the size of this rank's chunk of
            torch.chunk(vocabulary, ranks), that chunk; otherwise, if all ranks together have room for num_classes,
            classes from rank * C_local on. Columns from end or num_classes on are padding: they are not read, and get
            gradient 0.
        ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale: as in npu_xent.cross_entropy.
        reduction: "none", "mean" or "sum". "mean" divides by the weight of this rank's rows that are not ignored.
        loss_dtype: float32, float64 (not on an NPU) or the dtype of logits.
        consume_logits: the backward overwrites the logits with their gradient.
        return_lse: also return logsumexp of every row over all classes. It is differentiable.
        return_z_loss: also return the z-loss separately, for logging. The loss already includes it.
        normalizer: for "mean" and "sum", what the sum is divided by: a tensor of one value (it gets no gradient), or a
            process group, over whose ranks the weights that "mean" divides by are summed. Of a tuple of groups, over
            each in turn: the dimensions of a mesh.

    Returns:
        The loss, [...] for "none", else []; with return_lse or return_z_loss a CrossEntropyOutput(loss, lse, z_loss),
        lse [...] in float32 (float64 for float64 logits). Differentiable in the logits, once.

    Raises:
        ValueError: a shape, a range of classes or an option that breaks the rules above. On the CPU also, on every
            rank, classes that do not make up one vocabulary, and targets in which ranks differ. With the environment
            variable NPU_XENT_DEBUG=1 also, on every rank, numbers of rows, dtypes or options in which ranks differ;
            without it, these are not compared, and the collective may hang or give wrong results.
        TypeError: an argument of a wrong type or dtype.
        IndexError: a target that is out of range, on the CPU.
        RuntimeError: no process group; a second derivative; a second backward after consume_logits; from the backend,
            if another rank has died or hangs. An error that only one rank raises leaves the others waiting until its
            process ends, or until the group's timeout.
    """
    if has_torch_function_variadic(logits, target, weight) and not torch.compiler.is_compiling():
        output: Tensor | CrossEntropyOutput = overridden(vocab_parallel_cross_entropy, locals())
        return output
    name = "vocab_parallel_cross_entropy"
    _check_plain(name, logits=logits, target=target, weight=weight)
    check_tensors(name, logits=logits, target=target, weight=weight)
    require_storages(logits=logits, target=target, weight=weight)
    _check_normalizer(name, normalizer, reduction)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "loss_dtype": loss_dtype,
    }
    check_types("cross_entropy", options, name)
    check_flags(name, consume_logits=consume_logits, return_lse=return_lse, return_z_loss=return_z_loss)
    check_ranges(options)
    _check_loss_dtype(name, options.pop("loss_dtype"), logits)
    rows, shard = _rows_of(name, logits, target, group, num_classes, class_range, consume_logits)
    weight = _class_weight(name, weight, shard, rows)
    indices = index_target(target).reshape(-1)
    of_loss = {"loss_dtype": str(loss_dtype), "return_lse": return_lse, "normalizer": _kind(normalizer)}
    _compare(name, group, rows, shard, **options, **of_loss)
    totals, options = _totals(indices, weight, shard, options, _stats_dtype(rows), normalizer)
    loss, lse, z_loss = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, indices, weight, totals, shard, group, options, loss_dtype, bool(return_lse), bool(consume_logits)
    )
    loss = loss.view(target.shape) if reduction == "none" else loss
    if not (return_lse or return_z_loss):
        return loss  # type: ignore[no-any-return]
    return CrossEntropyOutput(
        loss, lse.view(target.shape) if return_lse else None, z_loss_like(loss, z_loss) if return_z_loss else None
    )


def vocab_parallel_token_log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
    class_range: tuple[int, int] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_top1: bool = False,
    consume_logits: bool = False,
) -> Tensor | TokenLogProbs:
    """Log-probability of each target, and the entropy of each row, of logits sharded over a process group.

    Args:
        logits, target, group, num_classes, class_range, consume_logits: as in vocab_parallel_cross_entropy.
        temperature, softcap, logit_scale, ignore_index, return_entropy: as in npu_xent.token_log_probs. temperature is
            a number.
        return_top1: as there; the largest logits are then compared too, which reads this rank's logits once more.

    Returns:
        What npu_xent.token_log_probs returns of the whole logits, the same on all ranks.

    Raises:
        As vocab_parallel_cross_entropy.
    """
    if has_torch_function_variadic(logits, target, temperature) and not torch.compiler.is_compiling():
        output: Tensor | TokenLogProbs = overridden(vocab_parallel_token_log_probs, locals())
        return output
    name = "vocab_parallel_token_log_probs"
    _check_plain(name, logits=logits, target=target)
    check_tensors(name, logits=logits, target=target)
    require_storages(logits=logits, target=target)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
    }
    check_types("token_log_probs", options, name)
    check_flags(name, return_entropy=return_entropy, return_top1=return_top1, consume_logits=consume_logits)
    check_ranges(options)
    rows, shard = _rows_of(name, logits, target, group, num_classes, class_range, consume_logits)
    indices = index_target(target).reshape(-1)
    wanted = {"return_entropy": return_entropy, "return_top1": return_top1}
    _compare(name, group, rows, shard, **options, **wanted)
    log_probs, *extras = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        rows, indices, shard, group, options, bool(return_entropy), bool(return_top1), bool(consume_logits)
    )
    log_probs = log_probs.view(target.shape)
    if not (return_entropy or return_top1):
        return log_probs  # type: ignore[no-any-return]
    return TokenLogProbs(log_probs, *(x if x is None else x.view(target.shape) for x in extras))


def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
    class_range: tuple[int, int] | None = None,
    sequence_parallel: bool = False,
    reduce_input_grad: bool = True,
    chunk_rows: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_dtype: torch.dtype = torch.float32,
    normalizer: Tensor | dist.ProcessGroup | tuple[dist.ProcessGroup, ...] | None = None,
) -> Tensor:
    """Cross entropy of a linear layer's output whose classes are sharded, without materializing the logits.

    With "mean" and "sum" (but not in float16) the forward also computes the gradients, with three matrix products. With
    "none" and in float16 the backward computes the logits again.

    Args:
        input: [..., H], the same on all ranks; with sequence_parallel this rank's rows, equally many on all ranks.
        linear_weight: [C_local, H], this rank's classes, in the dtype of input. Under autocast both are converted.
        target: as in vocab_parallel_cross_entropy, of all rows: [...]; with sequence_parallel of all ranks' rows, [N].
        linear_bias: [C_local], or None.
        weight, group, num_classes, class_range: as in vocab_parallel_cross_entropy, C_local being linear_weight's.
        sequence_parallel: gather the rows of all ranks first. The gradient of input is then reduce-scattered.
        reduce_input_grad: sum the gradient of input over the ranks. False leaves the partial sum to the caller.
        chunk_rows: rows of a chunk, the same on all ranks. Default: as in npu_xent.linear_cross_entropy, for
            num_classes / ranks classes.
        ignore_index, reduction, label_smoothing, lse_square_scale, softcap, logit_scale, loss_dtype, normalizer: as in
            vocab_parallel_cross_entropy.

    Returns:
        The loss, in the shape of target for "none", else []. Differentiable in input, linear_weight and linear_bias,
        once.

    Raises:
        As vocab_parallel_cross_entropy.
    """
    if (
        has_torch_function_variadic(input, linear_weight, target, linear_bias, weight)
        and not torch.compiler.is_compiling()
    ):
        output: Tensor = overridden(vocab_parallel_linear_cross_entropy, locals())
        return output
    name = "vocab_parallel_linear_cross_entropy"
    _check_plain(name, input=input, linear_weight=linear_weight, target=target)
    check_tensors(name, input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    require_storages(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight)
    _check_normalizer(name, normalizer, reduction)
    if input.dim() == 0 or linear_weight.dim() != 2 or linear_weight.shape[1:] != input.shape[-1:]:
        raise ValueError(
            f"npu_xent.{name}: input must have shape [..., H] and linear_weight [C_local, H], but they have "
            f"{list(input.shape)} and {list(linear_weight.shape)}"
        )
    if is_autocast_on(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = _cast(input, dtype), _cast(linear_weight, dtype)
        linear_bias = linear_bias if linear_bias is None else _cast(linear_bias, dtype)
    if input.dtype not in LOGITS or linear_weight.dtype != input.dtype:
        raise TypeError(
            f"npu_xent.{name}: input and linear_weight must have the same dtype, float32, bfloat16, float16 or "
            f"float64, but have {input.dtype} and {linear_weight.dtype}"
        )
    if linear_bias is not None and (linear_bias.shape, linear_bias.dtype) != (linear_weight.shape[:1], input.dtype):
        raise ValueError(
            f"npu_xent.{name}: linear_bias must have shape {list(linear_weight.shape[:1])} and dtype {input.dtype}, "
            f"but has {list(linear_bias.shape)} and {linear_bias.dtype}"
        )
    check_device(f"npu_xent.{name}", input, linear_weight=linear_weight, linear_bias=linear_bias, weight=weight)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "loss_dtype": loss_dtype,
        "chunk_rows": chunk_rows,
    }
    check_types("linear_cross_entropy", options, name)
    check_flags(name, sequence_parallel=sequence_parallel, reduce_input_grad=reduce_input_grad)
    chunk_rows = options.pop("chunk_rows")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"npu_xent.{name}: chunk_rows must be at least 1, but is {chunk_rows}")
    check_ranges(options)
    _check_loss_dtype(name, options.pop("loss_dtype"), input)
    ranks, rank = _place(name, group)
    shard = _shard_of(name, linear_weight.shape[0], ranks, rank, num_classes, class_range)
    weight = _class_weight(name, weight, shard, input)
    rows = input.reshape(input.shape[:-1].numel(), input.shape[-1])
    expected = [len(rows) * ranks] if sequence_parallel else list(input.shape[:-1])
    if list(target.shape) != expected or target.device != input.device:
        raise ValueError(
            f"npu_xent.{name}: target must have shape {expected} and be on {input.device}, but has "
            f"{list(target.shape)} and is on {target.device}"
        )
    prepare(input)
    indices = index_target(target).reshape(-1)
    _compare(
        name,
        group,
        rows,
        shard,
        chunk_rows=chunk_rows,
        **options,
        loss_dtype=str(loss_dtype),
        normalizer=_kind(normalizer),
        sequence_parallel=sequence_parallel,
        reduce_input_grad=reduce_input_grad,
        **{"requires_grad of input": torch.is_grad_enabled() and rows.requires_grad},
    )
    if chunk_rows is None:
        chunk_rows = _chunk_rows(len(indices), -(-shard.num_classes // ranks), input.element_size())
    totals, options = _totals(indices, weight, shard, options, _stats_dtype(input), normalizer)
    layer = _Layer(shard, group, options, loss_dtype, chunk_rows, sequence_parallel, reduce_input_grad)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, linear_weight, linear_bias, indices, weight, totals, layer
    )
    return loss.view(target.shape) if reduction == "none" else loss


# Shards ---------------------------------------------------------------------------------------------------------------

_LOSS = ("ignore_index", "reduction", "label_smoothing", "lse_square_scale")
_LOGITS = ("ignore_index", "softcap", "logit_scale", "temperature")


class _Shard(NamedTuple):
    """Classes [start, start + columns) of num_classes."""

    start: int
    columns: int
    num_classes: int


def _of(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _shard_of(
    name: str, columns: int, ranks: int, rank: int, num_classes: int | None, class_range: tuple[int, int] | None
) -> _Shard:
    """The classes of this rank's columns: see vocab_parallel_cross_entropy."""
    if num_classes is not None:
        num_classes = as_number(name, "num_classes", num_classes, int)
    if class_range is not None:
        if not (isinstance(class_range, (tuple, list)) and len(class_range) == 2):
            raise TypeError(
                f"npu_xent.{name}: class_range must be two integers, (begin, end), but is {class_range!r:.60}"
            )
        first, second = class_range
        class_range = as_number(name, "class_range", first, int), as_number(name, "class_range", second, int)
    if num_classes is None and class_range is not None:
        raise ValueError(f"npu_xent.{name}: class_range needs num_classes, the number of classes of all ranks")
    if num_classes == 0 or (num_classes is None and columns == 0):
        raise ValueError(f"npu_xent.{name}: logits must have at least one class on some rank")
    if num_classes is None:
        return _Shard(rank * columns, columns, ranks * columns)
    if num_classes < 0:
        raise ValueError(f"npu_xent.{name}: num_classes must not be negative, but is {num_classes}")
    chunk = -(-num_classes // ranks)
    if class_range is not None:
        begin, end = class_range
        if not (0 <= begin <= end <= num_classes and end - begin <= columns):
            raise ValueError(
                f"npu_xent.{name}: class_range must lie in [0, {num_classes}] and be no longer than the {columns} "
                f"columns of logits, but is {tuple(class_range)}"
            )
    elif columns == min(num_classes, (rank + 1) * chunk) - min(num_classes, rank * chunk):
        begin, end = min(num_classes, rank * chunk), min(num_classes, (rank + 1) * chunk)
    elif columns * ranks >= num_classes:
        begin, end = min(num_classes, rank * columns), min(num_classes, (rank + 1) * columns)
    else:
        raise ValueError(
            f"npu_xent.{name}: logits of rank {rank} have {columns} columns, which is neither this rank's chunk of "
            f"{num_classes} classes over {ranks} ranks, nor enough for all of them; pass class_range"
        )
    return _Shard(begin, end - begin, num_classes)


def check_member(name: str, argument: str, group: Any) -> None:
    """Raise ValueError for what new_group returns on the ranks outside the group: a number or an object."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"npu_xent.{name}: this rank is not in the group passed as {argument}; call it only on the ranks of the "
            "group"
        )


def _place(name: str, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The number of ranks, and this rank."""
    if group is ALONE:
        return 1, 0
    check_member(name, "group", group)
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"npu_xent.{name}: group must be a torch.distributed.ProcessGroup, but is a {type(group).__name__}; of a "
            "DeviceMesh pass mesh.get_group(name)"
        )
    if not dist.is_initialized():
        raise RuntimeError(f"npu_xent.{name}: call torch.distributed.init_process_group first")
    return dist.get_world_size(group), dist.get_rank(group)


def _check_normalizer(name: str, normalizer: Any, reduction: Any) -> None:
    if normalizer is None:
        return
    if reduction == "none":
        raise ValueError(f'npu_xent.{name}: normalizer divides a sum; with reduction "none" leave it out')
    groups = normalizer if isinstance(normalizer, tuple) and normalizer else (normalizer,)
    for group in groups:
        check_member(name, "normalizer", group)
    are_groups = all(isinstance(group, dist.ProcessGroup) for group in groups)
    if not (are_groups or (isinstance(normalizer, Tensor) and normalizer.numel() == 1)):
        what = f"shape {list(normalizer.shape)}" if isinstance(normalizer, Tensor) else f"a {type(normalizer).__name__}"
        raise TypeError(
            f"npu_xent.{name}: normalizer must be a tensor of one value, a process group or a tuple of these, but is "
            f"{what}; for a number pass torch.tensor(number), for a mesh mesh.get_group(dim)"
        )


def _kind(normalizer: Any) -> str:
    """What decides the collectives of a normalizer."""
    return "groups" if isinstance(normalizer, (dist.ProcessGroup, tuple)) else type(normalizer).__name__


def _check_loss_dtype(name: str, loss_dtype: torch.dtype | None, logits: Tensor) -> None:
    if loss_dtype is None:  # which the plain functions take
        raise TypeError(
            f"npu_xent.{name}: loss_dtype must be a torch.dtype, but is a NoneType; leave it out for float32"
        )
    check_loss_dtype(loss_dtype, logits)


def _check_plain(name: str, **tensors: Any) -> None:
    """Raise ValueError for a DTensor, which the plain functions take."""
    for argument, tensor in tensors.items():
        if has_dtensor(tensor):
            raise ValueError(
                f"npu_xent.{name}: {argument} is a DTensor; call npu_xent.{name.removeprefix('vocab_parallel_')} with "
                f"it, or pass {argument}.to_local()"
            )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast: only floating-point tensors, and no float64."""
    casts = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if casts else tensor


def _class_weight(name: str, weight: Tensor | None, shard: _Shard, like: Tensor) -> Tensor | None:
    """The checked weight. As in the plain functions, it may have any floating-point dtype under autocast."""
    if weight is not None and weight.shape != (shard.num_classes,):
        raise ValueError(
            f"npu_xent.{name}: weight must have one value for each of the {shard.num_classes} classes of all ranks, "
            f"but has shape {list(weight.shape)}"
        )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "npu_xent: weight requires a gradient, which cross entropy does not compute; pass weight.detach()."
        )
    if weight is None:
        return None
    if is_autocast_on(like) and weight.is_floating_point():
        return weight.to(_stats_dtype(like))
    if weight.dtype not in (torch.float32, like.dtype):
        raise TypeError(
            f"npu_xent.{name}: weight must be float32 or of the logits' dtype {like.dtype}, but is {weight.dtype}"
        )
    return weight


def _rows_of(
    name: str,
    logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None,
    num_classes: int | None,
    class_range: tuple[int, int] | None,
    consume_logits: bool,
) -> tuple[Tensor, _Shard]:
    """The checked logits as rows [N, C_local], and their classes."""
    if logits.dtype not in LOGITS:
        raise TypeError(
            f"npu_xent.{name}: logits must be float32, bfloat16, float16 or float64, but are {logits.dtype}"
        )
    if logits.dim() == 0 or target.shape != logits.shape[:-1] or target.device != logits.device:
        raise ValueError(
            f"npu_xent.{name}: target must have the shape of logits without the classes, which come last, and be on "
            f"their device, but logits has {list(logits.shape)} on {logits.device} and target {list(target.shape)} on "
            f"{target.device}"
        )
    ranks, rank = _place(name, group)
    shard = _shard_of(name, logits.shape[-1], ranks, rank, num_classes, class_range)
    if consume_logits and logits.requires_grad and torch.is_grad_enabled():
        check_not_leaf(name, logits)
        if not torch.compiler.is_compiling():  # compilers cannot trace is_neg
            check_not_negative(name, "logits", logits)
        if not logits.is_contiguous():
            raise ValueError(f"npu_xent.{name}: consume_logits needs contiguous logits; leave it off")
    prepare(logits)
    return logits.reshape(target.numel(), logits.shape[-1]), shard


def _compare(name: str, group: dist.ProcessGroup | None, rows: Tensor, shard: _Shard, **facts: Any) -> None:
    """With NPU_XENT_DEBUG=1, raise ValueError on every rank if ranks differ in the sizes or another fact."""
    if group is ALONE or torch.compiler.is_compiling() or os.environ.get("NPU_XENT_DEBUG") != "1":
        return
    facts = {"rows": rows.shape[0], "dtype": str(rows.dtype), "num_classes": shard.num_classes} | facts
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, facts, group=group)
    for fact in facts:
        values = [of_rank.get(fact) for of_rank in of_ranks]
        if any(value != values[0] for value in values):
            raise ValueError(f"npu_xent.{name}: {fact} must be the same on all ranks, but is {values}")


def _totals(
    target: Tensor,
    weight: Tensor | None,
    shard: _Shard,
    options: dict[str, Any],
    dtype: torch.dtype,
    normalizer: Tensor | dist.ProcessGroup | tuple[dist.ProcessGroup, ...] | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The totals of reduce_rows with the caller's normalizer, and the options with which it divides by them."""
    of_all = {"num_classes": shard.num_classes, "loss_dtype": dtype}
    totals = _ops.reduce_rows(target, weight, **_of(options, _LOSS), **of_all)[2]
    if normalizer is None:
        return totals, options
    if isinstance(normalizer, Tensor):
        divisors = normalizer.detach().to(totals).reshape(1).expand(2)
    else:
        divisors = totals[:2].clone()
        for group in normalizer if isinstance(normalizer, tuple) else (normalizer,):
            dist.all_reduce(divisors, group=group)
    return torch.cat((divisors, totals[2:])), options | {"reduction": "mean"}


# Statistics -----------------------------------------------------------------------------------------------------------


class _Statistics(NamedTuple):
    """One value a row, over all classes. None: not wanted."""

    lse: Tensor
    lse_low: Tensor  # the rounding error of lse
    picked: Tensor
    wsum: Tensor | None
    entropy: Tensor | None
    top1: Tensor | None


class _Wanted(NamedTuple):
    """What row_stats computes on request."""

    need_wsum: bool = False
    need_entropy: bool = False
    need_top1: bool = False
    read_ignored: bool = False


def _statistics(
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shard: _Shard,
    group: dist.ProcessGroup | None,
    options: dict[str, Any],
    wanted: _Wanted,
) -> _Statistics:
    """The statistics of each row, from those of the shards and one all_gather."""
    return _gather(_of_this_shard(rows, target, weight, shard, options, wanted), target, shard, group)()


def _gather(
    mine: dict[str, Tensor], target: Tensor, shard: _Shard, group: dist.ProcessGroup | None, wait: bool = True
) -> Callable[[], _Statistics]:
    """Start to gather the statistics of all shards, and return what merges them.

    On the CPU, what ranks must agree on comes along, and each rank compares it. On other devices that would wait.
    """
    if group is ALONE:
        return lambda: _Statistics(mine["lse"], mine["lse_low"], mine["picked"], mine.get("wsum"), None, None)
    compares = target.is_cpu and not torch.compiler.is_compiling()
    if compares:
        facts = torch.tensor((*shard, _checksum(target)))
        mine = mine | {"facts": facts.view(mine["lse"].dtype)}  # its bits: float32 rounds integers above 2^24
    packed = torch.cat([part.reshape(-1) for part in mine.values()])
    ranks = dist.get_world_size(group)
    gathered = packed.new_empty(ranks * packed.numel())
    # Without rows other devices have nothing to gather, on any rank.
    nothing = not torch.compiler.is_compiling() and packed.numel() == 0
    work = None if nothing else _all_gather(gathered, packed, group=group, async_op=not wait)

    def merged() -> _Statistics:
        if not (wait or work is None):
            work.wait()
        parts = gathered.view(ranks, -1).split([part.numel() for part in mine.values()], 1)
        of = dict(zip(mine, parts, strict=True))
        if compares:
            _check_facts(of.pop("facts").clone(memory_format=torch.contiguous_format).view(torch.int64).tolist())
        return _merged(of)

    return merged


def _checksum(target: Tensor) -> int:
    """A number that depends on each target and its place: the sum of hashes, by the steps of SplitMix64."""
    hashes = target * -0x61C8864680B583EB + torch.arange(1, len(target) + 1) * -0x40A7B892E31B1A47
    for multiplier, shift in ((-0x40A7B892E31B1A47, 30), (-0x6B2FB644ECCEEE15, 27)):
        hashes = (hashes ^ (hashes >> shift)) * multiplier
    return int((hashes ^ (hashes >> 31)).sum())


def _check_facts(of_ranks: list[list[int]]) -> None:
    """Raise ValueError, on every rank, unless the shards are those of one vocabulary and the targets are the same."""
    starts, columns, classes, checksums = zip(*of_ranks, strict=True)
    shards = sorted((start, start + count) for start, count in zip(starts, columns, strict=True) if count)
    ends = [0, *(end for _, end in shards)]
    if len(set(classes)) > 1 or ends[-1] != classes[0] or [start for start, _ in shards] != ends[:-1]:
        of = [[start, start + count] for start, count in zip(starts, columns, strict=True)]
        raise ValueError(
            f"npu_xent: the ranks' classes must make up one vocabulary, but are {of}, of {list(classes)} classes; pass "
            "num_classes, and class_range where the shards are not those of torch.chunk"
        )
    if len(set(checksums)) > 1:
        raise ValueError("npu_xent: target must be the same on all ranks of the group, but differs")


def _of_this_shard(
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shard: _Shard,
    options: dict[str, Any],
    wanted: _Wanted,
) -> dict[str, Tensor]:
    """What the shards exchange: [N] each, except `weights`, the sum of the class weights, and `start`, their place."""
    columns, dtype = rows[:, : shard.columns], _stats_dtype(rows)
    if shard.columns == 0:
        zeros = torch.zeros(target.numel(), dtype=dtype, device=rows.device)
        lse, low, picked, wsum, entropy, top1 = (zeros - math.inf, *(zeros,) * 4, zeros - 1)
    else:
        lse, low, picked, wsum, _, entropy, top1 = _ops.row_stats(
            columns,
            target,
            weight,
            need_wsum=wanted.need_wsum,
            need_entropy=wanted.need_entropy,
            need_top1=wanted.need_top1,
            read_ignored=wanted.read_ignored,
            **_of(options, _LOGITS),
            class_start=shard.start,
            num_classes=shard.num_classes,
        )
    found = {"lse": lse, "lse_low": low, "picked": picked}
    if wanted.need_wsum:
        weights = torch.full((1,), shard.columns, dtype=dtype, device=rows.device)
        if weight is not None:
            weights = weight.narrow(0, shard.start, shard.columns).sum(0, keepdim=True, dtype=dtype)
        found.update({"wsum": wsum, "weights": weights})
    if wanted.need_entropy:
        found["entropy"] = entropy
    if wanted.need_top1:
        scale = options["logit_scale"]
        largest = lse  # -inf
        if shard.columns != 0:
            largest = columns.amax(1) if scale > 0 else -columns.amin(1) if scale < 0 else torch.zeros_like(lse)
        # Ranks may be in any order. float32 has no integers above 2^24, so the start comes in two.
        start = [torch.full((1,), part, dtype=dtype, device=rows.device) for part in divmod(shard.start, 1 << 24)]
        found.update({"top1": top1.to(dtype), "largest": largest.to(dtype), "start": torch.cat(start)})
    return found


def _merged(of: dict[str, Tensor]) -> _Statistics:
    """Merge [ranks, N]. Differences of two lse are taken before they are rounded: logits may be far from 0."""
    lses, lows = of["lse"], of["lse_low"]
    highest = lses.amax(0)
    shift = highest.masked_fill(~highest.isfinite(), 0)
    log_sum = ((lses - shift) + lows).exp().sum(0).log()
    lse = shift + log_sum
    low = ((shift - lse) + log_sum).masked_fill(~lse.isfinite(), 0)
    below = (lses - lse) + (lows - low)  # the logarithm of each shard's probability
    wsum = entropy = top1 = None
    if "wsum" in of:  # a shard of only -inf has no lse to differ from
        masked = torch.zeros_like(of["weights"]).masked_fill(of["weights"] > 0, -math.inf)
        # A shard without weight adds nothing, also where `below` is -inf.
        shifts = (of["weights"] * below).masked_fill(of["weights"] == 0, 0)
        wsum = torch.where(lses == -math.inf, masked, of["wsum"] + shifts).sum(0)
    if "entropy" in of:
        shares = below.exp()
        entropy = (shares * (of["entropy"] - below)).masked_fill(shares == 0, 0).sum(0)
    if "top1" in of:  # of the shards with a largest logit, the one with the first classes decides
        leads = (of["largest"] == of["largest"].amax(0)) & (of["top1"] >= 0)
        for part in of["start"].split(1, 1):
            leads = leads & (part == part.where(leads, math.inf).amin(0))
        top1 = (leads & (of["top1"] == 1)).any(0) & lse.isfinite()
    return _Statistics(lse, low, of["picked"].sum(0), wsum, entropy, top1)


# Autograd -------------------------------------------------------------------------------------------------------------


def _row_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: tuple[Tensor, Tensor],
    shard: _Shard,
    consume: bool,
    **operands: Any,
) -> Tensor:
    """The gradient of this rank's columns, over the logits if `consume`."""
    operands.update({"class_start": shard.start, "num_classes": shard.num_classes})
    padding = logits.shape[1] - shard.columns
    lse, low = stats
    logits = logits.detach() if consume else logits
    if shard.columns == 0:
        grad = torch.zeros_like(logits[:, :0])
    elif consume and padding == 0:
        _ops.row_grad_(logits, target, weight, lse, low, **operands)
        return logits
    else:
        grad = _ops.row_grad(logits[:, : shard.columns], target, weight, lse, low, **operands)
    grad = pad(grad, (0, padding)) if padding else grad
    return logits.copy_(grad) if consume else grad


class _CrossEntropy(torch.autograd.Function):
    """The loss, lse and z-loss of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        totals: Tensor,
        shard: _Shard,
        group: dist.ProcessGroup | None,
        options: dict[str, Any],
        loss_dtype: torch.dtype,
        need_lse: bool,
        consume: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = _Wanted(need_wsum=options["label_smoothing"] != 0, read_ignored=need_lse)
        stats = _statistics(logits, target, weight, shard, group, options, wanted)
        loss, z_loss, _ = _ops.reduce_rows(
            target,
            weight,
            stats.lse,
            stats.lse_low,
            stats.picked,
            stats.wsum,
            totals,
            **_of(options, _LOSS),
            num_classes=shard.num_classes,
            loss_dtype=loss_dtype,
        )
        ctx.save_for_backward(logits, target, weight, totals, stats.lse, stats.lse_low)
        ctx.shard, ctx.options, ctx.consume = shard, options, consume
        ctx.set_materialize_grads(False)
        lse = stats.lse.clone()
        ctx.mark_non_differentiable(z_loss, *(() if need_lse else (lse,)))
        return loss, lse, z_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        logits, target, weight, totals, *stats = ctx.saved_tensors
        if grad_loss is None and grad_lse is None:
            return (None,) * 10
        if grad_loss is None:
            grad_loss = totals.new_zeros(target.shape if ctx.options["reduction"] == "none" else ())
        operands = {"totals": totals, "grad_loss": grad_loss, "grad_lse": grad_lse}
        grad = _row_grad(logits, target, weight, stats, ctx.shard, ctx.consume, **operands, **ctx.options)
        return grad, *(None,) * 9


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities, entropy and top-1 of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        shard: _Shard,
        group: dist.ProcessGroup | None,
        options: dict[str, Any],
        need_entropy: bool,
        need_top1: bool,
        consume: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        wanted = _Wanted(need_entropy=need_entropy, need_top1=need_top1)
        stats = _statistics(logits, target, None, shard, group, options, wanted)
        ignored = target == options["ignore_index"]
        log_probs = ((stats.picked - stats.lse) - stats.lse_low).masked_fill(~stats.lse.isfinite(), math.nan)
        log_probs = log_probs.masked_fill(ignored, 0)
        entropy = stats.entropy if stats.entropy is None else stats.entropy.masked_fill(ignored, 0)
        top1 = stats.top1 if stats.top1 is None else stats.top1 & ~ignored
        if top1 is not None:
            ctx.mark_non_differentiable(top1)
        ctx.save_for_backward(logits, target, stats.lse, stats.lse_low, entropy)
        ctx.shard, ctx.options, ctx.consume = shard, options, consume
        ctx.set_materialize_grads(False)
        return log_probs, entropy, top1

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        logits, target, lse, low, entropy = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 8
        grad_loss = torch.zeros_like(lse) if grad_log_probs is None else -grad_log_probs
        operands = {"totals": None, "grad_loss": grad_loss, "reduction": "none"}
        if grad_entropy is not None:
            operands.update({"entropy": entropy, "grad_entropy": grad_entropy.contiguous()})
        grad = _row_grad(logits, target, None, (lse, low), ctx.shard, ctx.consume, **operands, **ctx.options)
        return grad, *(None,) * 7


# With a linear layer --------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """What does not change from call to call."""

    shard: _Shard
    group: dist.ProcessGroup | None
    options: dict[str, Any]
    loss_dtype: torch.dtype
    chunk_rows: int
    sequence_parallel: bool
    reduce_input_grad: bool


def _chunk_rows(rows: int, classes: int, element_size: int) -> int:
    """As csrc/linear_rows.cpp, from what all ranks know: they must make the same collectives."""
    fewest = 256 if element_size == 2 else 128
    few = min(max(rows * 4 // (25 * element_size) // 32 * 32, fewest), 512)
    return max(few, (32 << 20) // (max(1, classes) * element_size))


class _Products:
    """The logits of chunks of rows, and the sums of the gradients that come from theirs."""

    def __init__(
        self,
        rows: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        layer: _Layer,
        wanted: list[bool],
    ) -> None:
        self.rows, columns = rows, layer.shard.columns
        self.target, self.ignore_index = target, layer.options["ignore_index"]
        self.weight, self.bias = linear_weight[:columns], linear_bias if linear_bias is None else linear_bias[:columns]
        self.padding = len(linear_weight) - columns
        # One at least: without rows too, ranks compare their classes.
        self.chunks = [slice(i, i + layer.chunk_rows) for i in range(0, max(1, len(rows)), layer.chunk_rows)]
        # Sums over chunks are kept in float32.
        exact = torch.float32 if rows.element_size() == 2 and len(self.chunks) > 1 else rows.dtype
        self.grad_rows = torch.empty_like(rows) if wanted[0] else None
        self.grad_weight = torch.zeros_like(self.weight, dtype=exact) if wanted[1] else None
        self.grad_bias = None
        if self.bias is not None and wanted[2]:
            self.grad_bias = torch.zeros_like(self.bias, dtype=_stats_dtype(rows))

    def logits(self, chunk: slice) -> Tensor:
        """The product of one chunk."""
        return torch.nn.functional.linear(self.rows[chunk], self.weight, self.bias)

    def add(self, chunk: slice, grad: Tensor) -> None:
        """Add what the gradient of a chunk's logits gives."""
        if self.grad_rows is not None:
            torch.mm(grad, self.weight, out=self.grad_rows[chunk])
        if self.grad_weight is not None:
            rows = without_ignored(self.rows[chunk], self.target[chunk], self.ignore_index)
            if self.grad_weight.dtype == grad.dtype:
                self.grad_weight.addmm_(grad.T, rows)
            else:
                self.grad_weight.add_(grad.T @ rows)
        if self.grad_bias is not None:
            self.grad_bias.add_(grad.sum(0, dtype=self.grad_bias.dtype))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the rows (this rank's part), the weight and the bias, in their dtype."""
        weight, bias = (
            grad if grad is None else pad(grad.to(self.rows.dtype), (0,) * (2 * grad.dim() - 1) + (self.padding,))
            for grad in (self.grad_weight, self.grad_bias)
        )
        return self.grad_rows, weight, bias


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of a linear layer's output."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        totals: Tensor,
        layer: _Layer,
    ) -> Tensor:
        if layer.sequence_parallel:
            own, rows = rows, rows.new_empty(len(target), rows.shape[1])
            if own.numel() != 0:
                _all_gather(rows, own.contiguous(), group=layer.group)
        at_once = layer.options["reduction"] != "none" and rows.dtype != torch.float16
        wanted = [at_once and needed for needed in ctx.needs_input_grad[:3]]
        products = _Products(rows, linear_weight, linear_bias, target, layer, wanted)
        need = _Wanted(need_wsum=layer.options["label_smoothing"] != 0)
        found: list[_Statistics] = []
        one = totals.new_ones(())

        def start(chunk: slice) -> tuple[Tensor, Callable[[], _Statistics]]:
            logits = products.logits(chunk)
            mine = _of_this_shard(logits, target[chunk], weight, layer.shard, layer.options, need)
            wait = torch.compiler.is_compiling()
            return logits, _gather(mine, target[chunk], layer.shard, layer.group, wait)

        # The product of the next chunk goes on while the statistics of this one are gathered.
        started = [start(products.chunks[0])]
        for i, chunk in enumerate(products.chunks):
            if i + 1 < len(products.chunks):
                started.append(start(products.chunks[i + 1]))
            logits, merged = started.pop(0)
            stats = merged()
            found.append(stats)
            if any(wanted):
                operands = {"totals": totals, "grad_loss": one, **layer.options}
                products.add(
                    chunk,
                    _row_grad(logits, target[chunk], weight, (stats.lse, stats.lse_low), layer.shard, True, **operands),
                )
        nothing = totals.new_zeros(0)
        lse = torch.cat([nothing, *(of.lse for of in found)])
        low = torch.cat([nothing, *(of.lse_low for of in found)])
        picked = torch.cat([nothing, *(of.picked for of in found)])
        wsum = torch.cat([nothing, *(of.wsum for of in found if of.wsum is not None)]) if need.need_wsum else None
        loss: Tensor
        loss, _, _ = _ops.reduce_rows(
            target,
            weight,
            lse,
            low,
            picked,
            wsum,
            totals,
            **_of(layer.options, _LOSS),
            num_classes=layer.shard.num_classes,
            loss_dtype=layer.loss_dtype,
        )
        ctx.layer, ctx.at_once = layer, at_once
        saved = products.gradients() if at_once else (rows, linear_weight, linear_bias)
        ctx.save_for_backward(*saved, target, weight, totals, lse, low)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *saved, target, weight, totals, lse, low = ctx.saved_tensors
        layer: _Layer = ctx.layer
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "npu_xent: double backward through vocab_parallel_linear_cross_entropy is not supported; leave "
                "create_graph=True out"
            )
        if ctx.at_once:
            grads = [grad if grad is None else (grad * grad_loss).to(grad.dtype) for grad in saved]
        else:
            products = _Products(saved[0], saved[1], saved[2], target, layer, list(ctx.needs_input_grad[:3]))
            # The backward may be called under autocast where the forward was not.
            device = grad_loss.device.type
            with torch.autocast(device, enabled=False) if is_autocast_on(grad_loss) else nullcontext():
                for chunk in products.chunks:
                    of_chunk = grad_loss if grad_loss.dim() == 0 else grad_loss[chunk]
                    operands = {"totals": totals, "grad_loss": of_chunk, **layer.options}
                    stats = (lse[chunk], low[chunk])
                    logits = products.logits(chunk)
                    grad = _row_grad(logits, target[chunk], weight, stats, layer.shard, True, **operands)
                    products.add(chunk, grad)
            grads = list(products.gradients())
        if grads[0] is not None and layer.sequence_parallel:
            own = grads[0].new_empty(len(grads[0]) // dist.get_world_size(layer.group), grads[0].shape[1])
            if own.numel() != 0:
                _reduce_scatter(own, grads[0], group=layer.group)
            grads[0] = own
        elif grads[0] is not None and grads[0].numel() != 0 and layer.reduce_input_grad:
            dist.all_reduce(grads[0], group=layer.group)
        return (*grads, *(None,) * 4)
