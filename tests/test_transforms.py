"""The loss inside what PyTorch builds around functions: compilers, export, vmap, checkpoints, autocast."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import make_logits, make_target
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import npu_xent
from npu_xent.compat import mindformers, nnsight, unit_scaling

pytestmark = pytest.mark.filterwarnings("ignore")

# Inductor generates code for the CPU here; for an NPU it wants a compiler that comes with the device's toolkit.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.cpu)]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": npu_xent.cross_entropy,
    "none": lambda x, y: npu_xent.cross_entropy(x, y, reduction="none").sum(),
    "z-loss": lambda x, y: npu_xent.cross_entropy(x, y, lse_square_scale=0.1, return_lse=True).loss,
    "softcap": lambda x, y: npu_xent.cross_entropy(x, y, softcap=2.0),
    "consumed": lambda x, y: npu_xent.cross_entropy(x * 1.0, y, consume_logits=True),
    "K-dim": lambda x, y: npu_xent.cross_entropy(x.t().unsqueeze(0), y.unsqueeze(0), label_smoothing=0.1),
    "probabilities": lambda x, y: npu_xent.cross_entropy(x, F.one_hot(y.clamp(min=0), x.shape[1]).to(x.dtype)),
    "contract": lambda x, y: npu_xent.npu_cross_entropy_loss(x, y)[0].squeeze(),
    "nnsight": lambda x, y: nnsight.cross_entropy_loss(x, y, shift=True),
    "unit_scaling": lambda x, y: unit_scaling.cross_entropy(x, y, mult=0.5),
    "mindformers": lambda x, y: mindformers.CrossEntropyLoss()(x, y.clamp(min=0), (y >= 0).float()).sum(),
}


def loss_and_grad(function: Callable[..., Tensor], logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of a fresh leaf."""
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, target)
    (3 * loss).backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_in_one_graph(name: str, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 9):
        logits = make_logits(rows, 13, torch.float32, device)
        target = make_target(rows, 13, device)
        for actual, expected in zip(
            loss_and_grad(compiled, logits, target), loss_and_grad(LOSSES[name], logits, target), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class Exported(nn.Module):
    """The loss as a module, for torch.export."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return npu_xent.cross_entropy(logits, target, label_smoothing=0.1)


def test_export_saved_and_loaded(device: torch.device) -> None:
    rows = torch.export.Dim("rows", min=2, max=1024)
    example = (make_logits(6, 13, torch.float32, device), make_target(6, 13, device))
    exported = torch.export.export(Exported(), example, dynamic_shapes=({0: rows}, {0: rows}))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (6, 11):
        logits, target = make_logits(n, 13, torch.float32, device), make_target(n, 13, device)
        assert torch.equal(loaded(logits, target), Exported()(logits, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vmap(reduction: str, device: torch.device) -> None:
    logits = make_logits(12, 13, torch.float32, device).view(3, 4, 13)
    target = make_target(12, 13, device).view(3, 4)
    actual = torch.vmap(lambda x, y: npu_xent.cross_entropy(x, y, reduction=reduction))(logits, target)
    expected = [npu_xent.cross_entropy(x, y, reduction=reduction) for x, y in zip(logits, target, strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected))


LINEAR_LOSSES: dict[str, Callable[..., Tensor]] = {
    **{
        reduction: functools.partial(npu_xent.linear_cross_entropy, reduction=reduction)
        for reduction in ("mean", "sum", "none")
    },
    "log_probs": npu_xent.linear_token_log_probs,
}


@pytest.mark.parametrize("transform", ["autograd", "grad", "vmap"])
@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_special_values_in_ignored_rows_of_a_linear_loss(name: str, transform: str, device: torch.device) -> None:
    """They change no gradient, also where 0 would be multiplied by them."""
    given = torch.randn(5, 8, device=device), torch.randn(6, 8, device=device), torch.randn(6, device=device)
    target = torch.tensor([1, -100, 5, -100, 2], device=device)
    special = given[0].clone()
    special[1], special[3] = float("nan"), float("inf")

    def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return LINEAR_LOSSES[name](x, w, target, linear_bias=bias).sum()

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        if transform == "autograd":
            leaves = [t.clone().requires_grad_() for t in tensors]
            return torch.autograd.grad(loss(*leaves), leaves)
        gradient = torch.func.grad(loss, (0, 1, 2))
        if transform == "grad":
            return gradient(*tensors)
        return torch.func.vmap(gradient, (0, None, None))(tensors[0].unsqueeze(0), *tensors[1:])

    for found, expected in zip(gradients(special, *given[1:]), gradients(*given), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["mean", "none", "consumed", "contract", "unit_scaling"])
def test_activation_checkpointing(name: str, use_reentrant: bool, device: torch.device) -> None:
    logits, target = make_logits(6, 13, torch.float32, device), make_target(6, 13, device)

    def checkpointed(x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(lambda a: LOSSES[name](a * 2, y), x, use_reentrant=use_reentrant)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return LOSSES[name](x * 2, y)

    results = loss_and_grad(checkpointed, logits, target), loss_and_grad(plain, logits, target)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_trains(name: str, device: torch.device) -> None:
    """The layer before the loss is bfloat16 there; the loss is float32, but where a contract keeps the dtype."""
    layer = nn.Linear(7, 13, device=device)
    inputs, target = make_logits(6, 7, torch.float32, device), make_target(6, 13, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = LOSSES[name](layer(inputs), target)
    loss.backward()
    assert loss.dtype == (torch.bfloat16 if name == "contract" else torch.float32)
    assert layer.weight.grad.isfinite().all()


# Programs that call F.cross_entropy, unchanged ------------------------------------------------------------------------


def classifier(generator: torch.Generator) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Images to classes, as torchvision's reference scripts do: nn.CrossEntropyLoss with label smoothing."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    criterion, labels = nn.CrossEntropyLoss(label_smoothing=0.1), torch.randint(10, (16,), generator=generator)
    return model, torch.randn(16, 3, 8, 8, generator=generator), lambda logits: criterion(logits, labels)


def tagger(generator: torch.Generator) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Tokens to tags, [N, C, T] logits, padding ignored, classes weighted."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    tags, weight = torch.randint(5, (4, 9), generator=generator), torch.rand(5, generator=generator) + 0.5
    tags[:, 7:] = -1

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), tags, weight=weight, ignore_index=-1)

    return model, torch.randn(4, 9, 6, generator=generator), loss


def student(generator: torch.Generator) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Distillation: the teacher's probabilities, softened, beside the labels."""
    inputs, teacher = torch.randn(12, 6, generator=generator), torch.randn(12, 8, generator=generator)
    labels = teacher.argmax(1)

    def loss(logits: Tensor) -> Tensor:
        soft = F.cross_entropy(logits / 2, (teacher / 2).softmax(1)) * 4
        return 0.5 * soft + 0.5 * F.cross_entropy(logits, labels)

    return nn.Linear(6, 8), inputs, loss


def segmenter(generator: torch.Generator) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Pixels to classes: [N, C, H, W] logits, 255 ignored."""
    masks = torch.randint(4, (2, 5, 6), generator=generator)
    masks[:, 0] = 255

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, masks, ignore_index=255, reduction="none").mean()

    return nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 6, generator=generator), loss


@pytest.mark.parametrize("program", [classifier, tagger, student, segmenter], ids=lambda f: f.__name__)
def test_programs_run_unchanged(program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of SGD on F.cross_entropy, and the same with ours in its place: the same losses."""
    histories, calls = [], []

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return npu_xent.cross_entropy(*args, **kwargs)

    for patched in (False, True):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(torch.nn.functional, "cross_entropy", ours)
            torch.manual_seed(0)
            model, inputs, loss_of = program(torch.Generator().manual_seed(1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            losses = []
            for _ in range(5):
                loss = loss_of(model(inputs))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            histories.append(losses)
    assert len(calls) >= 5
    assert histories[0][0] != histories[0][-1]
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_class_weight(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    """As torch does there, whatever the mix; without autocast the weight has to be float32 or of the logits' dtype."""
    logits, target = make_logits(6, 13, dtype, device), make_target(6, 13, device)
    weight = torch.rand(13, generator=torch.Generator().manual_seed(0)).to(device, weight_dtype)
    one_hot = F.one_hot(target, 13).float()
    hidden, head = make_logits(6, 7, torch.float32, device), make_logits(13, 7, torch.float32, device)
    by_index, by_probability = (
        F.cross_entropy(logits.cpu().float(), y.cpu(), weight.cpu().float()) for y in (target, one_hot)
    )
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(npu_xent.cross_entropy(logits, target, weight).cpu(), by_index)
        torch.testing.assert_close(npu_xent.cross_entropy(logits, one_hot, weight).cpu(), by_probability)
        linear = npu_xent.linear_cross_entropy(hidden, head, target, weight=weight)
    product = F.linear(hidden.cpu().bfloat16(), head.cpu().bfloat16()).float()
    expected = F.cross_entropy(product, target.cpu(), weight.cpu().float())
    torch.testing.assert_close(linear.cpu(), expected, rtol=1e-2, atol=0)
    if weight_dtype not in (torch.float32, dtype):
        with pytest.raises(TypeError, match="weight must be float32 or of the logits' dtype"):
            npu_xent.cross_entropy(logits, target, weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast_casts_the_class_weight_in_compiled_code(dynamic: bool, device: torch.device) -> None:
    """With dynamic shapes the weight has no size yet when it is cast."""

    def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return npu_xent.cross_entropy(x, y, w)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for classes in (13, 17):
        logits, target = make_logits(6, classes, torch.float32, device), make_target(6, classes, device)
        weight = torch.rand(classes, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        torch.testing.assert_close(compiled(logits, target, weight), loss(logits, target, weight))


X, Y = torch.ones(3, 5), torch.tensor([0, 4, 2])
REFUSED: dict[str, tuple[type[Exception], str, Callable[[Tensor], Tensor]]] = {
    "logits": (TypeError, "logits must be float32", lambda x: npu_xent.cross_entropy(x.to(torch.float8_e5m2), Y)),
    "token logits": (
        TypeError,
        "logits must be float32",
        lambda x: npu_xent.token_log_probs(x.to(torch.float8_e5m2), Y).log_probs,
    ),
    "target": (TypeError, "target must be int64", lambda x: npu_xent.cross_entropy(x, Y.bool())),
    "weight": (
        RuntimeError,
        "weight requires a gradient",
        lambda x: npu_xent.cross_entropy(x, Y, torch.ones(5, requires_grad=True)),
    ),
    "temperature": (
        TypeError,
        "temperature must be a number or float32",
        lambda x: npu_xent.token_log_probs(x, Y, temperature=torch.ones(3).half()).log_probs,
    ),
}

HEAD = torch.ones(5, 5)
LINEAR: dict[str, Callable[..., Tensor]] = {
    "linear_cross_entropy": functools.partial(npu_xent.linear_cross_entropy, reduction="none"),  # not fused there
    "linear_token_log_probs": npu_xent.linear_token_log_probs,
}
REFUSED_LINEAR: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "one bias for all classes": (ValueError, "linear_bias must have one value", {"linear_bias": torch.ones(1)}),
    "a bias of two dimensions": (ValueError, r"linear_bias must have shape \[C\]", {"linear_bias": torch.ones(3, 5)}),
    "no rows in a chunk": (ValueError, "chunk_rows must be at least 1", {"chunk_rows": 0}),
    "a layer in float64": (TypeError, "linear_weight must have the dtype of input", {"linear_weight": HEAD.double()}),
    "a layer without classes": (ValueError, "linear_weight must have at least one class", {"linear_weight": HEAD[:0]}),
    "a layer of other features": (ValueError, "linear_weight must have a column for", {"linear_weight": HEAD[:, :4]}),
    "a layer elsewhere": (ValueError, "linear_weight must be on the device", {"linear_weight": HEAD.to("meta")}),
}
for which, called in LINEAR.items():
    for what, (kind, message, changed) in REFUSED_LINEAR.items():
        REFUSED[f"{which}: {what}"] = (
            kind,
            message,
            functools.partial(called, **{"linear_weight": HEAD, "target": Y} | changed),
        )


@pytest.mark.cpu
@pytest.mark.parametrize("name", REFUSED)
def test_transforms_refuse_what_the_functions_refuse(name: str) -> None:
    """There torch operations compute, and Python checks instead of the operators."""
    error, words, function = REFUSED[name]
    for call in (function, torch.func.grad(lambda x: function(x).sum())):
        with pytest.raises(error, match=words):
            call(X)


@pytest.mark.cpu
@pytest.mark.parametrize("name", LINEAR)
def test_transforms_cast_the_layer_as_autocast_does(name: str) -> None:
    """Of floating-point tensors all but float64."""
    function = LINEAR[name]
    with torch.autocast("cpu", torch.bfloat16):
        for x in (X.double(), X.int()):
            for call in (function, lambda x, w, y: torch.vmap(lambda a: function(a, w, y))(x.expand(2, 3, 5))):
                with pytest.raises(TypeError, match=r"^npu_xent: (linear_weight|input) must"):
                    call(x, HEAD, Y)
        for x, head in ((X, HEAD.half()), (X.double(), HEAD.double())):
            expected = function(x, head, Y)
            actual = torch.vmap(functools.partial(function, target=Y), in_dims=(0, None))(x.expand(2, 3, 5), head)
            torch.testing.assert_close(actual, expected.expand(2, 3))


@pytest.mark.cpu
def test_autocast_casts_the_class_weight_of_a_linear_layer() -> None:
    weight, probabilities = torch.arange(1, 6).half(), F.one_hot(Y, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = npu_xent.linear_cross_entropy(X, HEAD, Y, weight=weight, reduction="sum")
        actual = npu_xent.linear_cross_entropy(X, HEAD, probabilities, weight=weight, reduction="sum")
        torch.testing.assert_close(actual, expected)
        with pytest.raises(TypeError, match="weight must be float32"):
            npu_xent.linear_cross_entropy(X, HEAD, probabilities, weight=weight.int())
