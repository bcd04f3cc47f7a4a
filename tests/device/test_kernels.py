"""The device kernels, run on cann_sim, against float64 and against the CPU primitives.

Every launch here is also checked: orderings between pipes, bounds of UB and of each tensor in global memory, what is
read before it is written, cores that meet. A kernel that breaks a rule raises, whatever its results.
"""

from __future__ import annotations

import math
import mmap
import threading
from typing import Any

import pytest
import torch
from kernels import SCALE_CHUNK, Device, RowMode
from reference import INF, NAN, assert_near, assert_same_bits, make_logits, make_target, make_weight, truth
from torch import Tensor

import cann_sim

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
MAP_NORESERVE = 0x4000  # on Linux; Python's mmap has no name for it before 3.13
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32 = torch.float32

# The shapes that the vendor's own tests use; the larger ones with fewer rows, all with all their columns.
VENDOR_SHAPES = (
    *((480, 8080), (240, 8192), (1, 1), (3, 3), (88, 97), (6038, 21), (600, 1833), (60, 29951), (40, 52211)),
    *((60, 14127), (50, 26494), (256, 4095), (49, 112595), (128, 4191), (2, 16)),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight": True, "label_smoothing": 0.1, "lse_square_scale": 1e-3, "ignore": True},
    {"reduction": "sum", "label_smoothing": 0.2, "logit_scale": 0.7, "ignore": True},
    {"reduction": "none", "weight": True, "lse_square_scale": 1e-2},
    {"softcap": 5.0, "weight": True, "label_smoothing": 0.1, "logit_scale": 1.5, "ignore": True},
)
# One shape a row mode, each with a tail; and plans that the planner makes only for shapes too large for a test: a row
# in more chunks than are joined at a time.
MANY = {"chunk_cols": 512, "chunks": 71, "chunks_per_part": 71, "parts": 1}
MODES: dict[str, tuple[int, int, dict[str, int]]] = {
    "short": (130, 67, {}),
    "short, wide": (60, 1000, {}),
    "resident": (53, 5000, {}),
    "resident, one chunk": (53, 1025, {}),
    "resident, many chunks": (50, 36_300, {"mode": RowMode.resident, "slots": 76, **MANY}),
    "streaming": (50, 79_000, {}),
    "streaming, many chunks": (50, 36_300, {"mode": RowMode.streaming, "slots": 6, **MANY}),
    "split": (5, 9000, {}),
    "split, long parts": (1, 36_300, {**MANY, "mode": RowMode.split, "slots": 6, "parts": 2, "chunks_per_part": 36}),
}


def shape_of(mode: str, dtype: torch.dtype) -> tuple[int, int, dict[str, int]]:
    """Rows, columns and forced plan of a mode; one that is made resident by force does not fit in fp32, and streams."""
    rows, cols, forced = MODES[mode]
    if forced.get("mode") == RowMode.resident and dtype == FP32:
        forced = {**forced, "mode": RowMode.streaming, "slots": 6}
    return rows, cols, forced


