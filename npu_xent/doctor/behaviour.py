"""Checks the operators on special values, memory layouts and streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import npu_xent
from npu_xent._constraints import may_look

from .calls import laid_out
from .cases import IGNORE, Case, make_problem, shapes
from .environment import first_line, npu
from .report import Failure, Result, Task

SECTION = "behaviour"
ANY_DEVICE = "Every device of the process gives the same bits."
NAN, INF = float("nan"), float("inf")
LOSS_OF_ROWS = Case("none", {"reduction": "none"})
Check = Callable[[torch.device], list[Failure]]
CHECKS: list[tuple[str, Check]] = []


def tasks(device: torch.device) -> Iterator[Task]:
    """Yield the checks that apply to the device."""
    for name, check in CHECKS:
        if device.type == "npu" or check not in NPU_ONLY:
            yield Task(SECTION, name, partial(_result_of, check, device), promise=(check.__doc__ or "").strip())
    if device.type == "npu":
        for other in range(npu().device_count()):
            if other != device.index:
                run = partial(on_another, device, other)
                yield Task(SECTION, f"the same bits on npu:{other}", run, promise=ANY_DEVICE)


def _result_of(check: Check, device: torch.device) -> Result:
    return Result(failures=check(device))


def named(name: str) -> Callable[[Check], Check]:
    """Register a check under a name for the report."""

    def add(check: Check) -> Check:
        CHECKS.append((name, check))
        return check

    return add


def step(logits: Tensor, target: Tensor, device: torch.device, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute the loss and the gradient of its sum on the device; return both on the CPU."""
    loss, gradient = step_there(logits.to(device), target.to(device), **options)
    return loss.cpu(), gradient.cpu()


