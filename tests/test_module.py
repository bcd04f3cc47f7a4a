"""npu_xent.CrossEntropyLoss: what the function computes, as a module that has a state and prints itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from option_values import factors
from reference import (
    as_tuple,
    assert_same_bits,
    make_logits,
    make_target,
    make_weight,
    pairwise,
)

import npu_xent


def test_module_computes_what_the_function_does(device: torch.device) -> None:
    logits, target = make_logits(6, 9, torch.float32, device), make_target(6, 9, device, ignore_index=3)
    weight = make_weight(9, torch.float32, device)
    for options in pairwise(
        factors(
            *("reduction", "label_smoothing", "lse_square_scale", "softcap", "return_lse", "return_z_loss"),
            *("logit_scale", "loss_dtype"),
            ignore_index=(-100, 3),  # a class of the target
        )
    ):
        for w in (None, weight):
            actual = npu_xent.CrossEntropyLoss(w, **options)(logits, target)
            expected = npu_xent.cross_entropy(logits, target, w, **options)
            for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def test_modules_weight_is_a_buffer(device: torch.device) -> None:
    weight = make_weight(9, torch.float32, device)
    module = npu_xent.CrossEntropyLoss(weight)
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == ["weight"]
    other = npu_xent.CrossEntropyLoss(torch.ones(9, device=device))
    other.load_state_dict(module.state_dict())
    assert_same_bits(other.weight, weight)
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert npu_xent.CrossEntropyLoss().state_dict() == {}
    # torch's module has the same names: checkpoints fit.
    assert list(torch.nn.CrossEntropyLoss(weight).state_dict()) == ["weight"]


def test_module_prints_what_is_not_default(device: torch.device) -> None:
    assert repr(npu_xent.CrossEntropyLoss()) == "CrossEntropyLoss()"
    options = {
        "ignore_index": 0,
        "reduction": "sum",
        "label_smoothing": 0.1,
        "lse_square_scale": 0.5,
        "logit_scale": 0.5,
        "softcap": 30.0,
        "loss_dtype": torch.float64,
        "return_lse": True,
        "return_z_loss": True,
        "consume_logits": True,
    }
    printed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert repr(npu_xent.CrossEntropyLoss(**options)) == f"CrossEntropyLoss({printed})"
    weighted = npu_xent.CrossEntropyLoss(torch.ones(3, device=device), reduction="none")
    assert repr(weighted) == "CrossEntropyLoss(weight=..., reduction='none')"


def test_module_consumes_logits_if_told_to(device: torch.device) -> None:
    leaf = make_logits(3, 4, torch.float32, device).requires_grad_()
    logits, target = leaf * 1, make_target(3, 4, device)
    npu_xent.CrossEntropyLoss(consume_logits=True)(logits, target).backward()
    assert_same_bits(logits, leaf.grad)


@pytest.mark.parametrize("name", ["size_average", "reduce"])
@pytest.mark.parametrize("function", [npu_xent.cross_entropy, npu_xent.CrossEntropyLoss], ids=["function", "module"])
def test_deprecated_arguments_are_a_type_error_that_names_reduction(
    function: Callable[..., Any], name: str, device: torch.device
) -> None:
    logits, target = make_logits(3, 4, torch.float32, device), make_target(3, 4, device)
    arguments = (logits, target) if function is npu_xent.cross_entropy else ()
    with pytest.raises(TypeError, match="reduction"):
        function(*arguments, **{name: True})
