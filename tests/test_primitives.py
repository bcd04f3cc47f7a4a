"""The operators under torch.ops.npu_xent: what torch demands of an operator, and what csrc/ops.cpp says of each.

Three implementations of one schema have to agree: the device's own kernels, the composite made of aten operations (for
devices without kernels), and the one for tensors without values (Meta). `composite()` runs the second on any device.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from reference import (
    DTYPES,
    INF,
    NAN,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    case_id,
    known,
    make_logits,
    make_target,
    make_weight,
    named,
    pairwise,
    stats_dtype,
    tolerance,
    truth,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent

ops = torch.ops.npu_xent
Composite = type[TorchDispatchMode]


def problem(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rows: int = 3,
    classes: int = 5,
    weighted: bool = False,
    ignore_index: int | None = None,
    layout: str = "contiguous",
    logit_scale: float = 1.0,
) -> dict[str, Any]:
    """Every argument that an operator can have a tensor for, by name: logits, statistics, upstream gradients."""
    logits = make_logits(rows, classes, dtype, device, layout=layout)
    target = make_target(rows, classes, device, ignore_index=ignore_index)
    weight = make_weight(classes, torch.float32, device) if weighted else None
    ignored = -100 if ignore_index is None else ignore_index
    stats = named("row_stats", logits, target, weight, ignore_index=ignored, logit_scale=logit_scale, need_wsum=True)
    totals = named(
        "reduce_rows", target, weight, ignore_index=ignored, num_classes=classes, loss_dtype=stats_dtype(dtype)
    )
    return {"logits": logits, "target": target, "weight": weight, **stats, "totals": totals["totals"]}


def call(name: str, made: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The arguments of operator `name`: of a problem and of options what its schema has; the first one comes first."""
    logits, target = made["logits"], made["target"]
    one_a_row = options.get("reduction") == "none"
    values = made | {
        "self": logits.contiguous(),
        "factor": torch.tensor(0.5, device=logits.device),
        "grad_loss": torch.ones(target.shape if one_a_row else (), dtype=logits.dtype, device=logits.device),
    }
    if name == "reduce_rows":
        values |= {"num_classes": logits.shape[1], "loss_dtype": logits.dtype}
    return known(name, values | options)


OPERATORS = (
    "row_stats",
    "row_grad",
    "row_grad_",
    "row_stats_grad",
    "row_stats_grad_",
    "reduce_rows",
    "scale_",
    "cross_entropy",
    "cross_entropy_",
)
PRIMITIVES = OPERATORS[:7]

OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "reduction": REDUCTIONS,
    "weighted": (False, True),
    "ignore_index": (None, -100, 1),
    "label_smoothing": (0.0, 0.1),
    "lse_square_scale": (0.0, 0.1),
    "logit_scale": (1.0, 0.7),
    "grad_scale": (None, 3.0),
    "lse_low": (True, False),
    "layout": ("contiguous", "columns of a wider tensor", "transposed"),
    "loss_dtype": (None, torch.float32),
    "need_wsum": (True, False),
    "need_log_prob": (False, True),
    "read_ignored": (False, True),
}
CASES = pairwise(OPTIONS)


