"""What is built around token_log_probs: autograd's rules, consumed logits, compilers, transforms, threads, memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import (
    DTYPES,
    LOW_PRECISION,
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    pairwise,
)
from token_cases import (
    CLASSES,
    ROWS,
    loss_of,
    outputs_and_grad,
    plain_loss,
    problem,
    temperatures,
    token_truth,
    upstreams,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import npu_xent


def loss_and_grad(function: Callable[..., Tensor], logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *args, **options)
    (3 * loss).backward()
    return loss.detach(), leaf.grad


# Autograd -------------------------------------------------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(per_row: bool, softcap: float | None, device: torch.device) -> None:
    logits = make_logits(4, 5, torch.float64, device, spread=1.0).requires_grad_()
    target = torch.tensor([2, 1, -100, 1], device=device)
    options = {
        "temperature": temperatures((4,), device) if per_row else 0.7,
        "logit_scale": -0.8,
        "softcap": softcap,
    }

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return npu_xent.token_log_probs(x, target, **options, return_entropy=True)[:2]

    assert torch.autograd.gradcheck(function, (logits,))


def test_second_backward_and_second_derivative(device: torch.device) -> None:
    logits, target = problem(device)
    leaf = logits.requires_grad_()
    out = npu_xent.token_log_probs(leaf, target, return_entropy=True)
    both = out.log_probs.sum() + out.entropy.sum()
    first, second = (torch.autograd.grad(both, leaf, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, second)
    parts = [torch.autograd.grad(output.sum(), leaf, retain_graph=True)[0] for output in out[:2]]
    torch.testing.assert_close(sum(parts), first)
    for output in (*out[:2], both):
        (grad,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.square().sum().backward()
    both.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        both.backward()


def test_expanded_upstream_gradients(device: torch.device) -> None:
    """Those of a sum have stride 0; of a float64 or bfloat16 result downstream autograd casts them."""
    logits, target = problem(device)
    options = {"grad_log_probs": 1.0, "grad_entropy": 1.0}
    expected = token_truth(logits, target, **options)
    leaf = logits.requires_grad_()
    out = npu_xent.token_log_probs(leaf, target, return_entropy=True)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert_near(leaf.grad, expected.grad, expected.grad_terms)


def test_changed_logits_are_noticed(device: torch.device) -> None:
    leaf, target = problem(device)
    for change in (torch.Tensor.zero_, lambda t: t.mul_(2)):
        logits = leaf.clone().requires_grad_() * 1
        loss = loss_of(logits, target)
        change(logits.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_forward_mode_is_refused(device: torch.device) -> None:
    """With and without reverse mode: a dropped tangent would pass for zero."""
    logits, target = problem(device)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), forward_ad.dual_level():
            dual = forward_ad.make_dual(logits, torch.ones_like(logits))
            with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp"):
                npu_xent.token_log_probs(dual, target)


@pytest.mark.parametrize("mode", ["no gradient", "no_grad", "inference_mode"])
def test_modes_without_gradients(mode: str, device: torch.device) -> None:
    logits, target = problem(device)
    options = {"return_entropy": True, "return_top1": True}
    training = npu_xent.token_log_probs(logits.clone().requires_grad_(), target, **options)
    if mode != "no gradient":
        logits.requires_grad_()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(mode, contextlib.nullcontext)():
        results = [npu_xent.token_log_probs(x, target, **options) for x in (logits, logits.clone())]
    for out in results:
        for actual, expected in zip(out, training, strict=True):
            assert not actual.requires_grad
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    """Results are float32 in any case, of the logits as they are."""
    logits, target = problem(device, dtype)
    grads = upstreams(target.shape, dtype, device, "both")
    expected = outputs_and_grad(logits, target, grads)
    with torch.autocast(device.type, torch.bfloat16):
        actual = outputs_and_grad(logits, target, grads)
    for a, e in zip((*actual[0], actual[1]), (*expected[0], expected[1]), strict=True):
        assert_same_bits(a, e)


def test_autocast_trains(device: torch.device) -> None:
    layer = nn.Linear(7, CLASSES, device=device)
    inputs, target = make_logits(ROWS, 7, torch.float32, device), make_target(ROWS, CLASSES, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(layer(inputs), target)
        expected = plain_loss(layer(inputs).float(), target)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, layer.weight)
    (wanted,) = torch.autograd.grad(expected, layer.weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("consume", [False, True])
def test_activation_checkpointing(consume: bool, use_reentrant: bool, device: torch.device) -> None:
    logits, target = problem(device)

    def loss(x: Tensor) -> Tensor:
        return loss_of(x * 2, target, consume_logits=consume)

    checkpointed = loss_and_grad(lambda x: checkpoint(loss, x, use_reentrant=use_reentrant), logits)
    torch.testing.assert_close(checkpointed, loss_and_grad(loss, logits))


# Consumed logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", ["both", "log_probs", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_consumed_logits_hold_the_gradient(dtype: torch.dtype, uses: str, device: torch.device) -> None:
    """After the backward, with the bits of one that is not; until then they are as they were."""
    values, target = problem(device, dtype)
    grads = upstreams(target.shape, dtype, device, uses)
    expected, grad = outputs_and_grad(values, target, grads)
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    out = npu_xent.token_log_probs(logits, target, return_entropy=True, return_top1=True, consume_logits=True)
    for actual, wanted in zip(out, expected, strict=True):
        assert_same_bits(actual, wanted)
    assert_same_bits(logits, values)
    version = logits._version
    used = [(output, g) for output, g in zip(out[:2], grads, strict=True) if g is not None]
    torch.autograd.backward(*map(list, zip(*used, strict=True)))
    assert_same_bits(logits, grad)
    assert_same_bits(leaf.grad, grad)
    assert logits._version > version


def test_second_backward_after_consuming_is_refused(device: torch.device) -> None:
    """Also where each of the two outputs goes backward on its own: the second would read a gradient as logits."""
    leaf, target = problem(device)
    for first, second in ((0, 0), (0, 1), (1, 0), (1, 1)):
        logits = leaf.clone().requires_grad_() * 1
        out = npu_xent.token_log_probs(logits, target, return_entropy=True, consume_logits=True)
        out[first].sum().backward(retain_graph=True)
        gradient = logits.clone()
        with pytest.raises(RuntimeError, match="consume_logits"):
            out[second].sum().backward(retain_graph=True)
        assert_same_bits(logits, gradient)


REFUSED_TO_CONSUME: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a leaf": (lambda leaf: leaf, "would overwrite a leaf"),
    "a view of a leaf": (lambda leaf: leaf.view(-1).view(ROWS, CLASSES), "would overwrite a leaf"),
    "rows of a leaf": (lambda leaf: leaf[2:], "would overwrite a leaf"),
    "a transposed activation": (lambda leaf: (leaf * 1).view(CLASSES, ROWS).t(), "must be contiguous, but have shape"),
    "columns of an activation": (lambda leaf: (leaf * 1)[:, :20], "must be contiguous, but have shape"),
    "an expanded activation": (lambda leaf: (leaf * 1)[:1].expand(ROWS, CLASSES), "must be contiguous, but have shape"),
    "an activation of three dimensions": (
        lambda leaf: (leaf * 1).view(3, 3, CLASSES).transpose(0, 1),
        "consume_logits needs contiguous logits, but these have shape",
    ),
}


@pytest.mark.parametrize("refused", REFUSED_TO_CONSUME)
def test_what_must_not_be_consumed_is_refused_untouched(refused: str, device: torch.device) -> None:
    build, words = REFUSED_TO_CONSUME[refused]
    logits = build(problem(device)[0].requires_grad_())
    before, version = logits.detach().clone(), logits._version
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=words):
        npu_xent.token_log_probs(logits, target, consume_logits=True)
    assert_same_bits(logits, before)
    assert logits._version == version


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_nothing_is_overwritten_where_there_is_no_gradient(mode: Callable[[], Any], device: torch.device) -> None:
    leaf, target = problem(device)
    if mode is not contextlib.nullcontext:
        leaf.requires_grad_()
    for logits in (leaf, leaf * 1, leaf.t().contiguous().t()):
        before, version = logits.detach().clone(), logits._version
        with mode():
            log_probs = npu_xent.token_log_probs(logits, target, consume_logits=True)
            assert_same_bits(log_probs, npu_xent.token_log_probs(logits, target))
        assert_same_bits(logits, before)
        assert logits._version == version


def test_consumed_logits_that_others_saved_or_wrote(device: torch.device) -> None:
    leaf, target = problem(device)
    leaf.requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(leaf.exp(), target, consume_logits=True).backward()
    logits = leaf * 1
    penalty = logits.square().sum()
    loss = loss_of(logits, target, consume_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + penalty).backward()
    logits = leaf * 1
    loss = loss_of(logits, target, consume_logits=True)
    with torch.no_grad():
        logits.mul_(100)
    with pytest.raises(RuntimeError, match=r"written since|modified by an inplace operation"):
        loss.backward()


# Compilers and transforms ---------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Tensor]] = {
    "both": loss_of,
    "log-probs": lambda x, y: npu_xent.token_log_probs(x, y).sum(),
    "entropy": lambda x, y: npu_xent.token_log_probs(x, y, return_entropy=True, temperature=0.7).entropy.sum(),
    "top1 weighs": lambda x, y: (lambda out: (out.log_probs * out.top1).sum())(
        npu_xent.token_log_probs(x, y, return_top1=True, softcap=2.0)
    ),
    "temperature a row": lambda x, y: loss_of(x, y, temperature=torch.linspace(0.5, 2, len(x), device=x.device)),
    "consumed": lambda x, y: loss_of(x * 2, y, consume_logits=True),
    "three dimensions": lambda x, y: loss_of(x.unsqueeze(0), y.unsqueeze(0), logit_scale=0.5),
}
# Inductor compiles for long, and adds to aot_eager only its code for the operations around the operators.
COMPILED = [
    *((name, "aot_eager") for name in LOSSES),
    *(pytest.param(name, "inductor", marks=pytest.mark.cpu) for name in ("both", "consumed")),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, backend", COMPILED)
def test_compiles_in_one_graph(name: str, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 9):
        logits, target = make_logits(rows, 13, torch.float32, device), make_target(rows, 13, device)
        actual, expected = (loss_and_grad(function, logits, target) for function in (compiled, LOSSES[name]))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class Exported(nn.Module):
    """The function as a module, for torch.export."""

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return tuple(npu_xent.token_log_probs(logits, target, temperature=0.7, return_entropy=True, return_top1=True))


@pytest.mark.filterwarnings("ignore")
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
        for actual, expected in zip(loaded(logits, target), Exported()(logits, target), strict=True):
            assert_same_bits(actual, expected)


TRANSFORM_OPTIONS = {
    "plain": {},
    "scaled and capped": {"softcap": 2.0, "logit_scale": 0.7, "temperature": 0.5},
    "temperature a row": {"temperature": torch.linspace(0.5, 2, ROWS)},
}


@pytest.mark.parametrize("name", TRANSFORM_OPTIONS)
def test_torch_func(name: str, device: torch.device) -> None:
    """grad, vmap and jvp, and their compositions, equal those of the plain formulas."""
    logits, target = problem(device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in TRANSFORM_OPTIONS[name].items()}
    tangent = make_logits(ROWS, CLASSES, torch.float32, device, spread=1.0)

    def by(function: Callable[..., Tensor]) -> list[Any]:
        def of(x: Tensor) -> Tensor:
            return function(x, target, **options)

        batch = torch.stack([logits, -logits, 2 * logits])
        return [
            torch.func.grad(of)(logits),
            torch.vmap(of)(batch),
            torch.vmap(torch.func.grad(of))(batch),
            torch.func.jvp(of, (logits,), (tangent,)),
            torch.func.jvp(torch.func.grad(of), (logits,), (tangent,)),
        ]

    for actual, expected in zip(by(loss_of), by(plain_loss), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_vmap_gives_all_outputs(device: torch.device) -> None:
    logits, target = problem(device)
    expected = npu_xent.token_log_probs(logits, target, return_entropy=True, return_top1=True)
    shapes = (logits.view(3, 3, CLASSES), target.view(3, 3))
    out = torch.vmap(lambda x, y: tuple(npu_xent.token_log_probs(x, y, return_entropy=True, return_top1=True)))(*shapes)
    for actual, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(actual.reshape(-1), wanted)


# Threads and memory ---------------------------------------------------------------------------------------------------

THREAD_CASES = pairwise(
    {
        "shape": [(97, 8080), (1, 128256), (3, 128256), (1, 300000), (70000, 3)],
        "dtype": (torch.float32, torch.bfloat16, torch.float64),
        "per_row": (False, True),
        "softcap": (None, 2.0),
        "consume": (False, True),
    }
)


@pytest.mark.cpu
@pytest.mark.isa
@pytest.mark.parametrize("case", THREAD_CASES, ids=case_id)
def test_results_do_not_depend_on_the_number_of_threads(case: dict[str, Any], threads: Callable[[int], None]) -> None:
    device, (rows, classes) = torch.device("cpu"), case["shape"]
    logits = make_logits(rows, classes, case["dtype"], device, spread=1.0)
    target = make_target(rows, classes, device, ignore_index=-100)
    grads = upstreams(target.shape, case["dtype"], device, "both")
    options = {"temperature": temperatures((rows,), device) if case["per_row"] else 1.0, "softcap": case["softcap"]}

    def everything() -> tuple[Tensor, ...]:
        out, grad = outputs_and_grad(logits, target, grads, consume=case["consume"], **options)
        return (*out, grad)

    threads(1)
    expected = everything()
    for count in (2, 5):
        threads(count)
        for actual, wanted in zip(everything(), expected, strict=True):
            assert_same_bits(actual, wanted, f"{count} threads")


@pytest.mark.cpu
@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """A row gives the same bits alone and among others, where it is shared out differently."""
    device = torch.device("cpu")
    logits, target = make_logits(40, 9001, dtype, device), make_target(40, 9001, device)
    grads = upstreams(target.shape, dtype, device, "both")
    out, grad = outputs_and_grad(logits, target, grads)
    for rows in (slice(0, 1), slice(7, 9), slice(20, 40)):
        some, some_grad = outputs_and_grad(logits[rows], target[rows], tuple(g[rows] for g in grads))
        for actual, expected in zip((*some, some_grad), (*out, grad), strict=True):
            assert_same_bits(actual, expected[rows])


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_allocates_the_gradient_alone(
    dtype: torch.dtype, device: torch.device, allocations: Callable[[Callable[[], object]], list[int]]
) -> None:
    """Inference nothing of the logits' size, nor does a backward over consumed logits."""
    rows, classes = 32, 4096
    logits, target = make_logits(rows, classes, dtype, device), make_target(rows, classes, device)
    leaf = logits.clone().requires_grad_()
    activation = leaf * 1

    def big(function: Callable[[], object]) -> list[int]:
        return [size for size in allocations(function) if size >= rows * classes]

    def consume() -> None:
        (grad,) = torch.autograd.grad(loss_of(activation, target, consume_logits=True), activation)
        assert grad.data_ptr() == activation.data_ptr()

    assert big(lambda: npu_xent.token_log_probs(logits, target, return_entropy=True, return_top1=True)) == []
    assert big(lambda: loss_of(leaf, target).backward()) == [rows * classes * dtype.itemsize]
    assert big(consume) == []
