"""Prints the time of cross_entropy on small and narrow inputs as a ratio to torch's, in one thread.

python benchmarks/small_inputs.py [8x10 8x21x256x256 ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import npu_xent

SHAPES = "8x10 64x10 64x1000 1x32000 10000x2 10000x16 10000x256 8x2x256x256 8x21x256x256 8x8000x128"
PAIRS, SECONDS = 5, 0.03  # measurements of each function, and the least CPU time of one


def cpu_time(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    call()
    calls, start = 0, time.process_time()
    while (spent := time.process_time() - start) < SECONDS:
        call()
        calls += 1
    return spent / calls


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """The median of interleaved pairs."""
    return statistics.median(cpu_time(ours) / cpu_time(theirs) for _ in range(PAIRS))


def ratios(shape: list[int], dtype: torch.dtype) -> list[float]:
    """Of a training step, and of a forward without a gradient."""
    logits = torch.randn(shape).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    leaf = logits.clone().requires_grad_()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(leaf, target), leaf)

    return [
        ratio(step(npu_xent.cross_entropy), step(F.cross_entropy)),
        ratio(lambda: npu_xent.cross_entropy(logits, target), lambda: F.cross_entropy(logits, target)),
    ]


def main(*shapes: str) -> None:
    """Print one row for each shape."""
    torch.set_num_threads(1)
    print("| | step, float32 | forward, float32 | step, bfloat16 | forward, bfloat16 |\n|---|---|---|---|---|")
    for name in shapes or SHAPES.split():
        shape = [int(size) for size in name.split("x")]
        figures = [figure for dtype in (torch.float32, torch.bfloat16) for figure in ratios(shape, dtype)]
        print(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
