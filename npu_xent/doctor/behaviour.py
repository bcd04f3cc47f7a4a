"""What the operators do with values, memory and streams that are out of the ordinary."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import npu_xent

from .cases import IGNORE, Case, make_problem, shapes
from .report import Failure, Result, Task

NAN, INF = float("nan"), float("inf")
LOSS_OF_ROWS = Case("none", {"reduction": "none"})
CHECKS: list[tuple[str, Callable[[torch.device], list[Failure]]]] = []


def tasks(device: torch.device) -> Iterator[Task]:
    """Those that the device has a meaning for."""
    for name, check in CHECKS:
        if device.type == "npu" or check not in NPU_ONLY:
            yield Task("behaviour", name, lambda check=check: Result(failures=check(device)))
    if device.type == "npu":
        for other in range(torch.npu.device_count()):
            if other != device.index:
                name = f"the same bits on npu:{other}"
                yield Task("behaviour", name, lambda other=other: Result(failures=same_on(device, other)))


def named(name: str) -> Callable:
    """Puts a check on the list."""

    def add(check: Callable) -> Callable:
        CHECKS.append((name, check))
        return check

    return add


def step(logits: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum, on the device."""
    leaf = logits.detach().requires_grad_()
    loss = npu_xent.cross_entropy(leaf, target, **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def problem_on(device: torch.device, index: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and targets of one of the shapes, by its number."""
    shape = shapes(dtype, device)[index]
    problem = make_problem(LOSS_OF_ROWS, shape.rows, shape.classes, dtype)
    return problem.logits.to(device), problem.target.to(device)


def expect(condition: bool, words: str) -> list[Failure]:
    """A failure in words unless the condition holds."""
    return [] if condition else [Failure(words)]


def same_bits(name: str, seen: Tensor, expected: Tensor) -> list[Failure]:
    """A failure unless every bit is the same; NaN is."""
    first, second = (t.detach().cpu().contiguous().reshape(-1) for t in (seen, expected))
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


@named("a target that is no class")
def bad_target(device: torch.device) -> list[Failure]:
    """Looking at it would make an NPU wait: there its row is NaN, and no other. NPU_XENT_DEBUG=1 looks."""
    logits, target = problem_on(device)
    loss, gradient = step(logits, target, reduction="none")
    target = target.clone()
    target[5] = logits.shape[1]
    if device.type == "cpu" or os.environ.get("NPU_XENT_DEBUG") == "1":
        try:
            step(logits, target, reduction="none")
        except IndexError:
            return []
        return [Failure(f"target[5] is {logits.shape[1]}, of {logits.shape[1]} classes, and no IndexError was raised")]
    bad_loss, bad_gradient = step(logits, target, reduction="none")
    loss[5] = NAN
    gradient[5] = NAN
    return [*same_bits("loss", bad_loss, loss), *same_bits("gradient", bad_gradient, gradient)]


@named("NaN in ignored rows")
def nan_in_ignored_rows(device: torch.device) -> list[Failure]:
    """Their loss and gradient are 0, and the others' what they were."""
    found = []
    for index in (0, 1):
        logits, target = problem_on(device, index)
        target = target.clone()
        target[1::3] = IGNORE
        spoiled = logits.clone()
        spoiled[1::3] = NAN
        for name, seen, expected in zip(("loss", "gradient"), step(spoiled, target), step(logits, target), strict=True):
            found += same_bits(name, seen, expected)
        found += expect(not bool(step(spoiled, target)[1][1::3].any()), "gradient of an ignored row: not 0")
    return found


@named("NaN, infinities and masked classes")
def special_values(device: torch.device) -> list[Failure]:
    """NaN and +inf spoil their row alone; -inf is a class of probability 0, and a row of nothing else has none."""
    found = []
    for index in (0, 1):
        logits, target = problem_on(device, index)
        plain_loss, plain_gradient = step(logits, target, reduction="none")
        logits, classes = logits.clone(), logits.shape[1]
        target = target.clone()
        logits[1, classes - 1], logits[4, 0] = NAN, INF
        logits[7] = -INF
        logits[10, 1::2] = -INF
        target[10] = 2
        loss, gradient = step(logits, target, reduction="none")
        spoiled = torch.tensor([1, 4, 7], device=device)
        found += expect(bool(loss[spoiled].isnan().all()), f"loss of rows 1, 4, 7: {loss[spoiled].tolist()}, not NaN")
        found += expect(bool(gradient[spoiled].isnan().all()), "gradient of rows 1, 4, 7: not NaN throughout")
        masked = torch.nn.functional.cross_entropy(logits[10].cpu().double()[None], target[10:11].cpu())
        error = abs(float(loss[10]) - float(masked))
        found += expect(error < 1e-4, f"loss[10], half of its classes masked: {float(loss[10])}, not {float(masked)}")
        found += expect(not bool(gradient[10, 1::2].any()), "gradient of masked classes: not 0")
        kept = torch.tensor([i for i in range(len(loss)) if i not in (1, 4, 7, 10)], device=device)
        found += same_bits("loss of the other rows", loss[kept], plain_loss[kept])
        found += same_bits("gradient of the other rows", gradient[kept], plain_gradient[kept])
    return found


@named("rows with a stride")
def strided_rows(device: torch.device) -> list[Failure]:
    """What lies between rows, NaN here, is neither read nor written; the order of arithmetic is that of dense rows."""
    found = []
    for index in (0, 1):
        logits, target = problem_on(device, index)
        rows, classes = logits.shape
        wider = torch.full((rows, classes + 5), NAN, device=device)
        wider[:, 2:-3] = logits
        strided, dense = step(wider[:, 2:-3], target), step(logits, target)
        found += same_bits("loss", strided[0], dense[0]) + same_bits("gradient", strided[1], dense[1])
        outside = torch.cat([wider[:, :2], wider[:, -3:]], dim=1)
        found += expect(bool(outside.isnan().all()), "memory between the rows was written to")
    return found


@named("several streams")
def several_streams(device: torch.device) -> list[Failure]:
    """Three side streams at a time give what the current stream gives."""
    problems = [problem_on(device, index) for index in range(3)]
    expected = [step(*problem) for problem in problems]
    main, seen = torch.npu.current_stream(device), []
    for logits, target in problems:
        side = torch.npu.Stream(device)
        side.wait_stream(main)
        with torch.npu.stream(side):
            results = step(logits, target)
        for tensor in (logits, target):
            tensor.record_stream(side)
        seen.append((side, results))
    for side, results in seen:
        main.wait_stream(side)
        for tensor in results:
            tensor.record_stream(main)
    return [
        failure
        for (_, results), values in zip(seen, expected, strict=True)
        for name, a, b in zip(("loss", "gradient"), results, values, strict=True)
        for failure in same_bits(name, a, b)
    ]


def same_on(device: torch.device, other: int) -> list[Failure]:
    """One loaded library of kernels serves every device of the process."""
    logits, target = problem_on(device, 1)
    with torch.npu.device(other):
        there = [t.cpu() for t in step(logits.cpu().npu(), target.cpu().npu())]
    here = step(logits, target)
    return same_bits("loss", there[0], here[0]) + same_bits("gradient", there[1], here[1])


NPU_ONLY = (several_streams,)