class Case:
    """Inputs and options of one call of every primitive, and the results expected."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, options: dict[str, Any], confident: float = 0) -> None:
        """confident: added to the logit of every second row's target."""
        options = dict(options)
        self.weight = make_weight(cols, FP32, CPU) if options.pop("weight", False) else None
        self.logits = make_logits(rows, cols, dtype, CPU)
        self.target = make_target(rows, cols, CPU, ignore_index=-100 if options.pop("ignore", False) else None)
        if confident:
            kept = torch.arange(0, rows, 2)
            kept = kept[self.target[kept] >= 0]
            self.logits[kept, self.target[kept]] += confident
        self.options = options
        self.reduction = options.get("reduction", "mean")
        scalar = self.reduction != "none"
        generator = torch.Generator().manual_seed(rows)
        self.grad_loss = torch.ones(()) if scalar else torch.rand(rows, generator=generator) + 0.5
        self.grad_z_loss = torch.zeros(()) if scalar else torch.rand(rows, generator=generator)
        self.loss_options = {
            k: options[k] for k in ("reduction", "label_smoothing", "lse_square_scale") if k in options
        }
        self.truth = truth(
            self.logits, self.target, self.weight, grad_loss=self.grad_loss, grad_z_loss=self.grad_z_loss, **options
        )
        self.kept = self.target != -100

    def run(self, device: Device) -> dict[str, Tensor | None]:
        """Every primitive on the device, by the names of their results."""
        x, y, w = self.logits, self.target, self.weight
        classes = x.shape[1]
        totals = device.reduce_rows(y, w, num_classes=classes)
        scale = {"logit_scale": self.options.get("logit_scale", 1.0), "softcap": self.options.get("softcap")}
        smooth = self.options.get("label_smoothing", 0) != 0
        lse, low, picked, wsum, log_prob, *_ = device.row_stats(x, y, w, need_wsum=smooth, need_log_prob=True, **scale)
        unread = device.row_stats(x, y, w, need_wsum=smooth, **scale)
        loss, z_loss = device.reduce_rows(
            y, w, lse, low, picked, wsum, totals, num_classes=classes, **self.loss_options
        )
        grad = device.row_grad(x, y, w, lse, low, totals, self.grad_loss, self.grad_z_loss, **self.options)
        results = {
            "totals": totals, "lse": lse, "lse_low": low, "picked": picked, "wsum": wsum, "log_prob": log_prob,
            "unread lse": unread[0], "loss": loss, "z_loss": z_loss, "row_grad": grad,
        }  # fmt: skip
        if self.reduction != "none":
            swept = device.row_stats_grad(x, y, w, totals, **self.options)
            results["swept lse"], results["row_stats_grad"] = swept[0], swept[4]
        return results

    def check(self, results: dict[str, Tensor | None]) -> None:
        """Against float64, within what roundings explain; and the CPU primitives, within twice that."""
        t, scale, softcap = self.truth, self.options.get("logit_scale", 1.0), self.options.get("softcap")
        z = t.log_prob + t.lse[:, None]
        x = z.abs()
        size = t.lse.abs() + 1
        lse, low = results["lse"], results["lse_low"]
        # The sum of both has the error of log sum exp(x - max) alone, however large the maximum.
        above_max = t.lse - z.max(1).values
        scaled = x.max(1).values * (4 if softcap else scale != 1)  # t x is rounded, and so is its tanh
        error = (lse.double() + low.double() - t.lse).abs()
        allowed = torch.finfo(FP32).eps * (4 * (1 + above_max) + scaled)
        assert bool((error <= allowed).all()), f"lse + lse_low: {(error / allowed).max()} times what is allowed"
        assert_near(lse, t.lse, size, name="lse")
        assert_near(results["log_prob"], t.log_prob, x + size[:, None], name="log_prob")
        assert_near(results["loss"], t.loss, t.loss_terms, name="loss")
        if results["z_loss"] is not None:
            assert_near(results["z_loss"], t.z_loss, t.z_loss.abs(), name="z_loss")
        for name in ("row_grad", "row_stats_grad"):
            if name in results:
                assert_near(results[name], t.grad, t.grad_terms, name=name)
        assert torch.equal(results["unread lse"], lse.masked_fill(~self.kept, 0))
        self.check_cpu(results)

    def check_cpu(self, results: dict[str, Tensor | None]) -> None:
        """Two roundings apart at most, and in fp32 twice what is allowed from float64."""
        ops, (x, y, w), t = torch.ops.npu_xent, (self.logits, self.target, self.weight), self.truth
        classes, scale, softcap = x.shape[1], self.options.get("logit_scale", 1.0), self.options.get("softcap")
        totals = ops.reduce_rows(y, w, num_classes=classes, loss_dtype=FP32)[2]
        need_wsum = results["wsum"] is not None
        lse, low, picked, wsum, log_prob, *_ = ops.row_stats(
            x, y, w, logit_scale=scale, softcap=softcap, need_wsum=need_wsum, need_log_prob=True, read_ignored=True
        )
        loss, z_loss, _ = ops.reduce_rows(
            y, w, lse, low, picked, wsum if need_wsum else None, totals, num_classes=classes, loss_dtype=FP32,
            **self.loss_options,
        )  # fmt: skip
        scalar = self.reduction != "none"
        grad = ops.row_grad(
            x, y, w, lse, low, totals, self.grad_loss, None if scalar else self.grad_z_loss, **self.options
        )
        size = t.lse.abs() + 1
        log_prob_size = (t.log_prob + t.lse[:, None]).abs() + size[:, None]
        if softcap is None:
            assert torch.equal(results["picked"], picked)
        else:
            assert_near(results["picked"], picked.double(), picked.double().abs(), name="picked beside the CPU's")
        for name, expected, terms in (
            ("totals", totals, totals.double().abs()),
            ("lse", lse, size),
            ("log_prob", log_prob, log_prob_size),
            ("loss", loss, t.loss_terms),
            ("row_grad", grad, t.grad_terms),
        ):
            assert_near(results[name], expected.double(), 2 * terms, roundings=2, name=f"{name} beside the CPU's")
        if need_wsum:
            assert_near(results["wsum"], wsum.double(), 2 * wsum.double().abs() + classes, name="wsum")
        if results["z_loss"] is not None:
            assert_near(results["z_loss"], z_loss.double(), 2 * t.z_loss.abs(), roundings=2, name="z_loss")
        if scalar:
            swept = ops.row_stats_grad(x, y, w, totals, **self.options)[4]
            assert_near(results["row_stats_grad"], swept.double(), 2 * t.grad_terms, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(VENDOR_SHAPES)), ids=[f"{n}x{c}" for n, c in VENDOR_SHAPES])
def test_vendor_shapes(number: int, dtype: torch.dtype) -> None:
    """Each shape with one set of options after the other, in turn over the dtypes."""
    case = Case(*VENDOR_SHAPES[number], dtype, OPTIONS[(number + DTYPES.index(dtype)) % len(OPTIONS)])
    case.check(case.run(Device()))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o)) or "plain")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_row_mode_with_every_option(mode: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    rows, cols, forced = shape_of(mode, dtype)
    case = Case(rows, cols, dtype, options)
    case.check(case.run(Device(forced=forced)))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o)) or "plain")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["short", "resident", "split"])
