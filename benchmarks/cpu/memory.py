"""The most memory that a call has beyond what was there before it, measured in two ways, and what it should be.

Resident: the peak resident set of the process, as Linux counts it. All that the call touches is in it, ours, PyTorch's
or the C library's; it is coarse, to about a MiB, and blind to memory that an allocator has kept from an earlier call.
Allocated: the running sum of what torch.profiler records of PyTorch's allocator and of those that report to it. It
knows such memory, but no scratch space from elsewhere. So the peak of a call is the larger of the two. Outputs and
gradients are in both, inputs in neither.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from npu_xent.doctor.timing import peak_memory

from .methods import CONSUME, FORWARD, LOG_PROB, NONE, TRAINING, Step

# Bytes beyond the inputs, of N rows, C classes, H features and b bytes an element. A row's statistics are at most six
# numbers in float32 and its reductions; so many are left out where there is a matrix.
PREDICTED: dict[str, Callable[[int, int, int, int], float]] = {
    FORWARD: lambda N, C, H, b: 40 * N,
    TRAINING: lambda N, C, H, b: N * C * b,  # the gradient
    CONSUME: lambda N, C, H, b: 40 * N,
    NONE: lambda N, C, H, b: N * C * b,
    LOG_PROB: lambda N, C, H, b: 2 * N * C * b,  # the gradient and log_prob
}


def predicted_linear(N: int, C: int, H: int, b: int) -> float:
    """The gradients of weight and input, a chunk of logits, and of 16 bits a sum of the weight's in float32."""
    most, least = 512, 256 if b == 2 else 128
    rows = max(min(max(N * 4 // (25 * b) // 32 * 32, least), most), (32 << 20) // (C * b))  # docstring of chunk_rows
    return C * H * b + N * H * b + min(rows, N) * C * b + (4 * C * H if b == 2 and rows < N else 0)


PREDICTED_LINEAR: dict[str, Callable[[int, int, int, int], float]] = {TRAINING: predicted_linear}

# Memory that was kept from an earlier call would be resident before the next. With this, glibc gives blocks of 256 KiB
# and more back to the system at once, and npu_xent its large outputs. Both read it when they start.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144", "NPU_XENT_KEEP_MEMORY": "0"}


def peak_resident(step: Step) -> int:
    """Bytes. The step should have run before, or what is loaded or started once is in it."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    kept = step()
    peak = status("VmHWM")
    del kept
    return max(peak - before, 0)


def resident() -> int:
    """Bytes, without what can be given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def peak_allocated(step: Step) -> int:
    """Bytes."""
    return peak_memory(step, torch.device("cpu"))
