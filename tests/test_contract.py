"""npu_cross_entropy_loss: the documented contract of the vendor's operator, enforced with strict and lifted without.

Every rule of npu_xent/_constraints.py has a call that breaks it and nothing else. What strict=False lifts is then
computed and compared with the truth, as are the four outputs under every mix of options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from reference import (
    DTYPES,
    NAN,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    make_weight,
    max_error,
    pairwise,
    truth,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
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


# The rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_rule_is_quoted_with_the_value_seen_and_the_way_out(name: str, device: torch.device) -> None:
    broken = RULES[name]
    with pytest.raises(ConstraintError) as raised:
        npu_cross_entropy_loss(**arguments(device, **broken.changed))
    rule, _, rest = str(raised.value).partition(", but ")
    assert rule.startswith(f"npu_cross_entropy_loss: {broken.rule}")
    seen, _, way_out = rest.partition(". Pass ")
    assert broken.seen in seen
    assert way_out == "strict=False to lift the documented restrictions, or call npu_xent.cross_entropy."
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


def test_every_rule_of_the_module_is_tested_here() -> None:
    """A rule added to _constraints.py without a line in RULES fails this."""
    source = inspect.getsource(npu_xent._constraints)
    # One _require for each rule, with the weight's values a raise, without the function itself.
    rules = len(re.findall(r"^    +_require\(", source, re.MULTILINE))
    prefixes = {broken.rule.removeprefix("with input.requires_grad and reduction ") for broken in RULES.values()}
    # Two reductions more share the one line about label_smoothing.
    assert rules == len(prefixes) - 2


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
    assert list(parameters)[len(documented) :] == ["strict"]
    assert parameters["strict"].default is True


# The outputs ----------------------------------------------------------------------------------------------------------

OUTPUTS = pairwise(
    {
        "dtype": DTYPES,
        "reduction": REDUCTIONS,
        "scale": (0.0, 0.01),
        "return_zloss": (False, True),
        "requires_grad": (False, True),
        "weighted": (False, True),
        "label_smoothing": (0.0, 0.1),
        "ignore_index": (-100, 2),
    }
)


def output_call(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a case, without strict."""
    logits = make_logits(9, 21, case["dtype"], device)
    return {
        "input": logits.requires_grad_(case["requires_grad"]),
        "target": make_target(9, 21, device, ignore_index=case["ignore_index"]),
        "weight": make_weight(21, torch.float32, device) if case["weighted"] else None,
        "reduction": case["reduction"],
        "ignore_index": case["ignore_index"],
        "label_smoothing": case["label_smoothing"],
        "lse_square_scale_for_zloss": case["scale"],
        "return_zloss": case["return_zloss"],
        "strict": False,
    }


@pytest.mark.parametrize("case", OUTPUTS, ids=case_id)
def test_outputs(case: dict[str, Any], device: torch.device) -> None:
    """Shapes, dtypes, values, and what is differentiable."""
    call = output_call(case, device)
    outputs = npu_cross_entropy_loss(**call)
    loss, log_prob, zloss, lse = outputs
    expected = truth(
        call["input"],
        call["target"],
        call["weight"],
        reduction=case["reduction"],
        ignore_index=case["ignore_index"],
        label_smoothing=case["label_smoothing"],
        lse_square_scale=case["scale"],
    )
    shape = (9,) if case["reduction"] == "none" else (1,)
    assert {t.dtype for t in outputs} == {case["dtype"]}

    assert_near(loss, expected.loss.view(shape), expected.loss_terms, name="loss")
    # The statistics' rounding of x and of lse.
    terms = call["input"].detach().cpu().double().abs() + expected.lse.abs()[:, None]
    assert_near(log_prob, expected.log_prob, terms, name="log_prob, ignored rows included")
    assert log_prob.is_contiguous()
    if case["return_zloss"]:
        assert_near(zloss, expected.z_loss.view(shape), 4 * expected.z_loss.abs(), name="zloss")
    else:
        assert zloss.shape == (0,)
    if case["scale"]:
        assert_near(lse, expected.lse, expected.lse.abs(), name="lse_for_zloss")
    else:
        assert lse.shape == (0,)

    differentiable = [
        case["requires_grad"],
        False,
        case["requires_grad"] and case["return_zloss"] and case["scale"] > 0,
    ]
    assert [t.requires_grad for t in (loss, log_prob, zloss)] == differentiable
    assert not lse.requires_grad


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_of_log_prob_are_no_larger_than_torchs(dtype: torch.dtype, offset: float, device: torch.device) -> None:
    logits = (make_logits(8, 32000, torch.float32, device) + offset).to(dtype)
    target = make_target(8, 32000, device)
    expected = truth(logits, target).log_prob
    torchs = max_error(logits.log_softmax(1), expected)
    ours = max_error(npu_cross_entropy_loss(logits, target)[1], expected)
    assert ours <= torchs + torch.finfo(torch.float32).eps * float(expected.abs().max())


