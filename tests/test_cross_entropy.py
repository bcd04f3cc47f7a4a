"""npu_xent.cross_entropy: values, gradients and what else comes out, over dtypes, shapes and options.

Everything is compared with the float64 truth of reference.py, which takes the inputs as rounded in their dtype. The
tolerance is what correct rounding allows: one rounding of the result to its dtype (two for a gradient when the upstream
gradient is not 1, since the one-sweep path stores the gradient before it scales it) and a few units in the last place
of the statistics' dtype, float32. Corner cases are in test_corners.py, more on the backward in test_backward.py, the
module in test_module.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from option_values import factors, keywords
from reference import (
    DTYPES,
    LAYOUTS,
    LOW_PRECISION,
    REDUCTIONS,
    as_tuple,
    assert_near,
    assert_same_bits,
    case_id,
    loss_and_grad,
    make_logits,
    make_target,
    make_weight,
    max_error,
    pairwise,
    stats_dtype,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import npu_xent
from npu_xent import compat

# Both sides of a vector (16 lanes of fp32 in AVX512), one class, no rows, several rows a task and several chunks a row.
SHAPES = [(0, 7), (1, 1), (3, 2), (1, 15), (97, 16), (97, 17), (97, 8080)]
CASES = pairwise(
    factors(
        *("dtype", "reduction", "ignore_index", "label_smoothing", "lse_square_scale", "softcap"),
        *("logit_scale", "loss_dtype"),
        shape=SHAPES,
        layout=LAYOUTS,
        weight=("no weight", "float32 weight", "weight as input"),
        upstream=("upstream 1", "upstream random"),
    )
)


def upstream_for(kind: str, rows: int, reduction: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A gradient of the loss, [rows] for "none", else []."""
    shape = (rows,) if reduction == "none" else ()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7)) if "random" in kind else torch.ones(shape)
    return values.to(device, dtype)


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loss_and_gradient(case: dict[str, Any], device: torch.device) -> None:
    (rows, classes), dtype, reduction = case["shape"], case["dtype"], case["reduction"]
    weight_dtype = {"no weight": None, "float32 weight": torch.float32, "weight as input": dtype}[case["weight"]]
    logits = make_logits(rows, classes, dtype, device, layout=case["layout"])
    target = make_target(rows, classes, device, ignore_index=case["ignore_index"])
    weight = None if weight_dtype is None else make_weight(classes, weight_dtype, device)
    upstream = upstream_for(case["upstream"], rows, reduction, dtype, device)
    options = keywords(case)
    loss_dtype = options.pop("loss_dtype")
    upstream = upstream.to(loss_dtype or dtype)
    expected = truth(logits, target, weight, **options, grad_loss=upstream)

    loss, grad = loss_and_grad(
        npu_xent.cross_entropy, logits, target, weight, **options, loss_dtype=loss_dtype, upstream=upstream
    )

    assert grad.dtype == dtype
    assert loss.dtype == (loss_dtype or dtype)
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, roundings=1 + ("random" in case["upstream"]), name="grad")


@pytest.mark.isa
@pytest.mark.parametrize(
    "case",
    pairwise(factors("dtype", "softcap", shape=[(3, 32000), (3, 128256), (1, 300000)], reduction=["mean", "none"])),
    ids=case_id,
)
def test_large_vocabularies(case: dict[str, Any], device: torch.device) -> None:
    """All options at once. Exponentials of 300000 classes are not kept from one pass over a row to the next."""
    dtype, softcap, shape, reduction = case.values()
    logits, weight = make_logits(*shape, dtype, device), make_weight(shape[1], torch.float32, device)
    target = make_target(*shape, device, ignore_index=-100)
    options = {"reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 1e-3, "softcap": softcap}
    expected = truth(logits, target, weight, **options)
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, weight, **options)
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, name="grad")


