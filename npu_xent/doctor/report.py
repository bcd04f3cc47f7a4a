"""The doctor's data: checks, their results, and the report as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
DEFAULT_FILE = "npu_xent_doctor.json"
LONGEST_LIST = 40  # failed checks to print; the file lists all


@dataclass(frozen=True)
class Failure:
    """One error. For an output: its first wrong element, [row, class] for a gradient."""

    words: str
    output: str | None = None
    element: list[int] | None = None
    seen: float | None = None
    expected: float | None = None
    allowed_error: float | None = None


@dataclass(frozen=True)
class Result:
    """Result of a check: numbers by name, and failures; a check without failures has passed."""

    numbers: dict[str, Any] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    skipped: str | None = None  # why the check did not run; it neither passed nor failed
    notes: list[str] = field(default_factory=list)  # remarks that are not failures


@dataclass(frozen=True)
class Task:
    """A check that has not run yet. `where` gives its option, shape, dtype and row mode.

    `promise` is what npu_xent promises, and the check tests: a sentence of docs/trust.md.
    """

    section: str
    name: str
    run: Callable[[], Result]
    where: dict[str, Any] = field(default_factory=dict)
    promise: str = ""


@dataclass(frozen=True)
class Check:
    """A check that has run."""

    section: str
    name: str
    where: dict[str, Any]
    result: Result
    seconds: float = 0.0
    traceback: str | None = None
    promise: str = ""

    @property
    def failed(self) -> bool:
        """Whether the check has failures."""
        return bool(self.result.failures)

    def lines(self) -> list[str]:
        """Format a failed check for the report."""
        place = ", ".join(f"{name} {value}" for name, value in self.where.items() if value is not None)
        return [
            f"FAIL  {self.section}: {self.name}" + (f" ({place})" if place else ""),
            *([f"      promised: {self.promise}"] if self.promise else []),
            *(f"      {failure.words}" for failure in self.result.failures),
        ]


@dataclass
class Report:
    """The results so far."""

    device: str
    environment: dict[str, Any]
    simulated: bool  # the toolkit's version names a simulator
    quick: bool = False
    chosen: str = ""  # the device, and why it was chosen
    checks: list[Check] = field(default_factory=list)
    stopped: str | None = None  # why the remaining checks did not run
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.failed]

    @property
    def judged(self) -> int:
        """Number of checks that passed or failed."""
        return sum(check.result.skipped is None for check in self.checks)

    @property
    def verdict(self) -> str:
        """The result of the run in one line."""
        outcome = (
            f"{len(self.failed)} of {self.judged} checks failed" if self.failed else f"all {self.judged} checks passed"
        )
        on = " on a simulated NPU" if self.simulated else ""
        return f"verdict: {outcome}{on}" + (f"; stopped: {self.stopped}" if self.stopped else "")

    def of(self, section: str) -> list[Check]:
        """Return the checks of a section."""
        return [check for check in self.checks if check.section == section]

    def write(self, path: Path) -> None:
        """Write the whole report as JSON. NaN and infinities become strings."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "program": "npu_xent.doctor",
            "device": self.device,
            "device_chosen": self.chosen,
            "simulated": self.simulated,
            "quick": self.quick,
            "seconds": round(self.seconds, 3),
            "verdict": self.verdict,
            "passed": not self.failed,
            "stopped": self.stopped,
            "environment": self.environment,
            "checks": [
                {
                    "section": check.section,
                    "name": check.name,
                    "promise": check.promise,
                    "where": check.where,
                    "outcome": "failed" if check.failed else "skipped" if check.result.skipped else "passed",
                    "seconds": round(check.seconds, 4),
                    **asdict(check.result),
                    "traceback": check.traceback,
                }
                for check in self.checks
            ],
        }
        path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Convert a value to strict JSON types; NaN and infinities, which JSON lacks, become strings."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def ending(report: Report, file: Path | None) -> list[str]:
    """Format the failures, how to report them, and the verdict."""
    lines = []
    for check in report.failed[:LONGEST_LIST]:
        lines += check.lines()
    if len(report.failed) > LONGEST_LIST:
        lines.append(
            f"      and {len(report.failed) - LONGEST_LIST} more" + (f", in {file}" if file is not None else "")
        )
    notes = [note for check in report.checks for note in check.result.notes]
    said = " (simulated, not representative of an NPU)" if report.simulated else ""
    lines += [f"note{said}: {note}" for note in dict.fromkeys(notes)]
    if report.failed:
        lines += [
            "",
            "To report it, in the project's issue tracker, attach",
            *([f"  {file}"] if file is not None else []),
            "  the output of this run",
        ]
        if report.device.startswith("npu"):
            logs = report.environment["logs"]
            lines += ["  the output of npu-smi info", f"  the newest files under {logs} (plog)"]
    elif file is not None:
        lines.append(f"written to {file}")
    return [*lines, "", f"{report.verdict} ({report.seconds:.0f} s)"]
