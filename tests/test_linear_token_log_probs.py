"""linear_token_log_probs: token_log_probs of F.linear(input, linear_weight, linear_bias), whose logits are never all
in memory.

Compared with the truth in float64, made of the inputs as they are rounded. The logits are rounded to the dtype of input
on the way, as F.linear rounds them, so errors are measured against those of F.linear and the plain formulas.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import releases
import torch
from heads import Head, error, make_head
from operator_cases import ops, to_meta
from option_values import factors
from reference import DTYPES, NAN, assert_same_bits, case_id, make_target, pairwise, stats_dtype
from token_cases import TokenTruth, plain, temperatures, token_truth, upstreams
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import npu_xent
from npu_xent.doctor.timing import peak_memory

ROWS, FEATURES, CLASSES = 23, 12, 40


def by_linear(head: Head, target: Tensor, **options: Any) -> tuple[TokenTruth, Head]:
    """The truth of the logits in float64, and the gradients by the chain rule of F.linear."""
    head = head.map(lambda t: t.detach().cpu().double())
    expected = token_truth(F.linear(*head), target, **options)
    rows = expected.grad.reshape(-1, expected.grad.shape[-1])
    return expected, Head(
        expected.grad @ head.linear_weight,
        rows.t() @ head.input.reshape(-1, head.input.shape[-1]),
        None if head.linear_bias is None else rows.sum(0),
    )


def outputs_of(head: Head, target: Tensor, **options: Any) -> npu_xent.TokenLogProbs:
    """All outputs of linear_token_log_probs."""
    return npu_xent.linear_token_log_probs(
        head.input,
        head.linear_weight,
        target,
        linear_bias=head.linear_bias,
        return_entropy=True,
        return_top1=True,
        **options,
    )


def loss_of(head: Head, target: Tensor, **options: Any) -> Tensor:
    """As a policy's: the sum of the log-probabilities, and a bonus for entropy."""
    out = outputs_of(head, target, **options)
    return -out.log_probs.sum() - 0.1 * out.entropy.sum()


def gradients(head: Head, function: Callable[[Head], Tensor]) -> tuple[Tensor, ...]:
    """The loss, and the gradients of a fresh copy of the head."""
    leaves = head.leaves()
    loss = function(leaves)
    loss.backward(torch.full_like(loss, 3.0))
    return loss.detach(), *(t.grad for t in leaves if t is not None)


CASES = pairwise(
    factors(
        *("dtype", "ignore_index"),
        temperature=(1.0, 0.7, "one a row"),
        softcap=(None, 2.0),
        logit_scale=(1.0, 0.7, -0.5),
        uses=("both", "log_probs", "entropy"),
        chunk_rows=(1, 7, 23, 100, None),
        bias=(True, False),
    )
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients(case: dict[str, Any], device: torch.device) -> None:
    dtype = case["dtype"]
    head = make_head(ROWS, FEATURES, CLASSES, dtype, device, bias=case["bias"])
    target = make_target(ROWS, CLASSES, device, ignore_index=case["ignore_index"])
    options = {name: case[name] for name in ("temperature", "softcap", "logit_scale", "ignore_index")}
    if options["temperature"] == "one a row":
        options["temperature"] = temperatures((ROWS,), device)
    if options["ignore_index"] is None:
        del options["ignore_index"]
    grads = upstreams(target.shape, dtype, device, case["uses"])
    expected, wanted = by_linear(head, target, **options, grad_log_probs=grads[0], grad_entropy=grads[1])
    # Of logits as F.linear rounds them the best one is obvious, and float64 may see another.
    theirs, ours = head.leaves(), head.leaves()
    logits = F.linear(*theirs)
    top1 = token_truth(logits, target, **options).top1
    their_outputs = plain(logits, target, **options)
    out = outputs_of(ours, target, chunk_rows=case["chunk_rows"], **options)
    for outputs in (their_outputs, out[:2]):
        used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
        torch.autograd.backward(*map(list, zip(*used, strict=True)))

    def assert_as_good(actual: Tensor, other: Tensor, true: Tensor, name: str) -> None:
        # Each rounds in its own way; one error is as likely as another of its size.
        allowed = 2 * max(error(other, true), 2 * torch.finfo(dtype).eps)
        assert error(actual, true) <= allowed, f"{name}: {error(actual, true):.2e}, torch {error(other, true):.2e}"

    assert out.log_probs.dtype == out.entropy.dtype == stats_dtype(dtype)
    assert_as_good(out.log_probs, their_outputs[0], expected.log_probs, "log_probs")
    assert_as_good(out.entropy, their_outputs[1], expected.entropy, "entropy")
    # The chunks' products may round a logit in another way than one product of all rows.
    assert int((out.top1.cpu() != top1).sum()) <= (1 if dtype.itemsize == 2 else 0)
    for name, mine, true, other in zip(Head._fields, ours, wanted, theirs, strict=True):
        if true is not None:
            assert mine.grad.dtype == dtype
            assert_as_good(mine.grad, other.grad, true, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 64])
