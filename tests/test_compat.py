"""The losses of other packages, against formulas written out in float64; corners as measured on the originals."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npu_xent.compat import mindformers, nnsight, unit_scaling

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# One rounding of the result to its dtype, and float32 statistics.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-13}


def close(actual: Tensor, truth: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Equal in shape, and in value up to the rounding of dtype."""
    assert actual.shape == truth.shape
    tolerance = RELATIVE[dtype] * scale
    torch.testing.assert_close(actual.detach().cpu().double(), truth, rtol=tolerance, atol=tolerance, equal_nan=True)


def nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log_softmax at the target, in float64; 0 where the target is -100."""
    log_prob = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    picked = log_prob.gather(-1, target.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(target == -100, 0.0, -picked)


def case(dtype: torch.dtype, *shape: int, device: torch.device, ignored: bool = True) -> tuple[Tensor, Tensor]:
    """Logits and targets; some of the targets are -100."""
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    if ignored:
        target.view(-1)[1::3] = -100
    return logits.to(device), target.to(device)


# nnsight --------------------------------------------------------------------------------------------------------------


def nnsight_truth(logits: Tensor, target: Tensor, shift: bool, avg_batch: bool, avg_token: bool) -> Tensor:
    """A mean of row means, in float64."""
    if shift:
        logits, target = logits[:, :-1], target[:, 1:]
    losses = nll(logits, target)
    if avg_token:
        losses = losses.sum(1) / (target != -100).sum(1)
    return losses.mean(0) if avg_batch else losses


@pytest.mark.parametrize("avg_token", [True, False])
@pytest.mark.parametrize("avg_batch", [True, False])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nnsight(dtype: torch.dtype, shift: bool, avg_batch: bool, avg_token: bool, device: torch.device) -> None:
    logits, target = case(dtype, 3, 6, 11, device=device)
    logits.requires_grad_()
    options = {"shift": shift, "avg_batch": avg_batch, "avg_token": avg_token}
    loss = nnsight.cross_entropy_loss(logits, target, **options)
    exact = logits.detach().cpu().double().requires_grad_()
    truth = nnsight_truth(exact, target.cpu(), **options)
    assert loss.dtype == dtype
    assert loss.device.type == "cpu"
    close(loss, truth.detach(), dtype)
    upstream = torch.linspace(-1, 2, truth.numel(), dtype=dtype).view(truth.shape)
    loss.backward(upstream)
    truth.backward(upstream.double())
    close(logits.grad, exact.grad, dtype)


def test_nnsight_shapes_and_corners(device: torch.device) -> None:
    logits, target = case(torch.float32, 4, 7, device=device)
    assert nnsight.cross_entropy_loss(logits, target).shape == ()
    assert nnsight.cross_entropy_loss(logits, target, avg_batch=False).shape == (1,)
    assert nnsight.cross_entropy_loss(logits, target, avg_token=False).shape == (4,)
    assert nnsight.cross_entropy_loss(logits, target, avg_batch=False, avg_token=False).shape == (1, 4)
    assert nnsight.cross_entropy_loss(logits.unsqueeze(0), target).shape == ()  # each unsqueezed by itself
    int32 = nnsight.cross_entropy_loss(logits, target.int())
    assert torch.equal(int32, nnsight.cross_entropy_loss(logits, target))
    ignored = torch.full_like(target, -100)
    assert nnsight.cross_entropy_loss(logits, ignored).isnan()
    assert nnsight.cross_entropy_loss(logits[:0], target[:0], shift=True).isnan()
    one, one_target = logits[:1].unsqueeze(0), target[:1].unsqueeze(0)
    assert nnsight.cross_entropy_loss(one, one_target, shift=True).isnan()
    assert nnsight.cross_entropy_loss(one, one_target, shift=True, avg_batch=False, avg_token=False).shape == (1, 0)


@pytest.mark.parametrize("shapes", [((2, 3, 5), (2, 4)), ((2, 3, 5), (3, 3)), ((2, 3, 5), (3,)), ((5,), (1,))], ids=str)
def test_nnsight_refuses_shapes_that_disagree(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    logits, target = torch.zeros(shapes[0], device=device), torch.zeros(shapes[1], dtype=torch.long, device=device)
    with pytest.raises(AssertionError, match="must have shape"):
        nnsight.cross_entropy_loss(logits, target)


# unit scaling ---------------------------------------------------------------------------------------------------------


def unit_scaling_truth(logits: Tensor, target: Tensor, reduction: str, mult: float) -> tuple[Tensor, Tensor]:
    """The loss and its scaled gradient, in float64."""
    x = mult * logits.double()
    rows, classes = x.shape
    one_hot = torch.zeros_like(x)
    kept = target != -100
    one_hot[kept, target[kept]] = 1
    gradient = classes / math.sqrt(classes - 1) * (x.softmax(1) - one_hot) * kept.unsqueeze(1)
    total = nll(x, target).sum()
    return (total / rows if reduction == "mean" else total), gradient


@pytest.mark.parametrize("mult", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_scaling(dtype: torch.dtype, reduction: str, mult: float, device: torch.device) -> None:
    logits, target = case(dtype, 9, 17, device=device)
    truth, gradient = unit_scaling_truth(logits.cpu(), target.cpu(), reduction, mult)
    logits.requires_grad_()
    for call in (
        lambda: unit_scaling.cross_entropy(logits, target, reduction=reduction, mult=mult),
        lambda: unit_scaling.CrossEntropyLoss(mult, reduction=reduction)(logits, target),
    ):
        logits.grad = None
        loss = call()
        assert loss.dtype == dtype
        close(loss, truth, dtype)
        loss.backward()
        assert logits.grad.dtype == dtype
        close(logits.grad, gradient, dtype, scale=4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_scaling_probabilities_single_rows_and_upstream(
    dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    logits, target = case(dtype, 5, 8, device=device, ignored=False)
    truth, gradient = unit_scaling_truth(logits.cpu(), target.cpu(), reduction, 0.7)
    one_hot = torch.nn.functional.one_hot(target, 8).to(dtype)
    logits.requires_grad_()
    loss = unit_scaling.cross_entropy(logits, one_hot, reduction=reduction, mult=0.7)
    close(loss, truth, dtype)
    (3 * loss).backward()
    close(logits.grad, 3 * gradient, dtype, scale=16)
    single = unit_scaling.cross_entropy(logits[0], target[0], reduction=reduction, mult=0.7)
    close(single, unit_scaling_truth(logits[:1].detach().cpu(), target[:1].cpu(), reduction, 0.7)[0], dtype)


@pytest.mark.cpu
@pytest.mark.parametrize("which", ["nnsight", "nnsight shifted", "unit_scaling", "mindformers"])
def test_the_logits_are_not_copied(which: str, device: torch.device) -> None:
    """What is made of the logits' size is their gradient, by the sweep: nothing copies or multiplies."""
    logits, target = case(torch.float32, 2, 9, 17, device=device)
    logits.requires_grad_()
    rows, labels = logits.view(-1, 17), target.view(-1)
    losses: dict[str, Callable[[], Tensor]] = {
        "nnsight": lambda: nnsight.cross_entropy_loss(logits, target),
        "nnsight shifted": lambda: nnsight.cross_entropy_loss(logits, target, shift=True),
        "unit_scaling": lambda: unit_scaling.cross_entropy(rows, labels, mult=2.0),
        "mindformers": lambda: mindformers.CrossEntropyLoss()(rows, labels, labels >= 0),
    }
    storages: dict[int, str] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple) else (out,):
                if isinstance(made, Tensor) and made.numel() >= logits.numel():
                    storages.setdefault(made.untyped_storage().data_ptr(), str(func))
            return out

    with Watch():
        losses[which]().backward()
    storages.pop(logits.untyped_storage().data_ptr(), None)
    made_by = "npu_xent.row_stats_grad.default" if which == "unit_scaling" else "npu_xent.row_grad.default"
    assert list(storages.values()) == [made_by]


