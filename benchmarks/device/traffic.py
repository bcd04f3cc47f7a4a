"""GM traffic, busiest pipe and simulated time of the training sweep, beside a plain operator of three sweeps.

Both run on cann_sim: bytes are counted, times are a cost model's and no NPU was used. The training sweep makes the
gradient in the forward pass (row_stats_grad, or the launches of a split row); the plain operator is three_sweeps.cpp,
forward and backward. What both leave out: the sum of the row losses, and the dispatch of a launch.

    python benchmarks/device/traffic.py [--full] [--csv FILE] [--timeline PNG]
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import cann_sim

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import kernels  # noqa: E402 - beside this file

SHAPES = ((4096, 8080), (4096, 32000), (2048, 128256), (8, 151936), (65536, 64))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CORES = 48
SCALES = (0.5, 1.0, 2.0)  # of the GM bandwidth
SMALL = 5_000_000  # elements of a shape that is run with all its rows in any case
BUDGET = 16_000_000  # elements of a larger shape to run, about
MOST_ROWS, LEAST_ROWS = 20, 2  # of a core, unless asked for otherwise


class ThreeSweepsArgs(ctypes.Structure):
    """The struct of that name in three_sweeps.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("is_bf16", "rows", "cols")),
        *((name, ctypes.c_float) for name in ("grad_scale", "reserved")),
    )


@functools.cache
def three_sweeps_library() -> cann_sim.KernelLibrary:
    """The plain operator, built by the toolkit's compiler."""
    return cann_sim.compile(HERE / "three_sweeps.cpp")


@dataclass(frozen=True)
class Launches:
    """What the launches of one training step report together."""

    reports: Sequence[cann_sim.Report]
    elements: int
    element_size: int

    @property
    def time_ns(self) -> float:
        """Simulated time on the cores, one launch after the other."""
        return sum(report.time_ns for report in self.reports)

    @property
    def reads(self) -> float:
        """GM bytes read, per byte of the logits."""
        return sum(report.read_bytes for report in self.reports) / (self.elements * self.element_size)

    @property
    def writes(self) -> float:
        """GM bytes written, per byte of the logits."""
        return sum(report.written_bytes for report in self.reports) / (self.elements * self.element_size)

    @property
    def busiest(self) -> tuple[str, float]:
        """The pipe that is busy the longest, and its share of the time on the cores that have work."""
        busy = {
            pipe: sum(report.busy_share()[pipe] * report.time_ns for report in self.reports) / self.time_ns
            for pipe in self.reports[0].busy_share()
        }
        return max(busy.items(), key=lambda item: item[1])


def full_plan(shape: tuple[int, int], dtype: torch.dtype) -> kernels.Plan:
    """The plan for the whole shape: fewer rows, run for a shorter time, are to be cut as all of them are."""
    return kernels.Device().plan(torch.empty(shape, dtype=dtype, device="meta"))


def inputs(rows: int, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, cols, dtype=dtype, generator=generator)
    return logits, torch.randint(cols, (rows,), generator=generator)


def training_sweep(
    logits: torch.Tensor, target: torch.Tensor, config: cann_sim.Config, plan: kernels.Plan | None = None
) -> tuple[Launches, torch.Tensor]:
    """npu_xent's statistics and gradient, reduction mean: the reports and the gradient."""
    rows, cols = logits.shape
    forced = {} if plan is None else {name: getattr(plan, name) for name, _ in kernels.Plan._fields_}
    device = kernels.Device(cores=CORES, config=config, forced=forced)
    totals = torch.tensor([rows, rows, cols], dtype=torch.float32)
    grad = device.row_stats_grad(logits, target, None, totals)[-1]
    return Launches(device.reports, logits.numel(), logits.element_size()), grad


def three_sweeps(
    logits: torch.Tensor, target: torch.Tensor, config: cann_sim.Config
) -> tuple[Launches, torch.Tensor, torch.Tensor]:
    """The plain operator, reduction mean: the reports, the loss of each row and the gradient."""
    rows, cols = logits.shape
    args = ThreeSweepsArgs(is_bf16=logits.dtype == torch.bfloat16, rows=rows, cols=cols, grad_scale=1 / rows)
    log_prob, loss, grad = torch.empty_like(logits), torch.empty(rows), torch.empty_like(logits)
    launch = functools.partial(three_sweeps_library().launch, config=config)
    uninit = cann_sim.Uninit
    reports = [
        launch("three_sweeps_forward", min(CORES, rows), logits, target, uninit(log_prob), uninit(loss), args),
        launch("three_sweeps_backward", min(CORES, rows), log_prob, target, uninit(grad), args),
    ]
    return Launches(reports, logits.numel(), logits.element_size()), loss, grad


@dataclass(frozen=True)
class Measurement:
    """Both operators on one shape, at each of SCALES."""

    shape: tuple[int, int]
    rows: int  # of them that were run
    dtype: str
    mode: str
    ours: Sequence[Launches]
    plain: Sequence[Launches]

    @property
    def ratios(self) -> list[float]:
        """How many times as long the plain operator takes."""
        return [plain.time_ns / ours.time_ns for ours, plain in zip(self.ours, self.plain, strict=True)]


def measure(shape: tuple[int, int], rows: int, dtype: str, scales: Iterable[float] = SCALES) -> Measurement:
    """Runs both operators on `rows` of the rows."""
    logits, target = inputs(rows, shape[1], DTYPES[dtype])
    plan = full_plan(shape, DTYPES[dtype])
    ours, plain = [], []
    for scale in scales:
        config = cann_sim.Config(check=False, bandwidth_scale=scale)
        ours.append(training_sweep(logits, target, config, plan)[0])
        plain.append(three_sweeps(logits, target, config)[0])
    return Measurement(shape, rows, dtype, kernels.RowMode(plan.mode).name, ours, plain)