def test_the_tolerance_is_tight_enough_to_see_each_option(device: torch.device) -> None:
    """The comparison above has teeth: an option that is slightly off fails it."""
    logits, target = make_logits(97, 17, torch.float32, device), make_target(97, 17, device, ignore_index=3)
    weight = make_weight(17, torch.float32, device)
    options = {"reduction": "none", "ignore_index": 3, "label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 4.0}
    options["logit_scale"] = 0.7
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, weight, **options)
    for wrong in (
        {"ignore_index": 4},
        {"label_smoothing": 0.1001},
        {"lse_square_scale": 0.01001},
        {"logit_scale": 0.70001},
        {"softcap": 4.00005},
        {"weight": weight.double() * 1.00001},
    ):
        off = truth(logits, target, **{"weight": weight} | options | wrong)
        for actual, expected, terms in ((loss, off.loss, off.loss_terms), (grad, off.grad, off.grad_terms)):
            with pytest.raises(AssertionError):
                assert_near(actual, expected, terms)


# Accuracy against torch's own -----------------------------------------------------------------------------------------


def assert_no_worse_than_torch(logits: Tensor, target: Tensor, **options: Any) -> None:
    """Our largest errors are at most torch's, plus one unit in the last place, in float32, of the largest value.

    That allowance is nothing to bf16 and fp16. For float32 it keeps chance out: there both errors are roundings.
    """
    expected = truth(logits, target, **options)
    ours, torchs = (loss_and_grad(f, logits, target, **options) for f in (npu_xent.cross_entropy, F.cross_entropy))
    truths = (expected.loss, expected.grad)
    for name, our, theirs, values in zip(("loss", "gradient"), ours, torchs, truths, strict=True):
        our_error, torch_error = max_error(our, values), max_error(theirs, values)
        allowed = torch_error + torch.finfo(torch.float32).eps * float(values.abs().max())
        assert our_error <= allowed, f"largest error of the {name}: {our_error:.3g}, torch's {torch_error:.3g}"


