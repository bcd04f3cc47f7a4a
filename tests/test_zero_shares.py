"""A class whose weight, smoothing share or probability is 0 contributes 0, even if its logit is -inf."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import REDUCTIONS, assert_near, loss_and_grad, make_logits, make_target, make_weight, truth
from torch.nn import functional as F

import npu_xent

CLASSES = (5, 21, 65, 5001, 70000)  # short and long rows, several chunks, and parts of rows on an NPU


@pytest.mark.isa
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {}], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", CLASSES)
def test_class_weight(classes: int, reduction: str, options: dict[str, Any], device: torch.device) -> None:
    """Every third class is masked and has no weight; some rows have such a target."""
    logits, target = make_logits(6, classes, torch.float32, device), make_target(6, classes, device)
    weight = make_weight(classes, torch.float32, device)
    masked = torch.arange(classes, device=device) % 3 == 0
    logits[:, masked], weight[masked], target[2] = -math.inf, 0.0, 3
    expected = truth(logits, target, weight, reduction=reduction, **options)
    assert expected.loss.isfinite().all()
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, weight, reduction=reduction, **options)
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, name="gradient")


@pytest.mark.parametrize("classes", CLASSES)
def test_a_whole_chunk(classes: int, device: torch.device) -> None:
    """All classes of the first chunks have no weight and no logit."""
    logits, target = make_logits(2, classes, torch.float32, device), torch.tensor([classes - 1] * 2, device=device)
    weight = torch.ones(classes, device=device)
    logits[:, : classes - 1], weight[: classes - 1] = -math.inf, 0.0
    loss = npu_xent.cross_entropy(logits, target, weight, label_smoothing=0.5)
    assert float(loss) == 0.0


@pytest.mark.parametrize("classes", CLASSES)
def test_a_class_with_weight_still_counts(classes: int, device: torch.device) -> None:
    logits, target = make_logits(6, classes, torch.float32, device), make_target(6, classes, device)
    weight = make_weight(classes, torch.float32, device)
    logits[:, 0], logits[:, 2], weight[0] = -math.inf, -math.inf, 0.0
    target[:] = 1
    loss = npu_xent.cross_entropy(logits, target, weight, label_smoothing=0.1, reduction="none")
    assert (loss == math.inf).all()


def test_smoothing_of_one_leaves_the_target_out(device: torch.device) -> None:
    logits, target = make_logits(6, 21, torch.float32, device), make_target(6, 21, device)
    weight = torch.ones(21, device=device)
    logits[:, 4], weight[4], target[0] = -math.inf, 0.0, 4
    options = {"label_smoothing": 1.0, "reduction": "none"}
    expected = truth(logits, target, weight, **options)
    loss = npu_xent.cross_entropy(logits, target, weight, **options)
    assert_near(loss, expected.loss, expected.loss_terms)


@pytest.mark.isa
@pytest.mark.parametrize("classes", [2, 40, 5000, 70000])
def test_weights_that_add_up_to_zero(classes: int, device: torch.device) -> None:
    """Only single weights of 0 switch anything off, not those of a chunk together."""
    logits, target = make_logits(3, classes, torch.float32, device), make_target(3, classes, device)
    weight = torch.tensor([1.0, -1.0], device=device).repeat(classes // 2)
    options = {"label_smoothing": 0.3, "reduction": "none"}
    expected = truth(logits, target, weight, **options)
    loss = npu_xent.cross_entropy(logits, target, weight, **options)
    sizes = truth(logits, target, weight.abs(), **options).loss_terms
    assert_near(loss, expected.loss, sizes)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities(reduction: str, weighted: bool, device: torch.device) -> None:
    logits = make_logits(6, 21, torch.float32, device)
    probabilities = F.one_hot(make_target(6, 20, device) + 1, 21).float()
    weight = make_weight(21, torch.float32, device) if weighted else None
    logits[:, 0] = -math.inf
    leaf, q = logits.clone().requires_grad_(), probabilities.clone().requires_grad_()
    loss = npu_xent.cross_entropy(leaf, q, weight, reduction=reduction)
    by_index = F.cross_entropy(logits, probabilities.argmax(1), weight, reduction="none")
    expected = {"none": by_index, "sum": by_index.sum(), "mean": by_index.mean()}[reduction]
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert leaf.grad.isfinite().all()
    assert q.grad.isfinite().all()


def test_functional_transforms(device: torch.device) -> None:
    logits, target = make_logits(6, 21, torch.float32, device), make_target(6, 20, device) + 1
    weight = make_weight(21, torch.float32, device)
    logits[:, 0], weight[0] = -math.inf, 0.0

    def loss(x: torch.Tensor) -> torch.Tensor:
        return npu_xent.cross_entropy(x, target, weight, label_smoothing=0.1)

    grad, value = torch.func.grad_and_value(loss)(logits)
    expected, expected_grad = loss_and_grad(lambda x, y: loss(x), logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)