@pytest.mark.parametrize("case", OUTPUTS, ids=case_id)
def test_fake_tensors_have_the_eager_shapes(case: dict[str, Any], device: torch.device) -> None:
    """The vendor's do not."""
    call = output_call(case, device)
    eager = npu_cross_entropy_loss(**call)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in call.items()}
        fake = npu_cross_entropy_loss(**fakes)
    for actual, expected in zip(fake, eager, strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert actual.requires_grad == expected.requires_grad


def test_fake_tensors_pass_the_strict_rules(device: torch.device) -> None:
    """A weight that has no values cannot be checked for them, and need not be."""
    with FakeTensorMode():
        loss, log_prob, zloss, lse = npu_cross_entropy_loss(**arguments(device, weight=weight_with(0.5)))
    assert [tuple(t.shape) for t in (loss, log_prob, zloss, lse)] == [(1,), (ROWS, CLASSES), (0,), (0,)]


@pytest.mark.parametrize("from_loss, from_zloss", [(1.0, 0.0), (0.0, 1.0), (2.0, -3.0), (None, 1.0), (1.0, None)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_loss_and_zloss_together(
    dtype: torch.dtype, reduction: str, from_loss: float | None, from_zloss: float | None, device: torch.device
) -> None:
    """The z-loss is part of the loss and an output besides: its gradient takes both ways. None: not used."""
    logits = make_logits(9, 21, dtype, device).requires_grad_()
    target = make_target(9, 21, device, ignore_index=-100)
    loss, _, zloss, _ = npu_cross_entropy_loss(
        logits, target, None, reduction, lse_square_scale_for_zloss=0.05, return_zloss=True, strict=False
    )
    used = [(output, up) for output, up in ((loss, from_loss), (zloss, from_zloss)) if up is not None]
    torch.autograd.backward([output for output, _ in used], [torch.full_like(output, up) for output, up in used])
    upstream = {"grad_loss": from_loss or 0.0, "grad_z_loss": from_zloss or 0.0}
    expected = truth(logits, target, reduction=reduction, lse_square_scale=0.05, **upstream)
    assert_near(logits.grad, expected.grad, expected.grad_terms)


@pytest.mark.float64
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_both_outputs(reduction: str, device: torch.device) -> None:
    logits = make_logits(4, 3, torch.float64, device, spread=1.0).requires_grad_()
    target, weight = torch.tensor([2, -100, 0, 1], device=device), make_weight(3, torch.float64, device)

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        return npu_cross_entropy_loss(x, target, weight, reduction, -100, 0.1, 0.2, True, strict=False)

    assert torch.autograd.gradcheck(outputs, logits)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_is_refused_in_words(reduction: str, device: torch.device) -> None:
    logits = make_logits(4, 3, torch.float32, device).requires_grad_()
    loss = npu_cross_entropy_loss(logits, make_target(4, 3, device), None, reduction)[0]
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_of_the_outputs_does_not_follow_autocast(dtype: torch.dtype, device: torch.device) -> None:
    call = arguments(device, input=make_logits(ROWS, CLASSES, dtype, device).requires_grad_())
    plain = npu_cross_entropy_loss(**call)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = npu_cross_entropy_loss(**call)
    for actual, expected in zip(outputs, plain, strict=True):
        assert_same_bits(actual, expected)
    outputs[0].backward()
    assert call["input"].grad.dtype == dtype


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_minus_100_is_ignored_although_it_is_negative(reduction: str, device: torch.device) -> None:
    """Any other negative target is out of range."""
    logits = make_logits(ROWS, CLASSES, torch.float32, device).requires_grad_()
    target = torch.tensor([1, -100, 2, -100], device=device)
    loss = npu_cross_entropy_loss(logits, target, None, reduction)[0]
    loss.sum().backward()
    expected = truth(logits, target, reduction=reduction)
    assert_near(loss.view(expected.loss.shape), expected.loss, expected.loss_terms)
    assert (logits.grad[1::2] == 0).all()
    if device.type == "cpu":
        with pytest.raises(IndexError):
            npu_cross_entropy_loss(logits, target.clamp(min=-99), None, reduction)


# Examples from documentation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "ignore_index": 100}], ids=["defaults", "sum"])
def test_documented_example(options: dict[str, Any], device: torch.device) -> None:
    """The two examples of the operator's page: 4096 rows of 8080 classes."""
    logits = torch.randn(4096, 8080, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    target = torch.arange(4096, device=device)
    loss, log_prob, zloss, lse = npu_cross_entropy_loss(logits, target, **options)
    loss.backward()
    theirs = logits.detach().cpu().requires_grad_()
    expected = F.cross_entropy(theirs, target.cpu(), **options)
    expected.backward()
    assert (loss.shape, log_prob.shape, zloss.shape, lse.shape) == ((1,), (4096, 8080), (0,), (0,))
    torch.testing.assert_close(loss.cpu(), expected.view(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.cpu(), theirs.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(log_prob[:50].cpu(), theirs[:50].detach().log_softmax(1), rtol=1e-6, atol=2e-6)


def test_padded_label_tutorial(device: torch.device) -> None:
    """[batch, time, classes] with -100 for padding: the mean over what is kept, no gradient at padding."""
    torch.manual_seed(42)
    logits = torch.randn(2, 4, 10).to(device).requires_grad_()
    labels = torch.tensor([[2, 3, 4, -100], [3, 2, 1, -100]], device=device)
    flat, flat_labels = logits.view(-1, 10), labels.view(-1)
    losses = [
        npu_xent.cross_entropy(flat, flat_labels),
        npu_xent.CrossEntropyLoss(ignore_index=-100)(flat, flat_labels),
        npu_cross_entropy_loss(flat, flat_labels)[0],
    ]
    for loss in losses:
        assert round(float(loss.detach()), 4) == 2.5207
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad[labels == -100] == 0).all()
        assert (grad[labels != -100] != 0).all()


def test_labels_as_ids_tutorial(device: torch.device) -> None:
    """The same tutorial's second example: three rows of five classes, labels 1, 2, 3."""
    logits = torch.tensor(
        [
            [0.9580, 1.3221, 0.8172, -0.7658, -0.7506],
            [1.3525, 0.6863, -0.3278, 0.7950, 0.2815],
            [0.0562, 0.5227, -0.2384, -0.0499, 0.5263],
        ],
        device=device,
    )
    labels = torch.tensor([1, 2, 3], device=device)
    loss, log_prob, _, _ = npu_cross_entropy_loss(logits, labels)
    assert round(float(loss), 4) == 1.8159
    assert round(float(npu_xent.cross_entropy(logits, labels)), 4) == 1.8159
    picked = log_prob.gather(1, labels.unsqueeze(1)).flatten().tolist()
    # It prints its logits, too, to four digits: either rounding may move the last one.
    assert picked == pytest.approx([-0.9353, -2.6417, -1.8706], abs=1.1e-4)
