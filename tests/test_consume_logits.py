"""consume_logits: the gradient overwrites the logits, with the same bits; what must not be overwritten is refused.

With "mean" and "sum" that is during the forward, with "none" and fp16 in the backward. Every test here runs both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from option_values import factors, keywords
from reference import (
    DTYPES,
    LOW_PRECISION,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    case_id,
    consuming,
    loss_and_grad,
    make_logits,
    make_target,
    make_weight,
    pairwise,
    paths,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import npu_xent


@pytest.mark.isa
@pytest.mark.parametrize(
    "case",
    pairwise(
        factors(
            *("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", "softcap", "ignore_index"),
            shape=[(0, 5), (1, 1), (9, 21), (3, 9001)],
            upstream=(1.0, 0.3),
        )
    ),
    ids=case_id,
)
def test_consuming_the_logits_changes_no_bit(case: dict[str, Any], device: torch.device) -> None:
    rows, classes = case["shape"]
    logits = make_logits(rows, classes, case["dtype"], device)
    target = make_target(rows, classes, device, ignore_index=case["ignore_index"])
    weight = make_weight(classes, torch.float32, device) if case["weighted"] else None
    options = keywords(case)
    shape = (rows,) if case["reduction"] == "none" else ()
    upstream = torch.full(shape, case["upstream"], dtype=case["dtype"], device=device)
    fresh = loss_and_grad(npu_xent.cross_entropy, logits, target, weight, **options, upstream=upstream)
    consumed = loss_and_grad(consuming(npu_xent.cross_entropy), logits, target, weight, **options, upstream=upstream)
    for actual, expected in zip(consumed, fresh, strict=True):
        assert_same_bits(actual, expected)


def one_sweep(dtype: torch.dtype, reduction: str) -> bool:
    """Whether the gradient is made during the forward."""
    return dtype != torch.float16 and reduction != "none"


@pytest.mark.parametrize("return_lse", [False, True])
@paths
def test_consumed_logits_hold_the_gradient(
    dtype: torch.dtype, reduction: str, return_lse: bool, device: torch.device
) -> None:
    """After the forward, or for fp16, "none" and an lse, which may get a gradient, after the backward."""
    leaf, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)
    expected = truth(leaf, target, reduction=reduction)
    logits = leaf * 1
    out = npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True, return_lse=return_lse)
    if one_sweep(dtype, reduction) and not return_lse:
        assert_near(logits, expected.grad, expected.grad_terms)
    else:
        assert_same_bits(logits, leaf)
    loss = out.loss if return_lse else out
    loss.sum().backward(torch.tensor(2.0, dtype=dtype, device=device))
    assert_near(logits, 2 * expected.grad, 2 * expected.grad_terms, roundings=2)
    assert_same_bits(logits, leaf.grad)


@paths
def test_every_write_over_the_logits_is_seen_by_autograd(
    dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    """Whoever saved the logits raises if they change afterwards, so each write has to bump their version."""
    logits, target = make_logits(9, 21, dtype, device).requires_grad_() * 1, make_target(9, 21, device)

    def version_if_bits_changed(do: Callable[[], object]) -> None:
        bits, version = logits.detach().clone(), logits._version
        do()
        if not torch.equal(bits, logits):
            assert logits._version > version, "written without a new version"

    loss: list[Tensor] = []
    version_if_bits_changed(
        lambda: loss.append(npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True).sum())
    )
    version_if_bits_changed(lambda: loss[0].backward(torch.tensor(2.0, dtype=dtype, device=device)))


@paths
def test_a_view_of_an_activation_can_be_consumed(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """[batch, time, classes] flattened; and some of its rows."""
    leaf, target = make_logits(8, 21, dtype, device).requires_grad_(), make_target(8, 21, device)
    expected = truth(leaf, target, reduction=reduction)
    activation = (leaf * 1).view(2, 4, 21)
    npu_xent.cross_entropy(activation.view(-1, 21), target, reduction=reduction, consume_logits=True).sum().backward()
    assert_near(leaf.grad, expected.grad, expected.grad_terms)

    leaf.grad = None
    activation = leaf * 1
    loss = npu_xent.cross_entropy(activation[2:6], target[2:6], reduction=reduction, consume_logits=True)
    loss.sum().backward()
    expected = truth(leaf[2:6], target[2:6], reduction=reduction)
    assert_near(leaf.grad[2:6], expected.grad, expected.grad_terms)
    assert (leaf.grad[:2] == 0).all()
    assert_same_bits(activation[6:], leaf[6:])


@pytest.mark.cpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_consuming_allocates_nothing_of_the_logits_size(
    dtype: torch.dtype, reduction: str, device: torch.device, allocations: Callable[[Callable[[], object]], list[int]]
) -> None:
    rows, classes = 32, 4096
    logits = make_logits(rows, classes, dtype, device).requires_grad_() * 1
    target = make_target(rows, classes, device)

    def train() -> None:
        loss = npu_xent.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1, consume_logits=True)
        (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))
        assert grad.data_ptr() == logits.data_ptr()

    assert max(allocations(train)) < rows * classes


REFUSALS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a leaf": (lambda leaf: leaf, "would overwrite a leaf"),
    "a view of a leaf": (lambda leaf: leaf.view(-1).view(9, 21), "would overwrite a leaf"),
    "rows of a leaf": (lambda leaf: leaf[2:], "would overwrite a leaf"),
    "one of several views of a leaf": (lambda leaf: leaf.split(5)[0], "would overwrite a leaf"),
    "a transposed activation": (lambda leaf: (leaf * 1).view(21, 9).t(), "must be contiguous, but have shape"),
    "columns of an activation": (lambda leaf: (leaf * 1)[:, :20], "must be contiguous, but have shape"),
    "an expanded activation": (lambda leaf: (leaf * 1)[:1].expand(9, 21), "must be contiguous, but have shape"),
}


@pytest.mark.parametrize("refused", REFUSALS)
@paths
def test_what_must_not_be_consumed_is_refused_untouched(
    dtype: torch.dtype, reduction: str, refused: str, device: torch.device
) -> None:
    leaf = make_logits(9, 21, dtype, device).requires_grad_()
    build, words = REFUSALS[refused]
    logits = build(leaf)
    before, version = logits.detach().clone(), logits._version
    target = make_target(len(logits), logits.shape[1], device)
    with pytest.raises(ValueError, match=words):
        npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True)
    assert_same_bits(logits, before)
    assert logits._version == version


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_nothing_is_overwritten_where_there_is_no_gradient(mode: Callable[[], Any], device: torch.device) -> None:
    """Whatever the logits: a leaf, a transposed or an expanded tensor would be refused if they were overwritten."""
    leaf, target = make_logits(9, 21, torch.float32, device), make_target(9, 21, device)
    if mode is not contextlib.nullcontext:
        leaf.requires_grad_()
    for logits in (leaf, leaf * 1, leaf.t().contiguous().t(), leaf[:1].expand(9, 21)):
        before, version = logits.detach().clone(), logits._version
        with mode():
            loss = npu_xent.cross_entropy(logits, target, consume_logits=True)
            assert_same_bits(loss, npu_xent.cross_entropy(logits, target))
            probabilities = F.one_hot(target, 21).float()
            npu_xent.cross_entropy(logits, probabilities, consume_logits=True)
        assert_same_bits(logits, before)
        assert logits._version == version


def test_a_negated_view_is_refused(device: torch.device) -> None:
    """torch keeps the sign of such a view aside, and its values are not in memory."""
    if device.type != "cpu":
        pytest.skip("no complex numbers")
    parts = torch.randn(9, 21, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    view, target = torch.view_as_complex(parts * 1).conj().imag, make_target(9, 21, device)
    assert view.is_neg()
    with pytest.raises(ValueError, match=r"pass input.resolve_neg\(\), or leave it off"):
        npu_xent.cross_entropy(view, target, consume_logits=True)
    torch.testing.assert_close(npu_xent.cross_entropy(view, target), F.cross_entropy(view, target))
    npu_xent.cross_entropy(view.resolve_neg().contiguous(), target, consume_logits=True).backward()
    assert parts.grad is not None


@paths
def test_a_bad_argument_leaves_the_logits_unconsumed(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    leaf, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)
    logits = leaf * 1
    bad: list[dict[str, Any]] = [{"label_smoothing": 2.0}, {"weight": torch.ones(20, device=device)}]
    if device.type == "cpu":
        bad.append({"target": target + 21})
    for arguments in bad:
        with pytest.raises((ValueError, IndexError)):
            npu_xent.cross_entropy(logits, **{"target": target} | arguments, reduction=reduction, consume_logits=True)
        assert_same_bits(logits, leaf)


@paths
def test_second_backward_after_consuming_is_refused(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(9, 21, dtype, device).requires_grad_() * 1, make_target(9, 21, device)
    loss = npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True).sum()
    loss.backward(retain_graph=True)
    gradient = logits.clone()
    with pytest.raises(RuntimeError, match="consume_logits"):
        loss.backward(retain_graph=True)
    assert_same_bits(logits, gradient)


@paths
def test_who_saved_the_logits_raises(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """What made them and keeps its result (exp), and what used them before (square)."""
    leaf, target = make_logits(9, 21, dtype, device, spread=1.0).requires_grad_(), make_target(9, 21, device)
    loss = npu_xent.cross_entropy(leaf.exp(), target, reduction=reduction, consume_logits=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    penalty = logits.square().sum()
    loss = npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_consuming_under_autocast(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device)
    expected = truth(logits, target, reduction=reduction, grad_loss=3.0)
    leaf = logits.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = npu_xent.cross_entropy(leaf * 1, target, reduction=reduction, consume_logits=True)
    loss.backward(torch.full_like(loss, 3.0))
    assert loss.dtype == torch.float32
    assert_near(loss, expected.loss, expected.loss_terms)
    assert_near(leaf.grad, expected.grad, expected.grad_terms, roundings=2)


@paths
def test_double_backward_after_consuming_is_refused_in_words(
    dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    logits, target = make_logits(9, 21, dtype, device).requires_grad_() * 1, make_target(9, 21, device)
    loss = npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True).sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(torch.autograd.grad(loss, logits, create_graph=True)[0].sum(), logits)
