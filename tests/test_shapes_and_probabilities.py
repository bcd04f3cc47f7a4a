"""cross_entropy beyond [N, C] and class indices: one sample, more dimensions, class probabilities, torch.func.

Index targets of any shape are the [N, C] case with the classes moved last, so they are held to that. Probabilities, and
the transforms of torch.func, go through torch operations; their truth is written out here.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from operator_cases import ops
from option_values import factors, keywords
from reference import (
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    case_id,
    loss_and_grad,
    make_logits,
    make_target,
    make_weight,
    max_error,
    pairwise,
    stats_dtype,
)
from torch import Tensor
from torch.nn import functional as F

import npu_xent

SHAPES = [(3, 5, 4), (2, 5, 3, 2), (3, 5, 0), (0, 5, 2), (2, 1, 3), (2, 5, 33), (1, 70, 5, 8), (0, 5, 20)]


def k_dimensional(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [N, C, d1, ...], dense as they stand, and targets [N, d1, ...] of which some are -100."""
    n, c, *rest = shape
    rows = n * torch.Size(rest).numel()
    logits = make_logits(rows, c, dtype, device).view(n, *rest, c).movedim(-1, 1).contiguous()
    return logits, make_target(rows, c, device, ignore_index=-100).view(n, *rest)


def as_rows(logits: Tensor) -> Tensor:
    """[N, C, d1, ...] as [N d1 ..., C]."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


@pytest.mark.parametrize(
    "case",
    pairwise(factors("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", shape=SHAPES)),
    ids=case_id,
)
def test_more_dimensions_are_rows_with_the_classes_moved_last(case: dict[str, Any], device: torch.device) -> None:
    shape, dtype = case["shape"], case["dtype"]
    logits, target = k_dimensional(shape, dtype, device)
    weight = make_weight(shape[1], torch.float32, device) if case["weighted"] else None
    options = keywords(case)
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, weight, **options)
    expected, expected_grad = loss_and_grad(
        npu_xent.cross_entropy, as_rows(logits), target.flatten(), weight, **options
    )
    assert_same_bits(loss, expected.view(target.shape) if case["reduction"] == "none" else expected)
    assert_same_bits(as_rows(grad), expected_grad)
    assert grad.shape == shape
    if not case["lse_square_scale"]:
        their_weight = None if weight is None else weight.cpu().double()
        del options["lse_square_scale"]
        theirs = F.cross_entropy(logits.cpu().double(), target.cpu(), their_weight, **options)
        assert loss.shape == theirs.shape
        torch.testing.assert_close(loss.cpu().double(), theirs, rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_extras_have_the_shape_of_the_target(reduction: str, device: torch.device) -> None:
    logits, target = k_dimensional((2, 5, 3), torch.float32, device)
    options = {"reduction": reduction, "lse_square_scale": 0.1, "return_lse": True, "return_z_loss": True}
    out = npu_xent.cross_entropy(logits, target, **options)
    assert out.lse.shape == target.shape
    torch.testing.assert_close(out.lse, logits.logsumexp(1))
    assert out.z_loss.shape == out.loss.shape == (target.shape if reduction == "none" else ())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("y", [2, -100])
def test_one_sample(y: int, reduction: str, device: torch.device) -> None:
    """[C] with a target []: a loss [] whatever the reduction."""
    logits, target = make_logits(1, 5, torch.float32, device)[0], torch.tensor(y, device=device)
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, reduction=reduction)
    theirs, their_grad = loss_and_grad(F.cross_entropy, logits.cpu(), target.cpu(), reduction=reduction)
    assert loss.shape == theirs.shape == ()
    torch.testing.assert_close(loss.cpu(), theirs, equal_nan=True)
    torch.testing.assert_close(grad.cpu(), their_grad)
    out = npu_xent.cross_entropy(logits, target, reduction=reduction, return_lse=True)
    assert out.lse.shape == ()


# [N, C, d1]: more classes than a tile holds at once, and images of few pixels, which share tiles.
MANY_CLASSES = [(2, 300, 20), (1, 9000, 17), (2, 1000, 131), (40, 300, 2), (19, 5, 7)]
MEMORY = {
    "as it stands": lambda x: x,
    "part of a larger tensor": lambda x: F.pad(x, (3, 2, 1, 1), value=math.nan)[:, 1:-1, 3:-2],
    "images last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.mark.cpu
@pytest.mark.isa
@pytest.mark.parametrize("order", MEMORY)
@pytest.mark.parametrize("shape", MANY_CLASSES, ids=str)
def test_any_order_of_memory_gives_the_same_loss(shape: tuple[int, ...], order: str, device: torch.device) -> None:
    logits, target = k_dimensional(shape, torch.float32, device)
    weight = make_weight(shape[1], torch.float32, device)
    weight[1] = 0
    logits[0, 1, 0] = -math.inf
    logits[0, :, 1] -= 1e4
    logits[-1, :, -1], target[-1, -1] = math.nan, -100  # an ignored row
    options = {"label_smoothing": 0.1, "lse_square_scale": 1e-6, "logit_scale": 0.7}
    upstream = torch.tensor(0.5)
    leaf = MEMORY[order](logits).detach().requires_grad_()
    loss = npu_xent.cross_entropy(leaf, target, weight, **options)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    exact = as_rows(logits).double().requires_grad_()
    expected = npu_xent.cross_entropy(exact, target.flatten(), weight.double(), **options)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(loss.double(), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(as_rows(grad).double(), expected_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.cpu
def test_classes_that_are_not_adjacent_cost_no_copy(device: torch.device, allocations: Any) -> None:
    """Neither in the forward nor, beyond the gradient, in the backward."""
    logits, target = k_dimensional((2, 50, 40, 40), torch.bfloat16, device)
    assert max(allocations(lambda: npu_xent.cross_entropy(logits, target))) < logits.nbytes / 4
    leaf = logits.requires_grad_()
    for reduction in REDUCTIONS:
        sizes = allocations(lambda how=reduction: npu_xent.cross_entropy(leaf, target, reduction=how).sum().backward())
        *others, largest = sorted(sizes)
        assert largest == logits.nbytes
        assert max(others) < logits.nbytes / 4
        leaf.grad = None


@pytest.mark.cpu
@pytest.mark.parametrize("classes", [3, 300])
def test_images_are_the_same_for_any_number_of_threads(classes: int, device: torch.device, threads: Any) -> None:
    logits, target = k_dimensional((3, classes, 50, 51), torch.float32, device)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(loss_and_grad(npu_xent.cross_entropy, logits, target, label_smoothing=0.1))
    for loss, grad in results[1:]:
        assert_same_bits(loss, results[0][0])
        assert_same_bits(grad, results[0][1])


@pytest.mark.cpu
@pytest.mark.parametrize("classes, pixels", [(5, 33), (300, 20)])
def test_images_compile(classes: int, pixels: int, device: torch.device) -> None:
    """Without a break of the graph, with dynamic shapes, and with the strides that eager execution has."""
    compiled = torch.compile(npu_xent.cross_entropy, backend="aot_eager", fullgraph=True, dynamic=True)
    for images in (2, 3):
        logits, target = k_dimensional((images, classes, pixels), torch.float32, device)
        loss, grad = loss_and_grad(compiled, logits, target)
        expected, expected_grad = loss_and_grad(npu_xent.cross_entropy, logits, target)
        assert_same_bits(loss, expected)
        assert_same_bits(grad, expected_grad)
        assert grad.stride() == expected_grad.stride() == logits.stride()


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_stats_grad", "cross_entropy"])
def test_opcheck_of_images(name: str, device: torch.device) -> None:
    """The operators with logits [B, R, C]."""
    logits, target = k_dimensional((2, 5, 17), torch.float32, device)
    images, target = logits.transpose(1, 2), target.flatten()
    totals = ops.reduce_rows(target, None, num_classes=5, loss_dtype=torch.float32)[2]
    lse, lse_low, *_ = ops.row_stats(images, target)
    operands = {
        "row_stats": (images, target),
        "row_grad": (images, target, None, lse, lse_low, totals, torch.tensor(2.0)),
        "row_stats_grad": (images, target, None, totals),
        "cross_entropy": (images.detach().requires_grad_(), target),
    }[name]
    options = {"need_log_prob": True} if name == "row_stats" else {}
    torch.library.opcheck(getattr(ops, name).default, operands, options)
    if name == "row_stats":
        log_prob = ops.row_stats(images, target, need_log_prob=True)[4]
        torch.testing.assert_close(log_prob, logits.log_softmax(1).transpose(1, 2))


@pytest.mark.cpu
def test_classes_that_are_adjacent_cost_no_copy(device: torch.device, allocations: Any) -> None:
    """As [batch, time, classes] seen as [batch, classes, time]."""
    logits = make_logits(64, 1024, torch.float32, device).view(4, 16, 1024).movedim(-1, 1)
    target = make_target(64, 1024, device).view(4, 16)
    assert max(allocations(lambda: npu_xent.cross_entropy(logits, target))) < logits.nbytes


def test_consuming_more_dimensions(device: torch.device) -> None:
    """Where the classes are adjacent; else it is refused, since the copy would be consumed in their place."""
    rows = make_logits(12, 5, torch.float32, device)
    target = make_target(12, 5, device)
    leaf = rows.clone().requires_grad_()
    logits = (leaf * 1).view(3, 4, 5).movedim(-1, 1)
    npu_xent.cross_entropy(logits, target.view(3, 4), consume_logits=True).backward()
    assert_same_bits(leaf.grad, loss_and_grad(npu_xent.cross_entropy, rows, target)[1])
    assert_same_bits(as_rows(logits), leaf.grad)
    apart = torch.zeros(3, 5, 4, device=device, requires_grad=True) * 1
    with pytest.raises(ValueError, match="consume_logits needs the classes of each row adjacent in memory"):
        npu_xent.cross_entropy(apart, target.view(3, 4), consume_logits=True)


@pytest.mark.parametrize(
    "logits_shape, target_shape", [((3, 5, 4), (3, 5)), ((3, 5, 4), (12,)), ((5,), (2,)), ((), ()), ((3, 5), (3, 1))]
)
def test_shapes_that_do_not_match(
    logits_shape: tuple[int, ...], target_shape: tuple[int, ...], device: torch.device
) -> None:
    logits = torch.zeros(logits_shape, device=device)
    target = torch.zeros(target_shape, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="target must have"):
        npu_xent.cross_entropy(logits, target)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        F.cross_entropy(logits.cpu(), target.cpu())


# Class probabilities --------------------------------------------------------------------------------------------------


def probabilities_truth(
    logits: Tensor,
    q: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The loss in float64, differentiable: l = -sum_c w_c q'_c lp_c, plus the z-loss of every row."""
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    dim = min(logits.dim() - 1, 1)
    c = logits.shape[dim]
    w = torch.ones(c, dtype=torch.float64) if weight is None else weight.cpu().double()
    w = w.view(-1, *[1] * (logits.dim() - 1 - dim))
    lse = logits.exp().sum(dim).log()
    smoothed = (1 - label_smoothing) * q + label_smoothing / c
    rows = -(w * smoothed * (logits - lse.unsqueeze(dim))).sum(dim) + lse_square_scale * lse.square()
    if reduction == "none":
        return rows
    return rows.sum() / (rows.numel() if reduction == "mean" else 1)