def test_confident_predictions(mode: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Where p is near 1, the target's gradient is made another way, without the cancellation of a p - b."""
    rows, cols, _ = MODES[mode]
    case = Case(rows, cols, dtype, options, confident=25)
    case.check(case.run(Device()))


def test_modes_are_what_they_are_called() -> None:
    """The shapes above are planned as their names say."""
    for name, (rows, cols, forced) in MODES.items():
        plan = Device(forced=forced).plan(torch.empty(rows, cols, dtype=torch.bfloat16))
        assert plan.mode == RowMode[name.split(",")[0]], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_bitwise_the_same_on_any_number_of_cores(mode: str, dtype: torch.dtype) -> None:
    rows, cols, forced = shape_of(mode, dtype)
    case = Case(rows, cols, dtype, OPTIONS[1])
    expected = case.run(Device(1, forced=forced))
    for cores in (20, 40, 48):
        results = case.run(Device(cores, forced=forced))
        for name, value in expected.items():
            if value is not None:
                assert_same_bits(results[name], value, f"{name} on {cores} cores")


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(mode: str, dtype: torch.dtype) -> None:
    """The gradient over the logits has the bits of the gradient in fresh memory; ignored rows may hold anything."""
    rows, cols, _ = MODES[mode]
    case = Case(rows, cols, dtype, OPTIONS[1])
    case.logits[1::3] = NAN
    device = Device()
    x, y, w = case.logits, case.target, case.weight
    totals = device.reduce_rows(y, w, num_classes=cols)
    fresh = device.row_stats_grad(x, y, w, totals, **case.options)[4]
    assert bool(fresh.isfinite().all())
    assert not fresh[1::3].any()
    assert_same_bits(device.row_stats_grad(x.clone(), y, w, totals, in_place=True, **case.options)[4], fresh)
    stats = device.row_stats(x, y, w)
    fresh = device.row_grad(x, y, w, *stats[:2], totals, case.grad_loss, **case.options)
    over = device.row_grad(x.clone(), y, w, *stats[:2], totals, case.grad_loss, in_place=True, **case.options)
    assert_same_bits(over, fresh)


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
def test_ignored_rows_are_read_when_asked(mode: str) -> None:
    """read_ignored: their statistics are there, their gradient is 0, also where the logits are NaN."""
    rows, cols, _ = MODES[mode]
    case = Case(rows, cols, torch.bfloat16, OPTIONS[1])
    case.logits[1] = NAN
    device = Device()
    totals = device.reduce_rows(case.target, case.weight, num_classes=cols)
    options = {**case.options, "read_ignored": True}
    out = device.row_stats_grad(case.logits, case.target, case.weight, totals, **options)
    expected = device.row_stats(case.logits, case.target, case.weight, read_ignored=True)
    assert bool(out[0][1].isnan())
    assert_same_bits(out[0], expected[0])
    assert not out[4][1::3].any()
    assert bool(out[4][0::3].any())


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
def test_rows_apart_from_each_other(mode: str) -> None:
    """Logits that are some columns of a wider tensor: what lies between them is not touched."""
    rows, cols, _ = MODES[mode]
    case = Case(rows, cols, torch.bfloat16, {})
    wider = torch.full((rows, cols + 5), NAN, dtype=torch.bfloat16)
    wider[:, :cols] = case.logits
    device = Device()
    expected, stats = device.row_stats(case.logits, case.target), device.row_stats(wider[:, :cols], case.target)
    assert_same_bits(stats[0], expected[0])
    totals = device.reduce_rows(case.target, num_classes=cols)
    expected = device.row_grad(case.logits, case.target, None, *stats[:2], totals, case.grad_loss)
    device.row_grad(wider[:, :cols], case.target, None, *stats[:2], totals, case.grad_loss, in_place=True)
    assert_same_bits(wider[:, :cols].contiguous(), expected)
    assert bool(wider[:, cols:].isnan().all())


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
def test_rows_further_apart_than_32_bits_count(mode: str) -> None:
    """Read and written. The elements between the rows are never touched, and take no memory."""
    rows, cols, _ = MODES[mode]
    stride = 2**32 + 8
    case = Case(rows, cols, torch.bfloat16, {})
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * rows * stride, flags), dtype=torch.bfloat16)
    apart = memory.as_strided((rows, cols), (stride, 1))
    apart.copy_(case.logits)
    device = Device()
    expected, stats = device.row_stats(case.logits, case.target), device.row_stats(apart, case.target)
    assert_same_bits(stats[0], expected[0])
    totals = device.reduce_rows(case.target, num_classes=cols)
    for function, inputs in ((device.row_stats_grad, ()), (device.row_grad, (*stats[:2], totals, case.grad_loss))):
        apart.copy_(case.logits)
        arguments = (case.target, None, *(inputs or (totals,)))
        expected = function(case.logits.clone(), *arguments, in_place=True)
        function(apart, *arguments, in_place=True)
        grad = expected[4] if isinstance(expected, tuple) else expected
        assert_same_bits(apart.contiguous(), grad)


