"""Shapes, dtypes and number of rounds of the full run, of QUICK=1 and of the tests."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Shape = tuple[int, ...]  # rows, classes; for the losses with a linear layer rows, features, classes


@dataclass(frozen=True)
class Plan:
    """One run."""

    mode: str
    rounds: int  # each round times every method once
    seconds: float  # the least time of a method in a round; it repeats shorter calls
    shapes: tuple[Shape, ...]
    small: Shape
    grid: tuple[Shape, ...]  # rows, classes
    images: tuple[Shape, ...]  # [N, C, d1, ...]
    linear: tuple[Shape, ...]
    tokens: tuple[Shape, ...]  # of log-probabilities and entropy: times and memory
    linear_tokens: tuple[Shape, ...]
    memory: tuple[Shape, ...]
    linear_memory: tuple[Shape, ...]
    large_linear_memory: tuple[Shape, ...]  # float32 only; a call takes about a minute
    classes: tuple[int, ...]  # of scaling in C, at scaling_rows
    scaling_rows: int
    rows: tuple[int, ...]  # of scaling in N, at scaling_classes
    scaling_classes: int
    threaded: Shape  # of scaling in threads
    # torch.compile takes seconds per case. `compiled`: training steps of each shape and dtype, and cut-cross-entropy.
    # `compiled_everywhere`: also the forward, the loss with a linear layer, and each case of scaling.
    compiled: bool = True
    compiled_everywhere: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)


FULL = Plan(
    mode="full",
    rounds=7,
    seconds=0.2,
    shapes=((4096, 8080), (1024, 32000), (512, 128256)),
    small=(64, 1000),
    grid=tuple(
        (rows, classes)
        for classes in (2, 10, 64, 256, 1000, 8000, 32000, 128256)
        for rows in (1, 8, 64, 512, 4096, 32768)
        if rows * classes <= 1 << 25
    ),
    images=((8, 2, 256, 256), (8, 21, 256, 256), (8, 150, 256, 256), (8, 8000, 128)),
    linear=((1024, 512, 32000), (2048, 1024, 8080)),
    tokens=((1024, 32000), (1024, 128256)),
    linear_tokens=((1024, 512, 32000),),
    memory=((4096, 8080), (1024, 32000), (512, 128256)),
    linear_memory=((1024, 512, 32000),),
    large_linear_memory=((4096, 1024, 128256),),
    classes=(1000, 4000, 16000, 64000, 256000),
    scaling_rows=256,
    rows=(1, 8, 64, 512, 2048),
    scaling_classes=32000,
    threaded=(1024, 32000),
)
QUICK = replace(
    FULL,
    mode="quick",
    rounds=3,
    seconds=0.02,
    shapes=((1024, 32000),),
    grid=((8, 10), (4096, 10), (64, 1000), (512, 32000)),
    images=((8, 2, 256, 256),),
    linear=((512, 256, 8080),),
    tokens=((512, 32000),),
    linear_tokens=((512, 256, 8080),),
    memory=((512, 32000),),
    linear_memory=((512, 256, 8080),),
    large_linear_memory=(),
    classes=(4000, 64000),
    rows=(8, 512),
    compiled_everywhere=False,
)
TINY = replace(
    QUICK,
    mode="tiny",
    rounds=2,
    seconds=0.0001,
    shapes=((16, 1000),),
    small=(4, 100),
    grid=((2, 3), (4, 100)),
    images=((2, 3, 4, 4),),
    linear=((16, 8, 1000),),
    tokens=((16, 1000),),
    linear_tokens=((16, 8, 1000),),
    memory=((256, 4000),),
    linear_memory=((64, 8, 4000),),
    classes=(100, 200),
    scaling_rows=4,
    rows=(1, 2),
    scaling_classes=100,
    threaded=(8, 1000),
    dtypes=("float32",),
    compiled=False,
)
PLANS = {plan.mode: plan for plan in (FULL, QUICK, TINY)}


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all cores."""
    cores = len(os.sched_getaffinity(0))
    return sorted({1 << i for i in range(cores.bit_length()) if 1 << i <= cores} | {cores})


def shape_name(shape: Shape) -> str:
    """As in the CSV: 4096 x 8080."""
    return " x ".join(map(str, shape))
