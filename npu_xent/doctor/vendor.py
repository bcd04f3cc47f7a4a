"""Agreement with torch_npu's own operator, where both contracts overlap.

These checks find options that the two operators interpret differently. They do not judge rounding: the allowed error is
1 % of the terms of a result, because the vendor's gradient, for example, uses a log_prob in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .cases import IGNORE, SHORT_NAMES, Case, Problem, dtypes, make_problem
from .environment import first_line
from .report import Result, Task
from .truth import compare_all, one_thread, truth

SECTION = "agreement with torch_npu.npu_cross_entropy_loss"
PROMISE = "The options of npu_cross_entropy_loss mean what they mean in torch_npu's operator."
SHAPE = (96, 1000)
MEANING = 0.01
CASES = (
    Case("mean"),
    Case("sum, weight, ignore_index", {"reduction": "sum"}, weight=True, ignored=True),
    Case("none, weight, ignore_index", {"reduction": "none"}, weight=True, ignored=True),
    # Per row, because summed over many rows the losses with and without smoothing are similar.
    Case("label_smoothing, loss alone", {"reduction": "none", "label_smoothing": 0.1}, weight=True, grad=False),
)


def tasks(device: torch.device) -> Iterator[Task]:
    """Yield one check per dtype and case that both operators support."""
    for case in CASES:
        for dtype in dtypes(device):
            problem = make_problem(case, *SHAPE, dtype)
            run = lambda problem=problem: check(problem, device)  # noqa: E731
            where = {"shape": f"{SHAPE[0]} x {SHAPE[1]}", "dtype": SHORT_NAMES[dtype]}
            yield Task(SECTION, case.name, run, where, PROMISE)


def check(problem: Problem, device: torch.device) -> Result:
    """Compare the vendor's results with the float64 results, with which ours have been compared."""
    import torch_npu

    case = problem.case
    leaf = problem.logits.to(device).requires_grad_(case.grad)
    weight = None if problem.weight is None else problem.weight.to(device)
    target, ignore_index = as_documented(problem)
    try:
        loss, log_prob, *_ = torch_npu.npu_cross_entropy_loss(
            leaf, target.to(device), weight, ignore_index=ignore_index, **case.options
        )
        seen = {"loss": loss.view(problem.upstream.shape), "log_prob": log_prob}
        if case.grad:
            loss.backward(problem.upstream.to(device).view(loss.shape))
            seen["gradient"] = leaf.grad
        seen = {name: tensor.detach().cpu() for name, tensor in seen.items()}
    except (AttributeError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        return Result(skipped=f"not available: {first_line(error)}")
    with one_thread():
        parts, failures = compare_all(seen, truth(problem), MEANING / torch.finfo(torch.float32).eps)
    return Result({"part_of_allowed_error": parts}, [replace(f, words=f"torch_npu's {f.words}") for f in failures])


def as_documented(problem: Problem) -> tuple[Tensor, int]:
    """Return targets and ignore_index as the vendor documents them: ignored rows have a class that no other row has.

    By the vendor's documentation a negative ignore_index ignores nothing, so such a target would be out of range.
    """
    ignored = problem.target == IGNORE
    if not problem.case.ignored:
        return problem.target, IGNORE  # the default, which "mean" with a gradient requires
    taken = torch.zeros(problem.logits.shape[1], dtype=torch.bool)
    taken[problem.target[~ignored]] = True
    index = int(taken.logical_not().nonzero()[0])
    return problem.target.masked_fill(ignored, index), index
