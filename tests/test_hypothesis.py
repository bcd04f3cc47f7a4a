"""Any mix of shape, dtype, layout, options and special values: a property test against the float64 truth.

What the other files try one at a time meets here. Derandomised: the same examples on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    INF,
    LAYOUTS,
    NAN,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    consuming,
    loss_and_grad,
    make_logits,
    truth,
)
from torch import Tensor

import npu_xent


@dataclass
class Problem:
    """One call of cross_entropy, on the CPU until `on` moves it."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    lse_square_scale: float
    softcap: float | None
    upstream: Tensor

    def options(self) -> dict[str, object]:
        """The keyword arguments."""
        names = ("ignore_index", "reduction", "label_smoothing", "lse_square_scale", "softcap")
        return {name: getattr(self, name) for name in names}


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Problem:
    """Small problems, and now and then a row of several chunks; special values in some rows."""
    rows = draw(st.integers(0, 9), label="rows")
    classes = draw(st.one_of(st.integers(1, 70), st.sampled_from([4095, 4096, 4097, 9000])), label="classes")
    dtype = draw(st.sampled_from(dtypes), label="dtype")
    cpu = torch.device("cpu")
    spread = draw(st.sampled_from([0.0, 1.0, 10.0]), label="spread")
    logits = make_logits(rows, classes, dtype, cpu, spread=spread)
    if rows:
        places = st.tuples(st.integers(0, rows - 1), st.integers(0, classes - 1), st.sampled_from([NAN, INF, -INF]))
        for row, column, value in draw(st.lists(places, max_size=3), label="special values"):
            logits[row, column] = value
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes - 1, classes]), label="ignore_index")
    kept = st.integers(0, classes - 1)
    targets = st.lists(st.one_of(kept, kept, st.just(ignore_index)), min_size=rows, max_size=rows)
    target = torch.tensor(draw(targets, label="target"), dtype=torch.int64)
    weight = None
    if draw(st.booleans(), label="weighted"):
        weights = torch.linspace(0.0, 1.0, classes).roll(draw(st.integers(0, classes - 1), label="roll"))
        weight = weights.to(draw(st.sampled_from([torch.float32, dtype]), label="dtype of weight"))
    reduction = draw(st.sampled_from(REDUCTIONS), label="reduction")
    upstreams = st.sampled_from([1.0, 0.5, -3.0, 0.0])
    shape = (rows,) if reduction == "none" else ()
    return Problem(
        logits=logits,
        target=target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0]), label="label_smoothing"),
        lse_square_scale=draw(st.sampled_from([0.0, 0.01]), label="lse_square_scale"),
        softcap=draw(st.sampled_from([None, None, 3.0]), label="softcap"),
        upstream=torch.full(shape, draw(upstreams, label="upstream"), dtype=dtype),
    )


def with_layout(logits: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    if layout == "transposed":
        return logits.t().contiguous().t()
    if layout == "columns of a wider tensor":
        return torch.cat([logits, torch.full_like(logits[:, :1], NAN)], dim=1)[:, :-1]
    if layout == "one row expanded" and len(logits):
        return logits[:1].expand(logits.shape)
    return logits


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_any_mix_is_the_truth(
    data: st.DataObject, layout: str, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    problem = data.draw(problems(dtypes), label="problem")
    logits = with_layout(problem.logits.to(device), layout)
    target, upstream = problem.target.to(device), problem.upstream.to(device)
    weight = None if problem.weight is None else problem.weight.to(device)
    expected = truth(logits, target, weight, **problem.options(), grad_loss=upstream)

    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, weight, **problem.options(), upstream=upstream)

    assert_near(loss, expected.loss, expected.loss_terms, name="loss")
    assert_near(grad, expected.grad, expected.grad_terms, roundings=2, name="grad")

    if layout == "contiguous":
        consumed = loss_and_grad(
            consuming(npu_xent.cross_entropy), logits, target, weight, **problem.options(), upstream=upstream
        )
        assert_same_bits(consumed[0], loss, "consumed loss")
        assert_same_bits(consumed[1], grad, "consumed grad")

    with torch.no_grad():
        out = npu_xent.cross_entropy(logits, target, weight, **problem.options(), return_lse=True, return_z_loss=True)
    assert_near(out.loss, expected.loss, expected.loss_terms, name="inference loss")
    assert_near(out.z_loss, expected.z_loss, 4 * expected.z_loss.abs().nan_to_num(0, 0, 0), name="z_loss")
    assert_near(out.lse, expected.lse, expected.lse.abs().nan_to_num(0, 0, 0), name="lse")
