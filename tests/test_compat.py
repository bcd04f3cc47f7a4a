"""The losses of other packages, against formulas written out in float64 and against the originals.

nnsight's and unit_scaling's originals are installed by `make test`. mindformers needs MindSpore, so its corners are
values that were measured on the original.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from originals import the_original
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npu_xent.compat import mindformers, nnsight, unit_scaling

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# One rounding of the result to its dtype, and float32 statistics.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-13}


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


DISAGREEING_SHAPES = [((2, 3, 5), (2, 4)), ((2, 3, 5), (3, 3)), ((2, 3, 5), (3,)), ((5,), (1,))]


@pytest.mark.parametrize("shapes", DISAGREEING_SHAPES, ids=str)
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
        with pytest.raises(
            ValueError, match=rf"^unit_scaling\.CrossEntropyLoss: {next(iter(options))} is not supported"
        ):
            unit_scaling.CrossEntropyLoss(**options)
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
    loss = mindformers.CrossEntropyLoss()
    page = torch.tensor([[3.0, 5, 6, 9, 12, 33, 42, 12, 32, 72]], device=device)
    assert loss(page, torch.tensor([1], device=device), torch.tensor([1.0], device=device)).tolist() == [67]
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


def probability_case(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class probabilities with some zeros, and a mask with zeros and fractions."""
    logits, _ = case(dtype, 9, 17, device=device)
    generator = torch.Generator().manual_seed(1)
    label = torch.rand(9, 17, generator=generator).mul(6).sub(3).relu().softmax(1)
    label[:, 5] = 0
    mask = torch.tensor([1, 0, 0.5, 1, 0, 0.25, 2, 1, 0])
    return logits, label.to(device), mask.to(device)


@pytest.mark.parametrize("label_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_mindformers_class_probabilities(
    dtype: torch.dtype, mask_dtype: torch.dtype, label_dtype: torch.dtype, device: torch.device
) -> None:
    logits, label, mask = probability_case(dtype, device)
    label, mask = label.to(label_dtype), mask.to(mask_dtype)
    logits.requires_grad_()
    exact = logits.detach().cpu().double().requires_grad_()
    weight = mask.cpu().double()
    losses = (label.cpu().double() * (exact.logsumexp(1, keepdim=True) - exact)).sum(1)
    numerator, denominator = (losses * weight).sum(), weight.sum().reshape(1) + 1e-8
    truth = numerator / denominator
    out_dtype = torch.float64 if torch.float64 in (dtype, mask_dtype) else torch.float32
    out_digits = torch.float32 if dtype != torch.float64 else torch.float64
    loss = mindformers.CrossEntropyLoss()(logits, label, mask)
    assert (loss.dtype, loss.shape) == (out_dtype, (1,))
    close(loss, truth.detach(), out_digits, scale=2)
    loss.backward()
    truth.sum().backward()
    assert logits.grad.dtype == dtype
    # Rounded once, also where it is small.
    relative = RELATIVE[dtype] + RELATIVE[out_digits]
    torch.testing.assert_close(logits.grad.cpu().double(), exact.grad, rtol=relative, atol=relative / 1000)
    parts = mindformers.CrossEntropyLoss(calculate_per_token_loss=True)(logits.detach(), label, mask)
    assert [(part.dtype, tuple(part.shape)) for part in parts] == [(out_dtype, ()), (out_dtype, (1,))]
    close(parts[0], numerator.detach(), out_digits, scale=2)
    close(parts[1], denominator, out_digits)


def test_mindformers_one_hot_probabilities_are_class_indices(device: torch.device) -> None:
    logits, _, mask = probability_case(torch.float32, device)
    label = torch.arange(9, device=device)
    one_hot = torch.nn.functional.one_hot(label, 17).float()
    gradients = []
    for target in (label, one_hot):
        x = logits.clone().requires_grad_()
        loss = mindformers.CrossEntropyLoss()(x, target, mask)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        gradients.append((loss.detach(), gradient))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "label"])
