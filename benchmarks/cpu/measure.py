"""Times of steps that take turns, so that a machine that is busy for a while is so for all of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from .methods import Steps


@dataclass(frozen=True)
class Times:
    """Seconds of one step: the median over the rounds, and the distance of their quartiles."""

    median: float
    iqr: float
    rounds: int


def in_turns(steps: Steps, rounds: int, seconds: float, threads: int) -> dict[tuple[str, str], Times]:
    """The time of each step; in odd rounds the order is the other way round. What compiles does so before the first."""
    timers = {key: Timer("step()", globals={"step": step}, num_threads=threads) for key, step in steps.items()}
    torch.set_num_threads(threads)  # what compiles does so for this many
    for step in steps.values():
        step()
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for turn in range(rounds):
        for key in timers if turn % 2 == 0 else reversed(timers):
            # Once or more to warm up, then blocks for this long, of which the median counts.
            samples[key].append(timers[key].blocked_autorange(min_run_time=seconds).median)
    return {key: summary(values) for key, values in samples.items()}


def summary(values: list[float]) -> Times:
    """Of one round, there is no distance."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0.0, 0.0, 0.0)
    return Times(statistics.median(values), high - low, len(values))
