"""The loss as a torch.nn.Module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._options import CROSS_ENTROPY, check_flags, check_types, options_of
from ._overrides import not_scriptable
from .functional import CrossEntropyOutput, cross_entropy

_OPTIONS = options_of(CROSS_ENTROPY)
_TORCHS = nn.CrossEntropyLoss.__constants__


@not_scriptable("cross_entropy")
class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`cross_entropy` as a module; a torch.nn.CrossEntropyLoss, and a drop-in replacement for it.

    Args:
        weight: one weight per class, [C], or None. Registered as a buffer: it moves with the module and is part of its
            state_dict.
        size_average, ignore_index, reduce, reduction, label_smoothing: as for `cross_entropy`.
        lse_square_scale, logit_scale, softcap, loss_dtype, return_lse, return_z_loss, consume_logits: as for
            `cross_entropy`.

    module(input, target) returns and raises the same as `cross_entropy`. Type checkers see Any, as for every torch
    module. With return_lse or return_z_loss, annotate the result::

        output: npu_xent.CrossEntropyOutput = criterion(logits, target)
    """

    # Defaults for objects without these attributes: of an older npu_xent, unpickled, or of torch's class.
    lse_square_scale: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    loss_dtype: torch.dtype | None = None
    return_lse: bool = False
    return_z_loss: bool = False
    consume_logits: bool = False

    __constants__: list[str] = [*_TORCHS, *(o.name for o in _OPTIONS if o.name not in _TORCHS)]  # noqa: RUF012

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        loss_dtype: torch.dtype | None = None,
        return_lse: bool = False,
        return_z_loss: bool = False,
        consume_logits: bool = False,
    ) -> None:
        check_flags(
            "CrossEntropyLoss", return_lse=return_lse, return_z_loss=return_z_loss, consume_logits=consume_logits
        )
        options: dict[str, Any] = {
            "lse_square_scale": lse_square_scale,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "loss_dtype": loss_dtype,
            "return_lse": bool(return_lse),
            "return_z_loss": bool(return_z_loss),
            "consume_logits": bool(consume_logits),
        }
        torchs: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if size_average is not None or reduce is not None:  # they replace it
            torchs["reduction"] = "mean"
        checked = torchs | options
        check_types(CROSS_ENTROPY, checked)
        # Plain numbers and flags: torch would register a constant parameter as one of the module's.
        super().__init__(weight, size_average, checked["ignore_index"], reduce, reduction, checked["label_smoothing"])
        for name in options:
            setattr(self, name, checked[name])

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor
    ) -> Tensor | CrossEntropyOutput:
        """Return the loss of `input` against `target`."""
        options = {option.name: getattr(self, option.name) for option in _OPTIONS}
        output: Tensor | CrossEntropyOutput = cross_entropy(input, target, self.weight, **options)
        return output

    def extra_repr(self) -> str:
        """List the options that differ from their defaults."""
        given = [option.name for option in _OPTIONS if getattr(self, option.name) != option.default]
        options = [f"{name}={getattr(self, name)!r}" for name in given]
        return ", ".join([*(["weight=..."] if self.weight is not None else []), *options])
