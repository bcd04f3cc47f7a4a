"""Arguments for the operators under torch.ops.npu_xent: a problem, a covering array of options, and a call of each."""

from __future__ import annotations

from typing import Any

import torch
from option_values import factors
from reference import (
    known,
    make_logits,
    make_target,
    make_weight,
    named,
    pairwise,
    stats_dtype,
)
from torch import Tensor

import npu_xent  # noqa: F401  (registers the operators)

ops = torch.ops.npu_xent


def problem(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rows: int = 3,
    classes: int = 5,
    weighted: bool = False,
    ignore_index: int | None = None,
    layout: str = "contiguous",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    temperature_by_row: bool = False,
) -> dict[str, Any]:
    """Every argument that an operator can have a tensor for, by name: logits, statistics, upstream gradients."""
    logits = make_logits(rows, classes, dtype, device, layout=layout)
    target = make_target(rows, classes, device, ignore_index=ignore_index)
    weight = make_weight(classes, torch.float32, device) if weighted else None
    ignored = -100 if ignore_index is None else ignore_index
    mapped = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    row_temperature = torch.linspace(0.5, 2.0, rows, device=device) if temperature_by_row else None
    stats = named(
        "row_stats", logits, target, weight, row_temperature, ignore_index=ignored, **mapped, need_wsum=True,
        need_entropy=True,
    )  # fmt: skip
    totals = named(
        "reduce_rows", target, weight, ignore_index=ignored, num_classes=classes, loss_dtype=stats_dtype(dtype)
    )
    tensors = {"logits": logits, "target": target, "weight": weight, "row_temperature": row_temperature}
    probabilities = make_logits(rows, classes, torch.float32, device, spread=1.0, layout=layout).softmax(1)
    part_sum = torch.linspace(0.5, 1.0, rows, device=device)
    return {
        **tensors,
        **stats,
        "totals": totals["totals"],
        "probabilities": probabilities.to(dtype),
        "part_sum": part_sum.to(stats_dtype(dtype)),
    }


def call(name: str, made: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The arguments of operator `name`: of a problem and of options what its schema has; the first one comes first."""
    logits, target = made["logits"], made["target"]
    one_a_row = options.get("reduction") == "none"
    values = made | {
        "self": logits.contiguous(),
        "factor": torch.tensor(0.5, device=logits.device),
        "index": target.clamp(min=0).unsqueeze(1),
        "grad_loss": torch.ones(target.shape if one_a_row else (), dtype=logits.dtype, device=logits.device),
    }
    if name == "prob_row_grad":
        of_rows = torch.linspace(-1.0, 2.0, target.numel(), device=logits.device).to(made["lse"].dtype)
        values |= {"grad_loss": of_rows, "grad_lse": of_rows.flip(0)}
        values |= {"output_mask": [True, options.get("need_log_prob", True)]}
    if name == "reduce_rows":
        values |= {"num_classes": logits.shape[1], "loss_dtype": logits.dtype}
    return known(name, values | options)


OPERATORS = (
    "row_stats",
    "row_grad",
    "row_grad_",
    "row_stats_grad",
    "row_stats_grad_",
    "reduce_rows",
    "scale_",
    "prob_row_stats",
    "prob_row_grad",
    "cross_entropy",
    "cross_entropy_",
    "token_log_probs",
    "token_log_probs_",
    "selected_log_probs",
    "prob_cross_entropy",
)
PRIMITIVES = OPERATORS[:9]

OPTIONS = factors(
    *("dtype", "reduction", "weighted", "ignore_index", "label_smoothing", "lse_square_scale", "softcap"),
    *("logit_scale", "grad_scale", "temperature", "temperature_by_row"),
    lse_low=(True, False),
    layout=("contiguous", "columns of a wider tensor", "transposed"),
    loss_dtype=(None, torch.float32),
    need_wsum=(True, False),
    need_log_prob=(False, True),
    need_entropy=(False, True),
    need_top1=(True, False),
    entropy_has_gradient=(False, True),
    read_ignored=(False, True),
)
CASES = pairwise(OPTIONS)


def prepared(name: str, case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of operator `name` for a case of OPTIONS, as far as the operator takes it."""
    options = dict(case)
    if "log_probs" in name:
        for refused in ("label_smoothing", "lse_square_scale", "grad_scale"):
            options.pop(refused)
    if name.startswith("row_stats_grad") and options["reduction"] == "none":
        options["reduction"] = "sum"
    if name.endswith("_"):
        options["layout"] = "contiguous"
    made = problem(
        device,
        rows=7,
        classes=21,
        **{key: options.pop(key) for key in ("dtype", "weighted", "layout")},
        ignore_index=None if name.startswith("prob_") else options["ignore_index"],
        logit_scale=options["logit_scale"],
        softcap=options["softcap"],
        temperature=options["temperature"],
        temperature_by_row=options.pop("temperature_by_row"),
    )
    if options.pop("entropy_has_gradient"):
        made["grad_entropy"] = torch.linspace(-1.0, 1.0, 7, device=device)
    if not options.pop("lse_low") and name != "prob_row_grad":
        made["lse_low"] = None
    options["ignore_index"] = -100 if options["ignore_index"] is None else options["ignore_index"]
    if options["loss_dtype"] is None:
        options.pop("loss_dtype")
    return call(name, made, **options)


def run(name: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of a primitive on copies of its tensors, and what it left in the one that it overwrites."""
    overwritten = {key: arguments[key].clone() for key in ("logits", "self") if key in arguments and name.endswith("_")}
    with torch.no_grad():
        outputs = getattr(ops, name).default(**arguments | overwritten)
    outputs = outputs if isinstance(outputs, tuple | list) else () if outputs is None else (outputs,)
    return (*outputs, *overwritten.values())


def to_meta(value: Any) -> Any:
    """A tensor without values, of the same strides; other arguments as they are."""
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