@pytest.mark.isa
@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32], ids=str)
def test_errors_are_no_larger_than_torchs(
    dtype: torch.dtype, reduction: str, spread: float, device: torch.device
) -> None:
    logits = make_logits(8, 32000, dtype, device, spread=spread)
    assert_no_worse_than_torch(logits, make_target(8, 32000, device), reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("offset", [100.0, -1000.0, 10000.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32], ids=str)
def test_errors_are_no_larger_than_torchs_when_all_logits_are_large(
    dtype: torch.dtype, reduction: str, offset: float, label_smoothing: float, device: torch.device
) -> None:
    """A constant added to all logits changes no softmax, but log sum exp grows by it, and so does its rounding."""
    logits = (make_logits(16, 1000, torch.float32, device) + offset).to(dtype)
    target = make_target(16, 1000, device)
    assert_no_worse_than_torch(logits, target, reduction=reduction, label_smoothing=label_smoothing)


# Layouts, dtypes and the caller's tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_no_bit(dtype: torch.dtype, layout: str, reduction: str, device: torch.device) -> None:
    """What lies between the rows (NaN here) is neither read nor written, and the order of arithmetic is the same."""
    logits, target = make_logits(33, 70, dtype, device, layout=layout), make_target(33, 70, device)
    strided = loss_and_grad(npu_xent.cross_entropy, logits, target, reduction=reduction)
    dense = loss_and_grad(npu_xent.cross_entropy, logits.contiguous(), target, reduction=reduction)
    assert not logits.is_contiguous()
    for actual, expected in zip(strided, dense, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_callers_tensors_are_left_alone(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(5, 7, dtype, device), make_target(5, 7, device, ignore_index=-100)
    weight = make_weight(7, torch.float32, device)
    caller_owned = (logits, target, weight)
    before = [(t.clone(), t._version) for t in caller_owned]
    loss_and_grad(npu_xent.cross_entropy, logits, target, weight, reduction=reduction, label_smoothing=0.1)
    for tensor, (values, version) in zip(caller_owned, before, strict=True):
        assert_same_bits(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_any_integer_target(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = make_logits(6, 9, torch.float32, device), make_target(6, 9, device)
    actual = loss_and_grad(npu_xent.cross_entropy, logits, target.to(dtype))
    for a, b in zip(actual, loss_and_grad(npu_xent.cross_entropy, logits, target), strict=True):
        assert_same_bits(a, b)
    # torch takes int64 and uint8 alone.
    if dtype != torch.uint8:
        with pytest.raises(RuntimeError):
            F.cross_entropy(logits, target.to(dtype))


def test_signed_targets_may_hold_the_default_ignore_index(device: torch.device) -> None:
    logits, target = make_logits(6, 9, torch.float32, device), make_target(6, 9, device, ignore_index=-100)
    for dtype in (torch.int32, torch.int16, torch.int8):
        assert_same_bits(npu_xent.cross_entropy(logits, target.to(dtype)), npu_xent.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_other_targets_are_a_type_error(dtype: torch.dtype, device: torch.device) -> None:
    words = rf"target must be int64 or another integer dtype, but is {dtype}; convert it with target\.long\(\)\."
    with pytest.raises(TypeError, match=words):
        npu_xent.cross_entropy(torch.zeros(2, 3, device=device), torch.zeros(2, dtype=dtype, device=device))


NOT_DENSE = {
    "sparse": (lambda x: x.to_sparse(), "of layout torch.sparse_coo", "{}.to_dense()"),
    "sparse rows": (lambda x: x.to_sparse_csr(), "of layout torch.sparse_csr", "{}.to_dense()"),
    "mkldnn": (lambda x: x.to_mkldnn(), "of layout torch._mkldnn", "{}.to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x[:1]]), "nested", "its rows, torch.cat({}.unbind())"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
        "nested",
        "its rows, {}.values()",
    ),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantized", "{}.dequantize()"),
}


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:.*(prototype|beta|quantize|deprecated)")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense_are_a_type_error(kind: str) -> None:
    make, seen, remedy = NOT_DENSE[kind]
    logits, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    odd = make(logits)
    calls = {
        "cross_entropy: input": lambda: npu_xent.cross_entropy(odd, target),
        "cross_entropy: target": lambda: npu_xent.cross_entropy(logits, odd),
        "cross_entropy: weight": lambda: npu_xent.CrossEntropyLoss(weight=odd)(logits, target),
        "npu_cross_entropy_loss: input": lambda: npu_xent.npu_cross_entropy_loss(odd, target),
        "linear_cross_entropy: input": lambda: npu_xent.linear_cross_entropy(odd, logits, target),
        "linear_cross_entropy: linear_weight": lambda: npu_xent.linear_cross_entropy(logits, odd, target),
        "linear_cross_entropy: linear_bias": lambda: npu_xent.linear_cross_entropy(
            logits, torch.randn(5, 6), target, linear_bias=odd
        ),
        "compat.unit_scaling.cross_entropy: input": lambda: compat.unit_scaling.cross_entropy(odd, target),
        "compat.nnsight.cross_entropy_loss: logits": lambda: compat.nnsight.cross_entropy_loss(odd, target),
        "compat.mindformers.CrossEntropyLoss: label": lambda: compat.mindformers.CrossEntropyLoss()(
            logits, odd, torch.ones(4)
        ),
    }
    for place, call in calls.items():
        argument = place.partition(": ")[2]
        with pytest.raises(TypeError) as raised:
            call()
        assert (
            str(raised.value)
            == f"npu_xent.{place} must be a dense tensor, but is {seen}; pass {remedy.format(argument)}"
        )


def test_complex_logits_are_a_type_error(device: torch.device) -> None:
    logits, target = torch.zeros(2, 3, dtype=torch.complex64, device=device), torch.tensor([0, 1], device=device)
    for values in (target, torch.zeros(2, 3, device=device)):
        with pytest.raises(TypeError, match=r"logits must be float32, bfloat16, float16 or float64, but are "):
            npu_xent.cross_entropy(logits, values)


def test_strided_target_and_weight(device: torch.device) -> None:
    logits = make_logits(6, 9, torch.float32, device)
    target, weight = make_target(6, 9, device), make_weight(9, torch.float32, device)
    strided_target = torch.stack([target, torch.full_like(target, -1)], dim=1)[:, 0]
    strided_weight = torch.stack([weight, torch.full_like(weight, torch.nan)], dim=1)[:, 0]
    assert not strided_target.is_contiguous()
    assert not strided_weight.is_contiguous()
    for options in ({}, {"reduction": "none", "label_smoothing": 0.1}):
        actual = loss_and_grad(npu_xent.cross_entropy, logits, strided_target, strided_weight, **options)
        expected = loss_and_grad(npu_xent.cross_entropy, logits, target, weight, **options)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_weight_in_float32_or_the_inputs_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """A float32 weight is not rounded; torch takes the input's dtype alone."""
    logits, target = make_logits(6, 9, dtype, device), make_target(6, 9, device)
    weight = make_weight(9, torch.float32, device)
    with pytest.raises(RuntimeError):
        F.cross_entropy(logits, target, weight)
    for w in (weight, weight.to(dtype)):
        expected = truth(logits, target, w, reduction="sum")
        loss = npu_xent.cross_entropy(logits, target, w, reduction="sum")
        assert_near(loss, expected.loss, expected.loss_terms)
    (other,) = set(LOW_PRECISION) - {dtype}
    with pytest.raises(TypeError, match="weight must be float32 or of the logits' dtype"):
        npu_xent.cross_entropy(logits, target, weight.to(other))


# What comes out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_and_z_loss(dtype: torch.dtype, reduction: str, requires_grad: bool, device: torch.device) -> None:
    logits = make_logits(7, 33, dtype, device).requires_grad_(requires_grad)
    target = make_target(7, 33, device, ignore_index=-100)
    expected = truth(logits, target, reduction=reduction, lse_square_scale=0.01)

    out = npu_xent.cross_entropy(
        logits, target, reduction=reduction, lse_square_scale=0.01, return_lse=True, return_z_loss=True
    )

    assert isinstance(out, npu_xent.CrossEntropyOutput)
    assert_near(out.loss, expected.loss, expected.loss_terms, name="loss")
    # A z-loss is a square: twice the relative error of lse, and its rounding.
    assert_near(out.z_loss, expected.z_loss, 4 * expected.z_loss.abs(), name="z_loss")
    assert_near(out.lse, expected.lse, expected.lse.abs(), name="lse, ignored rows included")
    assert out.z_loss.dtype == dtype
    assert out.lse.dtype == stats_dtype(dtype)
    assert out.loss.requires_grad == requires_grad
    assert out.lse.requires_grad == requires_grad
    assert not out.z_loss.requires_grad


def test_only_what_was_asked_for_comes_out(device: torch.device) -> None:
    logits, target = make_logits(3, 4, torch.float32, device).requires_grad_(), make_target(3, 4, device)
    assert isinstance(npu_xent.cross_entropy(logits, target, lse_square_scale=0.1), Tensor)
    only_lse = npu_xent.cross_entropy(logits, target, return_lse=True)
    assert only_lse.z_loss is None
    assert only_lse.lse.shape == (3,)
    only_z = npu_xent.cross_entropy(logits, target, lse_square_scale=0.1, return_z_loss=True)
    assert only_z.lse is None
    assert only_z.z_loss.shape == ()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_z_loss_without_a_scale_is_zero(reduction: str, device: torch.device) -> None:
    logits, target = make_logits(3, 4, torch.float32, device).requires_grad_(), make_target(3, 4, device)
    out = npu_xent.cross_entropy(logits, target, reduction=reduction, return_z_loss=True)
    assert_same_bits(out.z_loss, torch.zeros_like(out.loss))
    assert not out.z_loss.requires_grad


def test_z_loss_is_part_of_the_loss(device: torch.device) -> None:
    """And of its gradient: adding it again would count it twice."""
    logits, target = make_logits(3, 4, torch.float32, device), make_target(3, 4, device)
    without = npu_xent.cross_entropy(logits, target)
    out = npu_xent.cross_entropy(logits, target, lse_square_scale=0.5, return_z_loss=True)
    assert float(out.z_loss) > 1
    torch.testing.assert_close(out.loss, without + out.z_loss)


# Modes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"return_lse": True, "return_z_loss": True, "lse_square_scale": 0.1}])
def test_modes_without_gradients(options: dict[str, Any], device: torch.device) -> None:
    logits, target = make_logits(3, 40, torch.float32, device), make_target(3, 40, device)
    training = npu_xent.cross_entropy(logits.clone().requires_grad_(), target, **options)
    without = [npu_xent.cross_entropy(logits, target, **options)]
    with torch.no_grad():
        without.append(npu_xent.cross_entropy(logits.clone().requires_grad_(), target, **options))
    with torch.inference_mode():
        without.append(npu_xent.cross_entropy(logits, target, **options))
        without.append(npu_xent.cross_entropy(logits.clone(), target, **options))
    for outputs in without:
        for actual, expected in zip(as_tuple(outputs), as_tuple(training), strict=True):
            assert not actual.requires_grad
            assert actual.grad_fn is None
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_gives_a_float32_loss(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(9, 50, dtype, device), make_target(9, 50, device)
    expected = truth(logits, target, reduction=reduction)
    leaf = logits.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = npu_xent.cross_entropy(leaf, target, reduction=reduction, lse_square_scale=0.0, return_z_loss=True)
    out.loss.sum().backward()
    assert out.loss.dtype == out.z_loss.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    assert_near(out.loss, expected.loss, expected.loss_terms)
    assert_near(leaf.grad, expected.grad, expected.grad_terms)


# Memory ---------------------------------------------------------------------------------------------------------------

ROWS, CLASSES = 32, 4096
Allocations = Callable[[Callable[[], object]], list[int]]


def big(sizes: list[int]) -> list[int]:
    """Those of at least half the logits' memory in a 16-bit dtype; all else is of size N or C."""
    return [size for size in sizes if size >= ROWS * CLASSES]


@pytest.mark.cpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_allocates_nothing_of_the_logits_size(
    dtype: torch.dtype, autocast: bool, device: torch.device, allocations: Allocations
) -> None:
    logits = make_logits(ROWS, CLASSES, dtype, device, layout="columns of a wider tensor")
    target = make_target(ROWS, CLASSES, device)

    def infer() -> None:
        with torch.no_grad(), torch.autocast(device.type, enabled=autocast, dtype=torch.bfloat16):
            npu_xent.cross_entropy(logits, target, label_smoothing=0.1, lse_square_scale=0.1, return_lse=True)

    assert big(allocations(infer)) == []
    if dtype in LOW_PRECISION and autocast:  # torch's copy in float32, and the log-softmax of it
        assert len(big(allocations(lambda: F.cross_entropy(logits.float(), target)))) >= 2


@pytest.mark.cpu
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_allocates_the_gradient_alone(
    dtype: torch.dtype, reduction: str, autocast: bool, device: torch.device, allocations: Allocations
) -> None:
    logits = make_logits(ROWS, CLASSES, dtype, device).requires_grad_()
    target = make_target(ROWS, CLASSES, device)

    def train() -> None:
        with torch.autocast(device.type, enabled=autocast, dtype=torch.bfloat16):
            loss = npu_xent.cross_entropy(logits, target, reduction=reduction)
        loss.backward(torch.full_like(loss, 0.5))

    assert big(allocations(train)) == [ROWS * CLASSES * dtype.itemsize]
