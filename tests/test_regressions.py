"""Mistakes that were made once: each test failed before its mend."""

from __future__ import annotations

import pickle

import pytest
import torch
from reference import make_logits, make_target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that may be consumed, and targets."""
    return make_logits(9, 21, dtype, device).requires_grad_() * 1, make_target(9, 21, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_consumed_logits_must_not_be_written_before_the_backward(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = make(device, dtype)
    loss = npu_xent.cross_entropy(logits, target, consume_logits=True)
    with torch.no_grad():
        logits.mul_(100)
    with pytest.raises(RuntimeError, match=r"written since|modified by an inplace operation"):
        loss.backward()


def test_logits_can_be_consumed_once(device: torch.device) -> None:
    logits, target = make(device)
    losses = [npu_xent.cross_entropy(logits, target, consume_logits=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="written since"):
        losses[0].backward()


def test_a_shard_cannot_start_where_its_end_would_wrap_round(device: torch.device) -> None:
    weight = torch.ones(10, device=device)
    row, target = torch.zeros(1, 5, device=device), torch.zeros(1, dtype=torch.long, device=device)
    for num_classes in (10, None):
        with pytest.raises(ValueError, match="must lie within num_classes"):
            torch.ops.npu_xent.row_stats(
                row, target, weight, class_start=2**63 - 5 + (num_classes is None), num_classes=num_classes
            )


def test_broken_constraints_travel_between_processes(device: torch.device) -> None:
    with pytest.raises(npu_xent.ConstraintError) as caught:
        npu_xent.npu_cross_entropy_loss(torch.zeros(3, 0, device=device), torch.zeros(3, device=device).long())
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("value", [2**64 - 100, 2**63])
def test_unsigned_targets_do_not_wrap_round_to_ignore_index(value: int) -> None:
    target = torch.tensor([value], dtype=torch.uint64)
    with pytest.raises(IndexError):
        npu_xent.cross_entropy(torch.zeros(1, 5), target)
    assert npu_xent.cross_entropy(torch.zeros(1, 5), torch.tensor([3], dtype=torch.uint64)).isfinite()


def test_probabilities_take_the_same_dtypes_and_shapes(device: torch.device) -> None:
    logits, q = torch.zeros(3, 4, device=device), torch.full((3, 4), 0.25, device=device)
    with pytest.raises(TypeError, match="logits must be"):
        npu_xent.cross_entropy(logits.long(), q)
    with pytest.raises(TypeError, match="weight must be float32"):
        npu_xent.cross_entropy(logits, q, torch.ones(4, device=device).half())
    with pytest.raises(ValueError, match="weight must have one value"):
        npu_xent.cross_entropy(logits, q, torch.ones(3, device=device))
    with pytest.raises(RuntimeError, match="weight requires a gradient"):
        npu_xent.cross_entropy(logits, q, torch.ones(4, device=device).requires_grad_())
    for shape in ((3, 0), (0,), (3, 0, 2)):
        with pytest.raises(ValueError, match="at least one class"):
            npu_xent.cross_entropy(torch.zeros(shape, device=device), torch.zeros(shape, device=device))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_composite_tells_who_saved_the_logits(
    reduction: str, device: torch.device, composite: type[TorchDispatchMode]
) -> None:
    """tanh saved its output, which the loss overwrites: its own backward must see a new version."""
    leaf, target = make(device)
    logits = leaf.detach().requires_grad_().tanh()
    with composite():
        loss = npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_is_no_tensor_is_named(device: torch.device) -> None:
    logits, target = torch.zeros(3, 4, device=device), torch.zeros(3, dtype=torch.long, device=device)
    for function in (npu_xent.cross_entropy, npu_xent.npu_cross_entropy_loss):
        for wrong in ({"input": [[0.0]]}, {"target": [0, 1, 2]}, {"weight": [1.0] * 4}, {"reduction": None}):
            with pytest.raises(TypeError, match=rf"{function.__name__}: {next(iter(wrong))} must be"):
                function(**{"input": logits, "target": target} | wrong)


def test_shapes_that_are_often_meant_get_a_hint(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"class indices are integers, and this target is torch\.float32"):
        npu_xent.cross_entropy(torch.zeros(4, 7, device=device), torch.zeros(4, device=device))
    with pytest.raises(ValueError, match=r"input\.flatten\(0, -2\), target\.flatten\(\)"):
        npu_xent.cross_entropy(torch.zeros(2, 5, 7, device=device), torch.zeros(2, 5, device=device).long())
