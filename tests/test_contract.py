"""npu_cross_entropy_loss: the documented contract of the vendor's operator, enforced with strict and lifted without.

Every rule of npu_xent/_constraints.py has a call that breaks it and nothing else. What strict=False lifts is then
computed and compared with the truth. The four outputs are in test_contract_outputs.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from reference import (
    NAN,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    make_logits,
    make_target,
    truth,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent
from npu_xent import ConstraintError, npu_cross_entropy_loss

ROWS, CLASSES = 4, 6


def arguments(device: torch.device, **changed: Any) -> dict[str, Any]:
    """A call that keeps every rule, with some arguments changed; a callable is called with the device."""
    kept = {
        "input": make_logits(ROWS, CLASSES, torch.float32, device),
        "target": make_target(ROWS, CLASSES, device),
    }
    return kept | {name: value(device) if callable(value) else value for name, value in changed.items()}


def zeros(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Callable[..., Tensor]:
    """Zeros on the device of the test."""
    return lambda device: torch.zeros(shape, dtype=dtype, device=device, requires_grad=requires_grad)


def weight_with(value: float) -> Callable[..., Tensor]:
    """Class weights of which the one at 2 is `value`."""
    return lambda device: torch.ones(CLASSES, device=device).index_fill_(0, torch.tensor(2, device=device), value)


class Rule(NamedTuple):
    """A call that breaks one rule."""

    changed: dict[str, Any]  # arguments
    rule: str  # as the error quotes it
    seen: str  # the value, as quoted
    lifted: type[Exception] | None = None  # with strict=False: None if it works, else the operator's own error


TRAINING = zeros(ROWS, CLASSES, requires_grad=True)
RULES = {
    "input of one dimension": Rule({"input": zeros(6)}, "input must have shape [N, C]", "[6]", ValueError),
    "input in float64": Rule(
        {"input": zeros(ROWS, CLASSES, dtype=torch.float64)},
        "the dtype of input must be float16, float32 or bfloat16",
        "torch.float64",
    ),
    "input of integers": Rule(
        {"input": zeros(ROWS, CLASSES, dtype=torch.int32)},
        "the dtype of input must be float16, float32 or bfloat16",
        "torch.int32",
        TypeError,
    ),
    "no rows": Rule(
        {"input": zeros(0, CLASSES), "target": zeros(0, dtype=torch.int64)},
        "N, the rows of input, must lie in (0, 200000]",
        "N is 0",
    ),
    "too many rows": Rule(
        {"input": zeros(200_001, 2), "target": zeros(200_001, dtype=torch.int64)},
        "N, the rows of input, must lie in (0, 200000]",
        "N is 200001",
    ),
    "no classes": Rule(
        {"input": zeros(ROWS, 0)}, "C, the columns of input, must be greater than 0", "C is 0", ValueError
    ),
    "target of another length": Rule(
        {"target": zeros(3, dtype=torch.int64)}, "target must have shape [N]", "[3] and N is 4", ValueError
    ),
    "target of two dimensions": Rule(
        {"target": zeros(ROWS, 1, dtype=torch.int64)}, "target must have shape [N]", "[4, 1] and N is 4", ValueError
    ),
    "target in int32": Rule(
        {"target": zeros(ROWS, dtype=torch.int32)}, "the dtype of target must be int64", "torch.int32"
    ),
    "target of floats": Rule({"target": zeros(ROWS)}, "the dtype of target must be int64", "torch.float32", TypeError),
    "input of three dimensions": Rule(
        {"input": zeros(2, 2, 6), "target": zeros(2, 2, dtype=torch.int64)},
        "input must have shape [N, C]",
        "[2, 2, 6]",
        ValueError,
    ),
    "complex input": Rule(
        {"input": zeros(ROWS, CLASSES, dtype=torch.complex64)},
        "the dtype of input must be float16, float32 or bfloat16",
        "torch.complex64",
        TypeError,
    ),
    "weight in a third dtype": Rule(
        {"weight": zeros(CLASSES, dtype=torch.bfloat16)},
        "the dtype of weight must be float32",
        "torch.bfloat16",
        TypeError,
    ),
    "weight of another length": Rule({"weight": zeros(5)}, "weight must have shape [C]", "[5] and C is 6", ValueError),
    "weight in the dtype of input": Rule(
        {"input": zeros(ROWS, CLASSES, dtype=torch.float16), "weight": zeros(CLASSES, dtype=torch.float16)},
        "the dtype of weight must be float32",
        "torch.float16",
    ),
    "unknown reduction": Rule(
        {"reduction": "batchmean"}, 'reduction must be "mean", "sum" or "none"', "'batchmean'", ValueError
    ),
    "ignore_index = C": Rule({"ignore_index": 6}, "ignore_index must be less than C", "it is 6 and C is 6"),
    "label_smoothing = 1": Rule({"label_smoothing": 1.0}, "label_smoothing must lie in [0, 1)", "it is 1.0"),
    "label_smoothing < 0": Rule(
        {"label_smoothing": -0.1}, "label_smoothing must lie in [0, 1)", "it is -0.1", ValueError
    ),
    "label_smoothing > 1": Rule(
        {"label_smoothing": 1.5}, "label_smoothing must lie in [0, 1)", "it is 1.5", ValueError
    ),
    "a negative z-loss": Rule(
        {"lse_square_scale_for_zloss": -0.5},
        "lse_square_scale_for_zloss is documented with the range [0, 1) but not enabled and must be 0",
        "it is -0.5",
        ValueError,
    ),
    "an infinite z-loss": Rule(
        {"lse_square_scale_for_zloss": float("inf")},
        "lse_square_scale_for_zloss is documented with the range [0, 1) but not enabled and must be 0",
        "it is inf",
        ValueError,
    ),
    "a z-loss": Rule(
        {"lse_square_scale_for_zloss": 0.5},
        "lse_square_scale_for_zloss is documented with the range [0, 1) but not enabled and must be 0",
        "it is 0.5",
    ),
    "return_zloss": Rule(
        {"return_zloss": True}, "return_zloss is documented but not enabled and must be False", "it is True"
    ),
    "mean with weight, training": Rule(
        {"input": TRAINING, "weight": weight_with(0.5)},
        "with input.requires_grad and reduction 'mean', weight must keep its default None",
        "a tensor was given",
    ),
    "mean with ignore_index, training": Rule(
        {"input": TRAINING, "ignore_index": 3},
        "with input.requires_grad and reduction 'mean', ignore_index must keep its default -100",
        "it is 3",
    ),
    **{
        f"{reduction} with label_smoothing, training": Rule(
            {"input": TRAINING, "reduction": reduction, "label_smoothing": 0.1},
            f"with input.requires_grad and reduction '{reduction}', label_smoothing must keep its default 0.0",
            "it is 0.1",
        )
        for reduction in REDUCTIONS
    },
}
NAMES = [pytest.param(name, marks=pytest.mark.float64) if "float64" in name else name for name in RULES]
WEIGHT_VALUES = [0.0, -0.5, 1.0000001, NAN]


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_rule_is_quoted_with_the_value_seen_and_the_way_out(name: str, device: torch.device) -> None:
    broken = RULES[name]
    with pytest.raises(ConstraintError) as raised:
        npu_cross_entropy_loss(**arguments(device, **broken.changed))
    rule, _, rest = str(raised.value).partition(", but ")
    assert rule.startswith(f"npu_cross_entropy_loss: {broken.rule}")
    seen, _, way_out = rest.partition(". ")
    assert broken.seen in seen
    lifts = way_out == "Pass strict=False to lift the documented restrictions, or call npu_xent.cross_entropy."
    assert lifts == (broken.lifted is None)  # strict=False is named where it helps, and nowhere else
    assert lifts or (way_out.endswith(".") and "strict" not in way_out)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("name", NAMES)
def test_strict_false_lifts_the_rule(name: str, device: torch.device) -> None:
    """What is left are the operator's own demands."""
    call = arguments(device, **RULES[name].changed)
    lifted = RULES[name].lifted
    if lifted is not None:
        with pytest.raises(lifted) as raised:
            npu_cross_entropy_loss(**call, strict=False)
        assert not isinstance(raised.value, ConstraintError)
        return
    loss = npu_cross_entropy_loss(**call, strict=False)[0]
    renamed = {"lse_square_scale": call.pop("lse_square_scale_for_zloss", 0.0)}
    call.pop("return_zloss", None)
    logits = call.pop("input")
    expected = truth(logits, **call, **renamed)
    assert_near(loss.view(expected.loss.shape), expected.loss, expected.loss_terms)


