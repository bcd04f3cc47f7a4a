"""token_log_probs: log-probabilities, entropy, top-1 and their gradient, over dtypes, shapes and options.

Compared with the float64 truth of token_cases.py, which test_token_reference.py compares with torch's autograd. What is
built around the function (autograd's rules, compilers, threads, refusals) is in test_token_operators.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from option_values import factors
from reference import (
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    max_error,
    pairwise,
    stats_dtype,
)
from token_cases import (
    TokenTruth,
    outputs_and_grad,
    plain,
    temperatures,
    token_target,
    token_truth,
    upstreams,
    with_masks,
)
from torch import Tensor

import npu_xent

# Both sides of a vector, of a chunk of 1024 and of one of 4096 classes; one class; no rows.
SHAPES = [
    *((0, 7), (3, 1), (5, 2), (97, 3), (97, 17), (33, 100), (9, 1000), (5, 1024), (5, 1025), (5, 4096), (4, 5000)),
    (3, 32000),
]
OPTIONS = {
    "temperature": (1.0, 0.7, "one a row"),
    "softcap": (None, 2.0),
    "logit_scale": (1.0, 0.7, -0.5),
    "ignore_index": (None, -100, 1),
}
CASES = pairwise(
    factors(
        "dtype",
        shape=SHAPES,
        layout=LAYOUTS,
        masked=(False, True),
        uses=("both", "log_probs", "entropy"),
        consume=(False, True),
        **OPTIONS,
    )
)


def options_of(case: dict[str, Any], rows: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """The keywords of a case, for targets of shape `rows`."""
    options = {name: case[name] for name in OPTIONS}
    if options["temperature"] == "one a row":
        options["temperature"] = temperatures(rows, device)
    if options["ignore_index"] is None:
        del options["ignore_index"]
    return options


def assert_all_near(out: npu_xent.TokenLogProbs, grad: Tensor, expected: TokenTruth) -> None:
    assert_near(out.log_probs, expected.log_probs, expected.log_prob_terms, name="log_probs")
    assert_near(out.entropy, expected.entropy, expected.entropy_terms, name="entropy")
    assert_near(grad, expected.grad, expected.grad_terms, name="gradient")
    assert out.top1.dtype == torch.bool
    assert torch.equal(out.top1.cpu(), expected.top1)


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradient(case: dict[str, Any], device: torch.device) -> None:
    (rows, classes), dtype = case["shape"], case["dtype"]
    logits = make_logits(rows, classes, dtype, device, layout=case["layout"])
    if case["masked"]:
        logits = with_masks(logits, case["logit_scale"])
    target = token_target(logits, logit_scale=case["logit_scale"], ignore_index=case["ignore_index"])
    options = options_of(case, (rows,), device)
    grads = upstreams(target.shape, dtype, device, case["uses"])
    expected = token_truth(logits, target, **options, grad_log_probs=grads[0], grad_entropy=grads[1])
    out, grad = outputs_and_grad(logits, target, grads, consume=case["consume"], **options)
    assert out.log_probs.dtype == out.entropy.dtype == stats_dtype(dtype)
    assert grad.dtype == dtype
    assert_all_near(out, grad, expected)


@pytest.mark.isa
@pytest.mark.parametrize("shape, dtype", [((2, 128256), torch.float32), ((1, 300000), torch.bfloat16)], ids=str)
def test_large_vocabularies(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """All options at once."""
    logits = with_masks(make_logits(*shape, dtype, device))
    target = token_target(logits)
    options = {"temperature": temperatures(target.shape, device), "softcap": 4.0, "logit_scale": 0.7}
    grads = upstreams(target.shape, dtype, device, "both")
    expected = token_truth(logits, target, **options, grad_log_probs=grads[0], grad_entropy=grads[1])
    assert_all_near(*outputs_and_grad(logits, target, grads, **options), expected)


def test_the_tolerance_is_tight_enough_to_see_each_option(device: torch.device) -> None:
    """The comparison above has teeth: an option or an upstream gradient that is slightly off fails it."""
    logits = make_logits(97, 17, torch.float32, device)
    target = token_target(logits, ignore_index=3)
    grads = upstreams(target.shape, torch.float32, device, "both")
    options = {"temperature": 0.7, "softcap": 4.0, "logit_scale": 0.9, "ignore_index": 3}
    from_above = {"grad_log_probs": grads[0].double(), "grad_entropy": grads[1].double()}
    out, grad = outputs_and_grad(logits, target, grads, **options)
    assert_all_near(out, grad, token_truth(logits, target, **options, **from_above))
    for wrong in ({"temperature": 0.70001}, {"softcap": 4.0001}, {"logit_scale": 0.90001}, {"ignore_index": 4}):
        off = token_truth(logits, target, **options | from_above | wrong)
        for actual, expected, terms in (
            (out.log_probs, off.log_probs, off.log_prob_terms),
            (out.entropy, off.entropy, off.entropy_terms),
            (grad, off.grad, off.grad_terms),
        ):
            with pytest.raises(AssertionError):
                assert_near(actual, expected, terms)
    for name, factor in (("grad_log_probs", 1.00001), ("grad_entropy", 1.00003)):
        off = token_truth(logits, target, **options | from_above | {name: from_above[name] * factor})
        with pytest.raises(AssertionError):
            assert_near(grad, off.grad, off.grad_terms)


# Accuracy compared with torch's own -----------------------------------------------------------------------------------

# Spread, and what is added to the logits and to the target's.
ROWS = {
    "flat": (1e-3, 0.0, 0.0),
    "usual": (3.0, 0.0, 0.0),
    "wide": (10.0, 0.0, 0.0),
    "very wide": (40.0, 0.0, 0.0),
    "peaked": (1.0, 0.0, 12.0),
    "very peaked": (1.0, 0.0, 30.0),
    "equal but the target's": (0.0, 0.0, 14.0),
    "shifted up": (3.0, 1e4, 0.0),
    "shifted down": (3.0, -1e4, 0.0),
    "shifted and peaked": (1.0, 1e4, 20.0),
}


@pytest.mark.isa
@pytest.mark.parametrize("classes", [100, 5000, 32000])
@pytest.mark.parametrize("kind", ROWS)
def test_errors_are_no_larger_than_torchs(kind: str, classes: int, device: torch.device) -> None:
    """Of float32 logits, by torch's log_softmax in float32; plus one unit in the last place of the terms.

    That floor keeps chance out where both errors are roundings: the terms are what is added up to make a result (the
    differences of logits, not the logits), so a formula that cancels is far above it.
    """
    spread, shift, at_target = ROWS[kind]
    rows = 6
    logits = make_logits(rows, classes, torch.float32, device, spread=spread) + shift
    target = make_target(rows, classes, device)
    logits[range(rows), target] += at_target
    for uses in ("log_probs", "entropy"):
        grads = upstreams(target.shape, torch.float32, device, uses)
        expected = token_truth(logits, target, grad_log_probs=grads[0], grad_entropy=grads[1])
        out, our_grad = outputs_and_grad(logits, target, grads)
        leaf = logits.cpu().requires_grad_()
        theirs = dict(zip(("log_probs", "entropy"), plain(leaf, target.cpu()), strict=True))
        theirs[uses].backward((grads[0] if uses == "log_probs" else grads[1]).cpu())
        ours, values, terms = {
            "log_probs": (out.log_probs, expected.log_probs, expected.log_prob_terms),
            "entropy": (out.entropy, expected.entropy, expected.entropy_terms),
        }[uses]
        for name, our, their, value, term in (
            (uses, ours, theirs[uses], values, terms),
            (f"gradient of {uses}", our_grad, leaf.grad, expected.grad, expected.grad_terms),
        ):
            floor = torch.finfo(torch.float32).eps * float(term.max())
            our_error, torch_error = max_error(our, value), max_error(their, value)
            assert our_error <= torch_error + floor, (
                f"largest error of {name}: {our_error:.3g}, torch's {torch_error:.3g}, floor {floor:.3g}"
            )


@pytest.mark.isa
@pytest.mark.parametrize("shift", [0.0, 100.0, 1e4])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": "by row"}, {"logit_scale": 0.7}, {"softcap": 30.0, "temperature": 0.7}],
    ids=str,
)
def test_confident_rows_keep_their_digits_when_scaled(
    options: dict[str, Any], shift: float, device: torch.device
) -> None:
    """The rounding of a scaled logit is the same in the maximum, in the sum and at the target, so that it cancels."""
    rows, classes = 64, 500
    logits = make_logits(rows, classes, torch.float32, device) + shift
    target = make_target(rows, classes, device)
    logits[range(rows), target] += 30
    if options.get("temperature") == "by row":
        options = {"temperature": torch.linspace(0.6, 1.9, rows, device=device)}
    log_probs = npu_xent.token_log_probs(logits, target, **options)
    selected = npu_xent.selected_log_probs(logits, target[:, None], **options)[:, 0]
    x = (logits * options.get("logit_scale", 1.0)).cpu()
    if "softcap" in options:
        x = options["softcap"] * (x / options["softcap"]).tanh()
    temperature = torch.as_tensor(options.get("temperature", 1.0)).cpu().view(-1, 1)
    theirs = (x / temperature).log_softmax(1).gather(1, target.cpu()[:, None])[:, 0]
    expected = token_truth(logits, target, **options)
    allowed = max_error(theirs, expected.log_probs) + torch.finfo(torch.float32).eps * 2
    for ours in (log_probs, selected):
        assert float(ours.max()) <= 0
        assert max_error(ours, expected.log_probs) <= allowed


def test_entropy_of_equal_logits_and_of_one_class(device: torch.device) -> None:
    """log C, with a gradient of 0; and exactly 0, without one."""
    for classes in (2, 100, 5000):
        logits = torch.full((3, classes), 1e4, device=device)
        grads = (None, torch.ones(3, device=device))
        out, grad = outputs_and_grad(logits, make_target(3, classes, device), grads)
        assert out.entropy.tolist() == pytest.approx([math.log(classes)] * 3, rel=1e-6)
        assert float(grad.abs().max()) < 1e-6 / classes * math.log(classes) * 4
    out, grad = outputs_and_grad(
        torch.full((3, 1), -7.0, device=device), torch.zeros(3, dtype=torch.int64, device=device), grads
    )
    assert out.log_probs.tolist() == out.entropy.tolist() == [0.0] * 3
    assert not grad.any()
    assert out.top1.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_is_never_negative(dtype: torch.dtype, device: torch.device) -> None:
    """log S and T/S are both >= 0: no rounding makes the entropy of a confident row negative."""
    logits = make_logits(64, 1000, dtype, device, spread=1.0)
    target = make_target(64, 1000, device)
    logits[range(64), target] += torch.linspace(0, 90, 64, device=device).to(dtype)
    entropy = npu_xent.token_log_probs(logits, target, return_entropy=True).entropy
    assert bool((entropy >= 0).all())
    assert float(entropy[-1]) < 1e-30


# -inf, +inf and NaN ---------------------------------------------------------------------------------------------------

SPECIAL = {
    "a mask": [0.0, -INF, 1.0],
    "a mask at the target": [-INF, 0.0, 1.0],
    "all but the target masked": [0.5, -INF, -INF],
    "all but one masked, the target too": [-INF, -INF, 0.5],
    "nothing but -inf": [-INF, -INF, -INF],
    "+inf": [0.0, INF, 1.0],
    "+inf at the target": [INF, 0.0, 1.0],
    "NaN": [0.0, NAN, 1.0],
    "NaN at the target": [NAN, 0.0, 1.0],
    "NaN, +inf and -inf": [-INF, NAN, INF],
}


@pytest.mark.isa
@pytest.mark.parametrize("uses", ["both", "log_probs", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("special", SPECIAL)
def test_special_rows(special: str, dtype: torch.dtype, uses: str, device: torch.device) -> None:
    """Kept and ignored, between rows that they must not touch; consumed or not."""
    ordinary = [0.0, 1.0, 2.0]
    logits = torch.tensor([ordinary, SPECIAL[special], SPECIAL[special], ordinary], dtype=dtype, device=device)
    target = torch.tensor([2, 0, -100, 1], device=device)
    grads = upstreams(target.shape, dtype, device, uses)
    expected = token_truth(logits, target, grad_log_probs=grads[0], grad_entropy=grads[1])
    for consume in (False, True):
        out, grad = outputs_and_grad(logits, target, grads, consume=consume)
        assert_all_near(out, grad, expected)
        assert float(out.log_probs[2]) == float(out.entropy[2]) == 0
        assert not out.top1[2]
        assert not grad[2].any()


def test_special_rows_one_by_one(device: torch.device) -> None:
    """The lines of the documentation, without the truth."""

    def row(special: str, uses: str) -> tuple[float, float, bool, Tensor]:
        logits = torch.tensor([SPECIAL[special]], device=device)
        ones = torch.ones(1, device=device)
        grads = (ones if uses != "entropy" else None, ones if uses != "log_probs" else None)
        out, grad = outputs_and_grad(logits, torch.tensor([0], device=device), grads)
        return float(out.log_probs), float(out.entropy), bool(out.top1), grad[0]

    for uses in ("both", "log_probs", "entropy"):
        log_prob, entropy, top1, grad = row("a mask", uses)
        assert math.isfinite(log_prob)
        assert entropy == pytest.approx(0.58220309)  # of softmax [0, 1]
        assert not top1
        assert grad.isfinite().all()
        assert float(grad[1]) == 0
    log_prob, entropy, top1, grad = row("a mask at the target", "log_probs")
    assert log_prob == -INF
    assert entropy == pytest.approx(0.58220309)
    assert not top1
    assert grad[1:].tolist() == pytest.approx([-0.26894142, -0.73105858])
    assert float(row("a mask at the target", "entropy")[3][0]) == 0
    for uses in ("both", "log_probs", "entropy"):
        log_prob, entropy, top1, grad = row("all but the target masked", uses)
        assert (log_prob, entropy, top1) == (0, 0, True)
        assert not grad.any()
    for special in ("nothing but -inf", "+inf", "+inf at the target", "NaN", "NaN at the target", "NaN, +inf and -inf"):
        for uses in ("both", "log_probs", "entropy"):
            log_prob, entropy, top1, grad = row(special, uses)
            assert math.isnan(log_prob)
            assert math.isnan(entropy)
            assert not top1
            assert grad.isnan().all()


# First and last lanes of vectors, both sides of the borders between chunks of 4096 columns, the last columns.
CLASSES = 2 * 4096 + 25 * 32 + 31
COLUMNS = [0, 1, 15, 16, 31, 32, 4095, 4096, 4111, 8191, 8192, 8208, 8991, 8992, 9007, 9008, 9015, 9016, 9021, 9022]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_special_values_anywhere_in_a_row(value: float, dtype: torch.dtype, device: torch.device) -> None:
    """A vectorised loop that loses a NaN does so in some lanes only. The last row has none and stays finite."""
    rows = len(COLUMNS)
    logits = make_logits(rows + 1, CLASSES, dtype, device, spread=1.0)
    logits[range(rows), COLUMNS] = value
    target = torch.full((rows + 1,), 4242, device=device)
    grads = upstreams(target.shape, dtype, device, "both")
    expected = token_truth(logits, target, grad_log_probs=grads[0], grad_entropy=grads[1])
    assert bool(expected.entropy[-1].isfinite())
    assert_all_near(*outputs_and_grad(logits, target, grads), expected)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_whole_chunk_of_masks(dtype: torch.dtype, device: torch.device) -> None:
    """As a mask on the vocabulary makes it: that chunk has no maximum to subtract, wherever it is."""
    logits, target = make_logits(4, 9001, dtype, device), torch.tensor([5000, 1, 9000, 100], device=device)
    logits[0, :4096] = -INF
    logits[1, 4096:8192] = -INF
    logits[2, :8192] = -INF
    logits[3, 101:] = -INF
    grads = upstreams(target.shape, dtype, device, "both")
    expected = token_truth(logits, target, grad_log_probs=grads[0], grad_entropy=grads[1])
    assert bool(expected.entropy.isfinite().all())
    assert_all_near(*outputs_and_grad(logits, target, grads), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_finite_logits(dtype: torch.dtype, device: torch.device) -> None:
    """The maximum is subtracted before anything is exponentiated; the differences may overflow to -inf."""
    top = torch.finfo(dtype).max
    logits = torch.tensor([[top, -top, 0.0], [-top, top, -top], [top, top, -top]], dtype=dtype, device=device)
    target = torch.tensor([0, 1, 1], device=device)
    ones = torch.ones(3, dtype=stats_dtype(dtype), device=device)
    out, grad = outputs_and_grad(logits, target, (ones, ones))
    assert out.log_probs.tolist() == pytest.approx([0, 0, -math.log(2)])
    assert out.entropy.tolist() == pytest.approx([0, 0, math.log(2)])
    assert grad.double().cpu().tolist() == [[0, 0, 0], [0, 0, 0], [-0.5, 0.5, 0]]
    assert out.top1.tolist() == [True, True, False]


def test_infinities_count_as_the_cap(device: torch.device) -> None:
    """With softcap tanh of -inf is -1: such a mask masks nothing, and its gradient is 0; NaN stays."""
    logits = make_logits(5, 7, torch.float32, device)
    logits[0, 3], logits[1, 4], logits[2, 5] = INF, -INF, NAN
    logits[4] = -INF
    target = torch.tensor([3, 4, 5, 6, 0], device=device)
    grads = upstreams(target.shape, torch.float32, device, "both")
    expected = token_truth(logits, target, softcap=2.0, grad_log_probs=grads[0], grad_entropy=grads[1])
    out, grad = outputs_and_grad(logits, target, grads, softcap=2.0)
    assert_all_near(out, grad, expected)
    assert float(grad[0, 3]) == float(grad[1, 4]) == 0
    assert out.entropy.isnan().tolist() == [False, False, True, False, False]
    assert float(out.entropy[4]) == pytest.approx(math.log(7))


# top1 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 9001])
def test_top1_is_the_first_of_equals(classes: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = make_logits(6, classes, dtype, device)
    logits[:, 1] = logits[:, -1] = 50.0
    logits[3, 0] = 50.0
    logits[4, classes // 2] = 51.0
    logits[5] = -2.0
    target = torch.tensor([1, classes - 1, 0, 1, classes // 2, 0], device=device)
    out = npu_xent.token_log_probs(logits, target, return_top1=True)
    assert out.top1.tolist() == [True, False, False, False, True, True]
    assert out.entropy is None


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"temperature": 1e6}, {"temperature": 1e-6}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top1_is_the_argmax_of_the_logits_as_they_are(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Not of what the softmax sees, where a saturated tanh makes different logits equal."""
    logits = torch.tensor([[60.0, 61.0, 59.0], [61.0, 60.0, 59.0], [-3.0, 60.0, 61.0]], dtype=dtype, device=device)
    for target, expected in (([1, 0, 2], True), ([0, 1, 1], False)):
        y = torch.tensor(target, device=device)
        out = npu_xent.token_log_probs(logits, y, **options, return_top1=True)
        assert out.top1.tolist() == [expected] * 3