def test_unit_scaling_corners(device: torch.device) -> None:
    logits, target = case(torch.float32, 4, 6, device=device)
    ignored = torch.full_like(target, -100)
    assert unit_scaling.cross_entropy(logits, ignored) == 0
    other = torch.where(target == -100, 7, target)
    assert torch.equal(
        unit_scaling.cross_entropy(logits, other, ignore_index=7), unit_scaling.cross_entropy(logits, target)
    )
    with pytest.raises(ValueError, match="target must have"):
        unit_scaling.cross_entropy(logits, target.view(2, 2))
    with pytest.raises(ValueError, match="target must have"):
        unit_scaling.cross_entropy(logits[:1], target[0])
    with pytest.raises(TypeError, match="target must be int64"):
        unit_scaling.cross_entropy(logits, target.bool())
    for options in ({"weight": torch.ones(6)}, {"size_average": True}, {"reduce": False}, {"label_smoothing": 0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            unit_scaling.cross_entropy(logits, target, **options)
    with pytest.raises(AssertionError, match="reduction"):
        unit_scaling.cross_entropy(logits, target, reduction="none")
    with pytest.raises(AssertionError, match="input must have shape"):
        unit_scaling.cross_entropy(logits.view(2, 2, 6), target.view(2, 2))
    with pytest.raises(ZeroDivisionError):
        unit_scaling.cross_entropy(logits[:, :1], torch.zeros_like(target))
    with pytest.raises(ZeroDivisionError):
        unit_scaling.cross_entropy(logits[:0], target[:0])
    assert unit_scaling.cross_entropy(logits[:0], target[:0], reduction="sum") == 0


# mindformers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mindformers(dtype: torch.dtype, mask_dtype: torch.dtype, device: torch.device) -> None:
    logits, label = case(dtype, 9, 17, device=device, ignored=False)
    mask = torch.tensor([1, 0, 0.5, 1, 0, 0.25, 2, 1, 0]).to(mask_dtype).to(device)
    logits.requires_grad_()
    exact = logits.detach().cpu().double().requires_grad_()
    weight = mask.cpu().double()
    numerator, denominator = (nll(exact, label.cpu()) * weight).sum(), weight.sum().reshape(1) + 1e-8
    truth = numerator / denominator
    out_dtype = torch.float64 if torch.float64 in (dtype, mask_dtype) else torch.float32
    out_digits = torch.float32 if dtype != torch.float64 else torch.float64
    loss = mindformers.CrossEntropyLoss()(logits, label, mask)
    assert (loss.dtype, loss.shape) == (out_dtype, (1,))
    close(loss, truth.detach(), out_digits, scale=2)
    loss.backward()
    truth.sum().backward()
    assert logits.grad.dtype == dtype
    close(logits.grad, exact.grad, dtype)
    parts = mindformers.CrossEntropyLoss(calculate_per_token_loss=True)(logits.detach(), label.int(), mask)
    assert [tuple(part.shape) for part in parts] == [(), (1,)]
    close(parts[0], numerator.detach(), out_digits, scale=2)
    close(parts[1], denominator, out_digits)


def test_mindformers_corners(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    loss = mindformers.CrossEntropyLoss(seq_split_num=4)
    page = torch.tensor([[3.0, 5, 6, 9, 12, 33, 42, 12, 32, 72]], device=device)
    assert loss(page, torch.tensor([1], device=device), torch.tensor([1.0], device=device)).shape == (1,)
    logits, label = case(torch.float32, 4, 6, device=device, ignored=False)
    nothing = torch.zeros(4, device=device)
    logits.requires_grad_()
    masked = loss(logits, label, nothing)
    masked.backward()
    assert masked == 0
    assert (logits.grad == 0).all()
    mask = torch.tensor([1.0, 0, 1, 1], device=device)
    wild = label.clone()
    wild[1] = 99
    assert torch.equal(loss(logits, wild, mask), loss(logits, label, mask))
    with torch.no_grad():
        poisoned = logits.clone()
        poisoned[1] = math.nan
    assert torch.equal(loss(poisoned, label, mask), loss(logits, label, mask))
    assert torch.equal(loss(logits, label.view(2, 2), mask.view(2, 2)), loss(logits, label, mask))
    if device.type == "cpu":
        for bad in (99, -1, -100):
            wild[0] = bad
            with pytest.raises(IndexError, match=rf"label\[0\] is {bad}, "):
                loss(logits, wild, mask)
    mindformers.CrossEntropyLoss(check_for_nan_in_loss_and_grad=True)(logits, label, mask)
    assert "local loss: " in capsys.readouterr().out


def refusals(device: torch.device) -> list[tuple[type[Exception], Callable[[], object]]]:
    """What is refused, and how."""
    loss = mindformers.CrossEntropyLoss()
    logits, label, mask = (
        torch.zeros(4, 6, device=device),
        torch.zeros(4, device=device).long(),
        torch.ones(4, device=device),
    )
    return [
        (NotImplementedError, lambda: mindformers.CrossEntropyLoss({"model_parallel": 2})),
        (TypeError, lambda: loss(logits, label.short(), mask)),
        (ValueError, lambda: loss(logits.view(2, 2, 6), label, mask)),
        (ValueError, lambda: loss(logits, label, mask[:1])),
        (ValueError, lambda: loss(logits, label[:3], mask)),
        (RuntimeError, lambda: loss(logits[:0], label[:0], mask[:0])),
        (RuntimeError, lambda: loss(logits, label, mask.clone().requires_grad_())),
    ]


@pytest.mark.parametrize("which", range(7))
def test_mindformers_refusals(which: int, device: torch.device) -> None:
    error, call = refusals(device)[which]
    with pytest.raises(error, match=r"mindformers\.CrossEntropyLoss: "):
        call()


def test_mindformers_parallel_config() -> None:
    class Config:
        data_parallel = 2
        model_parallel = 1

    for config in (Config(), {"data_parallel": 8, "model_parallel": 1}, {}, None):
        mindformers.CrossEntropyLoss(config)
    Config.model_parallel = 4
    with pytest.raises(NotImplementedError, match="model_parallel is 4"):
        mindformers.CrossEntropyLoss(Config())


# Side by side with the real packages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mult", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unit_scaling_beside_the_original(dtype: torch.dtype, reduction: str, mult: float) -> None:
    """pip install --no-deps unit-scaling==0.3.5 docstring_parser einops"""
    original = pytest.importorskip("unit_scaling.functional", exc_type=ImportError)
    logits, target = case(dtype, 9, 17, device=torch.device("cpu"))
    results = []
    for function in (unit_scaling.cross_entropy, original.cross_entropy):
        x = logits.clone().requires_grad_()
        loss = function(x, target, reduction=reduction, mult=mult)
        loss.backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("avg_token", [True, False])
@pytest.mark.parametrize("avg_batch", [True, False])
@pytest.mark.parametrize("shift", [False, True])
def test_nnsight_beside_the_original(shift: bool, avg_batch: bool, avg_token: bool) -> None:
    """pip install --no-deps nnsight==0.1.18; its package does not import without more, the function's file does."""
    spec = importlib.util.find_spec("nnsight")
    if spec is None or spec.origin is None:
        pytest.skip("needs nnsight")
    file = importlib.util.spec_from_file_location("nnsight_util", Path(spec.origin).with_name("util.py"))
    assert file is not None
    assert file.loader is not None
    original = importlib.util.module_from_spec(file)
    try:
        file.loader.exec_module(original)
    except ImportError as error:
        pytest.skip(f"needs what nnsight imports: {error}")
    logits, target = case(torch.float32, 3, 6, 11, device=torch.device("cpu"))
    results = []
    for function in (nnsight.cross_entropy_loss, original.cross_entropy_loss):
        x = logits.clone().requires_grad_()
        loss = function(x, target, shift=shift, avg_batch=avg_batch, avg_token=avg_token)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])
