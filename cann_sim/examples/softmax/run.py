"""Builds the softmax kernels with CMake, runs them on the host, compares with numpy, and prints their reports.

python run.py [--build-dir DIR] [--timeline PICTURE.png]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import cann_sim
from cann_sim.report import Report, compare

HERE = Path(__file__).resolve().parent
UB_BYTES = 192 * 1024 - 256 - 8 * 1024  # usable by a kernel on Atlas A2
CORES = 48
ITEM_BYTES = {"float": 4, "half": 2, "bfloat16": 2}
SHAPES = ((1, 1), (3, 7), (48, 64), (50, 1000), (96, 8192), (61, 9281), (20, 40000))


class Tiling(ctypes.Structure):
    """The struct SoftmaxTiling of softmax.h."""

    _fields_ = (("rows", ctypes.c_uint32), ("cols", ctypes.c_uint32), ("chunk", ctypes.c_uint32))


def plan(rows: int, cols: int, dtype: str) -> Tiling:
    """The longest chunk that fits with two input and two output buffers, the row in fp32, and reduction buffers."""
    per_element = 4 * ITEM_BYTES[dtype] + 4 + 4 / 32
    longest = int((UB_BYTES - 1024) / per_element) // 64 * 64
    return Tiling(rows, cols, min(longest, -(-cols // 64) * 64))


def build(folder: Path) -> Path:
    """Builds as for a device, with only ASCEND_HOME_PATH changed."""
    environment = {**os.environ, "ASCEND_HOME_PATH": cann_sim.toolkit_path()}
    for command in (["cmake", "-S", str(HERE), "-B", str(folder)], ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return next(folder.rglob("libsoftmax_kernels.so"))


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Converts fp32 values to the given type; bfloat16, which numpy lacks, as uint16 bits (nearest even)."""
    if dtype != "bfloat16":
        return values.astype({"float": np.float32, "half": np.float16}[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of to_bits, as float64."""
    if dtype != "bfloat16":
        return bits.astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    """The reference, in float64."""
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def run(library: cann_sim.KernelLibrary, rows: int, cols: int, dtype: str, **config: object) -> Report:
    """Runs one shape and raises if the error exceeds rounding."""
    values = np.random.default_rng(rows * cols).normal(0, 4, (rows, cols))
    x = to_bits(values, dtype)
    y = np.zeros_like(x)
    report = library.launch(
        f"softmax_{dtype}", CORES, x, cann_sim.Uninit(y), plan(rows, cols, dtype), config=cann_sim.Config(**config)
    )
    expected = softmax(from_bits(x, dtype))
    # fp32: the rounding of x - max (up to about 40) dominates; 16 bit: one rounding of the result, half's subnormals.
    relative = {"float": 1e-5, "half": 2**-10, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(from_bits(y, dtype), expected, rtol=relative, atol=2**-24 if dtype == "half" else 1e-37)
    return report


def main() -> None:
    """Builds, checks and prints; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, help="kept; a temporary folder by default")
    parser.add_argument("--timeline", type=Path, help="draws core 0 of a 960 x 8192 float launch to this file")
    options = parser.parse_args()
    folder = options.build_dir or Path(tempfile.mkdtemp())
    try:
        library = cann_sim.KernelLibrary(build(folder))
        for dtype in ITEM_BYTES:
            reports = [run(library, *shape, dtype) for shape in SHAPES]
            print(f"\nsoftmax_{dtype}: {len(SHAPES)} shapes agree with numpy\n")
            print(compare(reports, [f"{r}x{c}" for r, c in SHAPES], elements=[r * c for r, c in SHAPES]))
        if options.timeline:
            run(library, 960, 8192, "float", trace_core=0).timeline(options.timeline, end_ns=15_000)
            print(f"\ntimeline of core 0 drawn to {options.timeline}")
    finally:
        if options.build_dir is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
