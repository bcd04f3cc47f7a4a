"""The count of what a part tried."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Tried:
    """What a part tried, how often, and what failed. The part prints it as JSON, which the driver reads."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.started = time.monotonic()

    def __call__(self, what: str, right: bool = True, why: str = "") -> None:
        self.counts[what] += 1
        if not right:
            self.failures.append(f"{what}: {why}")

    def seconds(self) -> float:
        return time.monotonic() - self.started


Part = Callable[[Tried, float], None]


@contextmanager
def printed(tried: Tried) -> Iterator[None]:
    """Counts an exception as a failure, and prints the counts as the last line."""
    try:
        yield
    except BaseException:
        tried("the part itself", False, traceback.format_exc())
    print(json.dumps({"counts": tried.counts, "failures": tried.failures[:20]}), flush=True)


def main(parts: Mapping[str, Part]) -> None:
    """`python PROGRAM PART SECONDS`"""
    tried = Tried()
    with printed(tried):
        parts[sys.argv[1]](tried, float(sys.argv[2]))
