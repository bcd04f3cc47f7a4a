"""The operators under torch.ops.npu_xent: what csrc/ops.cpp says of each, beyond what cross_entropy shows.

Two implementations of one schema have to agree: the device's own kernels, and the composite made of aten operations
(for devices without kernels), which `composite()` runs on any device. What torch demands of operators is in
test_operator_schemas.py, what they refuse in test_operator_refusals.py.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from operator_cases import CASES, PRIMITIVES, call, ops, prepared, problem, run
from reference import (
    DTYPES,
    INF,
    NAN,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    make_weight,
    named,
    stats_dtype,
    tolerance,
    truth,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent

Composite = type[TorchDispatchMode]


# Composite ------------------------------------------------------------------------------------------------------------


def assert_agree(actual: Tensor, expected: Tensor, size: float, name: str) -> None:
    """Equal in shape, dtype, strides, NaN and infinities; each within the tolerance of a truth of this size."""
    assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride()), name
    if actual.dtype == torch.bool:
        assert torch.equal(actual, expected), name
        return
    assert torch.equal(actual.isnan(), expected.isnan()), name
    assert torch.equal(actual.isinf(), expected.isinf()), name
    a, b = actual.cpu().double(), expected.cpu().double()
    assert torch.equal(a[a.isinf()], b[b.isinf()]), name
    assert ((a - b).abs() <= 2 * tolerance(b, size, actual.dtype)).masked_fill(~b.isfinite(), True).all(), name


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_composite_agrees(name: str, case: dict[str, Any], device: torch.device, composite: Composite) -> None:
    arguments = prepared(name, case, device)
    expected = run(name, arguments)
    with composite():
        actual = run(name, arguments)
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        # 20 is more than any |x| + |lse| here; sums over 21 classes or 7 rows are larger.
        assert_agree(a, e, 20.0 if a.dim() == 2 else 400.0, f"output {i}")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composite_computes_the_loss_and_its_gradient(
    dtype: torch.dtype, reduction: str, label_smoothing: float, device: torch.device, composite: Composite
) -> None:
    """Special rows, kept and ignored; compared with the truth, as the device's own kernels are in test_corners.py."""
    special = [[0.0, -INF, 1.0], [-INF, 0.0, 1.0], [-INF] * 3, [0.0, INF, 1.0], [0.0, NAN, 1.0], [1.0, 2.0, 3.0]]
    weight = torch.tensor([0.5, 0.25, 1.0], device=device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "lse_square_scale": 0.1}
    for rows, y in ((special, -100), (special, 0), (special[:1], 0), (special[1:2], 0), (special[5:], 2), ([], 0)):
        logits = torch.tensor(rows, dtype=dtype, device=device).view(-1, 3).requires_grad_()
        target = torch.full((len(rows),), y, device=device)
        if len(rows) == len(special):
            target[-1] = 2
        expected = truth(logits, target, weight, **options)
        with composite():
            loss, z_loss, lse, log_prob = ops.cross_entropy(
                logits, target, weight, **options, need_lse=True, need_log_prob=True
            )
            loss.backward(torch.ones_like(loss))
        assert_near(loss, expected.loss, expected.loss_terms, name="loss")
        assert_near(z_loss, expected.z_loss, 4 * expected.z_loss.abs().nan_to_num(0, 0), name="z_loss")
        assert_near(lse, expected.lse, 10.0, name="lse")
        assert_near(log_prob, expected.log_prob, 10.0, name="log_prob")
        assert_near(logits.grad, expected.grad, expected.grad_terms, name="grad")


@pytest.mark.parametrize("bad", [5, -1, 10**12])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_composite_makes_a_row_nan_for_a_bad_target(
    dtype: torch.dtype, reduction: str, bad: int, device: torch.device, composite: Composite
) -> None:
    """Raising would mean waiting for the device. Its weight counts 0, so that the other gradients are as without it."""
    logits, weight = make_logits(3, 5, dtype, device).requires_grad_(), make_weight(5, torch.float32, device)
    target = torch.tensor([0, bad, 4], device=device)
    with composite():
        loss = npu_xent.cross_entropy(logits, target, weight, reduction=reduction)
        loss.sum().backward()
    others = truth(logits[::2], target[::2], weight, reduction=reduction)
    assert (loss[1] if reduction == "none" else loss).isnan()
    assert logits.grad[1].isnan().all()
    assert_near(logits.grad[::2], others.grad, others.grad_terms)
    if reduction == "none":
        assert_near(loss[::2], others.loss, others.loss_terms)


