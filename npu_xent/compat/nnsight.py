"""nnsight's cross_entropy_loss: a mean of row means over a batch of token sequences.

The original is nnsight.util.cross_entropy_loss, identical in nnsight 0.0.8 to 0.1.18 and absent from 0.2.4 on. Its
documentation page calls the module nnsight.utils, a name that none of these releases uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._options import check_flags
from .._tensors import check_tensors, is_autocast_on, require_storages
from ..functional import cross_entropy

IGNORE_INDEX = -100


def cross_entropy_loss(
    logits: Tensor,
    target_ids: Tensor,
    shift: bool = False,
    avg_batch: bool = True,
    avg_token: bool = True,
) -> Tensor:
    """Cross entropy of each sequence of a batch, as nnsight.util.cross_entropy_loss computes it.

    Args:
        logits: [B, T, C], or [T, C] for a batch of one; float32, bfloat16, float16 or float64.
        target_ids: [B, T], or [T] for a batch of one; class indices in [0, C), or -100 for tokens to ignore.
            Converted to int64.
        shift: score the logits of each token against the next token: drops the last logits and the first target of each
            sequence.
        avg_batch: mean over the sequences.
        avg_token: mean over the tokens of each sequence that are not ignored.

    Returns:
        The loss, on the CPU, in the dtype of logits (float32 under autocast). Its shape is [] with both means, [T]
        without avg_token, [B] without avg_batch, [B, T] with neither; T is one less with shift. With both means it is
        a mean of row means, not a mean over tokens. A sequence with only ignored tokens is NaN.

    Raises:
        AssertionError: ranks, batch or length of logits and target_ids differ.
        ValueError, IndexError, TypeError, RuntimeError: as npu_xent.cross_entropy.

    Differs from the original on purpose: it computes on the device of the logits and moves only the result to the CPU;
    target_ids may be on another device; it shifts the targets instead of copying the logits; means are taken in float32
    and rounded once; an empty batch gives NaN or an empty tensor instead of an error.
    (Prefer shift=True to slicing the logits: a slice of a batch costs a copy.)

    Where the original's documentation page and its code differ, this function does what the code does:

    - The page says that shift removes the first column of logits. The code drops the last logits.
    - The page says that the result has shape [B] without avg_batch. The code returns [B, T] if avg_token is False too.
    - The page asks for both tensors on one device. The code moves both to the CPU, so they may be on different ones.
    """
    check_tensors("compat.nnsight.cross_entropy_loss", logits=logits, target_ids=target_ids)
    check_flags("compat.nnsight.cross_entropy_loss", shift=shift, avg_batch=avg_batch, avg_token=avg_token)
    require_storages(logits=logits, target_ids=target_ids)
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    if target_ids.dim() == 1:
        target_ids = target_ids.unsqueeze(0)
    if logits.dim() != 3 or logits.shape[:2] != target_ids.shape:
        raise AssertionError(
            "nnsight.cross_entropy_loss: logits must have shape [B, T, C] and target_ids [B, T], but they have "
            f"{list(logits.shape)} and {list(target_ids.shape)}"
        )
    batch, length, _ = logits.shape
    target = target_ids.to(logits.device, torch.int64)
    if shift and length:
        nothing = target.new_full((batch, 1), IGNORE_INDEX)
        target = torch.cat([target[:, 1:], nothing], dim=1)
    loss: Tensor = cross_entropy(
        logits.flatten(0, 1),
        target.reshape(-1),
        reduction="none",
        ignore_index=IGNORE_INDEX,
        loss_dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32,
    )
    loss = loss.view(batch, length)
    if avg_token:
        loss = loss.sum(1) / target.ne(IGNORE_INDEX).sum(1)
    elif shift:
        loss = loss[:, : max(length - 1, 0)]
    if avg_batch:
        loss = loss.mean(0)
    if not is_autocast_on(logits):
        loss = loss.to(logits.dtype)
    return loss.cpu()
