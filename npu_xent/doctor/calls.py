"""Calls the operators for a case on a device, and returns the outputs in the shape of [N, C] rows."""

from __future__ import annotations

import torch
from torch import Tensor

import npu_xent

from .cases import Case, Problem, temperatures


def observe(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    """Return the outputs by name, on the CPU: loss, and those of z_loss, lse, log_prob and gradient that the case has;
    or log_probs, entropy, top1 and gradient.

    Only the operators under test run on the device; everything else runs on the CPU.
    """
    case = problem.case
    weight = None if problem.weight is None else problem.weight.to(device)
    leaf = laid_out(case.layout, problem.logits, device).detach().requires_grad_(case.grad)
    target = problem.target
    if case.layout == "classes second":
        target = target.view(leaf.shape[0], leaf.shape[2])
    call = _log_probs if case.log_probs else _contract if case.contract else _ours
    found = call(case, leaf, target.to(device), weight)
    if case.grad:
        ends = [found[name] for name in ("log_probs", "entropy") if name in found] or [found["loss"]]
        torch.autograd.backward(ends, [problem.upstream.view(end.shape).to(end) for end in ends])
        assert leaf.grad is not None
        found["gradient"] = leaf.grad
    found = {name: value.detach().cpu() for name, value in found.items()}
    if case.grad and case.layout == "classes second":
        found["gradient"] = found["gradient"].movedim(1, -1).flatten(0, 1)
    if case.grad and case.layout == "layer":
        found["gradient"] = found["gradient"].T
    shape = problem.upstream.shape
    return {name: value.view(shape) if name in ("loss", "z_loss") else value for name, value in found.items()}


def laid_out(layout: str, rows: Tensor, device: torch.device) -> Tensor:
    """Copy rows [N, C] from the CPU to the device, in the layout that `Case.layout` names."""
    if layout == "classes second":
        return rows.view(3, -1, rows.shape[1]).movedim(-1, 1).contiguous().to(device)
    if layout == "strided":
        wider = torch.full((rows.shape[0], rows.shape[1] + 5), float("nan"), dtype=rows.dtype)
        wider[:, 2:-3] = rows
        return wider.to(device)[:, 2:-3]
    if layout == "layer":
        return rows.T.contiguous().to(device)
    return rows.to(device)


def _ours(case: Case, leaf: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    if case.layout == "layer":
        unit = torch.eye(len(target)).to(leaf)
        result = npu_xent.linear_cross_entropy(unit, leaf, target, weight=weight, **case.options)
    else:  # consume_logits does not accept a leaf tensor.
        logits = leaf.clone() if case.options.get("consume_logits") else leaf
        result = npu_xent.cross_entropy(logits, target, weight, **case.options)
    if isinstance(result, Tensor):
        return {"loss": result}
    found = {"loss": result.loss, "lse": result.lse, "z_loss": result.z_loss}
    return {name: value for name, value in found.items() if value is not None}


def _log_probs(case: Case, leaf: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    logits = leaf.clone() if case.options.get("consume_logits") else leaf
    temperature = temperatures(len(target)).to(leaf.device) if case.temperature_by_row else 1.0
    options = {"temperature": temperature, "return_entropy": True, "return_top1": True, **case.options}
    if case.layout == "layer":
        result = npu_xent.linear_token_log_probs(torch.eye(len(target)).to(leaf), leaf, target, **options)
    else:
        result = npu_xent.token_log_probs(logits, target, **options)
    assert not isinstance(result, Tensor)
    assert result.entropy is not None
    assert result.top1 is not None
    return {"log_probs": result.log_probs, "entropy": result.entropy, "top1": result.top1.to(result.log_probs.dtype)}


def _contract(case: Case, leaf: Tensor, target: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
    loss, log_prob, z_loss, _ = npu_xent.npu_cross_entropy_loss(leaf, target, weight, **case.options)
    found = {"loss": loss, "log_prob": log_prob}
    return found | ({"z_loss": z_loss} if case.options.get("return_zloss") else {})
