"""What torch's compilers of backwards see: compiled autograd, joint graphs, make_fx, batched gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from reference import make_logits, make_target
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx

import npu_xent

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


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_autograd(name: str, device: torch.device) -> None:
    """One graph of the backward, which holds our operators; the gradient has the bits of eager mode."""
    torch._dynamo.reset()  # or a graph of another case serves, and is not seen
    torch._dynamo.compiled_autograd.reset()
    function, x, seen = losses(device)[name], inputs(device)[0], []
    expected = gradient(function, x)

    def record(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(names(module.graph))
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=record)
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


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transforms(transform: str, linear: bool, device: torch.device) -> None:
    """Transforms of torch.func inside a compiled function, by torch operations as in eager mode."""
    x, y, layer = inputs(device)
    y = y.where(y < H, -100)

    def loss(z: Tensor) -> Tensor:
        return npu_xent.linear_cross_entropy(z, layer, y) if linear else npu_xent.cross_entropy(z, y)

    call = TRANSFORMS[transform]
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: call(loss, z), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), call(loss, x))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["mean", "sum", "none", "options", "images", "linear", "linear sum"])
@pytest.mark.parametrize("transform", ONE_GRADIENT)
def test_one_gradient_of_torch_func_is_fused(
    transform: str, name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By no torch operations over the logits, with the gradient of autograd."""
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
        "linear": lambda z: npu_xent.linear_cross_entropy(z, layer, few, linear_bias=layer[:, 0]),
        "linear sum": lambda z: npu_xent.linear_cross_entropy(z, layer, few, reduction="sum") * 2,
    }
    expected = gradient(functions[name], x)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("by torch operations")

    monkeypatch.setattr("npu_xent.functional._by_torch_operations", refuse)
    grad = TRANSFORMS[transform](functions[name], x)
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


@pytest.mark.parametrize("linear", [False, True])
def test_derivatives_around_a_gradient_of_torch_func(linear: bool, device: torch.device) -> None:
    """Autograd around grad, grad of grad, and forward mode of it: the second derivative, by torch operations."""
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
        (around,) = torch.autograd.grad(of_gradient(leaf), leaf)
        return [around, torch.func.grad(of_gradient)(x), torch.func.jvp(of_gradient, (x,), (direction,))[1]]

    for actual, expected in zip(second(ours), second(truth), strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():  # nothing records around it
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(ours)(leaf), torch.func.grad(truth)(leaf))
