"""Measuring in a subprocess with other environment variables; the figures come back as JSON.

torch reads THP_MEM_ALLOC_ENABLE only once, and glibc reads its variables at startup.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cases import DTYPES
from .log_probs import linear_token_steps, token_steps
from .measure import in_turns
from .memory import peak_allocated, peak_resident, resident
from .methods import (
    COPIED,
    HALF,
    TRAINING,
    NotAvailable,
    Steps,
    cross_entropy_steps,
    huge_page_steps,
    jax_steps,
    jemalloc_steps,
    linear_steps,
)
from .targets import LINEAR_LOG_PROBS_MEMORY, LINEAR_MEMORY, LOG_PROBS_MEMORY

ENTRY = Path(__file__).resolve().parents[1] / "run.py"
FEW_ROWS = 320  # of a warm-up: enough for full chunks, so that GEMM workspaces are allocated


def ask(task: str, environment: dict[str, str], **arguments: Any) -> Any:
    """Runs a task of TASKS in a subprocess and returns its result."""
    command = [sys.executable, str(ENTRY), "--child", json.dumps({"task": task, **arguments})]
    out = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def answer(question: str) -> None:
    """Runs the task in the subprocess and prints its result."""
    arguments = json.loads(question)
    torch.set_num_threads(arguments.pop("threads"))
    print(json.dumps(TASKS[arguments.pop("task")](**arguments)))


# Steps that need a process with an environment of its own.
ELSEWHERE = {steps.__name__: steps for steps in (huge_page_steps, jemalloc_steps, jax_steps)}


def times(steps: str, shape: list[int], dtype: str, rounds: int, seconds: float) -> list[Any] | str:
    """Times of one of ELSEWHERE: [method, figure, median, iqr, rounds] each; or why they are not available."""
    try:
        made = ELSEWHERE[steps](*shape, DTYPES[dtype])
    except NotAvailable as error:
        return str(error)
    found = in_turns(made, rounds, seconds, torch.get_num_threads())
    return [[*key, time.median, time.iqr, time.rounds] for key, time in found.items()]


def peaks(steps: Steps) -> list[Any]:
    """[method, figure, resident, allocated, kept] of each step."""
    found = []
    for key, step in steps.items():
        before = resident()
        step()
        found.append([*key, peak_resident(step), peak_allocated(step), max(resident() - before, 0)])
    return found


def memory(cases: list[Any], compiled: bool) -> list[Any]:
    """The peaks of each [benchmark, shape, dtype]."""
    found = []
    for benchmark, shape, dtype in cases:
        if benchmark == LOG_PROBS_MEMORY:
            steps = token_steps(*shape, DTYPES[dtype], compiled)
        elif benchmark == LINEAR_LOG_PROBS_MEMORY:
            steps = linear_token_steps(*shape, DTYPES[dtype], compiled)
        elif benchmark == LINEAR_MEMORY:
            steps, _ = linear_steps(*shape, DTYPES[dtype], compiled, False)
        else:
            steps = cross_entropy_steps(*shape, DTYPES[dtype], compiled, False)
            steps = {key: step for key, step in steps.items() if key[1] not in (COPIED, HALF)}
        found.append(peaks(steps))
    return found


def large_linear_memory(shape: list[int], dtype: str, method: str) -> list[Any]:
    """The peak of one method whose call takes minutes: runs it once, after a warm-up with few rows."""
    rows, features, classes = shape
    # torch.compile switches to a dynamic number of rows at the second number that it sees.
    for few in (FEW_ROWS, FEW_ROWS + 1):
        linear_steps(few, features, classes, DTYPES[dtype], True, False)[0][method, TRAINING]()
    step = linear_steps(rows, features, classes, DTYPES[dtype], True, False)[0][method, TRAINING]
    return [[method, TRAINING, peak_resident(step), None, None]]


TASKS: dict[str, Callable[..., Any]] = {task.__name__: task for task in (times, memory, large_linear_memory)}
