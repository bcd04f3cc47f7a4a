"""The loss as a torch.nn.Module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import CrossEntropyOutput, cross_entropy, refuse_deprecated


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` as a module, in the place of torch.nn.CrossEntropyLoss.

    Args:
        weight: a weight for each class, [C], or None. Kept as a buffer: it moves with the module, and is in its
            state_dict.
        ignore_index: this and what follows, as `cross_entropy` takes them.
        reduction, label_smoothing, lse_square_scale, softcap, return_lse, return_z_loss, consume_logits: likewise.
        **deprecated: likewise.

    Called as module(input, target), it returns and raises what `cross_entropy` does.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        return_lse: bool = False,
        return_z_loss: bool = False,
        consume_logits: bool = False,
        **deprecated: Any,
    ) -> None:
        super().__init__()
        refuse_deprecated("CrossEntropyLoss", deprecated)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.lse_square_scale = lse_square_scale
        self.softcap = softcap
        self.return_lse = return_lse
        self.return_z_loss = return_z_loss
        self.consume_logits = consume_logits

    def forward(self, input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """The loss of `input` against `target`."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            return_lse=self.return_lse,
            return_z_loss=self.return_z_loss,
            consume_logits=self.consume_logits,
        )

    def extra_repr(self) -> str:
        """The options that are not at their defaults."""
        defaults = {
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "lse_square_scale": 0.0,
            "softcap": None,
            "return_lse": False,
            "return_z_loss": False,
            "consume_logits": False,
        }
        options = [
            f"{name}={getattr(self, name)!r}" for name, default in defaults.items() if getattr(self, name) != default
        ]
        return ", ".join([*(["weight=..."] if self.weight is not None else []), *options])
