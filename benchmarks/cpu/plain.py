"""plain.c, compiled for this machine."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
# What -ffast-math has for loops, without the code that makes a whole process flush small numbers to zero.
FLAGS = ["-std=c11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]


@functools.cache
def library() -> ctypes.CDLL:
    """The functions, which run with torch's number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.so"
        subprocess.run(["gcc", *FLAGS, str(SOURCE), "-o", str(path), "-lm"], check=True)
        loaded = ctypes.CDLL(str(path))
    loaded.omp_set_num_threads(torch.get_num_threads())
    return loaded


def fused_classifier(grad: Tensor, losses: Tensor, logits: Tensor, target: Tensor) -> None:
    """The losses of float32 logits [N, C], and the gradient of their mean."""
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (grad, losses, logits, target))
    library().fused_classifier(*pointers, *map(ctypes.c_int64, logits.shape))


def stream_copy(to: Tensor, source: Tensor) -> None:
    """Copies a contiguous tensor, past the caches where the machine has AVX512."""
    library().stream_copy(ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(source.data_ptr()), ctypes.c_int64(to.nbytes))
