"""Losses of logits whose classes are sharded over the ranks of a process group (tensor parallelism)::

    vocab_parallel_cross_entropy        the loss
    vocab_parallel_token_log_probs      log-probabilities, entropy and accuracy of tokens

Each rank passes its classes of every row, and the same target. Every rank gets the same results, bit for bit. The
forward makes one all_gather of a few numbers a row, the backward no communication at all. torch.distributed moves the
data; its backend must support all_gather_into_tensor on the tensors' device (gloo, HCCL, NCCL).

How the statistics of shards merge is in csrc/options.h.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ._loading import prepare
from ._log_probs import TokenLogProbs
from ._options import check_loss_dtype, check_ranges, check_types
from ._tensors import LOGITS, check_tensors, index_target
from .functional import CrossEntropyOutput

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_token_log_probs"]

_ops = torch.ops.npu_xent
# The name in torch 2.13 and newer, where the older one warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
    normalizer: Tensor | dist.ProcessGroup | None = None,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of logits whose classes are sharded over the ranks of a process group.

    The loss is that of npu_xent.cross_entropy on the whole logits: smoothing and z-loss are of the whole vocabulary.
    All ranks must call it, with the same target and options.

    Args:
        logits: [..., C_local], this rank's classes, last; float32, bfloat16, float16 or float64. C_local may be 0.
        target: class indices in [0, num_classes) or ignore_index, [...], any integer dtype; the same on all ranks.
        weight: one weight for each class of the whole vocabulary, [num_classes], the same on all ranks.
        group: the ranks that share the classes, in the order of the classes. Default: all.
        num_classes: the number of classes of all ranks. None: C_local times the number of ranks, which then must have
            equally many.
        class_range: (begin, end), the classes of this rank. None: if C_local is the size of this rank's chunk of
            torch.chunk(vocabulary, ranks), that chunk; otherwise, if all ranks together have room for num_classes,
            classes from rank * C_local on. Columns from end or num_classes on are padding: they are not read, and get
            gradient 0.
        ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale: as in npu_xent.cross_entropy.
        reduction: "none", "mean" or "sum". "mean" divides by the weight of this rank's rows that are not ignored.
        loss_dtype: float32, float64 (not on an NPU) or the dtype of logits.
        consume_logits: the backward overwrites the logits with their gradient.
        return_lse: also return logsumexp of every row over all classes. It is differentiable.
        normalizer: for "mean" and "sum", what the sum is divided by: a tensor of one value (it gets no gradient), or a
            process group, over whose ranks the weights that "mean" divides by are summed.

    Returns:
        The loss, [...] for "none", else []; with return_lse a CrossEntropyOutput(loss, lse, None), lse [...] in float32
        (float64 for float64 logits). Differentiable in the logits, once.

    Raises:
        ValueError: a shape, a range of classes or an option that breaks the rules above. With the environment variable
            NPU_XENT_DEBUG=1 also, on every rank, shapes or options in which ranks differ; without it, they are not
            compared, and the collective may hang or give wrong results.
        TypeError: an argument of a wrong type or dtype.
        IndexError: a target that is out of range, on the CPU.
        RuntimeError: no process group; a second derivative; a second backward after consume_logits.
    """
    name = "vocab_parallel_cross_entropy"
    check_tensors(name, logits=logits, target=target, weight=weight)
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    check_types("cross_entropy", {**options, "loss_dtype": loss_dtype})
    check_ranges(options)
    check_loss_dtype(loss_dtype, logits)
    if normalizer is not None and reduction == "none":
        raise ValueError(f'npu_xent.{name}: normalizer divides a sum; with reduction "none" leave it out')
    rows, shard = _rows_of(name, logits, target, group, num_classes, class_range, consume_logits)
    if weight is not None and weight.shape != (shard.num_classes,):
        raise ValueError(
            f"npu_xent.{name}: weight must have one value for each of the {shard.num_classes} classes of all ranks, "
            f"but has shape {list(weight.shape)}"
        )
    indices = index_target(target).reshape(-1)
    _compare(name, group, rows=len(rows), num_classes=shard.num_classes, **options, return_lse=return_lse)
    of_all = {"num_classes": shard.num_classes}
    totals = _ops.reduce_rows(indices, weight, **_of(options, _LOSS), **of_all, loss_dtype=_stats_dtype(rows))[2]
    totals = _normalized(totals, reduction, normalizer)
    if reduction == "sum" and normalizer is not None:
        options["reduction"] = "mean"
    loss, lse = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, indices, weight, totals, shard, group, options, loss_dtype, return_lse, consume_logits
    )
    loss = loss.view(target.shape) if reduction == "none" else loss
    return CrossEntropyOutput(loss, lse.view(target.shape), None) if return_lse else loss


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
    name = "vocab_parallel_token_log_probs"
    check_tensors(name, logits=logits, target=target)
    options = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
    }
    check_types("token_log_probs", {**options, "chunk_rows": None})
    check_ranges(options)
    rows, shard = _rows_of(name, logits, target, group, num_classes, class_range, consume_logits)
    indices = index_target(target).reshape(-1)
    wanted = {"return_entropy": return_entropy, "return_top1": return_top1}
    _compare(name, group, rows=len(rows), num_classes=shard.num_classes, **options, **wanted)
    log_probs, *extras = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        rows, indices, shard, group, options, return_entropy, return_top1, consume_logits
    )
    log_probs = log_probs.view(target.shape)
    if not (return_entropy or return_top1):
        return log_probs  # type: ignore[no-any-return]
    return TokenLogProbs(log_probs, *(x if x is None else x.view(target.shape) for x in extras))


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
    if num_classes is None:
        if class_range is not None:
            raise ValueError(f"npu_xent.{name}: class_range needs num_classes, the number of classes of all ranks")
        return _Shard(rank * columns, columns, ranks * columns)
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
    if not dist.is_initialized():
        raise RuntimeError(f"npu_xent.{name}: call torch.distributed.init_process_group first")
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"npu_xent.{name}: this rank is not in the group")
    shard = _shard_of(name, logits.shape[-1], ranks, rank, num_classes, class_range)
    if shard.num_classes == 0:
        raise ValueError(f"npu_xent.{name}: logits must have at least one class on some rank")
    if consume_logits and logits.requires_grad and torch.is_grad_enabled():
        if logits.is_leaf:
            raise ValueError(
                f"npu_xent.{name}: consume_logits would overwrite a leaf of the autograd graph; leave it off, or pass "
                "the output of an operation"
            )
        if not logits.is_contiguous():
            raise ValueError(f"npu_xent.{name}: consume_logits needs contiguous logits; leave it off")
    prepare(logits)
    return logits.reshape(target.numel(), logits.shape[-1]), shard


