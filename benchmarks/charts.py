"""Draws the charts of the README from benchmarks/results.csv, or prints its figures as Markdown.

    python benchmarks/charts.py [--csv FILE] [--run DATE] [--out docs] [--table]

Uses the last full run, or the last run if none is full; --run picks another by its date.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Page
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from cpu.log_probs import ENTROPY, PLAIN, TOKENS, TRL, VERL
from cpu.methods import (
    COMPILE,
    CONSUME,
    COPIED,
    COPY,
    CUT,
    EAGER,
    EAGER_JEMALLOC,
    EAGER_THP,
    FORWARD,
    JAX,
    LINEAR,
    LOG_PROB,
    NONE,
    OURS,
    OURS_FRESH,
    OURS_JEMALLOC,
    PLAIN_C,
    TORCH_CHUNKED,
    TRAINING,
)
from cpu.records import RESULTS, ROOT, Figure, Run, newest, read
from cpu.targets import (
    CROSS_ENTROPY,
    GRID,
    LARGE_LINEAR_MEMORY,
    LINEAR_LOG_PROBS,
    LINEAR_LOG_PROBS_MEMORY,
    LINEAR_MEMORY,
    LINEAR_SPEED,
    LOG_PROBS,
    LOG_PROBS_MEMORY,
    MEMORY,
    PEAK,
    PREDICTED,
    SCALING_C,
    SCALING_N,
    SCALING_THREADS,
    outcomes,
)

INK, FAINT = "#24292f", "#6e7781"
BLUE, LIGHT_BLUE = "#0969da", "#6cb0f5"  # ours, and ours over the logits
GREY, DARK_GREY = "#a8b1ba", "#6e7781"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#d0d7de",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
WIDTH = 9.0  # inches; at DPI, twice the pixels that a README is wide
DPI = 200
MIB = 2**20


class Results:
    """The figures of one run, by benchmark, case, method and name."""

    def __init__(self, run: Run, figures: list[Figure]) -> None:
        self.run, self.figures = run, figures
        self.by_key = {(f.benchmark, f.shape, f.dtype, f.threads, f.method, f.figure): f for f in figures}

    def of(self, benchmark: str) -> list[Figure]:
        """All figures of one benchmark."""
        return [figure for figure in self.figures if figure.benchmark == benchmark]

    def cases(self, benchmark: str) -> list[tuple[str, str, int]]:
        """The shapes, dtypes and threads of one benchmark."""
        return list(dict.fromkeys((figure.shape, figure.dtype, figure.threads) for figure in self.of(benchmark)))

    def value(self, benchmark: str, case: tuple[str, str, int], method: str, figure: str) -> float:
        """NaN where it was not measured."""
        found = self.by_key.get((benchmark, *case, method, figure))
        return found.value if found else math.nan

    def conditions(self, *more: str) -> str:
        """The small print below a title."""
        run = self.run
        versions = f"torch {run.torch}, npu_xent {run.npu_xent} ({run.commit})"
        where = " · ".join((f"{run.machine}, {run.cores} cores", *more))
        return f"{where}\n{versions} · {run.date[:10]}"


def load(path: Path, date: str | None = None) -> Results:
    """One run of the CSV."""
    runs = read(path)
    run = next((run for run in runs if run.date == date), None) if date else newest(runs)
    if run is None:
        raise SystemExit(f"{path} has no run of {date}, but of: {', '.join(run.date for run in runs)}")
    return Results(run, runs[run])


# Parts of charts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One bar."""

    label: str
    value: float
    text: str
    color: str


def titled(page: Page, title: str, conditions: str) -> None:
    """Adds a title, and the conditions in small print."""
    height = page.get_figheight()
    page.text(0.012, 1 - 0.16 / height, title, fontsize=13.5, fontweight="bold", va="top")
    page.text(0.012, 1 - 0.47 / height, conditions, fontsize=8, color=FAINT, va="top", linespacing=1.4)


