"""The programs of docs/frameworks.md that need no patch: Lightning's and accelerate's train with our losses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import npu_xent

pytestmark = pytest.mark.cpu
PAGE = Path(__file__).resolve().parent.parent / "docs" / "frameworks.md"


def program(section: str) -> str:
    """The code of a section of the page."""
    found = re.search(rf"^## {section}$.*?^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"the page has no program for {section}"
    return found[1]


def torchs(*args: Tensor, **options: Any) -> Tensor:
    """Instead of either loss: of hidden states, a weight and targets, or of logits and targets."""
    if len(args) == 3:
        args = (F.linear(*args[:2]).flatten(0, -2).float(), args[2].flatten())
    return F.cross_entropy(args[0].float(), args[1])


@pytest.mark.parametrize(
    ("section", "package", "loss", "dtype"),
    [
        ("Lightning", "lightning", "linear_cross_entropy", torch.float32),
        ("accelerate", "accelerate", "cross_entropy", torch.bfloat16),
    ],
)
def test_the_program_trains(
    section: str, package: str, loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with PyTorch's loss; ours gets each of the four batches, and in bfloat16 the logits as the head makes them."""
    pytest.importorskip(package)
    calls = list[torch.dtype]()

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor, **options: Any) -> Tensor:
            calls.append(args[0].dtype)
            return function(*args, **options)

        return call

    trained = []
    for function in (getattr(npu_xent, loss), torchs):
        monkeypatch.setattr(npu_xent, loss, counted(function))
        names: dict[str, Any] = {"__name__": section}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's, of small data sets
            exec(program(section), names)
        trained.append(list(names["model"].parameters()))
    assert calls == [dtype] * 8
    for mine, expected in zip(*trained, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4 if dtype is torch.float32 else 2e-3)