@pytest.mark.parametrize(
    "case",
    pairwise(
        factors(
            *("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", "softcap"),
            *("logit_scale", "loss_dtype"),
            shape=[(5,), (7, 5), (3, 5, 4), (0, 5), (2, 3, 40, 2), (7, 300), (3, 300, 4), (4, 1, 3), (2, 5, 0)],
        )
    ),
    ids=case_id,
)
def test_class_probabilities(case: dict[str, Any], device: torch.device) -> None:
    """Differentiable in the logits and in the probabilities; "mean" divides by the rows, not by weights."""
    shape, dtype = case["shape"], case["dtype"]
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
    q = torch.rand(shape, generator=generator).softmax(min(len(shape) - 1, 1)).to(device, dtype).requires_grad_()
    weight = make_weight(shape[min(len(shape) - 1, 1)], torch.float32, device) if case["weighted"] else None
    options = keywords(case)

    loss = npu_xent.cross_entropy(logits, q, weight, **options)
    loss_dtype = options.pop("loss_dtype") or dtype
    loss.sum().backward()

    exact = [t.detach().cpu().double().requires_grad_() for t in (logits, q)]
    expected = probabilities_truth(*exact, weight, **options)
    expected.sum().backward()
    assert loss.dtype == loss_dtype
    assert_near(loss, expected.detach(), 100.0, name="loss")
    for name, leaf, true in zip(("logits", "probabilities"), (logits, q), exact, strict=True):
        assert_near(leaf.grad, true.grad, 50.0, name=f"gradient of the {name}")