def prepared(name: str, case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of operator `name` for a case of OPTIONS, as far as the operator takes it."""
    options = dict(case)
    if name.startswith("row_stats_grad") and options["reduction"] == "none":
        options["reduction"] = "sum"
    if name.endswith("_"):
        options["layout"] = "contiguous"
    made = problem(
        device,
        rows=7,
        classes=21,
        **{key: options.pop(key) for key in ("dtype", "weighted", "layout")},
        ignore_index=options["ignore_index"],
        logit_scale=options["logit_scale"],
    )
    if not options.pop("lse_low"):
        made["lse_low"] = None
    options["ignore_index"] = -100 if options["ignore_index"] is None else options["ignore_index"]
    if options["loss_dtype"] is None:
        options.pop("loss_dtype")
    return call(name, made, **options)


def run(name: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of a primitive on copies of its tensors, and what it left in the one that it overwrites."""
    overwritten = {key: arguments[key].clone() for key in ("logits", "self") if key in arguments and name.endswith("_")}
    with torch.no_grad():
        outputs = getattr(ops, name).default(**arguments | overwritten)
    outputs = outputs if isinstance(outputs, tuple | list) else () if outputs is None else (outputs,)
    return (*outputs, *overwritten.values())


# What torch demands of an operator ------------------------------------------------------------------------------------

SAMPLES = [
    ("plain", {}, {}),
    (
        "all options",
        {"weighted": True, "ignore_index": 1},
        {"ignore_index": 1, "label_smoothing": 0.1, "lse_square_scale": 0.1},
    ),
    ("none, scaled", {"dtype": torch.bfloat16}, {"reduction": "none", "logit_scale": 0.7, "grad_scale": 2.0}),
]


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample[0])
@pytest.mark.parametrize("name", OPERATORS[:-1])  # cross_entropy_ takes the output of an operation: see below
def test_opcheck(name: str, sample: tuple[str, dict[str, Any], dict[str, Any]], device: torch.device) -> None:
    """Schema, autograd registration, fake tensors, and compilation with dynamic shapes."""
    _, made, options = sample
    if name.startswith("row_stats_grad") and options.get("reduction") == "none":
        options = options | {"reduction": "sum"}
    extras = {"need_wsum": True, "need_log_prob": True, "need_lse": True, "read_ignored": True} if made else {}
    arguments = call(name, problem(device, **made), **options, **extras)
    if name == "cross_entropy":
        arguments["logits"] = arguments["logits"].clone().requires_grad_()
    first = next(iter(arguments))
    # torch looks at how autograd is registered on these devices only.
    registration = () if device.type in ("cpu", "cuda", "xpu") else ("test_autograd_registration",)
    checks = [check for check in OPCHECKS if check not in registration]
    torch.library.opcheck(getattr(ops, name).default, (arguments.pop(first),), arguments, test_utils=checks)


def test_opcheck_of_totals(device: torch.device) -> None:
    """reduce_rows without statistics."""
    target, weight = make_target(3, 5, device, ignore_index=-100), make_weight(5, torch.float32, device)
    for w in (None, weight):
        torch.library.opcheck(ops.reduce_rows.default, (target, w), {"num_classes": 5, "loss_dtype": torch.float32})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_consumed_logits_compile(reduction: str, device: torch.device) -> None:
    """cross_entropy_ behind the operation whose output it takes."""
    leaf, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)

    def loss_of(x: Tensor) -> Tensor:
        return ops.cross_entropy_(x * 2, target, reduction=reduction)[0].sum()

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss_of, compiled):
        x = leaf.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


# Tensors without values -----------------------------------------------------------------------------------------------


def to_meta(value: Any) -> Any:
    """A tensor without values, of the same strides; other arguments as they are."""
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", OPERATORS)
def test_meta_says_what_eager_gives(name: str, case: dict[str, Any], device: torch.device) -> None:
    """Shapes, dtypes and strides."""
    arguments = prepared(name, case, device)
    outputs = []
    for values in (arguments, {key: to_meta(value) for key, value in arguments.items()}):
        if name == "cross_entropy_":
            outputs.append(ops.cross_entropy_(**values | {"logits": values["logits"].requires_grad_() * 1}))
        else:
            outputs.append(run(name, values))
    eager, meta = outputs
    assert len(meta) == len(eager)
    for without, with_values in zip(meta, eager, strict=True):
        assert without.device.type == "meta"
        assert (without.shape, without.dtype) == (with_values.shape, with_values.dtype)
        assert without.stride() == with_values.stride()


def with_options(x: Tensor, y: Tensor, w: Tensor, reduction: str) -> Tensor:
    """cross_entropy with most of its options."""
    options = {"ignore_index": 2, "label_smoothing": 0.1, "lse_square_scale": 0.01}
    return npu_xent.cross_entropy(x, y, w, reduction=reduction, **options).sum()


def strict_contract(x: Tensor, y: Tensor, w: Tensor, reduction: str) -> Tensor:
    """The documented contract, whose rules are checked in Python."""
    return npu_xent.npu_cross_entropy_loss(x, y, reduction=reduction)[0].sum()