@pytest.mark.parametrize("mode", ["short", "resident", "split"])
@pytest.mark.parametrize("stride", [0, 10])
def test_rows_over_each_other(mode: str, stride: int) -> None:
    """Logits that are expanded from one row, or whose rows overlap: nothing is read that is not theirs."""
    rows, cols, _ = MODES[mode]
    memory = make_logits(1, cols + stride * (rows - 1), torch.bfloat16, CPU).flatten()
    x, y = memory.as_strided((rows, cols), (stride, 1)), make_target(rows, cols, CPU)
    device = Device()
    lse, low = device.row_stats(x, y)[:2]
    expected = device.row_stats(x.contiguous(), y)
    assert_same_bits(lse, expected[0])
    totals = device.reduce_rows(y, num_classes=cols)
    grad = device.row_grad(x, y, None, lse, low, totals, torch.ones(()))
    assert_same_bits(grad, device.row_grad(x.contiguous(), y, None, lse, low, totals, torch.ones(())))


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
@pytest.mark.parametrize("bad", [-1, "classes", 2**40, -(2**63), 2**63 - 1, 2**32])
def test_target_out_of_range(mode: str, bad: int | str) -> None:
    """Nothing is read out of bounds; the loss and the gradient of that row are NaN, all others as without it."""
    rows, cols, _ = MODES[mode]
    case = Case(rows, cols, torch.bfloat16, {"label_smoothing": 0.1, "weight": True})
    device = Device()
    y = case.target.clone()
    y[2] = cols if bad == "classes" else bad
    x, w, options = case.logits, case.weight, {"label_smoothing": 0.1, "reduction": "sum"}
    totals = device.reduce_rows(y, w, num_classes=cols)
    good = torch.arange(rows) != 2
    assert_near(totals[0], w.double()[y[good]].sum(), w.double().sum(), name="kept weight")
    assert totals[1] == rows - 1
    stats = device.row_stats(x, y, w, need_wsum=True)
    rows_loss = device.reduce_rows(y, w, *stats[:4], totals, num_classes=cols, label_smoothing=0.1, reduction="none")[0]
    assert torch.equal(rows_loss.isnan(), ~good)
    swept = device.row_stats_grad(x, y, w, totals, **options)[4]
    apart = device.row_grad(x, y, w, *stats[:2], totals, torch.ones(()), **options)
    expected = device.row_stats_grad(x, case.target, w, totals, **options)[4]
    for grad in (swept, apart):
        assert bool(grad[2].isnan().all())
    assert_same_bits(swept[good], expected[good])
    assert_near(apart[good], expected[good].double(), expected[good].double().abs(), roundings=2)


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(mode: str, dtype: torch.dtype) -> None:
    """-inf logits are classes of probability 0; rows without a distribution are NaN, and leave others alone."""
    rows, cols, _ = MODES[mode]
    x = make_logits(rows, cols, dtype, CPU)
    y = make_target(rows, cols, CPU)
    x[0, : cols // 2] = -INF
    y[0] = cols - 1
    if rows > 4:
        x[1], x[2, 3], x[3, cols // 2] = -INF, INF, NAN
        x[4, 1::2] = -INF
        y[4] = 1  # a class of probability 0: an infinite loss
    expected = truth(x, y, reduction="none", grad_loss=torch.ones(rows))
    device = Device()
    totals = device.reduce_rows(y, num_classes=cols)
    lse, low, picked, _, log_prob, *_ = device.row_stats(x, y, need_log_prob=True)
    loss = device.reduce_rows(y, None, lse, low, picked, None, totals, reduction="none", num_classes=cols)[0]
    grad = device.row_grad(x, y, None, lse, low, totals, torch.ones(rows), reduction="none")
    size = (expected.lse.abs() + 1).nan_to_num(0, 0, 0)
    assert_near(lse, expected.lse, size, name="lse")
    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    log_prob_size = x.double().abs().nan_to_num(0, 0, 0) + size[:, None]
    assert_near(log_prob, expected.log_prob, log_prob_size, name="log_prob")
    assert_near(grad, expected.grad, expected.grad_terms, name="grad")
    swept = device.row_stats_grad(x, y, None, totals, reduction="sum")[4]
    assert_near(swept, expected.grad, expected.grad_terms, name="row_stats_grad")


@pytest.mark.parametrize("offset", [1e3, -1e4])
@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
def test_logits_far_from_zero(mode: str, offset: float) -> None:
    """lse_low keeps the digits of the loss that one fp32 lse would lose: the error is that of the logits near 0."""
    rows, cols, _ = MODES[mode]
    x = (make_logits(rows, cols, FP32, CPU) + offset).contiguous()
    y = make_target(rows, cols, CPU)
    expected = truth(x, y, reduction="none", label_smoothing=0.1)
    device = Device()
    totals = device.reduce_rows(y, num_classes=cols)
    stats = device.row_stats(x, y, need_wsum=True)
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss = device.reduce_rows(y, None, *stats[:4], totals, num_classes=cols, **options)[0]
    assert_near(loss, expected.loss, expected.loss.abs() + 10, name="loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, cols, shards", [(130, 600, 2), (50, 9000, 3), (50, 160_000, 2), (6, 9000, 2)])
def test_class_shards(rows: int, cols: int, shards: int, dtype: torch.dtype) -> None:
    """Shards of the classes, each by itself, against the CPU primitives; their gradients make up that of the whole."""
    case = Case(rows, cols, dtype, OPTIONS[1])
    device, ops = Device(), torch.ops.npu_xent
    y, w = case.target, case.weight
    totals = device.reduce_rows(y, w, num_classes=cols)
    step = -(-cols // shards)
    starts = range(0, cols, step)
    whole = ops.row_stats(case.logits, y, w, need_wsum=True)
    grads = []
    for start in starts:
        x = case.logits[:, start : start + step].contiguous()
        where = {"class_start": start, "num_classes": cols}
        got = device.row_stats(x, y, w, need_wsum=True, **where)
        expected = ops.row_stats(x, y, w, need_wsum=True, **where)
        assert torch.equal(got[2], expected[2])
        assert_near(got[0], expected[0].double(), expected[0].double().abs() + 1, name="lse")
        assert_near(got[3], expected[3].double(), 2 * expected[3].double().abs() + cols, name="wsum")
        grads.append(device.row_grad(x, y, w, whole[0], whole[1], totals, case.grad_loss, **where, **case.options))
    assert_near(torch.cat(grads, 1), case.truth.grad, case.truth.grad_terms, name="grad")


def test_shards_at_the_end_of_int64() -> None:
    """Classes that start near 2^63 - 1: no index wraps."""
    x = make_logits(5, 64, FP32, CPU)
    start = 2**63 - 1 - 64
    y = torch.tensor([start, start + 63, 0, -5, 2**63 - 2])
    got = Device().row_stats(x, y, class_start=start, num_classes=2**63 - 1)
    assert got[2].tolist()[:3] == [x[0, 0].item(), x[1, 63].item(), 0.0]
    assert bool(got[2][3].isnan())
    assert got[2][4] == x[4, 63]


@pytest.mark.parametrize("ignore_index", [0, 7, -(2**63), 2**63 - 1])
def test_any_ignore_index(ignore_index: int) -> None:
    x = make_logits(9, 30, torch.bfloat16, CPU)
    y = make_target(9, 30, CPU)
    y[3:6] = ignore_index
    device = Device()
    totals = device.reduce_rows(y, num_classes=30, ignore_index=ignore_index)
    grad = device.row_stats_grad(x, y, None, totals, ignore_index=ignore_index)[4]
    expected = truth(x, y, ignore_index=ignore_index)
    assert_near(grad, expected.grad, expected.grad_terms)


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_kept(mode: str, smoothing: float) -> None:
    """A mean over no row is NaN, a sum 0; the gradient is 0."""
    rows, cols, _ = MODES[mode]
    x, y = make_logits(rows, cols, torch.bfloat16, CPU), torch.full((rows,), -100)
    device = Device()
    totals = device.reduce_rows(y, num_classes=cols)
    assert totals.tolist() == [0, 0, cols]
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        out = device.row_stats_grad(x, y, None, totals, **options)
        assert not out[4].any()
        loss = device.reduce_rows(y, None, *out[:4], totals, num_classes=cols, **options)[0]
        assert bool(loss.isnan()) if reduction == "mean" else loss == 0


def test_many_rows_are_counted_exactly() -> None:
    """Sums of size N: blocks, and joins of many blocks, with and without class weights."""
    n, classes = 300_000, 5000
    y = make_target(n, classes, CPU, ignore_index=-100)
    for w in (None, make_weight(classes, FP32, CPU)):
        device = Device()
        totals = device.reduce_rows(y, w, num_classes=classes)
        kept = y[y != -100]
        assert totals[1] == kept.numel()
        weights = torch.ones(classes).double() if w is None else w.double()
        assert_near(totals[0], weights[kept].sum(), weights[kept].sum(), name="kept weight")
        assert_near(totals[2], weights.sum(), weights.sum(), name="class weight")
        lse, picked = torch.rand(n) * 10 + 5, torch.rand(n)
        loss = device.reduce_rows(y, w, lse, None, picked, None, totals, num_classes=classes)[0]
        kept_rows = y != -100
        exact = (weights[kept] * (lse.double() - picked.double())[kept_rows]).sum() / weights[kept].sum()
        assert_near(loss, exact, exact.abs(), name="loss")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, SCALE_CHUNK, 5 * SCALE_CHUNK + 17])
def test_scale(n: int, factor_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """One product in fp32, one rounding; NaN and infinities as in any product."""
    generator = torch.Generator().manual_seed(n)
    for factor in (0.3, -65536.0, 0.0, float("inf"), float("nan")):
        x = torch.randn(n, generator=generator).to(dtype)
        value = torch.tensor(factor).to(factor_dtype)
        scaled = x.clone()
        Device(cores=3).scale_(scaled, value)
        torch.testing.assert_close(scaled, (x.float() * value.float()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
def test_scale_by_one_costs_nothing(factor_dtype: torch.dtype) -> None:
    x = torch.randn(3 * SCALE_CHUNK)
    device = Device()
    device.scale_(x, torch.ones((), dtype=factor_dtype))
    device.scale_(x, torch.full((), 2, dtype=factor_dtype))
    by_one, by_two = device.reports
    assert by_one.written_bytes == 0
    assert by_one.read_bytes == factor_dtype.itemsize * by_one.blocks
    assert by_two.written_bytes == 4 * x.numel()
    assert by_one.time_ns < 1000


def test_two_streams_at_once() -> None:
    """Launches share nothing: two threads get the bits that one gets."""
    cases = [Case(60, 3000, torch.bfloat16, OPTIONS[1]), Case(90, 100, torch.float32, OPTIONS[2])]
    expected = [case.run(Device()) for case in cases]
    results: list[list[dict[str, Tensor | None]]] = [[], []]

    def work(number: int) -> None:
        for _ in range(3):
            results[number].append(cases[number].run(Device()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(results[number]) == 3
        for result in results[number]:
            for name, value in expected[number].items():
                if value is not None:
                    assert_same_bits(result[name], value, name)


def test_the_same_bits_on_one_host_thread() -> None:
    """The order in which the host runs the cores leaves no trace: nothing is added up across cores in a launch."""
    case = Case(300, 777, torch.bfloat16, OPTIONS[1])
    first, second = case.run(Device()), case.run(Device(config=cann_sim.Config(threads=1)))
    for name, value in first.items():
        if value is not None:
            assert_same_bits(second[name], value, name)


# ---- numbers by row: temperatures, entropy, top1 ----

# Each row mode with each of these, in turn over the dtypes.
OPTIONS_BY_ROW: tuple[dict[str, Any], ...] = (
    {},
    {"temperatures": True, "logit_scale": 0.7, "ignore": True},
    {"temperatures": True, "softcap": 5.0, "logit_scale": 1.5},
)
FOUR_CHUNKS = {"chunk_cols": 512, "chunks": 4}
# Columns and plan for a few rows each of which is a case of its own.
SPECIAL: dict[str, tuple[int, dict[str, int]]] = {
    "short": (67, {}),
    "short, wide": (1000, {}),
    "streaming": (2000, {"mode": RowMode.streaming, "slots": 6, "parts": 1, "chunks_per_part": 4, **FOUR_CHUNKS}),
    "split": (2000, {"mode": RowMode.split, "slots": 6, "parts": 4, "chunks_per_part": 1, **FOUR_CHUNKS}),
}


class ByRow:
    """Log-probabilities and entropies of rows, and their gradients: inputs, and the results expected."""

    def __init__(
        self, x: Tensor, y: Tensor, t: Tensor | None, *, softcap: float | None = None, logit_scale: float = 1.0
    ) -> None:
        self.x, self.y, self.t = x, y, t
        self.scales = {"softcap": softcap, "logit_scale": logit_scale}
        rows = len(y)
        generator = torch.Generator().manual_seed(rows)
        self.grad_log_prob, self.grad_entropy = torch.randn(2, rows, generator=generator)
        self.totals = torch.tensor([rows, rows, x.shape[1]], dtype=FP32)
        # The truth, in float64. A row without a distribution, or whose temperature is none, is NaN.
        self.kept = y != -100
        temperature = torch.ones(rows) if t is None else t
        temperature = temperature.double().masked_fill(~((temperature > 0) & (temperature < INF)), NAN)[:, None]
        z, slope = x.double() * logit_scale, logit_scale / temperature
        steepest = slope.abs()  # the slope of a softcap is made by a subtraction from 1
        if softcap is not None:
            slope = slope / (z / softcap).cosh().square()
            z = softcap * (z / softcap).tanh()
        z = z / temperature
        top = z.max(1, keepdim=True).values
        lse = top + (z - top).exp().sum(1, keepdim=True).log()
        self.log_p = (z - lse).masked_fill(~lse.isfinite(), NAN)
        p, finite = self.log_p.exp(), self.log_p.clamp_min(-1e3)
        self.entropy = -(p * finite).sum(1)
        spread = finite + self.entropy[:, None]
        hot = torch.zeros_like(p).scatter_(1, y.clamp_min(0)[:, None], 1)
        self.log_prob = self.log_p.gather(1, y.clamp_min(0)[:, None])[:, 0]
        self.lse = lse[:, 0]
        self.top1 = (x.double() * (1 if logit_scale > 0 else -1)).argmax(1) == y
        self.top1 &= self.kept & self.log_p.isfinite().any(1)
        of_log_prob, of_entropy = slope * (hot - p), -slope * p * spread
        self.grads = of_log_prob.nan_to_num(0, 0, 0), of_entropy.nan_to_num(0, 0, 0)
        self.undefined = self.kept & ~lse[:, 0].isfinite()
        # What the results are summed up from: logits that are scaled, or capped, are rounded.
        size = z.abs().nan_to_num(0, 0, 0) * (4 if softcap else t is not None or logit_scale != 1)
        wide = 1 + finite.abs() + size + (size * p).sum(1, keepdim=True)
        self.entropy_terms = 1 + self.entropy + (z - top).exp().sum(1).log() + (p * spread.abs() * size).sum(1)
        self.grad_terms = (
            (steepest * (p * wide + hot)).nan_to_num(0, 0, 0),
            (steepest * p * (wide * (finite.abs() + self.entropy[:, None]) + self.entropy_terms[:, None])).nan_to_num(),
        )
        self.size = size

    def expected_grad(self, factors: tuple[Tensor | float, Tensor | float]) -> tuple[Tensor, Tensor]:
        """The gradient for such upstream gradients of log_prob and entropy, and the size of its terms."""
        by_row = [torch.as_tensor(factor).double().expand(len(self.y))[:, None] for factor in factors]
        grad = sum(factor * grad for factor, grad in zip(by_row, self.grads, strict=True))
        terms = sum(factor.abs() * part for factor, part in zip(by_row, self.grad_terms, strict=True))
        grad = grad.masked_fill(self.undefined[:, None], NAN).masked_fill(~self.kept[:, None], 0)
        return grad, terms.masked_fill(~self.kept[:, None], 0)

    def run(self, device: Device, *, in_place: bool = False) -> dict[str, Tensor]:
        """Statistics, and the gradients of log_prob and the entropy, together and of each alone."""
        stats = device.row_stats(self.x, self.y, None, self.t, need_entropy=True, need_top1=True, **self.scales)
        lse, low, picked, _, _, entropy, top1 = stats
        results = {"lse": lse, "lse_low": low, "picked": picked, "entropy": entropy, "top1": top1}
        zeros = torch.zeros_like(lse)
        for name, (of_log_prob, of_entropy) in {
            "grad": (self.grad_log_prob, self.grad_entropy),
            "grad of log_prob": (self.grad_log_prob, None),
            "grad of entropy": (zeros, self.grad_entropy),
        }.items():
            results[name] = device.row_grad(
                self.x.clone() if in_place else self.x, self.y, None, lse, low, self.totals, -of_log_prob, None,
                self.t, entropy, of_entropy, reduction="none", in_place=in_place, **self.scales,
            )  # fmt: skip
        return results

    def check(self, results: dict[str, Tensor]) -> None:
        """Against float64, within what roundings explain."""
        log_prob = (results["picked"].double() - results["lse"].double() - results["lse_low"].double())[self.kept]
        size = (self.size.max(1).values + self.log_prob.abs()).nan_to_num(0, 0, 0) + 1
        log_prob = log_prob.masked_fill(self.undefined[self.kept], NAN)
        assert_near(log_prob.float(), self.log_prob[self.kept], size[self.kept], name="log_prob")
        entropy = self.entropy.masked_fill(~self.kept, 0)
        assert_near(results["entropy"], entropy, self.entropy_terms.nan_to_num(0), name="entropy")
        assert results["top1"].tolist() == self.top1.float().tolist()
        for name, factors in {
            "grad": (self.grad_log_prob, self.grad_entropy),
            "grad of log_prob": (self.grad_log_prob, 0),
            "grad of entropy": (0, self.grad_entropy),
        }.items():
            grad, terms = self.expected_grad(factors)
            assert_near(results[name], grad, terms, name=name)

    def check_cpu(self, results: dict[str, Tensor]) -> None:
        """Against the CPU's primitives, within twice that."""
        ops = torch.ops.npu_xent
        *_, picked, _, _, entropy, top1 = ops.row_stats(
            self.x, self.y, None, None if self.t is None else self.t.masked_fill(~self.kept, 1),
            need_entropy=True, need_top1=True, **self.scales,
        )  # fmt: skip
        assert torch.equal(results["top1"] != 0, top1)
        assert_near(results["entropy"], entropy.double(), 2 * self.entropy_terms, roundings=2, name="the CPU's entropy")
        if self.t is None:
            assert torch.equal(results["picked"], picked)


def by_row_case(rows: int, cols: int, dtype: torch.dtype, options: dict[str, Any], confident: float = 0) -> ByRow:
    """Random logits; the target of every second row has `confident` added to its logit."""
    options = dict(options)
    x, y = make_logits(rows, cols, dtype, CPU), make_target(rows, cols, CPU)
    x[::2].scatter_add_(1, y[::2, None], torch.full((len(y[::2]), 1), confident, dtype=dtype))
    temperatures = torch.rand(rows, generator=torch.Generator().manual_seed(cols)) * 1.5 + 0.5
    if options.pop("ignore", False):
        y[1::3] = -100
        temperatures[1::3] = NAN
        x[1::3] = NAN
    return ByRow(x, y, temperatures if options.pop("temperatures", False) else None, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(MODES)), ids=list(MODES))
def test_entropy_and_top1_in_every_row_mode(number: int, dtype: torch.dtype) -> None:
    options = OPTIONS_BY_ROW[(number + DTYPES.index(dtype)) % len(OPTIONS_BY_ROW)]
    rows, cols, forced = shape_of(list(MODES)[number], dtype)
    case = by_row_case(rows, cols, dtype, options, confident=16)
    assert 0 < case.top1.sum() < rows or rows == 1
    results = case.run(Device(forced=forced))
    case.check(results)
    if not results["entropy"].isnan().any():
        case.check_cpu(results)
    again = case.run(Device(1, forced=forced), in_place=True)
    for name, value in results.items():
        assert_same_bits(again[name], value, f"{name} in place, on one core")


@pytest.mark.parametrize("mode", SPECIAL)
@pytest.mark.parametrize("offset, spread, confident", [(1e4, 1.0, 0), (-1e4, 1.0, 20), (0, 1e-3, 0), (0, 40.0, 0)])
def test_entropy_keeps_its_digits(mode: str, offset: float, spread: float, confident: float) -> None:
    """Rows far from 0, confident, flat and wide: the tolerance does not grow with the logits."""
    cols, forced = SPECIAL[mode]
    x = make_logits(9, cols, FP32, CPU, spread=spread) + offset
    y = make_target(9, cols, CPU)
    x.scatter_add_(1, y[:, None], torch.full((9, 1), float(confident)))
    case = ByRow(x, y, None)
    results = case.run(Device(forced=forced))
    case.check(results)
    reference = x.clone().requires_grad_()
    log_p = reference.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    entropy.backward(case.grad_entropy)
    floor = torch.finfo(FP32).eps
    for ours, torchs, exact in (
        (results["entropy"], entropy.detach(), case.entropy),
        (results["grad of entropy"], reference.grad, case.expected_grad((0, case.grad_entropy))[0]),
    ):
        error, allowed = (ours - exact).abs().max(), (torchs - exact).abs().max()
        assert error <= 2 * allowed + floor * exact.abs().max()


def special_rows(cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with masks and ties, without a distribution, or without a temperature; and rows that are ignored."""
    rows: list[tuple[Tensor, int, float]] = []
    generator = torch.Generator().manual_seed(cols)

    def add(y: int, temperature: float = 1.0, **values: float) -> None:
        """A row of logits below 4, and `values` at places that their names say."""
        x = (torch.rand(cols, generator=generator) * 6 - 3).to(dtype)
        for where, value in values.items():
            places: dict[str, Any] = {
                "all": slice(None), "target": y, "half": slice(cols // 2), "first": 0, "last": cols - 1,
                "before": y - 1, "after": y + 1,
            }  # fmt: skip
            x[places[where]] = value
        rows.append((x, y, temperature))

    last, middle = cols - 1, cols // 2 + 3
    for target in (1, middle, last - 1):  # ties: the first of equals
        add(target, target=5.0)
        add(target, target=5.0, first=5.0)
        add(target, target=5.0, last=5.0)
        add(target, target=5.0, before=5.0)
        add(target, target=5.0, after=5.0)
    add(0, target=5.0, last=5.0)
    add(last, target=5.0)
    add(0, all=2.0)
    add(last, all=2.0)
    # Masks: whole chunks, all but the target, the target itself, everything.
    add(last, half=-INF, target=5.0)
    add(1, half=-INF)
    add(middle, all=-INF, target=1.0)
    add(0, all=-INF, target=1.0)
    add(0, all=-INF)
    add(last, all=-INF)
    for special in (NAN, INF):
        add(0, first=special)
        add(middle, target=5.0, after=special)
    for temperature in (0.0, -1.0, NAN, INF, -INF):
        add(middle, temperature, target=5.0)
    add(-100, NAN, all=NAN)
    add(-100, first=INF)
    add(middle, 1e-6, target=5.0)
    add(middle, 1e6, target=5.0)
    xs, ys, ts = zip(*rows, strict=True)
    return torch.stack(xs), torch.tensor(ys), torch.tensor(ts)


@pytest.mark.parametrize("mode", SPECIAL)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_special_rows(mode: str, softcap: float | None) -> None:
    cols, forced = SPECIAL[mode]
    for dtype in DTYPES:
        case = ByRow(*special_rows(cols, dtype), softcap=softcap)
        case.check(case.run(Device(forced=forced)))


@pytest.mark.parametrize("mode", SPECIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top1_is_that_of_the_logits(mode: str, dtype: torch.dtype) -> None:
    """Also where scale and softcap make different logits equal; with a negative scale the least logit is first."""
    cols, forced = SPECIAL[mode]
    x, y = make_logits(40, cols, dtype, CPU) * 100 + 500, make_target(40, cols, CPU)
    y[::2] = x[::2].argmax(1)
    y[1::4] = x[1::4].argmin(1)
    for options in ({"logit_scale": 1.0}, {"logit_scale": 2.0, "softcap": 1.0}, {"logit_scale": -0.5, "softcap": 1.0}):
        top1 = Device(forced=forced).row_stats(x, y, need_top1=True, **options)[6]
        expected = x.argmax(1) if options["logit_scale"] > 0 else x.argmin(1)
        assert torch.equal(top1 != 0, expected == y)


@pytest.mark.parametrize("mode", ["short", "resident", "streaming", "split"])
def test_entropy_does_not_change_the_rest(mode: str) -> None:
    """The other statistics have the bits that they have alone, and log_prob can be asked for too."""
    rows, cols, _ = MODES[mode]
    case = by_row_case(rows, cols, torch.bfloat16, OPTIONS_BY_ROW[1])
    operands = (case.x, case.y.masked_fill(~case.kept, 0), None, torch.where(case.kept, case.t, 1))
    more = {"need_wsum": True, "need_log_prob": True, **case.scales}
    plain = Device().row_stats(*operands, **more)
    asked = Device().row_stats(*operands, need_entropy=True, need_top1=True, **more)
    for name, one, other in zip(("lse", "lse_low", "picked", "wsum", "log_prob"), plain, asked, strict=False):
        if mode == "short" and name == "wsum":  # a tile of fewer rows sums in the same order
            assert one.shape == other.shape
        assert_same_bits(other, one, name)
    assert_near(plain[4][case.kept], case.log_p[case.kept], case.size[case.kept] + case.log_p[case.kept].abs() + 1)


@pytest.mark.parametrize("mode", SPECIAL)
@pytest.mark.parametrize("softcap", [None, 1e5])
def test_the_target_is_rounded_as_the_other_logits(mode: str, softcap: float | None) -> None:
    """Equal logits far from 0 have equal probabilities, whatever the scales."""
    cols, forced = SPECIAL[mode]
    x, y = torch.full((20, cols), 1e4 + 1 / 3), make_target(20, cols, CPU)
    temperatures = torch.linspace(0.8, 1.3, 20)
    device = Device(forced=forced)
    lse, low, picked, *_ = device.row_stats(x, y, None, temperatures, logit_scale=0.7, softcap=softcap)
    expected = torch.full((20,), -math.log(cols), dtype=torch.float64)
    assert_near(picked - lse - low, expected, expected.abs(), name="log_prob")