@pytest.mark.cpu
@pytest.mark.isa
@pytest.mark.parametrize("order", MEMORY)
@pytest.mark.parametrize("shape", MANY_CLASSES, ids=str)
def test_any_order_of_memory_of_probabilities(shape: tuple[int, ...], order: str, device: torch.device) -> None:
    """The logits in one order, the probabilities in that or in another."""
    logits, _ = k_dimensional(shape, torch.float32, device)
    weight = make_weight(shape[1], torch.float32, device)
    q = logits.flip(1).softmax(1)
    weight[1] = q[0, 2, 0] = 0
    logits[0, 1:3, 0] = -math.inf  # without smoothing neither class has a part
    logits[0, :, 1] -= 1e4
    logits[-1, 0, -1] = math.nan
    exact = [as_rows(t).double().requires_grad_() for t in (logits, q)]
    for options in ({"lse_square_scale": 1e-6}, {"softcap": 40.0, "label_smoothing": 0.1, "logit_scale": 0.7}):
        expected = npu_xent.cross_entropy(*exact, weight.double(), reduction="none", **options)
        expected_grads = torch.autograd.grad(expected.nansum(), exact)
        for of_q in (order, "as it stands", "transposed"):
            leaves = [MEMORY[order](logits).detach().requires_grad_(), MEMORY[of_q](q).detach().requires_grad_()]
            loss = npu_xent.cross_entropy(*leaves, weight, reduction="none", **options)
            torch.testing.assert_close(loss.double().flatten(), expected, rtol=5e-7, atol=1e-7, equal_nan=True)
            grads = torch.autograd.grad(loss.nansum(), leaves)
            for grad, true in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(as_rows(grad).double(), true, rtol=1e-5, atol=5e-6, equal_nan=True)


