"""Cross entropy in float64, written out from its formulas, and how far from it an operator may be.

The formulas follow the definition of the loss term by term and share nothing with the code under test. Inputs are taken
as they are rounded in their dtype, so that all of a difference is the operator's own. (The doctor, which is installed
without the tests, has a shorter truth of its own, npu_xent/doctor/truth.py.) The rest of this file is what every test
needs: inputs, memory layouts, and a covering array of options.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
LAYOUTS = ("contiguous", "columns of a wider tensor", "transposed", "one row expanded")
NAN, INF = float("nan"), float("inf")


# The truth ------------------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """The results in float64, and the size of the terms that were added up to make them (for the tolerance)."""

    loss: Tensor
    z_loss: Tensor
    lse: Tensor
    log_prob: Tensor
    grad: Tensor
    loss_terms: Tensor
    grad_terms: Tensor


def truth(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_scale: float | None = None,
    grad_loss: Tensor | float = 1.0,
    grad_z_loss: Tensor | float = 0.0,
    grad_lse: Tensor | float = 0.0,
) -> Truth:
    """Loss, z-loss, log sum exp, log-softmax, and the gradient of the logits for the upstream gradients.

    Targets must be classes or ignore_index. A row whose log sum exp is not finite has no distribution: NaN.
    """
    x, slope = scaled_and_capped(logits, logit_scale, softcap)
    y = target.detach().cpu().long()
    n_classes = x.shape[1]
    w = torch.ones(n_classes, dtype=torch.float64) if weight is None else weight.detach().cpu().double()
    e, zs = label_smoothing, lse_square_scale

    # log_softmax by hand
    top = x.max(dim=1, keepdim=True).values
    shift = torch.where(top.isfinite(), top, 0)
    lse = shift[:, 0] + (x - shift).exp().sum(dim=1).log()
    undefined = ~lse.isfinite()
    log_prob = (x - lse[:, None]).masked_fill(undefined[:, None], NAN)
    p = log_prob.exp()

    kept = y != ignore_index
    y = y.masked_fill(~kept, 0)
    one_hot = torch.zeros_like(x).scatter_(1, y[:, None], 1)
    w_y = w[y]
    # -inf * 0 in the terms that an option or a weight switches off must not count.
    share = ((1 - e) * w_y).masked_fill(undefined, NAN)
    at_target = (share * -log_prob.gather(1, y[:, None])[:, 0]).masked_fill(share == 0, 0)
    weighted = (w * log_prob).masked_fill((w == 0) & ~undefined[:, None], 0)
    smoothed = -e / n_classes * weighted.sum(dim=1) if e else torch.zeros_like(lse)
    z = zs * lse.square().masked_fill(undefined, NAN) if zs else torch.zeros_like(lse)
    at_target, smoothed, z = (rows.masked_fill(~kept, 0) for rows in (at_target, smoothed, z))

    kept_weight, kept_rows = w_y.masked_fill(~kept, 0).sum(), kept.sum().double()
    by_weight = kept_weight if reduction == "mean" else torch.ones((), dtype=torch.float64)
    by_rows = kept_rows if reduction == "mean" else torch.ones((), dtype=torch.float64)

    def reduced(rows: Tensor, denominator: Tensor) -> Tensor:
        return rows if reduction == "none" else rows.sum() / denominator

    # Both parts are divided before they are added: with a kept weight of 0, 0/0 makes the loss NaN, as torch's is.
    loss = reduced(at_target, by_weight) + reduced(smoothed, by_weight)
    z_loss = reduced(z, by_rows) if zs else torch.zeros_like(loss)
    if zs:
        loss = loss + z_loss

    from_loss = torch.as_tensor(grad_loss).detach().cpu().double().reshape(-1, 1)
    from_z_loss = torch.as_tensor(grad_z_loss).detach().cpu().double().reshape(-1, 1)
    g = from_loss / by_weight
    grad = g * (1 - e) * w_y[:, None] * (p - one_hot)
    if e:
        grad = grad + g * e / n_classes * (w.sum() * p - w)
    if zs:
        grad = grad + (from_loss + from_z_loss) / by_rows * 2 * zs * lse[:, None] * p
    u = logit_scale if grad_scale is None else grad_scale
    grad = grad.masked_fill(~kept[:, None], 0)
    g_lse = torch.as_tensor(grad_lse).detach().cpu().double().expand(len(x))[:, None]
    grad = ((grad + g_lse * p) * slope * u).masked_fill(~kept[:, None] & (g_lse == 0), 0)

    # Sizes of terms. An exponential of x - lse carries the rounding of x and of lse; the target's entry may be made as
    # a difference of coefficients.
    size, lse_size = x.abs(), lse.abs()[:, None]
    loss_terms = share * (lse.abs() + size.gather(1, y[:, None])[:, 0])
    loss_terms = loss_terms.masked_fill(share == 0, 0) + zs * lse.square()
    p_terms = ((1 + size + lse_size) * p).nan_to_num(0, 0, 0)
    grad_terms = (1 - e) * w_y[:, None] * (p_terms + one_hot)
    if e:
        # The sum of w (x - lse) is made of w (x - top) and w (top - lse).
        sizes = (w * (size + lse_size + shift.abs())).masked_fill(w == 0, 0)
        loss_terms = loss_terms + e / n_classes * sizes.sum(dim=1)
        grad_terms = grad_terms + e / n_classes * (w.sum() * (p_terms + one_hot) + w)
    grad_terms = g.abs() * grad_terms
    if zs:
        grad_terms = grad_terms + (from_loss.abs() + from_z_loss.abs()) / by_rows * 2 * zs * lse_size * (
            p_terms + one_hot
        )
    loss_terms = reduced(loss_terms.nan_to_num(0, 0, 0).masked_fill(~kept, 0), by_weight)
    grad_terms = grad_terms.nan_to_num(0, 0, 0).masked_fill(~kept[:, None], 0)
    grad_terms = abs(u) * (grad_terms + g_lse.abs() * (p_terms + one_hot * kept[:, None]))
    return Truth(loss, z_loss, lse, log_prob, grad, loss_terms, grad_terms)


def scaled_and_capped(logits: Tensor, logit_scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """softcap * tanh(logit_scale * logits / softcap) in float64, and its derivative but for the factor logit_scale."""
    x = logits.detach().cpu().double() * logit_scale
    if softcap is None:
        return x, torch.ones_like(x)
    return softcap * (x / softcap).tanh(), (x / softcap).cosh().square().reciprocal()


# The tolerance --------------------------------------------------------------------------------------------------------


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are kept in: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(expected: Tensor, terms: Tensor | float, dtype: torch.dtype, roundings: int = 1) -> Tensor:
    """How far a result in `dtype` may be from `expected`, from roundings alone.

    `roundings` of the result to its dtype (half a unit in the last place each, or half a subnormal), and for the
    statistics four units in the last place of *their* dtype, on terms of the given size: for the exponential, the
    logarithm, the stored log sum exp, and sums in which no partial sum is long. (Seen on the CPU: up to 1.5.)
    """
    result, stats = torch.finfo(dtype), torch.finfo(stats_dtype(dtype))
    rounded = roundings * (expected.abs() * result.eps + result.tiny * result.eps) / 2
    return rounded + 4 * stats.eps * terms + stats.tiny


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; both must be finite."""
    return float((actual.detach().cpu().double() - expected).abs().max())


