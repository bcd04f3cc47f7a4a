"""AdamW and its learning rate, step by step."""

from __future__ import annotations

import math

import torch
from torch import nn

from lm.settings import Settings

# The embeddings start so small that a step at the default peak rate changes them by a tenth, and the first block's
# normalisation multiplies their gradients by some 30. At that rate after fewer steps, the loss jumps and the gradient's
# norm rises to 100. Such steps also blow up differences between devices, from the last bit to a hundredth.
SHORTEST_WARMUP = 30


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that lets the matrices decay and leaves the norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over a tenth of the steps, 30 at least, then a cosine down to a tenth of the peak.

    A run of fewer steps ends while it warms up. One that is extended has the rates of the longer run from there on: it
    rises again, once, which serves better than staying at the tenth. With 2 layers of width 96, 300 steps and 300 more
    end at a validation loss of 3.82 so, at 3.99 otherwise; 600 steps from the start end at 3.67.
    """
    warmup = max(SHORTEST_WARMUP, settings.steps // 10)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / (settings.steps - warmup)
    return settings.lr * (0.55 + 0.45 * math.cos(math.pi * progress))