@pytest.mark.cpu
@pytest.mark.isa
def test_parts_whose_sum_is_0(device: torch.device) -> None:
    """As the difference of two targets has them, in more classes than a tile holds at once."""
    logits, target = k_dimensional((2, 300, 20), torch.float32, device)
    rows, target = as_rows(logits), target.flatten().clamp(min=0)
    other = (target + 150) % 300
    q = F.one_hot(target, 300).float() - F.one_hot(other, 300).float()
    expected = rows.gather(1, other[:, None]) - rows.gather(1, target[:, None])
    loss = npu_xent.cross_entropy(logits, q.view(2, 20, 300).movedim(-1, 1).contiguous(), reduction="none")
    torch.testing.assert_close(loss.flatten(), expected.flatten())


@pytest.mark.cpu
def test_images_whose_classes_are_adjacent(device: torch.device) -> None:
    """As hooks on saved tensors may return them, and operators may be called: outputs have adjacent rows."""
    logits = make_logits(7, 300, torch.float32, device)
    target = make_target(7, 300, device)
    q = logits.flip(1).softmax(1)
    log_prob = ops.row_stats(logits[None], target, need_log_prob=True)[4]
    torch.testing.assert_close(log_prob[0], logits.log_softmax(1))
    for targets, call in ((target, ops.cross_entropy), (q, ops.prob_cross_entropy)):
        leaf = logits[None].clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(leaf, targets if targets.dim() == 1 else targets[None])[0], leaf)
        expected = loss_and_grad(npu_xent.cross_entropy, logits, targets)[1]
        torch.testing.assert_close(grad[0], expected)


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(7, 5), (7, 300), (2, 5, 9)], ids=str)
def test_expanded_logits_and_probabilities(shape: tuple[int, ...], device: torch.device) -> None:
    """Tensors whose rows or classes are all the same memory."""
    full = make_logits(math.prod(shape), 1, torch.float32, device).view(shape)
    for dim in (0, 1):
        x = full.narrow(dim, 0, 1).expand(shape)
        for logits, q in ((x, full.softmax(1)), (full, x), (x, x)):
            assert_same_bits(npu_xent.cross_entropy(logits, q), npu_xent.cross_entropy(logits.clone(), q.clone()))