def test_mindformers_masked_rows_do_no_harm_to_class_probabilities(
    where: str, poison: float, device: torch.device
) -> None:
    logits, label, mask = probability_case(torch.float32, device)
    results = []
    for poisoned in (False, True):
        x, q = logits.clone(), label.clone()
        if poisoned:
            (x if where == "logits" else q)[mask == 0] = poison
        x.requires_grad_()
        loss = mindformers.CrossEntropyLoss()(x, q, mask)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*results, strict=True))
    assert (results[1][1][mask == 0] == 0).all()
    x = logits.clone().requires_grad_()
    nothing = mindformers.CrossEntropyLoss()(x, label, torch.zeros_like(mask))
    nothing.backward()
    assert nothing == 0
    assert (x.grad == 0).all()


def test_mindformers_infinite_logits_and_class_probabilities(device: torch.device) -> None:
    logits, label, mask = probability_case(torch.float32, device)
    loss = mindformers.CrossEntropyLoss()
    logits[0, 5] = -math.inf  # of probability 0
    logits.requires_grad_()
    finite = loss(logits, label, mask)
    finite.backward()
    without = [i for i in range(17) if i != 5]
    torch.testing.assert_close(
        loss(logits[:1, without], label[:1, without], mask[:1]), loss(logits[:1], label[:1], mask[:1])
    )
    assert finite.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 5] == 0
    with torch.no_grad():
        logits[0, 4] = -math.inf
    label[0, 4] = 0.5
    assert loss(logits, label, mask) == math.inf


def test_mindformers_class_probabilities_are_differentiable(device: torch.device) -> None:
    logits, label, mask = probability_case(torch.float32, device)
    label.requires_grad_()
    mindformers.CrossEntropyLoss()(logits, label, mask).backward()
    weight = mask.cpu().double()
    truth = -logits.cpu().double().log_softmax(1) * (weight / (weight.sum() + 1e-8)).unsqueeze(1)
    close(label.grad, truth, torch.float32, scale=2)