def _compare(name: str, group: dist.ProcessGroup | None, **facts: Any) -> None:
    """With NPU_XENT_DEBUG=1, raise ValueError on every rank if ranks differ in a fact."""
    if torch.compiler.is_compiling() or os.environ.get("NPU_XENT_DEBUG") != "1":
        return
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, facts, group=group)
    for fact in facts:
        values = [of_rank.get(fact) for of_rank in of_ranks]
        if any(value != values[0] for value in values):
            raise ValueError(f"npu_xent.{name}: {fact} must be the same on all ranks, but is {values}")


def _normalized(totals: Tensor, reduction: str, normalizer: Tensor | dist.ProcessGroup | None) -> Tensor:
    """The totals of reduce_rows with what the caller divides by instead."""
    if normalizer is None or reduction == "none":
        return totals
    if isinstance(normalizer, Tensor):
        divisor = normalizer.detach().to(totals).reshape(1).expand(2)
        return torch.cat((divisor, totals[2:]))
    kept = totals[:2].clone()
    dist.all_reduce(kept, group=normalizer)
    return torch.cat((kept, totals[2:]))


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
    mine = _of_this_shard(rows, target, weight, shard, options, wanted)
    packed = torch.cat([part.reshape(-1) for part in mine.values()])
    ranks = dist.get_world_size(group)
    gathered = packed.new_empty(ranks * len(packed))
    _all_gather(gathered, packed, group=group)
    parts = gathered.view(ranks, -1).split([part.numel() for part in mine.values()], 1)
    return _merged(dict(zip(mine, parts, strict=True)))