@pytest.mark.cpu
def test_images_of_probabilities_cost_no_copy(device: torch.device, allocations: Any) -> None:
    logits = k_dimensional((2, 50, 40, 40), torch.bfloat16, device)[0].requires_grad_()
    q = logits.detach().softmax(1)
    *others, largest = sorted(allocations(lambda: npu_xent.cross_entropy(logits, q).backward()))
    assert largest == logits.nbytes
    assert max(others) < logits.nbytes / 4


@pytest.mark.cpu
def test_images_of_probabilities_compile(device: torch.device) -> None:
    compiled = torch.compile(npu_xent.cross_entropy, backend="aot_eager", fullgraph=True, dynamic=True)
    for images in (2, 3):
        logits, _ = k_dimensional((images, 5, 33), torch.float32, device)
        q = logits.flip(1).softmax(1)
        loss, grad = loss_and_grad(compiled, logits, q)
        expected, expected_grad = loss_and_grad(npu_xent.cross_entropy, logits, q)
        assert_same_bits(loss, expected)
        assert_same_bits(grad, expected_grad)
        assert grad.stride() == expected_grad.stride() == logits.stride()


@pytest.mark.cpu
def test_opcheck_of_images_of_probabilities(device: torch.device) -> None:
    logits, _ = k_dimensional((2, 5, 17), torch.float32, device)
    images = logits.transpose(1, 2).requires_grad_()
    q = images.detach().softmax(2).requires_grad_()
    torch.library.opcheck(ops.prob_cross_entropy.default, (images, q))
    lse, lse_low, _, part_sum = ops.prob_row_stats(images.detach(), q.detach())
    torch.library.opcheck(ops.prob_row_stats.default, (images.detach(), q.detach()))
    rows = (lse, lse_low, part_sum, torch.ones_like(lse), torch.zeros_like(lse))
    torch.library.opcheck(
        ops.prob_row_grad.default, (images.detach(), q.detach(), None, *rows), {"output_mask": [True, True]}
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [5, 4000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_with_probabilities_are_no_larger_than_torchs(
    dtype: torch.dtype, classes: int, reduction: str, device: torch.device
) -> None:
    logits = make_logits(8, classes, dtype, device)
    q = make_logits(8, classes, torch.float32, device, spread=1.0).softmax(1).to(dtype)
    exact = logits.double().cpu().requires_grad_()
    expected = probabilities_truth(exact, q.cpu().double(), None, reduction)
    expected.sum().backward()
    ours, torchs = (loss_and_grad(f, logits, q, reduction=reduction) for f in (npu_xent.cross_entropy, F.cross_entropy))
    for our, theirs, true in zip(ours, torchs, (expected.detach(), exact.grad), strict=True):
        assert max_error(our, true) <= max_error(theirs, true) + 1e-6 * float(true.abs().max())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 17), (2, 3, 2)], ids=str)
