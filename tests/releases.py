"""What torch releases differ in, where the tests notice."""

from __future__ import annotations

import torch

TORCH = tuple(int(number) for number in torch.__version__.partition("+")[0].split(".")[:2])

# Matrix products of bfloat16 copy their operands on the CPU.
COPIES_BFLOAT16_OPERANDS = TORCH < (2, 12)


def cpu_capability() -> str:
    """The instruction set that torch has chosen. Up to 2.7 the baseline of x86-64 has another name."""
    return torch.backends.cpu.get_cpu_capability().replace("NO AVX", "DEFAULT")
