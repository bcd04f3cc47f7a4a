"""Direct calls on the CPU give the same bits as torch.ops, and modes and profilers still see them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from reference import assert_same_bits, loss_and_grad, make_logits, make_target, make_weight
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent
from npu_xent import _C, distributed

pytestmark = pytest.mark.cpu

CALLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "all options": {
        "ignore_index": 1,
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "logit_scale": 0.7,
        "softcap": 20.0,
        "loss_dtype": torch.float64,
    },
}


class Recording:
    """A mode's part that keeps the names of what the mode saw."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def record(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(Recording, TorchFunctionMode):
    """Records functions."""

    __torch_function__ = Recording.record


class Dispatched(Recording, TorchDispatchMode):
    """Records operators."""

    __torch_dispatch__ = Recording.record


class Subclass(Tensor):
    """Keeps the names of the functions that its tensors were passed to."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


SHARDED = (distributed.vocab_parallel_cross_entropy, distributed.vocab_parallel_token_log_probs)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def problem(request: pytest.FixtureRequest, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    logits = make_logits(9, 12, request.param, device)
    return logits, make_target(9, 12, device, ignore_index=1), make_weight(12, torch.float32, device)


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_results_are_those_of_the_operators(
    options: dict[str, Any], weighted: bool, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    """A dispatch mode disables the direct path."""
    logits, target, weight = problem
    arguments = (logits, target, weight if weighted else None)
    direct = loss_and_grad(npu_xent.cross_entropy, *arguments, **options)
    without = npu_xent.cross_entropy(*arguments, **options)
    with Dispatched() as mode:
        through = loss_and_grad(npu_xent.cross_entropy, *arguments, **options)
        inference = npu_xent.cross_entropy(*arguments, **options)
    assert "npu_xent.reduce_rows.default" in mode.names
    for ours, theirs in zip((*direct, without), (*through, inference), strict=True):
        assert_same_bits(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_a_usual_call_is_direct(device: torch.device) -> None:
    """Guards the other tests: this call takes the direct path, and its gradient too."""
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    assert _C.cross_entropy(logits, target, None, -100, "mean", 0.0, 0.0, 1.0, None, None) is not None
    program = """
import inspect, torch, npu_xent
def refuse(*args, **kwargs):
    raise AssertionError("a primitive was dispatched")
library = torch.library.Library("npu_xent", "IMPL")
newer = {"allow_override": True} if "allow_override" in inspect.signature(library.impl).parameters else {}
for name in ("row_stats", "row_stats_grad", "row_stats_grad_", "reduce_rows", "scale_"):
    library.impl(name, refuse, "CPU", **newer)
target = torch.zeros(3, dtype=torch.int64)
for consume in (False, True):
    logits = torch.zeros(3, 5, requires_grad=True)
    npu_xent.cross_entropy(logits * 1, target, consume_logits=consume).mul(2).backward()
npu_xent.cross_entropy(logits.detach(), target)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


MANY = torch.zeros(3, 21)
UNUSUAL: dict[str, Callable[[list[Any]], None]] = {
    "an integer for a number": lambda a: a.__setitem__(5, 0),
    "a flag for a number": lambda a: a.__setitem__(3, True),
    "an integer beyond int64": lambda a: a.__setitem__(3, 2**70),
    "no reduction": lambda a: a.__setitem__(4, None),
    "a reduction that is no text": lambda a: a.__setitem__(4, "\ud800"),
    "a reduction of another name": lambda a: a.__setitem__(4, "average"),
    "no tensor": lambda a: a.__setitem__(0, [1.0]),
    "no target": lambda a: a.__setitem__(1, None),
    "a target of int32": lambda a: a.__setitem__(1, a[1].int()),
    "a weight of a list": lambda a: a.__setitem__(2, [1.0] * 5),
    "three dimensions": lambda a: a.__setitem__(0, a[0][None]),
    "a dtype as text": lambda a: a.__setitem__(9, "float32"),
    "a meta tensor": lambda a: a.__setitem__(0, a[0].to("meta")),
    "a sparse tensor": lambda a: a.__setitem__(0, a[0].to_sparse()),
    "a view with the negative bit": lambda a: a.__setitem__(0, torch.complex(a[0], a[0]).conj().imag),
    "a subclass": lambda a: a.__setitem__(0, a[0].as_subclass(Subclass)),
    "no classes": lambda a: a.__setitem__(0, a[0][:, :0]),
    "probabilities of another dtype": lambda a: a.__setitem__(slice(0, 2), [MANY, MANY.double()]),
    "probabilities of another shape": lambda a: a.__setitem__(slice(0, 2), [MANY, MANY[:2]]),
    "probabilities and a class to ignore": lambda a: a.__setitem__(slice(0, 4), [MANY, MANY, None, 2]),
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_other_calls_are_left_to_python(change: Callable[[list[Any]], None], device: torch.device) -> None:
    arguments = [make_logits(3, 5, torch.float32, device), make_target(3, 5, device)]
    arguments += [None, -100, "mean", 0.0, 0.0, 1.0, None, None]
    change(arguments)
    assert _C.cross_entropy(*arguments) is None


def test_probabilities_are_direct_too(device: torch.device) -> None:
    """Except for forward-mode derivatives, which Python sees to."""
    logits, q = (make_logits(3, 21, torch.float32, device) for _ in range(2))
    direct = loss_and_grad(npu_xent.cross_entropy, logits, q, label_smoothing=0.1)
    with Dispatched() as mode:
        through = loss_and_grad(npu_xent.cross_entropy, logits, q, label_smoothing=0.1)
    assert "npu_xent.prob_row_grad.default" in mode.names
    for ours, theirs in zip(direct, through, strict=True):
        assert_same_bits(ours, theirs)
    usual = (None, -100, "mean", 0.0, 0.0, 1.0, None, None)
    assert _C.cross_entropy(logits, q, *usual) is not None
    with forward_ad.dual_level():
        for pair in ((forward_ad.make_dual(logits, q), q), (logits, forward_ad.make_dual(q, q))):
            assert _C.cross_entropy(*pair, *usual) is None


def test_too_few_arguments_are_left_to_python() -> None:
    assert _C.cross_entropy() is None


def test_modes_and_subclasses_see_the_call(device: torch.device, alone: None) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    with Functions() as functions:
        npu_xent.cross_entropy(logits, target)
    assert str(npu_xent.cross_entropy) in functions.names
    for function in (npu_xent.cross_entropy, *SHARDED):
        function(logits.as_subclass(Subclass), target)
        assert str(function) in Subclass.names
    traced = torch.jit.trace(lambda x: npu_xent.cross_entropy(x, target), logits)
    assert "npu_xent::cross_entropy" in str(traced.graph)


def test_profilers_see_the_call_and_the_primitives(device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device).requires_grad_(), make_target(3, 5, device)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        npu_xent.cross_entropy(logits, target).backward()
    names = {event.key for event in recorded.key_averages()}
    assert {"npu_xent::cross_entropy", "npu_xent::row_stats_grad", "npu_xent::reduce_rows"} <= names


def test_errors_are_those_of_the_operator(device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], but is 2"):
        npu_xent.cross_entropy(logits, target, label_smoothing=2.0)
    with pytest.raises(IndexError, match=r"target\[1\] is 7"):
        npu_xent.cross_entropy(logits, torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match="target must have one value for each of the 3 rows"):
        npu_xent.cross_entropy(logits, target[:2])
    with pytest.raises(RuntimeError, match="weight requires a gradient"):
        npu_xent.cross_entropy(logits.requires_grad_(), target, torch.ones(5, requires_grad=True))
