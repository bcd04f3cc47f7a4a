"""The lse of return_lse is differentiable, on every path, and costs nothing where it gets no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from option_values import factors, keywords
from reference import (
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    make_weight,
    named,
    pairwise,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import npu_xent

CASES = pairwise(
    factors(
        *("dtype", "reduction", "weighted", "ignore_index", "label_smoothing", "lse_square_scale", "softcap"),
        "logit_scale",
        shape=[(1, 1), (9, 21), (97, 17), (5, 5001), (2, 70000)],
        uses=("both", "lse alone"),
        consume=(False, True),
    )
)


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradient_through_lse(case: dict[str, Any], device: torch.device) -> None:
    (rows, classes), dtype = case["shape"], case["dtype"]
    logits = make_logits(rows, classes, dtype, device)
    target = make_target(rows, classes, device, ignore_index=case["ignore_index"])
    weight = make_weight(classes, torch.float32, device) if case["weighted"] else None
    options = {"ignore_index": -100} | keywords(case)
    leaf = logits.clone().requires_grad_()
    out = npu_xent.cross_entropy(leaf * 1, target, weight, **options, return_lse=True, consume_logits=case["consume"])
    from_lse = torch.randn(rows, generator=torch.Generator().manual_seed(3)).to(device, out.lse.dtype)
    from_loss = torch.full_like(out.loss, 0.5) if case["uses"] == "both" else None
    expected = truth(
        logits, target, weight, **options, grad_loss=0.0 if from_loss is None else from_loss, grad_lse=from_lse
    )
    if from_loss is None:
        out.lse.backward(from_lse)
    else:
        torch.autograd.backward([out.loss, out.lse], [from_loss, from_lse])
    assert_near(leaf.grad, expected.grad, expected.grad_terms, name="gradient")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_made_of_both(reduction: str, device: torch.device) -> None:
    """As a z-loss by hand; the rows of ignored targets have an lse, and its gradient, too."""
    logits, target = make_logits(9, 21, torch.float32, device), make_target(9, 21, device, ignore_index=-100)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    out = npu_xent.cross_entropy(ours, target, reduction=reduction, return_lse=True)
    (out.loss.sum() + 0.1 * out.lse.square().mean()).backward()
    loss = F.cross_entropy(theirs, target, reduction=reduction).sum()
    (loss + 0.1 * theirs.logsumexp(1).square().mean()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_lse_without_gradient_changes_no_bit(reduction: str, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device, ignore_index=-100)
    plain, with_lse, consumed = (logits.clone().requires_grad_() for _ in range(3))
    npu_xent.cross_entropy(plain, target, reduction=reduction).sum().backward()
    npu_xent.cross_entropy(with_lse, target, reduction=reduction, return_lse=True).loss.sum().backward()
    assert_same_bits(with_lse.grad, plain.grad)
    # The consumed logits get their gradient in the backward, from two sweeps.
    out = npu_xent.cross_entropy(consumed * 1, target, reduction=reduction, return_lse=True, consume_logits=True)
    out.loss.sum().backward()
    torch.testing.assert_close(consumed.grad, plain.grad)


def test_ignored_rows_without_gradient_are_not_read(device: torch.device) -> None:
    logits, target = make_logits(9, 21, torch.float32, device), make_target(9, 21, device, ignore_index=-100)
    ignored = target == -100
    logits[ignored] = torch.nan
    leaf = logits.requires_grad_()
    out = npu_xent.cross_entropy(leaf, target, return_lse=True)
    (out.loss + out.lse[~ignored].sum()).backward()
    assert (leaf.grad[ignored] == 0).all()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_changed_logits_matter_only_to_lse(dtype: torch.dtype, device: torch.device) -> None:
    leaf, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)

    def changed() -> npu_xent.CrossEntropyOutput:
        logits = leaf * 1
        out = npu_xent.cross_entropy(logits, target, return_lse=True)
        logits.detach().zero_()
        return out

    changed().loss.backward()
    assert leaf.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed().lse.sum().backward()


def test_the_first_gradient_is_released_with_the_graph(device: torch.device) -> None:
    """A second backward raises as without lse, and no N x C memory outlives the first one."""
    leaf, target = make_logits(9, 21, torch.float32, device).requires_grad_(), make_target(9, 21, device)
    head = torch.ones(21, 21, device=device, requires_grad=True)
    for out in (
        npu_xent.cross_entropy(leaf, target, return_lse=True),
        npu_xent.linear_cross_entropy(leaf, head, target, return_lse=True),
    ):
        (out.loss + out.lse.sum()).backward()
        with pytest.raises(RuntimeError, match="a second time"):
            out.loss.backward()


def test_second_backward(device: torch.device) -> None:
    leaf, target = make_logits(9, 21, torch.float32, device).requires_grad_(), make_target(9, 21, device)
    out = npu_xent.cross_entropy(leaf, target, return_lse=True)
    first, second = (torch.autograd.grad(out.lse.sum() + out.loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, second)
    (grad,) = torch.autograd.grad(out.lse.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, device: torch.device) -> None:
    if backend == "inductor" and device.type != "cpu":
        pytest.skip("inductor has no backend for this device")
    logits, target = make_logits(9, 21, torch.float32, device), make_target(9, 21, device)

    def loss(x: Tensor) -> Tensor:
        out = npu_xent.cross_entropy(x, target, return_lse=True)
        return out.loss + 0.1 * out.lse.square().mean()

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, backend=backend, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("chunk_rows", [2, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear(dtype: torch.dtype, reduction: str, chunk_rows: int | None, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=generator).to(dtype).double() for shape in ((9, 8), (21, 8), (21,))]
    ours = [t.to(device, dtype).requires_grad_() for t in exact]
    theirs = [t.clone().requires_grad_() for t in exact]
    target = make_target(9, 21, device, ignore_index=-100)
    out = npu_xent.linear_cross_entropy(
        *ours[:2], target, linear_bias=ours[2], reduction=reduction, chunk_rows=chunk_rows, return_lse=True
    )
    (out.loss.sum() + 0.1 * out.lse.square().mean()).backward()
    logits = F.linear(*theirs)
    loss = F.cross_entropy(logits, target.cpu(), reduction=reduction)
    (loss.sum() + 0.1 * logits.logsumexp(1).square().mean()).backward()
    for mine, true in zip(ours, theirs, strict=True):
        scale = float(true.grad.abs().max())
        torch.testing.assert_close(mine.grad.cpu().double(), true.grad, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


def test_composite(composite: Any, device: torch.device) -> None:
    """The kernels made of aten operations give the same."""
    logits, target = make_logits(9, 21, torch.float32, device), make_target(9, 21, device, ignore_index=-100)
    weight = make_weight(21, torch.float32, device)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.1, "num_classes": 21}
    totals = named("reduce_rows", target, weight, num_classes=21, loss_dtype=torch.float32)["totals"]
    stats = named("row_stats", logits, target, weight, read_ignored=True)
    from_lse = torch.randn(9, generator=torch.Generator().manual_seed(0)).to(device)
    upstream = torch.tensor(0.5, device=device)

    def grad() -> Tensor:
        return torch.ops.npu_xent.row_grad.default(
            logits, target, weight, stats["lse"], stats["lse_low"], totals, upstream, None, from_lse, **options
        )

    ours = grad()
    with composite():
        torch.testing.assert_close(grad(), ours)
