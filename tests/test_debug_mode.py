"""NPU_XENT_DEBUG=1: values on an NPU are checked as they are on the CPU, which waits for the device."""

from __future__ import annotations

import types

import pytest
import torch
from reference import make_logits, make_target

import npu_xent
from npu_xent._constraints import check_documented_constraints


class OnNpu(torch.Tensor):
    """A tensor of the host that says it is on an npu."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = types.SimpleNamespace(type="npu")


BAD_WEIGHT = torch.tensor([0.5, 1.0, 1.5])


def check(weight: torch.Tensor) -> None:
    check_documented_constraints(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), weight, "sum", -100, 0, 0, False)


@pytest.mark.cpu
@pytest.mark.parametrize("value", [None, "", "0"])
def test_weights_on_an_npu_are_not_looked_at(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPU_XENT_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("NPU_XENT_DEBUG", value)
    check(BAD_WEIGHT.as_subclass(OnNpu))
    with pytest.raises(npu_xent.ConstraintError, match="weight"):
        check(BAD_WEIGHT)


@pytest.mark.cpu
def test_weights_on_an_npu_are_looked_at_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPU_XENT_DEBUG", raising=False)
    check(BAD_WEIGHT.as_subclass(OnNpu))
    monkeypatch.setenv("NPU_XENT_DEBUG", "1")  # read at each call
    with pytest.raises(npu_xent.ConstraintError, match=r"must lie in \(0, 1\], but weight\[2\] is 1.5"):
        check(BAD_WEIGHT.as_subclass(OnNpu))
    check(BAD_WEIGHT.clamp(max=1).as_subclass(OnNpu))


def test_values_on_the_device_under_test(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_XENT_DEBUG", "1")
    logits, target = make_logits(5, 3, torch.float32, device), make_target(5, 3, device)
    with pytest.raises(npu_xent.ConstraintError, match=r"weight\[2\] is 1.5"):
        npu_xent.npu_cross_entropy_loss(logits, target, BAD_WEIGHT.to(device))
    with pytest.raises(IndexError, match=r"target\[0\] is 3"):
        npu_xent.cross_entropy(logits, target + 1)


def test_primitives_check_targets_wherever_they_are_called(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU always, so this holds there without the variable too."""
    monkeypatch.setenv("NPU_XENT_DEBUG", "1")
    logits, target = make_logits(5, 3, torch.float32, device), make_target(5, 3, device) + 1
    stats = torch.zeros(5, device=device)
    ones = torch.ones(3, device=device)
    ops, sizes = torch.ops.npu_xent, {"num_classes": 3, "loss_dtype": torch.float32}
    for call in (
        lambda: ops.row_stats(logits, target),
        lambda: ops.row_grad(logits, target, None, stats, None, ones, None),
        lambda: ops.row_stats_grad(logits, target, None, ones),
        lambda: ops.reduce_rows(target, None, **sizes),
        lambda: ops.reduce_rows(target, None, lse=stats, picked=stats, totals=ones, **sizes),
    ):
        with pytest.raises(IndexError, match=r"target\[0\] is 3, which is neither a class in \[0, 3\)"):
            call()
