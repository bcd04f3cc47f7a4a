"""Checks that repeated calls are bitwise identical: again, with other thread counts, after other work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .behaviour import same_bits
from .calls import observe
from .cases import CASES, SHORT_NAMES, Problem, dtypes, make_problem, shapes
from .report import Failure, Result, Task

SECTION = "repeatability"
PROMISE = "Repeated calls give the same bits: with any number of threads, and after other work."
REPEATED = ("mean", "all options")
THREADS = (1, 2, 3)


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """Yield one check per row mode and dtype."""
    for dtype in dtypes(device):
        for shape in shapes(dtype, device)[: 2 if quick else None]:
            problems = [make_problem(case, shape.rows, shape.classes, dtype) for case in CASES if case.name in REPEATED]
            where = {"shape": str(shape), "dtype": SHORT_NAMES[dtype], "row mode": shape.row_mode}
            run = lambda problems=problems: Result(failures=check(problems, device))  # noqa: E731
            yield Task(SECTION, "the same bits again", run, where, PROMISE)


def check(problems: list[Problem], device: torch.device) -> list[Failure]:
    """Compare later runs with the first, bitwise."""
    found = []
    for problem in problems:
        first = observe(problem, device)
        for again, outputs in (_on_cpu if device.type == "cpu" else _on_npu)(problem, device):
            for name, tensor in outputs.items():
                found += same_bits(f"{problem.case.name}, {again}: {name}", tensor, first[name])
    return found


def _on_cpu(problem: Problem, device: torch.device) -> Iterator[tuple[str, dict[str, Tensor]]]:
    before = torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            yield f"{threads} threads", observe(problem, device)
    finally:
        torch.set_num_threads(before)


def _on_npu(problem: Problem, device: torch.device) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "again", observe(problem, device)
    # Fill the unified buffers, and the memory that later results will reuse, with other numbers.
    other = make_problem(CASES[0], 70, 3000, torch.float32)
    observe(other, device)
    junk = [torch.full((n,), float("nan"), device=device) for n in (1000, problem.logits.numel())]
    del junk
    yield "after other work", observe(problem, device)
