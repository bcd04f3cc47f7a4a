"""AdamW and its learning rate, step by step."""

from __future__ import annotations

import math

import torch
from torch import nn

from lm.settings import Settings

# The embeddings start small, and the first block's normalisation multiplies their gradients by some 30. At the peak
# rate after fewer steps, Adam changes them by a tenth a step: predictions flip and gradients of norm 100 follow. Such a
# step also makes much of last-bit differences between devices.
SHORTEST_WARMUP = 30


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that lets the matrices decay and leaves the norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over a tenth of the steps, 30 at least, then a cosine down to a tenth of the peak.

    A run of fewer steps ends while it warms up.
    """
    warmup = max(SHORTEST_WARMUP, settings.steps // 10)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / (settings.steps - warmup)
    return settings.lr * (0.55 + 0.45 * math.cos(math.pi * progress))
