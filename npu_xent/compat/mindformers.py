"""mindformers' CrossEntropyLoss: a loss weighted by an input mask, for torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._loading import prepare

IGNORE_INDEX = -100
EPSILON = 1e-8


class CrossEntropyLoss(nn.Module):
    """Cross entropy weighted by a mask, as mindformers.core.loss.CrossEntropyLoss computes it.

    Args:
        parallel_config: an object or mapping with data_parallel and model_parallel, or None. The classes of the logits
            are sharded over model_parallel there; only 1 is supported here.
        check_for_nan_in_loss_and_grad: print the local loss (it changes nothing else, as in the original).
        calculate_per_token_loss: return numerator and denominator instead of their quotient.
        **kwargs: accepted and ignored, as in the original.

    Called as module(logits, label, input_mask):

    - logits: [N, C], float32, bfloat16, float16 or float64; computed in float32 (float64).
    - label: classes, [N] or any shape of N values, int32 or int64. Where input_mask is 0 it may be anything.
    - input_mask: the weight of each row, fractions included, N values in any shape.

    With l = -log_softmax(logits)[label], numerator = sum(l * input_mask), denominator = sum(input_mask) + 1e-8. Returns
    numerator / denominator, [1], float32 (float64 for a float64 mask or float64 logits); or with
    calculate_per_token_loss the pair (numerator [], denominator [1]). All rows masked: 0, with gradient 0.

    Raises:
        NotImplementedError: model_parallel above 1.
        TypeError: label is neither int32 nor int64, or logits have another dtype.
        ValueError: logits are not [N, C] with C > 0, or label or input_mask have not one value for each row.
        RuntimeError: N = 0, or input_mask requires a gradient.
        IndexError: a label outside [0, C) where input_mask is not 0, on the CPU; NaN on other devices.

    Differs from the original on purpose: a label out of range where input_mask is not 0 raises instead of counting as
    0; a bool mask counts its rows; NaN in a masked row does no harm; a mask of length 1 is not broadcast; float64
    logits give a float64 loss. No part in the transforms of torch.func.
    """

    def __init__(
        self,
        parallel_config: object | Mapping[str, Any] | None = None,
        check_for_nan_in_loss_and_grad: bool = False,
        calculate_per_token_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        model_parallel = _get(parallel_config, "model_parallel", 1)
        if model_parallel is not None and model_parallel > 1:
            raise NotImplementedError(
                f"mindformers.CrossEntropyLoss: parallel_config.model_parallel is {model_parallel}, which shards the "
                "classes over devices; that needs the vocab-parallel loss, which npu_xent does not have yet. Use "
                "model_parallel=1 with whole logits."
            )
        self.check_for_nan_in_loss_and_grad = check_for_nan_in_loss_and_grad
        self.calculate_per_token_loss = calculate_per_token_loss

    def forward(self, logits: Tensor, label: Tensor, input_mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The masked loss; see the class."""
        if logits.dim() != 2:
            raise ValueError(
                f"mindformers.CrossEntropyLoss: logits must have shape [N, C], but have shape {list(logits.shape)}; "
                "flatten the batch and the sequence"
            )
        if label.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"mindformers.CrossEntropyLoss: label must be int32 or int64, but is {label.dtype}")
        rows = logits.shape[0]
        for name, value in (("label", label), ("input_mask", input_mask)):
            if value.numel() != rows:
                raise ValueError(
                    f"mindformers.CrossEntropyLoss: {name} must have one value for each of the {rows} rows of logits, "
                    f"but has {value.numel()}"
                )
        if rows == 0:
            raise RuntimeError("mindformers.CrossEntropyLoss: logits have no rows, so there is nothing to average")
        if input_mask.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "mindformers.CrossEntropyLoss: input_mask requires a gradient, which is not computed; pass "
                "input_mask.detach()"
            )
        dtype = torch.float64 if torch.float64 in (logits.dtype, input_mask.dtype) else torch.float32
        mask = input_mask.reshape(-1).to(dtype)
        # A row of weight 0 is an ignored row: its logits are not read, its label not looked at.
        target = label.reshape(-1).to(torch.int64)
        masked = mask == 0
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = ((target < 0) | (target >= logits.shape[1])) & masked.logical_not()
            if bad.any():
                row = int(bad.nonzero()[0])
                raise IndexError(
                    f"mindformers.CrossEntropyLoss: label[{row}] is {int(target[row])}, which is not a class in "
                    f"[0, {logits.shape[1]}); set input_mask to 0 where there is nothing to predict"
                )
        # An ignored row must not be confused with a label that happens to be IGNORE_INDEX under the mask: that one is
        # moved to another value that is no class either, so that it is refused like any label out of range.
        target = torch.where(target == IGNORE_INDEX, IGNORE_INDEX - 1, target).masked_fill(masked, IGNORE_INDEX)
        prepare(logits)
        loss, _, _, _ = torch.ops.npu_xent.cross_entropy.default(
            logits, target, reduction="none", ignore_index=IGNORE_INDEX, loss_dtype=dtype
        )
        numerator = (loss * mask).sum()
        denominator = mask.sum().reshape(1) + EPSILON
        if self.check_for_nan_in_loss_and_grad:
            print("local loss: ", numerator / denominator)
        if self.calculate_per_token_loss:
            return numerator, denominator
        return numerator / denominator


def _get(config: object | Mapping[str, Any] | None, name: str, default: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)
