"""Log-probabilities of tokens, and their entropy, for RL and preference training: npu_xent's and others' formulas.

Each function maps logits [N, C] and target [N] to log-probabilities [N], and with `entropy` also to entropies [N].
TRL's and verl's are what trl 1.16 and verl 0.9 compute without a fused kernel, as on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import npu_xent

from .methods import (
    COMPILE,
    CONSUME,
    LINEAR_COMPILE,
    NONE,
    OURS,
    Steps,
    compiled,
    consuming,
    gradients,
    linear_inputs,
    make_logits,
    training_of_each_row,
)

TRL, VERL, PLAIN, LINEAR_PLAIN = "TRL", "verl", "log_softmax", "F.linear + log_softmax"
TOKENS, ENTROPY = "log-probs", "log-probs and entropy"  # figures; CONSUME computes both

LogProbs = Callable[..., tuple[Tensor, ...]]


def ours(logits: Tensor, target: Tensor, entropy: bool, **options: bool) -> tuple[Tensor, ...]:
    """npu_xent.token_log_probs."""
    out = npu_xent.token_log_probs(logits, target, return_entropy=entropy, **options)
    return (out.log_probs, out.entropy) if entropy else (out,)


def ours_linear(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """npu_xent.linear_token_log_probs, with the entropy."""
    return npu_xent.linear_token_log_probs(x, weight, target, return_entropy=True)[:2]


def plain(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """The textbook formula in float32."""
    log_p = F.log_softmax(logits, -1, dtype=torch.float32)
    return (selected(log_p, target), -(log_p.exp() * log_p).sum(-1)) if entropy else (selected(log_p, target),)


def plain_linear(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The same after a linear layer."""
    return plain(F.linear(x, weight), target, True)


def trl(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """Four sequences one after the other, then the entropy in chunks of 128 rows; in the dtype of the logits."""
    log_probs = part_by_part(logits.unflatten(0, (4, -1)), target.unflatten(0, (4, -1))).flatten()
    return (log_probs, torch.cat([entropy_of(chunk) for chunk in logits.split(128)])) if entropy else (log_probs,)


def entropy_of(logits: Tensor) -> Tensor:
    """-sum p log p."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def verl(logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """One row after the other, since sequences are packed; then the entropy of all rows at once."""
    log_probs = part_by_part(logits, target)
    if not entropy:
        return (log_probs,)
    return log_probs, logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def part_by_part(logits: Tensor, target: Tensor) -> Tensor:
    """The log-probabilities for one entry of the first dimension after the other. Both packages do this."""
    if logits.dtype == torch.float32:
        return selected(logits, target) - torch.stack([part.logsumexp(-1) for part in logits])
    pairs = zip(logits, target, strict=True)
    return torch.stack([selected(part.log_softmax(-1), index) for part, index in pairs])


def selected(values: Tensor, index: Tensor) -> Tensor:
    """One value of each row."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def token_steps(rows: int, classes: int, dtype: torch.dtype, with_compile: bool) -> Steps:
    """Forward and backward, with an upstream gradient for each row; and the loss of reduction "none"."""
    values, target = make_logits(rows, classes, dtype)
    logits = values.clone().requires_grad_()
    functions: dict[str, LogProbs] = {OURS: ours, TRL: trl, VERL: verl, PLAIN: plain}
    if with_compile:
        functions[COMPILE] = compiled(plain)
    steps: Steps = {
        (OURS, NONE): training_of_each_row(npu_xent.cross_entropy, logits, target),
        (OURS, CONSUME): consuming(values, target, functools.partial(ours, entropy=True, consume_logits=True)),
    }
    for name, function in functions.items():
        for figure, entropy in ((TOKENS, False), (ENTROPY, True)):
            steps[name, figure] = functools.partial(step, function, logits, target, entropy)
    return steps


def step(function: LogProbs, logits: Tensor, target: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """The gradient of the logits."""
    return gradients(function(logits, target, entropy), logits)


def linear_token_steps(rows: int, features: int, classes: int, dtype: torch.dtype, with_compile: bool) -> Steps:
    """Forward and backward of a linear layer, log-probabilities and entropy."""
    x, weight, target = linear_inputs(rows, features, classes, dtype)
    functions: dict[str, LogProbs] = {OURS: ours_linear, LINEAR_PLAIN: plain_linear}
    if with_compile:
        functions[LINEAR_COMPILE] = compiled(plain_linear)
    return {
        (name, ENTROPY): functools.partial(linear_step, function, x, weight, target)
        for name, function in functions.items()
    }


def linear_step(function: LogProbs, x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the input and of the weight."""
    return gradients(function(x, weight, target), (x, weight))
