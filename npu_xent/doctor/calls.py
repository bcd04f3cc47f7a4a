"""Calls the operators as a case says, on a device, and brings back what comes out in the shape of plain rows."""

from __future__ import annotations

import torch
from torch import Tensor

import npu_xent

from .cases import Case, Problem


def observe(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    """The outputs by name, on the CPU: loss, and what the case asks for of z_loss, lse, log_prob and gradient."""
    case = problem.case
    weight = None if problem.weight is None else problem.weight.to(device)
    logits = _laid_out(case, problem.logits.to(device))
    leaf = logits.detach().requires_grad_(case.grad)
    target = problem.target.to(device)
    if case.layout == "classes second":
        target = target.view(leaf.shape[0], leaf.shape[2])
    found = _contract(case, leaf, target, weight) if case.contract else _ours(case, leaf, target, weight)
    loss = found["loss"]
    if case.grad:
        loss.backward(problem.upstream.to(device).view(loss.shape))
        found["gradient"] = _as_rows(case, leaf.grad)
    shape = problem.upstream.shape
    found = {name: value.detach().cpu() for name, value in found.items()}
    return {name: value.view(shape) if name in ("loss", "z_loss") else value for name, value in found.items()}


def _ours(case: Case, leaf: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    # consume_logits takes the output of an operation.
    logits = leaf.clone() if case.options.get("consume_logits") else leaf
    result = npu_xent.cross_entropy(logits, target, weight, **case.options)
    if isinstance(result, Tensor):
        return {"loss": result}
    found = {"loss": result.loss, "lse": result.lse, "z_loss": result.z_loss}
    return {name: value for name, value in found.items() if value is not None}


def _contract(case: Case, leaf: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    loss, log_prob, z_loss, _ = npu_xent.npu_cross_entropy_loss(leaf, target, weight, **case.options)
    found = {"loss": loss, "log_prob": log_prob}
    return found | ({"z_loss": z_loss} if case.options.get("return_zloss") else {})


def _laid_out(case: Case, rows: Tensor) -> Tensor:
    if case.layout == "classes second":
        return rows.view(3, -1, rows.shape[1]).movedim(-1, 1).contiguous()
    if case.layout == "strided":
        wider = torch.full((rows.shape[0], rows.shape[1] + 3), float("nan"), dtype=rows.dtype, device=rows.device)
        wider[:, : rows.shape[1]] = rows
        return wider[:, : rows.shape[1]]
    return rows


def _as_rows(case: Case, gradient: Tensor) -> Tensor:
    return gradient.movedim(1, -1).flatten(0, 1) if case.layout == "classes second" else gradient