def rows_to_run(shape: tuple[int, int], rows_per_core: int | None = None) -> int:
    """All rows of a small shape, else the same number for each core; by default what takes a few seconds."""
    rows, cols = shape
    if rows * cols <= SMALL:
        return rows
    default = max(LEAST_ROWS, min(MOST_ROWS, BUDGET // (CORES * cols)))
    return min(rows, CORES * (rows_per_core or default))


# ---- what is printed ----


def _pipes(launches: Sequence[Launches]) -> str:
    """The pipe's name once if it is always the same."""
    busiest = [launch.busiest for launch in launches]
    if len({pipe for pipe, _ in busiest}) == 1:
        return f"{busiest[0][0]} " + " / ".join(f"{share:.0%}" for _, share in busiest)
    return " / ".join(f"{pipe} {share:.0%}" for pipe, share in busiest)


def _side(launches: Sequence[Launches]) -> list[str]:
    nominal = launches[SCALES.index(1.0)]
    return [
        f"{nominal.reads:.2f} + {nominal.writes:.2f}",
        f"{len(nominal.reports)}",
        _pipes(launches),
        " / ".join(f"{launch.time_ns / 1e3:.1f}" for launch in launches),
    ]


def markdown(measurements: Sequence[Measurement]) -> str:
    """The table, with what a reader has to know below it."""
    scales = " / ".join(f"{scale:g}" for scale in SCALES)
    side = ("reads + writes", "launches", f"busiest pipe at {scales}", f"us at {scales}")
    head = ["shape", "rows run", "dtype", "row mode", *side]
    head += [f"three sweeps: {side[0]}", *side[1:], f"times as long, at {scales}"]
    lines = [
        [
            f"({m.shape[0]}, {m.shape[1]})", "all" if m.rows == m.shape[0] else f"{m.rows}", m.dtype, m.mode,
            *_side(m.ours), *_side(m.plain), " / ".join(f"{ratio:.2f}" for ratio in m.ratios),
        ]
        for m in measurements
    ]  # fmt: skip
    text = [_line(head), _line("---" for _ in head), *map(_line, lines), ""]
    text += [
        f"**Simulated** by cann_sim, {CORES} cores, at {scales} times the nominal GM bandwidth; nothing here was run on"
        " an NPU.",
        "Reads and writes are measured GM bytes per byte of the logits; targets and statistics of rows are among them.",
        "Busy shares are those of the cores that have work; times are those on the cores, without the dispatch of a"
        " launch (some 6.5 us).",
        "Each read is charged in full, though on a device L2 may serve a part of those that come again.",
        "The three sweeps use single buffers and take rows one at a time, which is what short rows cost them most; with"
        " fewer rows than cores some of their cores idle.",
    ]
    if any(m.rows != m.shape[0] for m in measurements):
        text.append(
            f"Where the rows run are not all, they are the same number for each of {CORES} cores, all columns, cut as"
            " the whole shape is: start and end of a launch weigh more than with all rows. --full runs all."
        )
    return "\n".join(text)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_csv(path: Path, measurements: Sequence[Measurement]) -> None:
    """A line for each operator, shape, dtype and bandwidth."""
    fields = (
        *("source", "operator", "rows", "cols", "rows_run", "dtype", "row_mode", "cores", "bandwidth_scale"),
        *("launches", "reads_per_element", "writes_per_element", "busiest_pipe", "busy_share", "time_us"),
    )
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for m in measurements:
            for operator, mode, side in (("npu_xent", m.mode, m.ours), ("three_sweeps", "", m.plain)):
                for scale, launches in zip(SCALES, side, strict=True):
                    pipe, share = launches.busiest
                    case = ("cann_sim", operator, *m.shape, m.rows, m.dtype, mode, CORES, scale)
                    numbers = (f"{x:.5f}" for x in (launches.reads, launches.writes))
                    writer.writerow(
                        [*case, len(launches.reports), *numbers, pipe, f"{share:.4f}", f"{launches.time_ns / 1e3:.3f}"]
                    )


def draw_timeline(path: Path) -> None:
    """Two rows out of the middle of what core 0 does for (4096, 32000) in bf16."""
    shape, rows_per_core = (4096, 32000), 6
    logits, target = inputs(CORES * rows_per_core, shape[1], torch.bfloat16)
    config = cann_sim.Config(check=False, trace_core=0)
    (report,) = training_sweep(logits, target, config, full_plan(shape, torch.bfloat16))[0].reports
    row_ns = report.time_ns / rows_per_core
    report.timeline(path, start_ns=2 * row_ns, end_ns=4 * row_ns)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all rows of every shape (minutes)")
    parser.add_argument(
        "--rows-per-core", type=int, metavar="N", help="rows of larger shapes (by default what fits into a minute)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--timeline", type=Path, metavar="PNG", help="also draw a core's pipes, (4096, 32000) bf16")
    options = parser.parse_args()
    if options.rows_per_core is not None and options.rows_per_core < 1:
        parser.error(f"--rows-per-core must be at least 1, not {options.rows_per_core}")
    measurements = []
    for shape in SHAPES:
        rows = shape[0] if options.full else rows_to_run(shape, options.rows_per_core)
        for dtype in DTYPES:
            print(f"simulating {rows} of {shape} {dtype}", file=sys.stderr)
            measurements.append(measure(shape, rows, dtype))
    print(markdown(measurements))
    if options.csv:
        write_csv(options.csv, measurements)
    if options.timeline:
        draw_timeline(options.timeline)


if __name__ == "__main__":
    main()
