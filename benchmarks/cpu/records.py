"""The CSV of all figures, one per line, with machine and versions. Runs are appended."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results.csv"


@dataclass(frozen=True)
class Run:
    """The columns that all figures of a run share."""

    date: str  # of its start; tells runs apart
    mode: str
    commit: str
    machine: str
    cores: int
    torch: str
    npu_xent: str


@dataclass(frozen=True)
class Figure:
    """One figure: `value` is the median of n_runs, `iqr` their interquartile range."""

    benchmark: str
    method: str
    shape: str
    dtype: str
    threads: int
    figure: str
    value: float
    unit: str
    n_runs: int = 1
    iqr: float = 0.0


COLUMNS = [field.name for kind in (Run, Figure) for field in fields(kind)]


def this_run(mode: str) -> Run:
    """A run on this machine, dated now."""
    import torch

    import npu_xent

    return Run(
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        mode,
        commit(),
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        len(os.sched_getaffinity(0)),
        torch.__version__,
        npu_xent.__version__,
    )


def cpu_name() -> str:
    """The CPU's name from /proc/cpuinfo, which on Arm has none."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def commit() -> str:
    """The commit of the sources, with a plus if they have been changed."""
    try:
        sha = subprocess.check_output(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        )
        changed = ["git", "diff", "--quiet", "HEAD", "--", "csrc", "npu_xent", "benchmarks/*.py"]
        return sha.strip() + ("+" if subprocess.run(changed, cwd=ROOT).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # not a checkout


def append(path: Path, run: Run, figures: list[Figure]) -> None:
    """Appends figures; writes a header to a new file."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for figure in figures:
            row = asdict(run) | asdict(figure)
            writer.writerow(row | {name: f"{row[name]:.6g}" for name in ("value", "iqr")})


def read(path: Path) -> dict[Run, list[Figure]]:
    """The runs, in the order of the file."""
    runs: dict[Run, list[Figure]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            run = Run(**{field.name: row[field.name] for field in fields(Run)} | {"cores": int(row["cores"])})
            numbers = {name: int(row[name]) for name in ("threads", "n_runs")}
            numbers |= {name: float(row[name]) for name in ("value", "iqr")}
            figure = Figure(**{field.name: row[field.name] for field in fields(Figure)} | numbers)
            runs.setdefault(run, []).append(figure)
    return runs


def newest(runs: dict[Run, list[Figure]]) -> Run:
    """The last full run, or the last one if none is full."""
    full = [run for run in runs if run.mode == "full"]
    return (full or list(runs))[-1]
