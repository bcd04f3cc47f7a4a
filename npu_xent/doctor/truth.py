"""The expected results in float64, computed from their formulas, and the error that an operator may have.

npu_xent computes in float32 (float64 for float64) and rounds each result once, or twice for a gradient that is scaled
afterwards. So the allowed error of an element is one unit in the last place of its own dtype, plus some units of
float32 of the terms that add up to it: exp(x - lse) inherits the rounding errors of x and of lse, and subtracting the
target or the smoothing from a probability does not reduce its error.

  CPU   4 units, which all tests must meet. The largest error seen is 1.5 units; torch's own float32 reaches 6.
  npu   32 units. With exact functions the kernels stay below 2, but the accuracy of the device's Exp and Ln has not
        been measured. 32 units allow them a relative error of about 1e-5.

A wrong kernel exceeds this by far: it loses a class, a chunk, a weight or a row, and `make_problem` makes each of them
contribute more than 1e-2 to some result. Errors are compared per element, because all other gradients are small next to
the target's. For bfloat16 and float16 the bound is tighter than torch's own error, since torch rounds log_prob to 16
bits and loses up to some percent; the report shows torch's error next to ours.

The tests use their own reference, tests/reference.py, which is not installed. It also covers NaN, infinities and the
primitives' arguments, and counts the roundings of each result. Both are compared with torch in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import IGNORE, Problem
from .report import Failure

INF = float("inf")


def slack_of(device: torch.device) -> float:
    """Return the allowed error of the terms of a result, in units in the last place of the statistics' dtype."""
    return 32.0 if device.type == "npu" else 4.0


class Expected(NamedTuple):
    """A result in float64, and the size of the terms that add up to it."""

    value: Tensor
    terms: Tensor


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread for the small operations here: several would mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def truth(problem: Problem) -> dict[str, Expected]:
    """Return the expected loss, z_loss, lse, log_prob and gradient by name. Shares no code with the operators."""
    if problem.case.log_probs:
        return _log_probs(problem)
    options = problem.case.options
    reduction, e, scale = options.get("reduction", "mean"), options.get("label_smoothing", 0.0), z_scale(problem)
    rows, classes = problem.logits.shape
    kept = (problem.target != IGNORE)[:, None]
    target = torch.where(kept, problem.target[:, None], 0)
    weight = torch.ones(classes, dtype=torch.float64) if problem.weight is None else problem.weight.double()

    leaf = problem.logits.double().requires_grad_()
    x = problem.case.transform(leaf)
    (slope,) = torch.autograd.grad(x.sum(), leaf)  # derivative of the transform, per element
    x = x.detach()
    top = x.amax(dim=1, keepdim=True)
    lse = top + (x - top).exp().sum(dim=1, keepdim=True).log()
    log_prob = x - lse
    p, one_hot = log_prob.exp(), torch.zeros_like(x).scatter_(1, target, 1.0)

    own = (1 - e) * weight[target]  # [N, 1], like all values per row below
    by_weight = by_rows = 1.0
    if reduction == "mean":
        by_weight, by_rows = float((weight[target] * kept).sum()), float(kept.sum())
    smoothed = e / classes * (weight * log_prob).sum(dim=1, keepdim=True)
    rows_loss = -(own * log_prob.gather(1, target) + smoothed) / by_weight
    rows_z_loss = scale * lse.square() / by_rows
    upstream = problem.upstream.double().expand(rows)[:, None]
    of_loss = own * (p - one_hot) + e / classes * (weight.sum() * p - weight)
    gradient = slope * upstream * (of_loss / by_weight + 2 * scale * lse * p / by_rows)

    # Sizes of the terms: the sums above with absolute values, plus the rounding errors of x and lse.
    size, lse_size = x.abs(), lse.abs()
    p = (1 + size + lse_size) * p + one_hot
    of_loss = own * p + e / classes * (weight.sum() * p + weight)
    gradient_terms = slope.abs() * upstream.abs() * (of_loss / by_weight + 2 * scale * lse_size * p / by_rows)
    smoothed_terms = e / classes * ((size + lse_size) @ weight)[:, None]
    loss_terms = (own * (lse_size + size.gather(1, target)) + smoothed_terms) / by_weight + rows_z_loss

    def reduced(values: Tensor) -> Tensor:
        values = torch.where(kept, values, 0.0)[:, 0]
        return values if reduction == "none" else values.sum()

    loss, z_loss, loss_terms = reduced(rows_loss + rows_z_loss), reduced(rows_z_loss), reduced(loss_terms)
    return {
        "loss": Expected(loss, loss_terms),
        "z_loss": Expected(z_loss, loss_terms),
        "lse": Expected(lse[:, 0], 1 + lse_size[:, 0]),
        "log_prob": Expected(log_prob, 1 + size + lse_size),
        "gradient": Expected(torch.where(kept, gradient, 0.0), torch.where(kept, gradient_terms, 0.0)),
    }