def test_top1_with_a_negative_and_with_no_scale(device: torch.device) -> None:
    """The smallest logit is then the most probable one; with a scale of 0 all are equal, and the first wins."""
    logits = torch.tensor([[3.0, -1.0, 2.0, -1.0], [3.0, 1.0, 0.5, 2.0]], device=device)
    for scale, target in ((-0.5, [1, 2]), (0.0, [0, 0])):
        for offset, expected in ((0, True), (1, False)):
            y = (torch.tensor(target, device=device) + offset) % 4
            out = npu_xent.token_log_probs(logits, y, logit_scale=scale, return_top1=True, return_entropy=True)
            assert out.top1.tolist() == [expected] * 2
    assert out.entropy.tolist() == pytest.approx([math.log(4)] * 2)
    assert out.log_probs.tolist() == pytest.approx([-math.log(4)] * 2)


# Shapes, layouts, dtypes and the caller's tensors ---------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (2, 0), (0,)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], per_row: bool, device: torch.device) -> None:
    rows = torch.Size(shape).numel()
    logits, target = make_logits(rows, 13, torch.float32, device), make_target(rows, 13, device)
    options = {"temperature": temperatures((rows,), device) if per_row else 0.7}
    grads = upstreams(target.shape, torch.float32, device, "both")
    flat, flat_grad = outputs_and_grad(logits, target, grads, **options)
    if per_row:
        options["temperature"] = options["temperature"].view(shape)
    shaped = tuple(grad.view(shape) for grad in grads)
    for consume in (False, True):
        out, grad = outputs_and_grad(logits.view(*shape, 13), target.view(shape), shaped, consume=consume, **options)
        for actual, expected in zip(out, flat, strict=True):
            assert actual.shape == shape
            assert_same_bits(actual.reshape(-1), expected)
        assert_same_bits(grad.view(rows, 13), flat_grad)


