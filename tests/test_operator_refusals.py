"""What the operators under torch.ops.npu_xent refuse: in the same words by the kernels, the composite and Meta."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from operator_cases import call, ops, problem, to_meta
from reference import assert_same_bits
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

Composite = type[TorchDispatchMode]


class Refusal(NamedTuple):
    """A call with one argument that is wrong."""

    name: str
    changed: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception]
    words: str


REFUSALS = {
    # every sweep
    "logits of four dimensions": Refusal(
        "row_stats",
        lambda p: {"logits": p["logits"][None, None]},
        ValueError,
        "logits must have shape [N, C], or [B, R, C] on the CPU, but have 4 dimensions",
    ),
    "logits of integers": Refusal(
        "row_stats",
        lambda p: {"logits": p["logits"].int()},
        TypeError,
        "logits must be float32, bfloat16, float16 or float64",
    ),
    "no classes": Refusal(
        "row_stats",
        lambda p: {"logits": p["logits"][:, :0]},
        ValueError,
        "logits must have at least one class, but have shape [3, 0]",
    ),
    "class_start below 0": Refusal(
        "row_stats", lambda p: {"class_start": -1}, ValueError, "class_start must not be negative, but is -1"
    ),
    "a shard beyond the classes": Refusal(
        "row_stats",
        lambda p: {"class_start": 3, "num_classes": 7},
        ValueError,
        "the 5 classes of the shard, from class_start 3 on, must lie within num_classes, which is 7",
    ),
    "target of two dimensions": Refusal(
        "row_stats",
        lambda p: {"target": p["target"][:, None]},
        ValueError,
        "target must have shape [N], but has 2 dimensions",
    ),
    "target in int32": Refusal(
        "row_stats",
        lambda p: {"target": p["target"].int()},
        TypeError,
        "target must be int64, but is torch.int32; convert it",
    ),
    "target of another length": Refusal(
        "row_stats",
        lambda p: {"target": p["target"][:2]},
        ValueError,
        "target must have one value for each of the 3 rows",
    ),
    "target elsewhere": Refusal(
        "row_stats", lambda p: {"target": p["target"].to("meta")}, ValueError, "target must be on the logits' device"
    ),
    "weight of two dimensions": Refusal(
        "row_stats",
        lambda p: {"weight": p["weight"][None]},
        ValueError,
        "weight must have shape [C], but has 2 dimensions",
    ),
    "weight of another length": Refusal(
        "row_stats",
        lambda p: {"weight": p["weight"][:4]},
        ValueError,
        "weight must have one value for each of the 5 classes, but has 4",
    ),
    "weight elsewhere": Refusal(
        "row_stats", lambda p: {"weight": p["weight"].to("meta")}, ValueError, "weight must be on the logits' device"
    ),
    "weight in float16": Refusal(
        "row_stats",
        lambda p: {"weight": p["weight"].half()},
        TypeError,
        "weight must be float32 or of the logits' dtype torch.float32, but is torch.float16",
    ),
    # class probabilities
    "probabilities of three dimensions": Refusal(
        "prob_row_stats",
        lambda p: {"probabilities": p["probabilities"][None]},
        ValueError,
        "probabilities must have the shape and the device of the logits, which have 2 dimensions",
    ),
    "probabilities elsewhere": Refusal(
        "prob_row_stats",
        lambda p: {"probabilities": p["probabilities"].to("meta")},
        ValueError,
        "probabilities must have the shape and the device of the logits",
    ),
    "probabilities in another dtype": Refusal(
        "prob_row_stats",
        lambda p: {"probabilities": p["probabilities"].half()},
        TypeError,
        "probabilities must have the dtype of the logits, torch.float32, but are torch.float16",
    ),
    "probabilities of another shape": Refusal(
        "prob_row_stats",
        lambda p: {"probabilities": p["probabilities"][:, 1:]},
        ValueError,
        "probabilities must have the shape of the logits, [3, 5], but have [3, 4]",
    ),
    "part_sum of another length": Refusal(
        "prob_row_grad", lambda p: {"part_sum": p["part_sum"][:2]}, ValueError, "part_sum must have 3 values, but has 2"
    ),
    "grad_loss of one value": Refusal(
        "prob_row_grad", lambda p: {"grad_loss": p["lse"][0]}, ValueError, "grad_loss must have shape [N] and be on"
    ),
    # gradients
    "label_smoothing above 1": Refusal(
        "row_grad", lambda p: {"label_smoothing": 1.5}, ValueError, "label_smoothing must lie in [0, 1], but is 1.5"
    ),
    "lse_square_scale below 0": Refusal(
        "row_grad", lambda p: {"lse_square_scale": -1.0}, ValueError, "lse_square_scale must be finite and not negative"
    ),
    "softcap of 0": Refusal("row_grad", lambda p: {"softcap": 0.0}, ValueError, "softcap must lie in [1e-6, 1e6]"),
    "an unknown reduction": Refusal(
        "row_grad",
        lambda p: {"reduction": "avg"},
        ValueError,
        'reduction must be "mean", "sum" or "none", but is "avg"',
    ),
    "lse of two dimensions": Refusal(
        "row_grad", lambda p: {"lse": p["lse"][None]}, ValueError, "lse must have shape [N] and be on"
    ),
    "lse in another dtype": Refusal(
        "row_grad", lambda p: {"lse": p["lse"].half()}, TypeError, "lse must be torch.float32, but is torch.float16"
    ),
    "lse of another length": Refusal(
        "row_grad", lambda p: {"lse": p["lse"][:2]}, ValueError, "lse must have 3 values, but has 2"
    ),
    "totals of two dimensions": Refusal(
        "row_grad", lambda p: {"totals": p["totals"][None]}, ValueError, "totals must have shape [3] and be on"
    ),
    "totals of integers": Refusal(
        "row_grad",
        lambda p: {"totals": p["totals"].int()},
        TypeError,
        "totals must be float32 or float64, but is torch.int32",
    ),
    "two totals": Refusal(
        "row_grad", lambda p: {"totals": p["totals"][:2]}, ValueError, "totals must have 3 values, but has 2"
    ),
    "grad_loss elsewhere": Refusal(
        "row_grad", lambda p: {"grad_loss": torch.ones((), device="meta")}, ValueError, "grad_loss must be on"
    ),
    "grad_loss of integers": Refusal(
        "row_grad",
        lambda p: {"grad_loss": torch.ones((), dtype=torch.int64, device=p["lse"].device)},
        TypeError,
        "grad_loss must be a floating-point tensor, but is torch.int64",
    ),
    "one grad_loss a row for a mean": Refusal(
        "row_grad",
        lambda p: {"grad_loss": p["lse"]},
        ValueError,
        "grad_loss must have one value for each loss, but has 3",
    ),
    "one grad_z_loss for all rows": Refusal(
        "row_grad",
        lambda p: {"grad_loss": None, "grad_z_loss": p["lse"][0], "reduction": "none"},
        ValueError,
        "grad_z_loss must have one value for each loss, but has 1",
    ),
    "gaps in what is overwritten": Refusal(
        "row_grad_",
        lambda p: {"logits": p["logits"].repeat(1, 2)[:, :5]},
        ValueError,
        "so they must be contiguous, but have shape [3, 5] and strides [10, 1]; leave it off, or pass",
    ),
    "one sweep for none": Refusal(
        "row_stats_grad",
        lambda p: {"reduction": "none"},
        ValueError,
        'row_stats_grad needs the upstream gradient beforehand, so reduction must be "mean" or "sum"',
    ),
    "gaps in what one sweep overwrites": Refusal(
        "row_stats_grad_",
        lambda p: {"logits": p["logits"].t().contiguous().t()},
        ValueError,
        "consume_logits overwrites logits with their gradient, so they must be contiguous",
    ),
    # temperatures and entropy
    "temperature of 0": Refusal(
        "row_stats", lambda p: {"temperature": 0.0}, ValueError, "temperature must lie in [1e-6, 1e6], but is 0"
    ),
    "temperatures of two dimensions": Refusal(
        "row_stats",
        lambda p: {"row_temperature": p["lse"][None]},
        ValueError,
        "temperature must be a number, or have the shape of target and be on",
    ),
    "temperatures elsewhere": Refusal(
        "row_grad",
        lambda p: {"row_temperature": torch.ones(3, device="meta")},
        ValueError,
        "temperature must be a number, or have the shape of target and be on",
    ),
    "temperatures in float16": Refusal(
        "row_grad",
        lambda p: {"row_temperature": p["lse"].half()},
        TypeError,
        "temperature must be a number or float32, but is torch.float16",
    ),
    "two temperatures": Refusal(
        "row_stats",
        lambda p: {"row_temperature": p["lse"][:2]},
        ValueError,
        "temperature must have one value for each of the 3 rows, but has 2",
    ),
    "entropy in float16": Refusal(
        "row_grad",
        lambda p: {"entropy": p["lse"].half(), "grad_entropy": p["lse"]},
        TypeError,
        "entropy must be torch.float32, but is torch.float16",
    ),
    "entropy of another length": Refusal(
        "row_grad",
        lambda p: {"entropy": p["lse"][:2], "grad_entropy": p["lse"]},
        ValueError,
        "entropy must have 3 values, but has 2",
    ),
    "a gradient of entropy without it": Refusal(
        "row_grad",
        lambda p: {"entropy": None, "grad_entropy": p["lse"]},
        ValueError,
        "grad_entropy needs entropy; pass that of row_stats with need_entropy",
    ),
    "one grad_entropy for all rows": Refusal(
        "row_grad",
        lambda p: {"grad_entropy": p["lse"][0]},
        ValueError,
        "grad_entropy must have one value for each loss, but has 1",
    ),
    "a mean without totals": Refusal(
        "row_grad",
        lambda p: {"totals": None},
        ValueError,
        'totals may be left out only for reduction "none" without label_smoothing',
    ),
    # N-sized
    "num_classes of 0": Refusal(
        "reduce_rows",
        lambda p: {"num_classes": 0, "weight": None},
        ValueError,
        "num_classes must be positive, but is 0",
    ),
    "weight of integers": Refusal(
        "reduce_rows", lambda p: {"weight": p["weight"].int()}, TypeError, "weight must be a floating-point tensor"
    ),
    "lse without picked": Refusal(
        "reduce_rows", lambda p: {"picked": None}, ValueError, "reduce_rows with lse also needs picked, totals"
    ),
    "smoothing without wsum": Refusal(
        "reduce_rows",
        lambda p: {"wsum": None, "label_smoothing": 0.1},
        ValueError,
        "reduce_rows with lse also needs picked, totals for a mean, and wsum when label_smoothing is not 0",
    ),
    "lse in float16": Refusal(
        "reduce_rows",
        lambda p: {"lse": p["lse"].half()},
        TypeError,
        "lse must be float32 or float64, but is torch.float16",
    ),
    "picked in another dtype": Refusal(
        "reduce_rows",
        lambda p: {"picked": p["picked"].half()},
        TypeError,
        "picked must be torch.float32, but is torch.float16",
    ),
    "wsum of another length": Refusal(
        "reduce_rows",
        lambda p: {"wsum": p["wsum"][:2], "label_smoothing": 0.1},
        ValueError,
        "wsum must have 3 values, but has 2",
    ),
    "scaling integers": Refusal(
        "scale_", lambda p: {"self": p["logits"].int()}, TypeError, "scale_ takes float32, bfloat16, float16 or float64"
    ),
    "scaling with gaps": Refusal(
        "scale_",
        lambda p: {"self": p["logits"][:, :4]},
        ValueError,
        "needs memory without gaps, but self has shape [3, 4]",
    ),
    "two factors": Refusal(
        "scale_",
        lambda p: {"factor": torch.ones(2, device=p["lse"].device)},
        ValueError,
        "factor must have one value, but has 2",
    ),
    # the loss
    "a loss in integers": Refusal(
        "cross_entropy",
        lambda p: {"loss_dtype": torch.int32},
        TypeError,
        "loss_dtype must be float32, float64 or the dtype of the input, torch.float32, but is torch.int32",
    ),
}


@pytest.mark.parametrize("implementation", ["kernels", "composite", "meta"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_read_the_same_everywhere(
    name: str, implementation: str, device: torch.device, composite: Composite
) -> None:
    refusal = REFUSALS[name]
    if implementation == "meta" and "elsewhere" in name:
        return
    made = problem(device, weighted=True)
    values = call(refusal.name, made) | refusal.changed(made)
    if implementation == "meta":
        values = {key: to_meta(value) for key, value in values.items()}
    mode = composite() if implementation == "composite" else nullcontext()
    with torch.no_grad(), mode, pytest.raises(refusal.error, match=re.escape(refusal.words)):
        getattr(ops, refusal.name).default(**values)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_stats_grad", "reduce_rows"])
def test_kernels_check_the_targets_range(name: str, device: torch.device) -> None:
    """Every kernel that would index with it, so that none reads out of bounds whoever calls it."""
    for bad in (5, -1):
        arguments = call(name, problem(device) | {"target": torch.tensor([0, 1, bad], device=device)})
        with pytest.raises(IndexError, match=rf"target\[2\] is {bad}, which is neither a class in \[0, 5\)"):
            getattr(ops, name)(**arguments)


@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_stats_grad", "reduce_rows"])
def test_differentiating_a_primitive_raises_in_words(name: str, device: torch.device) -> None:
    """Rather than silently being a constant."""
    arguments = call(name, problem(device))
    differentiated = "lse" if name == "reduce_rows" else "logits"
    arguments[differentiated] = arguments[differentiated].clone().requires_grad_()
    outputs = getattr(ops, name)(**arguments)
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    assert output.requires_grad
    with pytest.raises(RuntimeError, match=f"npu_xent::{name} is not differentiable: double backward through npu_xent"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["row_grad_", "row_stats_grad_", "scale_"])
def test_overwriting_what_is_differentiated_raises_in_words(name: str, device: torch.device) -> None:
    arguments = call(name, problem(device))
    first = next(iter(arguments))
    before = arguments[first].clone()
    arguments[first] = arguments[first].requires_grad_()
    if name != "scale_":  # which traces of backwards call; its result then refuses
        arguments[first] = arguments[first] * 1
    with pytest.raises(RuntimeError, match=f"npu_xent::{name} is not differentiable"):
        getattr(ops, name)(**arguments)
    assert_same_bits(arguments[first], before)


@pytest.mark.parametrize("name", ["row_stats", "row_grad", "row_stats_grad", "cross_entropy"])
def test_forward_mode_is_refused(name: str, device: torch.device) -> None:
    """With and without reverse mode: a dropped tangent would pass for zero."""
    arguments = call(name, problem(device))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), forward_ad.dual_level():
            dual = forward_ad.make_dual(arguments["logits"], torch.ones_like(arguments["logits"]))
            with pytest.raises((RuntimeError, NotImplementedError), match=r"forward|jvp"):
                getattr(ops, name)(**arguments | {"logits": dual})