def _of_this_shard(
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shard: _Shard,
    options: dict[str, Any],
    wanted: _Wanted,
) -> dict[str, Tensor]:
    """The statistics that the shards exchange: [N] each, and `weights`, the sum of the shard's class weights."""
    columns, dtype = rows[:, : shard.columns], _stats_dtype(rows)
    if shard.columns == 0:
        zeros = torch.zeros(len(target), dtype=dtype, device=rows.device)
        lse, low, picked, wsum, entropy, top1 = (zeros - math.inf, *(zeros,) * 5)
    else:
        lse, low, picked, wsum, _, entropy, top1 = _ops.row_stats(
            columns,
            target,
            weight,
            **wanted._asdict(),
            **_of(options, _LOGITS),
            class_start=shard.start,
            num_classes=shard.num_classes,
        )
    found = {"lse": lse, "lse_low": low, "picked": picked}
    if wanted.need_wsum:
        weights = torch.full((1,), shard.columns, dtype=dtype, device=rows.device)
        if weight is not None:
            weights = weight.narrow(0, shard.start, shard.columns).sum(0, keepdim=True, dtype=dtype)
        found |= {"wsum": wsum, "weights": weights}
    if wanted.need_entropy:
        found["entropy"] = entropy
    if wanted.need_top1:
        scale = options["logit_scale"]
        largest = lse  # -inf
        if shard.columns != 0:
            largest = columns.amax(1) if scale > 0 else -columns.amin(1) if scale < 0 else torch.zeros_like(lse)
        found |= {"top1": top1.to(dtype), "largest": largest.to(dtype)}
    return found


def _merged(of: dict[str, Tensor]) -> _Statistics:
    """Merge [ranks, N]. Differences of two lse are taken before they are rounded: logits may be far from 0."""
    lses, lows = of["lse"], of["lse_low"]
    highest = lses.amax(0)
    shift = highest.masked_fill(highest == -math.inf, 0)
    log_sum = ((lses - shift) + lows).exp().sum(0).log()
    lse = shift + log_sum
    low = ((shift - lse) + log_sum).masked_fill(~lse.isfinite(), 0)
    below = (lses - lse) + (lows - low)  # the logarithm of each shard's probability
    wsum = entropy = top1 = None
    if "wsum" in of:  # a shard of only -inf has no lse to differ from
        masked = torch.zeros_like(of["weights"]).masked_fill(of["weights"] > 0, -math.inf)
        wsum = torch.where(lses == -math.inf, masked, of["wsum"] + of["weights"] * below).sum(0)
    if "entropy" in of:
        shares = below.exp()
        entropy = (shares * (of["entropy"] - below)).masked_fill(shares == 0, 0).sum(0)
    if "top1" in of:  # the first of the largest of its shard, larger than those before, no smaller than those after
        largest = of["largest"]
        nothing = torch.full_like(largest[:1], -math.inf)
        before = torch.cat((nothing, largest)).cummax(0).values[:-1]
        after = torch.cat((largest, nothing)).flip(0).cummax(0).values.flip(0)[1:]
        top1 = ((of["top1"] == 1) & (largest > before) & (largest >= after)).any(0) & lse.isfinite()
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
    operands |= {"class_start": shard.start, "num_classes": shard.num_classes}
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
    """The loss and lse of rows."""

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
    ) -> tuple[Tensor, Tensor]:
        wanted = _Wanted(need_wsum=options["label_smoothing"] != 0, read_ignored=need_lse)
        stats = _statistics(logits, target, weight, shard, group, options, wanted)
        loss, _, _ = _ops.reduce_rows(
            target,
            weight,
            *stats[:4],
            totals,
            **_of(options, _LOSS),
            num_classes=shard.num_classes,
            loss_dtype=loss_dtype,
        )
        ctx.save_for_backward(logits, target, weight, totals, stats.lse, stats.lse_low)
        ctx.shard, ctx.options, ctx.consume = shard, options, consume
        ctx.set_materialize_grads(False)
        lse = stats.lse.clone()
        if not need_lse:
            ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
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
            operands |= {"entropy": entropy, "grad_entropy": grad_entropy.contiguous()}
        grad = _row_grad(logits, target, None, (lse, low), ctx.shard, ctx.consume, **operands, **ctx.options)
        return grad, *(None,) * 7
