"""The operators that token_log_probs consists of: that they are what runs, what torch demands of them, class shards."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from operator_cases import ops, to_meta
from reference import DTYPES, assert_near, case_id, named, pairwise
from token_cases import (
    CLASSES,
    ROWS,
    loss_of,
    outputs_and_grad,
    problem,
    temperatures,
    token_truth,
    upstreams,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent

Composite = type[TorchDispatchMode]


@pytest.fixture(autouse=True, scope="module")
def kernels(device: torch.device) -> None:
    """On an NPU its kernels are loaded by the first call of a function; until then operators are composites."""
    npu_xent.token_log_probs(torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device))


# The fused operators are what runs ------------------------------------------------------------------------------------

VIEWS = ("view", "reshape", "_unsafe_view", "detach", "alias", "empty", "empty_like", "empty_strided", "unsqueeze")


def large(shapes: list[Any]) -> bool:
    return any(torch.Size(shape).numel() >= ROWS * CLASSES for shape in shapes if isinstance(shape, list | tuple))


def test_profiles_show_the_fused_operators_alone(device: torch.device) -> None:
    """One sweep forward and one backward; torch does nothing of the logits' size."""
    logits, target = problem(device)
    for options in ({}, {"temperature": temperatures((ROWS,), device), "softcap": 2.0, "logit_scale": 0.7}):
        leaf = logits.clone().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            out = npu_xent.token_log_probs(leaf, target, **options, return_entropy=True, return_top1=True)
            torch.autograd.backward([out.log_probs, out.entropy], [torch.ones_like(t) for t in out[:2]])
        names = [event.name for event in recorded.events()]
        counts = {name: names.count(f"npu_xent::{name}") for name in ("row_stats", "row_grad", "row_stats_grad")}
        assert counts == {"row_stats": 1, "row_grad": 1, "row_stats_grad": 0}
        by_torch = {
            event.name
            for event in recorded.events()
            if event.name.startswith("aten::") and event.name[6:] not in VIEWS and large(event.input_shapes)
        }
        assert by_torch == set()


def test_graphs_hold_the_fused_operators_alone(device: torch.device) -> None:
    """What a compiler gets to see, forward and backward."""
    logits, target = problem(device)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return torch.autograd.grad(loss_of(x, y), x)[0]

    graph = make_fx(step, tracing_mode="fake")(logits.requires_grad_(), target).graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in called]
    assert names.count("npu_xent.row_stats.default") == 1
    assert names.count("npu_xent.row_grad.default") == 1
    of_size = [
        str(node.target)
        for node in called
        if isinstance(value := node.meta.get("val"), Tensor) and value.numel() >= ROWS * CLASSES
    ]
    assert [name for name in of_size if name.split(".")[1] not in VIEWS] == ["npu_xent.row_grad.default"]


# The operators --------------------------------------------------------------------------------------------------------


def operator_call(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict[str, Any]]:
    """A call of torch.ops.npu_xent.token_log_probs with everything."""
    logits, target = problem(device, dtype)
    options = {"need_entropy": True, "need_top1": True, "softcap": 3.0, "logit_scale": 0.7}
    return (logits.requires_grad_(), target, temperatures((ROWS,), device)), options


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(everything: bool, device: torch.device) -> None:
    arguments, options = operator_call(device)
    if not everything:
        arguments, options = arguments[:2], {}
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_autograd_registration"] if device.type in ("cpu", "cuda", "xpu") else []
    torch.library.opcheck(ops.token_log_probs.default, arguments, options, test_utils=checks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["row_stats", "row_grad"])
def test_opcheck_of_the_primitives(name: str, device: torch.device) -> None:
    """With what token_log_probs asks of them."""
    (logits, target, temperature), _ = operator_call(device)
    logits = logits.detach()
    options: dict[str, Any] = {"need_entropy": True, "need_top1": True, "temperature": 0.7}
    arguments: tuple = (logits, target, None, temperature)
    if name == "row_grad":
        lse, lse_low, *_, entropy, _ = ops.row_stats(*arguments, **options)
        grads = upstreams(target.shape, torch.float32, device, "both")
        arguments = (logits, target, None, lse, lse_low, None, grads[0])
        options = {"row_temperature": temperature, "entropy": entropy, "grad_entropy": grads[1], "reduction": "none"}
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(getattr(ops, name).default, arguments, options, test_utils=checks)


