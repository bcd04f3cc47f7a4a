"""patch_torch: callers of F.cross_entropy get ours where it serves the call, and otherwise torch's function."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import REDUCTIONS, make_logits, make_target, make_weight
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import npu_xent
from npu_xent.integrations import _patch

torchs = F.cross_entropy  # as code that imported it before the patch


class Served(list):
    """The keywords of the calls that reached npu_xent.cross_entropy."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The patch, and the calls that reached us."""
    calls, ours = Served(), npu_xent.functional.cross_entropy

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return ours(*arguments)

    monkeypatch.setattr(npu_xent.functional, "cross_entropy", counted)
    with npu_xent.patch_torch():
        yield calls
    assert F.cross_entropy is torchs
    assert _patch._active == []


@pytest.fixture(params=["compiler first", "patch first"])
def patched(request: pytest.FixtureRequest) -> Iterator[_patch.PatchHandle]:
    """The patch alone, for what compilers trace. Dynamo keeps a table of torch's functions, or, later, of ours."""
    rules = torch._dynamo.trace_rules.get_torch_obj_rule_map
    rules.cache_clear()
    if request.param == "compiler first":
        assert torchs in rules()
    with npu_xent.patch_torch() as handle:
        assert (torchs in rules()) == (request.param == "compiler first")
        yield handle
    rules.cache_clear()
    torch._dynamo.reset()


def loss_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, *rest, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


# Served ---------------------------------------------------------------------------------------------------------------