def test_the_last_columns_of_a_batch(device: torch.device) -> None:
    """[batch, time, C] without its last step and a part of its classes: no view of N x C rows."""
    whole = make_logits(12, 15, torch.float32, device).view(3, 4, 15)
    logits, target = whole[:, :-1, 2:], make_target(9, 13, device).view(3, 3)
    grads = upstreams(target.shape, torch.float32, device, "both")
    expected = token_truth(logits, target, grad_log_probs=grads[0], grad_entropy=grads[1])
    assert_all_near(*outputs_and_grad(logits, target, grads), expected)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_no_bit(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """What lies between the rows (NaN here) is neither read nor written; target and temperature may have strides."""
    logits, target = make_logits(33, 70, dtype, device, layout=layout), make_target(33, 70, device)
    temperature = temperatures((33,), device)
    grads = upstreams(target.shape, dtype, device, "both")
    strided = outputs_and_grad(
        logits,
        torch.stack([target, torch.full_like(target, -1)], dim=1)[:, 0],
        tuple(torch.stack([grad, torch.full_like(grad, NAN)], dim=1)[:, 0] for grad in grads),
        temperature=torch.stack([temperature, torch.full_like(temperature, NAN)], dim=1)[:, 0],
    )
    dense = outputs_and_grad(logits.contiguous(), target, grads, temperature=temperature)
    assert not logits.is_contiguous()
    for actual, expected in zip((*strided[0], strided[1]), (*dense[0], dense[1]), strict=True):
        assert_same_bits(actual, expected)


def test_callers_tensors_are_left_alone(device: torch.device) -> None:
    logits, target = make_logits(5, 7, torch.float32, device), make_target(5, 7, device, ignore_index=-100)
    temperature = temperatures((5,), device)
    grads = upstreams(target.shape, torch.float32, device, "both")
    caller_owned = (logits, target, temperature, *grads)
    before = [(t.clone(), t._version) for t in caller_owned]
    outputs_and_grad(logits, target, grads, temperature=temperature)
    for tensor, (values, version) in zip(caller_owned, before, strict=True):
        assert_same_bits(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_any_integer_target(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = make_logits(6, 9, torch.float32, device), make_target(6, 9, device)
    actual = npu_xent.token_log_probs(logits, target.to(dtype))
    assert_same_bits(actual, npu_xent.token_log_probs(logits, target))


@pytest.mark.parametrize("ignore_index", [-1, 7, 10**12, 0])
def test_any_ignore_index(ignore_index: int, device: torch.device) -> None:
    """A class, or any other number."""
    logits, target = make_logits(6, 9, torch.float32, device), make_target(6, 9, device, ignore_index=ignore_index)
    grads = upstreams(target.shape, torch.float32, device, "both")
    expected = token_truth(logits, target, ignore_index=ignore_index, grad_log_probs=grads[0], grad_entropy=grads[1])
    assert_all_near(*outputs_and_grad(logits, target, grads, ignore_index=ignore_index), expected)


def test_only_what_was_asked_for_comes_out(device: torch.device) -> None:
    logits, target = make_logits(3, 4, torch.float32, device).requires_grad_(), make_target(3, 4, device)
    alone = npu_xent.token_log_probs(logits, target)
    assert type(alone) is Tensor
    assert alone.requires_grad
    for entropy, top1 in ((True, False), (False, True), (True, True)):
        out = npu_xent.token_log_probs(logits, target, return_entropy=entropy, return_top1=top1)
        assert isinstance(out, npu_xent.TokenLogProbs)
        assert (out.entropy is not None, out.top1 is not None) == (entropy, top1)
        torch.testing.assert_close(out.log_probs, alone)
        if entropy:
            assert out.entropy.requires_grad
        if top1:
            assert not out.top1.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_are_minus_the_loss(dtype: torch.dtype, device: torch.device) -> None:
    """Of cross_entropy with reduction "none" and a float32 loss; so is the gradient."""
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device, ignore_index=-100)
    ours, others = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    log_probs = npu_xent.token_log_probs(ours, target, softcap=3.0, logit_scale=0.7)
    loss = npu_xent.cross_entropy(
        others, target, reduction="none", softcap=3.0, logit_scale=0.7, loss_dtype=stats_dtype(dtype)
    )
    torch.testing.assert_close(log_probs, -loss)
    log_probs.sum().backward()
    loss.sum().backward()
    torch.testing.assert_close(ours.grad, -others.grad)
