"""The reference itself, against torch in float64: a wrong truth would make every other test worthless."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from option_values import factors
from reference import (
    INF,
    NAN,
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    make_weight,
    max_error,
    pairwise,
    tolerance,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

CPU = torch.device("cpu")
CASES = pairwise(
    factors(
        *("reduction", "weighted", "ignore_index", "label_smoothing", "lse_square_scale", "logit_scale", "softcap"),
        dtype=(torch.float64, torch.bfloat16),
    )
)


def mapped(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """What the softmax sees."""
    x = logit_scale * logits
    return x if softcap is None else softcap * (x / softcap).tanh()


def torch_loss(
    logits: Tensor,
    y: Tensor,
    w: Tensor | None,
    *,
    lse_square_scale: float,
    logit_scale: float,
    softcap: float | None,
    **options: Any,
) -> Tensor:
    """The loss by torch's own functions, z-loss included."""
    x = mapped(logits, logit_scale, softcap)
    loss = F.cross_entropy(x, y, w, **options)
    z = lse_square_scale * x.logsumexp(1).square() * (y != options["ignore_index"])
    if options["reduction"] == "none":
        return loss + z
    return loss + (z.sum() if options["reduction"] == "sum" else z.sum() / (y != options["ignore_index"]).sum())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_truth_is_torch_in_float64(case: dict[str, Any]) -> None:
    case = dict(case)
    ignore_index, weighted, dtype = (case.pop(name) for name in ("ignore_index", "weighted", "dtype"))
    options = case | {"ignore_index": -100 if ignore_index is None else ignore_index}
    logits, target = make_logits(9, 7, dtype, CPU), make_target(9, 7, CPU, ignore_index=ignore_index)
    weight = make_weight(7, torch.float64, CPU) if weighted else None
    upstream = torch.randn(() if options["reduction"] != "none" else (9,), dtype=torch.float64)

    found = truth(logits, target, weight, grad_loss=upstream, **options)

    leaf = logits.double().requires_grad_()
    loss = torch_loss(leaf, target, weight, **options)
    loss.backward(upstream)
    assert max_error(loss, found.loss) < 1e-12
    assert max_error(leaf.grad, found.grad) < 1e-13
    z = mapped(leaf.detach(), options["logit_scale"], options["softcap"])
    assert max_error(z.logsumexp(1), found.lse) < 1e-13
    assert max_error(z.log_softmax(1), found.log_prob) < 1e-13


def test_truth_gives_the_z_loss_and_its_gradient() -> None:
    logits, target = make_logits(5, 4, torch.float64, CPU), make_target(5, 4, CPU, ignore_index=-100)
    leaf = logits.clone().requires_grad_()
    z = (0.3 * leaf.logsumexp(1).square() * (target != -100)).sum() / (target != -100).sum()
    z.backward(torch.tensor(2.0))
    found = truth(logits, target, lse_square_scale=0.3, grad_loss=0.0, grad_z_loss=2.0)
    assert max_error(z, found.z_loss) < 1e-13
    assert max_error(leaf.grad, found.grad) < 1e-13


def test_grad_scale_takes_the_place_of_logit_scale() -> None:
    logits, target = make_logits(3, 4, torch.float64, CPU), make_target(3, 4, CPU)
    scaled = truth(logits, target, logit_scale=0.5)
    assert max_error(scaled.grad * 6, truth(logits, target, logit_scale=0.5, grad_scale=3.0).grad) < 1e-14


SPECIAL = {
    "-inf beside the target": [0.0, -INF, 1.0],
    "-inf at the target": [-INF, 0.0, 1.0],
    "nothing but -inf": [-INF, -INF, -INF],
    "+inf": [0.0, INF, 1.0],
    "NaN": [0.0, NAN, 1.0],
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row", SPECIAL.values(), ids=SPECIAL)
def test_truth_has_torchs_special_values(row: list[float], label_smoothing: float) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1])
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    loss.backward()
    found = truth(logits, target, label_smoothing=label_smoothing)
    torch.testing.assert_close(found.loss, loss.detach(), equal_nan=True)
    torch.testing.assert_close(found.grad, logits.grad, equal_nan=True)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_truth_is_torch_where_there_is_nothing_to_divide_by(label_smoothing: float) -> None:
    logits, weight = make_logits(3, 4, torch.float64, CPU), torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    for target, w in ((torch.full((3,), -100), None), (torch.tensor([0, 1, 0]), weight)):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf, target, w, label_smoothing=label_smoothing)
        loss.backward()
        found = truth(logits, target, w, label_smoothing=label_smoothing)
        assert loss.isnan()
        assert found.loss.isnan()
        torch.testing.assert_close(found.grad, leaf.grad, equal_nan=True)


def test_tolerance_is_a_rounding_and_a_few_units_of_the_statistics() -> None:
    one = torch.ones((), dtype=torch.float64)
    assert float(tolerance(one, 0, torch.bfloat16)) == pytest.approx(2**-8)
    assert float(tolerance(one, 0, torch.bfloat16, roundings=2)) == pytest.approx(2**-7)
    assert float(tolerance(one, 0, torch.float16)) == pytest.approx(2**-11, rel=1e-3)  # with half a subnormal
    assert float(tolerance(one, 1, torch.float32)) == pytest.approx(2**-24 + 2**-21)
    assert float(tolerance(one, 1, torch.float64)) == pytest.approx(2**-53 + 2**-50)


def test_assert_near_notices() -> None:
    expected = torch.tensor([1.0, NAN, INF, 0.0], dtype=torch.float64)
    assert_near(expected.float(), expected, 1.0)
    for wrong in ([1.00001, NAN, INF, 0.0], [1.0, 0.0, INF, 0.0], [1.0, NAN, -INF, 0.0], [1.0, NAN, INF, NAN]):
        with pytest.raises(AssertionError):
            assert_near(torch.tensor(wrong), expected, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_near(torch.ones(1), torch.ones((), dtype=torch.float64), 1.0)


def test_assert_same_bits_notices() -> None:
    assert_same_bits(torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]))
    for other in (torch.tensor(-0.0), torch.tensor([0.0]), torch.tensor(0.0).double()):
        with pytest.raises(AssertionError):
            assert_same_bits(torch.tensor(0.0), other)


@pytest.mark.parametrize("sizes", [(2, 2), (4, 3, 2), (8, 4, 4, 3, 3, 2, 2, 2)], ids=str)
def test_pairwise_covers_every_pair_with_few_cases(sizes: tuple[int, ...]) -> None:
    factors = {f"factor {i}": range(size) for i, size in enumerate(sizes)}
    cases = pairwise(factors)
    for (a, i), (b, j) in itertools.combinations([(name, v) for name, values in factors.items() for v in values], 2):
        assert a == b or any(case[a] == i and case[b] == j for case in cases)
    lower_bound = sorted(sizes)[-1] * sorted(sizes)[-2]
    assert lower_bound <= len(cases) <= 1.5 * lower_bound
    assert cases == pairwise(factors)