def assert_near(
    actual: Tensor, expected: Tensor, terms: Tensor | float, *, roundings: int = 1, name: str = "result"
) -> None:
    """Equal in shape and in where NaN and infinities are; elsewhere within `tolerance` for the dtype of actual."""
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    values = actual.detach().cpu().double()
    special = ~expected.isfinite()
    same = torch.where(special, (values == expected) | (values.isnan() & expected.isnan()), values.isfinite())
    assert bool(same.all()), f"{name}: {values[~same][:5].tolist()}, expected {expected[~same][:5].tolist()}"
    allowed = torch.as_tensor(tolerance(expected, terms, actual.dtype, roundings)).expand(expected.shape)
    excess = ((values - expected).abs() / allowed).masked_fill(special, 0)
    if excess.numel() and float(excess.max()) > 1:
        worst = int(excess.argmax())
        raise AssertionError(
            f"{name}: element {worst} of {actual.dtype} is {float(values.flatten()[worst])!r}, expected "
            f"{float(expected.flatten()[worst])!r}: {float(excess.max()):.2f} times the tolerance"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """The same dtype, shape and bytes (so that NaN equals NaN, and -0 is not 0)."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected)]
    assert torch.equal(*bits), f"{name} differs in {int((bits[0] != bits[1]).sum())} of {bits[0].numel()} bytes"


# Inputs ---------------------------------------------------------------------------------------------------------------


def make_logits(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    layout: str = "contiguous",
    spread: float = 3.0,
) -> Tensor:
    """Normally distributed logits; the same for each call with the same arguments."""
    generator = torch.Generator().manual_seed(1000 * rows + classes)
    x = (torch.randn(rows, classes, generator=generator) * spread).to(device, dtype)
    if layout == "columns of a wider tensor":
        wider = torch.full((rows, classes + 3), NAN, dtype=dtype, device=device)
        wider[:, :classes] = x
        return wider[:, :classes]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "one row expanded" and rows:
        return x[:1].expand(rows, classes)
    return x


def make_target(rows: int, classes: int, device: torch.device, *, ignore_index: int | None = None) -> Tensor:
    """Classes, the last one among them; with `ignore_index`, every third row from the second has it for a target."""
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows + classes))
    target[:1] = classes - 1
    if ignore_index is not None:
        target[1::3] = ignore_index
    return target.to(device)


def make_weight(classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Class weights in (0, 1]."""
    weight = 1 - 0.9 * torch.rand(classes, generator=torch.Generator().manual_seed(classes))
    return weight.to(device, dtype)


def loss_and_grad(
    function: Callable[..., Tensor], logits: Tensor, *args: Any, upstream: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """function(leaf, *args, **keywords) and the gradient that its backward(upstream) leaves in the leaf.

    The leaf shares the memory and the strides of `logits`. Without `upstream` it is all ones.
    """
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *args, **keywords)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def as_tuple(outputs: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What cross_entropy returned, as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def consuming(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with consume_logits=True, which takes the output of an operation: a copy of what it is called with."""

    def call(logits: Tensor, *args: Any, **keywords: Any) -> Any:
        copy = logits.clone(memory_format=torch.contiguous_format)
        return function(copy, *args, consume_logits=True, **keywords)

    return call


# The operators by the names in their schemas --------------------------------------------------------------------------


def named(name: str, *arguments: Any, **options: Any) -> dict[str, Tensor]:
    """The outputs of torch.ops.npu_xent.<name>, by name."""
    operator = getattr(torch.ops.npu_xent, name).default
    outputs = operator(*arguments, **options)
    return dict(zip([output.name for output in operator._schema.returns], outputs, strict=True))


def known(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of `values` those that torch.ops.npu_xent.<name> has an argument for, in its order."""
    arguments = [argument.name for argument in getattr(torch.ops.npu_xent, name).default._schema.arguments]
    return {argument: values[argument] for argument in arguments if argument in values}


# Covering arrays ------------------------------------------------------------------------------------------------------


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A short list of cases in which every two values of any two factors meet at least once. Deterministic.

    Greedy: a case starts with the first pair that has not met yet, then each other factor takes the value that makes
    the most new pairs with what is chosen.
    """
    sizes = [len(values) for values in factors.values()]
    # A value is (factor, index).
    pairs = itertools.combinations([(f, i) for f, size in enumerate(sizes) for i in range(size)], 2)
    unmet = {(a, b) for a, b in pairs if a[0] != b[0]}

    def new_pairs(value: tuple[int, int], chosen: Mapping[int, int]) -> int:
        return sum((min(value, other), max(value, other)) in unmet for other in chosen.items())

    cases = []
    while unmet:
        chosen = dict(min(unmet))
        for factor, size in enumerate(sizes):
            if factor not in chosen:
                # Among equals the one that comes round next, so that all are used about equally often.
                turn = [(len(cases) + i) % size for i in range(size)]
                chosen[factor] = max(turn, key=lambda i, f=factor, c=chosen: new_pairs((f, i), c))
        unmet -= set(itertools.combinations(sorted(chosen.items()), 2))
        cases.append({name: values[chosen[f]] for f, (name, values) in enumerate(factors.items())})
    return cases


def case_id(case: Mapping[str, Any]) -> str:
    """A case as a test id: the values alone, joined."""
    return "-".join(str(value).removeprefix("torch.").replace(" ", "_") for value in case.values())


# The two ways to a gradient -------------------------------------------------------------------------------------------

# One sweep and two: "mean" and "sum" take the first, "none" and fp16 the second.
PATHS = [
    *((torch.float32, reduction) for reduction in REDUCTIONS),
    (torch.bfloat16, "mean"),
    (torch.float16, "mean"),
    (torch.float64, "mean"),
]
paths = pytest.mark.parametrize("dtype, reduction", PATHS, ids=lambda value: str(value).removeprefix("torch."))
