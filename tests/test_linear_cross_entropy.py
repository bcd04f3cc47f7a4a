"""linear_cross_entropy: the loss of F.linear(input, linear_weight, linear_bias), whose logits are never all there.

Compared with the truth in float64, made of the inputs as they are rounded. The logits are rounded to the dtype of input
on the way, as F.linear rounds them, so errors of 16 bits are measured against those of F.linear and F.cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import releases
import torch
from heads import Head, assert_as_good, error, make_head
from operator_cases import to_meta
from option_values import factors, keywords
from reference import (
    DTYPES,
    NAN,
    REDUCTIONS,
    assert_same_bits,
    case_id,
    make_target,
    make_weight,
    named,
    pairwise,
    paths,
    stats_dtype,
    truth,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import npu_xent
from npu_xent.doctor.timing import peak_memory

ops = torch.ops.npu_xent


# The truth ------------------------------------------------------------------------------------------------------------


def by_linear(head: Head, target: Tensor, weight: Tensor | None = None, *, upstream: Any = 1.0, **options: Any) -> Any:
    """The loss, lse and gradients in float64: `truth` of the logits, and the chain rule of F.linear."""
    head = head.map(lambda t: t.detach().cpu().double())
    expected = truth(F.linear(*head), target, weight, grad_loss=upstream, **options)
    return expected, Head(
        expected.grad @ head.linear_weight,
        expected.grad.t() @ head.input,
        None if head.linear_bias is None else expected.grad.sum(0),
    )


def torch_loss(
    head: Head,
    target: Tensor,
    weight: Tensor | None,
    *,
    lse_square_scale: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """The same out of torch's functions, in the dtype of the head."""
    logits = F.linear(*head)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits, target, weight, reduction=reduction, ignore_index=ignore_index, **options)
    if lse_square_scale:
        kept = target != ignore_index
        z_loss = lse_square_scale * logits.logsumexp(1).square().masked_fill(~kept, 0)
        loss = loss + (z_loss if reduction == "none" else z_loss.sum() / (kept.sum() if reduction == "mean" else 1))
    return loss


