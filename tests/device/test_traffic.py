"""What the kernels move and how busy they keep a core, counted and simulated by cann_sim.

The three sweeps that they are compared with are checked here too: a comparison with something wrong shows nothing.
"""

from __future__ import annotations

import kernels
import pytest
import torch
import traffic

import cann_sim

pytestmark = pytest.mark.cpu

FAST = cann_sim.Config(check=False)
# Shapes of each row mode, of so many columns that what comes once a row does not count.
ROWS = {
    kernels.RowMode.short: (480, 1000),
    kernels.RowMode.resident: (96, 8080),
    kernels.RowMode.streaming: (48, 128256),
    kernels.RowMode.split: (8, 151936),
}
FITS = (kernels.RowMode.short, kernels.RowMode.resident)
ONCE = pytest.approx(1, abs=0.03)
TWICE = pytest.approx(2, abs=0.03)
NEVER = pytest.approx(0, abs=0.03)
HALF = pytest.approx(0.5, abs=0.02)

modes = pytest.mark.parametrize("mode", ROWS, ids=["short", "resident", "streaming", "split"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class Case:
    """Logits of a row mode, and the primitives on them with their traffic as (reads, writes) an element."""

    def __init__(self, mode: int, dtype: torch.dtype, ignored: slice | None = None) -> None:
        self.logits, self.target = traffic.inputs(*ROWS[mode], dtype)
        if ignored is not None:
            self.target[ignored] = -100
        assert kernels.Device().plan(self.logits).mode == mode
        self.device = kernels.Device(config=FAST)
        rows, cols = self.logits.shape
        self.totals = torch.tensor([rows, rows, cols], dtype=torch.float32)

    def launches(self) -> traffic.Launches:
        return traffic.Launches(self.device.reports, self.logits.numel(), self.logits.element_size())

    def _moved(self) -> tuple[float, float]:
        launches = self.launches()
        return launches.reads, launches.writes

    def row_stats(self, *operands: torch.Tensor, **wanted: bool) -> tuple[float, float]:
        self.device.row_stats(self.logits, self.target, None, *operands, **wanted)
        return self._moved()

    def row_grad(self, *by_row: torch.Tensor | None) -> tuple[float, float]:
        """by_row: temperatures, the entropy, its gradient."""
        lse = torch.logsumexp(self.logits.float(), 1)
        upstream = torch.ones_like(lse)
        operands = (lse, torch.zeros_like(lse), self.totals, upstream, None)
        self.device.row_grad(self.logits, self.target, None, *operands, *by_row, reduction="none")
        return self._moved()

    def row_stats_grad(self) -> tuple[float, float]:
        self.device.row_stats_grad(self.logits, self.target, None, self.totals)
        return self._moved()


# ---- traffic ----


@modes
@dtypes
def test_statistics_read_once(mode: int, dtype: torch.dtype) -> None:
    assert Case(mode, dtype).row_stats() == (ONCE, NEVER)


@modes
@dtypes
def test_log_prob_reads_a_second_time_only_rows_that_do_not_stay(mode: int, dtype: torch.dtype) -> None:
    assert Case(mode, dtype).row_stats(need_log_prob=True) == (ONCE if mode in FITS else TWICE, ONCE)


@modes
@dtypes
def test_gradient_reads_once_and_writes_once(mode: int, dtype: torch.dtype) -> None:
    assert Case(mode, dtype).row_grad() == (ONCE, ONCE)


@modes
@dtypes
@pytest.mark.parametrize("scaled", [False, True], ids=["", "temperatures"])
def test_entropy_and_top1_move_nothing_more(
    scaled: bool, mode: int, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    """One read a row forward, one read and one write backward; and what they cost in simulated time."""
    rows = ROWS[mode][0]
    temperatures = (torch.rand(rows) + 0.5,) if scaled else (None,)
    by_row = (*temperatures, torch.ones(rows), torch.ones(rows))
    plain, entropy, both = (Case(mode, dtype) for _ in range(3))
    assert plain.row_stats() == (ONCE, NEVER)
    assert entropy.row_stats(*temperatures, need_entropy=True) == (ONCE, NEVER)
    assert both.row_stats(*temperatures, need_entropy=True, need_top1=True) == (ONCE, NEVER)
    backward, tilted = Case(mode, dtype), Case(mode, dtype)
    assert backward.row_grad() == (ONCE, ONCE)
    assert tilted.row_grad(*by_row) == (ONCE, ONCE)
    cells = []
    for case in (plain, entropy, both, backward, tilted):
        launches = case.launches()
        pipe, share = launches.busiest
        assert pipe != "S"
        cells.append(f"{launches.time_ns / 1000:.1f} us {pipe} {share:.0%}")
    with capsys.disabled():
        print(f"\n{rows} x {ROWS[mode][1]}: forward {', with entropy '.join(cells[:2])}, and top1 {cells[2]};", end=" ")
        print(f"backward {cells[3]}, with entropy {cells[4]}", end=" ")


@modes
@dtypes
def test_training_sweep_reads_a_second_time_only_rows_that_do_not_stay(mode: int, dtype: torch.dtype) -> None:
    assert Case(mode, dtype).row_stats_grad() == (ONCE if mode in FITS else TWICE, ONCE)


@modes
def test_ignored_rows_are_not_read(mode: int) -> None:
    every_second = slice(None, None, 2)
    assert Case(mode, torch.bfloat16, every_second).row_stats() == (HALF, NEVER)
    assert Case(mode, torch.bfloat16, every_second).row_grad() == (HALF, ONCE)
    assert Case(mode, torch.bfloat16, every_second).row_stats_grad() == (HALF if mode in FITS else ONCE, ONCE)


@modes
def test_ignored_rows_alone_cost_the_zeros_of_their_gradient(mode: int) -> None:
    assert Case(mode, torch.float32, slice(None)).row_stats() == (NEVER, NEVER)
    assert Case(mode, torch.float32, slice(None)).row_stats_grad() == (NEVER, ONCE)


# ---- simulated time ----


@pytest.mark.parametrize("scale", traffic.SCALES)
def test_the_training_sweep_keeps_its_busiest_pipe_busy(scale: float) -> None:
    """At (4096, 32000) in bf16, on 480 of the rows."""
    logits, target = traffic.inputs(10 * traffic.CORES, 32000, torch.bfloat16)
    config = cann_sim.Config(check=False, bandwidth_scale=scale)
    launches, _ = traffic.training_sweep(logits, target, config)
    pipe, share = launches.busiest
    assert pipe != "S"  # it waits, and is busy with nothing that has to be done
    assert share >= 0.85, launches.reports[0].table()


@pytest.mark.parametrize("dtype", traffic.DTYPES)
@pytest.mark.parametrize("shape", traffic.SHAPES, ids=str)
def test_the_training_sweep_is_faster_than_three_sweeps(shape: tuple[int, int], dtype: str) -> None:
    most = 16 * traffic.CORES if shape[1] < 1000 else traffic.CORES
    measured = traffic.measure(shape, min(shape[0], most), dtype)
    assert min(measured.ratios) > 1, traffic.markdown([measured])
    for launches in measured.plain:
        # The targets, 8 bytes a row, weigh on rows of 64 columns.
        assert (launches.reads, launches.writes) == (pytest.approx(4, abs=0.15), pytest.approx(2, abs=0.05))


# ---- what they are compared with ----


@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 1), (50, 21), (300, 7), (97, 64), (3, 4096), (5, 4097), (49, 9001)], ids=lambda shape: f"{shape}"
)
def test_three_sweeps_are_correct(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """With all checks of the simulator."""
    logits, target = traffic.inputs(*shape, dtype)
    logits *= 3
    _, row_losses, grad = traffic.three_sweeps(logits, target, cann_sim.Config())
    exact = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, target)
    loss.backward()
    torch.testing.assert_close(row_losses.double().mean(), loss.detach(), rtol=1e-5, atol=1e-6)
    # log_prob is rounded to the dtype before its exponential is taken: an error relative to its size.
    error = (grad.double() - exact.grad).abs() * shape[0]
    epsilon = torch.finfo(dtype).eps
    softmax = exact.detach().softmax(1)
    allowed = epsilon * (1 + softmax.log().abs()) * softmax + epsilon * softmax + 4 * torch.finfo(torch.float32).eps
    assert (error <= allowed + epsilon * (exact.grad * shape[0]).abs()).all()


def test_three_sweeps_take_more_rows_than_they_hold_targets() -> None:
    logits, target = traffic.inputs(traffic.CORES * 257, 3, torch.float32)
    _, row_losses, grad = traffic.three_sweeps(logits, target, cann_sim.Config())
    exact = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(exact, target).backward()
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(row_losses, expected)
    torch.testing.assert_close(grad, exact.grad)
