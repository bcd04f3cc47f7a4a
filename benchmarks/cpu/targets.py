"""Targets for the figures. A missed target is printed as missed; do not loosen it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .log_probs import ENTROPY, LINEAR_PLAIN, PLAIN
from .methods import (
    COMPILE,
    CONSUME,
    COPIED,
    COPY,
    COPY_BESIDE,
    COPY_JEMALLOC,
    EAGER,
    EAGER_JEMALLOC,
    EAGER_THP,
    FORWARD,
    HALF,
    JAX,
    LINEAR,
    LOG_PROB,
    NONE,
    OURS,
    OURS_FRESH,
    OURS_JEMALLOC,
    PLAIN_C,
    PRODUCTS,
    STREAM,
    TORCH_CHUNKED,
    TRAINING,
)
from .records import Figure

CROSS_ENTROPY, SMALL, LINEAR_SPEED, MEMORY = "cross_entropy", "small input", "linear_cross_entropy", "memory"
LOG_PROBS, LINEAR_LOG_PROBS = "token_log_probs", "linear_token_log_probs"
GRID = "rows and classes"
SCALING_C, SCALING_N, SCALING_THREADS = "scaling in C", "scaling in N", "scaling in threads"
LOG_PROBS_MEMORY, LINEAR_LOG_PROBS_MEMORY = "memory, token_log_probs", "memory, linear_token_log_probs"
LINEAR_MEMORY, LARGE_LINEAR_MEMORY = "memory, linear_cross_entropy", "memory, large linear_cross_entropy"
RESIDENT, ALLOCATED, PREDICTED = "peak resident", "peak allocated", "predicted"
PEAK = "peak"  # the larger of the two
KEPT = "kept"  # still resident after the results of the first call are freed
BEYOND = "peak beyond the weight's gradient, of the logits' size"
OF_LOGITS = "peak, of the logits' size"

Key = tuple[str, str]  # method, figure


@dataclass(frozen=True)
class Target:
    """A limit for the ratio of two times, `this` / `that`, or for a ratio of memory."""

    benchmark: str
    name: str
    this: Key
    that: Key | None  # None: the figure is a ratio already
    at_least: bool
    float32: float
    bfloat16: float

    def met(self, value: float, dtype: str) -> bool:
        """Whether the value is within the limit; False for NaN."""
        limit = getattr(self, dtype)
        return value >= limit if self.at_least else value <= limit

    def says(self, dtype: str) -> str:
        """The limit as text."""
        return f"{'>=' if self.at_least else '<='} {getattr(self, dtype):g}"


def at_most(benchmark: str, name: str, this: Key, that: Key | None, float32: float, bfloat16: float) -> Target:
    """`this` takes at most `float32` (or `bfloat16`) times as long as `that`."""
    return Target(benchmark, name, this, that, False, float32, bfloat16)


def faster(benchmark: str, name: str, this: Key, that: Key, times: float) -> Target:
    """`this` is at least `times` times faster than `that`."""
    return Target(benchmark, name, that, this, True, times, times)


_COPY = (COPY, COPIED)
_JEMALLOC = (OURS_JEMALLOC, TRAINING)
_STEP, _CONSUME, _FRESH = (OURS, TRAINING), (OURS, CONSUME), (OURS_FRESH, TRAINING)

TARGETS = (
    at_most(CROSS_ENTROPY, "forward without gradient, x copy_", (OURS, FORWARD), _COPY, 0.9, 1.4),
    at_most(CROSS_ENTROPY, "training step, x copy_", _STEP, _COPY, 2.3, 3.0),
    faster(CROSS_ENTROPY, "training step, x faster than F.cross_entropy", _STEP, (EAGER, TRAINING), 4.5),
    faster(CROSS_ENTROPY, "training step, x faster than it with huge pages", _STEP, (EAGER_THP, TRAINING), 4.5),
    faster(CROSS_ENTROPY, "training step, x faster than torch.compile", _STEP, (COMPILE, TRAINING), 2.7),
    at_most(CROSS_ENTROPY, "training step in fresh pages, x copy_", _FRESH, _COPY, 2.3, 3.0),
    faster(
        CROSS_ENTROPY, "training step in fresh pages, x faster than F.cross_entropy", _FRESH, (EAGER, TRAINING), 4.5
    ),
    at_most(CROSS_ENTROPY, "consume_logits, x copy_", _CONSUME, _COPY, 1.2, 1.8),
    faster(CROSS_ENTROPY, "consume_logits, x faster than F.cross_entropy", _CONSUME, (EAGER, TRAINING), 9.0),
    faster(CROSS_ENTROPY, "consume_logits, x faster than it with huge pages", _CONSUME, (EAGER_THP, TRAINING), 9.0),
    at_most(CROSS_ENTROPY, "reduction none, x copy_", (OURS, NONE), _COPY, 3.0, 4.0),
    faster(CROSS_ENTROPY, "with log_prob, x faster than F.cross_entropy", (OURS, LOG_PROB), (EAGER, TRAINING), 2.5),
    at_most(CROSS_ENTROPY, "half of the rows ignored, x all rows", (OURS, HALF), _STEP, 0.6, 0.6),
    at_most(CROSS_ENTROPY, "jemalloc: training step, x copy_", _JEMALLOC, (COPY_JEMALLOC, COPIED), 1.15, 1.3),
    at_most(CROSS_ENTROPY, "jemalloc: training step, x streaming copy", _JEMALLOC, (STREAM, COPIED), 1.7, 1.95),
    at_most(
        CROSS_ENTROPY, "jemalloc: consume_logits, x copy_", (OURS_JEMALLOC, CONSUME), (COPY_JEMALLOC, COPIED), 0.8, 1.1
    ),
    faster(
        CROSS_ENTROPY,
        "jemalloc: training step, x faster than F.cross_entropy",
        _JEMALLOC,
        (EAGER_JEMALLOC, TRAINING),
        3.7,
    ),
    faster(CROSS_ENTROPY, "training step, x faster than JAX", _STEP, (JAX, TRAINING), 1.0),
    faster(CROSS_ENTROPY, "jemalloc: training step, x faster than C and OpenMP", _JEMALLOC, (PLAIN_C, TRAINING), 1.0),
    at_most(GRID, "training step, x F.cross_entropy", _STEP, (EAGER, TRAINING), 1.0, 1.0),
    at_most(GRID, "forward, x F.cross_entropy", (OURS, FORWARD), (EAGER, FORWARD), 1.0, 1.0),
    at_most(SMALL, "small input, x F.cross_entropy", _STEP, (EAGER, TRAINING), 1.0, 1.0),
    at_most(LINEAR_SPEED, "linear_cross_entropy, x F.linear + F.cross_entropy", _STEP, (LINEAR, TRAINING), 1.0, 1.0),
    at_most(LINEAR_SPEED, "linear_cross_entropy, x PyTorch's, chunked", _STEP, (TORCH_CHUNKED, TRAINING), 1.0, 1.0),
    at_most(LINEAR_SPEED, "linear_cross_entropy, x the three products", _STEP, (PRODUCTS, TRAINING), 1.03, 1.1),
    at_most(LOG_PROBS, "log-probs and entropy, x reduction none", (OURS, ENTROPY), (OURS, NONE), 1.3, 1.3),
    faster(LOG_PROBS, "log-probs and entropy, x faster than log_softmax", (OURS, ENTROPY), (PLAIN, ENTROPY), 10.0),
    at_most(
        LINEAR_LOG_PROBS,
        "linear_token_log_probs, x F.linear + log_softmax",
        (OURS, ENTROPY),
        (LINEAR_PLAIN, ENTROPY),
        1.0,
        1.0,
    ),
    # An N x C allocation would be 0.5 or more.
    at_most(MEMORY, "consume_logits, memory / logits", (OURS, f"{CONSUME}: {OF_LOGITS}"), None, 0.1, 0.1),
    at_most(
        LARGE_LINEAR_MEMORY,
        "linear_cross_entropy, (memory - weight gradient) / logits",
        (OURS, f"{TRAINING}: {BEYOND}"),
        None,
        0.05,
        0.05,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """A target at one shape and dtype; the value is None if one of its figures was not measured."""

    target: Target
    shape: str
    dtype: str
    value: float | None

    @property
    def verdict(self) -> str:
        """The verdict: "met", "missed" or "not measured"."""
        if self.value is None:
            return "not measured"
        return "met" if self.target.met(self.value, self.dtype) else "missed"


def outcomes(figures: list[Figure]) -> Iterator[Outcome]:
    """Outcomes of every target, for every shape and dtype that its benchmark has figures for."""
    for target in TARGETS:
        of_benchmark = [figure for figure in figures if figure.benchmark == target.benchmark]
        for shape, dtype in dict.fromkeys((figure.shape, figure.dtype) for figure in of_benchmark):
            values = {(f.method, f.figure): f.value for f in of_benchmark if (f.shape, f.dtype) == (shape, dtype)}
            yield Outcome(target, shape, dtype, value_of(target, values))


def value_of(target: Target, values: dict[Key, float]) -> float | None:
    """A ratio of times, each divided by copy_ in the same process if measured, since processes vary in speed."""
    if target.that is None:
        return values.get(target.this)
    times = [relative(key, values) for key in (target.this, target.that)]
    return None if None in times else times[0] / times[1]


def relative(key: Key, values: dict[Key, float]) -> float | None:
    """A time in units of copy_, or in seconds if the benchmark has none."""
    copied = values.get((COPY_BESIDE.get(key[0], COPY), COPIED), 1.0)
    return values[key] / copied if key in values else None