def test_second_and_forward_derivatives_with_probabilities(
    shape: tuple[int, ...], reduction: str, device: torch.device
) -> None:
    """As F.cross_entropy has them."""
    if device.type != "cpu":
        pytest.skip("gradgradcheck needs float64")
    x, q = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    options = {"reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 0.01, "logit_scale": 0.7}

    def loss(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        out = npu_xent.cross_entropy(x, q, weight, **options, softcap=5.0, return_lse=True)
        return out.loss, out.lse

    weight = make_weight(shape[1], torch.float64, device)
    assert torch.autograd.gradcheck(loss, (x, q), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (x, q))


def test_second_derivatives_where_a_class_is_masked(device: torch.device) -> None:
    """A logit of -inf and a probability of 0: 0, as in the loss, and not NaN."""
    x = make_logits(3, 21, torch.float32, device)
    x[:, 4] = -math.inf
    q = make_logits(3, 21, torch.float32, device).softmax(1).index_fill(1, torch.tensor(4, device=device), 0.0)
    x, q = x.requires_grad_(), q.requires_grad_()
    loss = npu_xent.cross_entropy(x, q, reduction="none")
    grads = torch.autograd.grad(loss.square().sum(), (x, q), create_graph=True)
    for second in torch.autograd.grad([grad.square().sum() for grad in grads], (x, q)):
        assert second.isfinite().all()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev"])
def test_compiled_transforms_of_probabilities(transform: str, device: torch.device) -> None:
    x, q = (make_logits(3, 21, torch.float32, device).softmax(1) for _ in range(2))
    call = getattr(torch.func, transform)(lambda a: npu_xent.cross_entropy(a, q))
    x = x[None] if transform == "vmap" else x
    torch.testing.assert_close(torch.compile(call, backend="eager")(x), call(x))


def test_probabilities_are_read_by_the_fused_operators(device: torch.device) -> None:
    """Once in the forward and once in the backward; the gradient of probabilities is made only if it is wanted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((op.name(), args, kwargs or {}))
            return op(*args, **(kwargs or {}))

    x = make_logits(7, 21, torch.float32, device).requires_grad_()
    with Record():
        npu_xent.cross_entropy(x, torch.full((7, 21), 0.2, device=device)).backward()
    sweeps = {name: kwargs for name, _, kwargs in calls if "prob_row" in name}
    assert list(sweeps) == ["npu_xent::prob_row_stats", "npu_xent::prob_row_grad"]
    assert sweeps["npu_xent::prob_row_grad"]["output_mask"] == [True, False]
    assert not any("softmax" in name for name, _, _ in calls)


def test_probabilities_of_one_class_are_an_index(device: torch.device) -> None:
    logits, target = make_logits(7, 5, torch.float32, device), make_target(7, 5, device)
    one_hot = F.one_hot(target, 5).float()
    for reduction in REDUCTIONS:
        actual = loss_and_grad(npu_xent.cross_entropy, logits, one_hot, reduction=reduction)
        expected = loss_and_grad(npu_xent.cross_entropy, logits, target, reduction=reduction)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


def test_extras_with_probabilities(device: torch.device) -> None:
    logits = make_logits(7, 21, torch.bfloat16, device).requires_grad_()
    q = torch.full((7, 21), 1 / 21, dtype=torch.bfloat16, device=device)
    out = npu_xent.cross_entropy(logits, q, reduction="none", lse_square_scale=0.1, return_lse=True, return_z_loss=True)
    assert out.loss.dtype == out.z_loss.dtype == torch.bfloat16
    assert out.lse.dtype == torch.float32
    exact = logits.detach().float().requires_grad_()
    torch.testing.assert_close(out.lse, exact.logsumexp(1))
    torch.testing.assert_close(out.z_loss.float(), 0.1 * out.lse.square(), rtol=2**-8, atol=0)
    assert out.loss.requires_grad
    assert not out.z_loss.requires_grad
    out.lse.square().sum().backward()
    exact.logsumexp(1).square().sum().backward()
    torch.testing.assert_close(logits.grad.float(), exact.grad, rtol=2**-8, atol=1e-6)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert npu_xent.cross_entropy(logits, q).dtype == torch.float32


def test_what_probabilities_do_not_go_with(device: torch.device) -> None:
    logits = make_logits(7, 5, torch.float32, device)
    q = torch.full((7, 5), 0.2, device=device)
    with pytest.raises(RuntimeError, match="ignore_index"):
        npu_xent.cross_entropy(logits, q, ignore_index=0)
    with pytest.raises(RuntimeError, match="ignore_index"):
        F.cross_entropy(logits.cpu(), q.cpu(), ignore_index=0)
    with pytest.raises(ValueError, match="consume_logits needs class indices"):
        npu_xent.cross_entropy(logits.requires_grad_() * 1, q, consume_logits=True)
    for options, words in (
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\]"),
        ({"lse_square_scale": -1.0}, "lse_square_scale must be finite and not negative"),
        ({"softcap": 0.0}, r"softcap must lie in \[1e-6, 1e6\], but is 0(\.0)?; leave it at None"),
        ({"reduction": "batchmean"}, "batchmean"),
    ):
        with pytest.raises(ValueError, match=words):
            npu_xent.cross_entropy(logits, q, **options)


@pytest.mark.parametrize("transformed", [False, True], ids=["probabilities", "torch.func"])
def test_torch_operations_refuse_what_the_operator_does(transformed: bool, device: torch.device) -> None:
    """The same dtypes and shapes, with the same kinds of error."""
    logits, target = make_logits(7, 5, torch.float32, device), make_target(7, 5, device)
    q = F.one_hot(target, 5).float()

    def loss(x: Tensor, weight: Tensor | None = None) -> Tensor:
        if transformed:
            return torch.func.vmap(lambda a: npu_xent.cross_entropy(a, target, weight))(x[None])
        return npu_xent.cross_entropy(x, q[:, : x.shape[1]], weight)

    for error, words, arguments in (
        (TypeError, "logits must be float32, bfloat16, float16 or float64", (logits.int(),)),
        (ValueError, "logits must have at least one class", (logits[:, :0],)),
        (ValueError, "weight must have one value for each of the 5 classes", (logits, torch.ones(4, device=device))),
        (TypeError, "weight must be float32", (logits, torch.ones(5, device=device, dtype=torch.float16))),
    ):
        with pytest.raises(error, match=words):
            loss(*arguments)


@pytest.mark.parametrize("shape", [(7,), (7, 4), (5, 7), (7, 5, 1)], ids=str)
def test_probabilities_need_the_shape_of_the_logits(shape: tuple[int, ...], device: torch.device) -> None:
    logits = make_logits(7, 5, torch.float32, device)
    with pytest.raises(ValueError, match="target must have"):
        npu_xent.cross_entropy(logits, torch.zeros(shape, device=device))
    with pytest.raises((ValueError, RuntimeError)):
        F.cross_entropy(logits.cpu(), torch.zeros(shape))


# torch.func -----------------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda a: f(a).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda a: f(a).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.sin()])),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(transform: str, reduction: str, device: torch.device) -> None:
    """Served by torch operations, so right whatever the order of the derivative."""
    logits, target = make_logits(4, 5, torch.float32, device), make_target(4, 5, device, ignore_index=-100)
    weight = make_weight(5, torch.float32, device)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    apply = TRANSFORMS[transform]
    expected = apply(lambda x: F.cross_entropy(x, target, weight, **options), logits)
    actual = apply(lambda x: npu_xent.cross_entropy(x, target, weight, **options), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_transforms_keep_the_extras_and_ignored_rows(
    reduction: str, softcap: float | None, device: torch.device
) -> None:
    """What torch's own loss does not have: the z-loss, and no NaN out of an ignored row."""
    logits, target = make_logits(4, 5, torch.float32, device), make_target(4, 5, device, ignore_index=-100)
    logits[1] = torch.nan
    options = {"reduction": reduction, "lse_square_scale": 0.1, "softcap": softcap}
    expected = loss_and_grad(npu_xent.cross_entropy, logits, target, **options)[1]
    actual = torch.func.grad(lambda x: npu_xent.cross_entropy(x, target, **options).sum())(logits)
    assert actual.dtype == stats_dtype(logits.dtype)
    torch.testing.assert_close(actual, expected)