def step_there(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute the loss and the gradient of its sum on the tensors' own device."""
    leaf = logits.detach().requires_grad_()
    loss: Tensor = npu_xent.cross_entropy(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones(loss.shape).to(loss.device))[0]


def inputs(device: torch.device, index: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits and targets on the CPU, in the device's test shape number `index`."""
    shape = shapes(torch.float32, device)[index]
    problem = make_problem(LOSS_OF_ROWS, shape.rows, shape.classes, torch.float32)
    return problem.logits, problem.target


def expect(condition: bool, words: str) -> list[Failure]:
    """Return a failure with the message `words` unless the condition holds."""
    return [] if condition else [Failure(words)]


def same_bits(name: str, seen: Tensor, expected: Tensor) -> list[Failure]:
    """Return a failure unless both are bitwise equal. All NaN count as equal: their payload bits have no meaning."""
    first, second = (t.detach().cpu().reshape(-1) for t in (seen, expected))
    first, second = (torch.where(t.isnan(), NAN, t) for t in (first, second))
    if seen.dtype == expected.dtype and seen.shape == expected.shape:
        different = (first.view(torch.uint8) != second.view(torch.uint8)).view(-1, seen.element_size()).any(dim=1)
        if not bool(different.any()):
            return []
        at = int(different.nonzero()[0])
        values = float(first[at]), float(second[at])
        element = [int(i) for i in torch.unravel_index(torch.tensor(at), seen.shape)]
        words = (
            f"{name}{element or ''}: {values[0]:.9g} and {values[1]:.9g}; "
            f"{int(different.sum())} of {len(different)} elements differ"
        )
        return [Failure(words, name, element, *values, 0.0)]
    return [Failure(f"{name}: {seen.dtype} {list(seen.shape)}, and {expected.dtype} {list(expected.shape)}", name)]


@named("a target out of range")
def bad_target(device: torch.device) -> list[Failure]:
    """A target out of range raises IndexError where targets are checked; elsewhere only its own row is NaN."""
    logits, target = inputs(device)
    loss, gradient = step(logits, target, device, reduction="none")
    target[5] = logits.shape[1]
    if may_look(device.type):
        try:
            step(logits, target, device, reduction="none")
        except IndexError:
            return []
        return [Failure(f"target[5] is {target[5]}, which is out of range, but no IndexError was raised")]
    bad_loss, bad_gradient = step(logits, target, device, reduction="none")
    loss[5] = NAN
    gradient[5] = NAN
    return [*same_bits("loss", bad_loss, loss), *same_bits("gradient", bad_gradient, gradient)]


@named("NaN in ignored rows")
def nan_in_ignored_rows(device: torch.device) -> list[Failure]:
    """The gradient of ignored rows is 0 if the upstream gradient is finite. NaN in them changes no other result."""
    found = []
    for index in (0, 1):
        logits, target = inputs(device, index)
        target[1::3] = IGNORE
        loss, gradient = step(logits, target, device)
        logits[1::3] = NAN
        spoiled_loss, spoiled_gradient = step(logits, target, device)
        found += same_bits("loss", spoiled_loss, loss) + same_bits("gradient", spoiled_gradient, gradient)
        found += expect(not bool(spoiled_gradient[1::3].any()), "gradient of ignored rows: not 0")
    return found


@named("NaN, infinities and masked classes")
def special_values(device: torch.device) -> list[Failure]:
    """NaN and +inf make only their own row NaN. -inf has probability 0; a row of only -inf is NaN."""
    found = []
    for index in (0, 1):
        logits, target = inputs(device, index)
        loss, gradient = step(logits, target, device, reduction="none")
        logits[1, -1], logits[4, 0], logits[7] = NAN, INF, -INF
        logits[10, 1::2], target[10] = -INF, 2
        special_loss, special_gradient = step(logits, target, device, reduction="none")
        masked = torch.nn.functional.cross_entropy(logits[10:11].double(), target[10:11])
        error = abs(float(special_loss[10]) - float(masked))
        words = f"loss[10], with half of the classes at -inf: {float(special_loss[10])}, expected {float(masked)}"
        found += expect(error < 1e-4, words)
        found += expect(not bool(special_gradient[10, 1::2].any()), "gradient[10] of classes at -inf: not 0")
        special_loss[10], special_gradient[10] = loss[10], gradient[10]  # checked; other rows are bitwise equal
        loss[[1, 4, 7]] = NAN
        gradient[[1, 4, 7]] = NAN
        found += same_bits("loss", special_loss, loss) + same_bits("gradient", special_gradient, gradient)
    return found


@named("rows with a stride")
def strided_rows(device: torch.device) -> list[Failure]:
    """Memory between rows, NaN here, is neither read nor written. Results equal those of dense rows bitwise."""
    found = []
    for index in (0, 1):
        logits, target = inputs(device, index)
        strided = laid_out("strided", logits, device)
        wider = strided._base
        assert wider is not None
        before = wider.clone()
        seen, expected = step(strided, target, device), step(logits, target, device)
        found += same_bits("loss", seen[0], expected[0]) + same_bits("gradient", seen[1], expected[1])
        found += same_bits("logits, and what lies between their rows", wider, before)
    return found


@named("logits are left alone, or consumed")
def written_logits(device: torch.device) -> list[Failure]:
    """Only consume_logits overwrites the logits, and it overwrites them with the gradient."""
    logits, target = inputs(device, 1)
    there = logits.to(device)
    _, gradient = step_there(there, target.to(device))
    found = same_bits("logits after the call", there, logits)
    leaf = logits.to(device).requires_grad_()
    consumed = leaf.clone()
    npu_xent.cross_entropy(consumed, target.to(device), consume_logits=True)
    return found + same_bits("logits after consume_logits", consumed, gradient)


@named("several streams")
def several_streams(device: torch.device) -> list[Failure]:
    """Three concurrent side streams give the same results as the current stream."""
    problems = [[tensor.to(device) for tensor in inputs(device, index)] for index in range(3)]
    expected = [step_there(*problem) for problem in problems]
    main, seen = npu().current_stream(device), []
    for problem in problems:
        side = npu().Stream(device)
        side.wait_stream(main)
        with npu().stream(side):
            seen.append((side, step_there(*problem)))
        for tensor in problem:
            tensor.record_stream(side)
    found = []
    for (side, results), values in zip(seen, expected, strict=True):
        main.wait_stream(side)
        for name, result, value in zip(("loss", "gradient"), results, values, strict=True):
            result.record_stream(main)
            found += same_bits(name, result, value)
    return found


def on_another(device: torch.device, other: int) -> Result:
    """Run same_on; skip it if torch's own operations fail on that device, which another process may occupy."""
    try:
        (torch.ones(8).to(torch.device("npu", other)) + 1).cpu()
    except RuntimeError as error:
        return Result(skipped=f"npu:{other} cannot be used: {first_line(error)}")
    return Result(failures=same_on(device, other))


def same_on(device: torch.device, other: int) -> list[Failure]:
    """The kernel library, loaded once, serves every device of the process."""
    logits, target = inputs(device, 1)
    here = step(logits, target, device)
    with npu().device(other):
        there = step(logits, target, torch.device("npu", other))
    return same_bits("loss", there[0], here[0]) + same_bits("gradient", there[1], here[1])


NPU_ONLY = (several_streams,)
