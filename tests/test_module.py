"""npu_xent.CrossEntropyLoss: what the function computes, as a module that has a state and prints itself."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

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
from torch.nn import functional as F

import npu_xent
from npu_xent.compat import unit_scaling


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


DEPRECATED = [(average, reduce) for average in (None, True, False) for reduce in (None, True, False)][1:]


@pytest.mark.parametrize("size_average, reduce", DEPRECATED)
def test_deprecated_arguments_are_torchs(size_average: bool | None, reduce: bool | None, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    weight = make_weight(5, torch.float32, device)
    arguments = (weight, size_average, -100, reduce, "sum", 0.1)  # reduction is overruled
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected = F.cross_entropy(logits, target, *arguments)
        actual = npu_xent.cross_entropy(logits, target, *arguments)
        module = npu_xent.CrossEntropyLoss(*arguments)
    assert len({(str(w.message), w.category) for w in said}) == 1
    assert len(said) == 3
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(module(logits, target), expected)  # without another warning
    by_name = {"size_average": size_average, "reduce": reduce, "label_smoothing": 0.1}
    with pytest.warns(UserWarning, match="will be deprecated"):
        torch.testing.assert_close(npu_xent.cross_entropy(logits, target, weight, **by_name), expected)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments_compile(device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: npu_xent.cross_entropy(x, y, size_average=False), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(logits, target), F.cross_entropy(logits, target, reduction="sum"))


MODULES = {
    "ours": lambda: npu_xent.CrossEntropyLoss(torch.arange(1.0, 6.0), ignore_index=2, softcap=30.0, return_lse=True),
    "unit_scaling": lambda: unit_scaling.CrossEntropyLoss(2.0, ignore_index=2, reduction="sum"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_torchs_criterion(name: str) -> None:
    module = MODULES[name]()
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert set(torch.nn.CrossEntropyLoss.__constants__) < set(module.__constants__)
    assert set(module.__constants__) <= set(vars(module))
    assert "weight" in module._buffers
    module.weight = None  # as for any torch criterion
    assert list(module.buffers()) == []


def saved_and_loaded(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_copied_whole(name: str, copied: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    cpu = torch.device("cpu")
    logits, target = make_logits(6, 5, torch.float32, cpu), make_target(6, 5, cpu, ignore_index=2)
    module = MODULES[name]()
    other = copied(module)
    assert repr(other) == repr(module)
    for a, b in zip(as_tuple(other(logits, target)), as_tuple(module(logits, target)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_module_made_inside_a_forward_compiles(device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: npu_xent.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)(x, y),
        backend="aot_eager",
        fullgraph=True,
    )
    expected = F.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(compiled(logits, target), expected)


def test_objects_without_our_options_have_the_defaults(device: torch.device) -> None:
    """Of torch's class, or pickled before an option was added."""
    criterion = torch.nn.CrossEntropyLoss(reduction="sum")
    criterion.__class__ = npu_xent.CrossEntropyLoss
    logits, target = make_logits(6, 9, torch.float32, device), make_target(6, 9, device)
    assert repr(criterion) == "CrossEntropyLoss(reduction='sum')"
    assert torch.equal(criterion(logits, target), npu_xent.cross_entropy(logits, target, reduction="sum"))


def test_one_hot_integers_are_refused_with_advice(device: torch.device) -> None:
    logits, target = make_logits(6, 9, torch.float32, device), make_target(6, 9, device)
    one_hot = torch.nn.functional.one_hot(target, 9)
    with pytest.raises(ValueError, match=r"pass target.argmax\(1\), or target.float\(\) as probabilities"):
        npu_xent.cross_entropy(logits, one_hot)
