"""Corner cases: what happens at the edges of the definition, beside what torch does there.

Each test also asserts torch's own behaviour, on the CPU, so that a change in torch is noticed. float32 with "mean" or
"sum" takes the one-sweep path, float16 and "none" the two-sweep path; `consume_logits` writes over the logits.
"""

from __future__ import annotations

import warnings
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
    make_weight,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import npu_xent

pytestmark = pytest.mark.isa


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """One dtype for each path."""
    return request.param


@pytest.fixture(params=REDUCTIONS)
def reduction(request: pytest.FixtureRequest) -> str:
    """Each reduction."""
    return request.param


def torchs(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and the gradient by torch on the CPU."""
    return loss_and_grad(
        F.cross_entropy, logits.cpu(), target.cpu(), None if weight is None else weight.cpu(), **options
    )


def assert_all(values: Tensor, expected: float) -> None:
    """Every value is `expected`, NaN included."""
    assert_same_bits(
        values.double().nan_to_num(nan=12345.0), torch.full_like(values, expected).double().nan_to_num(12345.0)
    )


# Nothing to average over ----------------------------------------------------------------------------------------------


def test_all_rows_ignored(
    function: Callable[..., Tensor], dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    logits, target = make_logits(3, 5, dtype, device), torch.full((3,), -100, device=device)
    for loss, grad in (
        loss_and_grad(function, logits, target, reduction=reduction),
        torchs(logits, target, reduction=reduction),
    ):
        assert_all(loss, NAN if reduction == "mean" else 0.0)
        assert_all(grad.abs(), 0.0)


def test_no_rows(function: Callable[..., Tensor], dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(0, 5, dtype, device), make_target(0, 5, device)
    for loss, grad in (
        loss_and_grad(function, logits, target, reduction=reduction),
        torchs(logits, target, reduction=reduction),
    ):
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert_all(loss, NAN if reduction == "mean" else 0.0)
        assert grad.shape == (0, 5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_kept_weights_add_up_to_zero(
    function: Callable[..., Tensor], dtype: torch.dtype, label_smoothing: float, device: torch.device
) -> None:
    logits, target = make_logits(3, 5, dtype, device), torch.tensor([0, 1, -100], device=device)
    weight = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=dtype, device=device)
    options = {"label_smoothing": label_smoothing}
    theirs = torchs(logits, target, weight, **options)
    for loss, grad in (loss_and_grad(function, logits, target, weight, **options), theirs):
        assert_all(loss, NAN)
        assert_all(grad[:2], NAN)
        assert_all(grad[2].abs(), 0.0)


def test_zero_weights_that_are_not_divided_by(function: Callable[..., Tensor], device: torch.device) -> None:
    logits, target = make_logits(2, 5, torch.float32, device), torch.tensor([0, 1], device=device)
    weight = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], device=device)
    for f in (function, F.cross_entropy):
        loss, grad = loss_and_grad(f, logits, target, weight, reduction="sum")
        assert_all(loss.abs(), 0.0)
        assert_all(grad.abs(), 0.0)


# Infinities and NaN ---------------------------------------------------------------------------------------------------

SPECIAL = {
    "-inf beside the target": [0.0, -INF, 1.0],
    "-inf at the target": [-INF, 0.0, 1.0],
    "nothing but -inf": [-INF, -INF, -INF],
    "+inf": [0.0, INF, 1.0],
    "+inf at the target": [INF, 0.0, 1.0],
    "NaN": [0.0, NAN, 1.0],
    "NaN, +inf and -inf": [-INF, NAN, INF],
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("special", SPECIAL)
def test_special_rows_are_torchs(
    special: str,
    label_smoothing: float,
    function: Callable[..., Tensor],
    dtype: torch.dtype,
    reduction: str,
    device: torch.device,
) -> None:
    """The truth says what the rows are; torch, and what follows in the test below, says that the truth is right."""
    logits = torch.tensor([SPECIAL[special], [0.0, 1.0, 2.0]], dtype=dtype, device=device)
    target = torch.tensor([0, 1], device=device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    expected = truth(logits, target, **options)
    loss, grad = loss_and_grad(function, logits, target, **options)
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, name="grad")
    for theirs, true in zip(torchs(logits, target, **options), (expected.loss, expected.grad), strict=True):
        torch.testing.assert_close(theirs.double(), true, equal_nan=True, rtol=1e-2, atol=1e-3)


def test_special_rows_in_words(function: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """The lines of the table, one by one."""

    def row(special: str, target: int, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits = torch.tensor([SPECIAL[special]], dtype=dtype, device=device)
        y = torch.tensor([target], device=device)
        return loss_and_grad(function, logits, y, label_smoothing=label_smoothing)

    loss, grad = row("-inf beside the target", 0)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert float(grad[0, 1]) == 0
    loss, grad = row("-inf beside the target", 0, label_smoothing=0.1)
    assert float(loss) == INF
    assert grad.isfinite().all()
    loss, grad = row("-inf at the target", 0)
    assert float(loss) == INF
    assert grad.isfinite().all()
    assert float(grad[0, 0]) == -1
    for special in ("nothing but -inf", "+inf", "+inf at the target", "NaN", "NaN, +inf and -inf"):
        loss, grad = row(special, 0)
        assert_all(loss, NAN)
        assert_all(grad, NAN)


# First and last lanes of both vectors of a block, both sides of the border between chunks of 4096 columns; in the last
# chunk a block that is full, and one that lacks its last lane: for vectors of 4, 8 and 16.
CLASSES = 2 * 4096 + 25 * 32 + 31
COLUMNS = [
    0,
    1,
    15,
    16,
    31,
    32,
    4095,
    4096,
    4111,
    8191,
    8192,
    8208,
    8991,
    8992,
    9007,
    9008,
    9015,
    9016,
    9020,
    9021,
    9022,
]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_special_values_anywhere_in_a_row(
    value: float, function: Callable[..., Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """A vectorised loop that loses a NaN does so in some lanes only. The last row has none and stays finite."""
    rows = len(COLUMNS)
    logits = make_logits(rows + 1, CLASSES, dtype, device, spread=1.0)
    target = torch.full((rows + 1,), 4242, device=device)
    logits[range(rows), COLUMNS] = value
    expected = truth(logits, target, reduction="sum")
    loss, grad = loss_and_grad(function, logits, target, reduction="sum")
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, name="grad")
    with torch.no_grad():
        lse = npu_xent.cross_entropy(logits, target, return_lse=True).lse
    assert_near(lse, expected.lse, 20.0, name="lse")
    assert grad[-1].isfinite().all()
    if value == -INF:
        assert_all(grad[range(rows), COLUMNS].abs(), 0.0)
    else:
        assert_all(grad[:-1], NAN)


def test_a_whole_chunk_of_minus_infinity(
    function: Callable[..., Tensor], dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    """As a mask on the vocabulary makes it: that chunk has no maximum to subtract."""
    logits, target = make_logits(3, 9001, dtype, device), torch.tensor([5000, 1, 9000], device=device)
    logits[0, :4096] = -INF
    logits[1, 4096:8192] = -INF
    logits[2, :8192] = -INF
    expected = truth(logits, target, reduction=reduction)
    loss, grad = loss_and_grad(function, logits, target, reduction=reduction)
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, name="grad")
    assert_all(grad[logits == -INF].abs(), 0.0)


def test_largest_finite_logits(
    function: Callable[..., Tensor], dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    """Nothing overflows on the way: the maximum is subtracted before anything is exponentiated."""
    top = torch.finfo(dtype).max
    logits = torch.tensor([[top, -top, 0.0], [top, top / 2, -top]], dtype=dtype, device=device)
    target = torch.tensor([0, 1], device=device)
    loss, grad = loss_and_grad(function, logits, target, reduction=reduction)
    their_loss, their_grad = torchs(logits, target, reduction=reduction)
    torch.testing.assert_close(loss.cpu(), their_loss, rtol=0, atol=0)
    torch.testing.assert_close(grad.cpu(), their_grad, rtol=0, atol=0)


@pytest.mark.parametrize("special", SPECIAL)
def test_ignored_rows_may_hold_anything(
    special: str, function: Callable[..., Tensor], dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    """Loss as without them, gradient 0. torch multiplies their gradient by 0, which leaves a NaN a NaN."""
    logits = torch.tensor([SPECIAL[special], [0.0, 1.0, 2.0]], dtype=dtype, device=device)
    target = torch.tensor([-100, 1], device=device)
    loss, grad = loss_and_grad(function, logits, target, reduction=reduction)
    alone, alone_grad = loss_and_grad(function, logits[1:], target[1:], reduction=reduction)
    assert_all(grad[0].abs(), 0.0)
    assert_same_bits(grad[1:], alone_grad)
    assert_same_bits(loss[1:] if reduction == "none" else loss, alone)
    their_loss, their_grad = torchs(logits, target, reduction=reduction)
    assert their_loss.isfinite().all()
    if special not in ("-inf beside the target", "-inf at the target"):
        assert_all(their_grad[0], NAN)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_lse_of_special_rows(requires_grad: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Ignored rows included; as torch.logsumexp has it."""
    logits = torch.tensor(list(SPECIAL.values()), dtype=dtype, device=device).requires_grad_(requires_grad)
    expected = logits.detach().cpu().double().logsumexp(1)
    for target in (0, -100):
        y = torch.full((len(SPECIAL),), target, device=device)
        out = npu_xent.cross_entropy(logits, y, reduction="sum", return_lse=True)
        assert_near(out.lse, expected, 10.0)
        assert float(out.lse[2]) == -INF
        assert target == 0 or float(out.loss.detach()) == 0


# Targets and ignore_index ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, 10**12, -1, -101, -(10**12)])
def test_target_out_of_range(
    bad: int, function: Callable[..., Tensor], dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    logits, target = make_logits(3, 5, dtype, device), torch.tensor([0, bad, 4], device=device)
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(logits.cpu(), target.cpu())
    if device.type == "cpu":
        words = rf"target\[1\] is {bad}, which is neither a class in \[0, 5\) nor ignore_index \(-100\)"
        with pytest.raises(IndexError, match=words):
            loss_and_grad(function, logits, target, reduction=reduction)
        with torch.no_grad(), pytest.raises(IndexError, match=words):
            npu_xent.cross_entropy(logits, target, reduction=reduction)
    else:  # nothing waits for the device: the row is NaN, and counts nothing
        loss, grad = loss_and_grad(function, logits, target, reduction=reduction)
        assert_all(loss[1] if reduction == "none" else loss, NAN)
        assert_all(grad[1], NAN)
        assert grad[::2].isfinite().all()


@pytest.mark.parametrize("ignore_index", [-1, 7, 10**12, 0])
def test_any_ignore_index(ignore_index: int, function: Callable[..., Tensor], device: torch.device) -> None:
    """A class, or any other number."""
    logits, target = make_logits(4, 5, torch.float32, device), make_target(4, 5, device, ignore_index=ignore_index)
    expected = truth(logits, target, ignore_index=ignore_index)
    loss, grad = loss_and_grad(function, logits, target, ignore_index=ignore_index)
    assert_near(loss, expected.loss, expected.loss_terms)
    assert_near(grad, expected.grad, expected.grad_terms)
    torch.testing.assert_close(torchs(logits, target, ignore_index=ignore_index)[0], loss.cpu())


def test_minus_100_is_out_of_range_unless_it_is_the_ignore_index(device: torch.device) -> None:
    logits, target = make_logits(4, 5, torch.float32, device), make_target(4, 5, device, ignore_index=-100)
    with pytest.raises(IndexError):
        F.cross_entropy(logits.cpu(), target.cpu(), ignore_index=-1)
    if device.type == "cpu":
        with pytest.raises(IndexError, match="is -100, which is neither"):
            npu_xent.cross_entropy(logits, target, ignore_index=-1)


# Arguments that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant logits", "logits in training"])
def test_weight_that_requires_a_gradient(requires_grad: bool, device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    logits.requires_grad_(requires_grad)
    weight = make_weight(5, torch.float32, device).requires_grad_()
    with pytest.raises(RuntimeError, match="weight requires a gradient"):
        npu_xent.cross_entropy(logits, target, weight)
    with pytest.raises(RuntimeError, match="weight"):
        F.cross_entropy(logits.cpu(), target.cpu(), weight.cpu())
    with torch.no_grad():  # where nothing is differentiated both take it
        ours = npu_xent.cross_entropy(logits, target, weight)
        torch.testing.assert_close(ours.cpu(), F.cross_entropy(logits.cpu(), target.cpu(), weight.cpu()))


@pytest.mark.parametrize("label_smoothing", [-1e-9, -0.1, 1.0000001, 2.0, NAN, INF])
def test_label_smoothing_outside_0_and_1(
    label_smoothing: float, function: Callable[..., Tensor], device: torch.device
) -> None:
    """torch refuses what is above 1 and takes what is below 0 for 0."""
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], but is"):
        loss_and_grad(function, logits, target, label_smoothing=label_smoothing)
    if label_smoothing > 1:
        with pytest.raises(RuntimeError, match="label_smoothing"):
            torchs(logits, target, label_smoothing=label_smoothing)
    elif label_smoothing < 0:
        their_loss, _ = torchs(logits, target, label_smoothing=label_smoothing)
        assert_same_bits(their_loss, torchs(logits, target)[0])


@pytest.mark.parametrize("scale", [-1e-9, NAN, INF])
def test_lse_square_scale_out_of_range(scale: float, function: Callable[..., Tensor], device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    with pytest.raises(ValueError, match="lse_square_scale must be finite and not negative, but is"):
        loss_and_grad(function, logits, target, lse_square_scale=scale)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"softcap": "30"}, "softcap must be a number, but is a str"),
        ({"label_smoothing": None}, "label_smoothing must be a number, but is a NoneType"),
        ({"lse_square_scale": [1e-4]}, "lse_square_scale must be a number, but is a list"),
        ({"ignore_index": None}, "ignore_index must be an integer, but is a NoneType"),
        ({"ignore_index": 1.0}, "ignore_index must be an integer, but is a float"),
    ],
)
def test_what_is_no_number(options: dict[str, Any], words: str, device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    with pytest.raises(TypeError, match=f"npu_xent.cross_entropy: {words}"):
        npu_xent.cross_entropy(logits, target, **options)


def test_unknown_reduction(function: Callable[..., Tensor], device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", but is "batchmean"'):
        loss_and_grad(function, logits, target, reduction="batchmean")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="batchmean"):
        F.cross_entropy(logits, target, reduction="batchmean")


def test_shapes_that_do_not_match(function: Callable[..., Tensor], device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    for y, w, words in (
        (target[:2], None, "target must have one value for each of the 3 rows of the logits, but has 2"),
        (target, torch.ones(4, device=device), "weight must have one value for each of the 5 classes, but has 4"),
        (target, torch.ones(5, 1, device=device), r"weight must have shape \[C\], but has 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=words):
            loss_and_grad(function, logits, y, w)
        with pytest.raises((ValueError, RuntimeError)):
            torchs(logits, y, w)
    with pytest.raises(ValueError, match=r"logits must have at least one class, but have shape \[3, 0\]"):
        loss_and_grad(function, logits[:, :0], target)


def test_integer_logits(device: torch.device) -> None:
    logits, target = torch.zeros(3, 5, dtype=torch.int32, device=device), make_target(3, 5, device)
    with pytest.raises(TypeError, match=r"logits must be float32, bfloat16, float16 or float64, but are torch\.int32"):
        npu_xent.cross_entropy(logits, target)
    with pytest.raises((RuntimeError, NotImplementedError)):
        F.cross_entropy(logits.cpu(), target.cpu())
