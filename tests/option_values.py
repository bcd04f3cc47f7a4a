"""The values of options, and of what else a call may have, that covering arrays try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from reference import DTYPES, REDUCTIONS

from npu_xent._options import CROSS_ENTROPY, options_of

OPTION_VALUES: Mapping[str, Sequence[Any]] = {
    "dtype": DTYPES,
    "reduction": REDUCTIONS,
    "weighted": (False, True),
    # Which targets are ignored: none, those of the default, those of a class.
    "ignore_index": (None, -100, 1),
    "label_smoothing": (0.0, 0.1, 1.0),
    "lse_square_scale": (0.0, 0.1),
    "logit_scale": (1.0, 0.7),
    "softcap": (None, 2.0),
    "temperature": (1.0, 0.5),
    "loss_dtype": (None, torch.float32),
    "return_lse": (False, True),
    "return_z_loss": (False, True),
    "return_entropy": (False, True),
    "return_top1": (False, True),
    # Of the operators alone.
    "grad_scale": (None, 3.0),
    "temperature_by_row": (False, True),
}


def factors(*names: str, **own: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """The factors of a covering array: some of the above, by name, and its own."""
    return {name: OPTION_VALUES[name] for name in names} | own


def keywords(case: Mapping[str, Any]) -> dict[str, Any]:
    """The options of cross_entropy in a case. An ignore_index of None is left at its default."""
    chosen = {option.name: case[option.name] for option in options_of(CROSS_ENTROPY) if option.name in case}
    if "ignore_index" in chosen and chosen["ignore_index"] is None:
        del chosen["ignore_index"]
    return chosen
