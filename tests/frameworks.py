"""What the tests of the patched frameworks share."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-5  # of float32


def import_without_torch_npu(name: str, *more: str) -> ModuleType:
    """The first of these modules, after all were imported.

    transformers would import an installed torch_npu, without which these tests run and CANN may be missing.
    """
    find_spec = importlib.util.find_spec

    def find(wanted: str, package: str | None = None) -> Any:
        return None if wanted == "torch_npu" else find_spec(wanted, package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find)
        for other in more:
            importlib.import_module(other)
        return importlib.import_module(name)


class Calls(TorchDispatchMode):
    """Counts our primitives that read logits in a forward: `row_stats`, `linear_row_stats`, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu_xent" and "stats" in str(func):
            self.of[func._schema.name.removeprefix("npu_xent::")] += 1
        return func(*args, **(kwargs or {}))


def results(function: Callable[..., Any], *inputs: Tensor | None) -> tuple[list[Tensor | None], list[Tensor]]:
    """What the function returns of copies of the inputs, and the gradients of those that require one.

    The loss is a sum with random weights of all differentiable outputs, the same for the same shapes.
    """
    copies = [x if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    returned = function(*copies)
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    draw = torch.Generator().manual_seed(7)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=draw, dtype=torch.float64)).sum()
        for x in outputs
        if x is not None and x.requires_grad
    )
    wanted = [x for x in copies if x is not None and x.requires_grad]
    gradients = list(torch.autograd.grad(loss, wanted)) if isinstance(loss, Tensor) and wanted else []
    return [x if x is None else x.detach() for x in outputs], gradients


def error(found: Tensor, truth: Tensor) -> float:
    """The largest error, in units of the truth's largest value."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-3))


def rms(found: Tensor, truth: Tensor) -> float:
    """The root of the mean square of the errors, in units of the truth's."""
    return float((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def compare(
    patch: Callable[[], AbstractContextManager[Any]],
    function: Callable[..., Any],
    truth: Callable[..., Any],
    *draws: Sequence[Tensor | None],
    calls: dict[str, int],
    rounds: bool,
) -> None:
    """Runs a framework's function without and with the patch, and compares outputs and gradients with the truth.

    `calls` are those of our operators for each draw. Outputs have the dtype of the framework's function; only if it
    `rounds`, they may be float32 instead, and are not farther from the truth than the framework's, on average: of a few
    draws, by no more than a tenth.
    """
    errors: dict[int, list[tuple[float, float]]] = {}
    for inputs in draws:
        theirs = results(function, *inputs)
        doubles = (x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
        exact = results(truth, *doubles)
        with patch(), Calls() as seen:
            ours = results(function, *inputs)
        assert seen.of == calls
        triples = zip([*theirs[0], *theirs[1]], [*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True)
        for number, (original, found, true) in enumerate(triples):
            if original is None or found is None or true is None:
                assert original is found is true
                continue
            assert original.shape == found.shape
            assert found.dtype in ((original.dtype, torch.float32) if rounds else (original.dtype,))
            if found.dtype is torch.bool:
                assert torch.equal(original, found)
            elif rounds:
                errors.setdefault(number, []).append((rms(original, true), rms(found, true)))
            else:
                assert error(found, true) <= TOLERANCE
    for number, of_draws in errors.items():
        their_error, our_error = (sum(values) / len(draws) for values in zip(*of_draws, strict=True))
        assert our_error <= 1.1 * their_error + 1e-6, f"output or gradient {number}"
