"""token_log_probs in float64, written out from its formulas, and what its tests call it with.

As in reference.py: the truth shares nothing with the code under test, and comes with the sizes of its terms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from reference import INF, NAN, make_logits, make_target, scaled_and_capped, stats_dtype
from torch import Tensor

import npu_xent

# The truth ------------------------------------------------------------------------------------------------------------


class TokenTruth(NamedTuple):
    """The results in float64, the gradient of the logits, and the sizes of their terms (for the tolerance)."""

    log_probs: Tensor
    entropy: Tensor
    top1: Tensor
    grad: Tensor
    log_prob_terms: Tensor
    entropy_terms: Tensor
    grad_terms: Tensor


def token_truth(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_log_probs: Tensor | float | None = None,
    grad_entropy: Tensor | float | None = None,
) -> TokenTruth:
    """Log-probabilities, entropy, top-1 and the gradient for both upstream gradients, of logits [..., C], target [...].

    Targets must be classes or ignore_index. A row without a distribution is NaN, and its top-1 False.
    """
    y = target.detach().cpu().long()
    t, g_log_prob, g_entropy = (
        torch.as_tensor(0.0 if rows is None else rows, dtype=torch.float64, device="cpu")
        .detach()
        .expand(y.shape)[..., None]
        for rows in (temperature, grad_log_probs, grad_entropy)
    )
    z, slope = scaled_and_capped(logits, logit_scale, softcap)
    scale = torch.tensor(logit_scale, dtype=torch.float64)
    z, factor = z / t, scale / t
    kept = (y != ignore_index)[..., None]
    y = y[..., None].masked_fill(~kept, 0)

    top = z.max(dim=-1, keepdim=True).values
    undefined = ~top.isfinite()
    below = (z - top).masked_fill(undefined, NAN)
    powers = below.exp()
    total = powers.sum(dim=-1, keepdim=True)
    p, log_sum = powers / total, total.log()
    log_p = below - log_sum
    # -sum p log p, of terms >= 0; a mask of -inf adds 0, and not NaN.
    entropy = log_sum - (p * below).masked_fill(p == 0, 0).sum(dim=-1, keepdim=True)
    away = (log_p + entropy).masked_fill(p == 0, 0)
    one_hot = torch.zeros_like(z).scatter_(-1, y, 1)
    top1 = (logits.detach().cpu().double() * logit_scale).argmax(dim=-1, keepdim=True) == y
    grad = (g_log_prob * (one_hot - p) - g_entropy * p * away) * slope * factor

    # z - top is rounded, and so is z itself, unless all factors are powers of 2. An error of z_c moves lse by p_c of
    # it, and the entropy by p_c (log p_c + entropy).
    exact = (scale.frexp().mantissa.abs() == 0.5) & (t.frexp().mantissa == 0.5) & (softcap is None)
    z_size = (z.abs() + top.abs()).masked_fill(exact, 0).nan_to_num(0, 0, 0)
    size = (-below).nan_to_num(0, 0, 0) + z_size
    log_p_terms = 1 + log_sum + size + (p * z_size).sum(dim=-1, keepdim=True)
    entropy_terms = 1 + log_sum + (p * (size - z_size + away.abs() * size)).sum(dim=-1, keepdim=True)
    # An exponential below the smallest normal number may be 0.
    stats = torch.finfo(stats_dtype(logits.dtype))
    p_size = p + stats.tiny / stats.eps
    grad_terms = g_log_prob.abs() * (one_hot + p_size * log_p_terms)
    grad_terms = grad_terms + g_entropy.abs() * p_size * ((away.abs() + 1) * log_p_terms + entropy_terms)

    rows = (log_p.gather(-1, y), entropy, log_p_terms.gather(-1, y), entropy_terms)
    log_probs, entropy, log_prob_terms, entropy_terms = (t.masked_fill(~kept, 0).squeeze(-1) for t in rows)
    return TokenTruth(
        log_probs,
        entropy,
        (top1 & kept & ~undefined).squeeze(-1),
        grad.masked_fill(~kept, 0),
        log_prob_terms.nan_to_num(0, 0, 0),
        entropy_terms.nan_to_num(0, 0, 0),
        (grad_terms * factor.abs()).nan_to_num(0, 0, 0).masked_fill(~kept, 0),
    )


def selected_truth(logits: Tensor, index: Tensor, grad: Tensor, **options: Any) -> TokenTruth:
    """The same for selected_log_probs, logits [..., C], index [..., K]: what token_log_probs gives for each of the K.

    `entropy` and `top1` are those of the first; the gradients add up.
    """
    each = [
        token_truth(logits, index[..., k], grad_log_probs=grad[..., k], ignore_index=-1, **options)
        for k in range(index.shape[-1])
    ]
    return each[0]._replace(
        log_probs=torch.stack([found.log_probs for found in each], dim=-1),
        log_prob_terms=torch.stack([found.log_prob_terms for found in each], dim=-1),
        grad=torch.stack([found.grad for found in each]).sum(0),
        grad_terms=torch.stack([found.grad_terms for found in each]).sum(0),
    )


# Plain torch ----------------------------------------------------------------------------------------------------------


def plain(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy by torch's functions, as programs compute them, in float32 (float64)."""
    z = logit_scale * logits.to(stats_dtype(logits.dtype))
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    ignored = target == ignore_index
    log_probs = log_p.gather(-1, target.masked_fill(ignored, 0)[..., None])[..., 0]
    p = log_p.exp()
    # Where p is 0 the product's gradient is 0 * -inf as well, so both factors are replaced.
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
    return log_probs.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


