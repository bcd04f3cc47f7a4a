"""Speed and memory of npu_xent on this CPU, compared with PyTorch's losses and others. `make bench` installs its needs.

Appends every figure to a CSV with the machine, versions and commit, prints each target with its figure, and draws the
charts of the README from the CSV.

    python benchmarks/run.py [--quick] [--only speed small grid linear log_probs memory scaling] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from cpu.cases import PLANS
from cpu.child import answer
from cpu.parts import PARTS
from cpu.records import RESULTS, Figure, append, this_run
from cpu.targets import outcomes


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick", default="full", help="minutes")
    parser.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="takes seconds; for tests")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the benchmarks")
    parser.add_argument(
        "--threads", type=int, default=min(2, torch.get_num_threads()), help="default: 2, or 1 on one core"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, help="where figures are appended")
    parser.add_argument("--no-charts", action="store_true", help="draw nothing into docs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs, records, reports, draws."""
    options = parse()
    if options.child:
        answer(options.child)
        return
    plan, run = PLANS[options.mode], this_run(options.mode)
    torch.set_num_threads(options.threads)
    print(f"npu_xent {run.npu_xent} ({run.commit}) on {run.machine}, {run.cores} cores; torch {run.torch}")
    start, figures = time.perf_counter(), []
    for name in options.only:
        found = list(PARTS[name](plan, options.threads))
        append(options.csv, run, found)  # after each part, so that an interrupted run keeps its figures
        figures += found
        print(f"-- {name}: done after {time.perf_counter() - start:.0f} s", flush=True)
    report(figures)
    print(f"Appended {len(figures)} figures to {options.csv}.")
    if not options.no_charts:
        from charts import draw_all

        print("Drew", ", ".join(str(path) for path in draw_all(options.csv)))


def report(figures: list[Figure]) -> None:
    """A line for each target, shape and dtype."""
    lines = list(outcomes(figures))
    print(f"\n{'target':<58}{'shape':<20}{'dtype':<10}{'figure':>8}  {'should be':<8}")
    for line in lines:
        value = "-" if line.value is None else f"{line.value:.3g}"
        limit = line.target.says(line.dtype)
        print(f"{line.target.name:<58}{line.shape:<20}{line.dtype:<10}{value:>8}  {limit:<8}  {line.verdict}")
    counts = {word: sum(line.verdict == word for line in lines) for word in ("met", "missed", "not measured")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
