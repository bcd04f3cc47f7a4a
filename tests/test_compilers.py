"""What torch's compilers, transforms and overrides see of the functions, and that they give the same results."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from functorch.compile import make_boxed_func
from reference import make_logits, make_target
from releases import TORCH
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import npu_xent
from npu_xent.compat import mindformers, nnsight, unit_scaling

pytestmark = pytest.mark.cpu

N, C, H = 6, 5, 4


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets of which one is ignored, and a layer of H classes."""
    return make_logits(N, C, torch.float32, device), make_target(N, C, device), torch.ones(H, C, device=device)


def losses(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of logits, by name, as one number."""
    x, y, layer = inputs(device)
    ce, classes = npu_xent.cross_entropy, y.clamp(min=0)
    few = y.where(y < H, -100)

    def with_lse(z: Tensor) -> Tensor:
        out = ce(z, y, return_lse=True)
        return out.loss + out.lse.sum()

    def with_entropy(z: Tensor) -> Tensor:
        out = npu_xent.token_log_probs(z, y, return_entropy=True, return_top1=True)
        return (out.log_probs + out.entropy).sum()

    return {
        "mean": lambda z: ce(z, y),
        "scaled": lambda z: ce(z, y) * 2,
        "none": lambda z: ce(z, y, reduction="none").sum(),
        "lse": with_lse,
        "z-loss": lambda z: ce(z, y, lse_square_scale=0.1, return_z_loss=True).loss,
        "smoothed": lambda z: ce(z, y, torch.arange(1.0, C + 1), label_smoothing=0.1),
        "contract": lambda z: npu_xent.npu_cross_entropy_loss(z, y)[0].sum(),
        "probabilities": lambda z: ce(z, x.softmax(1)),
        "log-probs": lambda z: npu_xent.token_log_probs(z, y).sum(),
        "entropy": with_entropy,
        "linear": lambda z: npu_xent.linear_cross_entropy(z, layer, few),
        "linear none": lambda z: npu_xent.linear_cross_entropy(z, layer, few, reduction="none").sum(),
        "linear log-probs": lambda z: npu_xent.linear_token_log_probs(z, layer, few).sum(),
        "selected": lambda z: npu_xent.selected_log_probs(z, classes[:, None]).sum(),
    }


LOSSES = list(losses(torch.device("cpu")))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf * 1), leaf)
    return grad


def names(graph: torch.fx.Graph) -> list[str]:
    """The operators of npu_xent, also those that functionalization has wrapped."""
    found = []
    for node in graph.nodes:
        for target in (node.target, *node.args[:1]):
            if isinstance(target, torch._ops.OpOverload) and target.namespace == "npu_xent":
                found.append(target.name())
    return found


def recording(seen: list[str]) -> Any:
    """A backend that records the operators of npu_xent in its graphs."""

    def record(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(names(module.graph))
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=record)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_autograd(name: str, device: torch.device) -> None:
    """One graph of the backward, which holds our operators; the gradient has the bits of eager mode."""
    torch._dynamo.reset()  # or a graph of another case serves, and is not seen
    torch._dynamo.compiled_autograd.reset()
    function, x = losses(device)[name], inputs(device)[0]
    expected = gradient(function, x)
    seen: list[str] = []
    backend = recording(seen)
    leaf = x.clone().requires_grad_()
    loss = function(leaf * 1)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        loss.backward()
    assert torch.equal(leaf.grad, expected)
    assert seen, "none of our operators is in the graph"


def test_compiled_autograd_keeps_the_gradient(device: torch.device) -> None:
    """With retain_graph=True a second backward gives the same."""
    x, y, _ = inputs(device)
    leaf = x.clone().requires_grad_()
    loss = npu_xent.cross_entropy(leaf * 1, y) * 2
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward(retain_graph=True)
        first, leaf.grad = leaf.grad, None
        loss.backward()
    assert torch.equal(leaf.grad, first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_autograd_of_consumed_logits(reduction: str, device: torch.device) -> None:
    """Outside of the graph, so that a second backward raises as in eager mode."""
    x, y, _ = inputs(device)

    def loss(z: Tensor, consume: bool = True) -> Tensor:
        return npu_xent.cross_entropy(z, y, reduction=reduction, consume_logits=consume).sum() * 2

    leaf = x.clone().requires_grad_()
    total = loss(leaf * 1)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        total.backward(retain_graph=True)
        assert torch.equal(leaf.grad, gradient(lambda z: loss(z, False), x))
        with pytest.raises(RuntimeError, match=r"consume_logits|modified by an inplace operation"):
            total.backward()


class Model(nn.Module):
    """A layer, and its loss."""

    def __init__(self, reduction: str, linear: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, H * C).view(H, C))
        self.reduction, self.linear = reduction, linear

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        if self.linear:
            loss = npu_xent.linear_cross_entropy(x, self.weight, y, reduction=self.reduction)
        else:
            loss = npu_xent.cross_entropy(x @ self.weight.T, y, reduction=self.reduction)
        return (loss.sum(),)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_joint_graphs(reduction: str, linear: bool, device: torch.device) -> None:
    """Forward and backward in one graph, which gives the gradient of eager mode."""
    from torch._functorch.aot_autograd import aot_export_module

    x, y, _ = inputs(device)
    y = y.where(y < H, -100)
    model = Model(reduction, linear)
    module, _ = aot_export_module(model, (x, y), trace_joint=True, output_loss_index=0)
    assert any("row_" in name for name in names(module.graph))
    loss, grad = module(model.weight, x, y)
    (expected,) = model(x, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, model.weight)[0])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_traced_step(name: str, mode: str, device: torch.device) -> None:
    """make_fx of a forward and a backward, with inputs that require a gradient."""
    function, x = losses(device)[name], inputs(device)[0]

    def step(leaf: Tensor) -> Tensor:
        return torch.autograd.grad(function(leaf * 1), leaf)[0]

    traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x.clone().requires_grad_())
    assert names(traced.graph)
    torch.testing.assert_close(traced(x.clone().requires_grad_()), gradient(function, x))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_batched_gradients(reduction: str, linear: bool, device: torch.device) -> None:
    x, y, layer = inputs(device)
    y = y.where(y < H, -100)

    def function(z: Tensor) -> Tensor:
        if linear:
            return npu_xent.linear_cross_entropy(z, layer.to(z.dtype), y, reduction=reduction)
        return npu_xent.cross_entropy(z, y, reduction=reduction)

    leaf = x.clone().requires_grad_()
    loss = function(leaf)
    upstream = torch.arange(1.0, 3 * loss.numel() + 1).view(3, *loss.shape)
    (batch,) = torch.autograd.grad(loss, leaf, upstream, is_grads_batched=True, retain_graph=True)
    for grads, one in zip(batch, upstream, strict=True):
        torch.testing.assert_close(grads, torch.autograd.grad(loss, leaf, one, retain_graph=True)[0])
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(function, x, vectorize=True), jacobian(function, x))
    assert torch.autograd.gradcheck(function, x.double().requires_grad_(), check_batched_grad=True)


def test_a_second_derivative_of_a_traced_step_is_refused(device: torch.device) -> None:
    x, y, _ = inputs(device)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(npu_xent.cross_entropy(leaf, y) * 2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="is not differentiable"):
        torch.ops.npu_xent.scale_(x.clone().requires_grad_(), torch.tensor(2.0))
    written = x.clone().requires_grad_() * 1
    torch.ops.npu_xent.scale_(written, torch.tensor(2.0))
    with pytest.raises(RuntimeError, match="scale_ is not differentiable"):
        written.sum().backward()


def test_flops_of_linear_losses(device: torch.device) -> None:
    """Those of F.linear and its gradients; where the backward makes the logits again, those of one more product."""
    from torch.utils.flop_counter import FlopCounterMode

    rows, features, classes = 64, 20, 50
    x, layer = torch.randn(rows, features).requires_grad_(), torch.randn(classes, features).requires_grad_()
    y = make_target(rows, classes, device)

    def counted(function: Callable[[], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            function().sum().backward()
        return counter.get_total_flops()

    product = 2 * rows * features * classes
    plain = counted(lambda: nn.functional.cross_entropy(nn.functional.linear(x, layer), y))
    assert plain == counted(lambda: npu_xent.linear_cross_entropy(x, layer, y)) == 3 * product
    assert counted(lambda: npu_xent.linear_cross_entropy(x, layer, y, reduction="none")) == 4 * product
    assert counted(lambda: npu_xent.linear_token_log_probs(x, layer, y)) == 4 * product
    assert counted(lambda: npu_xent.linear_cross_entropy(x.detach(), layer, y)) == 2 * product


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad_and_value": lambda f, x: torch.func.grad_and_value(f)(x)[0],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(2.0))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x.expand(2, -1, -1)),
}


def transformable(device: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Losses, and the same by torch operations."""
    _, y, layer = inputs(device)
    ce, contract, kept = nn.functional.cross_entropy, npu_xent.npu_cross_entropy_loss, y >= 0
    few, filled = y.where(y < H, -100), y.clamp(min=0)
    few_kept = few >= 0

    def with_z_loss(z: Tensor) -> Tensor:
        loss, _, z_loss, _ = contract(z, y, lse_square_scale_for_zloss=0.1, return_zloss=True, strict=False)
        return (loss + z_loss).sum()

    def entropy(z: Tensor) -> Tensor:
        p = (z / 2).softmax(-1)
        return (-(p * p.log()).sum(-1) * kept).sum()

    return {
        "cross_entropy": (lambda z: npu_xent.cross_entropy(z, y), lambda z: ce(z, y)),
        "linear": (lambda z: npu_xent.linear_cross_entropy(z, layer, few), lambda z: ce(z @ layer.T, few)),
        "contract": (lambda z: contract(z, y)[0].sum(), lambda z: ce(z, y)),
        "contract none": (lambda z: contract(z, y, reduction="none")[0].sum(), lambda z: ce(z, y, reduction="sum")),
        "contract z-loss": (
            with_z_loss,
            lambda z: ce(z, y) + 0.2 * (z.logsumexp(1).square() * kept).sum() / kept.sum(),
        ),
        "nnsight": (lambda z: nnsight.cross_entropy_loss(z, y), lambda z: ce(z, y)),
        "mindformers": (lambda z: mindformers.CrossEntropyLoss()(z, filled, kept).sum(), lambda z: ce(z, y)),
        "log-probs": (lambda z: npu_xent.token_log_probs(z, y).sum(), lambda z: -ce(z, y, reduction="sum")),
        "entropy": (
            lambda z: npu_xent.token_log_probs(z, y, temperature=2.0, return_entropy=True).entropy.sum(),
            entropy,
        ),
        "linear log-probs": (
            lambda z: npu_xent.linear_token_log_probs(z, layer, few).sum(),
            lambda z: -(ce(z @ layer.T, few, reduction="none") * few_kept).sum(),
        ),
        "selected": (
            lambda z: npu_xent.selected_log_probs(z, filled[:, None]).sum(),
            lambda z: -ce(z, filled, reduction="sum"),
        ),
    }


COMPILED = ("grad", "vjp", "jvp", "hessian", "vmap of grad")  # hessian is jacfwd of jacrev


@pytest.mark.parametrize(
    ("transform", "compiled"), [*((name, False) for name in TRANSFORMS), *((name, True) for name in COMPILED)]
)
@pytest.mark.parametrize("name", transformable(torch.device("cpu")))
def test_transforms(transform: str, name: str, compiled: bool, device: torch.device) -> None:
    """Transforms of torch.func, in eager mode and inside a compiled function."""
    x, (ours, theirs), call = inputs(device)[0], transformable(device)[name], TRANSFORMS[transform]

    def transform_ours(z: Tensor) -> Tensor:
        return call(ours, z)

    if compiled:
        torch._dynamo.reset()
        transform_ours = torch.compile(transform_ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(transform_ours(x), call(theirs, x), rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("mult", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_transforms_of_unit_scaling(reduction: str, mult: float, probabilities: bool, device: torch.device) -> None:
    """Their gradient is the one of the loss, which is not the derivative of its value."""
    x, y, _ = inputs(device)
    target = x.flip(0).softmax(1) if probabilities else y

    def loss(z: Tensor) -> Tensor:
        return unit_scaling.cross_entropy(z, target, reduction=reduction, mult=mult)

    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    (expected,) = torch.autograd.grad(value, leaf)
    torch._dynamo.reset()
    for call in (torch.func.grad_and_value(loss), torch.compile(torch.func.grad_and_value(loss), backend="aot_eager")):
        actual, seen = call(x)
        torch.testing.assert_close(seen, value)
        torch.testing.assert_close(actual, expected)
    tangent = torch.linspace(-1, 1, N * C).view(N, C)
    derivative = torch.func.jvp(loss, (x,), (tangent,))[1]  # torch makes float64 of one number times a float
    torch.testing.assert_close(derivative, (expected * tangent).sum(), check_dtype=False)
    row = torch.func.grad(lambda z: unit_scaling.cross_entropy(z, y[:1].clamp(min=0), mult=0.5))(x[0])
    assert row.shape == (C,)
    masked = x.index_fill(1, torch.tensor([C - 1]), -torch.inf)
    if not probabilities:
        masked_loss = torch.func.grad(lambda z: unit_scaling.cross_entropy(z, y.clamp(max=C - 2), mult=0.5))(masked)
        assert masked_loss.isfinite().all()


def test_compiled_code_without_transforms_has_the_operator_alone(device: torch.device) -> None:
    """The check for transforms leaves nothing in the graph."""
    x, y, _ = inputs(device)
    backend = EagerAndRecordGraphs()
    torch._dynamo.reset()
    torch.compile(lambda z: npu_xent.cross_entropy(z, y), backend=backend, fullgraph=True)(x)
    called = [n.target for n in backend.graphs[0].graph.nodes if n.op == "call_function"]
    assert torch.ops.npu_xent.cross_entropy.default in called
    assert torch._C._are_functorch_transforms_active not in called


@pytest.mark.parametrize("linear", [False, True])
def test_an_ignore_index_that_varies_compiles_twice_at_most(linear: bool, device: torch.device) -> None:
    x, y, layer = inputs(device)
    y = y.where((y < H) & (y >= 0), 0)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(z: Tensor, ignored: int) -> Tensor:
        if linear:
            return npu_xent.linear_cross_entropy(z, layer, y, ignore_index=ignored)
        return npu_xent.cross_entropy(z, y, ignore_index=ignored)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for ignored in (-100, *range(4), -7):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(compiled(leaf, ignored), leaf)
        torch.testing.assert_close(grad, gradient(lambda z, i=ignored: loss(z, i), x))
    assert counter.frame_count <= 2


ONE_GRADIENT = ("grad", "grad_and_value", "vjp")


@pytest.mark.parametrize(
    ("transform", "dtype", "compiled"),
    [
        *((name, dtype, False) for name in ONE_GRADIENT for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        ("vjp", torch.float32, True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name", ["mean", "sum", "none", "options", "images", "linear", "linear sum", "contract", "nnsight"]
)
def test_one_gradient_of_torch_func_is_fused(
    transform: str,
    name: str,
    dtype: torch.dtype,
    compiled: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By no torch operations over the logits, with the gradient of autograd; in compiled code, by our operators."""
    x, y, layer = inputs(device)
    x, layer, few = x.to(dtype), layer.to(dtype), y.where(y < H, -100)
    weight = torch.arange(1.0, C + 1, dtype=torch.float32).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    ce, upstream = npu_xent.cross_entropy, torch.linspace(0.5, 2.0, N, dtype=dtype)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda z: ce(z, y),
        "sum": lambda z: ce(z, y, reduction="sum") * 2,
        "none": lambda z: (ce(z, y, reduction="none") * upstream).sum(),
        "options": lambda z: ce(z, y, weight, label_smoothing=0.1, lse_square_scale=0.1, softcap=5.0, logit_scale=0.7),
        "images": lambda z: ce(z.T[None], y[None], reduction="none").sum(),
        "contract": lambda z: npu_xent.npu_cross_entropy_loss(z, y, reduction="sum", strict=False)[0].sum(),
        "nnsight": lambda z: nnsight.cross_entropy_loss(z[None], y[None]),
        "linear": lambda z: npu_xent.linear_cross_entropy(z, layer, few, linear_bias=layer[:, 0]),
        "linear sum": lambda z: npu_xent.linear_cross_entropy(z, layer, few, reduction="sum") * 2,
    }
    expected = gradient(functions[name], x)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("by torch operations")

    monkeypatch.setattr("npu_xent.functional._by_torch_operations", refuse)

    def transformed(z: Tensor) -> Tensor:
        return TRANSFORMS[transform](functions[name], z)

    seen: list[str] = []
    if compiled:
        torch._dynamo.reset()
        transformed = torch.compile(transformed, backend=recording(seen), fullgraph=True, dynamic=True)
    grad = transformed(x)
    assert bool(seen) == compiled, "none of our operators is in the graph"
    scale = 2 if transform == "vjp" else 1
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(grad, expected * scale, rtol=tolerance, atol=tolerance)


def test_all_gradients_of_a_linear_loss_by_torch_func(device: torch.device) -> None:
    x, y, layer = inputs(device)
    y, bias = y.where(y < H, -100), torch.linspace(-1, 1, H)

    def loss(x: Tensor, layer: Tensor, bias: Tensor) -> Tensor:
        return npu_xent.linear_cross_entropy(x, layer, y, linear_bias=bias)

    leaves = [t.clone().requires_grad_() for t in (x, layer, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for actual, true in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, layer, bias), expected, strict=True):
        torch.testing.assert_close(actual, true)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_derivatives_around_a_gradient_of_torch_func(linear: bool, compiled: bool, device: torch.device) -> None:
    """Autograd around grad, grad of grad, and forward mode of it: the second derivative, by torch operations."""
    torch._dynamo.reset()
    x, y, layer = (t.double() if t.is_floating_point() else t for t in inputs(device))
    y, direction = y.where(y < H, -100), torch.linspace(-1, 1, N * C, dtype=torch.float64).view(N, C)

    def ours(z: Tensor) -> Tensor:
        return npu_xent.linear_cross_entropy(z, layer, y) if linear else npu_xent.cross_entropy(z, y)

    def truth(z: Tensor) -> Tensor:
        return nn.functional.cross_entropy(nn.functional.linear(z, layer) if linear else z, y)

    def second(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def of_gradient(z: Tensor) -> Tensor:
            return (torch.func.grad(function)(z) * direction).sum()

        leaf = x.clone().requires_grad_()
        calls: list[Callable[[Tensor], Tensor]] = [
            lambda z: of_gradient(z),
            lambda z: torch.func.grad(of_gradient)(z),
            lambda z: torch.func.jvp(of_gradient, (z,), (direction,))[1],
        ]
        if compiled:
            calls = [torch.compile(call, backend="aot_eager", fullgraph=True) for call in calls]
        (around,) = torch.autograd.grad(calls[0](leaf), leaf)
        return [around, calls[1](x), calls[2](x)]

    for actual, expected in zip(second(ours), second(truth), strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():  # nothing records around it
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(ours)(leaf), torch.func.grad(truth)(leaf))


def test_the_contract_under_one_gradient_returns_all(device: torch.device) -> None:
    x, y, _ = inputs(device)
    expected = npu_xent.npu_cross_entropy_loss(x, y, lse_square_scale_for_zloss=0.1, strict=False)

    def loss(z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs = npu_xent.npu_cross_entropy_loss(z, y, lse_square_scale_for_zloss=0.1, strict=False)
        return outputs[0].sum(), outputs

    _, outputs = torch.func.grad(loss, has_aux=True)(x)
    for actual, true in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, true)
    with pytest.raises(npu_xent.ConstraintError, match=r"target\[0\] is 9"):
        torch.func.grad(lambda z: npu_xent.npu_cross_entropy_loss(z, y.new_full((N,), 9))[0].sum())(x)


class Seen(TorchFunctionMode):
    """Records the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A subclass that only passes on."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Quiet(Tensor):
    """A subclass that changes nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def public_calls(x: Tensor, y: Tensor, layer: Tensor) -> dict[Any, tuple[Callable[[], Any], dict[str, Any]]]:
    """A call of each public function, and the keywords that an override sees."""
    few, classes = y.where(y < H, -100), y.clamp(min=0)[:, None]
    return {
        npu_xent.cross_entropy: (
            lambda: npu_xent.cross_entropy(x, y, None, None, -100, None, "none", logit_scale=2.0),
            {"reduction": "none", "logit_scale": 2.0},
        ),
        npu_xent.linear_cross_entropy: (
            lambda: npu_xent.linear_cross_entropy(x, layer, few, return_lse=True),
            {"return_lse": True},
        ),
        npu_xent.npu_cross_entropy_loss: (
            lambda: npu_xent.npu_cross_entropy_loss(x, y, None, "sum"),
            {"reduction": "sum"},
        ),
        npu_xent.token_log_probs: (lambda: npu_xent.token_log_probs(x, y, temperature=0.5), {"temperature": 0.5}),
        npu_xent.linear_token_log_probs: (lambda: npu_xent.linear_token_log_probs(x, layer, few), {}),
        npu_xent.selected_log_probs: (
            lambda: npu_xent.selected_log_probs(x, classes, softcap=3.0),
            {"softcap": 3.0},
        ),
    }


def test_modes_and_subclasses_see_the_public_functions(device: torch.device) -> None:
    """With what differs from the defaults; the results are those of a plain call."""
    x, y, layer = inputs(device)
    of_subclass = public_calls(x.as_subclass(Subclass), y, layer)
    for function, (call, keywords) in public_calls(x, y, layer).items():
        with Seen() as mode:
            seen = call()
        func, args, given = mode.calls[0]
        assert func is function
        assert args[0] is x
        assert given == keywords
        Subclass.seen.clear()
        result = of_subclass[function][0]()
        assert Subclass.seen[0] is function
        for actual, other, plain in zip(*(tree_leaves(r) for r in (seen, result, call())), strict=True):
            assert (actual is None and plain is None) or torch.equal(actual, plain)
            assert plain is None or (type(other) is Subclass and torch.equal(other.as_subclass(Tensor), plain))


OLD_SUBCLASSES = pytest.mark.skipif(TORCH < (2, 13), reason="older Dynamo does not trace methods of subclasses")


@pytest.mark.parametrize("mode", ["device", pytest.param("subclass", marks=OLD_SUBCLASSES)])
def test_compiled_code_with_overrides(mode: str, device: torch.device) -> None:
    """A mode of torch's own and a subclass do not break a graph."""
    x, y, layer = inputs(device)

    def loss(z: Tensor) -> Tensor:
        return npu_xent.cross_entropy(z, y) + npu_xent.linear_token_log_probs(z, layer, y.clamp(0, H - 1)).sum()

    torch._dynamo.reset()
    # (A mode of AOTAutograd takes no operators of others with subclasses.)
    compiled = torch.compile(loss, backend="aot_eager" if mode == "device" else "eager", fullgraph=True)
    expected = loss(x)
    if mode == "device":
        # Not set_default_device: after set_default_device(None), get_default_device of torch 2.7 raises.
        with torch.device("cpu"):
            torch.testing.assert_close(compiled(x), expected)
    else:
        torch.testing.assert_close(compiled(x.as_subclass(Quiet)).as_subclass(Tensor), expected)


class Scored(nn.Module):
    """A model whose output is its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(C, H), npu_xent.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.layer(x)
        linear = npu_xent.linear_cross_entropy(x, self.layer.weight, y, return_lse=True)
        return self.loss(logits, y) + linear.loss + npu_xent.npu_cross_entropy_loss(logits, y)[0].sum()


def test_outputs_are_made_of_fields_or_one_iterable() -> None:
    """Not of one tensor, whose rows would become the fields."""
    fields = torch.ones(3)
    made = npu_xent.CrossEntropyOutput(x for x in fields)
    assert made == npu_xent.CrossEntropyOutput(*fields)
    for output in (npu_xent.CrossEntropyOutput, npu_xent.TokenLogProbs):
        with pytest.raises(TypeError, match="missing 2 required positional arguments"):
            output(fields)
        assert list(inspect.signature(output).parameters) == list(output._fields)


def test_symbolic_trace(device: torch.device) -> None:
    """The functions are nodes of the graph of torch.fx."""
    x, y, _ = inputs(device)
    y, model = y.where(y < H, -100), Scored()
    traced = torch.fx.symbolic_trace(model)
    targets = {node.target for node in traced.graph.nodes}
    assert {npu_xent.cross_entropy, npu_xent.linear_cross_entropy, npu_xent.npu_cross_entropy_loss} <= targets
    torch.testing.assert_close(traced(x, y), model(x, y))


def test_scripting_says_what_to_do(device: torch.device) -> None:
    """In one sentence, whose advice works."""
    x, y, _ = inputs(device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return npu_xent.cross_entropy(x, y)

    def advised(x: Tensor, y: Tensor):
        return torch.ops.npu_xent.cross_entropy(x, y)[0]

    for scripted in (loss, npu_xent.CrossEntropyLoss(), *public_calls(x, y, x)):
        with pytest.raises(NotImplementedError, match=r"use torch\.compile .* or call torch\.ops\.npu_xent\."):
            torch.jit.script(scripted)
    torch.testing.assert_close(torch.jit.script(advised)(x, y), loss(x, y))


class OfFunction(nn.Module):
    """A function, and a layer for it, if it takes one, as a module for torch.export."""

    def __init__(self, function: Callable[..., Any], layer: Tensor | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer if layer is None else nn.Parameter(layer)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y) if self.layer is None else self.function(x, self.layer, y)


ROWS, IMAGE = {0: "N"}, {0: "N", 1: "d1", 2: "d2"}
EXPORTS: dict[str, tuple[Callable[..., Any], dict[int, str], dict[int, str]]] = {
    "cross_entropy": (npu_xent.cross_entropy, {0: "N", 1: "C"}, ROWS),
    "none": (lambda x, y: npu_xent.cross_entropy(x, y, reduction="none", return_lse=True), {0: "N", 1: "C"}, ROWS),
    "images": (npu_xent.cross_entropy, {0: "N", 1: "C", 2: "d1", 3: "d2"}, IMAGE),
    "probabilities": (lambda x, y: npu_xent.cross_entropy(x, x.softmax(1)), {0: "N", 1: "C"}, ROWS),
    "contract": (npu_xent.npu_cross_entropy_loss, {0: "N", 1: "C"}, ROWS),
    "linear": (npu_xent.linear_cross_entropy, ROWS, ROWS),
    "log-probs": (lambda x, y: npu_xent.token_log_probs(x, y, return_entropy=True), {0: "N", 1: "C"}, ROWS),
    "linear log-probs": (npu_xent.linear_token_log_probs, ROWS, ROWS),
    "selected": (lambda x, y: npu_xent.selected_log_probs(x, y.clamp(min=0)[:, None]), {0: "N", 1: "C"}, ROWS),
}


def exported(
    name: str, strict: bool, device: torch.device
) -> tuple[torch.export.ExportedProgram, nn.Module, tuple[Tensor, Tensor]]:
    """The program with dynamic sizes, its module, and inputs of other sizes than the example's."""
    function, of_x, of_y = EXPORTS[name]
    x, y, layer = inputs(device)
    module = OfFunction(function, layer if name.startswith("linear") else None)
    example = (x, y.where(y < H, -100))
    if name == "images":
        example = (torch.randn(2, C, 3, 4), torch.randint(0, C, (2, 3, 4)))
    larger = tuple(torch.cat([t, t]) for t in example)
    if "C" in of_x.values():
        larger = (torch.cat([larger[0], larger[0]], 1), larger[1])
    sizes = {size: torch.export.Dim(size, max=1024) for size in ("N", "C", "d1", "d2")}
    dynamic = tuple({i: sizes[size] for i, size in of.items()} for of in (of_x, of_y))
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=dynamic, strict=strict), module, larger


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str, strict: bool, device: torch.device) -> None:
    """Saved and loaded, with dynamic sizes; the graph holds our operator."""
    program, module, larger = exported(name, strict, device)
    assert len(names(program.graph)) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()(*larger)
    expected = module(*larger)
    assert type(loaded) is type(expected)
    for actual, true in zip(tree_leaves(loaded), tree_leaves(expected), strict=True):
        assert (actual is None and true is None) or torch.equal(actual, true)


@pytest.mark.skipif(TORCH < (2, 13), reason="AOTInductor of older releases changes dtypes or missing outputs")
def test_ahead_of_time(device: torch.device, tmp_path: Path) -> None:
    """AOTInductor."""
    program, module, larger = exported("images", False, device)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)(*larger)
    for actual, true in zip(tree_leaves(loaded), tree_leaves(module(*larger)), strict=True):
        torch.testing.assert_close(actual, true)


def test_reduce_overhead(device: torch.device) -> None:
    """The mode takes the functions, with a gradient."""
    x, y, layer = inputs(device)
    few = y.where(y < H, -100)

    def loss(z: Tensor) -> Tensor:
        log_probs = npu_xent.token_log_probs(z, y) + npu_xent.linear_token_log_probs(z, layer, few)
        return npu_xent.cross_entropy(z, y) + npu_xent.linear_cross_entropy(z, layer, few) + log_probs.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    torch.testing.assert_close(gradient(compiled, x), gradient(loss, x))


KEEPING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda z, y: npu_xent.cross_entropy(z, y, reduction="none"),
    "float16": lambda z, y: npu_xent.cross_entropy(z.half(), y),
    "lse": lambda z, y: npu_xent.cross_entropy(z, y, return_lse=True).lse,
    "contract": lambda z, y: npu_xent.npu_cross_entropy_loss(z, y)[0],
    "log-probs": lambda z, y: npu_xent.token_log_probs(z, y),
    "selected": lambda z, y: npu_xent.selected_log_probs(z, y.clamp(min=0)[:, None]),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", KEEPING)
def test_logits_may_change_after_the_loss_in_compiled_code(name: str, backend: str, device: torch.device) -> None:
    """Losses whose backward reads the logits see those of the forward, as torch's does."""
    x, y, _ = inputs(device)
    function = KEEPING[name]

    def changed(z: Tensor) -> Tensor:
        logits = z * 2
        loss = function(logits, y)
        logits[:, 1:].mul_(3)
        logits.relu_()
        return loss.sum() + logits.sum()

    def expected(z: Tensor) -> Tensor:
        logits = z * 2
        return function(logits, y).sum() + torch.cat([logits[:, :1], logits[:, 1:] * 3], 1).relu().sum()

    torch._dynamo.reset()
    compiled = torch.compile(changed, backend=backend, fullgraph=True)
    torch.testing.assert_close(gradient(compiled, x), gradient(expected, x))


def test_changed_inputs_of_compiled_code_are_not_silently_wrong(device: torch.device) -> None:
    """Where torch keeps an input of the graph itself, its own check of versions raises."""
    x, y, _ = inputs(device)

    def changed(z: Tensor) -> Tensor:
        loss = npu_xent.cross_entropy(z, y, reduction="none").sum()
        z.mul_(2)
        return loss

    torch._dynamo.reset()
    compiled = torch.compile(changed, backend="aot_eager", fullgraph=True)
    expected = gradient(lambda z: npu_xent.cross_entropy(z, y, reduction="none").sum(), x)
    try:
        torch.testing.assert_close(gradient(compiled, x), expected)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017  either is right