CASES = pairwise(
    factors(
        *("dtype", "reduction", "weighted", "ignore_index", "lse_square_scale", "softcap", "return_lse"),
        *("logit_scale", "loss_dtype"),
        # Not 1: each gradient is then a difference of larger terms, and assert_as_good compares with the gradients.
        label_smoothing=(0.0, 0.1),
        chunk_rows=(1, 7, 23, 100, None),
        bias=(True, False),
        upstream=(1.0, -2.5),
    )
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loss_and_gradients(case: dict[str, Any], device: torch.device) -> None:
    options, dtype = keywords(case), case["dtype"]
    return_lse, loss_dtype = options.pop("return_lse"), options.pop("loss_dtype")
    head = make_head(23, 12, 40, dtype, device, bias=case["bias"])
    weight = make_weight(40, torch.float32, device) if case["weighted"] else None
    target = make_target(23, 40, device, ignore_index=case["ignore_index"])
    from_above = torch.tensor(case["upstream"], dtype=loss_dtype or dtype, device=device)
    if options["reduction"] == "none":  # another for each row, so that it matters which has which
        from_above = from_above * torch.arange(1, 24, device=device).to(from_above.dtype) / 8
    expected, grads = by_linear(head, target, weight, upstream=from_above, **options)

    other = head.leaves()
    others = torch_loss(other, target, weight, **options)
    others.backward(from_above.to(dtype))
    ours = head.leaves()
    out = npu_xent.linear_cross_entropy(
        ours.input,
        ours.linear_weight,
        target,
        linear_bias=ours.linear_bias,
        weight=weight,
        chunk_rows=case["chunk_rows"],
        return_lse=return_lse,
        return_z_loss=True,
        loss_dtype=loss_dtype,
        **options,
    )
    out.loss.backward(from_above)

    assert out.loss.dtype == out.z_loss.dtype == (loss_dtype or dtype)
    # The logits are rounded to their dtype, and the loss to its own.
    coarser = out.loss.dtype if torch.finfo(out.loss.dtype).eps > torch.finfo(dtype).eps else dtype
    assert_as_good(out.loss.to(coarser), expected.loss, others, "loss")
    assert error(out.z_loss, expected.z_loss) <= 8 * torch.finfo(coarser).eps
    assert (out.lse is not None) == return_lse
    if return_lse:
        assert out.lse.dtype == stats_dtype(dtype)
        assert error(out.lse, expected.lse) <= 4 * torch.finfo(dtype).eps
    for name, mine, wanted, theirs in zip(Head._fields, ours, grads, other, strict=True):
        if wanted is not None:
            assert mine.grad.dtype == dtype
            # Each rounds the gradient of the logits in its own way; one error is as likely as another of its size.
            assert_as_good(mine.grad, wanted, theirs.grad, name, slack=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_of_many_chunks_are_as_good_as_torchs(dtype: torch.dtype, device: torch.device) -> None:
    """All rows have one target and similar features: parts of one sign, where sums in 16 bits would lose digits."""
    head = make_head(256, 8, 16, dtype, device)
    head = Head(head.input * 0.1 + 1, *head[1:])
    target = torch.zeros(256, dtype=torch.int64, device=device)
    _, grads = by_linear(head, target, reduction="sum")
    other, ours = head.leaves(), head.leaves()
    torch_loss(other, target, None, reduction="sum").backward()
    npu_xent.linear_cross_entropy(
        ours.input, ours.linear_weight, target, linear_bias=ours.linear_bias, reduction="sum", chunk_rows=1
    ).backward()
    for name, mine, wanted, theirs in zip(Head._fields, ours, grads, other, strict=True):
        assert_as_good(mine.grad, wanted, theirs.grad, name, slack=1.1)


# Shapes ---------------------------------------------------------------------------------------------------------------


def gradients(head: Head, function: Callable[[Head], Tensor]) -> tuple[Tensor, ...]:
    """The loss, and the gradients of a fresh copy of the head."""
    leaves = head.leaves()
    loss = function(leaves)
    loss.backward(torch.full_like(loss, 3.0))
    return loss.detach(), *(t.grad for t in leaves if t is not None)


def loss_of(head: Head, target: Tensor, **options: Any) -> Any:
    return npu_xent.linear_cross_entropy(
        head.input, head.linear_weight, target, linear_bias=head.linear_bias, **options
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (2, 0)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], reduction: str, device: torch.device) -> None:
    rows = torch.Size(shape).numel()
    head = make_head(rows, 4, 5, torch.float32, device)
    target = make_target(rows, 5, device)
    flat = gradients(head, lambda h: loss_of(h, target, reduction=reduction))
    shaped = head._replace(input=head.input.view(*shape, 4))
    out = loss_of(shaped, target.view(shape), reduction=reduction, return_lse=True, return_z_loss=True)
    assert out.lse.shape == shape
    assert out.loss.shape == out.z_loss.shape == (shape if reduction == "none" else ())
    results = gradients(shaped, lambda h: loss_of(h, target.view(shape), reduction=reduction))
    for actual, expected in zip(results, flat, strict=True):
        assert_same_bits(actual.reshape(expected.shape), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all ignored"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_nothing_to_learn_from(rows: int, reduction: str, return_lse: bool, device: torch.device) -> None:
    head = make_head(rows, 4, 5, torch.bfloat16, device)
    target = torch.full((rows,), -100, device=device)
    out, *grads = gradients(
        head,
        lambda h: (
            loss_of(h, target, reduction=reduction, return_lse=return_lse, return_z_loss=True, chunk_rows=2).loss
        ),
    )
    assert out.isnan().all() if reduction == "mean" else not out.any()
    for grad, like in zip(grads, head, strict=True):
        assert grad.shape == like.shape
        assert not grad.any()


def test_strides(device: torch.device) -> None:
    """input and linear_weight need not be contiguous, nor target."""
    head = make_head(6, 4, 5, torch.float32, device)
    wide = Head(head.input.t().contiguous().t(), head.linear_weight.repeat(1, 2)[:, :4], head.linear_bias)
    target = make_target(6, 5, device)
    results = [
        (loss_of(h, y, chunk_rows=4), *torch.autograd.grad(loss_of(h, y, chunk_rows=4), h))
        for h, y in (
            (head.map(Tensor.requires_grad_), target),
            (wide.map(Tensor.requires_grad_), target.repeat_interleave(2)[::2]),
        )
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


# What is frozen, ignored, or not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)], ids=str)
@paths
def test_only_wanted_gradients(
    dtype: torch.dtype, reduction: str, wanted: tuple[int, ...], device: torch.device
) -> None:
    head, target = make_head(6, 4, 5, dtype, device), make_target(6, 5, device)
    everything = gradients(head, lambda h: loss_of(h, target, reduction=reduction, chunk_rows=4))[1:]
    some = Head(*(t.requires_grad_(bool(want)) for t, want in zip(head.leaves(), wanted, strict=True)))
    loss = loss_of(some, target, reduction=reduction, chunk_rows=4)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward(torch.full_like(loss, 3.0))
    for tensor, want, expected in zip(some, wanted, everything, strict=True):
        assert (tensor.grad is not None) == bool(want)
        if want:
            assert_same_bits(tensor.grad, expected)


@pytest.mark.parametrize("need_lse", [False, True])
@paths
def test_nan_in_ignored_rows_does_no_harm(
    dtype: torch.dtype, reduction: str, need_lse: bool, device: torch.device
) -> None:
    head, target = make_head(7, 4, 5, dtype, device), make_target(7, 5, device, ignore_index=-100)
    ignored = (target == -100).cpu()
    clean, harmed = head, head._replace(input=head.input.clone())
    harmed.input[target == -100] = NAN

    def function(h: Head) -> Tensor:
        return loss_of(h, target, reduction=reduction, chunk_rows=3, return_lse=need_lse, return_z_loss=True).loss

    results = gradients(harmed, function)
    for actual, expected in zip(results, gradients(clean, function), strict=True):
        assert_same_bits(actual, expected)
    assert not results[1].cpu()[ignored].any()
    lse = loss_of(harmed, target, return_lse=True).lse.cpu()
    assert torch.equal(lse.isnan(), ignored)


@pytest.mark.cpu
def test_a_target_out_of_range_is_named_by_its_row(device: torch.device) -> None:
    head, target = make_head(7, 4, 5, torch.float32, device), make_target(7, 5, device, ignore_index=-100)
    target[5] = 9
    with pytest.raises(IndexError, match=r"target\[5\] is 9"):
        loss_of(head, target, chunk_rows=2)
    with pytest.raises(IndexError, match=r"target\[5\] is 9"):
        ops.linear_row_stats(head.input, head.linear_weight, None, target, chunk_rows=2)


# Backward again, and refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [(1.0, 2.5), (2.5, 1.0)])
@paths
def test_second_backward_is_right(
    dtype: torch.dtype, reduction: str, first: float, second: float, device: torch.device
) -> None:
    head, target = make_head(9, 4, 21, dtype, device).leaves(), make_target(9, 21, device)
    loss = loss_of(head, target, reduction=reduction, chunk_rows=4)
    for i, upstream in enumerate((first, second, second)):
        grads = torch.autograd.grad(loss, head, torch.full_like(loss, upstream), retain_graph=i < 2)
        _, expected = by_linear(head, target, reduction=reduction, upstream=upstream)
        for grad, wanted in zip(grads, expected, strict=True):
            assert error(grad, wanted) <= 8 * torch.finfo(dtype).eps
            if i < 2:
                grad.fill_(NAN)  # the next must not see this
    with pytest.raises(RuntimeError, match="a second time"):
        loss.sum().backward()


@paths
def test_one_gradient_at_a_time(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    head, target = make_head(9, 4, 21, dtype, device).leaves(), make_target(9, 21, device)
    loss = loss_of(head, target, reduction=reduction).sum()
    together = torch.autograd.grad(loss, head, retain_graph=True)
    for i, tensor in enumerate(head):
        (alone,) = torch.autograd.grad(loss, tensor, retain_graph=i < 2)
        assert_same_bits(alone, together[i])


@paths
def test_double_backward_is_refused_in_words(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    head, target = make_head(9, 4, 21, dtype, device).leaves(), make_target(9, 21, device)
    for tensor in head:
        loss = loss_of(head, target, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, tensor, create_graph=True)
        assert grad.requires_grad
        with pytest.raises(RuntimeError, match="double backward"):
            grad.square().sum().backward()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_forward_mode_is_refused_in_words(place: int, device: torch.device) -> None:
    head, target = list(make_head(4, 3, 5, torch.float32, device)), make_target(4, 5, device)
    with forward_ad.dual_level():
        head[place] = forward_ad.make_dual(head[place], torch.ones_like(head[place]))
        with pytest.raises(RuntimeError, match="forward-mode derivatives of linear_cross_entropy"):
            loss_of(Head(*head), target)


@paths
def test_checkpointing_and_offloading(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    head, target = make_head(9, 4, 21, dtype, device), make_target(9, 21, device)

    def function(h: Head) -> Tensor:
        return loss_of(h, target, reduction=reduction, chunk_rows=4)

    plain = gradients(head, function)
    with torch.autograd.graph.save_on_cpu():
        offloaded = gradients(head, function)
    checkpointed = gradients(head, lambda h: checkpoint(lambda *t: function(Head(*t)), *h, use_reentrant=False))
    for expected, *others in zip(plain, offloaded, checkpointed, strict=True):
        for actual in others:
            assert error(actual, expected.cpu().double()) <= 8 * torch.finfo(dtype).eps


def test_loss_scale_saves_fp16_gradients_from_underflow(device: torch.device) -> None:
    """A mean over 512 rows of 2048 classes: at upstream 1 most of the logits' gradient is below what fp16 can hold."""
    head, target = make_head(512, 4, 2048, torch.float16, device), make_target(512, 2048, device)
    leaves, scale = head.leaves(), 65536.0
    with torch.autocast(device.type, dtype=torch.float16):  # a float32 loss, which can take the scale
        (loss_of(leaves, target) * scale).backward()
    _, expected = by_linear(head, target)
    lost, unlost = leaves.linear_weight.grad / scale, expected.linear_weight
    assert (unlost.abs() < 2**-24).any(), "these gradients do not underflow: the test would prove nothing"
    small = unlost.abs() < unlost.abs().median()
    assert error(lost.cpu()[small].double(), unlost[small]) < 0.05


@pytest.mark.float64
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str, device: torch.device) -> None:
    head = make_head(4, 3, 5, torch.float64, device).leaves()
    target, weight = torch.tensor([2, 1, -100, 1], device=device), make_weight(5, torch.float64, device)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.1, "softcap": 3.0, "chunk_rows": 2}

    def function(*tensors: Tensor) -> Tensor:
        return loss_of(Head(*tensors), target, weight=weight, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, tuple(head))


# Around the function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_casts_as_linear_does(reduction: str, device: torch.device) -> None:
    head, target = make_head(6, 4, 5, torch.float32, device), make_target(6, 5, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, *grads = gradients(head, lambda h: loss_of(h, target, reduction=reduction))
    low = head.map(Tensor.bfloat16)
    expected, expected_grads = by_linear(low, target, reduction=reduction, upstream=3.0)
    assert loss.dtype == torch.float32
    assert error(loss, expected.loss) < 0.01
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert error(grad, wanted) < 0.03


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "reduction, backend",
    [("mean", "aot_eager"), ("none", "aot_eager"), pytest.param("mean", "inductor", marks=pytest.mark.cpu)],
)
def test_compiles_in_one_graph(reduction: str, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def function(h: Head, y: Tensor) -> Tensor:
        out = loss_of(h, y, reduction=reduction, chunk_rows=3, label_smoothing=0.1, return_lse=True)
        return out.loss.sum() + 0 * out.lse.sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 9):
        head, target = make_head(rows, 4, 13, torch.float32, device), make_target(rows, 13, device)
        results = [gradients(head, lambda h, f=f, y=target: f(h, y)) for f in (function, compiled)]
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("probabilities", [False, True])
def test_ignore_index_none_is_torchs_default(probabilities: bool, device: torch.device) -> None:
    head, target = make_head(8, 5, 7, torch.float32, device)[:2], make_target(8, 7, device)
    target[3] = -100
    if probabilities:
        target = torch.rand(8, 7, device=device).softmax(1)
    expected = npu_xent.cross_entropy(F.linear(*head), target)
    torch.testing.assert_close(npu_xent.linear_cross_entropy(*head, target, ignore_index=None), expected)
    if hasattr(F, "linear_cross_entropy"):
        theirs = F.linear_cross_entropy(head[0].cpu(), head[1].cpu(), target.cpu(), ignore_index=None)
        torch.testing.assert_close(theirs, expected.cpu())
    with pytest.raises(TypeError, match="ignore_index must be an integer"):
        npu_xent.linear_cross_entropy(*head, target, ignore_index="none")
    with pytest.raises(TypeError, match="ignore_index must be an integer, but is a NoneType"):
        npu_xent.cross_entropy(F.linear(*head), target, ignore_index=None)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_transforms_and_probabilities(reduction: str, device: torch.device) -> None:
    """Served by F.linear and cross_entropy."""
    head, target = make_head(6, 4, 5, torch.float32, device), make_target(6, 5, device)
    plain = gradients(head, lambda h: loss_of(h, target, reduction=reduction))

    def summed(x: Tensor) -> Tensor:
        return loss_of(head._replace(input=x.view(2, 3, 4)), target.view(2, 3), reduction=reduction).sum()

    torch.testing.assert_close(3 * torch.func.grad(summed)(head.input), plain[1])
    soft = F.one_hot(target, 5).float().view(2, 3, 5)
    shaped = head._replace(input=head.input.view(2, 3, 4))
    results = gradients(shaped, lambda h: loss_of(h, soft, reduction=reduction))
    for actual, expected in zip(results, plain, strict=True):
        torch.testing.assert_close(actual.reshape(expected.shape), expected)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize("ignored", [False, True], ids=["all kept", "some ignored"])
def test_memory_is_5_percent_of_the_logits_beyond_the_weight_gradient(ignored: bool, device: torch.device) -> None:
    """What is promised for 4096 rows and 128256 classes; here with few features, whose products are quick."""
    rows, features, classes = 4096, 8, 128256
    head = make_head(rows, features, classes, torch.float32, device, bias=False).leaves()
    target = make_target(rows, classes, device, ignore_index=-100 if ignored else None)

    def train() -> None:
        npu_xent.linear_cross_entropy(head.input, head.linear_weight, target).backward()

    assert peak_memory(train, device) - head.linear_weight.nbytes <= 0.05 * rows * classes * 4


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunk_rows_bounds_the_memory(dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """One chunk of logits, the gradients, and for 16 bits a float32 sum of linear_weight's and a block of it."""
    rows, features, classes, chunk_rows = 256, 16, 4096, 16
    head, target = (
        make_head(rows, features, classes, dtype, device, bias=False).leaves(),
        make_target(rows, classes, device),
    )
    chunk, grads = chunk_rows * classes * dtype.itemsize, sum(t.nbytes for t in head[:2])
    sums = 2 * 4 * classes * features if dtype.itemsize == 2 else 0
    if dtype is torch.bfloat16 and releases.COPIES_BFLOAT16_OPERANDS:
        sums += chunk + classes * features * dtype.itemsize

    def forward() -> Tensor:
        return loss_of(head, target, reduction=reduction, chunk_rows=chunk_rows).sum()

    assert peak_memory(lambda: forward().backward(), device) <= chunk + grads + sums + 100 * rows + 2**16
    with torch.no_grad():
        assert peak_memory(forward, device) <= chunk + 100 * rows + 2**16


# The operators --------------------------------------------------------------------------------------------------------


def operator_arguments(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    """A call with everything."""
    head, target = make_head(5, 3, 7, dtype, device), make_target(5, 7, device, ignore_index=-100)
    weight = make_weight(7, torch.float32, device)
    options: dict[str, Any] = {"softcap": 3.0, "chunk_rows": 2}
    common = (*head, target, weight)
    if name == "linear_row_stats":
        return common, options | {"need_wsum": True, "read_ignored": True}
    options |= {"label_smoothing": 0.1, "lse_square_scale": 0.1}
    if name == "linear_cross_entropy":
        return (*head.map(Tensor.requires_grad_), target, weight), options | {"need_lse": True}
    stats = named("linear_row_stats", *common, softcap=3.0)
    totals = named("reduce_rows", target, weight, num_classes=7, loss_dtype=stats_dtype(dtype))["totals"]
    options |= {"reduction": "sum", "output_mask": [True, False, True]}
    if name == "linear_row_stats_grad":
        return (*common, totals), options
    return (*common, stats["lse"], stats["lse_low"], totals, torch.ones((), device=device)), options


OPERATORS = ("linear_row_stats", "linear_row_grad", "linear_row_stats_grad", "linear_cross_entropy")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, device: torch.device) -> None:
    check_operator(name, *operator_arguments(name, device), device)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mask", [[False] * 3, [True, False, False], [False, True, False], [False, False, True]])
@pytest.mark.parametrize("name", ["linear_row_grad", "linear_row_stats_grad"])
def test_opcheck_where_few_gradients_are_wanted(name: str, mask: list[bool], device: torch.device) -> None:
    """Outputs that are not wanted are tensors of their own, too."""
    arguments, options = operator_arguments(name, device)
    check_operator(name, arguments, options | {"output_mask": mask}, device)


def check_operator(name: str, arguments: tuple, options: dict[str, Any], device: torch.device) -> None:
    """torch.library.opcheck, of what there is on this device."""
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_autograd_registration"] if device.type in ("cpu", "cuda", "xpu") else []
    torch.library.opcheck(getattr(ops, name).default, arguments, options, test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_meta_says_what_eager_gives(name: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments, options = operator_arguments(name, device, dtype)
    eager = getattr(ops, name)(*arguments, **options)
    meta = getattr(ops, name)(*map(to_meta, arguments), **options)
    for without, with_values in zip(meta, eager, strict=True):
        assert without.device.type == "meta"
        assert (without.shape, without.dtype) == (with_values.shape, with_values.dtype)
        assert without.stride() == with_values.stride()


@pytest.mark.parametrize("name", OPERATORS[:3])
def test_primitives_are_not_differentiable_in_words(name: str, device: torch.device) -> None:
    arguments, options = operator_arguments(name, device)
    outputs = getattr(ops, name)(arguments[0].requires_grad_(), *arguments[1:], **options)
    with pytest.raises(RuntimeError, match="is not differentiable"):
        outputs[0].sum().backward()


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input of no dimensions": ({"input": torch.tensor(1.0)}, ValueError, "target must have the shape of input without"),
    "target of another shape": (
        {"target": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "but input has [4, 3], linear_weight [5, 3] and target [3]",
    ),
    "input in int64": ({"input": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "input must be float32, bfloat16"),
    "input no tensor": ({"input": [1.0]}, TypeError, "linear_cross_entropy: input must be a torch.Tensor"),
    "linear_weight of three dimensions, with a target that does not fit": (
        {"linear_weight": torch.ones(5, 3, 3), "target": torch.zeros(2, 3, dtype=torch.long)},
        ValueError,
        "linear_weight must have shape [C, H], but has 3 dimensions: [5, 3, 3].",
    ),
    "linear_weight no tensor": ({"linear_weight": None}, TypeError, "linear_weight must be a torch.Tensor"),
    "linear_weight of one dimension": (
        {"linear_weight": torch.ones(3)},
        ValueError,
        "linear_weight must have shape [C, H], but has 1 dimensions: [3]",
    ),
    "linear_weight of other features": (
        {"linear_weight": torch.ones(5, 4)},
        ValueError,
        "of the 3 features of input, but has shape [5, 4]; if it is [H, C], pass linear_weight.t().",
    ),
    "no classes": ({"linear_weight": torch.ones(0, 3)}, ValueError, "linear_weight must have at least one class"),
    "linear_weight in bfloat16": (
        {"linear_weight": torch.ones(5, 3, dtype=torch.bfloat16)},
        TypeError,
        "linear_weight must have the dtype of input, torch.float32, but is torch.bfloat16",
    ),
    "linear_weight elsewhere": (
        {"linear_weight": torch.ones(5, 3, device="meta")},
        ValueError,
        "linear_weight must be on the device of input",
    ),
    "linear_bias in float16": ({"linear_bias": torch.ones(5).half()}, TypeError, "linear_bias must have the dtype of"),
    "linear_bias of two dimensions": ({"linear_bias": torch.ones(1, 5)}, ValueError, "linear_bias must have shape [C]"),
    "linear_bias of other classes": (
        {"linear_bias": torch.ones(4)},
        ValueError,
        "linear_bias must have one value for each of the 5 classes, but has 4",
    ),
    "weight of other classes": (
        {"weight": torch.ones(4)},
        ValueError,
        "weight must have one value for each of the 5 classes, but has 4",
    ),
    "weight in float16": (
        {"weight": torch.ones(5).half()},
        TypeError,
        "weight must be float32 or of the logits' dtype torch.float32, but is torch.float16",
    ),
    "weight that learns": ({"weight": torch.ones(5, requires_grad=True)}, RuntimeError, "weight requires a gradient"),
    "target of bool": ({"target": torch.ones(4, dtype=torch.bool)}, TypeError, "target must be int64"),
    "chunk_rows of 0": ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, but is 0"),
    "chunk_rows of a half": ({"chunk_rows": 0.5}, TypeError, "chunk_rows must be an integer, but is a float"),
    "ignore_index as text": ({"ignore_index": "1"}, TypeError, "ignore_index must be an integer"),
    "an unknown reduction": ({"reduction": "avg"}, ValueError, 'reduction must be "mean", "sum" or "none"'),
    "no reduction": ({"reduction": None}, TypeError, 'reduction must be "mean", "sum" or "none", but is a NoneType'),
    "label_smoothing above 1": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie in [0, 1]"),
    "lse_square_scale below 0": ({"lse_square_scale": -1.0}, ValueError, "lse_square_scale must be finite and not"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap must lie in [1e-6, 1e6]"),
    "softcap as text": ({"softcap": "30"}, TypeError, "softcap must be a number, but is a str"),
}


@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_in_words(name: str, probabilities: bool, device: torch.device) -> None:
    changed, kind, words = REFUSALS[name]
    if probabilities and not changed.keys() & {"linear_bias", "chunk_rows"} and "dtype" not in words:
        pytest.skip("is about classes, or changes the shape that probabilities must have")
    head = make_head(4, 3, 5, torch.float32, device)
    target = torch.full((4, 5), 0.2, device=device) if probabilities else make_target(4, 5, device)
    good = {"input": head.input, "linear_weight": head.linear_weight, "target": target}
    changed = {
        key: value.to(device) if isinstance(value, Tensor) and not value.is_meta else value
        for key, value in changed.items()
    }
    with pytest.raises(kind) as caught:
        npu_xent.linear_cross_entropy(**good | changed)
    assert words in str(caught.value)


def test_the_operators_refuse_shapes_in_words(device: torch.device) -> None:
    head, target = make_head(4, 3, 5, torch.float32, device), make_target(4, 5, device)
    totals = named("reduce_rows", target, None, num_classes=5, loss_dtype=torch.float32)["totals"]
    with pytest.raises(ValueError, match=r"input must have shape \[N, H\], but has 3 dimensions: \[1, 4, 3\]"):
        ops.linear_row_stats(head.input[None], head.linear_weight, None, target)
    with pytest.raises(ValueError, match="target must have one value for each of the 4 rows of input, but has 3"):
        ops.linear_row_stats(head.input, head.linear_weight, None, target[:3])
    with pytest.raises(ValueError, match="call linear_row_stats and linear_row_grad instead"):
        ops.linear_row_stats_grad(*head, target, None, totals, reduction="none", output_mask=[True] * 3)