KEYWORDS = {
    "reduction": ("none", "calculate_per_token_loss"),
    "weight": (torch.ones(6), "input_mask"),
    "ignore_index": (-100, "input_mask"),
    "label_smoothing": (0.1, "class probabilities"),
    "seq_split_num": (4, "calculate_per_token_loss"),
    "monitor_device_local_loss": (True, "only parallel_config, "),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_mindformers_keywords_that_change_nothing_warn(name: str, device: torch.device) -> None:
    value, instead = KEYWORDS[name]
    with pytest.warns(UserWarning, match=rf"^mindformers\.CrossEntropyLoss: {name} is ignored; .*{instead}") as warned:
        loss = mindformers.CrossEntropyLoss(**{name: value})
    assert [warning.filename for warning in warned] == [__file__]
    logits, label = case(torch.float32, 4, 6, device=device, ignored=False)
    mask = torch.ones(4, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = mindformers.CrossEntropyLoss(None, False, False)
    assert torch.equal(loss(logits, label, mask), plain(logits, label, mask))


def test_mindformers_warns_of_each_keyword() -> None:
    with pytest.warns(UserWarning, match="is ignored") as warned:
        mindformers.CrossEntropyLoss(reduction="sum", foo=1)
    assert [str(warning.message).split(" is ignored")[0].split(": ")[1] for warning in warned] == ["reduction", "foo"]


def refusals(device: torch.device) -> list[tuple[type[Exception], Callable[[], object]]]:
    """What is refused, and how."""
    loss = mindformers.CrossEntropyLoss()
    logits, label, mask = (
        torch.zeros(4, 6, device=device),
        torch.zeros(4, device=device).long(),
        torch.ones(4, device=device),
    )
    return [
        (NotImplementedError, lambda: mindformers.CrossEntropyLoss({"model_parallel": 2})(logits, logits, mask)),
        (TypeError, lambda: loss(logits, label.short(), mask)),
        (TypeError, lambda: loss(logits, label.bool(), mask)),
        (TypeError, lambda: loss(logits.long(), label, mask)),
        (TypeError, lambda: loss(logits.long(), logits, mask)),
        (ValueError, lambda: loss(logits.view(2, 2, 6), label, mask)),
        (ValueError, lambda: loss(logits[:, :0], label, mask)),
        (ValueError, lambda: loss(logits[:, :0], logits[:, :0], mask)),
        (ValueError, lambda: loss(logits, label.float(), mask)),
        (ValueError, lambda: loss(logits, logits[:1], mask)),
        (ValueError, lambda: loss(logits, logits.T, mask)),
        (ValueError, lambda: loss(logits, logits, mask[:1])),
        (ValueError, lambda: loss(logits, label, mask[:1])),
        (ValueError, lambda: loss(logits, label[:3], mask)),
        (RuntimeError, lambda: loss(logits[:0], label[:0], mask[:0])),
        (RuntimeError, lambda: loss(logits[:0], logits[:0], mask[:0])),
        (RuntimeError, lambda: loss(logits, label, mask.clone().requires_grad_())),
    ]


@pytest.mark.parametrize("which", range(17))
def test_mindformers_refusals(which: int, device: torch.device) -> None:
    error, call = refusals(device)[which]
    with pytest.raises(error, match=r"mindformers\.CrossEntropyLoss: "):
        call()


def test_mindformers_parallel_config() -> None:
    class Config:
        data_parallel = 2
        model_parallel = 1

    logits, label, mask = torch.zeros(3, 6), torch.zeros(3).long(), torch.ones(3)
    for config in (Config(), {"data_parallel": 8, "model_parallel": 1}, {}, {"model_parallel": None}, None):
        assert mindformers.CrossEntropyLoss(config)(logits, label, mask) == pytest.approx(math.log(6))
    Config.model_parallel = 4
    with pytest.raises(RuntimeError, match="init_process_group first"):
        mindformers.CrossEntropyLoss(Config())(logits, label, mask)


# Compared with the originals ------------------------------------------------------------------------------------------


def load_nnsight_util() -> ModuleType:
    """nnsight.util by itself: its package imports transformers, diffusers and more, this file only torch."""
    spec = importlib.util.find_spec("nnsight")
    if spec is None or spec.origin is None:
        raise ImportError("no nnsight")
    file = importlib.util.spec_from_file_location("nnsight_util", Path(spec.origin).with_name("util.py"))
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    if not hasattr(module, "cross_entropy_loss"):
        raise ImportError("this nnsight has no cross_entropy_loss; 0.1.18 is the last release with it")
    return module


@pytest.fixture(scope="module")
def nnsight_util() -> ModuleType:
    return the_original(load_nnsight_util)


@pytest.fixture(scope="module")
def unit_scaling_package() -> ModuleType:
    return the_original(lambda: importlib.import_module("unit_scaling"))


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_original_fails_in_ci(ci: str, outcome: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="No module named 'no_such_original'"):
        the_original(lambda: importlib.import_module("no_such_original"))


def loss_and_gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum, on the CPU."""
    logits = logits.clone().requires_grad_()
    loss = function(logits)
    loss.sum().backward()
    return loss.detach().cpu(), logits.grad.cpu()


UNIT_SCALING_TARGETS = ["indices", "ignored", "ignore_index", "probabilities", "one row"]


@pytest.mark.parametrize("kind", UNIT_SCALING_TARGETS)
@pytest.mark.parametrize("mult", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unit_scaling_agrees_with_the_original(
    dtype: torch.dtype,
    reduction: str,
    mult: float,
    kind: str,
    device: torch.device,
    unit_scaling_package: ModuleType,
) -> None:
    logits, target = case(dtype, 9, 17, device=torch.device("cpu"), ignored=kind == "ignored")
    options = {"reduction": reduction, "ignore_index": int(target[0]) if kind == "ignore_index" else -100}
    if kind == "probabilities":
        target = torch.rand(9, 17, dtype=dtype, generator=torch.Generator().manual_seed(1)).softmax(1)
    elif kind == "one row":
        logits, target = logits[0], target[0]
    theirs, ours = unit_scaling_package, unit_scaling
    expected = loss_and_gradient(lambda x: theirs.functional.cross_entropy(x, target, mult=mult, **options), logits)
    modules = loss_and_gradient(lambda x: theirs.CrossEntropyLoss(mult, **options)(x, target), logits)
    torch.testing.assert_close(modules, expected, rtol=0, atol=0)
    logits, target = logits.to(device), target.to(device)
    for function in (
        lambda x: ours.cross_entropy(x, target, mult=mult, **options),
        lambda x: ours.CrossEntropyLoss(mult, **options)(x, target),
    ):
        torch.testing.assert_close(loss_and_gradient(function, logits), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": torch.ones(6)},
        {"size_average": True},
        {"reduce": False},
        {"label_smoothing": 0.1},
        {"reduction": "none"},
        {"shape": (2, 6, 3)},
        {"shape": (4, 1)},
        {"shape": (0, 6)},
    ],
    ids=str,
)
def test_unit_scaling_refuses_what_the_original_refuses(
    options: dict, device: torch.device, unit_scaling_package: ModuleType
) -> None:
    options = dict(options)
    shape = options.pop("shape", (4, 6))
    logits, target = torch.zeros(shape), torch.zeros(shape[:1] + shape[2:]).long()
    at_build = []
    for module in (unit_scaling_package.CrossEntropyLoss, unit_scaling.CrossEntropyLoss):
        try:
            module(**options)
            at_build.append(None)
        except Exception as error:
            at_build.append(type(error))
    assert at_build[0] is at_build[1]
    errors = []
    for function, where in (
        (unit_scaling_package.functional.cross_entropy, "cpu"),
        (unit_scaling.cross_entropy, device),
    ):
        with pytest.raises(Exception) as caught:
            function(logits.to(where), target.to(where), **options)
        errors.append(caught.type)
    assert errors[0] is errors[1]


@pytest.mark.parametrize("shape", [(3, 6, 11), (6, 11), (2, 1, 11)], ids=str)
@pytest.mark.parametrize("avg_token", [True, False])
@pytest.mark.parametrize("avg_batch", [True, False])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32], ids=str)
def test_nnsight_agrees_with_the_original(
    target_dtype: torch.dtype,
    shift: bool,
    avg_batch: bool,
    avg_token: bool,
    shape: tuple[int, ...],
    device: torch.device,
    nnsight_util: ModuleType,
) -> None:
    logits, target = case(torch.float32, *shape, device=torch.device("cpu"))
    target = target.to(target_dtype)
    options = {"shift": shift, "avg_batch": avg_batch, "avg_token": avg_token}
    expected = loss_and_gradient(lambda x: nnsight_util.cross_entropy_loss(x, target, **options), logits)
    loss = nnsight.cross_entropy_loss(logits.to(device), target.to(device), **options)
    assert loss.device.type == "cpu"
    for where in (device, torch.device("cpu")):  # the original moves both, so that they may be on different devices
        actual = loss_and_gradient(
            lambda x, where=where: nnsight.cross_entropy_loss(x, target.to(where), **options), logits.to(device)
        )
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("shapes", DISAGREEING_SHAPES, ids=str)
def test_nnsight_refuses_what_the_original_refuses(
    shapes: tuple[tuple[int, ...], ...], device: torch.device, nnsight_util: ModuleType
) -> None:
    logits, target = torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.long)
    for function, where in ((nnsight_util.cross_entropy_loss, "cpu"), (nnsight.cross_entropy_loss, device)):
        with pytest.raises(AssertionError):
            function(logits.to(where), target.to(where))


@pytest.mark.npu
def test_float64_is_refused_on_an_npu(device: torch.device) -> None:
    """Where torch computes too: the operators refuse it."""
    logits, q = (torch.rand(3, 4, device=device) for _ in range(2))
    labels, mask = torch.zeros(3, dtype=torch.int64, device=device), torch.ones(3, device=device)
    doubles = logits.cpu().double().to(device)  # torch_npu's double() makes float32
    for target in (labels, q):
        with pytest.raises(TypeError, match="input must be float32, bfloat16 or float16 on npu:0"):
            unit_scaling.cross_entropy(doubles, target)
        loss = mindformers.CrossEntropyLoss()
        with pytest.raises(TypeError, match="logits must be float32, bfloat16 or float16 on npu:0"):
            loss(doubles, target, mask)
        with pytest.raises(TypeError, match="input_mask must be float32, bfloat16 or float16 on npu:0"):
            loss(logits, target, doubles[:, 0])
