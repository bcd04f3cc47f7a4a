"""What torch demands of the operators under torch.ops.npu_xent: their schemas, tensors without values, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import CASES, OPERATORS, call, ops, prepared, problem, run, to_meta
from reference import (
    REDUCTIONS,
    assert_near,
    case_id,
    make_logits,
    make_target,
    make_weight,
    truth,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import npu_xent

# What torch demands of an operator ------------------------------------------------------------------------------------

SAMPLES = [
    ("plain", {}, {}),
    (
        "all options",
        {"weighted": True, "ignore_index": 1},
        {"ignore_index": 1, "label_smoothing": 0.1, "lse_square_scale": 0.1},
    ),
    (
        "none, scaled and capped",
        {"dtype": torch.bfloat16},
        {"reduction": "none", "logit_scale": 0.7, "softcap": 4.0, "grad_scale": 2.0},
    ),
]
CONSUMING = ("cross_entropy_", "token_log_probs_")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample[0])
# cross_entropy_ and token_log_probs_ take the output of an operation: see below.
@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in CONSUMING])
def test_opcheck(name: str, sample: tuple[str, dict[str, Any], dict[str, Any]], device: torch.device) -> None:
    """Schema, autograd registration, fake tensors, and compilation with dynamic shapes."""
    _, made, options = sample
    if name.startswith("row_stats_grad") and options.get("reduction") == "none":
        options = options | {"reduction": "sum"}
    if "log_probs" in name:
        options = {key: options[key] for key in ("ignore_index", "logit_scale", "softcap") if key in options}
    extras = {}
    if made:
        names = ("need_wsum", "need_log_prob", "need_lse", "need_entropy", "need_top1", "read_ignored")
        extras = dict.fromkeys(names, True) | {"temperature": 0.5}
    arguments = call(name, problem(device, **made), **options, **extras)
    if name in ("cross_entropy", "token_log_probs", "selected_log_probs", "prob_cross_entropy"):
        for differentiable in {"logits", "probabilities"} & arguments.keys():
            arguments[differentiable] = arguments[differentiable].clone().requires_grad_()
    first = next(iter(arguments))
    # torch looks at how autograd is registered on these devices only.
    registration = () if device.type in ("cpu", "cuda", "xpu") else ("test_autograd_registration",)
    checks = [check for check in OPCHECKS if check not in registration]
    torch.library.opcheck(getattr(ops, name).default, (arguments.pop(first),), arguments, test_utils=checks)


def test_opcheck_of_totals(device: torch.device) -> None:
    """reduce_rows without statistics."""
    target, weight = make_target(3, 5, device, ignore_index=-100), make_weight(5, torch.float32, device)
    for w in (None, weight):
        torch.library.opcheck(ops.reduce_rows.default, (target, w), {"num_classes": 5, "loss_dtype": torch.float32})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", [*REDUCTIONS, None])
def test_consumed_logits_compile(reduction: str | None, device: torch.device) -> None:
    """cross_entropy_, or token_log_probs_, behind the operation whose output it takes."""
    leaf, target = make_logits(3, 5, torch.float32, device), make_target(3, 5, device)

    def loss_of(x: Tensor) -> Tensor:
        if reduction is None:
            return sum(ops.token_log_probs_(x * 2, target, need_entropy=True)[:2]).sum()
        return ops.cross_entropy_(x * 2, target, reduction=reduction)[0].sum()

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss_of, compiled):
        x = leaf.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


# Tensors without values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("name", OPERATORS)
def test_meta_says_what_eager_gives(name: str, case: dict[str, Any], device: torch.device) -> None:
    """Shapes, dtypes and strides."""
    arguments = prepared(name, case, device)
    outputs = []
    for values in (arguments, {key: to_meta(value) for key, value in arguments.items()}):
        if name in CONSUMING:
            outputs.append(getattr(ops, name)(**values | {"logits": values["logits"].requires_grad_() * 1}))
        else:
            outputs.append(run(name, values))
    eager, meta = outputs
    assert len(meta) == len(eager)
    for without, with_values in zip(meta, eager, strict=True):
        assert without.device.type == "meta"
        assert (without.shape, without.dtype) == (with_values.shape, with_values.dtype)
        assert without.stride() == with_values.stride()


def with_options(x: Tensor, y: Tensor, w: Tensor, reduction: str) -> Tensor:
    """cross_entropy with most of its options."""
    options = {"ignore_index": 2, "label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 4.0}
    return npu_xent.cross_entropy(x, y, w, reduction=reduction, **options).sum()


def strict_contract(x: Tensor, y: Tensor, w: Tensor, reduction: str) -> Tensor:
    """The documented contract, whose rules are checked in Python."""
    return npu_xent.npu_cross_entropy_loss(x, y, reduction=reduction)[0].sum()


def lifted_contract(x: Tensor, y: Tensor, w: Tensor, reduction: str) -> Tensor:
    """The contract without its restrictions, all outputs used."""
    loss, log_prob, zloss, lse = npu_xent.npu_cross_entropy_loss(
        x, y, w, reduction, label_smoothing=0.1, lse_square_scale_for_zloss=0.1, return_zloss=True, strict=False
    )
    return loss.sum() + 2 * zloss.sum() + log_prob.sum() + lse.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [with_options, strict_contract, lifted_contract], ids=lambda f: f.__name__)
def test_compiles_in_one_graph_with_dynamic_shapes(
    function: Callable[..., Tensor], reduction: str, device: torch.device
) -> None:
    """One compilation serves every number of rows and classes; the gradient comes with it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for rows, classes in ((3, 5), (7, 11), (4, 300)):
        logits, target = make_logits(rows, classes, torch.float32, device), make_target(rows, classes, device)
        weight = make_weight(classes, torch.float32, device)
        results = []
        for called in (function, compiled):
            x = logits.clone().requires_grad_()
            loss = called(x, target, weight, reduction)
            (3 * loss).backward()
            results.append((loss.detach(), x.grad))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "compiled again for another shape"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_loss_can_go_backward_twice(device: torch.device) -> None:
    """The gradient that the forward made is scaled in place, which must not show in a second backward."""
    x, target = make_logits(3, 5, torch.float32, device).requires_grad_(), make_target(3, 5, device)
    loss = torch.compile(lambda x: npu_xent.cross_entropy(x, target), backend="aot_eager", fullgraph=True)(x)
    expected = truth(x, target, grad_loss=3.0)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, x, torch.tensor(3.0, device=device), retain_graph=True)
        assert_near(grad, expected.grad, expected.grad_terms, roundings=2)