@pytest.mark.cpu  # looking at values elsewhere would mean waiting
@pytest.mark.parametrize("value", WEIGHT_VALUES, ids=str)
def test_weights_lie_between_0_and_1(value: float, device: torch.device) -> None:
    call = arguments(device, weight=weight_with(value))
    seen = f"weight[2] is {float(call['weight'][2])}"
    with pytest.raises(ConstraintError, match=re.escape(f"the values of weight must lie in (0, 1], but {seen}.")):
        npu_cross_entropy_loss(**call)
    loss = npu_cross_entropy_loss(**call, strict=False)[0]
    expected = truth(call.pop("input"), **call)
    assert_near(loss, expected.loss.view(1), expected.loss_terms)


@pytest.mark.cpu  # on an NPU the row is NaN
@pytest.mark.parametrize("bad", [CLASSES, 77, -1, -5, 2**62])
def test_a_target_out_of_range_breaks_the_contract_and_is_an_index_error(bad: int, device: torch.device) -> None:
    call = arguments(device, target=torch.tensor([0, 1, bad, 2]))
    for error in (ConstraintError, IndexError):
        with pytest.raises(error, match=rf"target\[2\] is {bad}, which is neither a class in \[0, {CLASSES}\)"):
            npu_cross_entropy_loss(**call)
    with pytest.raises(IndexError) as raised:
        npu_cross_entropy_loss(**call, strict=False)
    assert not isinstance(raised.value, ConstraintError)