def test_chunks_change_nothing_but_roundings(chunk_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """Also compared with token_log_probs of F.linear."""
    head = make_head(ROWS, FEATURES, CLASSES, dtype, device)
    target = make_target(ROWS, CLASSES, device, ignore_index=-100)
    temperature = temperatures((ROWS,), device)

    def with_logits(h: Head) -> Tensor:
        out = npu_xent.token_log_probs(F.linear(*h), target, temperature=temperature, return_entropy=True)
        return -out.log_probs.sum() - 0.1 * out.entropy.sum()

    whole = gradients(head, lambda h: loss_of(h, target, temperature=temperature))
    chunked = gradients(head, lambda h: loss_of(h, target, temperature=temperature, chunk_rows=chunk_rows))
    others = gradients(head, with_logits)
    for a, b, c in zip(chunked, whole, others, strict=True):
        # The loss adds up 23 rows in float32 (float64), of which each has its error.
        for other in (b, c):
            assert error(a, other.cpu().double()) <= 16 * torch.finfo(dtype).eps


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (2, 0)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], per_row: bool, device: torch.device) -> None:
    rows = torch.Size(shape).numel()
    head = make_head(rows, 4, 5, torch.float32, device)
    target = make_target(rows, 5, device)
    temperature = temperatures((rows,), device) if per_row else 0.7
    shaped = head._replace(input=head.input.view(*shape, 4))
    shaped_temperature = temperature.view(shape) if per_row else temperature
    flat = outputs_of(head, target, temperature=temperature)
    for actual, expected in zip(
        outputs_of(shaped, target.view(shape), temperature=shaped_temperature), flat, strict=True
    ):
        assert actual.shape == shape
        assert_same_bits(actual.reshape(-1), expected)
    results = gradients(shaped, lambda h: loss_of(h, target.view(shape), temperature=shaped_temperature))
    for actual, expected in zip(
        results, gradients(head, lambda h: loss_of(h, target, temperature=temperature)), strict=True
    ):
        assert_same_bits(actual.reshape(expected.shape), expected)


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all ignored"])
def test_nothing_to_learn_from(rows: int, device: torch.device) -> None:
    head = make_head(rows, 4, 5, torch.bfloat16, device)
    target = torch.full((rows,), -100, device=device)
    loss, *grads = gradients(head, lambda h: loss_of(h, target, chunk_rows=2))
    assert not loss.any()
    for grad, like in zip(grads, head, strict=True):
        assert grad.shape == like.shape
        assert not grad.any()


