"""The peak memory of a call beyond the memory in use before it, measured in two ways, and a prediction.

Resident: the growth of the process's peak resident set, from Linux. It includes all memory that the call touches, but
has a resolution of about 1 MiB and misses memory that an allocator cached in an earlier call.
Allocated: the peak sum of the allocations that torch.profiler records. It includes cached memory, but misses scratch
space that is allocated outside of torch. The peak of a call is the larger of the two. Both include outputs and
gradients, but not inputs.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from npu_xent.doctor.timing import peak_memory

from .log_probs import ENTROPY, TOKENS
from .methods import CONSUME, FORWARD, LOG_PROB, NONE, TRAINING, Step

# Bytes beyond the inputs, for N rows, C classes, H features and b bytes per element. 40 bytes per row cover its
# statistics (at most six float32) and reductions; they are omitted where there is an N x C matrix.
PREDICTED: dict[str, Callable[[int, int, int, int], float]] = {
    FORWARD: lambda N, C, H, b: 40 * N,
    TRAINING: lambda N, C, H, b: N * C * b,  # the gradient
    CONSUME: lambda N, C, H, b: 40 * N,
    NONE: lambda N, C, H, b: N * C * b,
    TOKENS: lambda N, C, H, b: N * C * b,
    ENTROPY: lambda N, C, H, b: N * C * b,
    LOG_PROB: lambda N, C, H, b: 2 * N * C * b,  # the gradient and log_prob
}


def predicted_linear(N: int, C: int, H: int, b: int) -> float:
    """The gradients of weight and input, a chunk of logits, and for 16 bits a float32 sum of the weight's gradient."""
    most, least = 512, 256 if b == 2 else 128
    rows = max(min(max(N * 4 // (25 * b) // 32 * 32, least), most), (32 << 20) // (C * b))  # docstring of chunk_rows
    return C * H * b + N * H * b + min(rows, N) * C * b + (4 * C * H if b == 2 and rows < N else 0)


PREDICTED_LINEAR: dict[str, Callable[[int, int, int, int], float]] = {
    TRAINING: predicted_linear,
    ENTROPY: predicted_linear,
}

# Cached memory of an earlier call would be resident before the next one. With these variables, which are read at
# startup, glibc returns blocks of 256 KiB and more to the system at once, and npu_xent its large outputs.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144", "NPU_XENT_KEEP_MEMORY": "0"}


def peak_resident(step: Step) -> int:
    """Bytes. Run the step once before, so that one-time allocations are not counted."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    kept = step()
    peak = status("VmHWM")
    del kept
    return max(peak - before, 0)


def resident() -> int:
    """Resident bytes, after returning free memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def peak_allocated(step: Step) -> int:
    """Bytes allocated through torch."""
    return peak_memory(step, torch.device("cpu"))
