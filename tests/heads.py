"""A linear layer's tensors, whose logits are never all in memory, and how near to float64 its gradients must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The tensors that are differentiated; linear_bias may be None."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Head:
        return Head(*(None if t is None else function(t) for t in self))

    def leaves(self) -> Head:
        return self.map(lambda t: t.detach().clone().requires_grad_())


def make_head(
    rows: int, features: int, classes: int, dtype: torch.dtype, device: torch.device, *, bias: bool = True
) -> Head:
    """Logits of size 2 or so."""
    generator = torch.Generator().manual_seed(100 * rows + classes)
    head = Head(
        torch.randn(rows, features, generator=generator),
        torch.randn(classes, features, generator=generator) * 2 / features**0.5,
        torch.randn(classes, generator=generator) if bias else None,
    )
    return head.map(lambda t: t.to(device, dtype))


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value."""
    assert actual.shape == expected.shape
    difference = (actual.detach().cpu().double() - expected).abs()
    return float(difference.max() / expected.abs().max().clamp(min=1e-30)) if expected.numel() else 0.0


def assert_as_good(actual: Tensor, expected: Tensor, other: Tensor, name: str, slack: float = 1.0) -> None:
    """As near to the truth as what torch makes, or within two units in the last place of the largest value."""
    allowed = slack * max(error(other, expected), 2 * torch.finfo(actual.dtype).eps)
    assert error(actual, expected) <= allowed, (
        f"{name}: {error(actual, expected):.2e}, torch {error(other, expected):.2e}"
    )
