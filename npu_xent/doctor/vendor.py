"""Agreement with torch_npu's own operator, as far as the contracts overlap.

It looks for a difference of meaning: an option that the two take differently. Rounding is not judged here, ours was
before and the vendor's is the vendor's: 1 % of the terms of a result is allowed, for a gradient made of a log_prob in
16 bits among others.
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
SHAPE = (96, 1000)
MEANING = 0.01
CASES = (
    Case("mean"),
    Case("sum, weight, ignore_index", {"reduction": "sum"}, weight=True, ignored=True),
    Case("none, weight, ignore_index", {"reduction": "none"}, weight=True, ignored=True),
    # Row by row: over many rows a loss with smoothing comes out much as one without.
    Case("label_smoothing, loss alone", {"reduction": "none", "label_smoothing": 0.1}, weight=True, grad=False),
)


def tasks(device: torch.device) -> Iterator[Task]:
    """For each dtype and what both take."""
    for case in CASES:
        for dtype in dtypes(device):
            problem = make_problem(case, *SHAPE, dtype)
            run = lambda problem=problem: check(problem, device)  # noqa: E731
            yield Task(SECTION, case.name, run, {"shape": f"{SHAPE[0]} x {SHAPE[1]}", "dtype": SHORT_NAMES[dtype]})


def check(problem: Problem, device: torch.device) -> Result:
    """The vendor's results against the truth, which ours have been compared with."""
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
    """The targets, and ignore_index, as the vendor documents them: rows that are ignored have a class of no other row.

    A negative ignore_index is documented to ignore nothing: such a target would then lie outside of its row.
    """
    ignored = problem.target == IGNORE
    if not problem.case.ignored:
        return problem.target, IGNORE  # the default, which "mean" with a gradient wants
    taken = torch.zeros(problem.logits.shape[1], dtype=torch.bool)
    taken[problem.target[~ignored]] = True
    index = int(taken.logical_not().nonzero()[0])
    return problem.target.masked_fill(ignored, index), index
