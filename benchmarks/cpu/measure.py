"""Interleaved timing of steps, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from .methods import Steps


@dataclass(frozen=True)
class Times:
    """Seconds of one step: the median over the rounds, and their interquartile range."""

    median: float
    iqr: float
    rounds: int


def in_turns(steps: Steps, rounds: int, seconds: float, threads: int) -> dict[tuple[str, str], Times]:
    """The time of each step. Odd rounds run in reverse order. Steps are compiled before the first round."""
    timers = {key: Timer("step()", globals={"step": step}, num_threads=threads) for key, step in steps.items()}
    torch.set_num_threads(threads)  # torch.compile generates code for this many
    for step in steps.values():
        step()
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for turn in range(rounds):
        for key in timers if turn % 2 == 0 else reversed(timers):
            # Warms up, then runs blocks for this long and takes their median.
            samples[key].append(timers[key].blocked_autorange(min_run_time=seconds).median)
    return {key: summary(values) for key, values in samples.items()}


def summary(values: list[float]) -> Times:
    """Median and interquartile range, which is 0 for a single round."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    return Times(statistics.median(values), high - low, len(values))