# Inputs ---------------------------------------------------------------------------------------------------------------


def token_target(logits: Tensor, *, logit_scale: float = 1.0, ignore_index: int | None = None) -> Tensor:
    """As make_target for logits [N, C], but every third row from the third has the first of its largest logits."""
    rows, classes = logits.shape
    target = make_target(rows, classes, logits.device, ignore_index=ignore_index)
    target[2::3] = (logits[2::3].cpu().double() * logit_scale).argmax(1).to(logits.device)
    return target


def with_masks(logits: Tensor, logit_scale: float = 1.0) -> Tensor:
    """Some of the logits [N, C] become -inf (once scaled), in each row others, a target's among them; never all."""
    rows, classes = logits.shape
    masked = torch.rand(rows, classes, generator=torch.Generator().manual_seed(classes)) < 0.3
    masked[range(rows), torch.arange(rows) % classes] = False
    return logits.masked_fill(masked.to(logits.device), -INF if logit_scale >= 0 else INF)


def temperatures(shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """One for each row, in [0.25, 4]."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(11))
    return (4 ** (2 * uniform - 1)).to(device)


def upstreams(shape: torch.Size, dtype: torch.dtype, device: torch.device, uses: str) -> tuple[Tensor | None, ...]:
    """Gradients of log_probs and entropy of logits in `dtype`; `uses` is "both", "log_probs" or "entropy"."""
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(shape, generator=generator).to(device, stats_dtype(dtype)) for _ in range(2)]
    return (grads[0] if uses != "entropy" else None, grads[1] if uses != "log_probs" else None)


def outputs_and_grad(
    logits: Tensor, target: Tensor, grads: tuple[Tensor | None, ...], *, consume: bool = False, **options: Any
) -> tuple[npu_xent.TokenLogProbs, Tensor]:
    """All outputs of token_log_probs, and the gradient that a backward with `grads` leaves in the logits.

    The leaf shares the memory and the strides of `logits`; what is consumed is a copy.
    """
    leaf = logits.detach().requires_grad_()
    taken = leaf.clone(memory_format=torch.contiguous_format) if consume else leaf
    out = npu_xent.token_log_probs(
        taken, target, **options, return_entropy=True, return_top1=True, consume_logits=consume
    )
    used = [(output, grad) for output, grad in zip(out[:2], grads, strict=True) if grad is not None]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))
    assert leaf.grad is not None
    return npu_xent.TokenLogProbs(*(t.detach() for t in out)), leaf.grad


# A small problem, and a loss ------------------------------------------------------------------------------------------

ROWS, CLASSES = 9, 21


def problem(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits, and targets some of which are ignored."""
    return make_logits(ROWS, CLASSES, dtype, device), make_target(ROWS, CLASSES, device, ignore_index=-100)


def loss_of(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """As a policy's: the mean log-probability, and a bonus for entropy."""
    out = npu_xent.token_log_probs(logits, target, return_entropy=True, **options)
    return -out.log_probs.mean() - 0.1 * out.entropy.mean()


def plain_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    log_probs, entropy = plain(logits, target, **options)
    return -log_probs.mean() - 0.1 * entropy.mean()
