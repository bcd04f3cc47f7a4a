"""Runs the checks one by one. An exception fails its own check, and the others still run."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

import npu_xent

from . import behaviour, correctness, repeatability, timing, vendor
from .environment import first_line, npu
from .report import Check, Failure, Report, Result, Task

DEVICE_LOST = "the device computes nothing any more; a new process is needed"
INTERRUPTED = "interrupted"
HANGS_AFTER = 300  # seconds for one check
NO_KERNELS = "without the NPU kernels there is nothing to check on an NPU"


class Progress:
    """Shows progress on standard error: on a terminal the current check, elsewhere a line per section."""

    def __init__(self) -> None:
        self.on_terminal: bool = sys.stderr.isatty()
        self.section: str = ""

    def show(self, number: int, task: Task) -> None:
        """Show the check before it runs, so that a hang or a crash leaves its name as the last output."""
        if self.on_terminal:
            where = " ".join(str(value) for value in task.where.values() if value is not None)
            print(f"\r\033[K[{number}] {task.section}: {task.name} {where}", end="", file=sys.stderr, flush=True)
        elif task.section != self.section:
            print(f"npu_xent.doctor: {task.section} ...", file=sys.stderr, flush=True)
        self.section = task.section

    def clear(self) -> None:
        """Clear the line before other output."""
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def sections(device: torch.device, quick: bool) -> Iterator[tuple[Iterable[Task], Callable[[Report], list[str]]]]:
    """Yield the tasks of each section and the function that formats their results, in the report's order."""
    yield correctness.tasks(device, quick), correctness.table
    yield behaviour.tasks(device), lambda report: listed(report, behaviour.SECTION)
    yield repeatability.tasks(device, quick), lambda report: listed(report, repeatability.SECTION)
    if device.type == "npu":
        yield vendor.tasks(device), lambda report: listed(report, vendor.SECTION)
    yield timing.tasks(device, quick), timing.table


def run_all(report: Report, device: torch.device, say: Callable[[list[str]], None]) -> None:
    """Run all checks into the report, and print each section when it is complete."""
    progress = Progress()
    if device.type == "npu":
        check = run_task(Task("environment", "the NPU kernels are loaded", load_kernels))
        report.checks.append(check)
        if check.failed:
            report.stopped = NO_KERNELS
            return
        say([f"  {'NPU kernels':<14} loaded"])
    for tasks, describe in sections(device, report.quick):
        done = len(report.checks)
        for task in tasks:
            progress.show(len(report.checks) + 1, task)
            try:
                check = run_task(task)
            except KeyboardInterrupt:  # the user interrupts a hanging check: keep the results so far
                result, report.stopped = Result(failures=[Failure(INTERRUPTED)]), INTERRUPTED
                stack = traceback.format_exc()
                report.checks.append(
                    Check(task.section, task.name, task.where, result, traceback=stack, promise=task.promise)
                )
                break
            doubtful = check.traceback is not None or check.result.skipped is not None
            if doubtful and device.type == "npu" and not answers(device):
                report.stopped = DEVICE_LOST
                check = blamed(check)
            report.checks.append(check)
            if report.stopped:
                break
        progress.clear()
        if len(report.checks) > done:
            say(["", report.checks[-1].section, *describe(report)])
        if report.stopped:
            return


def run_task(task: Task) -> Check:
    """Run a check. An exception becomes a failure."""
    start, trace = time.perf_counter(), None
    faulthandler.dump_traceback_later(HANGS_AFTER, file=sys.__stderr__ or sys.stderr)  # prints the stack
    try:
        result = task.run()
    except Exception as error:
        trace = traceback.format_exc()
        result = Result(failures=[Failure(f"raised {type(error).__name__}: {first_line(error)}")])
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - start
    return Check(task.section, task.name, task.where, result, seconds, trace, task.promise)


def blamed(check: Check) -> Check:
    """Mark the check as failed, even if it was skipped, because the device was lost after it."""
    if check.failed:
        return check
    failure = Failure(f"{check.result.skipped}; {DEVICE_LOST}")
    return replace(check, result=replace(check.result, failures=[failure], skipped=None))


def load_kernels() -> Result:
    """Load the kernels. Without them, all checks would test the fallback to torch operations."""
    try:
        npu_xent.load_npu()
    except RuntimeError as error:
        return Result(failures=[Failure(str(error))])
    return Result()


def answers(device: torch.device) -> bool:
    """Whether the device still computes. After some errors nothing runs until the process ends, sometimes silently.

    Runs one torch kernel and one npu_xent kernel. The latter is launched differently; loading has already checked it.
    """
    with contextlib.suppress(Exception):
        npu().synchronize(device)
        numbers = torch.ones(8).to(device) + 1
        torch.ops.npu_xent.scale_(numbers, torch.tensor(3.0).to(device))
        return bool(numbers.cpu().eq(6).all())
    return False


def listed(report: Report, section: str) -> list[str]:
    """Format the outcomes of a section's checks, one line per name."""
    checks = report.of(section)
    skipped = {check.result.skipped for check in checks}
    if len(skipped) == 1 and None not in skipped:
        return [f"  {skipped.pop()}"]
    lines = []
    for name in dict.fromkeys(check.name for check in checks):
        group = [check for check in checks if check.name == name]
        failed = sum(check.failed for check in group)
        reason = next((check.result.skipped for check in group if check.result.skipped), None)
        outcome = f"{failed} of {len(group)} FAILED" if failed else reason or "ok"
        count = f" ({len(group)} times)" if len(group) > 1 and outcome == "ok" else ""
        lines.append(f"  {name:<40} {outcome}{count}")
    return lines
