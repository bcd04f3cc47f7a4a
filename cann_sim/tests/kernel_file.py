"""A file of tests/kernels: compiled once, launched by kernel name, with the lines that its comments mark.

The kernels are refused at a line marked `// HERE`; where a message has to name a second place, that is `// FIRST`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cann_sim

FOLDER = Path(__file__).parent / "kernels"
ELEMENTS = 1024  # of each of the two buffers that a kernel gets, see scratch.h


def aligned(elements: int) -> np.ndarray:
    """Zeros that start at a cache line of 64 bytes, as device memory does."""
    room = np.zeros(elements + 16, np.float32)
    start = -(room.ctypes.data // 4) % 16
    return room[start : start + elements]


def ones() -> np.ndarray:
    array = aligned(ELEMENTS)
    array[:] = 1
    return array


@functools.cache
def kernel_file(name: str) -> KernelFile:
    return KernelFile(name)


class KernelFile:
    """The file's source, and the library made from it."""

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"{name}.cpp"
        self.lines = self.path.read_text().splitlines()

    @functools.cached_property
    def library(self) -> cann_sim.KernelLibrary:
        return cann_sim.compile(self.path, include_dirs=(FOLDER,))

    def kernels(self) -> list[str]:
        return [match[1] for line in self.lines if (match := re.match(r"KERNEL\((\w+)\) \{", line))]

    def span(self, kernel: str) -> tuple[int, int]:
        start = next(i for i, line in enumerate(self.lines) if line.startswith(f"KERNEL({kernel})"))
        return start, next(i for i in range(start, len(self.lines)) if self.lines[i] == "}")

    def line(self, kernel: str, mark: str = "HERE") -> int:
        """The number of the line in `kernel`'s body (or, for a mark found nowhere in it, of the file) so marked."""
        start, end = self.span(kernel)
        marked = [i + 1 for i in range(start, end) if self.lines[i].endswith(f"// {mark}")]
        if not marked:
            marked = [i + 1 for i, line in enumerate(self.lines) if line.endswith(f"// {mark}")]
        assert len(marked) == 1, f"{kernel}: {len(marked)} lines are marked {mark}"
        return marked[0]

    def place(self, kernel: str, mark: str) -> str:
        return f"{self.path.name}:{self.line(kernel, mark)}"

    def launch(self, kernel: str, number: int, x: Any = None, y: Any = None, *, blocks: int = 1) -> Any:
        x = ones() if x is None else x
        y = ones() if y is None else y
        return self.library.launch(kernel, blocks, x, y, number)


@dataclass(frozen=True)
class Broken:
    """A kernel that `bad` makes break a rule, and `good` (None: nothing does) keeps within it."""

    kernel: str
    kind: str
    words: str = ""  # space separated; each has to be in the message
    bad: int = 0
    good: int | None = 1
    mark: str = "HERE"
    core: int = 0

    def __str__(self) -> str:
        return self.kernel


def check_refused(file: KernelFile, case: Broken, **launch: Any) -> cann_sim.KernelError:
    """Launches the broken variant; it must be refused with its kind, at its line, in the right words."""
    with pytest.raises(cann_sim.KernelError) as caught:
        file.launch(case.kernel, case.bad, **launch)
    error = caught.value
    where = f"{error.kind} at {Path(error.file).name}:{error.line}: {error.message}"
    assert error.kind == case.kind, where
    assert Path(error.file).name == file.path.name, where
    assert error.line == file.line(case.kernel, case.mark), where
    assert error.kernel == case.kernel, where
    assert error.core == case.core, where
    for word in case.words.split():
        assert word in error.message, where
    return error


def check_passes(file: KernelFile, case: Broken, **launch: Any) -> None:
    """The same kernel with the rule kept: what is refused is the fault and nothing else in it."""
    if case.good is not None:
        file.launch(case.kernel, case.good, **launch)


def check_complete(file: KernelFile, cases: list[Broken], others: tuple[str, ...] = ()) -> None:
    """No kernel of the file is without a case."""
    assert sorted({case.kernel for case in cases} | set(others)) == sorted(file.kernels())
