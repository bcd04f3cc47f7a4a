"""Time and memory of a training step, compared with PyTorch and the vendor. Only an absurdly slow step is a failure.

Candidates take turns, so that other load on the machine affects all of them; a ratio is the median of the ratios of the
rounds, and may differ from the ratio of the median times. Times are wall-clock times from idle device to idle device,
and include launches. Memory is a step's peak beyond its inputs, as the allocator counts it:
torch.npu.max_memory_allocated on an NPU, and on the CPU the running sum of the allocations and releases that
torch.profiler records.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import npu_xent

from .cases import SHORT_NAMES
from .environment import first_line, npu
from .report import Failure, Report, Result, Task

SECTION = "time and memory"
SHAPES = {
    "cpu": ((256, 8080), (1024, 8080), (1024, 32000)),
    "npu": ((512, 8080), (4096, 8080), (4096, 32000), (2048, 128256)),
}
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, QUICK_ROUNDS = 7, 3
SECONDS = 12.0  # limit per shape; a larger shape is skipped if its predicted time exceeds the limit
ABSURD = 100  # times as slow as F.cross_entropy: something is broken
OURS, TORCH, VENDOR = "npu_xent", "F.cross_entropy", "torch_npu"

Step = Callable[[], Tensor]


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """Yield one task per dtype and shape, from small to large."""
    for dtype in DTYPES:
        budget = Budget()
        for rows, classes in SHAPES[device.type][: 1 if quick else None]:
            run = partial(measure, rows, classes, dtype, device, QUICK_ROUNDS if quick else ROUNDS, budget)
            where = {"shape": f"{rows} x {classes}", "dtype": SHORT_NAMES[dtype]}
            yield Task(SECTION, "training step, mean", run, where)


class Budget:
    """Predicts the time of a shape from the previous shape's time per element."""

    def __init__(self) -> None:
        self.seconds_each: float = 0.0

    def predicted(self, elements: int, rounds: int) -> float:
        """Return the predicted seconds; 0 for the first shape."""
        return self.seconds_each * elements * (rounds + 1)


def measure(rows: int, classes: int, dtype: torch.dtype, device: torch.device, rounds: int, budget: Budget) -> Result:
    """Measure medians, ratios and memory; skipped if that would take too long or does not fit in memory."""
    predicted = budget.predicted(rows * classes, rounds)
    if predicted > SECONDS:
        return Result(skipped=f"would take about {predicted:.0f} s here")
    try:
        logits = torch.randn(rows, classes, device=device).to(dtype).requires_grad_()
        target = torch.randint(0, classes, (rows,), device=device)
        steps, missing = candidates(logits, target)
        seconds = in_turns(steps, rounds, device)
        memory = {name: peak_memory(step, device) for name, step in steps.items()}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return Result(skipped="does not fit in the free memory")
    budget.seconds_each = sum(map(statistics.median, seconds.values())) / (rows * classes)
    ratios = {
        name: statistics.median(ours / other for ours, other in zip(seconds[OURS], times, strict=True))
        for name, times in seconds.items()
    }
    numbers = {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "time_of_npu_xent_over": ratios,
        "all_seconds": seconds,
        "peak_memory_bytes": memory,
        "missing": missing,
    }
    slower = ratios[TORCH]
    what = f"{rows} x {classes} {SHORT_NAMES[dtype]}"
    notes = [f"slower than F.cross_entropy at {what}: {slower:.2f} times its time"] if slower > 1 else []
    absurd = [Failure(f"{slower:.0f} times as slow as F.cross_entropy")] if slower > ABSURD else []
    return Result(numbers, absurd, notes=notes)


def candidates(logits: Tensor, target: Tensor) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the training steps to compare, each run once, and the reason for each missing one."""

    def of(function: Callable[[Tensor, Tensor], Tensor]) -> Step:
        return lambda: torch.autograd.grad(function(logits, target), logits)[0]

    steps = {OURS: of(npu_xent.cross_entropy), TORCH: of(F.cross_entropy)}
    for step in steps.values():
        step()
    if logits.device.type != "npu":
        return steps, {}
    import torch_npu

    vendor = of(lambda x, y: torch_npu.npu_cross_entropy_loss(x, y)[0])
    try:
        vendor()
    except (AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return steps, {VENDOR: first_line(error)}
    return steps | {VENDOR: vendor}, {}


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch_npu raises OutOfMemoryError, or RuntimeError for an operator's workspace."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def in_turns(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each step in each round; odd rounds run the steps in reverse order."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "npu":
        npu().synchronize(device)


def peak_memory(step: Step, device: torch.device) -> int:
    """Return the peak number of bytes that a step allocates beyond those in use before."""
    gc.collect()  # free what exceptions still hold, or the difference would be too small
    if device.type == "npu":
        synchronize(device)
        npu().reset_peak_memory_stats(device)
        before: int = npu().memory_allocated(device)
        step()
        synchronize(device)
        peak: int = npu().max_memory_allocated(device)
        return peak - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler from printing its start and end on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        most = max(most, in_use)
    return most


def table(report: Report) -> list[str]:
    """Format one line per shape. On a simulated toolkit the header marks the figures as simulated."""
    said = ", simulated" if report.simulated else ""
    lines = [
        f"  Median milliseconds{said}; in brackets, the median over the rounds of time / npu_xent's time; peak memory "
        f"in MiB{said}.",
        f"    {'shape':<16}{'dtype':<6}" + "".join(f"{name + said:>28}" for name in (OURS, TORCH, VENDOR)),
    ]
    for check in report.of(SECTION):
        numbers, place = check.result.numbers, f"    {check.where['shape']:<16}{check.where['dtype']:<6}"
        if "seconds" not in numbers:
            lines.append(f"{place}  {check.result.skipped or 'raised'}")
            continue
        cells = []
        for name in (OURS, TORCH, VENDOR):
            if name not in numbers["seconds"]:
                cells.append(f"{'-':>28}")
                continue
            ratio = f" ({1 / numbers['time_of_npu_xent_over'][name]:.2f}x)" if name != OURS else ""
            memory = numbers["peak_memory_bytes"][name] / 2**20
            cells.append(f"{1000 * numbers['seconds'][name]:.2f} ms{ratio}, {memory:.1f}".rjust(28))
        lines.append(place + "".join(cells))
    missing = {reason for check in report.of(SECTION) for reason in check.result.numbers.get("missing", {}).values()}
    return lines + [f"  torch_npu.npu_cross_entropy_loss is not available: {reason}" for reason in sorted(missing)]
