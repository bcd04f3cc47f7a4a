"""Compares every option, dtype and row mode with float64 results: one check for each, and a table of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .calls import observe
from .cases import CASES, SHORT_NAMES, Case, Shape, dtypes, make_problem, shapes
from .report import Check, Report, Result, Task
from .truth import compare_all, composed, one_thread, slack_of, truth

SECTION = "correctness"
PROMISE = (
    "Each result differs from the float64 result by one unit in the last place of its dtype at most, plus 4 units of "
    "float32 (32 on an NPU) of the terms that add up to it."
)


def tasks(device: torch.device, quick: bool) -> Iterator[Task]:
    """Yield the checks by row mode, then option, then dtype. `quick` leaves out long rows."""
    for index, _ in enumerate(shapes(torch.float32, device)[: 2 if quick else None]):
        for case in CASES:
            for dtype in dtypes(device):
                shape = shapes(dtype, device)[index]
                if (shape.long and not case.everywhere) or (dtype == torch.float64 and _is_strict(case)):
                    continue

                def run(case: Case = case, shape: Shape = shape, dtype: torch.dtype = dtype) -> Result:
                    return check(case, shape, dtype, device)

                where = {"shape": str(shape), "dtype": SHORT_NAMES[dtype], "row mode": shape.row_mode}
                yield Task(SECTION, case.name, run, where, PROMISE)


def check(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> Result:
    """Compare each output with the float64 result, and also torch's own results in the same dtype."""
    problem = make_problem(case, shape.rows, shape.classes, dtype)
    seen = observe(problem, device)
    with one_thread():
        expected, slack = truth(problem), slack_of(device)
        parts, failures = compare_all(seen, expected, slack)
        own = {name: value for name, value in composed(problem).items() if name in seen}
        own_parts, _ = compare_all(own, expected, slack)
    return Result({"part_of_allowed_error": parts, "torch_on_cpu": own_parts}, failures)


def table(report: Report) -> list[str]:
    """Format one table per row mode: options as rows, dtypes as columns."""
    checks = report.of(SECTION)
    lines = [
        "  The largest error of loss, gradient and other outputs, as a fraction of the allowed error; above 1 fails.",
        "  In brackets: torch's own error, in the same dtype on the CPU, as a fraction of the same allowed error.",
    ]
    for index, group in enumerate(_by_shape(checks)):
        columns = list(dict.fromkeys(check.where["dtype"] for check in group))
        sizes = list(dict.fromkeys(check.where["shape"] for check in group))
        mode = group[0].where["row mode"]
        lines += [""] * (index > 0) + [f"  {' and '.join(sizes)}" + (f", {mode} rows" if mode else "")]
        lines.append(f"    {'':<28}" + "".join(f"{name:>17}" for name in columns))
        for option in dict.fromkeys(check.name for check in group):
            cells = {check.where["dtype"]: _cell(check) for check in group if check.name == option}
            lines.append(f"    {option:<28}" + "".join(f"{cells.get(name, '-'):>17}" for name in columns))
    return lines


def _by_shape(checks: list[Check]) -> list[list[Check]]:
    """Split the checks into groups; each group starts with the first option."""
    groups: list[list[Check]] = []
    for check in checks:
        if not groups or (check.name == CASES[0].name and groups[-1][-1].name != CASES[0].name):
            groups.append([])
        groups[-1].append(check)
    return groups


def _cell(check: Check) -> str:
    if "part_of_allowed_error" not in check.result.numbers:
        return "raised"
    ours = max(check.result.numbers["part_of_allowed_error"].values())
    own = max(check.result.numbers["torch_on_cpu"].values())
    return f"{'FAIL ' if check.failed else ''}{_short(ours)} ({_short(own)})"


def _short(part: float) -> str:
    return f"{part:.2g}" if part < 99.5 else ">99"


def _is_strict(case: Case) -> bool:
    return case.contract and case.options.get("strict", True)