def bars(axes: Axes, rows: list[Bar], heading: str, largest: float) -> None:
    """Horizontal bars, each with its label and figure."""
    rows = [row for row in rows if not math.isnan(row.value)]
    places = range(len(rows))
    axes.barh(places, [row.value for row in rows], color=[row.color for row in rows], height=0.72)
    for place, row in zip(places, rows, strict=True):
        ours = row.color in (BLUE, LIGHT_BLUE)
        axes.annotate(
            row.text,
            (row.value, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=BLUE if ours else INK,
            fontweight="bold" if ours else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # over a dashed line
        )
    axes.set_yticks(places, [row.label for row in rows], fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * largest)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(heading, fontsize=10.5, loc="left", color=INK, pad=5)


def dashed(axes: Axes, value: float, label: str, offset: tuple[float, float], end: int, side: str) -> None:
    """Draws a dashed reference line, with its name at its lower (0) or upper (1) end."""
    axes.axvline(value, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side}
    axes.annotate(label, (value, end), offset, fontsize=8, color=FAINT, annotation_clip=False, **place)


def save(page: Page, path: Path) -> Path:
    """Saves a PNG without matplotlib's version in it, so that the file changes only with its figures."""
    page.savefig(path, dpi=DPI, metadata={"Software": None})
    pyplot.close(page)
    return path


# The charts -----------------------------------------------------------------------------------------------------------

SPEED_METHODS = (
    ("F.cross_entropy", EAGER, TRAINING, GREY),
    ("… huge pages", EAGER_THP, TRAINING, GREY),
    ("… jemalloc", EAGER_JEMALLOC, TRAINING, GREY),
    ("torch.compile", COMPILE, TRAINING, GREY),
    ("JAX", JAX, TRAINING, GREY),
    ("C and OpenMP", PLAIN_C, TRAINING, GREY),
    ("npu_xent", OURS, TRAINING, BLUE),
    ("… fresh pages", OURS_FRESH, TRAINING, LIGHT_BLUE),
    ("… jemalloc", OURS_JEMALLOC, TRAINING, LIGHT_BLUE),
    ("… consume_logits", OURS, CONSUME, LIGHT_BLUE),
)


LOG_PROBS_METHODS = (
    ("log_softmax", PLAIN, ENTROPY, GREY),
    ("torch.compile", COMPILE, ENTROPY, GREY),
    ("TRL", TRL, ENTROPY, GREY),
    ("verl", VERL, ENTROPY, GREY),
    ("npu_xent", OURS, ENTROPY, BLUE),
    ("… consume_logits", OURS, CONSUME, LIGHT_BLUE),
    ("… log-probs alone", OURS, TOKENS, LIGHT_BLUE),
    ("… reduction none", OURS, NONE, LIGHT_BLUE),
)


def speed(results: Results, path: Path) -> Path:
    """The time of a training step, per shape and dtype."""
    return times(results, path, CROSS_ENTROPY, SPEED_METHODS, "Time of a training step: forward and backward, mean")


def log_probs(results: Results, path: Path) -> Path:
    """The time and memory of log-probabilities and entropy, per shape and dtype."""
    title = "Log-probabilities and entropy: time and peak memory of a training step"
    return times(results, path, LOG_PROBS, LOG_PROBS_METHODS, title)


def times(
    results: Results, path: Path, benchmark: str, methods: tuple[tuple[str, str, str, str], ...], title: str
) -> Path:
    """Times per shape and dtype, compared with the first method's."""
    cases = results.cases(benchmark)
    shapes = list(dict.fromkeys(shape for shape, _, _ in cases))
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in cases))
    height = 1.15 + 2.1 * len(shapes) * len(methods) / 6
    page, grid = pyplot.subplots(len(shapes), len(dtypes), figsize=(WIDTH, height), squeeze=False)
    for case in cases:
        axes = grid[shapes.index(case[0]), dtypes.index(case[1])]
        eager = results.value(benchmark, case, *methods[0][1:3])
        rows = []
        for label, method, figure, color in methods:
            time = results.value(benchmark, case, method, figure)
            peak = bytes_text(results.value(LOG_PROBS_MEMORY, case, method, f"{figure}: {PEAK}"))
            text = f"{milliseconds(time)}, {peak}" if benchmark == LOG_PROBS else speed_text(time, eager)
            rows.append(Bar(label, time, text, color))
        bars(
            axes, rows, f"{case[0]}  {case[1]}", 1.35 * max_of(rows) if benchmark == LOG_PROBS else 1.25 * max_of(rows)
        )
        copied = results.value(benchmark, case, COPY, COPIED)
        if not math.isnan(copied):
            dashed(axes, copied, "copy_ of the logits", (0, -9), 0, "center")
    titled(
        page,
        title,
        results.conditions(f"{cases[0][2]} threads", f"medians of {rounds(results, benchmark)} interleaved rounds"),
    )
    margins = {"left": 0.145, "right": 0.985, "top": 1 - 1.12 / height, "bottom": 0.24 / height}
    page.subplots_adjust(**margins, wspace=0.4, hspace=3 / len(methods))
    return save(page, path)


