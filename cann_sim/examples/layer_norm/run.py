"""Compiles the layer norm from its source, compares with numpy, and prints the reports of the launches."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

import cann_sim
from cann_sim.report import Report, compare

SOURCE = Path(__file__).resolve().parent / "layer_norm.cpp"
SHAPES = ((1, 1), (5, 33), (96, 1024), (480, 4096), (100, 5000))
EPSILON = 1e-5
CORES = 48


class Tiling(ctypes.Structure):
    """The struct LayerNormTiling of layer_norm.cpp."""

    _fields_ = (("rows", ctypes.c_uint32), ("cols", ctypes.c_uint32), ("epsilon", ctypes.c_float))


def run(library: cann_sim.KernelLibrary, rows: int, cols: int, dtype: type) -> Report:
    """Runs one shape and raises if the error exceeds rounding."""
    rng = np.random.default_rng(rows * cols)
    x = rng.normal(3, 2, (rows, cols)).astype(dtype)
    weight, bias = rng.normal(1, 0.3, (2, cols)).astype(np.float32)
    y = np.zeros_like(x)
    report = library.launch("layer_norm", CORES, x, weight, bias, cann_sim.Uninit(y), Tiling(rows, cols, EPSILON))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPSILON) * weight + bias
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=2**-10 if dtype is np.float16 else 1e-5, atol=2e-5)
    return report


def main() -> None:
    """Both types, all shapes."""
    for name, dtype in (("float", np.float32), ("half", np.float16)):
        library = cann_sim.compile(SOURCE, name=f"layer_norm_{name}", defines=(f"DTYPE={name}",))
        reports = [run(library, *shape, dtype) for shape in SHAPES]
        print(f"\nlayer_norm {name}: {len(SHAPES)} shapes agree with numpy\n")
        print(compare(reports, [f"{r}x{c}" for r, c in SHAPES], elements=[r * c for r, c in SHAPES]))


if __name__ == "__main__":
    main()