def _log_probs(problem: Problem) -> dict[str, Expected]:
    """Return the expected log-probabilities, entropy, top1, and gradient of both."""
    kept = (problem.target != IGNORE)[:, None]
    target = torch.where(kept, problem.target[:, None], 0)
    leaf = problem.logits.double().requires_grad_()
    x = problem.case.transform(leaf)
    (slope,) = torch.autograd.grad(x.sum(), leaf)
    x = x.detach()
    lse = x.logsumexp(dim=1, keepdim=True)
    log_prob = x - lse
    p, one_hot = log_prob.exp(), torch.zeros_like(x).scatter_(1, target, 1.0)
    entropy = -(p * log_prob).sum(dim=1, keepdim=True)
    upstream = problem.upstream.double()[:, None]
    gradient = slope * upstream * (one_hot - p - p * (log_prob + entropy))

    # exp(x - lse) has the rounding errors of x and of lse.
    sizes = 1 + x.abs() + lse.abs()
    entropy_terms = (sizes * p * (1 + log_prob.abs())).sum(dim=1, keepdim=True)
    terms = sizes * p * (2 + log_prob.abs() + entropy) + one_hot + p * entropy_terms
    first = problem.logits.double().argmax(dim=1, keepdim=True) == target
    zeros = torch.zeros_like(lse)
    expected = {
        "log_probs": Expected(log_prob.gather(1, target), sizes.gather(1, target)),
        "entropy": Expected(entropy, entropy_terms),
        "top1": Expected(first.double(), zeros),
    }
    by_row = {
        name: Expected(torch.where(kept, value, 0.0)[:, 0], torch.where(kept, size, 0.0)[:, 0])
        for name, (value, size) in expected.items()
    }
    gradient_terms = slope.abs() * upstream.abs() * terms
    return by_row | {
        "gradient": Expected(torch.where(kept, gradient, 0.0), torch.where(kept, gradient_terms, 0.0)),
    }


def composed(problem: Problem) -> dict[str, Tensor]:
    """Compute the same with torch's operations in the dtype of the logits, on the CPU, to get torch's own errors."""
    if problem.case.log_probs:
        return _composed_log_probs(problem)
    options, dtype = problem.case.options, problem.logits.dtype
    reduction = options.get("reduction", "mean")
    leaf = problem.logits.detach().requires_grad_()
    kept = problem.target != IGNORE
    logits = problem.case.transform(leaf)
    lse = logits.logsumexp(dim=1)
    loss = F.cross_entropy(
        logits,
        problem.target,
        None if problem.weight is None else problem.weight.to(dtype),
        ignore_index=IGNORE,
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction=reduction,
    )
    z_loss = torch.where(kept, z_scale(problem) * lse.square(), 0.0)
    if reduction != "none":
        z_loss = z_loss.sum() / (kept.sum() if reduction == "mean" else 1)
    loss = loss + z_loss
    (gradient,) = torch.autograd.grad(loss, leaf, problem.upstream)
    found = {"loss": loss, "z_loss": z_loss, "lse": lse, "log_prob": logits.log_softmax(dim=1), "gradient": gradient}
    return {name: tensor.detach() for name, tensor in found.items()}


def _composed_log_probs(problem: Problem) -> dict[str, Tensor]:
    leaf = problem.logits.detach().requires_grad_()
    kept = problem.target != IGNORE
    log_prob = problem.case.transform(leaf).log_softmax(dim=1)
    target = torch.where(kept, problem.target, 0)[:, None]
    log_probs = torch.where(kept, log_prob.gather(1, target)[:, 0], 0.0)
    entropy = torch.where(kept, -(log_prob.exp() * log_prob).sum(dim=1), 0.0)
    (gradient,) = torch.autograd.grad([log_probs, entropy], leaf, [problem.upstream, problem.upstream])
    top1 = torch.where(kept, (problem.logits.argmax(dim=1) == target[:, 0]).to(log_probs.dtype), 0.0)
    found = {"log_probs": log_probs, "entropy": entropy, "top1": top1, "gradient": gradient}
    return {name: tensor.detach() for name, tensor in found.items()}


def z_scale(problem: Problem) -> float:
    """Return the scale of the z-loss, under either option name."""
    options = problem.case.options
    return float(options.get("lse_square_scale", options.get("lse_square_scale_for_zloss", 0.0)))


def allowed_error(expected: Expected, dtype: torch.dtype, slack: float) -> Tensor:
    """Return the allowed error of a result in `dtype`, per element. The module's docstring explains it."""
    result, stats = torch.finfo(dtype), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    rounded = result.eps * (expected.value.abs() + result.tiny)
    return rounded + slack * stats.eps * expected.terms + stats.tiny


def compare(name: str, seen: Tensor, expected: Expected, slack: float) -> tuple[float, Failure | None]:
    """Return the largest error as a fraction of the allowed error, and the first wrong element, if there is one."""
    if seen.shape != expected.value.shape:
        words = f"{name}: shape {list(seen.shape)}, expected {list(expected.value.shape)}"
        return INF, Failure(words, name)
    allowed = allowed_error(expected, seen.dtype, slack)
    values = seen.double()
    same = (values == expected.value) | (values.isnan() & expected.value.isnan())
    ratio = torch.where(same, 0.0, (values - expected.value).abs() / allowed)
    ratio = ratio.nan_to_num(nan=INF, posinf=INF)
    worst = float(ratio.max())
    wrong = ratio > 1
    if not bool(wrong.any()):
        return worst, None
    first = [int(i) for i in wrong.nonzero()[0]]
    at = tuple(first)
    numbers = float(values[at]), float(expected.value[at]), float(allowed[at])
    place = f"{name}{first if first else ''}"
    rows = f" in {int(wrong.any(dim=1).sum())} of {len(wrong)} rows" if wrong.dim() == 2 else ""
    words = (
        f"{place}: seen {numbers[0]:.9g}, expected {numbers[1]:.9g}, allowed error {numbers[2]:.2g}; "
        f"{int(wrong.sum())} of {wrong.numel()} elements are wrong{rows}, the worst {worst:.3g} times the allowed error"
    )
    return worst, Failure(words, name, first, *numbers)


def compare_all(
    seen: Mapping[str, Tensor], expected: Mapping[str, Expected], slack: float
) -> tuple[dict[str, float], list[Failure]]:
    """Run `compare` for each output; return the fractions by name, and the failures."""
    found = {name: compare(name, tensor, expected[name], slack) for name, tensor in seen.items()}
    return {name: part for name, (part, _) in found.items()}, [wrong for _, wrong in found.values() if wrong]
