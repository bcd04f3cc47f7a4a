"""The matrix products of the linear operators, for torch.utils.flop_counter: 2 N H C floating-point operations each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.npu_xent


@register_flop_formula(_ops.linear_row_stats)
def _logits(input_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """The logits of all rows, ignored ones too: a shape does not tell which are."""
    return 2 * input_shape[0] * input_shape[1] * weight_shape[0]


@register_flop_formula([_ops.linear_row_grad, _ops.linear_row_stats_grad])
def _logits_and_gradients(
    input_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, output_mask: Sequence[bool], **__: Any
) -> int:
    """The logits, and the gradients of input and weight that are wanted."""
    return _logits(input_shape, weight_shape) * (1 + sum(output_mask[:2]))
