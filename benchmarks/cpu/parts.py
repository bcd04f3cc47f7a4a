"""The benchmarks. Each yields its figures, and prints its progress."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import child, memory
from .cases import DTYPES, Plan, Shape, shape_name, thread_counts
from .log_probs import linear_token_steps, token_steps
from .measure import Times, in_turns
from .methods import (
    CUT,
    EAGER_JEMALLOC,
    EAGER_THP,
    JAX,
    LINEAR,
    OURS,
    TORCH_CHUNKED,
    Steps,
    cross_entropy_steps,
    grid_steps,
    linear_steps,
    training_steps,
)
from .records import Figure
from .targets import (
    ALLOCATED,
    BEYOND,
    CROSS_ENTROPY,
    GRID,
    KEPT,
    LARGE_LINEAR_MEMORY,
    LINEAR_LOG_PROBS,
    LINEAR_LOG_PROBS_MEMORY,
    LINEAR_MEMORY,
    LINEAR_SPEED,
    LOG_PROBS,
    LOG_PROBS_MEMORY,
    MEMORY,
    OF_LOGITS,
    PEAK,
    PREDICTED,
    RESIDENT,
    SCALING_C,
    SCALING_N,
    SCALING_THREADS,
    SMALL,
)

Figures = Iterator[Figure]


def say(what: str) -> None:
    """Prints a line of progress."""
    print(f"-- {what}", flush=True)


def timed(benchmark: str, steps: Steps, shape: Shape, dtype: str, plan: Plan, threads: int) -> Figures:
    """The interleaved times of the steps."""
    say(f"{benchmark}: {shape_name(shape)} {dtype}, {threads} threads")
    for (method, figure), times in in_turns(steps, plan.rounds, plan.seconds, threads).items():
        yield time_figure(benchmark, method, figure, shape, dtype, threads, times)


def time_figure(
    benchmark: str, method: str, figure: str, shape: Shape, dtype: str, threads: int, times: Times
) -> Figure:
    """A time as a figure, in seconds."""
    return Figure(
        benchmark, method, shape_name(shape), dtype, threads, figure, times.median, "s", times.rounds, times.iqr
    )


def cross_entropy(plan: Plan, threads: int) -> Figures:
    """The losses that take logits; subprocesses time those that need an environment of their own."""
    for shape in plan.shapes:
        for name in plan.dtypes:
            yield from timed(
                CROSS_ENTROPY,
                cross_entropy_steps(*shape, DTYPES[name], plan.compiled, plan.compiled_everywhere),
                shape,
                name,
                plan,
                threads,
            )
            for steps, method, environment in elsewhere(threads):
                yield from timed_elsewhere(steps, method, environment, shape, name, plan, threads)


def jemalloc() -> dict[str, str]:
    """The environment of a process under jemalloc, with all freed memory kept, in huge pages. Empty: not installed."""
    library = next(Path("/usr/lib").glob("*/libjemalloc.so.2"), None)
    always = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,thp:always"
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": always} if library else {}


def elsewhere(threads: int) -> Iterator[tuple[str, str, dict[str, str] | str]]:
    """Steps of child.ELSEWHERE, their main method, and their environment or why there is none."""
    yield "huge_page_steps", EAGER_THP, {"THP_MEM_ALLOC_ENABLE": "1", "NPU_XENT_KEEP_MEMORY": "0"}
    yield "jemalloc_steps", EAGER_JEMALLOC, jemalloc() or "apt-get install libjemalloc2"
    yield "jax_steps", JAX, {"NPROC": str(threads), "PJRT_NPROC": str(threads), "JAX_PLATFORMS": "cpu"}


def timed_elsewhere(
    steps: str, method: str, environment: dict[str, str] | str, shape: Shape, dtype: str, plan: Plan, threads: int
) -> Figures:
    """The times of steps in a process of their own."""
    found: Any = environment
    if isinstance(environment, dict):
        say(f"{CROSS_ENTROPY}: {method}, with " + " ".join(f"{key}={value}" for key, value in environment.items()))
        arguments = {"shape": shape, "dtype": dtype, "rounds": plan.rounds, "seconds": plan.seconds}
        found = child.ask("times", environment, threads=threads, steps=steps, **arguments)
    if isinstance(found, str):
        yield from not_available(CROSS_ENTROPY, {method: found}, shape, dtype, threads)
        return
    for measured, figure, *times in found:
        yield time_figure(CROSS_ENTROPY, measured, figure, shape, dtype, threads, Times(*times))


def grid(plan: Plan, threads: int) -> Figures:
    """Steps and forwards over rows and classes, and of images; shorter rounds, because there are many cases."""
    plan = replace(plan, seconds=plan.seconds / 4)
    for shape in (*plan.grid, *plan.images):
        for name in plan.dtypes:
            yield from timed(GRID, grid_steps(shape, DTYPES[name]), shape, name, plan, threads)


def small(plan: Plan, threads: int) -> Figures:
    """A small loss, which takes microseconds."""
    for name in plan.dtypes:
        yield from timed(SMALL, training_steps(*plan.small, DTYPES[name], False), plan.small, name, plan, threads)


def linear(plan: Plan, threads: int) -> Figures:
    """The losses with a linear layer."""
    for shape in plan.linear:
        for name in plan.dtypes:
            steps, missing = linear_steps(*shape, DTYPES[name], plan.compiled, plan.compiled_everywhere)
            yield from not_available(LINEAR_SPEED, missing, shape, name, threads)
            yield from timed(LINEAR_SPEED, steps, shape, name, plan, threads)


def not_available(benchmark: str, missing: dict[str, str], shape: Shape, dtype: str, threads: int) -> Figures:
    """Figures for missing methods, with the reason as the figure's name."""
    for method, reason in missing.items():
        say(f"{benchmark}: {method} is not measured: {reason}")
        yield Figure(benchmark, method, shape_name(shape), dtype, threads, f"not measured: {reason}", math.nan, "")