def lifted_contract(x: Tensor, y: Tensor, w: Tensor, reduction: str) -> Tensor:
    """The contract without its restrictions, all outputs used."""
    loss, log_prob, zloss, lse = npu_xent.npu_cross_entropy_loss(
        x, y, w, reduction, label_smoothing=0.1, lse_square_scale_for_zloss=0.1, return_zloss=True, strict=False
    )
    return loss.sum() + 2 * zloss.sum() + log_prob.sum() + lse.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [with_options, strict_contract, lifted_contract], ids=lambda f: f.__name__)
def test_compiles_in_one_graph_with_dynamic_shapes(
    function: Callable[..., Tensor], reduction: str, device: torch.device
) -> None:
    """One compilation serves every number of rows and classes; the gradient comes with it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for rows, classes in ((3, 5), (7, 11), (4, 300)):
        logits, target = make_logits(rows, classes, torch.float32, device), make_target(rows, classes, device)
        weight = make_weight(classes, torch.float32, device)
        results = []
        for called in (function, compiled):
            x = logits.clone().requires_grad_()
            loss = called(x, target, weight, reduction)
            (3 * loss).backward()
            results.append((loss.detach(), x.grad))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "compiled again for another shape"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_loss_can_go_backward_twice(device: torch.device) -> None:
    """The gradient that the forward made is scaled in place, which must not show in a second backward."""
    x, target = make_logits(3, 5, torch.float32, device).requires_grad_(), make_target(3, 5, device)
    loss = torch.compile(lambda x: npu_xent.cross_entropy(x, target), backend="aot_eager", fullgraph=True)(x)
    expected = truth(x, target, grad_loss=3.0)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, x, torch.tensor(3.0, device=device), retain_graph=True)
        assert_near(grad, expected.grad, expected.grad_terms, roundings=2)


# Composite ------------------------------------------------------------------------------------------------------------


def assert_agree(actual: Tensor, expected: Tensor, size: float, name: str) -> None:
    """Equal in shape, dtype, strides, NaN and infinities; each within the tolerance of a truth of this size."""
    assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride()), name
    assert torch.equal(actual.isnan(), expected.isnan()), name
    assert torch.equal(actual.isinf(), expected.isinf()), name
    a, b = actual.cpu().double(), expected.cpu().double()
    assert torch.equal(a[a.isinf()], b[b.isinf()]), name
    assert ((a - b).abs() <= 2 * tolerance(b, size, actual.dtype)).masked_fill(~b.isfinite(), True).all(), name


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_composite_agrees(name: str, case: dict[str, Any], device: torch.device, composite: Composite) -> None:
    arguments = prepared(name, case, device)
    expected = run(name, arguments)
    with composite():
        actual = run(name, arguments)
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        # 20 is more than any |x| + |lse| here; sums over 21 classes or 7 rows are larger.
        assert_agree(a, e, 20.0 if a.dim() == 2 else 400.0, f"output {i}")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composite_computes_the_loss_and_its_gradient(
    dtype: torch.dtype, reduction: str, label_smoothing: float, device: torch.device, composite: Composite
) -> None:
    """Special rows, kept and ignored; compared with the truth, as the device's own kernels are in test_corners.py."""
    special = [[0.0, -INF, 1.0], [-INF, 0.0, 1.0], [-INF] * 3, [0.0, INF, 1.0], [0.0, NAN, 1.0], [1.0, 2.0, 3.0]]
    weight = torch.tensor([0.5, 0.25, 1.0], device=device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "lse_square_scale": 0.1}
    for rows, y in ((special, -100), (special, 0), (special[:1], 0), (special[1:2], 0), (special[5:], 2), ([], 0)):
        logits = torch.tensor(rows, dtype=dtype, device=device).view(-1, 3).requires_grad_()
        target = torch.full((len(rows),), y, device=device)
        if len(rows) == len(special):
            target[-1] = 2
        expected = truth(logits, target, weight, **options)
        with composite():
            loss, z_loss, lse, log_prob = ops.cross_entropy(
                logits, target, weight, **options, need_lse=True, need_log_prob=True
            )
            loss.backward(torch.ones_like(loss))
        assert_near(loss, expected.loss, expected.loss_terms, name="loss")
        assert_near(z_loss, expected.z_loss, 4 * expected.z_loss.abs().nan_to_num(0, 0), name="z_loss")
        assert_near(lse, expected.lse, 10.0, name="lse")
        assert_near(log_prob, expected.log_prob, 10.0, name="log_prob")
        assert_near(logits.grad, expected.grad, expected.grad_terms, name="grad")


