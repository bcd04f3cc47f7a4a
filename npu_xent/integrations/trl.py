"""Replaces the log-probabilities and entropies of TRL."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._linear import linear_cross_entropy
from .._log_probs import linear_token_log_probs, selected_log_probs, token_log_probs
from ._patch import FrameworkPatch, Replacement
from ._serves import INDICES, NO_CLASS, function_class, serves, serves_options

_UTILS = "trl.trainer.utils"
_HEAD = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 4096  # that are converted to float32 at a time, for the mean of their logits


def patch_trl() -> FrameworkPatch:
    """Replace the functions by which TRL's trainers compute log-probabilities and entropies with npu_xent's::

        from npu_xent.integrations.trl import patch_trl

        patch_trl()                         # from here on

    They are these of trl.trainer.utils, under all names that TRL's modules have for them:

    - `_ChunkedLogProbFunction`, the fused head of SFT, DPO, KTO, GRPO, RLOO and async GRPO:
      npu_xent.linear_token_log_probs
    - `selective_log_softmax`: npu_xent.token_log_probs; with an index [..., K] npu_xent.selected_log_probs
    - `entropy_from_logits` and `selective_log_softmax_and_entropy`: npu_xent.token_log_probs

    npu_xent serves dense cpu and npu tensors: float32, bfloat16 and float16, and on the CPU, except for the fused head,
    float64. TRL's own functions get all other calls: other devices and dtypes; DTensors; a head whose parameters
    DeepSpeed partitions (ZeRO-3); the output log_sum_sq_probs of the fused head, which DPO asks for with
    `use_weighting`; a temperature or softcap outside of [1e-6, 1e6]; shapes that need broadcasting; logits [C];
    transforms of torch.func and forward-mode derivatives.

    What changes:

    - Log-probabilities and entropies of 16-bit logits are float32, as TRL's kernels for CUDA return them.
    - A logit of -inf adds nothing to the entropy, which in TRL becomes NaN. A row with +inf is NaN.
    - An index out of range raises IndexError on the CPU, and makes its row NaN on an NPU. The fused head takes -100 as
      an ignored row, whose outputs are 0; TRL's trainers pass none.
    - is_top1 compares the logits before the softcap.
    - Under autocast the fused head's gradients are rounded once to autocast's dtype, as F.linear's are.
    - A second derivative raises RuntimeError.

    The chunk sizes of TRL are not used; npu_xent chooses its own.

    Returns:
        A handle, also a context manager, whose remove() undoes the patch. Patches nest.

    Raises:
        RuntimeError: TRL is not installed, or one of its functions has another signature.
    """
    head = "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
    both = "logits index entropy_requires_grad temperature row_mask"
    return FrameworkPatch(
        "patch_trl",
        "trl",
        "1.16.0",
        [
            Replacement(_UTILS, "_ChunkedLogProbFunction", tuple(head.split()), _head_function),
            Replacement(_UTILS, "selective_log_softmax", ("logits", "index", "temperature", "row_mask"), _selective),
            Replacement(_UTILS, "entropy_from_logits", ("logits", "chunk_size"), _entropy),
            Replacement(_UTILS, "selective_log_softmax_and_entropy", tuple(both.split()), _selective_and_entropy),
        ],
    )


def _head_function(original: Any) -> Any:
    return function_class(original, _head)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("log_sum_sq_probs",),  # TRL's default is all
) -> tuple[Tensor | None, ...] | None:
    """The outputs of the fused head, or None for what is left to TRL."""
    parameters = [weight] if bias is None else [weight, bias]
    if (
        "log_sum_sq_probs" in outputs
        or not serves(hidden, targets, *parameters)
        or any(t.dtype not in _HEAD for t in (hidden, *parameters))
        or any(hasattr(p, "ds_id") for p in parameters)
        or not serves_options(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
        or (hidden.dim(), weight.dim()) != (2, 2)
        or targets.shape != hidden.shape[:1]
        or targets.dtype not in INDICES
    ):
        return None
    if not torch.is_autocast_enabled(hidden.device.type):
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    scale = float(logit_scale)
    out = linear_token_log_probs(
        hidden,
        weight,
        targets,
        linear_bias=bias,
        temperature=float(temperature),
        softcap=softcap,
        logit_scale=scale,
        return_entropy="entropy" in outputs,
        return_top1="is_top1" in outputs,
    )
    log_probs, entropy, top1 = (out, None, None) if isinstance(out, Tensor) else out
    mean = None
    if "mean_logits" in outputs:
        mean = _mean_logits(hidden, weight, bias, targets, softcap, scale) / temperature
    return log_probs, entropy, None, mean, top1


@torch.no_grad()
def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """The mean of each row's logits, scaled and capped, in float32."""
    if softcap is None:
        mean_weight = weight.mean(0, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            mean = torch.cat([torch.mv(rows.float(), mean_weight) for rows in hidden.split(_ROWS)])
        return logit_scale * (mean if bias is None else mean + bias.mean(dtype=torch.float32))
    # The loss of uniform class probabilities is lse - mean.
    out = linear_cross_entropy(
        hidden,
        weight,
        torch.zeros_like(targets),
        linear_bias=bias,
        reduction="none",
        label_smoothing=1.0,
        softcap=softcap,
        logit_scale=logit_scale,
        loss_dtype=torch.float32,
        return_lse=True,
    )
    assert out.lse is not None
    return out.lse - out.loss


def _selective(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if _serves_rows(logits, index, temperature, row_mask):
            return token_log_probs(
                logits, _masked(index, row_mask), temperature=float(temperature), ignore_index=NO_CLASS
            )
        if row_mask is None and _serves(logits, index, temperature) and index.shape[:-1] == logits.shape[:-1]:
            return selected_log_probs(logits, index, temperature=float(temperature))
        return original(logits, index, temperature, row_mask)

    return selective_log_softmax


def _entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        if serves(logits) and logits.dim() > 0:
            target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
            out = token_log_probs(logits, target, return_entropy=True)
            assert out.entropy is not None
            return out.entropy
        return original(logits, chunk_size)

    return entropy_from_logits


def _selective_and_entropy(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(original)
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not _serves_rows(logits, index, temperature, row_mask):
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        out = token_log_probs(
            logits,
            _masked(index, row_mask),
            temperature=float(temperature),
            ignore_index=NO_CLASS,
            return_entropy=True,
        )
        assert out.entropy is not None
        return out.log_probs, out.entropy if entropy_requires_grad else out.entropy.detach()

    return selective_log_softmax_and_entropy


def _serves(logits: Any, index: Any, temperature: Any) -> bool:
    """Whether they are served, if their shapes fit."""
    return (
        serves(logits, index)
        and logits.dim() > 1
        and index.dtype in INDICES
        and serves_options(temperature=temperature)
    )


def _serves_rows(logits: Any, index: Any, temperature: Any, row_mask: Any) -> bool:
    """Whether they are, with one index for each row, and a mask, if any, of each."""
    masks = [] if row_mask is None else [row_mask]
    return (
        _serves(logits, index, temperature)
        and serves(logits, *masks)
        and index.shape == logits.shape[:-1]
        and all(mask.shape == index.shape for mask in masks)
    )


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    """The index that leaves out the rows where the mask is 0."""
    return index if row_mask is None else index.masked_fill(row_mask == 0, NO_CLASS)