def test_the_signature_is_torchs(served: Served) -> None:
    ours, theirs = (inspect.signature(f).parameters.values() for f in (F.cross_entropy, torchs))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("shape", [(6, 5), (5,), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_callers_get_ours(
    dtype: torch.dtype, reduction: str, shape: tuple[int, ...], served: Served, device: torch.device
) -> None:
    logits = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.ones(shape[:1][: len(shape) - 1] + shape[2:], dtype=torch.int64, device=device)
    weight = make_weight(5, dtype, device)
    probabilities = logits.flip(0).softmax(min(len(shape) - 1, 1))
    calls = 0
    for y, smoothing in ((target, 0.1), (target.to(torch.uint8), 0.0), (probabilities, 0.1)):
        if y.dtype == torch.uint8 and len(shape) > 2:
            continue  # which torch refuses
        for w in (None, weight):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            expected = loss_and_gradient(torchs, logits, y, w, **options)
            torch.testing.assert_close(loss_and_gradient(F.cross_entropy, logits, y, w, **options), expected)
            criterion = torch.nn.CrossEntropyLoss(w, **options)
            torch.testing.assert_close(loss_and_gradient(criterion, logits, y), expected)
            calls += 2
            assert len(served) == calls


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_torchs_own_callers_and_deprecated_arguments(served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    arguments = (None, False, -100, None, "mean", 0.1)
    torch.testing.assert_close(F.cross_entropy(logits, target, *arguments), torchs(logits, target, *arguments))
    assert len(served) == 1
    if hasattr(F, "linear_cross_entropy"):
        head = torch.eye(5, device=device)
        torch.testing.assert_close(F.linear_cross_entropy(logits, head, target), torchs(logits, target))
        assert len(served) == 2


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(dtype: torch.dtype, weight_dtype: torch.dtype | None, served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, dtype, device), make_target(6, 5, device)
    weight = None if weight_dtype is None else make_weight(5, weight_dtype, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.cross_entropy(logits, target, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torchs(logits.float(), target, None if weight is None else weight.float()))
    assert len(served) == 1


def test_a_default_device_changes_nothing(served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    with torch.device(device):
        loss = F.cross_entropy(logits, target)
    assert len(served) == 1
    torch.testing.assert_close(loss, torchs(logits, target))


# Left to torch --------------------------------------------------------------------------------------------------------


def dtensor(logits: Tensor) -> Tensor:
    """A subclass without a __torch_function__, as DTensor is one."""

    class Quiet(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    return logits.as_subclass(Quiet)


UNSERVED: dict[str, Callable[[Tensor, Tensor], tuple[tuple, dict]]] = {
    "another device": lambda x, y: ((x.to("meta"), y.to("meta")), {}),
    "two devices": lambda x, y: ((x, y.to("meta")), {}),
    "complex logits": lambda x, y: ((x.to(torch.complex64), y), {}),
    "integer logits": lambda x, y: ((x.long(), y), {}),
    "sparse logits": lambda x, y: ((x.cpu().to_sparse(), y.cpu()), {}),
    "a negative view": lambda x, y: ((torch._neg_view(x), y), {}),
    "no dimension": lambda x, y: ((x[0, 0], y[0]), {}),
    "no classes": lambda x, y: ((x[:, :0], y), {}),
    "int32 target": lambda x, y: ((x, y.int()), {}),
    "bool target": lambda x, y: ((x, y.bool()), {}),
    "another number of rows": lambda x, y: ((x, y[:-1]), {}),
    "classes last": lambda x, y: ((x.view(1, 6, 5), y.view(1, 6)), {}),
    "one row and two dimensions": lambda x, y: ((x[0], y[:1]), {}),
    "probabilities of another shape": lambda x, y: ((x, x[:-1]), {}),
    "probabilities of another dtype": lambda x, y: ((x, x.half()), {}),
    "probabilities and ignore_index": lambda x, y: ((x, x.softmax(1)), {"ignore_index": 2}),
    "a weight of another dtype": lambda x, y: ((x, y, torch.ones(5, dtype=torch.bfloat16, device=x.device)), {}),
    "a weight of another shape": lambda x, y: ((x, y, torch.ones(4, device=x.device)), {}),
    "a weight with a gradient": lambda x, y: ((x, y, torch.ones(5, device=x.device, requires_grad=True)), {}),
    "a weight elsewhere": lambda x, y: ((x, y, torch.ones(5, device="meta")), {}),
    "too much smoothing": lambda x, y: ((x, y), {"label_smoothing": 1.5}),
    "negative smoothing": lambda x, y: ((x, y), {"label_smoothing": -0.5}),
    "an unknown reduction": lambda x, y: ((x, y), {"reduction": "average"}),
    "a deprecated reduction": lambda x, y: ((x, y), {"reduction": "elementwise_mean"}),
    "no ignore_index": lambda x, y: ((x, y), {"ignore_index": None}),
    "a list": lambda x, y: ((x, y.tolist()), {}),
    "a subclass": lambda x, y: ((dtensor(x), y), {}),
    "a subclass of target": lambda x, y: ((x, dtensor(y)), {}),
}


def outcome(function: Callable[..., Tensor], arguments: tuple, options: dict) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments, **options)
    except Exception as error:
        return type(error), str(error).partition("\nException raised from")[0]


@pytest.mark.parametrize("name", UNSERVED)
def test_torch_gets_the_rest_with_the_arguments_as_given(name: str, served: Served, device: torch.device) -> None:
    arguments, options = UNSERVED[name](make_logits(6, 5, torch.float32, device), make_target(6, 5, device))
    actual, expected = outcome(F.cross_entropy, arguments, options), outcome(torchs, arguments, options)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected
    assert served == []


class Seen(Tensor):
    """Notes what its __torch_function__ sees, and computes by it."""

    seen: list[tuple[Any, tuple, dict]]

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") == "cross_entropy":
            cls.seen.append((func, args, kwargs))
        return super().__torch_function__(func, kinds, args, kwargs or {})


def test_a_subclass_sees_torchs_own_function(served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    seen = {}
    for name, function in (("ours", F.cross_entropy), ("torchs", torchs)):
        Seen.seen = []
        function(logits.as_subclass(Seen), target, None, None, 2, label_smoothing=0.1)
        [seen[name]] = Seen.seen
        if name == "ours":
            assert served == []
            _patch._active[-1].remove()  # for torch's function finds itself by its name
    assert seen["ours"][0] is seen["torchs"][0] is torchs
    assert len(seen["ours"][1]) == len(seen["torchs"][1]) == 2
    assert seen["ours"][2] == seen["torchs"][2]


class Noting(TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_torchs_own_function(served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    with Noting() as mode:
        F.cross_entropy(logits, target)
    assert mode.seen == [torchs]
    assert served == []


def test_calls_inside_the_patch_of_another_are_torchs(
    served: Served, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    ours = F.cross_entropy
    with monkeypatch.context() as another:
        another.setattr(F, "cross_entropy", lambda *arguments, **options: ours(*arguments, **options) * 2)
        torch.testing.assert_close(torch.nn.CrossEntropyLoss()(logits, target), torchs(logits, target) * 2)
        assert served == []
    torch.nn.CrossEntropyLoss()(logits, target)
    assert len(served) == 1


def test_the_replacement_outlives_its_patch(served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    kept = F.cross_entropy
    _patch._active[-1].remove()
    torch.testing.assert_close(kept(logits, target), torchs(logits, target), rtol=0, atol=0)
    assert served == []


def test_transforms_and_forward_mode_are_torchs(served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target)

    torch.testing.assert_close(torch.func.grad(loss)(logits), loss_and_gradient(torchs, logits, target)[1])
    assert torch.func.hessian(loss)(logits).shape == (6, 5, 6, 5)
    assert torch.vmap(F.cross_entropy)(logits, target).shape == (6,)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, torch.zeros((), device=device))
    assert served == []


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_double_backward_names_the_patch(reduction: str, served: Served, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device).requires_grad_(), make_target(6, 5, device)
    loss = F.cross_entropy(logits, target, reduction=reduction).sum()
    assert len(served) == 1
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*npu_xent\.patch_torch\(\)"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_and_fx(served: Served) -> None:
    logits, target = make_logits(6, 5, torch.float32, torch.device("cpu")), make_target(6, 5, torch.device("cpu"))
    expected = torchs(logits, target)
    torch.testing.assert_close(torch.jit.script(torch.nn.CrossEntropyLoss())(logits, target), expected)
    assert served == []  # which compiles torch's function
    nodes = torch.fx.symbolic_trace(lambda x, y: F.cross_entropy(x, y)).graph.nodes
    assert [node.target for node in nodes if node.op == "call_function"] == [torchs]


# Compilers ------------------------------------------------------------------------------------------------------------


class MadeInForward(torch.nn.Module):
    """As the models of Hugging Face: the compiler then calls F.cross_entropy with eight arguments."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1)(x, y)


class Held(torch.nn.Module):
    """The usual criterion."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = torch.nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(x, y)


class Called(torch.nn.Module):
    """The function."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, ignore_index=2, label_smoothing=0.1)


PROGRAMS = [MadeInForward, Held, Called]


def compiled(module: torch.nn.Module) -> tuple[Callable[..., Tensor], list[str]]:
    """The compiled module, and the code of the graphs that it runs."""
    torch._dynamo.reset()
    codes: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph.forward

    return torch.compile(module, backend=aot_autograd(fw_compiler=note), fullgraph=True), codes


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_compile_in_one_graph(
    program: type[torch.nn.Module], patched: _patch.PatchHandle, device: torch.device
) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    expected = loss_and_gradient(torchs, logits, target, ignore_index=2, label_smoothing=0.1)
    function, codes = compiled(program())
    torch.testing.assert_close(loss_and_gradient(function, logits, target), expected)
    assert "npu_xent" in codes[0]
    torch.testing.assert_close(torch.compile(program(), backend="eager", fullgraph=True)(logits, target), expected[0])
    patched.remove()
    function, codes = compiled(program())
    torch.testing.assert_close(loss_and_gradient(function, logits, target), expected)
    assert "npu_xent" not in "".join(codes)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_export(
    program: type[torch.nn.Module], strict: bool, patched: _patch.PatchHandle, device: torch.device
) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)
    exported = torch.export.export(program(), (logits, target), strict=strict)
    patched.remove()
    assert "npu_xent" in exported.graph_module.code
    expected = torchs(logits, target, ignore_index=2, label_smoothing=0.1)
    torch.testing.assert_close(exported.module()(logits, target), expected)


def test_compiled_transforms_are_torchs(patched: _patch.PatchHandle, device: torch.device) -> None:
    logits, target = make_logits(6, 5, torch.float32, device), make_target(6, 5, device)

    class Gradient(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.func.grad(F.cross_entropy)(x, y)

    function, codes = compiled(Gradient())
    torch.testing.assert_close(function(logits, target), loss_and_gradient(torchs, logits, target)[1])
    assert "npu_xent" not in codes[0]


# Handles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacements", [("first", "second"), ("ours", "ours")])
def test_patches_nest_around_the_patch_of_another(replacements: tuple[str, str]) -> None:
    """A function that other code has set between two patches comes back with the second."""
    module = types.SimpleNamespace(function="module's")
    first = _patch.PatchHandle(module, "function", replacements[0])
    module.function = "another's"
    second = _patch.PatchHandle(module, "function", replacements[1])
    first.remove()
    assert module.function == replacements[1]
    second.remove()
    assert module.function == "another's"


@pytest.mark.parametrize("same", [False, True])
def test_an_earlier_patch_comes_back_whatever_it_was_called(same: bool) -> None:
    module = types.SimpleNamespace(function="module's", other="other's")
    handles = [_patch.PatchHandle(module, "function", "ours" if same else f"ours {i}") for i in range(3)]
    with _patch.PatchHandle(module, "other", "ours"):  # of another function: independent
        handles[1].remove()
        assert module.function == ("ours" if same else "ours 2")
        handles[2].remove()
        assert module.function == ("ours" if same else "ours 0")
        handles[0].remove()
        assert module.function == "module's"
        assert module.other == "ours"
    assert module.other == "other's"
    assert _patch._active == []