# Class shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("with_composite", [False, True], ids=["kernels", "composite"])
@pytest.mark.parametrize("borders", [(0, 21), (0, 5, 21), (0, 1, 2, 20, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_shards_make_up_the_whole(
    dtype: torch.dtype,
    borders: tuple[int, ...],
    with_composite: bool,
    softcap: float | None,
    device: torch.device,
    composite: Composite,
) -> None:
    """Statistics of shards, merged; and gradients of shards, put side by side."""
    with composite() if with_composite else nullcontext():
        check_shards(dtype, borders, softcap, device)


def check_shards(dtype: torch.dtype, borders: tuple[int, ...], softcap: float | None, device: torch.device) -> None:
    """Shards between the borders, against the truth for all classes."""
    n, c = 7, 21
    logits, target = make_logits(n, c, dtype, device), make_target(n, c, device, ignore_index=-100)
    weight = make_weight(c, torch.float32, device)
    scales = {"logit_scale": 0.7, "softcap": softcap}
    smoothing = {"label_smoothing": 0.1, "lse_square_scale": 0.05}
    shards = list(itertools.pairwise(borders))

    stats = []
    for begin, end in shards:
        shard = (logits[:, begin:end], target, weight)
        stats.append(named("row_stats", *shard, class_start=begin, num_classes=c, need_wsum=True, **scales))
        elsewhere = (target < begin) | (target >= end)
        assert (stats[-1]["picked"][elsewhere] == 0).all()
    lse = torch.stack([s["lse"] for s in stats]).logsumexp(0)
    picked = torch.stack([s["picked"] for s in stats]).sum(0)
    # wsum counts from lse: from that of the shard in each shard, from that of all classes in the whole.
    shard_weight = [weight[begin:end].sum() for begin, end in shards]
    wsum = sum(s["wsum"] + w * (s["lse"] - lse) for s, w in zip(stats, shard_weight, strict=True))
    whole = truth(logits, target, weight, reduction="mean", **scales, **smoothing)
    kept = target != -100
    assert_near(lse[kept], whole.lse[kept.cpu()], 20.0, name="lse")

    made = {"logits": logits, "target": target, "weight": weight, "lse": lse, "picked": picked, "wsum": wsum}
    made["lse_low"] = None  # optional: what a merge of shards does not know
    made["totals"] = ops.reduce_rows(target, weight, num_classes=c, loss_dtype=torch.float32)[2]
    loss = ops.reduce_rows(**call("reduce_rows", made, **smoothing, loss_dtype=torch.float32))[0]
    assert_near(loss, whole.loss, 2 * whole.loss_terms, name="loss")

    for begin, end in shards:
        shard = {"logits": logits[:, begin:end], "class_start": begin, "num_classes": c}
        grad = ops.row_grad(**call("row_grad", made | shard, **scales, **smoothing) | shard)
        assert grad.shape == (n, end - begin)
        assert_near(grad, whole.grad[:, begin:end], 2 * whole.grad_terms[:, begin:end], name=f"grad {begin}:{end}")


# Scales, dtypes and in-place ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_scale", [None, 1.0, -2.5])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25, 1.7, -1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logit_scale_and_grad_scale(
    reduction: str, logit_scale: float, grad_scale: float | None, device: torch.device
) -> None:
    """The softmax of t x, and the outermost factor of its gradient: t, or what is given in its place."""
    logits, target = make_logits(7, 21, torch.float32, device).requires_grad_(), make_target(7, 21, device)
    scales = {"logit_scale": logit_scale, "grad_scale": grad_scale}
    expected = truth(logits, target, reduction=reduction, label_smoothing=0.1, **scales)
    loss, _, lse, log_prob = ops.cross_entropy(
        logits, target, reduction=reduction, label_smoothing=0.1, need_lse=True, need_log_prob=True, **scales
    )
    loss.sum().backward()
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(lse, expected.lse, 20.0, name="lse")
    assert_near(log_prob, expected.log_prob, 40.0, name="log_prob")
    assert_near(logits.grad, expected.grad, expected.grad_terms, name="grad")


@pytest.mark.parametrize("loss_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_dtype(dtype: torch.dtype, loss_dtype: torch.dtype | None, device: torch.device) -> None:
    """The loss is rounded once, from statistics that do not depend on it."""
    logits, target = make_logits(7, 21, dtype, device).requires_grad_(), make_target(7, 21, device)
    expected = truth(logits, target, lse_square_scale=0.1)
    loss, z_loss, _, _ = ops.cross_entropy(logits, target, lse_square_scale=0.1, loss_dtype=loss_dtype)
    assert loss.dtype == z_loss.dtype == (loss_dtype or dtype)
    allowed = tolerance(expected.loss, expected.loss_terms, stats_dtype(dtype))
    allowed = allowed + tolerance(expected.loss, 0, loss.dtype)
    assert (loss.detach().cpu().double() - expected.loss).abs() <= allowed
    loss.backward()
    assert logits.grad.dtype == dtype
    assert_near(logits.grad, expected.grad, expected.grad_terms)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, 1e-3, NAN])
@pytest.mark.parametrize("shape", [(0,), (), (33,), (3, 7001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_(dtype: torch.dtype, shape: tuple[int, ...], factor: float, device: torch.device) -> None:
    """One multiplication, rounded once."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    scaled = values.clone()
    by = torch.tensor(factor, device=device)
    assert ops.scale_(scaled, by) is None
    expected = (values.to(stats_dtype(dtype)) * by.to(stats_dtype(dtype))).to(dtype)
    assert_near(scaled, expected.cpu().double(), expected.cpu().double().abs().nan_to_num(0))


@pytest.mark.cpu  # a device cannot know without waiting
def test_scale_by_one_does_not_even_write(device: torch.device) -> None:
    values = torch.randn(5, device=device)
    ops.scale_(values, torch.ones((), device=device))
    assert values._version == 0
    ops.scale_(values, torch.full((1,), 2.0, device=device))
    assert values._version == 1


@pytest.mark.parametrize("name", ["row_grad_", "row_stats_grad_", "scale_"])
def test_writes_are_seen_by_autograd(name: str, device: torch.device) -> None:
    arguments = call(name, problem(device))
    overwritten = next(iter(arguments.values()))
    before = overwritten._version
    getattr(ops, name)(**arguments)
    assert overwritten._version == before + 1


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", ["row_grad", "row_stats_grad"])
def test_in_place_gradients_are_the_same_bits(name: str, case: dict[str, Any], device: torch.device) -> None:
    arguments = prepared(f"{name}_", case, device)
    fresh, in_place = run(name, arguments), run(f"{name}_", arguments)
    for actual, expected in zip(in_place, fresh, strict=True):
        assert_same_bits(actual, expected)


def test_outputs_that_are_not_wanted_are_empty(device: torch.device) -> None:
    def empty(name: str, *arguments: Any, **options: Any) -> list[str]:
        return [output for output, value in named(name, *arguments, **options).items() if value.shape == (0,)]

    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    assert empty("row_stats", logits, target) == ["wsum", "log_prob", "entropy", "top1"]
    wanted = {f"need_{name}": True for name in ("wsum", "log_prob", "entropy", "top1")}
    assert empty("row_stats", logits, target, **wanted) == []
    assert empty("token_log_probs", logits, target) == ["entropy", "top1"]
    assert empty("reduce_rows", target, None, num_classes=5, loss_dtype=torch.float32) == ["loss", "z_loss"]
    assert empty("cross_entropy", logits, target) == ["z_loss", "lse", "log_prob"]
    wanted = {"need_lse": True, "need_log_prob": True, "lse_square_scale": 0.1}
    assert empty("cross_entropy", logits, target, **wanted) == []


def test_ignored_rows_count_as_zero_unless_they_are_read(device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), torch.tensor([0, -100, 1], device=device)
    expected = truth(logits, target)
    assert_near(named("row_stats", logits, target, read_ignored=True)["lse"], expected.lse, 20.0)
    logits[1] = NAN
    unread = named("row_stats", logits, target, need_wsum=True, need_entropy=True, need_top1=True)
    assert all(float(value[1]) == 0 for name, value in unread.items() if name != "log_prob")


def test_lse_in_two_numbers_is_more_exact_than_one(device: torch.device) -> None:
    """What rounding takes from lse is kept in lse_low: the loss of logits far from 0 depends on it."""
    logits, target = make_logits(7, 21, torch.float32, device) + 1000, make_target(7, 21, device)
    stats = named("row_stats", logits, target)
    expected = truth(logits, target).lse
    assert_near(stats["lse"], expected, expected.abs())
    together = stats["lse"].cpu().double() + stats["lse_low"].cpu().double()
    assert float((together - expected).abs().max()) < 2e-6 < float((stats["lse"].cpu() - expected).abs().max())


def test_totals(device: torch.device) -> None:
    """The kept rows' weights, the number of kept rows, and the weights of all classes."""
    target = torch.tensor([0, 2, -100, 2], device=device)
    weight = torch.tensor([0.5, 0.25, 2.0], device=device)
    options = {"num_classes": 3, "loss_dtype": torch.float32}
    assert ops.reduce_rows(target, weight, **options)[2].tolist() == [4.5, 3, 2.75]
    assert ops.reduce_rows(target, None, **options)[2].tolist() == [3, 3, 3]
    assert ops.reduce_rows(target[:0], weight, **options)[2].tolist() == [0, 0, 2.75]