def log_probs(plan: Plan, threads: int) -> Figures:
    """Log-probabilities and entropy, of logits and of a linear layer: times, and peak memory."""
    for name in plan.dtypes:
        for shape in plan.tokens:
            steps = token_steps(*shape, DTYPES[name], plan.compiled)
            yield from timed(LOG_PROBS, steps, shape, name, plan, threads)
        for shape in plan.linear_tokens:
            steps = linear_token_steps(*shape, DTYPES[name], plan.compiled)
            yield from timed(LINEAR_LOG_PROBS, steps, shape, name, plan, threads)
    yield from peaks({LOG_PROBS_MEMORY: plan.tokens, LINEAR_LOG_PROBS_MEMORY: plan.linear_tokens}, plan, threads)


def peaks(shapes: dict[str, tuple[Shape, ...]], plan: Plan, threads: int) -> Figures:
    """The peak memory of each benchmark's shapes in each dtype, from a subprocess."""
    cases = [(of, shape, name) for name in plan.dtypes for of in shapes for shape in shapes[of]]
    say("memory: " + ", ".join(f"{shape_name(shape)} {name}" for _, shape, name in cases))
    found = child.ask("memory", memory.ENVIRONMENT, threads=threads, cases=cases, compiled=plan.compiled)
    for (benchmark, shape, name), measured in zip(cases, found, strict=True):
        yield from memory_figures(benchmark, measured, shape, name, threads)


def peak_memory(plan: Plan, threads: int) -> Figures:
    """Peak memory, measured and predicted."""
    yield from peaks({MEMORY: plan.memory, LINEAR_MEMORY: plan.linear_memory}, plan, threads)
    name = "float32"
    for shape in plan.large_linear_memory:
        methods = (OURS, LINEAR, TORCH_CHUNKED, CUT)
        _, missing = linear_steps(1, 1, 2, DTYPES[name], True, False)
        missing = {method: reason for method, reason in missing.items() if method in methods}
        yield from not_available(LARGE_LINEAR_MEMORY, missing, shape, name, threads)
        for method in methods:
            if method in missing:
                continue
            say(f"{LARGE_LINEAR_MEMORY}: {shape_name(shape)} {name}, {method}")
            found = child.ask(
                "large_linear_memory", memory.ENVIRONMENT, threads=threads, shape=shape, dtype=name, method=method
            )
            yield from memory_figures(LARGE_LINEAR_MEMORY, found, shape, name, threads)


def memory_figures(benchmark: str, found: list[Any], shape: Shape, dtype: str, threads: int) -> Figures:
    """The measured peak, its ratio to the size of the logits, and for npu_xent the prediction."""
    rows, *features, classes = shape
    size = DTYPES[dtype].itemsize
    logits = rows * classes * size
    weight = classes * features[0] * size if features else 0
    for method, key, resident, allocated, kept in found:
        peak = max(resident, allocated or 0)
        figures = {PEAK: peak, RESIDENT: resident, OF_LOGITS: peak / logits}
        if allocated is not None:
            figures[ALLOCATED] = allocated
        if kept is not None and method == OURS:  # torch.compile's would include the compiler
            figures[KEPT] = kept
        if features:
            figures[BEYOND] = (peak - weight) / logits
        if method == OURS:
            predict = (memory.PREDICTED_LINEAR if features else memory.PREDICTED)[key]
            figures[PREDICTED] = predict(rows, classes, features[0] if features else 0, size)
        for figure, value in figures.items():
            unit = "" if figure in (OF_LOGITS, BEYOND) else "bytes"
            yield Figure(benchmark, method, shape_name(shape), dtype, threads, f"{key}: {figure}", value, unit)


def scaling(plan: Plan, threads: int) -> Figures:
    """Training steps against the number of classes, of rows, and of threads; float32."""
    name = "float32"
    cases = [
        *((SCALING_C, (plan.scaling_rows, classes), threads) for classes in plan.classes),
        *((SCALING_N, (rows, plan.scaling_classes), threads) for rows in plan.rows),
        *((SCALING_THREADS, plan.threaded, count) for count in thread_counts()),
    ]
    if not plan.compiled_everywhere:
        say("scaling: torch.compile is left out of a short run, since it would compile each case")
    for benchmark, shape, count in cases:
        yield from timed(
            benchmark,
            training_steps(*shape, DTYPES[name], plan.compiled and plan.compiled_everywhere),
            shape,
            name,
            plan,
            count,
        )


PARTS = {
    "speed": cross_entropy,
    "small": small,
    "grid": grid,
    "linear": linear,
    "log_probs": log_probs,
    "memory": peak_memory,
    "scaling": scaling,
}
