"""One vector instruction: how it is launched (kernels/api.h), and which elements the documentation says it touches."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cann_sim

FOLDER = Path(__file__).parent / "kernels"
COUNT, PREFIX, BITS, COUNTER, REGISTER = range(5)


class Parameters(ctypes.Structure):
    """struct Case of kernels/api.h."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("form", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("repeat", ctypes.c_int32),
        ("strides", ctypes.c_int32 * 6),
        ("bytes", ctypes.c_int32 * 4),
        ("flag", ctypes.c_int32),
        ("scalar", ctypes.c_float),
        ("mask", ctypes.c_uint64 * 2),
    )


@functools.cache
def library(name: str) -> cann_sim.KernelLibrary:
    return cann_sim.compile(FOLDER / f"{name}.cpp", include_dirs=(FOLDER,))


@dataclass
class Case:
    """`strides` are those of the repeat parameters, in their order: block strides (dst first), repeat strides."""

    op: int = 0
    form: int = COUNT
    count: int = 0
    mask: tuple[int, int] = (0, 0)
    repeat: int = 1
    strides: tuple[int, ...] = (1, 1, 8, 8)
    mode: int = 0
    flag: int = 0
    scalar: float = 0

    def launch(self, kernel: str, sources: list[np.ndarray | None], dst: np.ndarray, *, blocks: int = 1) -> np.ndarray:
        """The destination afterwards. Arrays hold all cores' parts, which are whole blocks of 32 bytes."""
        arrays = [*sources, *[None] * (3 - len(sources)), dst.copy()]
        sizes = tuple(0 if array is None else array.nbytes // blocks for array in arrays)
        assert all(size % 32 == 0 for size in sizes), sizes
        parameters = Parameters(
            self.op, self.form, self.mode, self.count, self.repeat, (*self.strides, 0, 0, 0, 0)[:6], sizes, self.flag,
            self.scalar, self.mask,
        )  # fmt: skip
        library(kernel.split(":")[0]).launch(kernel.split(":")[1], blocks, *arrays, parameters)
        return arrays[3]

    def lanes(self, element: int) -> np.ndarray:
        """Rows of (repeat, lane) that take part, where the widest type has `element` bytes."""
        width = 256 // element
        if self.form in (COUNT, COUNTER):
            index = np.arange(self.count)
            return np.stack([index // width, index % width], axis=1)
        on = self.mask[0] if self.form == PREFIX else [(self.mask[i // 64] >> i % 64) & 1 for i in range(width)]
        lanes = np.arange(on) if self.form == PREFIX else np.flatnonzero(on)
        return np.array([(repeat, lane) for repeat in range(self.repeat) for lane in lanes])


def offsets(lanes: np.ndarray, block: int, repeat: int, itemsize: int) -> np.ndarray:
    """Element offsets of lanes in an operand with these strides, in blocks of 32 bytes."""
    per_block = 32 // itemsize
    return (lanes[:, 0] * repeat + lanes[:, 1] // per_block * block) * per_block + lanes[:, 1] % per_block


def half_patterns() -> np.ndarray:
    """Every half, as half."""
    return np.arange(65536, dtype=np.uint16).view(np.float16)


def assert_same(actual: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    """Bit for bit, but for the bits of a NaN."""
    assert actual.dtype == expected.dtype
    if actual.dtype.kind == "f":
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(actual), nan, err_msg=str(what))
        unsigned = np.dtype(f"u{actual.dtype.itemsize}")
        actual, expected = actual[~nan].view(unsigned), expected[~nan].view(unsigned)
    np.testing.assert_array_equal(actual, expected, err_msg=str(what))
