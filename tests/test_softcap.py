"""softcap: softcap * tanh(logits / softcap) in the place of the logits.

Its mixes with the other options are in the covering arrays of the other files; here is what is its own: the ends of
tanh, NaN and infinities, the range, and its accuracy beside torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import (
    INF,
    NAN,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    loss_and_grad,
    make_logits,
    make_target,
    max_error,
    named,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import npu_xent

pytestmark = pytest.mark.isa


def by_torch(logits: Tensor, target: Tensor, *, softcap: float, **options: Any) -> Tensor:
    """The loss as a model would compute it, in the dtype of the logits."""
    return F.cross_entropy(softcap * torch.tanh(logits / softcap), target, **options)


@pytest.mark.parametrize("classes", [67, 1000, 5000])
@pytest.mark.parametrize("softcap", [1e-6, 0.1, 3.0, 30.0, 1e6])
def test_from_all_but_linear_to_saturated(
    softcap: float, classes: int, function: Callable[..., Tensor], device: torch.device
) -> None:
    """Beside logits of up to about 12: both ends of tanh."""
    logits, target = make_logits(5, classes, torch.float32, device), make_target(5, classes, device)
    expected = truth(logits, target, softcap=softcap)
    loss, grad = loss_and_grad(function, logits, target, softcap=softcap)
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, name="grad")


def test_tanh_is_as_good_as_torchs(device: torch.device) -> None:
    """The capped logits themselves, by way of picked: within a few units in the last place, however small they are."""
    x = torch.cat([torch.logspace(-30, 2.5, 3000), torch.linspace(0.5, 0.75, 1096)])
    logits = torch.stack([x, -x], dim=1).to(device)
    target = torch.zeros(len(x), dtype=torch.int64, device=device)
    picked = named("row_stats", logits, target, softcap=2.0)["picked"].cpu().double()
    expected = 2 * (x.double() / 2).tanh()
    assert float(((picked - expected) / expected).abs().max()) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_errors_are_no_larger_than_torchs(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(16, 4000, dtype, device, spread=10.0), make_target(16, 4000, device)
    expected = truth(logits, target, softcap=15.0, reduction=reduction)
    ours = loss_and_grad(npu_xent.cross_entropy, logits, target, softcap=15.0, reduction=reduction)
    theirs = loss_and_grad(by_torch, logits, target, softcap=15.0, reduction=reduction)
    for our, their, true in zip(ours, theirs, (expected.loss, expected.grad), strict=True):
        assert max_error(our, true) <= max_error(their, true) + 1e-6 * float(true.abs().max())


@pytest.mark.parametrize("classes", [67, 1100, 5000])
def test_confident_predictions(classes: int, function: Callable[..., Tensor], device: torch.device) -> None:
    """The target's logit, the maximum and the sum are off by the same, or the difference would be all of the loss."""
    logits, target = make_logits(64, classes, torch.float32, device), make_target(64, classes, device)
    logits[torch.arange(64), target] += 60
    for reduction in ("none", "sum"):  # two sweeps and one
        expected = truth(logits, target, softcap=30.0, reduction=reduction)
        loss, grad = loss_and_grad(function, logits, target, softcap=30.0, reduction=reduction)
        assert max_error(loss, expected.loss) < 5e-7 * (64 if reduction == "sum" else 1)
        assert max_error(grad, expected.grad) < 5e-8


@pytest.mark.parametrize("classes", [7, 1100])
def test_infinities_count_as_the_cap_and_nan_stays(
    classes: int, function: Callable[..., Tensor], device: torch.device
) -> None:
    """As torch has it: tanh of an infinity is 1 or -1, and its derivative 0."""
    logits, target = make_logits(4, classes, torch.float32, device), make_target(4, classes, device)
    logits[0, 3], logits[1, 4], logits[2, 5] = INF, -INF, NAN
    target[0], target[1] = 3, 4
    loss, grad = loss_and_grad(function, logits, target, softcap=2.0, reduction="none")
    their_loss, their_grad = loss_and_grad(by_torch, logits.cpu(), target.cpu(), softcap=2.0, reduction="none")
    torch.testing.assert_close(loss.cpu(), their_loss, equal_nan=True)
    torch.testing.assert_close(grad.cpu(), their_grad, equal_nan=True)
    assert bool(grad[2].isnan().all())
    assert float(grad[0, 3]) == float(grad[1, 4]) == 0
    assert not loss[torch.tensor([0, 1, 3])].isnan().any()


def test_it_caps_what_is_returned_besides(device: torch.device) -> None:
    logits, target = make_logits(5, 11, torch.float32, device, spread=10.0), make_target(5, 11, device)
    target[1] = -100
    options = {"softcap": 2.0, "lse_square_scale": 0.1}
    expected = truth(logits, target, **options)
    out = npu_xent.cross_entropy(logits, target, **options, return_lse=True, return_z_loss=True)
    assert_near(out.lse, expected.lse, expected.lse.abs(), name="lse")
    assert_near(out.z_loss, expected.z_loss, expected.z_loss, name="z_loss")
    q = F.one_hot(target.clamp(min=0), 11).float()
    other = npu_xent.cross_entropy(logits, q, **options, return_lse=True)
    torch.testing.assert_close(other.lse, out.lse)


def test_none_is_the_default(function: Callable[..., Tensor], device: torch.device) -> None:
    logits, target = make_logits(5, 11, torch.float32, device), make_target(5, 11, device)
    for result, expected in zip(
        loss_and_grad(function, logits, target, softcap=None), loss_and_grad(function, logits, target), strict=True
    ):
        assert_same_bits(result, expected)


@pytest.mark.parametrize("softcap", [0.0, -30.0, 9e-7, 1.1e6, INF, NAN])
def test_out_of_range(softcap: float, function: Callable[..., Tensor], device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    words = r"softcap must lie in \[1e-6, 1e6\], but is .*; leave it at None for no softcap"
    with pytest.raises(ValueError, match=words):
        loss_and_grad(function, logits, target, softcap=softcap)
    with pytest.raises(ValueError, match=words):
        npu_xent.cross_entropy(logits, F.one_hot(target, 5).float(), softcap=softcap)
    for name in ("row_stats", "row_stats_grad"):
        totals = torch.ones(3, device=device) if name == "row_stats_grad" else None
        with pytest.raises(ValueError, match=words):
            named(name, logits, target, None, *([totals] if totals is not None else []), softcap=softcap)
