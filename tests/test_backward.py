"""The backward of cross_entropy: upstream gradients, repeated and refused backwards, loss scaling, saved-tensor hooks.

"mean" and "sum" make the gradient during the forward, as if the upstream gradient were 1, and scale it in the backward
(one sweep); "none" and fp16 make it in the backward (two sweeps). Every test here runs both.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from option_values import factors
from reference import (
    DTYPES,
    INF,
    NAN,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    case_id,
    loss_and_grad,
    make_logits,
    make_target,
    make_weight,
    pairwise,
    paths,
    truth,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import npu_xent


def upstreams(kind: str, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gradients for the loss of "none", [rows], in different layouts."""
    values = torch.randn(rows, 2, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    return {
        "dense": values[:, 0].contiguous(),
        "every other element": values[:, 0],
        "one value for all rows": values[0, 0].expand(rows),
        "zeros": torch.zeros(rows, dtype=dtype, device=device),
    }[kind]


# Upstream gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "every other element", "one value for all rows", "zeros"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_of_none_in_any_layout(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device, ignore_index=-100)
    upstream = upstreams(kind, 9, dtype, device)
    expected = truth(logits, target, reduction="none", lse_square_scale=0.1, grad_loss=upstream)
    _, grad = loss_and_grad(
        npu_xent.cross_entropy, logits, target, reduction="none", lse_square_scale=0.1, upstream=upstream
    )
    assert_near(grad, expected.grad, expected.grad_terms)


@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5, 1e-3, 65536.0, NAN, INF])
@paths
def test_any_upstream_of_a_scalar(dtype: torch.dtype, reduction: str, upstream: float, device: torch.device) -> None:
    """loss.sum() hands "none" an expanded gradient. Ignored rows stay 0 whatever comes from above."""
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device, ignore_index=-100)
    leaf = logits.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):  # a float32 loss, so that fp16 can take 65536
        loss = npu_xent.cross_entropy(leaf, target, reduction=reduction)
    loss = loss.sum()
    from_above = torch.tensor(upstream, dtype=loss.dtype, device=device)
    loss.backward(from_above)
    expected = truth(logits, target, reduction=reduction, grad_loss=from_above)
    kept = (target != -100).cpu()
    if from_above.isfinite():
        assert_near(leaf.grad, expected.grad, expected.grad_terms, roundings=1 if upstream in (0, 1) else 2)
        assert (leaf.grad[~kept] == 0).all()
    else:
        assert not leaf.grad[kept].isfinite().any()


def test_inputs_that_need_no_gradient_get_none(device: torch.device) -> None:
    logits, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)
    loss = npu_xent.cross_entropy(logits, target)
    assert not loss.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


# Backward again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [(1.0, 1.0), (1.0, 2.5), (2.5, 1.0), (0.5, -3.0)])
@paths
def test_second_backward_is_right_and_independent_of_the_first(
    dtype: torch.dtype, reduction: str, first: float, second: float, device: torch.device
) -> None:
    logits, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)
    loss = npu_xent.cross_entropy(logits, target, reduction=reduction)
    gradients = []
    for upstream in (first, second, second):
        (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, upstream), retain_graph=True)
        expected = truth(logits, target, reduction=reduction, grad_loss=upstream)
        assert_near(grad, expected.grad, expected.grad_terms, roundings=2)
        gradients.append((grad, grad.clone()))
        if len(gradients) == 2:
            grad.fill_(NAN)  # the third must not see this
    (one, one_then), (_, two_then), (three, _) = gradients
    assert_same_bits(one, one_then)
    assert_same_bits(three, two_then)


@paths
def test_last_backward_frees_the_graph(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)
    loss = npu_xent.cross_entropy(logits, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@paths
def test_gradients_accumulate(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """Over backwards; over several uses of one loss; and with another consumer of the same logits."""
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device)

    def gradient(build: Callable[[Tensor], list[Tensor]]) -> Tensor:
        leaf = logits.clone().requires_grad_()
        for loss in build(leaf):
            loss.backward()
        return leaf.grad

    def loss_of(leaf: Tensor) -> Tensor:
        return npu_xent.cross_entropy(leaf, target, reduction=reduction).sum()

    once = gradient(lambda leaf: [loss_of(leaf)])
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-3 * torch.finfo(dtype).eps}
    torch.testing.assert_close(gradient(lambda leaf: [loss_of(leaf), loss_of(leaf)]), 2 * once, **close)
    torch.testing.assert_close(
        gradient(lambda leaf: [(lambda loss: loss + 2 * loss)(loss_of(leaf))]), 3 * once, **close
    )
    with_other = gradient(lambda leaf: [loss_of(leaf * 1) + (leaf * 1).sum()])
    torch.testing.assert_close(with_other, once + 1, rtol=close["rtol"], atol=torch.finfo(dtype).eps)