def test_strides(device: torch.device) -> None:
    """input and linear_weight need not be contiguous, nor target and temperature."""
    head = make_head(6, 4, 5, torch.float32, device)
    wide = Head(head.input.t().contiguous().t(), head.linear_weight.repeat(1, 2)[:, :4], head.linear_bias)
    target, temperature = make_target(6, 5, device), temperatures((6,), device)
    results = [
        torch.autograd.grad(loss_of(h, y, temperature=t, chunk_rows=4), h)
        for h, y, t in (
            (head.map(Tensor.requires_grad_), target, temperature),
            (wide.map(Tensor.requires_grad_), target.repeat_interleave(2)[::2], temperature.repeat_interleave(2)[::2]),
        )
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_only_what_was_asked_for_comes_out(device: torch.device) -> None:
    head, target = make_head(6, 4, 5, torch.float32, device).leaves(), make_target(6, 5, device)
    alone = npu_xent.linear_token_log_probs(*head[:2], target, linear_bias=head.linear_bias)
    assert type(alone) is Tensor
    for entropy, top1 in ((True, False), (False, True)):
        out = npu_xent.linear_token_log_probs(
            *head[:2], target, linear_bias=head.linear_bias, return_entropy=entropy, return_top1=top1
        )
        assert (out.entropy is not None, out.top1 is not None) == (entropy, top1)
        assert_same_bits(out.log_probs, alone)


# What is frozen, ignored, or not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_wanted_gradients(dtype: torch.dtype, wanted: tuple[int, ...], device: torch.device) -> None:
    head, target = make_head(6, 4, 5, dtype, device), make_target(6, 5, device)
    everything = gradients(head, lambda h: loss_of(h, target, chunk_rows=4))[1:]
    some = Head(*(t.requires_grad_(bool(want)) for t, want in zip(head.leaves(), wanted, strict=True)))
    loss = loss_of(some, target, chunk_rows=4)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward(torch.full_like(loss, 3.0))
    for tensor, want, expected in zip(some, wanted, everything, strict=True):
        assert (tensor.grad is not None) == bool(want)
        if want:
            assert_same_bits(tensor.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_ignored_rows_does_no_harm(dtype: torch.dtype, device: torch.device) -> None:
    head, target = make_head(7, 4, 5, dtype, device), make_target(7, 5, device, ignore_index=-100)
    ignored = target == -100
    harmed = head._replace(input=head.input.masked_fill(ignored[:, None], NAN))
    for actual, expected in zip(
        gradients(harmed, lambda h: loss_of(h, target, chunk_rows=3)),
        gradients(head, lambda h: loss_of(h, target, chunk_rows=3)),
        strict=True,
    ):
        assert_same_bits(actual, expected)
    out = outputs_of(harmed, target, chunk_rows=3)
    assert not out.log_probs[ignored].any()
    assert not out.entropy[ignored].any()
    assert not out.top1[ignored].any()
    assert bool(out.entropy.isfinite().all())


def test_a_masked_class(device: torch.device) -> None:
    """A bias of -inf: probability 0, and no gradient, in the weight neither."""
    head, target = make_head(7, 4, 5, torch.float32, device), make_target(7, 5, device) % 4
    head.linear_bias[4] = -torch.inf
    out = outputs_of(head, target)
    without = Head(head.input, head.linear_weight[:4], head.linear_bias[:4])
    for actual, expected in zip(out, outputs_of(without, target), strict=True):
        torch.testing.assert_close(actual, expected)
    _, grad_input, grad_weight, grad_bias = gradients(head, lambda h: loss_of(h, target))
    assert grad_input.isfinite().all()
    assert not grad_weight[4].any()
    assert float(grad_bias[4]) == 0


@pytest.mark.cpu
def test_a_target_out_of_range_is_named_by_its_row(device: torch.device) -> None:
    head, target = make_head(7, 4, 5, torch.float32, device), make_target(7, 5, device, ignore_index=-100)
    target[5] = 9
    with pytest.raises(IndexError, match=r"target\[5\] is 9"):
        outputs_of(head, target, chunk_rows=2)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_a_temperature_that_is_not_positive_and_finite(bad: float, device: torch.device) -> None:
    """Named by its row on the CPU; elsewhere the row is NaN."""
    head, target = make_head(7, 4, 5, torch.float32, device), make_target(7, 5, device)
    temperature = temperatures((7,), device)
    temperature[5] = bad
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"temperature\[5\] is .*, but must be positive and finite"):
            outputs_of(head, target, temperature=temperature, chunk_rows=2)
        return
    out = outputs_of(head, target, temperature=temperature, chunk_rows=2)
    for output in out[:2]:
        assert output.isnan().tolist() == [False] * 5 + [True, False]


# Backward again, and refused ------------------------------------------------------------------------------------------


def test_second_backward_and_second_derivative(device: torch.device) -> None:
    head, target = make_head(9, 4, 21, torch.float32, device).leaves(), make_target(9, 21, device)
    loss = loss_of(head, target, chunk_rows=4)
    first, second = (torch.autograd.grad(loss, head, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    for tensor, expected in zip(head, first, strict=True):
        (alone,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        assert_same_bits(alone, expected)
        (grad,) = torch.autograd.grad(loss, tensor, retain_graph=True, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.square().sum().backward()
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_forward_mode_is_refused(place: int, device: torch.device) -> None:
    head, target = list(make_head(4, 3, 5, torch.float32, device)), make_target(4, 5, device)
    with forward_ad.dual_level():
        head[place] = forward_ad.make_dual(head[place], torch.ones_like(head[place]))
        with pytest.raises(RuntimeError, match="forward-mode derivatives of linear_token_log_probs"):
            outputs_of(Head(*head), target)


@pytest.mark.float64
def test_gradcheck(device: torch.device) -> None:
    head = make_head(4, 3, 5, torch.float64, device).leaves()
    target = torch.tensor([2, 1, -100, 1], device=device)
    options = {"temperature": temperatures((4,), device), "softcap": 3.0, "logit_scale": -0.8, "chunk_rows": 2}
    assert torch.autograd.gradcheck(lambda *tensors: outputs_of(Head(*tensors), target, **options)[:2], tuple(head))


# Around the function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_and_offloading(dtype: torch.dtype, device: torch.device) -> None:
    head, target = make_head(9, 4, 21, dtype, device), make_target(9, 21, device)

    def function(h: Head) -> Tensor:
        return loss_of(h, target, chunk_rows=4)

    expected = gradients(head, function)
    with torch.autograd.graph.save_on_cpu():
        offloaded = gradients(head, function)
    checkpointed = gradients(head, lambda h: checkpoint(lambda *t: function(Head(*t)), *h, use_reentrant=False))
    for wanted, *others in zip(expected, offloaded, checkpointed, strict=True):
        for actual in others:
            assert_same_bits(actual, wanted)


def test_autocast_casts_as_linear_does(device: torch.device) -> None:
    head, target = make_head(6, 4, 5, torch.float32, device), make_target(6, 5, device)
    with torch.autocast(device.type, torch.bfloat16):
        out = outputs_of(head, target)
        loss, *grads = gradients(head, lambda h: loss_of(h, target))
    assert out.log_probs.dtype == out.entropy.dtype == loss.dtype == torch.float32
    low = head.map(Tensor.bfloat16)
    for actual, expected in zip(out, outputs_of(low, target), strict=True):
        assert_same_bits(actual, expected)
    _, wanted = by_linear(low, target, grad_log_probs=-3.0, grad_entropy=-0.3)
    for grad, true in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert error(grad, true) < 0.03


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.cpu)])
def test_compiles_in_one_graph(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def function(h: Head, y: Tensor) -> Tensor:
        return loss_of(h, y, chunk_rows=3, softcap=2.0, temperature=0.7)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 9):
        head, target = make_head(rows, 4, 13, torch.float32, device), make_target(rows, 13, device)
        results = [gradients(head, lambda h, f=f, y=target: f(h, y)) for f in (function, compiled)]
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


def test_torch_func(device: torch.device) -> None:
    """Served by F.linear and torch's operations: grad, vmap, and a second derivative."""
    head, target = make_head(6, 4, 5, torch.float32, device), make_target(6, 5, device)

    def of(x: Tensor) -> Tensor:
        return loss_of(head._replace(input=x), target, temperature=0.7)

    def by_torch(x: Tensor) -> Tensor:
        log_probs, entropy = plain(F.linear(x, *head[1:]), target, temperature=0.7)
        return -log_probs.sum() - 0.1 * entropy.sum()

    batch = torch.stack([head.input, -head.input])
    for transform, argument in (
        (torch.func.grad, head.input),
        (torch.vmap, batch),
        (lambda f: torch.vmap(torch.func.grad(f)), batch),
        (lambda f: torch.func.jvp(torch.func.grad(f), (head.input,), (batch[1],)), None),
    ):
        actual, expected = transform(of), transform(by_torch)
        if argument is not None:
            actual, expected = actual(argument), expected(argument)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_profiles_show_the_fused_operators(device: torch.device) -> None:
    """And no operation of torch on all N x C logits, but for the chunks' products."""
    rows, features, classes, chunk_rows = 64, 4, 128, 8
    head, target = make_head(rows, features, classes, torch.float32, device), make_target(rows, classes, device)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        gradients(head, lambda h: loss_of(h, target, chunk_rows=chunk_rows))
    events = recorded.events()
    names = [event.name for event in events]
    assert names.count("npu_xent::linear_row_stats") == names.count("npu_xent::linear_row_grad") == 1
    for event in events:
        for shape in event.input_shapes:
            if isinstance(shape, list | tuple):
                assert torch.Size(shape).numel() <= chunk_rows * classes, event.name


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize("ignored", [False, True], ids=["all kept", "some ignored"])
def test_memory_is_5_percent_of_the_logits_beyond_the_weight_gradient(ignored: bool, device: torch.device) -> None:
    """As that of linear_cross_entropy, for 4096 rows of 128256 classes; with few features, whose products are quick."""
    rows, features, classes = 4096, 8, 128256
    head = make_head(rows, features, classes, torch.float32, device, bias=False).leaves()
    target = make_target(rows, classes, device, ignore_index=-100 if ignored else None)

    def train() -> None:
        loss_of(head, target).backward()

    assert peak_memory(train, device) - head.linear_weight.nbytes <= 0.05 * rows * classes * 4


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunk_rows_bounds_the_memory(dtype: torch.dtype, device: torch.device) -> None:
    """One chunk of logits, the gradients, and for 16 bits a float32 sum of linear_weight's and a block of it."""
    rows, features, classes, chunk_rows = 256, 16, 4096, 16
    head = make_head(rows, features, classes, dtype, device, bias=False).leaves()
    target = make_target(rows, classes, device)
    chunk, grads = chunk_rows * classes * dtype.itemsize, sum(t.nbytes for t in head[:2])
    sums = 2 * 4 * classes * features if dtype.itemsize == 2 else 0
    if dtype is torch.bfloat16 and releases.COPIES_BFLOAT16_OPERANDS:
        sums += chunk + classes * features * dtype.itemsize

    def forward() -> Tensor:
        return loss_of(head, target, chunk_rows=chunk_rows)

    assert peak_memory(lambda: forward().backward(), device) <= chunk + grads + sums + 100 * rows + 2**16
    with torch.no_grad():
        assert peak_memory(forward, device) <= chunk + 100 * rows + 2**16


# The operator ---------------------------------------------------------------------------------------------------------


def operator_call(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict[str, Any]]:
    """A call of torch.ops.npu_xent.linear_token_log_probs with everything."""
    head, target = make_head(5, 3, 7, dtype, device), make_target(5, 7, device, ignore_index=-100)
    options = {"need_entropy": True, "need_top1": True, "softcap": 3.0, "chunk_rows": 2}
    return (*head.map(Tensor.requires_grad_), target, temperatures((5,), device)), options


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(everything: bool, device: torch.device) -> None:
    arguments, options = operator_call(device)
    if not everything:
        arguments, options = (*arguments[:2], None, arguments[3]), {}
    registration = ("test_autograd_registration",) if device.type in ("cpu", "cuda", "xpu") else ()
    torch.library.opcheck(ops.linear_token_log_probs.default, arguments, options, test_utils=(*CHECKS, *registration))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["linear_row_stats", "linear_row_grad"])
def test_opcheck_of_the_primitives(name: str, device: torch.device) -> None:
    """With what linear_token_log_probs asks of them."""
    (*tensors, target, temperature), _ = operator_call(device)
    tensors = [t.detach() for t in tensors]
    options: dict[str, Any] = {"need_entropy": True, "need_top1": True, "temperature": 0.7, "chunk_rows": 2}
    arguments: tuple = (*tensors, target, None, temperature)
    if name == "linear_row_grad":
        lse, lse_low, *_, entropy, _ = ops.linear_row_stats(*arguments, **options)
        grads = upstreams(target.shape, torch.float32, device, "both")
        arguments = (*tensors, target, None, lse, lse_low, None, grads[0])
        options = {"row_temperature": temperature, "entropy": entropy, "grad_entropy": grads[1]}
        options |= {"reduction": "none", "temperature": 0.7, "chunk_rows": 2, "output_mask": [True, False, True]}
    torch.library.opcheck(getattr(ops, name).default, arguments, options, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_says_what_eager_gives(dtype: torch.dtype, device: torch.device) -> None:
    arguments, options = operator_call(device, dtype)
    for wanted in ({}, {"need_entropy": False}, {"need_top1": False}):
        eager = ops.linear_token_log_probs(*arguments, **options | wanted)
        meta = ops.linear_token_log_probs(*map(to_meta, arguments), **options | wanted)
        for without, with_values in zip(meta, eager, strict=True):
            assert without.device.type == "meta"
            assert (without.shape, without.dtype) == (with_values.shape, with_values.dtype)
            assert without.stride() == with_values.stride()


def test_composite(device: torch.device, composite: Any) -> None:
    """The kernels made of aten operations, for devices without their own."""
    head = make_head(ROWS, FEATURES, CLASSES, torch.float32, device)
    target = make_target(ROWS, CLASSES, device, ignore_index=-100)

    def function(h: Head) -> Tensor:
        return loss_of(h, target, temperature=temperatures((ROWS,), device), softcap=2.0, chunk_rows=5)

    expected = gradients(head, function)
    with composite():
        actual = gradients(head, function)
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e.cpu().double()) < 1e-5


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input no tensor": ({"input": [1.0]}, TypeError, "linear_token_log_probs: input must be a torch.Tensor"),
    "linear_weight no tensor": ({"linear_weight": None}, TypeError, "linear_weight must be a torch.Tensor"),
    "input of no dimensions": ({"input": torch.tensor(1.0)}, ValueError, "target must have the shape of input without"),
    "target of another shape": (
        {"target": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "target must have the shape of input without",
    ),
    "class probabilities": ({"target": torch.full((4, 5), 0.2)}, ValueError, "target must have the shape of input"),
    "target of bool": ({"target": torch.ones(4, dtype=torch.bool)}, TypeError, "target must be int64"),
    "input in int64": ({"input": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "input must be float32, bfloat16"),
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
    "linear_bias of other classes": (
        {"linear_bias": torch.ones(4)},
        ValueError,
        "linear_bias must have one value for each of the 5 classes, but has 4",
    ),
    "chunk_rows of 0": ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, but is 0"),
    "chunk_rows of a half": ({"chunk_rows": 0.5}, TypeError, "chunk_rows must be an integer, but is a float"),
    "temperature of 0": ({"temperature": 0.0}, ValueError, "temperature must lie in [1e-6, 1e6], but is 0"),
    "fewer temperatures": ({"temperature": torch.ones(3)}, ValueError, "temperature must"),
    "temperature in float16": (
        {"temperature": torch.ones(4).half()},
        TypeError,
        "temperature must be a number or float32",
    ),
    "temperature that learns": (
        {"temperature": torch.ones(4, requires_grad=True)},
        RuntimeError,
        "temperature requires a gradient",
    ),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap must lie in [1e-6, 1e6]"),
    "ignore_index as text": ({"ignore_index": "1"}, TypeError, "ignore_index must be an integer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, device: torch.device) -> None:
    changed, kind, words = REFUSALS[name]
    head = make_head(4, 3, 5, torch.float32, device)
    good = {"input": head.input, "linear_weight": head.linear_weight, "target": make_target(4, 5, device)}
    changed = {
        key: value.to(device).detach().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and not value.is_meta
        else value
        for key, value in changed.items()
    }
    with pytest.raises(kind, match=re.escape(words)):
        npu_xent.linear_token_log_probs(**good | changed)


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "target", "temperature"])
def test_freed_storage(name: str, device: torch.device) -> None:
    shapes = {"input": (9, 8), "linear_weight": (21, 8), "linear_bias": (21,), "temperature": (9,)}
    tensors = {key: torch.ones(shape, device=device) for key, shape in shapes.items()}
    tensors["target"] = make_target(9, 21, device)
    tensors[name].untyped_storage().resize_(0)
    words = "needs [0-9]+ bytes of storage, but its storage has been resized to 0"
    with pytest.raises(RuntimeError, match=f"npu_xent: {name} with shape .* {words}"):
        npu_xent.linear_token_log_probs(**tensors)
