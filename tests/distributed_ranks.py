"""The ranks of test_distributed.py: each runs every case and writes what came out, by case, as JSON.

python distributed_ranks.py RANKS FOLDER [CASE ...]
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from option_values import factors, keywords
from rank_traffic import traffic
from reference import case_id, make_weight, pairwise
from torch import Tensor
from torch.nn import functional as F

import npu_xent
from npu_xent import distributed
from npu_xent.compat.mindformers import CrossEntropyLoss

N = 37  # rows
SIZES = {"even": 60, "uneven": 61, "fewer than ranks": 3}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
LOSSES = pairwise(
    factors(
        *("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", "softcap", "logit_scale"),
        size=tuple(SIZES),
        return_lse=(False, True),
        return_z_loss=(False, True),
        padding=(0, 3),
        consume=(False, True),
    )
)
LINEAR = pairwise(
    factors(
        *("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", "softcap", "logit_scale"),
        size=tuple(SIZES),
        bias=(False, True),
        sequence_parallel=(False, True),
        chunk_rows=(None, 5),
        padding=(0, 3),
    )
)
LOG_PROBS = pairwise(
    factors(
        *("dtype", "softcap", "logit_scale"),
        size=tuple(SIZES),
        temperature=(1.0, 0.7),
        return_entropy=(False, True),
        return_top1=(False, True),
        consume=(False, True),
    )
)


class Rank:
    """Which shard this process has."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def bounds(self, classes: int) -> tuple[int, int]:
        """As torch.chunk's."""
        chunk = -(-classes // self.ranks)
        return min(classes, self.rank * chunk), min(classes, (self.rank + 1) * chunk)

    def shard(self, logits: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
        """This rank's classes as a leaf, and as the output of an operation. Padding is NaN."""
        begin, end = self.bounds(logits.shape[-1])
        leaf = logits[..., begin:end].clone().requires_grad_()
        return leaf, torch.nn.functional.pad(leaf, (0, padding), value=float("nan")) if padding else leaf * 1


def problem(classes: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same on all ranks; some rows are ignored, and some logits are -inf."""
    generator = torch.Generator().manual_seed(classes)
    logits = (3 * torch.randn(N, classes, generator=generator) + offset).to(dtype)
    target = torch.randint(classes, (N,), generator=generator)
    target[::5] = -100
    return logits, target


def close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """Within the tolerance of results in `dtype`."""
    error = (actual.detach().double() - expected.detach().double()).abs()
    allowed = TOLERANCE[dtype] * (size + expected.detach().abs())
    assert bool((error <= allowed).all()), f"{name} is off by {float((error / allowed).max()):.3g} of the tolerance"


def facts(dtype: torch.dtype) -> int:
    """How many values the four integers of 64 bits are that ranks compare."""
    return 4 if dtype == torch.float64 else 8


def counted(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What a call returns, and how many values each of its collectives sent."""
    sent: list[int] = []
    gather = distributed._all_gather

    def count(out: Tensor, mine: Tensor, **options: Any) -> Any:
        sent.append(mine.numel())
        return gather(out, mine, **options)

    with mock.patch.object(distributed, "_all_gather", count):
        return call(), sent


def loss(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """vocab_parallel_cross_entropy beside cross_entropy of the whole logits in float64."""
    dtype, classes = case["dtype"], SIZES[case["size"]]
    logits, target = problem(classes, dtype)
    weight = make_weight(classes, torch.float32, torch.device("cpu")) if case["weighted"] else None
    options = {name: value for name, value in keywords(case).items() if name != "loss_dtype"}
    named = {name: options[name] for name in ("reduction", "label_smoothing", "lse_square_scale", "softcap")}
    named["logit_scale"] = case["logit_scale"]
    leaf, shard = at.shard(logits, case["padding"])
    begin, end = at.bounds(classes)
    out, sent = counted(
        lambda: distributed.vocab_parallel_cross_entropy(
            shard,
            target,
            weight,
            num_classes=classes,
            class_range=(begin, end),
            **named,
            loss_dtype=torch.float32 if dtype != torch.float64 else dtype,
            return_lse=case["return_lse"],
            return_z_loss=case["return_z_loss"],
            consume_logits=case["consume"],
        )
    )
    smoothed = named["label_smoothing"] != 0
    assert sent == [N * (3 + smoothed) + smoothed + facts(dtype)], f"sent {sent} values"
    mine, lse, z_loss = (out, None, None) if isinstance(out, Tensor) else out
    assert (lse is not None, z_loss is not None) == (case["return_lse"], case["return_z_loss"])

    whole = logits.double().requires_grad_()
    expected = npu_xent.cross_entropy(
        whole, target, None if weight is None else weight.double(), **named, return_lse=True, return_z_loss=True
    )
    upstream = torch.linspace(0.5, 2.0, N) if named["reduction"] == "none" else torch.tensor(1.5)
    scalars = [(mine.double() * upstream).sum(), (expected.loss * upstream).sum()]
    if lse is not None:
        scalars[0] = scalars[0] + lse.double().sin().sum()
        scalars[1] = scalars[1] + expected.lse.sin().sum()
    (grad,), (true,) = torch.autograd.grad(scalars[0], leaf), torch.autograd.grad(scalars[1], whole)
    exact = torch.float32 if dtype != torch.float64 else dtype
    size = float(logits.abs().max()) ** (2 if named["lse_square_scale"] else 1)
    close("loss", mine, expected.loss, exact, size)
    if lse is not None:
        close("lse", lse, expected.lse, exact, float(logits.abs().max()))
    if z_loss is not None:
        close("z_loss", z_loss, expected.z_loss, exact, size)
    close("gradient", grad, true[:, begin:end], dtype, float(true.abs().max()))
    return [x for x in (mine, lse, z_loss) if x is not None]


def log_probs(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """vocab_parallel_token_log_probs beside token_log_probs of the whole logits in float64."""
    dtype, classes = case["dtype"], SIZES[case["size"]]
    logits, target = problem(classes, dtype)
    target[4:20] = logits[4:20].argmax(1)
    # All equal but the last: only the first of them is top-1, and not the first of another shard.
    logits[1:4, :-1] = logits[1:4].amax(1, keepdim=True)
    target[1:4] = torch.tensor([0, min(-(-classes // at.ranks), classes - 1), classes - 1])
    options = {name: case[name] for name in ("softcap", "logit_scale", "temperature", "return_entropy", "return_top1")}
    leaf, shard = at.shard(logits)
    out, sent = counted(
        lambda: distributed.vocab_parallel_token_log_probs(
            shard, target, num_classes=classes, **options, consume_logits=case["consume"]
        )
    )
    by_row = 3 + case["return_entropy"] + 2 * case["return_top1"]
    assert sent == [N * by_row + 2 * case["return_top1"] + facts(dtype)], f"sent {sent} values"
    whole = logits.double().requires_grad_()
    expected = npu_xent.token_log_probs(whole, target, **options)
    mine, true = ((x, None, None) if isinstance(x, Tensor) else x for x in (out, expected))
    exact = torch.float32 if dtype != torch.float64 else dtype
    scalars = []
    for of in (mine, true):
        scalars.append((of[0].double() * torch.linspace(0.5, 2.0, N)).sum())
        if of[1] is not None:
            scalars[-1] = scalars[-1] + of[1].double().sin().sum()
    (grad,), (true_grad,) = torch.autograd.grad(scalars[0], leaf), torch.autograd.grad(scalars[1], whole)
    begin, end = at.bounds(classes)
    close("log_probs", mine[0], true[0], exact, 20.0)
    close("gradient", grad, true_grad[:, begin:end], dtype, 10.0)
    if mine[1] is not None:
        close("entropy", mine[1], true[1], exact, 20.0)
    if mine[2] is not None:
        assert torch.equal(mine[2], true[2]), "top1 differs"
    return [x for x in mine if x is not None]


def linear(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """vocab_parallel_linear_cross_entropy beside linear_cross_entropy of the whole layer in float64."""
    dtype, classes, features = case["dtype"], SIZES[case["size"]], 8
    generator = torch.Generator().manual_seed(classes)
    rows = 12 * at.ranks
    x, layer = (torch.randn(size, features, generator=generator).to(dtype) for size in (rows, classes))
    bias = torch.randn(classes, generator=generator).to(dtype) if case["bias"] else None
    target = torch.randint(classes, (rows,), generator=generator)
    target[::5] = -100
    x[0], x[5] = float("nan"), float("inf")  # ignored
    weight = make_weight(classes, torch.float32, torch.device("cpu")) if case["weighted"] else None
    options = {name: case[name] for name in ("reduction", "label_smoothing", "lse_square_scale", "softcap")}
    options["logit_scale"] = case["logit_scale"]
    begin, end = at.bounds(classes)
    mine = [x.chunk(at.ranks)[at.rank] if case["sequence_parallel"] else x, layer[begin:end]]
    mine += [] if bias is None else [bias[begin:end]]
    mine = [mine[0], *(torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, case["padding"])) for t in mine[1:])]
    mine = [t.clone().requires_grad_() for t in mine]
    loss, sent = counted(
        lambda: distributed.vocab_parallel_linear_cross_entropy(
            *mine[:2],
            target,
            linear_bias=mine[2] if bias is not None else None,
            weight=weight,
            num_classes=classes,
            class_range=(begin, end),
            sequence_parallel=case["sequence_parallel"],
            chunk_rows=case["chunk_rows"],
            loss_dtype=torch.float32 if dtype != torch.float64 else dtype,
            **options,
        )
    )
    chunks = 1 if case["chunk_rows"] is None else -(-rows // 5)
    assert len(sent) == chunks + case["sequence_parallel"], f"{len(sent)} collectives"
    whole = [t.double().requires_grad_() for t in (x, layer, bias) if t is not None]
    expected = npu_xent.linear_cross_entropy(
        *whole[:2],
        target,
        linear_bias=whole[2] if bias is not None else None,
        weight=None if weight is None else weight.double(),
        **options,
    )
    upstream = torch.linspace(0.5, 2.0, rows) if options["reduction"] == "none" else torch.tensor(1.5)
    grads = torch.autograd.grad((loss.double() * upstream).sum(), mine)
    true = torch.autograd.grad((expected * upstream).sum(), whole)
    # The logits are rounded to dtype here.
    close("loss", loss, expected, dtype, 60.0 * float(expected.abs().max() if options["reduction"] == "sum" else 1))
    shares = [true[0].chunk(at.ranks)[at.rank] if case["sequence_parallel"] else true[0]]
    shares += [t[begin:end] for t in true[1:]]
    for name, grad, share in zip(("input", "linear_weight", "linear_bias"), grads, shares, strict=False):
        size = 20.0 * float(max(t.abs().max() for t in true))
        close(f"gradient of {name}", grad[: len(share)], share, dtype, size)
        assert not grad[len(share) :].any()
    return [loss] if case["sequence_parallel"] else [loss, grads[0]]


def other_orders(at: Rank, _: Any) -> list[Tensor]:
    """The last rank has the first classes: of equal logits the first is top-1."""
    found = []
    for classes in SIZES.values():
        begin, end = Rank(at.ranks - 1 - at.rank, at.ranks).bounds(classes)
        logits, target = torch.zeros(2 * classes, classes), torch.arange(classes).repeat(2)
        logits[classes:, 1::3] = 1
        mine = distributed.vocab_parallel_token_log_probs(
            logits[:, begin:end], target, num_classes=classes, class_range=(begin, end), return_top1=True
        )
        assert torch.equal(mine.top1, npu_xent.token_log_probs(logits, target, return_top1=True).top1)
        found.append(mine.top1)
    return found


def without_rows(at: Rank, _: Any) -> list[Tensor]:
    """The linear loss of no rows, as on one rank, with gradients; classes that overlap raise on every rank."""
    layer, y = torch.linspace(-1, 1, 60 * 8).view(60, 8), torch.zeros(0, dtype=torch.int64)
    begin, end = at.bounds(60)
    found = []
    for reduction, sequence_parallel, smoothing, normalizer in (
        ("mean", False, 0.0, None),
        ("mean", True, 0.1, None),
        ("none", False, 0.1, None),
        ("none", True, 0.0, None),
        ("sum", False, 0.0, dist.group.WORLD),
        ("mean", True, 0.1, dist.group.WORLD),
    ):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        of_shard = {"sequence_parallel": sequence_parallel, "normalizer": normalizer, "num_classes": 60}
        leaves = [torch.zeros(0, 8), layer[begin:end].clone(), torch.ones(end - begin)]
        leaves = [t.requires_grad_() for t in leaves]

        def call(x: Tensor, w: Tensor, bias: Tensor, more: dict[str, Any] = options | of_shard) -> Tensor:
            return distributed.vocab_parallel_linear_cross_entropy(x, w, y, linear_bias=bias, **more)

        mine, sent = counted(lambda call=call, leaves=leaves: call(*leaves))
        if normalizer is not None:  # which divides a sum by the sum of weights
            options["reduction"] = "mean"
        true = npu_xent.linear_cross_entropy(torch.zeros(0, 8), layer, y, **options)
        torch.testing.assert_close(mine, true, equal_nan=True)
        assert [size for size in sent if size] == [facts(torch.float32) + (smoothing != 0)], f"sent {sent} values"
        grads = torch.autograd.grad(mine.sum(), leaves)
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
        assert not any(grad.any() for grad in grads)
        if at.ranks > 1:
            with pytest.raises(ValueError, match="classes must make up one vocabulary"):
                call(*leaves, options | of_shard | {"normalizer": None, "class_range": (0, end - begin)})
        found.append(mine.detach())
    return found


def masked_classes(at: Rank, _: Any) -> list[Tensor]:
    """Rows in which whole shards are -inf, and rows without any finite logit: as on one rank."""
    logits, target = problem(60, torch.float32)
    logits[:10, :30] = -torch.inf
    logits[10:12] = -torch.inf
    target[:10], target[10:12] = 45, 3
    leaf, shard = at.shard(logits)
    begin, end = at.bounds(60)
    out = []
    for smoothing in (0.0, 0.1):
        whole = logits.clone().requires_grad_()
        mine = distributed.vocab_parallel_cross_entropy(shard, target, label_smoothing=smoothing, num_classes=60)
        true = npu_xent.cross_entropy(whole, target, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(mine, true, equal_nan=True)
        (grad,) = torch.autograd.grad(mine.sum(), leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(true.sum(), whole)
        torch.testing.assert_close(grad, expected[:, begin:end], equal_nan=True)
        out.append(mine)
    return out


def far_from_zero(at: Rank, _: Any) -> list[Tensor]:
    """Logits shifted by 1e4, where float32 has steps of 0.001: as exact as on one rank."""
    logits, target = problem(60, torch.float32, 1e4)
    leaf, shard = at.shard(logits)
    begin, end = at.bounds(60)
    whole = logits.double().requires_grad_()
    true = npu_xent.cross_entropy(whole, target, reduction="none")
    mine = distributed.vocab_parallel_cross_entropy(shard, target, num_classes=60)
    torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=1e-6)
    lp = distributed.vocab_parallel_token_log_probs(shard, target, num_classes=60, return_entropy=True)
    entropy = npu_xent.token_log_probs(whole, target, return_entropy=True).entropy
    torch.testing.assert_close(lp.entropy.double(), entropy, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(lp.log_probs.double(), -true, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(mine.sum(), leaf)
    (expected,) = torch.autograd.grad(true.sum(), whole)
    torch.testing.assert_close(grad.double(), expected[:, begin:end], rtol=2e-6, atol=2e-6)
    return [mine, *lp[:2]]


def normalizers(at: Rank, _: Any) -> list[Tensor]:
    """A tensor, and a process group whose kept weights are summed."""
    logits, target = problem(60, torch.float32)
    weight = make_weight(60, torch.float32, torch.device("cpu"))
    leaf, shard = at.shard(logits)
    begin, end = at.bounds(60)
    out = []
    sums = npu_xent.cross_entropy(logits.double(), target, weight.double(), reduction="sum", label_smoothing=0.1)
    kept = weight[target[target >= 0]].double().sum()
    alone = float(kept) * at.ranks
    world = dist.group.WORLD
    for normalizer, divisor in ((torch.tensor(7.0), 7.0), (world, alone), ((world, world), alone * at.ranks)):
        for reduction in ("mean", "sum"):
            mine = distributed.vocab_parallel_cross_entropy(
                shard, target, weight, reduction=reduction, label_smoothing=0.1, normalizer=normalizer, num_classes=60
            )
            torch.testing.assert_close(mine.double(), sums / divisor, rtol=1e-5, atol=0)
            (grad,) = torch.autograd.grad(mine, leaf, retain_graph=True)
            whole = logits.clone().requires_grad_()
            true = npu_xent.cross_entropy(whole, target, weight, reduction="sum", label_smoothing=0.1) / divisor
            torch.testing.assert_close(grad, torch.autograd.grad(true, whole)[0][:, begin:end])
            out.append(mine)
    return out


def data_parallel(at: Rank, _: Any) -> list[Tensor]:
    """Two by two ranks, as in docs/scaling.md: shares sum to the mean, and averaged gradients need the factor."""
    if at.ranks != 4:
        return []
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    tp, dp = groups[at.rank // 2], groups[2 + at.rank % 2]
    logits, target = problem(60, torch.float32)
    hidden = torch.randn(N, 8, generator=torch.Generator().manual_seed(5))
    head = torch.randn(60, 8, generator=torch.Generator().manual_seed(6))
    whole = head.clone().requires_grad_()
    mean = npu_xent.cross_entropy(logits + hidden @ whole.T, target)
    # 20 rows and 17, of which unequally many are kept
    rows = slice(0, 20) if at.rank < 2 else slice(20, N)
    columns = slice(0, 30) if at.rank % 2 == 0 else slice(30, 60)
    leaf = head[columns].clone().requires_grad_()
    mine = distributed.vocab_parallel_cross_entropy(
        logits[rows, columns] + hidden[rows] @ leaf.T, target[rows], group=tp, reduction="mean", normalizer=dp
    )
    (mine * dist.get_world_size(dp)).backward()
    total, averaged = mine.detach().clone(), leaf.grad
    dist.all_reduce(total, group=dp)
    dist.all_reduce(averaged, group=dp)
    torch.testing.assert_close(total, mean.detach())
    torch.testing.assert_close(averaged / dist.get_world_size(dp), torch.autograd.grad(mean, whole)[0][columns])
    return [total]


def distributed_data_parallel(at: Rank, _: Any) -> list[Tensor]:
    """DDP needs nothing: it averages the gradients of the ranks' losses, as with PyTorch's functions."""
    data = torch.Generator().manual_seed(8)
    tokens = torch.randint(60, (2, at.ranks, 6, 9), generator=data)[:, at.rank]  # two steps, this rank's rows
    tokens[:, 0, 1:4] = -100
    theirs = {
        "cross_entropy": F.cross_entropy,
        "linear_cross_entropy": lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight), target),
    }

    class Model(torch.nn.Module):
        def __init__(self, loss: str, of: Any) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.body, self.head = torch.nn.Embedding(61, 8), torch.nn.Linear(8, 60, bias=False)
            self.linear, self.loss = "linear" in loss, of

        def forward(self, rows: Tensor) -> Tensor:
            hidden, target = self.body(rows[:, :-1].clamp(0).flatten()), rows[:, 1:].flatten()
            return self.loss(hidden, self.head.weight, target) if self.linear else self.loss(self.head(hidden), target)

    found: list[Tensor] = []
    for name, function in theirs.items():
        trained = []
        for of in (function, getattr(npu_xent, name)):
            model = torch.nn.parallel.DistributedDataParallel(Model(name, of))
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            for rows in tokens:
                optimizer.zero_grad()
                model(rows).backward()
                optimizer.step()
            trained.append([p.detach().clone() for p in model.parameters()])
        for expected, mine in zip(*trained, strict=True):
            torch.testing.assert_close(mine, expected)
        found += trained[1]
    return found


def mindformers_loss(at: Rank, _: Any) -> list[Tensor]:
    """mindformers' loss of sharded classes: that of the whole logits, and of one rank."""
    logits, label = problem(60, torch.float32)
    mask = torch.rand(N, generator=torch.Generator().manual_seed(2)).masked_fill(label == -100, 0)
    whole = logits.clone().requires_grad_()
    expected = CrossEntropyLoss()(whole, label, mask)
    expected.backward()
    config = {"model_parallel": at.ranks}
    found = []
    for group in (None, dist.new_group()):
        leaf, shard = at.shard(logits)
        loss, sent = counted(lambda x=shard, of=group: CrossEntropyLoss(config, group=of)(x, label, mask))
        loss.backward()
        assert (loss.shape, loss.dtype) == ((1,), torch.float32)
        assert len(sent) == (at.ranks > 1)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(leaf.grad, whole.grad[:, slice(*at.bounds(60))])
        found.append(loss)
    _, shard = at.shard(logits)
    total, weight = CrossEntropyLoss(config, calculate_per_token_loss=True)(shard, label, mask)
    torch.testing.assert_close(total / weight, expected)
    mask[1], label[1] = 1.0, 60
    with pytest.raises(IndexError, match=r"(label|target)\[1\] is 60, which is n(ot|either) a class in \[0, 60\)"):
        CrossEntropyLoss(config)(shard, label, mask)
    words = f"model_parallel is {at.ranks + 1}, but the group has {at.ranks} ranks"
    with pytest.raises(ValueError, match=words):
        CrossEntropyLoss({"model_parallel": at.ranks + 1})(shard, label, mask)
    if at.ranks > 1:
        first = dist.new_group([0])
        words = "the group has 1 ranks" if at.rank == 0 else "CrossEntropyLoss: this rank is not in the group passed as"
        with pytest.raises(ValueError, match=words):
            CrossEntropyLoss(config, group=first)(shard, label, mask)
    return found


def more_dimensions(at: Rank, _: Any) -> list[Tensor]:
    """[batch, time, C_local], of equal shards without a number of classes."""
    logits = torch.randn(3, 4, 12 * at.ranks, generator=torch.Generator().manual_seed(2))
    target = torch.randint(12 * at.ranks, (3, 4), generator=torch.Generator().manual_seed(3)).int()
    shard = logits.chunk(at.ranks, -1)[at.rank]
    mine = distributed.vocab_parallel_cross_entropy(shard, target)
    assert mine.shape == (3, 4)
    true = npu_xent.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(3, 4)
    torch.testing.assert_close(mine, true)
    return [mine]


def padded_vocabulary(at: Rank, _: Any) -> list[Tensor]:
    """Equally many columns on all ranks, more than there are classes; the rest is not read."""
    columns = 20
    classes = columns * at.ranks - 7
    logits, target = problem(classes, torch.float32)
    whole = torch.nn.functional.pad(logits, (0, 7), value=float("nan"))
    leaf = whole.chunk(at.ranks, 1)[at.rank].clone().requires_grad_()
    mine = distributed.vocab_parallel_cross_entropy(leaf, target, num_classes=classes)
    torch.testing.assert_close(mine, npu_xent.cross_entropy(logits, target, reduction="none"))
    (grad,) = torch.autograd.grad(mine.sum(), leaf)
    assert grad.isfinite().all()
    if at.rank == at.ranks - 1:
        assert not grad[:, -7:].any()
    return [mine]


def many_classes(at: Rank, _: Any) -> list[Tensor]:
    """Starts of classes that float32 cannot hold."""
    classes = (1 << 25) + 5
    begin, end = at.bounds(classes)
    target = torch.tensor([classes - 1])
    mine = distributed.vocab_parallel_cross_entropy(torch.zeros(1, end - begin), target, num_classes=classes)
    torch.testing.assert_close(mine, torch.tensor([math.log(classes)]))
    if at.ranks > 2:  # the classes 2^24 and 2^24 + 1 are equally large
        shards = [(0, 1 << 24), ((1 << 24) + 1, (1 << 24) + 2), (1 << 24, (1 << 24) + 1)]
        begin, end = shards[at.rank] if at.rank < 3 else ((1 << 24) + 2,) * 2
        logits = torch.full((2, end - begin), float(at.rank != 0))
        out = distributed.vocab_parallel_token_log_probs(
            logits,
            (1 << 24) + torch.arange(2),
            num_classes=(1 << 24) + 2,
            class_range=(begin, end),
            return_top1=True,
        )
        assert out.top1 is not None
        assert out.top1.tolist() == [True, False]
    return [mine]


def compiled(at: Rank, _: Any) -> list[Tensor]:
    """One graph, with gradients."""
    logits, target = problem(60, torch.float32)
    leaf, _ = at.shard(logits)

    def step(x: Tensor) -> Tensor:
        lp = distributed.vocab_parallel_token_log_probs(x, target, num_classes=60, return_entropy=True)
        loss = distributed.vocab_parallel_cross_entropy(x, target, num_classes=60, label_smoothing=0.1)
        return loss.sum() + lp.entropy.sum()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        total = function(leaf)
        results.append((total.detach(), torch.autograd.grad(total, leaf)[0]))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    return [results[0][0]]


class Losses(torch.nn.Module):
    """The functions, as a module to export; the linear one's products take a fixed number of rows."""

    def forward(self, x: Tensor, target: Tensor, hidden: Tensor, few: Tensor, layer: Tensor) -> list[Tensor]:
        log_probs = distributed.vocab_parallel_token_log_probs(x, target, num_classes=60, return_entropy=True)
        loss = distributed.vocab_parallel_cross_entropy(x, target, num_classes=60, reduction="sum")
        linear = distributed.vocab_parallel_linear_cross_entropy(hidden, layer, few, num_classes=60)
        return [loss, linear, *(t for t in log_probs if t is not None)]


def exported(at: Rank, _: Any) -> list[Tensor]:
    """torch.export, strict and not, with a number of rows that changes."""
    logits, target = problem(60, torch.float32)
    shard, layer = at.shard(logits)[0].detach(), at.shard(torch.eye(60))[0].detach().T.contiguous()
    others = (logits[:4], target[:4], layer)
    rows = torch.export.Dim("rows", min=2, max=1 << 20)  # releases before 2.13 need a maximum
    expected = Losses()(shard, target, *others)
    for strict in (False, True):
        sizes = ({0: rows}, {0: rows}, None, None, None)
        fewer = (shard[:6].clone(), target[:6])
        program = torch.export.export(Losses(), (*fewer, *others), dynamic_shapes=sizes, strict=strict)
        for actual, true in zip(program.module()(shard, target, *others), expected, strict=True):
            assert torch.equal(actual, true)
    return [t.detach() for t in expected]


def disagreeing(at: Rank, _: Any) -> list[Tensor]:
    """Every rank raises if NPU_XENT_DEBUG=1."""
    logits, target = problem(60, torch.float32)
    _, shard = at.shard(logits)
    if at.ranks == 1:
        return []
    with mock.patch.dict(os.environ, {"NPU_XENT_DEBUG": "1"}):
        distributed.vocab_parallel_cross_entropy(shard, target, num_classes=60)
        words = re.escape("logit_scale must be the same on all ranks, but is [1.0, 2.0")
        for function in (distributed.vocab_parallel_cross_entropy, distributed.vocab_parallel_token_log_probs):
            with pytest.raises(ValueError, match=words):
                function(shard, target, num_classes=60, logit_scale=1.0 + at.rank)
        x = torch.ones(N, 8)
        own: dict[str, tuple[Tensor, dict[str, Any]]] = {
            "loss_dtype": (x, {"loss_dtype": (torch.float32, torch.float64)[min(at.rank, 1)]}),
            "reduce_input_grad": (x, {"reduce_input_grad": at.rank == 0}),
            "normalizer": (x, {"normalizer": dist.group.WORLD if at.rank == 0 else None}),
            "requires_grad of input": (x.clone().requires_grad_(at.rank == 0), {}),
        }
        for word, (rows, options) in own.items():
            with pytest.raises(ValueError, match=f"{word} must be the same on all ranks"):
                distributed.vocab_parallel_linear_cross_entropy(
                    rows, torch.ones(shard.shape[1], 8), target, num_classes=60, **options
                )
    return []


def inconsistent(at: Rank, _: Any) -> list[Tensor]:
    """Every rank raises where the shards are not one vocabulary, or the targets differ."""
    if at.ranks == 1:
        return []
    logits, target = problem(61, torch.float32)
    leaf, _ = at.shard(logits)
    begin, end = at.bounds(61)
    head = torch.ones(end - begin, 8)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("make up one vocabulary", lambda: distributed.vocab_parallel_cross_entropy(leaf, target.clamp(max=50))),
        ("make up one vocabulary", lambda: distributed.vocab_parallel_token_log_probs(leaf, target.clamp(max=50))),
        (
            "make up one vocabulary, but are [[0, ",
            lambda: distributed.vocab_parallel_cross_entropy(
                leaf[:, :10], target, num_classes=61, class_range=(9 * at.rank, 9 * at.rank + 10)
            ),
        ),
        (
            "target must be the same on all ranks",
            lambda: distributed.vocab_parallel_cross_entropy(leaf, (target + at.rank).clamp(0, 60), num_classes=61),
        ),
        (
            "target must be the same on all ranks",
            lambda: distributed.vocab_parallel_linear_cross_entropy(
                torch.ones(N, 8), head, target.roll(at.rank), num_classes=61
            ),
        ),
    ]
    of_few = torch.tensor([[2, 0], [0, 1]])[min(at.rank, 1)]  # their sums agree, also where a place counts twice
    words = "target must be the same on all ranks"
    calls.append((words, lambda: distributed.vocab_parallel_cross_entropy(leaf[:2], of_few, num_classes=61)))
    for words, call in calls:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    return []


def autocast(at: Rank, _: Any) -> list[Tensor]:
    """As linear_cross_entropy under autocast."""
    x, layer, target = torch.randn(12, 8), torch.randn(60, 8), torch.arange(12)
    dist.broadcast(x, 0)
    dist.broadcast(layer, 0)
    begin, end = at.bounds(60)
    leaves = [x.clone().requires_grad_(), layer[begin:end].clone().requires_grad_()]
    whole = [x.clone().requires_grad_(), layer.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        mine = distributed.vocab_parallel_linear_cross_entropy(*leaves, target, num_classes=60)
        true = npu_xent.linear_cross_entropy(*whole, target)
    torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    grads, expected = torch.autograd.grad(mine, leaves), torch.autograd.grad(true, whole)
    torch.testing.assert_close(grads[0], expected[0], rtol=0.02, atol=2e-3)
    torch.testing.assert_close(grads[1], expected[1][begin:end], rtol=0.02, atol=2e-3)
    assert grads[0].dtype == torch.float32
    mine = distributed.vocab_parallel_linear_cross_entropy(*leaves, target, num_classes=60, reduction="none")
    true = npu_xent.linear_cross_entropy(*whole, target, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):  # of the backward alone, which has the dtype of the forward
        grads, expected = torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(true.sum(), whole)
    torch.testing.assert_close(grads[0], expected[0])
    torch.testing.assert_close(grads[1], expected[1][begin:end])
    weight = torch.linspace(0.5, 1.5, 60, dtype=torch.float16)  # of any floating-point dtype
    with torch.autocast("cpu", torch.bfloat16):
        mine = distributed.vocab_parallel_linear_cross_entropy(*leaves, target, weight=weight, num_classes=60)
        true = npu_xent.linear_cross_entropy(*whole, target, weight=weight)
    torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    return []


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "normalizer": (ValueError, 'with reduction "none" leave it out', {"normalizer": torch.tensor(1.0)}),
    "a number": (TypeError, "for a number pass torch.tensor", {"normalizer": 3, "reduction": "sum"}),
    "two numbers": (TypeError, "but is shape [2]", {"normalizer": torch.ones(2), "reduction": "sum"}),
    "no groups": (TypeError, "but is a tuple", {"normalizer": (), "reduction": "sum"}),
    "group": (TypeError, "group must be a torch.distributed.ProcessGroup, but is a str", {"group": "tp"}),
    "outside": (
        ValueError,
        "vocab_parallel_cross_entropy: this rank is not in the group passed as group; call it only on the ranks of the "
        "group",
        {"group": dist.GroupMember.NON_GROUP_MEMBER},
    ),
    "outside normalizer": (
        ValueError,
        "this rank is not in the group passed as normalizer; call it only on the ranks of the group",
        {"normalizer": dist.GroupMember.NON_GROUP_MEMBER, "reduction": "sum"},
    ),
    "outside a normalizer": (
        ValueError,
        "this rank is not in the group passed as normalizer",
        {"normalizer": (dist.GroupMember.NON_GROUP_MEMBER,), "reduction": "mean"},
    ),
    "class_range alone": (ValueError, "class_range needs num_classes", {"class_range": (0, 4), "num_classes": None}),
    "class_range of no columns": (
        ValueError,
        "class_range needs num_classes",
        {"class_range": (0, 0), "num_classes": None, "logits": torch.zeros(N, 0)},
    ),
    "class_range": (ValueError, "class_range must lie in [0, 60] and be no longer than", {"class_range": (2, 1)}),
    "columns": (ValueError, "neither this rank's chunk of 1000000 classes", {"num_classes": 1000000}),
    "weight": (ValueError, "weight must have one value for each of the 60 classes of all", {"weight": torch.ones(59)}),
    "trained weight": (RuntimeError, "pass weight.detach()", {"weight": torch.ones(60, requires_grad=True)}),
    "shape": (ValueError, "target must have the shape of logits", {"target": torch.zeros(3, dtype=torch.long)}),
    "dtype": (TypeError, "logits must be float32", {"logits": torch.zeros(N, 60, dtype=torch.int64)}),
    "softcap": (ValueError, "softcap must lie in", {"softcap": 0.0}),
    "no classes": (ValueError, "logits must have at least one class", {"logits": torch.zeros(N, 0), "num_classes": 0}),
    "consumed columns": (
        ValueError,
        "consume_logits needs contiguous logits",
        {"logits": torch.zeros(60, N, requires_grad=True).mul(1).t(), "consume_logits": True, "num_classes": None},
    ),
    "leaf": (ValueError, "would overwrite a leaf", {"consume_logits": True}),
    "target": (IndexError, "target[0] is 60", {"target": torch.full((N,), 60)}),
}  # fmt: skip


def refusals(at: Rank, _: Any) -> list[Tensor]:
    """On every rank, before any collective."""
    logits, target = problem(60, torch.float32)
    leaf, _ = at.shard(logits)
    for kind, words, changed in REFUSED.values():
        arguments = {"logits": leaf, "target": target, "num_classes": 60} | changed
        with pytest.raises(kind, match=re.escape(words)):
            distributed.vocab_parallel_cross_entropy(**arguments)
    return []


X, W, Y = torch.ones(6, 8), torch.ones(5, 8), torch.zeros(6, dtype=torch.long)
LINEAR_REFUSED: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
    (ValueError, "input must have shape [..., H] and linear_weight [C_local, H]", {"linear_weight": W[:, :7]}),
    (TypeError, "input and linear_weight must have the same dtype, float32", {"linear_weight": W.half()}),
    (ValueError, "linear_bias must have shape [5] and dtype torch.float32", {"linear_bias": torch.ones(6)}),
    (ValueError, "target must have shape [6] and be on cpu, but has [5]", {"target": Y[:5]}),
    (ValueError, 'with reduction "none" leave it out', {"normalizer": X[0, 0], "reduction": "none"}),
    (ValueError, "vocab_parallel_linear_cross_entropy: logits must have at least one class", {"linear_weight": W[:0]}),
)


def linear_refusals(at: Rank, _: Any) -> list[Tensor]:
    """On every rank, before any collective; and a gradient that could be differentiated again."""
    for kind, words, changed in LINEAR_REFUSED:
        with pytest.raises(kind, match=re.escape(words)):
            distributed.vocab_parallel_linear_cross_entropy(**{"input": X, "linear_weight": W, "target": Y} | changed)
    leaf = X.clone().requires_grad_()
    loss = distributed.vocab_parallel_linear_cross_entropy(leaf, W, Y)
    with pytest.raises(RuntimeError, match="double backward through vocab_parallel_linear_cross_entropy is not"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    return [loss]


def second_derivatives(at: Rank, _: Any) -> list[Tensor]:
    """Raise."""
    logits, target = problem(60, torch.float32)
    leaf, _ = at.shard(logits)
    for function in (distributed.vocab_parallel_cross_entropy, distributed.vocab_parallel_token_log_probs):
        (grad,) = torch.autograd.grad(function(leaf, target, num_classes=60).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward through npu_xent is not supported"):
            grad.sum().backward()
    return []


SINGLE = (
    *(masked_classes, other_orders, without_rows, far_from_zero, normalizers, more_dimensions, padded_vocabulary),
    *(many_classes, mindformers_loss, distributed_data_parallel),
    *(compiled, exported, disagreeing, inconsistent, autocast, refusals, linear_refusals, second_derivatives),
    *(data_parallel, traffic),
)
CASES: dict[str, tuple[Callable[[Rank, Any], list[Tensor]], Any]] = {
    **{f"loss-{case_id(case)}": (loss, case) for case in LOSSES},
    **{f"linear-{case_id(case)}": (linear, case) for case in LINEAR},
    **{f"log_probs-{case_id(case)}": (log_probs, case) for case in LOG_PROBS},
    **{case.__name__: (case, None) for case in SINGLE},
}


def bits(tensors: list[Tensor]) -> str:
    """A digest of the values."""
    return hashlib.sha256(
        b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


Cases = Mapping[str, tuple[Callable[[Rank, Any], list[Tensor]], Any]]


def run(cases: Cases, rank: int, ranks: int, folder: str) -> None:
    """Run the cases on one rank; twice where there are results, for the same bits."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=10)
    )
    at, found = Rank(rank, ranks), {}
    for name, (function, case) in cases.items():
        try:
            results = function(at, case)
            digests = [bits(results), bits(function(at, case) if results else results)]
            found[name] = {
                "error": "" if digests[0] == digests[1] else "other bits in a second run",
                "bits": digests[0],
            }
        except (Exception, pytest.fail.Exception):  # the second is no Exception
            found[name] = {"error": traceback.format_exc(), "bits": ""}
            print(rank, name, found[name]["error"], flush=True)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(cases: Cases, ranks: str, folder: str, *names: str) -> None:
    """Fork the ranks, so that modules are imported once. PyTorch has started no thread yet."""
    children, chosen = [], {name: cases[name] for name in names or cases}
    for rank in range(int(ranks)):
        if (child := os.fork()) == 0:
            code = 1
            try:
                run(chosen, rank, int(ranks), folder)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


if __name__ == "__main__":
    main(CASES, *sys.argv[1:])
