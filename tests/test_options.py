"""The table of options is what signatures, overloads and operators say."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from option_values import OPTION_VALUES
from reference import make_logits, make_target
from torch.nn import functional as F

import npu_xent
from npu_xent import distributed
from npu_xent._options import (
    CONTRACT,
    CROSS_ENTROPY,
    LINEAR,
    LINEAR_LOG_PROBS,
    LOG_PROBS,
    OPTIONS,
    SELECTED,
    Option,
    options_of,
)
from npu_xent.compat import mindformers, nnsight

PACKAGE = Path(npu_xent.__file__).parent
NAMES = (CROSS_ENTROPY, LINEAR, CONTRACT, LOG_PROBS, LINEAR_LOG_PROBS, SELECTED)
FUNCTIONS = {name: getattr(npu_xent, name) for name in NAMES}
# Parameters that are no options: tensors, what torch has deprecated, and what makes the contract strict.
OTHERS = {
    *("input", "logits", "target", "index", "weight", "linear_weight", "linear_bias"),
    *("size_average", "reduce", "strict"),
}


@pytest.mark.parametrize(
    "function, name",
    [*((function, name) for name, function in FUNCTIONS.items()), (npu_xent.CrossEntropyLoss, CROSS_ENTROPY)],
)
def test_signatures_have_the_options_of_the_table(function: Callable[..., Any], name: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    signature = {p.name: (p.default, type(p.default)) for p in parameters if p.name not in OTHERS}
    assert signature == {option.name: (option.default, type(option.default)) for option in options_of(name)}


def test_the_table_has_no_other_functions() -> None:
    assert {function for option in OPTIONS for function in option.functions} == set(FUNCTIONS)
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize(
    "ours, torchs, count",
    [(npu_xent.cross_entropy, F.cross_entropy, 8), (npu_xent.CrossEntropyLoss, torch.nn.CrossEntropyLoss, 6)],
    ids=["function", "module"],
)
def test_torchs_arguments_come_first_in_torchs_order(
    ours: Callable[..., Any], torchs: Callable[..., Any], count: int
) -> None:
    parameters = list(inspect.signature(ours).parameters.values())
    expected = list(inspect.signature(torchs).parameters.values())
    assert len(expected) == count
    assert [(p.name, p.kind, p.default) for p in parameters[:count]] == [(p.name, p.kind, p.default) for p in expected]
    assert {p.kind for p in parameters[count:]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "operator, function",
    [
        *((name, name) for name in NAMES if name != CONTRACT),
        ("cross_entropy_", CROSS_ENTROPY),
        ("token_log_probs_", LOG_PROBS),
    ],
)
def test_operators_have_the_same_defaults(operator: str, function: str) -> None:
    schema = getattr(torch.ops.npu_xent, operator).default._schema
    arguments = {argument.name: argument for argument in schema.arguments}
    for option in options_of(function):
        if option.kind is not bool:  # what is returned, and into which memory, is said to the operators otherwise
            default = arguments[option.name].default_value
            assert (default, type(default)) == (option.default, type(option.default)), option.name
            kind = str(arguments[option.name].real_type).removeprefix("Optional[").removesuffix("]")
            assert kind == {"dtype": "ScalarType"}.get(option.kind.__name__, option.kind.__name__), option.name


@pytest.mark.parametrize(
    "file, name, flags",
    [
        ("functional.py", CROSS_ENTROPY, ("return_lse", "return_z_loss")),
        ("_linear.py", LINEAR, ("return_lse", "return_z_loss")),
        ("_log_probs.py", LOG_PROBS, ("return_entropy", "return_top1")),
        ("_log_probs.py", LINEAR_LOG_PROBS, ("return_entropy", "return_top1")),
    ],
)
def test_overloads_differ_in_the_flags_alone(file: str, name: str, flags: tuple[str, str]) -> None:
    """What a type checker sees is what is called, except for the two flags."""

    def parameters(node: ast.FunctionDef) -> list[tuple[str, str, str]]:
        """Kind, name and annotation of each, in order; a flag without its annotation."""
        arguments = node.args
        kinds = (("positional", arguments.args), ("keyword", arguments.kwonlyargs))
        assert [*arguments.posonlyargs, arguments.vararg, arguments.kwarg] == [None, None]
        return [
            (kind, a.arg, "" if a.arg in flags or a.annotation is None else ast.unparse(a.annotation))
            for kind, group in kinds
            for a in group
        ]

    definitions = [
        node
        for node in ast.parse((PACKAGE / file).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    *overloads, implementation = map(parameters, definitions)
    assert len(overloads) == 4
    assert all(overload == implementation for overload in overloads)


def outside(option: Option) -> list[float]:
    """Values next to the range of an option, and NaN."""
    return [math.nextafter(option.low, -math.inf), math.nextafter(option.high, math.inf), math.nan]


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.message], ids=lambda option: option.name)
def test_ranges_are_those_of_the_operators(option: Option, device: torch.device) -> None:
    """The torch operations that serve class probabilities and torch.func check them by the table, in the same words."""
    logits, classes = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    before, after = option.message.split("{}")
    calls: list[Callable[..., Any]] = []
    if CROSS_ENTROPY in option.functions:
        calls += [partial(npu_xent.cross_entropy, logits, y) for y in (classes, F.one_hot(classes, 5).float())]
    if LOG_PROBS in option.functions:
        plain = partial(npu_xent.token_log_probs, logits, classes)
        calls += [plain, lambda **given: torch.func.vmap(lambda _: plain(**given))(torch.zeros(1))]
    for call in calls:
        for value in (option.low, option.high):
            call(**{option.name: value})
        for value in outside(option):
            with pytest.raises(ValueError) as caught:
                call(**{option.name: value})
            assert str(caught.value).startswith(before)
            assert str(caught.value).endswith(after)


def test_positional_arguments_are_torchs(device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    weight = torch.rand(5, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = (weight, None, 2, None, "sum", 0.1)
    expected = F.cross_entropy(logits, target, *arguments)
    torch.testing.assert_close(npu_xent.cross_entropy(logits, target, *arguments), expected)
    torch.testing.assert_close(npu_xent.CrossEntropyLoss(*arguments)(logits, target), expected)


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), npu_xent.CrossEntropyLoss])
def test_a_misspelt_option_is_a_type_error(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'label_smothing'"):
        function(label_smothing=0.1)


def test_the_covering_arrays_know_every_option() -> None:
    """Except for those of one function each, whose tests have values of their own."""
    own = {"lse_square_scale_for_zloss", "return_zloss", "need_log_prob", "chunk_rows", "consume_logits"}
    assert {option.name for option in OPTIONS} - own <= set(OPTION_VALUES)
    for option in OPTIONS:
        if option.name in OPTION_VALUES:
            assert option.default in OPTION_VALUES[option.name], option.name
            assert len(OPTION_VALUES[option.name]) > 1


@pytest.mark.parametrize("function", [npu_xent.cross_entropy, npu_xent.npu_cross_entropy_loss])
@pytest.mark.parametrize(
    "dtype, loss_dtype",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.int32)],
    ids=str,
)
def test_a_loss_dtype_that_would_lose_digits_is_refused(
    function: Callable[..., Any], dtype: torch.dtype, loss_dtype: torch.dtype, device: torch.device
) -> None:
    logits, classes = make_logits(3, 5, dtype, device), make_target(3, 5, device)
    targets = [classes] if function is npu_xent.npu_cross_entropy_loss else [classes, F.one_hot(classes, 5).float()]
    for target in targets:
        with pytest.raises(TypeError, match="loss_dtype must be float32, float64 or the dtype of the input, "):
            function(logits, target, loss_dtype=loss_dtype)
        with pytest.raises(TypeError, match=r"loss_dtype must be a torch\.dtype, but is a str"):
            function(logits, target, loss_dtype="float32")


@pytest.mark.parametrize("value", [torch.ones(2), torch.nn.Parameter(torch.ones(()))], ids=["several", "trained"])
@pytest.mark.parametrize("name", ["logit_scale", "softcap", "lse_square_scale", "label_smoothing"])
def test_a_number_that_is_a_tensor_is_refused(name: str, value: torch.Tensor, device: torch.device) -> None:
    """It looks as if it were trained, and would get no gradient."""
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    kinds = r"(Tensor of shape \[2\]|(Tensor|Parameter), which would get no gradient)"
    words = f"{name} must be a number, but is a {kinds}"
    weight = torch.ones(5, 5, device=device)
    for call in (
        lambda: npu_xent.cross_entropy(logits, target, **{name: value}),
        lambda: npu_xent.linear_cross_entropy(logits, weight, target, **{name: value}),
        lambda: npu_xent.CrossEntropyLoss(**{name: value})(logits, target),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    constant = torch.tensor(0.5)
    if name == "logit_scale":
        with pytest.raises(TypeError, match="or multiply the logits by it"):
            npu_xent.cross_entropy(logits, target, logit_scale=constant)
    else:
        loss = npu_xent.cross_entropy(logits, target, **{name: constant})
        assert torch.equal(loss, npu_xent.cross_entropy(logits, target, **{name: 0.5}))


FLAGS = [option for option in OPTIONS if option.kind is bool]


@pytest.mark.parametrize("value", ["False", "", 2, [], 1.0, torch.ones(2, dtype=torch.bool), torch.ones(())], ids=repr)
@pytest.mark.parametrize("flag", FLAGS, ids=lambda option: option.name)
def test_a_flag_that_is_no_bool_is_refused(flag: Option, value: Any, device: torch.device) -> None:
    """The string "False" is true: consume_logits="False" overwrote the logits, strict="False" was strict."""
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    tensors = {CONTRACT: (logits, target), CROSS_ENTROPY: (logits, target), LOG_PROBS: (logits, target)}
    linear = (logits, torch.ones(5, 5, device=device), target)
    for name in flag.functions:
        call = partial(FUNCTIONS[name], *tensors.get(name, linear))
        seen = "2" if isinstance(value, int) else f"a {type(value).__name__}"
        with pytest.raises(TypeError, match=rf"npu_xent\.{name}: {flag.name} must be a bool, but is {seen}$"):
            call(**{flag.name: value})
        with pytest.raises(TypeError, match=f"{flag.name} must be a bool, but is a NoneType; leave it out for the def"):
            call(**{flag.name: None})
    if CROSS_ENTROPY in flag.functions:
        with pytest.raises(TypeError, match=f"CrossEntropyLoss: {flag.name} must be a bool, but is {seen}"):
            npu_xent.CrossEntropyLoss(**{flag.name: value})


@pytest.mark.cpu
def test_flags_of_the_other_functions_are_checked() -> None:
    logits, target = torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long)
    linear = distributed.vocab_parallel_linear_cross_entropy
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "return_z_loss": (distributed.vocab_parallel_cross_entropy, (logits, target)),
        "consume_logits": (distributed.vocab_parallel_token_log_probs, (logits, target)),
        "sequence_parallel": (linear, (logits, torch.ones(5, 5), target)),
        "reduce_input_grad": (linear, (logits, torch.ones(5, 5), target)),
        "strict": (npu_xent.npu_cross_entropy_loss, (logits[0], target[0])),
        "shift": (nnsight.cross_entropy_loss, (logits, target)),
        "avg_batch": (nnsight.cross_entropy_loss, (logits, target)),
        "avg_token": (nnsight.cross_entropy_loss, (logits, target)),
        "calculate_per_token_loss": (mindformers.CrossEntropyLoss, ()),
        "check_for_nan_in_loss_and_grad": (mindformers.CrossEntropyLoss, ()),
        "need_log_prob": (npu_xent.patch_torch_npu, ()),
    }
    for name, (function, tensors) in calls.items():
        with pytest.raises(TypeError, match=f"{name} must be a bool, but is a str"):
            function(*tensors, **{name: "False"})
    with pytest.raises(TypeError, match="strict must be a bool, but is a str"):
        npu_xent.patch_torch_npu(strict="False")


@pytest.mark.cpu
def test_nothing_is_overwritten_for_a_flag_that_is_no_bool() -> None:
    logits = torch.randn(3, 5, requires_grad=True) * 1
    kept = logits.detach().clone()
    with pytest.raises(TypeError, match="consume_logits must be a bool, but is a str"):
        npu_xent.cross_entropy(logits, torch.tensor([0, 1, 2]), consume_logits="False")
    assert torch.equal(logits, kept)


@pytest.mark.cpu
def test_a_comparison_of_sizes_is_a_flag_to_compilers() -> None:
    logits, target = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)

    def lse_of_many(x: torch.Tensor, y: torch.Tensor) -> Any:
        return npu_xent.cross_entropy(x, y, return_lse=x.shape[0] > 4, consume_logits=x.shape[0] > 9)[1]

    compiled = torch.compile(lse_of_many, backend="eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), logits.logsumexp(1))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lse_of_many, tracing_mode="symbolic")(logits, target)
    assert torch.equal(traced(logits, target), npu_xent.cross_entropy(logits, target, return_lse=True).lse)


def test_sums_of_16_bit_logits_keep_their_digits(device: torch.device) -> None:
    """A bfloat16 sum over 4096 rows has three of them."""
    logits, target = make_logits(4096, 50, torch.bfloat16, device), make_target(4096, 50, device)
    expected = F.cross_entropy(logits.cpu().double(), target.cpu(), reduction="sum")
    dtypes = [torch.float32]
    if device.type == "npu":
        for y in (target, F.one_hot(target, 50).float()):
            with pytest.raises(TypeError, match="loss_dtype must not be float64 on npu:0, which has no float64"):
                npu_xent.cross_entropy(logits, y, loss_dtype=torch.float64)
    else:
        dtypes.append(torch.float64)
    for dtype in dtypes:
        loss = npu_xent.cross_entropy(logits, target, reduction="sum", loss_dtype=dtype)
        assert loss.dtype == dtype
        assert abs(float(loss) / float(expected) - 1) < 1e-6
    assert abs(float(npu_xent.cross_entropy(logits, target, reduction="sum")) / float(expected) - 1) > 1e-5