def test_every_rule_of_the_module_is_tested_here() -> None:
    """A rule added to _constraints.py without a line in RULES fails this."""
    source = inspect.getsource(npu_xent._constraints)
    # One _require for each rule.
    rules = len(re.findall(r"^    +_require\(", source, re.MULTILINE))
    prefixes = {broken.rule.removeprefix("with input.requires_grad and reduction ") for broken in RULES.values()}
    # Two reductions more share the one line about label_smoothing; the weight's values have a test of their own.
    assert rules == len(prefixes) - 2 + 1


@pytest.mark.parametrize(
    "changed",
    [
        {"input": zeros(200_000, 1), "target": zeros(200_000, dtype=torch.int64)},
        {"input": zeros(1, 1), "target": zeros(1, dtype=torch.int64)},
        {"ignore_index": 5},
        {"ignore_index": -1},
        {"label_smoothing": 0.999},
        {"weight": weight_with(1e-30), "ignore_index": 3, "label_smoothing": 0.1},
        {"input": TRAINING},
        {"input": TRAINING, "reduction": "sum", "weight": weight_with(0.5), "ignore_index": 3},
        {"input": TRAINING, "reduction": "none", "weight": weight_with(0.5), "ignore_index": 3},
    ],
    ids=lambda changed: " ".join(key if callable(value) else f"{key}={value}" for key, value in changed.items()),
)
def test_what_the_rules_allow(changed: dict[str, Any], device: torch.device) -> None:
    call = arguments(device, **changed)
    loss, log_prob, _, _ = npu_cross_entropy_loss(**call)
    assert loss.isfinite().all()
    assert log_prob.shape == call["input"].shape


def test_rules_on_training_hold_only_while_training(device: torch.device) -> None:
    call = arguments(device, weight=weight_with(0.5), ignore_index=3, label_smoothing=0.1)
    without = npu_cross_entropy_loss(**call)
    call["input"] = call["input"].clone().requires_grad_()
    with pytest.raises(ConstraintError):
        npu_cross_entropy_loss(**call)
    with torch.no_grad():
        for actual, expected in zip(npu_cross_entropy_loss(**call), without, strict=True):
            assert_same_bits(actual, expected)


def test_rules_are_checked_before_any_work(device: torch.device) -> None:
    """Before the target's values are looked at, and before an operator is called."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    called: list[Any] = []
    call = arguments(device, target=torch.tensor([0, 1, 77, -5], device=device))
    with Calls(), pytest.raises(ConstraintError, match="ignore_index"):
        npu_cross_entropy_loss(**call, ignore_index=CLASSES)
    assert called == []
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"target\[2\] is 77"):
            npu_cross_entropy_loss(**call)


def test_fake_tensors_pass_the_strict_rules(device: torch.device) -> None:
    """A weight that has no values cannot be checked for them, and need not be."""
    with FakeTensorMode():
        loss, log_prob, zloss, lse = npu_cross_entropy_loss(**arguments(device, weight=weight_with(0.5)))
    assert [tuple(t.shape) for t in (loss, log_prob, zloss, lse)] == [(1,), (ROWS, CLASSES), (0,), (0,)]


def test_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(npu_cross_entropy_loss).parameters
    documented = {
        "input": inspect.Parameter.empty,
        "target": inspect.Parameter.empty,
        "weight": None,
        "reduction": "mean",
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "lse_square_scale_for_zloss": 0.0,
        "return_zloss": False,
    }
    positional = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == documented
    assert list(positional) == list(documented)
    assert list(parameters)[len(documented) :] == ["loss_dtype", "need_log_prob", "strict"]
    assert parameters["strict"].default is True
