"""The report of a launch: bytes, instructions, busy time and simulated time, per core and in total.

`Report.table()` formats one launch, `compare()` several side by side. All numbers come from the simulator, not from
hardware.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cann_sim.timeline import PIPE_NAMES, PIPES, Event, draw


class SyncSite(NamedTuple):
    """A synchronisation in the kernel's source, and its number of executions."""

    index: int
    kind: str
    file: str
    line: int
    count: int


@dataclass(frozen=True)
class CoreReport:
    """The counts and times of one core (block) of a launch. `instructions` and `busy_ns` are keyed by PIPES."""

    index: int
    read_bytes: int
    written_bytes: int
    instructions: Mapping[str, int]
    busy_ns: Mapping[str, float]
    time_ns: float

    @property
    def has_work(self) -> bool:
        """Whether it executed any instruction other than scalar ones."""
        return any(self.instructions.get(pipe, 0) for pipe in PIPES if pipe != "S")


@dataclass(frozen=True, repr=False)
class Report:
    """The report of a launch: `cores` by index, `time_ns` until the last of them finished.

    `config` is the launch's configuration; `sync_sites` are its synchronisations, with indices that are the same in all
    launches of the kernel (for `Config(remove_sync=...)`); `trace` has the instructions of core `trace_core`, if set.
    """

    kernel: str
    blocks: int
    cores: Sequence[CoreReport]
    time_ns: float
    config: Any = None
    sync_sites: Sequence[SyncSite] = ()
    trace: Sequence[Event] = ()
    trace_core: int | None = None

    def __repr__(self) -> str:
        pipe, share = self.busiest()
        blocks = f"{self.blocks} block{'s' * (self.blocks != 1)}"
        return f"<Report of {self.kernel}: {blocks}, {self.time_ns / 1e3:.1f} us, {pipe} busy {share:.1%}>"

    @property
    def read_bytes(self) -> int:
        """GM bytes read by all cores."""
        return sum(core.read_bytes for core in self.cores)

    @property
    def written_bytes(self) -> int:
        """GM bytes written by all cores."""
        return sum(core.written_bytes for core in self.cores)

    @property
    def instructions(self) -> dict[str, int]:
        """Instructions of each pipe, all cores together."""
        return {pipe: sum(core.instructions.get(pipe, 0) for core in self.cores) for pipe in PIPES}

    @property
    def working_cores(self) -> int:
        """The number of cores with work."""
        return sum(core.has_work for core in self.cores)

    @property
    def rate_gbps(self) -> float:
        """GM bytes in both directions over the simulated time, in GB/s."""
        return (self.read_bytes + self.written_bytes) / self.time_ns if self.time_ns else 0.0

    def busy_share(self) -> dict[str, float]:
        """Share of the launch's time each pipe was busy, over the cores that had work."""
        working = [core for core in self.cores if core.has_work]
        whole = len(working) * self.time_ns
        return {pipe: sum(core.busy_ns.get(pipe, 0.0) for core in working) / whole if whole else 0.0 for pipe in PIPES}

    def busiest(self) -> tuple[str, float]:
        """The pipe that is busy the longest, and its share."""
        return max(self.busy_share().items(), key=lambda item: item[1])

    def table(self, *, elements: int | None = None, per_core: bool = False) -> str:
        """The report as text. `elements` adds GM bytes per element, `per_core` a line per core."""
        text = compare([self], elements=None if elements is None else [elements])
        return f"{text}\n\n{core_table(self)}" if per_core else text

    def timeline(
        self, path: Any, core: int | None = None, start_ns: float | None = None, end_ns: float | None = None
    ) -> None:
        """Draws the traced core's pipes to an image file: the first instructions, or those from `start_ns` to `end_ns`.

        Needs a launch with Config(trace_core=...), and matplotlib. `core`, if given, must be the traced core.
        """
        if self.trace_core is None:
            raise ValueError(f"no trace of {self.kernel}: launch it with Config(trace_core=0) to record a core")
        if core is not None and core != self.trace_core:
            raise ValueError(f"core {core} of {self.kernel} was not recorded, core {self.trace_core} was")
        draw(self.trace, path, f"{self.kernel}, core {self.trace_core}", start_ns, end_ns)


def compare(
    reports: Iterable[Report], labels: Sequence[str] | None = None, *, elements: Sequence[int] | None = None
) -> str:
    """Several launches side by side, a column each: time, GM traffic, instructions and busy share of each pipe.

    Column heads are `labels`, by default the kernels' names. `elements`, one positive number per launch, adds GM bytes
    per element.
    """
    reports = list(reports)
    for name, given in (("labels", labels), ("elements", elements)):
        if given is not None and len(given) != len(reports):
            raise ValueError(f"{name} must have one value for each of the {len(reports)} reports, but has {len(given)}")
    if elements is not None and not all(n > 0 for n in elements):
        raise ValueError(f"elements must be positive, but are {list(elements)}")
    rows: list[list[str]] = [["", *(labels or [report.kernel for report in reports])]]

    def add(name: str, values: Iterable[str]) -> None:
        rows.append([name, *values])

    add("cores with work / launched", (f"{r.working_cores} / {r.blocks}" for r in reports))
    add("simulated time, us", (f"{r.time_ns / 1e3:.1f}" for r in reports))
    add("GM read, MB", (f"{r.read_bytes / 1e6:.3f}" for r in reports))
    add("GM written, MB", (f"{r.written_bytes / 1e6:.3f}" for r in reports))
    add("GM rate, GB/s", (f"{r.rate_gbps:.0f}" for r in reports))
    if elements is not None:
        pairs = list(zip(reports, elements, strict=True))
        add("read bytes / element", (f"{r.read_bytes / n:.3f}" for r, n in pairs))
        add("written bytes / element", (f"{r.written_bytes / n:.3f}" for r, n in pairs))
    for pipe in PIPES:
        add(f"{pipe} ({PIPE_NAMES[pipe]}) instructions", (f"{r.instructions[pipe]}" for r in reports))
    for pipe in PIPES:
        add(f"{pipe} ({PIPE_NAMES[pipe]}) busy", (f"{r.busy_share()[pipe]:.1%}" for r in reports))
    add("busiest pipe", (f"{pipe} {share:.1%}" for pipe, share in (r.busiest() for r in reports)))
    return _align(rows)


def core_table(report: Report) -> str:
    """A line for every core of a launch."""
    heads = [f"{pipe} {what}" for what in ("instr.", "busy") for pipe in PIPES]
    rows = [["core", "time, us", "read, kB", "written, kB", *heads]]
    for core in report.cores:
        counts = [str(core.instructions.get(pipe, 0)) for pipe in PIPES]
        shares = [f"{core.busy_ns.get(pipe, 0.0) / report.time_ns:.1%}" if report.time_ns else "-" for pipe in PIPES]
        sizes = [f"{core.read_bytes / 1e3:.1f}", f"{core.written_bytes / 1e3:.1f}"]
        rows.append([str(core.index), f"{core.time_ns / 1e3:.1f}", *sizes, *counts, *shares])
    return _align(rows)


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Aligns the first column left and the others right, with a rule below the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