@pytest.mark.parametrize("name", ["token_log_probs", "token_log_probs_"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_says_what_eager_gives(dtype: torch.dtype, name: str, device: torch.device) -> None:
    arguments, options = operator_call(device, dtype)
    for wanted in ({}, {"need_entropy": False}, {"need_top1": False}):
        results = []
        for values in (arguments, [to_meta(value) for value in arguments]):
            logits = values[0].detach().requires_grad_()
            results.append(getattr(ops, name)(logits * 1, *values[1:], **options | wanted))
        for eager, meta in zip(*results, strict=True):
            assert meta.device.type == "meta"
            assert (meta.shape, meta.dtype, meta.stride()) == (eager.shape, eager.dtype, eager.stride())


COMPOSITE_CASES = pairwise(
    {
        "dtype": DTYPES,
        "temperature": (1.0, 0.7, "one a row"),
        "softcap": (None, 2.0),
        "logit_scale": (1.0, 0.7, -0.5, 0.0),
        "uses": ("both", "log_probs", "entropy"),
        "consume": (False, True),
    }
)


@pytest.mark.parametrize("case", COMPOSITE_CASES, ids=case_id)
def test_composite(case: dict[str, Any], device: torch.device, composite: Composite) -> None:
    """The kernels made of aten operations, for devices without their own."""
    dtype, logit_scale = case["dtype"], case["logit_scale"]
    logits, target = problem(device, dtype)
    if logit_scale > 0:
        logits[:, 3] = -torch.inf
        logits[5] = -torch.inf
        logits[8, 2] = torch.nan
    options = {name: case[name] for name in ("temperature", "softcap", "logit_scale")}
    if options["temperature"] == "one a row":
        options["temperature"] = temperatures((ROWS,), device)
    grads = upstreams(target.shape, dtype, device, case["uses"])
    expected = token_truth(logits, target, **options, grad_log_probs=grads[0], grad_entropy=grads[1])
    with composite():
        out, grad = outputs_and_grad(logits, target, grads, consume=case["consume"], **options)
    assert_near(out.log_probs, expected.log_probs, expected.log_prob_terms, name="log_probs")
    assert_near(out.entropy, expected.entropy, expected.entropy_terms, name="entropy")
    assert_near(grad, expected.grad, expected.grad_terms, name="gradient")
    assert torch.equal(out.top1.cpu(), expected.top1)


# Class shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_composite", [False, True], ids=["kernels", "composite"])
@pytest.mark.parametrize("borders", [(0, 21), (0, 5, 21), (0, 1, 2, 20, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_shards_make_up_the_whole(
    dtype: torch.dtype, borders: tuple[int, ...], with_composite: bool, device: torch.device, composite: Composite
) -> None:
    """H = sum w (H of the shard + lse - lse of the shard), w = exp(lse of the shard - lse); gradients side by side."""
    logits, target = problem(device, dtype)
    temperature = temperatures((ROWS,), device)
    grads = upstreams(target.shape, dtype, device, "both")
    options = {"logit_scale": 0.7, "softcap": 4.0}
    expected = token_truth(
        logits, target, temperature=temperature, **options, grad_log_probs=grads[0], grad_entropy=grads[1]
    )
    shards = [(logits[:, a:b], {"class_start": a, "num_classes": CLASSES}) for a, b in itertools.pairwise(borders)]
    with composite() if with_composite else contextlib.nullcontext():
        stats = [
            named("row_stats", x, target, None, temperature, need_entropy=True, need_top1=True, **options, **shard)
            for x, shard in shards
        ]
        each = torch.stack([s["lse"] for s in stats])
        lse = each.logsumexp(0)
        entropy = ((each - lse).exp() * (torch.stack([s["entropy"] for s in stats]) + lse - each)).sum(0)
        ignored = target == -100
        entropy = entropy.masked_fill(ignored, 0)
        assert_near(entropy, expected.entropy, 2 * expected.entropy_terms, name="entropy")
        for s, (x, shard) in zip(stats, shards, strict=True):
            column = target - shard["class_start"]
            assert torch.equal(s["top1"], (x.argmax(1) == column) & ~ignored)
        for (x, shard), columns in zip(shards, itertools.pairwise(borders), strict=True):
            operands = {"row_temperature": temperature, "entropy": entropy, "grad_entropy": grads[1]}
            grad = ops.row_grad(
                x, target, None, lse, None, None, -grads[0], reduction="none", **operands, **options, **shard
            )
            part = slice(*columns)
            assert_near(grad, expected.grad[:, part], 2 * expected.grad_terms[:, part], name=f"gradient of {columns}")


def test_ignored_rows_that_are_read_have_their_temperature(device: torch.device) -> None:
    """So does the gradient through their lse; selected_log_probs consists of such rows."""
    logits, target = problem(device)
    temperature, ignored = temperatures((ROWS,), device), torch.full_like(target, -100)
    expected = (logits.cpu().double() / temperature.cpu().double()[:, None]).logsumexp(1)
    lse, lse_low, *_ = ops.row_stats(logits, ignored, None, temperature, read_ignored=True)
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    grad = ops.row_grad(
        logits, ignored, None, lse, lse_low, None, None, None, torch.ones_like(lse), temperature, reduction="none"
    )
    wanted = (logits.cpu().double() / temperature.cpu().double()[:, None]).softmax(1) / temperature.cpu()[:, None]
    torch.testing.assert_close(grad.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