def test_gradient_reaches_what_made_the_logits(device: torch.device) -> None:
    hidden = make_logits(6, 4, torch.float32, device)
    head = make_logits(11, 4, torch.float32, device).requires_grad_()
    target = make_target(6, 11, device)
    npu_xent.cross_entropy(hidden @ head.t(), target).backward()
    expected = truth((hidden @ head.t()).detach(), target).grad.t() @ hidden.cpu().double()
    torch.testing.assert_close(head.grad.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@paths
def test_nothing_is_kept_alive(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """The graph holds no reference to itself: it is gone with its loss, without the garbage collector."""
    leaf, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)
    gone = []
    gc.disable()
    try:
        logits = leaf * 1
        logits.register_hook(lambda grad: None)
        logits.grad_fn.register_hook(Reporter(gone))
        npu_xent.cross_entropy(logits, target, reduction=reduction).sum().backward()
        del logits
    finally:
        gc.enable()
    assert gone == ["gone"]


class Reporter:
    """A hook that says when it is destroyed, and with it the node that holds it."""

    def __init__(self, gone: list[str]) -> None:
        self.gone = gone

    def __call__(self, grad_inputs: Any, grad_outputs: Any) -> None:
        """Change nothing."""

    def __del__(self) -> None:
        self.gone.append("gone")


# Loss scaling ---------------------------------------------------------------------------------------------------------


def test_loss_scale_saves_fp16_gradients_from_underflow(device: torch.device) -> None:
    """A mean over 4096 rows of 1024 classes: at upstream 1 most of the gradient is below what fp16 can hold.

    GradScaler multiplies the loss by 65536 for that. It helps only if no gradient is stored before it is applied.
    """
    rows, classes = 4096, 1024
    logits = make_logits(rows, classes, torch.float16, device, spread=2.0)
    target = make_target(rows, classes, device)
    expected = truth(logits, target).grad
    lost = (expected.half() == 0).double().mean()
    assert lost > 0.4, "these gradients do not underflow: the test would prove nothing"

    parameter = logits.float().requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0)
    with torch.autocast(device.type, dtype=torch.float16):
        loss = npu_xent.cross_entropy(parameter.half(), target)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)

    assert (parameter.grad != 0).all()
    # Half a unit in the last place of fp16, or half its smallest number over the scale.
    error = (parameter.grad.cpu().double() - expected).abs()
    assert (error <= 1.01 * (expected.abs() * 2**-11 + 2**-25 / 65536)).all()


# The derivative by finite differences ---------------------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize(
    "case",
    pairwise(
        factors(
            *("reduction", "weighted", "label_smoothing", "lse_square_scale", "softcap"),
            ignore_index=(-100, 1),  # the first is in no target
        )
    ),
    ids=case_id,
)
def test_gradcheck(case: dict[str, Any], device: torch.device) -> None:
    options = dict(case)
    weight = make_weight(3, torch.float64, device) if options.pop("weighted") else None
    logits = make_logits(4, 3, torch.float64, device, spread=1.0).requires_grad_()
    target = torch.tensor([2, 1, 0, 1], device=device)
    assert torch.autograd.gradcheck(lambda x: npu_xent.cross_entropy(x, target, weight, **options), logits)


# Second derivatives and forward mode ----------------------------------------------------------------------------------


@paths
def test_double_backward_is_refused_in_words(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """Wherever the second derivative is asked for: at the logits, below them, and as part of another loss."""
    parameter, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)

    def first_gradient() -> tuple[Tensor, Tensor, Tensor]:
        logits = parameter * 2
        loss = npu_xent.cross_entropy(logits, target, reduction=reduction).sum()
        return loss, logits, torch.autograd.grad(loss, logits, create_graph=True)[0]

    loss, logits, grad = first_gradient()
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), logits)
    loss, logits, grad = first_gradient()
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
    loss, logits, grad = first_gradient()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss + grad.norm(), parameter)


@paths
def test_derivative_by_the_upstream_gradient_is_refused_in_words(
    dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    """A second derivative too. torch.autograd.functional.jvp asks for it and takes "not connected" for zero."""
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.functional.jvp(
            lambda x: npu_xent.cross_entropy(x, target, reduction=reduction), logits, torch.ones_like(logits)
        )


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@paths
def test_create_graph_alone_is_fine(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    logits, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)
    expected = truth(logits, target, reduction=reduction)
    npu_xent.cross_entropy(logits, target, reduction=reduction).sum().backward(create_graph=True)
    assert_near(logits.grad, expected.grad, expected.grad_terms)
    logits.grad = None  # undoes the reference cycle that torch warns of


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_mode_is_refused_or_right(reduction: str, requires_grad: bool, device: torch.device) -> None:
    """A loss that silently has no tangent would be taken for a constant."""
    logits, target = make_logits(4, 5, torch.float32, device).requires_grad_(requires_grad), make_target(4, 5, device)
    direction = make_logits(4, 5, torch.float32, device, spread=1.0)
    with forward_ad.dual_level():
        try:
            loss = npu_xent.cross_entropy(forward_ad.make_dual(logits, direction), target, reduction=reduction)
        except (RuntimeError, NotImplementedError):
            return
        tangent = forward_ad.unpack_dual(loss).tangent
        assert tangent is not None, "the tangent was dropped"
        expected = (truth(logits, target, reduction=reduction).grad * direction.cpu()).sum(1)
        torch.testing.assert_close(tangent.cpu().double(), expected if reduction == "none" else expected.sum())


# Saved-tensor hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consume", [False, True], ids=["fresh", "consume"])
@paths
def test_checkpointing_and_offloading(dtype: torch.dtype, reduction: str, consume: bool, device: torch.device) -> None:
    logits, target = make_logits(9, 21, dtype, device), make_target(9, 21, device)
    expected = truth(logits, target, reduction=reduction)

    def function(x: Tensor) -> Tensor:
        return npu_xent.cross_entropy(x * 1, target, reduction=reduction, consume_logits=consume)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=False)

    with torch.autograd.graph.save_on_cpu():
        offloaded = loss_and_grad(function, logits)
    for loss, grad in (loss_and_grad(checkpointed, logits), offloaded):
        assert_near(loss, expected.loss, expected.loss_terms)
        assert_near(grad, expected.grad, expected.grad_terms)
