"""Calls without enough memory on the CPU: MemoryError or RuntimeError, and the next call is right.

`python memory.py cpu SECONDS`
"""

from __future__ import annotations

import os
import random
import resource
import threading
from pathlib import Path

import torch
from calls import Call, new_calls, same_bits
from torch import Tensor
from tried import Tried, main

import npu_xent


def size() -> int:
    """The address space of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class Attempt(threading.Thread):
    """A call in a thread that is new, so that it has no memory of its own yet; `go` starts it."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.ready, self.go = call, threading.Event(), threading.Event()
        self.results: list[Tensor] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        torch.set_num_threads(1)
        # Where memory lacks for a library's thread-local data, glibc ends the process. Calls in float64 make the data,
        # but not what calls in other dtypes keep in it.
        x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        npu_xent.cross_entropy(x, torch.zeros(1, dtype=torch.int64)).backward()
        self.ready.set()
        self.go.wait()
        self.attempt()

    def attempt(self) -> None:
        try:
            self.results = self.call()
        except BaseException as error:
            self.error = error


def right(name: str, results: list[Tensor], expected: list[Tensor]) -> bool:
    """The same bits; of products nearly so, since torch.mm computes otherwise without memory for its workspace."""
    if name.startswith("linear"):
        return all(
            torch.allclose(result, wanted, rtol=1e-5, atol=1e-5)
            for result, wanted in zip(results, expected, strict=True)
        )
    return same_bits(results, expected)


def cpu(tried: Tried, seconds: float) -> None:
    """A limit of the address space (RLIMIT_AS) that leaves 0 bytes or more to a call."""
    calls = new_calls()
    torch.set_num_threads(1)
    expected = {name: call() for name, call in calls.items()}
    torch.set_num_threads(2)
    for name, call in calls.items():  # a limit must not meet a start of OpenMP's threads: it ends the process
        if not name.startswith("linear"):
            call()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    chosen = random.Random(1)
    while tried.seconds() < seconds or tried.counts["calls after it"] < 60:
        name = chosen.choice(list(calls))
        torch.set_num_threads(1 if name.startswith("linear") else 2)
        room = int(chosen.choice([0, 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 26]) * chosen.random())
        attempt, in_new_thread = Attempt(calls[name]), chosen.random() < 0.5
        if in_new_thread:
            attempt.start()
            attempt.ready.wait()
        resource.setrlimit(resource.RLIMIT_AS, (size() + room, hard))
        if in_new_thread:
            attempt.go.set()
            attempt.join()
        else:
            attempt.attempt()
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        if attempt.error is None:
            tried("calls with just enough memory", right(name, attempt.results, expected[name]), name)
        else:
            known = isinstance(attempt.error, (MemoryError, RuntimeError))
            tried("calls without enough memory", known, f"{name}: {attempt.error!r}")
        del attempt
        tried("calls after it", same_bits(calls[name](), expected[name]), name)
    failed = tried.counts["calls without enough memory"]
    tried("looks at whether enough calls failed", 4 * failed > tried.counts["calls after it"], f"only {failed}")


if __name__ == "__main__":
    main({"cpu": cpu})
