"""What torch releases differ in, where the tests notice."""

from __future__ import annotations

import torch

TORCH = tuple(int(number) for number in torch.__version__.partition("+")[0].split(".")[:2])

# Matrix products of bfloat16 copy their operands on the CPU.
COPIES_BFLOAT16_OPERANDS = TORCH < (2, 12)

# Older DTensors may reduce a Partial gradient before it becomes .grad. They also fail to go backward through
# full_tensor() and redistribute() of what is replicated on a mesh of two dimensions.
DTENSORS_KEEP_PARTIAL_GRADIENTS = TORCH >= (2, 13)
# In a backward through DTensors that are not contiguous, older releases gather the gradient, in an order that may
# differ between ranks.
DTENSORS_KEEP_STRIDES = TORCH >= (2, 13)
# On gloo, FSDP2 of torch 2.7 adds the gradients of the ranks, where it should average them.
FSDP2_AVERAGES_ON_GLOO = TORCH > (2, 7)


def cpu_capability() -> str:
    """The instruction set that torch has chosen. Up to 2.7 the baseline of x86-64 has another name."""
    return torch.backends.cpu.get_cpu_capability().replace("NO AVX", "DEFAULT")