def grid(results: Results, path: Path) -> Path:
    """Heat maps of the time as a ratio to F.cross_entropy's: rows and classes, and images."""
    cases = results.cases(GRID)
    shapes = list(dict.fromkeys(tuple(sizes(shape)) for shape, _, _ in cases))
    matrices, images = [s for s in shapes if len(s) == 2], [s for s in shapes if len(s) > 2]
    rows, classes = (sorted({shape[i] for shape in matrices}) for i in range(2))
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in cases))
    kinds = [(dtype, figure) for dtype in dtypes for figure in (TRAINING, FORWARD)]
    threads = cases[0][2]

    def ratio(shape: tuple[int, ...], kind: tuple[str, str]) -> float:
        case = (" x ".join(map(str, shape)), kind[0], threads)
        return results.value(GRID, case, OURS, kind[1]) / results.value(GRID, case, EAGER, kind[1])

    height = 1.3 + 2.75 * len(dtypes) + 0.3 * len(images)
    page = pyplot.figure(figsize=(WIDTH, height))
    top, size = 1 - 1.15 / height, 2.0 / height
    for i, kind in enumerate(kinds):
        axes = page.add_axes((0.075 + 0.49 * (i % 2), top - size - 2.75 / height * (i // 2), 0.42, size))
        tiles = [[ratio((n, c), kind) if (n, c) in matrices else math.nan for c in classes] for n in rows]
        heat(axes, tiles, classes, rows)
        axes.set_title(f"{kind[1]}, {kind[0]}", fontsize=10.5, loc="left")
        axes.set_xlabel("classes C", fontsize=9)
        if i % 2 == 0:
            axes.set_ylabel("rows N", fontsize=9)
    if images:
        axes = page.add_axes((0.2, 0.5 / height, 0.6, 0.3 * len(images) / height))
        heat(axes, [[ratio(shape, kind) for kind in kinds] for shape in images], [", ".join(k) for k in kinds], images)
        axes.tick_params(axis="x", labelsize=7)
    how = f"{threads} threads" if threads > 1 else "1 thread"
    title = "Time of npu_xent / time of F.cross_entropy: below 1 is faster"
    titled(page, title, results.conditions(how, f"medians of {rounds(results, GRID)} interleaved rounds"))
    return save(page, path)


def heat(axes: Axes, tiles: list[list[float]], across: Sequence[object], down: Sequence[object]) -> None:
    """A heat map with its figures; white is 1, blue faster, red slower."""
    values = [[math.log2(tile) for tile in row] for row in tiles]
    axes.imshow(values, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            if not math.isnan(tile):
                ink = "white" if abs(math.log2(tile)) > 2 else INK
                axes.annotate(f"{tile:.2f}", (x, y), ha="center", va="center", fontsize=7.5, color=ink)
    names = [
        [count_text(n) if isinstance(n, int) else str(list(n)) if isinstance(n, tuple) else str(n) for n in of]
        for of in (across, down)
    ]
    axes.set_xticks(range(len(across)), names[0], fontsize=8.5)
    axes.set_yticks(range(len(down)), names[1], fontsize=8.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def speed_text(time: float, eager: float) -> str:
    """The time in milliseconds, and the speedup over eager."""
    if math.isnan(time):
        return ""
    faster = "" if time == eager else f"  ({eager / time:.1f}x faster)"
    return f"{milliseconds(time)}{faster}"


def milliseconds(time: float) -> str:
    """Three digits, or more from a second on."""
    return f"{1000 * time:.0f} ms" if time >= 0.1 else f"{1000 * time:.3g} ms"


def max_of(rows: list[Bar]) -> float:
    """The largest measured value."""
    return max((row.value for row in rows if not math.isnan(row.value)), default=1.0)


def rounds(results: Results, benchmark: str) -> int:
    """The number of rounds of a benchmark."""
    return max((figure.n_runs for figure in results.of(benchmark)), default=0)


MEMORY_METHODS = (
    ("F.cross_entropy", EAGER, TRAINING, GREY),
    ("torch.compile", COMPILE, TRAINING, GREY),
    ("npu_xent", OURS, TRAINING, BLUE),
    ("… reduction none", OURS, NONE, BLUE),
    ("… with log_prob", OURS, LOG_PROB, BLUE),
    ("… consume_logits", OURS, CONSUME, LIGHT_BLUE),
    ("… no gradient", OURS, FORWARD, LIGHT_BLUE),
)
LINEAR_METHODS = (
    ("F.linear +\nF.cross_entropy", LINEAR, TRAINING, GREY),
    ("F.linear_cross_\nentropy, chunked", TORCH_CHUNKED, TRAINING, GREY),
    ("cut-cross-entropy\n(torch_compile)", CUT, TRAINING, GREY),
    ("npu_xent.linear_\ncross_entropy", OURS, TRAINING, BLUE),
)


def memory(results: Results, path: Path) -> Path:
    """Peak memory beyond the inputs, of the losses that take logits and of those with a linear layer."""
    case = largest(results, MEMORY)
    linear_name = LARGE_LINEAR_MEMORY if results.of(LARGE_LINEAR_MEMORY) else LINEAR_MEMORY
    linear_case = largest(results, linear_name)
    height = 3.95
    page, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, height))
    for axes, benchmark, of, methods, heading in (
        (left, MEMORY, case, MEMORY_METHODS, "Loss of logits, {} x {}, {}"),
        (right, linear_name, linear_case, LINEAR_METHODS, "Linear layer and loss, {} x {} x {}, {}"),
    ):
        rows = []
        for label, method, figure, color in methods:
            value = results.value(benchmark, of, method, f"{figure}: {PEAK}")
            rows.append(Bar(label, value, bytes_text(value), color))
        bars(axes, rows, "", max_of(rows))
        marks = references(benchmark, of)
        for value, label in marks:
            side = "left" if value == max(marks)[0] else "right"  # so that labels do not overlap
            dashed(axes, value, label, (3 if side == "left" else -3, 2), 1, side)
        edge = 0.012 if axes is left else 0.525
        page.text(edge, 1 - 0.95 / height, heading.format(*sizes(of[0]), of[1]), fontsize=10.5, va="top")
    how = "training steps unless it says otherwise"
    titled(page, "Peak memory of a call, beyond its inputs", results.conditions(how))
    page.subplots_adjust(left=0.145, right=0.985, top=1 - 1.4 / height, bottom=0.08 / height, wspace=0.5)
    return save(page, path)


def references(benchmark: str, case: tuple[str, str, int]) -> list[tuple[float, str]]:
    """The reference lines for a peak: size and name."""
    rows, *features, classes = (int(size) for size in case[0].split(" x "))
    size = {"float32": 4, "bfloat16": 2}[case[1]]
    logits = rows * classes * size
    if benchmark == MEMORY:
        return [(logits, "size of the logits")]
    return [(logits, "size of the logits"), (classes * features[0] * size, "weight gradient")]


def largest(results: Results, benchmark: str) -> tuple[str, str, int]:
    """The case with the most classes, in float32."""
    return max(
        (case for case in results.cases(benchmark) if case[1] == "float32"), key=lambda case: math.prod(sizes(case[0]))
    )


def sizes(shape: str) -> list[int]:
    """The sizes in "4096 x 8080"."""
    return [int(size) for size in shape.split(" x ")]


def bytes_text(value: float) -> str:
    """Bytes as MiB or GiB."""
    if math.isnan(value):
        return ""
    if value >= 1024 * MIB:
        return f"{value / 1024 / MIB:.2f} GiB"
    return f"{value / MIB:.0f} MiB" if value >= MIB else "< 1 MiB"


SCALING_METHODS = (
    ("F.cross_entropy", EAGER, TRAINING, GREY, "o"),
    ("torch.compile", COMPILE, TRAINING, DARK_GREY, "s"),
    ("npu_xent", OURS, TRAINING, BLUE, "o"),
    ("consume_logits", OURS, CONSUME, LIGHT_BLUE, "o"),
)


def scaling(results: Results, path: Path) -> Path:
    """Time per element against the number of classes, rows and threads."""
    height = 3.7
    page, grid = pyplot.subplots(1, 3, figsize=(WIDTH, height), sharey=True, width_ratios=(1, 1, 0.8))
    panels: list[tuple[str, str, Callable[[tuple[str, str, int]], int]]] = [
        (SCALING_C, "classes C", lambda case: sizes(case[0])[1]),
        (SCALING_N, "rows N", lambda case: sizes(case[0])[0]),
        (SCALING_THREADS, "threads", lambda case: case[2]),
    ]
    for axes, (benchmark, label, position) in zip(grid, panels, strict=True):
        cases = results.cases(benchmark)
        ends = []
        for name, method, figure, color, marker in SCALING_METHODS:
            points = [
                (position(case), 1e9 * results.value(benchmark, case, method, figure) / math.prod(sizes(case[0])))
                for case in cases
            ]
            points = [point for point in points if not math.isnan(point[1])]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.8)
                ends.append((points[-1], name, color if method == OURS else FAINT))
        axes.set_xscale("log", base=2 if benchmark == SCALING_THREADS else 10)
        axes.set_yscale("log")
        places = [position(case) for case in cases]
        axes.set_xticks(places, [count_text(place) for place in places], fontsize=9)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color="#eaeef2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, which="both")
        axes.set_xlabel(label)
        axes.set_title(held(benchmark, cases), fontsize=10.5, loc="left")
        if axes is grid[-1]:
            label_ends(axes, ends)
    grid[0].set_ylabel("nanoseconds an element")
    case = results.cases(SCALING_C)[0]
    titled(
        page,
        "Time of a training step for each logit, nanoseconds",
        results.conditions(f"{case[1]}", f"{case[2]} threads unless it says otherwise"),
    )
    page.subplots_adjust(left=0.075, right=0.87, top=1 - 1.1 / height, bottom=0.55 / height, wspace=0.1)
    return save(page, path)


def held(benchmark: str, cases: list[tuple[str, str, int]]) -> str:
    """The fixed sizes of a panel."""
    rows, classes = sizes(cases[0][0])
    return {
        SCALING_C: f"N = {rows:,}",
        SCALING_N: f"C = {classes:,}",
        SCALING_THREADS: f"{rows:,} x {classes:,}",
    }[benchmark]


def count_text(count: int) -> str:
    """64000 as 64k."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def label_ends(axes: Axes, ends: list[tuple[tuple[float, float], str, str]]) -> None:
    """Puts each line's name at its right end, without overlaps."""
    ends = sorted(ends, key=lambda end: end[0][1])
    bottom, top = axes.get_ylim()
    apart = (top / bottom) ** 0.075
    least = 0.0
    for (x, y), name, color in ends:
        at = max(y, least)
        axes.annotate(
            name,
            (x, at),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
        )
        least = at * apart


# --------------------------------------------------------------------------------------------------------------------

CHARTS = {
    "bench_speed.png": (speed, CROSS_ENTROPY),
    "bench_grid.png": (grid, GRID),
    "bench_memory.png": (memory, MEMORY),
    "bench_scaling.png": (scaling, SCALING_C),
    "bench_log_probs.png": (log_probs, LOG_PROBS),
}


def draw_all(path: Path = RESULTS, out: Path = ROOT / "docs", date: str | None = None) -> list[Path]:
    """Draws the charts that the run has figures for."""
    results = load(path, date)
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        return [draw(results, out / name) for name, (draw, needed) in CHARTS.items() if results.of(needed)]


def table(results: Results) -> str:
    """Markdown: times in milliseconds and ratios, memory, targets."""
    lines = [
        results.conditions().replace("\n", " · "),
        "",
        "| shape | dtype | " + " | ".join(label for label, *_ in TIMES) + " |",
    ]
    lines.append("|---" * (2 + len(TIMES)) + "|")
    for case in results.cases(CROSS_ENTROPY):
        copied = results.value(CROSS_ENTROPY, case, COPY, COPIED)
        cells = []
        for _, method, figure in TIMES:
            time = results.value(CROSS_ENTROPY, case, method, figure)
            cells.append("-" if math.isnan(time) else f"{1000 * time:.1f} ms ({time / copied:.2f})")
        lines.append(f"| {case[0]} | {case[1]} | " + " | ".join(cells) + " |")
    lines += ["", "Medians; in brackets, in units of `out.copy_(logits)`.", ""]
    for benchmark, unit in ((LINEAR_SPEED, TRAINING), (LOG_PROBS, ENTROPY), (LINEAR_LOG_PROBS, ENTROPY)):
        lines += [f"| {benchmark} | shape | dtype | time | of npu_xent's {unit} |", "|---|---|---|---|---|"]
        for figure in results.of(benchmark):
            ours = results.value(benchmark, (figure.shape, figure.dtype, figure.threads), OURS, unit)
            time = "-" if math.isnan(figure.value) else f"{1000 * figure.value:.1f} ms"
            cells = (f"{figure.method}, {figure.figure}", figure.shape, figure.dtype, time)
            lines.append("| " + " | ".join(cells) + f" | {figure.value / ours:.2f} |")
        lines.append("")
    for benchmark in MEMORIES:
        lines += [
            f"| {benchmark}: peak beyond the inputs | shape | dtype | measured | predicted |",
            "|---|---|---|---|---|",
        ]
        for figure in results.of(benchmark):
            what, _, kind = figure.figure.partition(": ")
            if kind == PEAK:
                case = (figure.shape, figure.dtype, figure.threads)
                predicted = bytes_text(results.value(benchmark, case, figure.method, f"{what}: {PREDICTED}")) or "-"
                cells = (f"{figure.method}, {what}", *case[:2], bytes_text(figure.value), predicted)
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| target | shape | dtype | figure | should be | |", "|---|---|---|---|---|---|"]
    for line in outcomes(results.figures):
        value = "-" if line.value is None else f"{line.value:.3g}"
        cells = (line.target.name, line.shape, line.dtype, value, line.target.says(line.dtype), line.verdict)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


MEMORIES = (MEMORY, LINEAR_MEMORY, LARGE_LINEAR_MEMORY, LOG_PROBS_MEMORY, LINEAR_LOG_PROBS_MEMORY)
TIMES = (
    ("F.cross_entropy", EAGER, TRAINING),
    ("torch.compile", COMPILE, TRAINING),
    ("npu_xent", OURS, TRAINING),
    ("consume_logits", OURS, CONSUME),
    ("reduction none", OURS, NONE),
    ("with log_prob", OURS, LOG_PROB),
    ("forward alone", OURS, FORWARD),
)


def main() -> None:
    """Draws the charts or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--run", help="the date of a run, as in the CSV")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--table", action="store_true", help="print the figures as Markdown instead of drawing")
    options = parser.parse_args()
    if options.table:
        print(table(load(options.csv, options.run)))
        return
    for path in draw_all(options.csv, options.out, options.run):
        print(path)


if __name__ == "__main__":
    main()