@pytest.mark.parametrize("bad", [5, -1, 10**12])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_composite_makes_a_row_nan_for_a_bad_target(
    dtype: torch.dtype, reduction: str, bad: int, device: torch.device, composite: Composite
) -> None:
    """Raising would mean waiting for the device. Its weight counts 0, so that the other gradients are as without it."""
    logits, weight = make_logits(3, 5, dtype, device).requires_grad_(), make_weight(5, torch.float32, device)
    target = torch.tensor([0, bad, 4], device=device)
    with composite():
        loss = npu_xent.cross_entropy(logits, target, weight, reduction=reduction)
        loss.sum().backward()
    others = truth(logits[::2], target[::2], weight, reduction=reduction)
    assert (loss[1] if reduction == "none" else loss).isnan()
    assert logits.grad[1].isnan().all()
    assert_near(logits.grad[::2], others.grad, others.grad_terms)
    if reduction == "none":
        assert_near(loss[::2], others.loss, others.loss_terms)


# Class shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_composite", [False, True], ids=["kernels", "composite"])
@pytest.mark.parametrize("borders", [(0, 21), (0, 5, 21), (0, 1, 2, 20, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_shards_make_up_the_whole(
    dtype: torch.dtype, borders: tuple[int, ...], with_composite: bool, device: torch.device, composite: Composite
) -> None:
    """Statistics of shards, merged; and gradients of shards, put side by side."""
    with composite() if with_composite else nullcontext():
        check_shards(dtype, borders, device)


def check_shards(dtype: torch.dtype, borders: tuple[int, ...], device: torch.device) -> None:
    """Shards between the borders, against the truth for all classes."""
    n, c = 7, 21
    logits, target = make_logits(n, c, dtype, device), make_target(n, c, device, ignore_index=-100)
    weight = make_weight(c, torch.float32, device)
    scales = {"logit_scale": 0.7}
    smoothing = {"label_smoothing": 0.1, "lse_square_scale": 0.05}
    shards = list(itertools.pairwise(borders))

    stats = []
    for begin, end in shards:
        shard = (logits[:, begin:end], target, weight)
        stats.append(named("row_stats", *shard, class_start=begin, num_classes=c, need_wsum=True, **scales))
        elsewhere = (target < begin) | (target >= end)
        assert (stats[-1]["picked"][elsewhere] == 0).all()
    lse = torch.stack([s["lse"] for s in stats]).logsumexp(0)
    picked = torch.stack([s["picked"] for s in stats]).sum(0)
    # wsum counts from lse: from that of the shard in each shard, from that of all classes in the whole.
    shard_weight = [weight[begin:end].sum() for begin, end in shards]
    wsum = sum(s["wsum"] + w * (s["lse"] - lse) for s, w in zip(stats, shard_weight, strict=True))
    whole = truth(logits, target, weight, reduction="mean", **scales, **smoothing)
    kept = target != -100
    assert_near(lse[kept], whole.lse[kept.cpu()], 20.0, name="lse")

    made = {"logits": logits, "target": target, "weight": weight, "lse": lse, "picked": picked, "wsum": wsum}
    made["lse_low"] = None  # optional: what a merge of shards does not know
    made["totals"] = ops.reduce_rows(target, weight, num_classes=c, loss_dtype=torch.float32)[2]
    loss = ops.reduce_rows(**call("reduce_rows", made, **smoothing, loss_dtype=torch.float32))[0]
    assert_near(loss, whole.loss, 2 * whole.loss_terms, name="loss")

    for begin, end in shards:
        shard = {"logits": logits[:, begin:end], "class_start": begin, "num_classes": c}
        grad = ops.row_grad(**call("row_grad", made | shard, **scales, **smoothing) | shard)
        assert grad.shape == (n, end - begin)
        assert_near(grad, whole.grad[:, begin:end], 2 * whole.grad_terms[:, begin:end], name=f"grad {begin}:{end}")


# Scales, dtypes and in-place ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_scale", [None, 1.0, -2.5])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25, 1.7, -1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logit_scale_and_grad_scale(
    reduction: str, logit_scale: float, grad_scale: float | None, device: torch.device
) -> None:
    """The softmax of t x, and the outermost factor of its gradient: t, or what is given in its place."""
    logits, target = make_logits(7, 21, torch.float32, device).requires_grad_(), make_target(7, 21, device)
    scales = {"logit_scale": logit_scale, "grad_scale": grad_scale}
    expected = truth(logits, target, reduction=reduction, label_smoothing=0.1, **scales)
    loss, _, lse, log_prob = ops.cross_entropy(
        logits, target, reduction=reduction, label_smoothing=0.1, need_lse=True, need_log_prob=True, **scales
    )
    loss.sum().backward()
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(lse, expected.lse, 20.0, name="lse")
    assert_near(log_prob, expected.log_prob, 40.0, name="log_prob")
    assert_near(logits.grad, expected.grad, expected.grad_terms, name="grad")


@pytest.mark.parametrize("loss_dtype", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_dtype(dtype: torch.dtype, loss_dtype: torch.dtype | None, device: torch.device) -> None:
    """The loss is rounded once, from statistics that do not depend on it."""
    logits, target = make_logits(7, 21, dtype, device).requires_grad_(), make_target(7, 21, device)
    expected = truth(logits, target, lse_square_scale=0.1)
    loss, z_loss, _, _ = ops.cross_entropy(logits, target, lse_square_scale=0.1, loss_dtype=loss_dtype)
    assert loss.dtype == z_loss.dtype == (loss_dtype or dtype)
    allowed = tolerance(expected.loss, expected.loss_terms, stats_dtype(dtype))
    allowed = allowed + tolerance(expected.loss, 0, loss.dtype)
    assert (loss.detach().cpu().double() - expected.loss).abs() <= allowed
    loss.backward()
    assert logits.grad.dtype == dtype
    assert_near(logits.grad, expected.grad, expected.grad_terms)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, 1e-3, NAN])
@pytest.mark.parametrize("shape", [(0,), (), (33,), (3, 7001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_(dtype: torch.dtype, shape: tuple[int, ...], factor: float, device: torch.device) -> None:
    """One multiplication, rounded once."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    scaled = values.clone()
    by = torch.tensor(factor, device=device)
    assert ops.scale_(scaled, by) is None
    expected = (values.to(stats_dtype(dtype)) * by.to(stats_dtype(dtype))).to(dtype)
    assert_near(scaled, expected.cpu().double(), expected.cpu().double().abs().nan_to_num(0))


@pytest.mark.cpu  # a device cannot know without waiting
def test_scale_by_one_does_not_even_write(device: torch.device) -> None:
    values = torch.randn(5, device=device)
    ops.scale_(values, torch.ones((), device=device))
    assert values._version == 0
    ops.scale_(values, torch.full((1,), 2.0, device=device))
    assert values._version == 1


@pytest.mark.parametrize("name", ["row_grad_", "row_stats_grad_", "scale_"])
def test_writes_are_seen_by_autograd(name: str, device: torch.device) -> None:
    arguments = call(name, problem(device))
    overwritten = next(iter(arguments.values()))
    before = overwritten._version
    getattr(ops, name)(**arguments)
    assert overwritten._version == before + 1


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", ["row_grad", "row_stats_grad"])
def test_in_place_gradients_are_the_same_bits(name: str, case: dict[str, Any], device: torch.device) -> None:
    arguments = prepared(f"{name}_", case, device)
    fresh, in_place = run(name, arguments), run(f"{name}_", arguments)
    for actual, expected in zip(in_place, fresh, strict=True):
        assert_same_bits(actual, expected)


def test_outputs_that_are_not_wanted_are_empty(device: torch.device) -> None:
    def empty(name: str, *arguments: Any, **options: Any) -> list[str]:
        return [output for output, value in named(name, *arguments, **options).items() if value.shape == (0,)]

    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    assert empty("row_stats", logits, target) == ["wsum", "log_prob"]
    assert empty("row_stats", logits, target, need_wsum=True, need_log_prob=True) == []
    assert empty("reduce_rows", target, None, num_classes=5, loss_dtype=torch.float32) == ["loss", "z_loss"]
    assert empty("cross_entropy", logits, target) == ["z_loss", "lse", "log_prob"]
    wanted = {"need_lse": True, "need_log_prob": True, "lse_square_scale": 0.1}
    assert empty("cross_entropy", logits, target, **wanted) == []


def test_ignored_rows_count_as_zero_unless_they_are_read(device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), torch.tensor([0, -100, 1], device=device)
    expected = truth(logits, target)
    assert_near(named("row_stats", logits, target, read_ignored=True)["lse"], expected.lse, 20.0)
    logits[1] = NAN
    unread = named("row_stats", logits, target, need_wsum=True)
    assert all(float(value[1]) == 0 for name, value in unread.items() if name != "log_prob")


def test_lse_in_two_numbers_is_more_exact_than_one(device: torch.device) -> None:
    """What rounding takes from lse is kept in lse_low: the loss of logits far from 0 depends on it."""
    logits, target = make_logits(7, 21, torch.float32, device) + 1000, make_target(7, 21, device)
    stats = named("row_stats", logits, target)
    expected = truth(logits, target).lse
    assert_near(stats["lse"], expected, expected.abs())
    together = stats["lse"].cpu().double() + stats["lse_low"].cpu().double()
    assert float((together - expected).abs().max()) < 2e-6 < float((stats["lse"].cpu() - expected).abs().max())


def test_totals(device: torch.device) -> None:
    """The kept rows' weights, the number of kept rows, and the weights of all classes."""
    target = torch.tensor([0, 2, -100, 2], device=device)
    weight = torch.tensor([0.5, 0.25, 2.0], device=device)
    options = {"num_classes": 3, "loss_dtype": torch.float32}
    assert ops.reduce_rows(target, weight, **options)[2].tolist() == [4.5, 3, 2.75]
    assert ops.reduce_rows(target, None, **options)[2].tolist() == [3, 3, 3]
    assert ops.reduce_rows(target[:0], weight, **options)[2].tolist() == [0, 0, 2.75]


# What is refused ------------------------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """A call with one argument that is wrong."""

    name: str
    changed: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception]
    words: str


REFUSALS = {
    # every sweep
    "logits of three dimensions": Refusal(
        "row_stats",
        lambda p: {"logits": p["logits"][None]},
        ValueError,
        "logits must have shape [N, C], but have 3 dimensions",
    ),
    "logits of integers": Refusal(
        "row_stats",
        lambda p: {"logits": p["logits"].int()},
        TypeError,
        "logits must be float32, bfloat16, float16 or float64",
    ),
    "no classes": Refusal(
        "row_stats",
        lambda p: {"logits": p["logits"][:, :0]},
        ValueError,
        "logits must have at least one class, but have shape [3, 0]",
    ),
    "class_start below 0": Refusal(
        "row_stats", lambda p: {"class_start": -1}, ValueError, "class_start must not be negative, but is -1"
    ),
    "a shard beyond the classes": Refusal(
        "row_stats",
        lambda p: {"class_start": 3, "num_classes": 7},
        ValueError,
        "the 5 classes of the shard, from class_start 3 on, must lie within num_classes, which is 7",
    ),
    "target of two dimensions": Refusal(
        "row_stats",
        lambda p: {"target": p["target"][:, None]},
        ValueError,
        "target must have shape [N], but has 2 dimensions",
    ),
    "target in int32": Refusal(
        "row_stats", lambda p: {"target": p["target"].int()}, TypeError, "target must be int64, but is Int; convert it"
    ),
    "target of another length": Refusal(
        "row_stats",
        lambda p: {"target": p["target"][:2]},
        ValueError,
        "target must have one value for each of the 3 rows",
    ),
    "target elsewhere": Refusal(
        "row_stats", lambda p: {"target": p["target"].to("meta")}, ValueError, "target must be on the logits' device"
    ),
    "weight of two dimensions": Refusal(
        "row_stats",
        lambda p: {"weight": p["weight"][None]},
        ValueError,
        "weight must have shape [C], but has 2 dimensions",
    ),
    "weight of another length": Refusal(
        "row_stats",
        lambda p: {"weight": p["weight"][:4]},
        ValueError,
        "weight must have one value for each of the 5 classes, but has 4",
    ),
    "weight elsewhere": Refusal(
        "row_stats", lambda p: {"weight": p["weight"].to("meta")}, ValueError, "weight must be on the logits' device"
    ),
    "weight in float16": Refusal(
        "row_stats",
        lambda p: {"weight": p["weight"].half()},
        TypeError,
        "weight must be float32 or of the logits' dtype",
    ),
    # gradients
    "label_smoothing above 1": Refusal(
        "row_grad", lambda p: {"label_smoothing": 1.5}, ValueError, "label_smoothing must lie in [0, 1], but is 1.5"
    ),
    "lse_square_scale below 0": Refusal(
        "row_grad", lambda p: {"lse_square_scale": -1.0}, ValueError, "lse_square_scale must be finite and not negative"
    ),
    "an unknown reduction": Refusal(
        "row_grad",
        lambda p: {"reduction": "avg"},
        ValueError,
        'reduction must be "mean", "sum" or "none", but is "avg"',
    ),
    "lse of two dimensions": Refusal(
        "row_grad", lambda p: {"lse": p["lse"][None]}, ValueError, "lse must have shape [N] and be on"
    ),
    "lse in another dtype": Refusal(
        "row_grad", lambda p: {"lse": p["lse"].half()}, TypeError, "lse must be Float, but is Half"
    ),
    "lse of another length": Refusal(
        "row_grad", lambda p: {"lse": p["lse"][:2]}, ValueError, "lse must have 3 values, but has 2"
    ),
    "totals of two dimensions": Refusal(
        "row_grad", lambda p: {"totals": p["totals"][None]}, ValueError, "totals must have shape [3] and be on"
    ),
    "totals of integers": Refusal(
        "row_grad", lambda p: {"totals": p["totals"].int()}, TypeError, "totals must be float32 or float64, but is Int"
    ),
    "two totals": Refusal(
        "row_grad", lambda p: {"totals": p["totals"][:2]}, ValueError, "totals must have 3 values, but has 2"
    ),
    "grad_loss elsewhere": Refusal(
        "row_grad", lambda p: {"grad_loss": torch.ones((), device="meta")}, ValueError, "grad_loss must be on"
    ),
    "grad_loss of integers": Refusal(
        "row_grad",
        lambda p: {"grad_loss": torch.ones((), dtype=torch.int64, device=p["lse"].device)},
        TypeError,
        "grad_loss must be a floating-point tensor, but is Long",
    ),
    "one grad_loss a row for a mean": Refusal(
        "row_grad",
        lambda p: {"grad_loss": p["lse"]},
        ValueError,
        "grad_loss must have one value for each loss, but has 3",
    ),
    "one grad_z_loss for all rows": Refusal(
        "row_grad",
        lambda p: {"grad_loss": None, "grad_z_loss": p["lse"][0], "reduction": "none"},
        ValueError,
        "grad_z_loss must have one value for each loss, but has 1",
    ),
    "gaps in what is overwritten": Refusal(
        "row_grad_",
        lambda p: {"logits": p["logits"].repeat(1, 2)[:, :5]},
        ValueError,
        "logits that are overwritten with their gradient must be contiguous, but have shape [3, 5] and strides [10, 1]",
    ),
    "one sweep for none": Refusal(
        "row_stats_grad",
        lambda p: {"reduction": "none"},
        ValueError,
        'row_stats_grad needs the upstream gradient beforehand, so reduction must be "mean" or "sum"',
    ),
    "gaps in what one sweep overwrites": Refusal(
        "row_stats_grad_",
        lambda p: {"logits": p["logits"].t().contiguous().t()},
        ValueError,
        "logits that are overwritten with their gradient must be contiguous",
    ),
    # N-sized
    "num_classes of 0": Refusal(
        "reduce_rows",
        lambda p: {"num_classes": 0, "weight": None},
        ValueError,
        "num_classes must be positive, but is 0",
    ),
    "weight of integers": Refusal(
        "reduce_rows", lambda p: {"weight": p["weight"].int()}, TypeError, "weight must be a floating-point tensor"
    ),
    "lse without picked": Refusal(
        "reduce_rows", lambda p: {"picked": None}, ValueError, "reduce_rows with lse also needs picked and totals"
    ),
    "smoothing without wsum": Refusal(
        "reduce_rows",
        lambda p: {"wsum": None, "label_smoothing": 0.1},
        ValueError,
        "reduce_rows with lse also needs picked and totals, and wsum when label_smoothing is not 0",
    ),
    "lse in float16": Refusal(
        "reduce_rows", lambda p: {"lse": p["lse"].half()}, TypeError, "lse must be float32 or float64, but is Half"
    ),
    "picked in another dtype": Refusal(
        "reduce_rows", lambda p: {"picked": p["picked"].half()}, TypeError, "picked must be Float, but is Half"
    ),
    "wsum of another length": Refusal(
        "reduce_rows",
        lambda p: {"wsum": p["wsum"][:2], "label_smoothing": 0.1},
        ValueError,
        "wsum must have 3 values, but has 2",
    ),
    "scaling integers": Refusal(
        "scale_", lambda p: {"self": p["logits"].int()}, TypeError, "scale_ takes float32, bfloat16, float16 or float64"
    ),
    "scaling with gaps": Refusal(
        "scale_", lambda p: {"self": p["logits"][:, :4]}, ValueError, "must be contiguous, but have shape [3, 4]"
    ),
    "two factors": Refusal(
        "scale_",
        lambda p: {"factor": torch.ones(2, device=p["lse"].device)},
        ValueError,
        "factor must have one value, but has 2",
    ),
    # the loss
    "a loss in integers": Refusal(
        "cross_entropy",
        lambda p: {"loss_dtype": torch.int32},
        TypeError,
        "loss_dtype must be a floating-point dtype, but is Int",
    ),
}


@pytest.mark.parametrize("implementation", ["kernels", "composite", "meta"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_read_the_same_everywhere(
    name: str, implementation: str, device: torch.device, composite: Composite
) -> None:
    refusal = REFUSALS[name]
    if implementation == "meta" and "elsewhere" in name:
        return
    made = problem(device, weighted=True)
    values = call(refusal.name, made) | refusal.changed(made)
    if implementation == "meta":
        values = {key: to_meta(value) for key, value in values.items()}
    mode = composite() if implementation == "composite" else nullcontext()
    with torch.no_grad(), mode, pytest.raises(refusal.error, match=re.escape(refusal.words)):
        getattr(ops, refusal.name).default(**values)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_stats_grad", "reduce_rows"])
def test_kernels_check_the_targets_range(name: str, device: torch.device) -> None:
    """Every kernel that would index with it, so that none reads out of bounds whoever calls it."""
    for bad in (5, -1):
        arguments = call(name, problem(device) | {"target": torch.tensor([0, 1, bad], device=device)})
        with pytest.raises(IndexError, match=rf"target\[2\] is {bad}, which is neither a class in \[0, 5\)"):
            getattr(ops, name)(**arguments)


@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_stats_grad", "reduce_rows"])
def test_differentiating_a_primitive_raises_in_words(name: str, device: torch.device) -> None:
    """Rather than silently being a constant."""
    arguments = call(name, problem(device))
    differentiated = "lse" if name == "reduce_rows" else "logits"
    arguments[differentiated] = arguments[differentiated].clone().requires_grad_()
    outputs = getattr(ops, name)(**arguments)
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    assert output.requires_grad
    with pytest.raises(RuntimeError, match=f"npu_xent::{name} is not differentiable: double backward through npu_xent"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["row_grad_", "row_stats_grad_", "scale_"])
def test_overwriting_what_is_differentiated_raises_in_words(name: str, device: torch.device) -> None:
    arguments = call(name, problem(device))
    first = next(iter(arguments))
    before = arguments[first].clone()
    arguments[first] = arguments[first].requires_grad_() * 1
    with pytest.raises(RuntimeError, match=f"npu_xent::{name} is not differentiable"):
        getattr(ops, name)(**arguments)
    assert_same_bits(arguments[first], before)


@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_stats_grad", "cross_entropy"])
def test_forward_mode_is_refused(name: str, device: torch.device) -> None:
    """With and without reverse mode: a dropped tangent would pass for zero."""
    arguments = call(name, problem(device))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), forward_ad.dual_level():
            dual = forward_ad.make_dual(arguments["logits"], torch.ones_like(arguments["logits"]))
            with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp"):
                getattr(ops, name)(**arguments | {"logits": dual})
