"""What the doctor computes: every option of the operators, on shapes for every way in which a device cuts rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npu_xent import _C

IGNORE = -100
ROW_MODES = {number: name for name, number in _C.KERNEL_INTERFACE["RowMode"].items()}
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Case:
    """A way to call an operator. The same numbers come out of all layouts and both functions."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: bool = False
    ignored: bool = False  # every third row
    upstream: float = 1.0  # the gradient that reaches the loss
    grad: bool = True  # else the loss alone, which other kernels compute
    layout: str = "rows"  # "classes second": [B, C, T]; "strided": columns of a wider tensor, full of NaN
    contract: bool = False  # npu_cross_entropy_loss instead of cross_entropy
    everywhere: bool = False  # also where rows are so long that the rest would take too much time
    transform: Callable[[Tensor], Tensor] = lambda logits: logits  # what an option does to each logit, for the truth


CAP = 10.0
SMOOTHING = {"label_smoothing": 0.1}
Z_LOSS = {"lse_square_scale": 0.05, "return_z_loss": True}
ALL = {"reduction": "sum", **SMOOTHING, **Z_LOSS, "return_lse": True}
CONTRACT_ALL = {**SMOOTHING, "lse_square_scale_for_zloss": 0.05, "return_zloss": True, "strict": False}

CASES = (
    Case("mean", everywhere=True),
    Case("sum", {"reduction": "sum"}),
    Case("none", {"reduction": "none"}, everywhere=True),
    # Of 16-bit logits, lse tells more than a loss that was rounded to 16 bits.
    Case("loss and lse alone", {"return_lse": True}, grad=False),
    Case("upstream gradient 3", upstream=3.0),
    Case("weight", weight=True),
    Case("ignore_index", ignored=True),
    Case("label_smoothing", SMOOTHING),
    Case("weight, label_smoothing", SMOOTHING, weight=True),
    Case("z-loss", Z_LOSS),
    # Everywhere, since it comes into the arithmetic of each row mode.
    Case("softcap", {"softcap": CAP, **SMOOTHING}, True, everywhere=True, transform=lambda x: CAP * (x / CAP).tanh()),
    Case("return_lse", {"return_lse": True}),
    Case("consume_logits", {"consume_logits": True}),
    Case("all options", ALL, weight=True, ignored=True, everywhere=True),
    Case("all, mean", {**ALL, "reduction": "mean"}, weight=True, ignored=True),
    Case("all, none", {**ALL, "reduction": "none"}, weight=True, ignored=True),
    Case("all, consume_logits", {**ALL, "consume_logits": True}, weight=True, ignored=True),
    Case("classes second", {"reduction": "none", **SMOOTHING}, layout="classes second"),
    Case("strided rows", ALL, weight=True, ignored=True, layout="strided"),
    Case("npu_cross_entropy_loss", contract=True),
    Case("npu_cross_entropy_loss, all", CONTRACT_ALL, weight=True, ignored=True, contract=True),
)


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Those that the operators take on a device."""
    return [d for d in SHORT_NAMES if d != torch.float64 or device.type == "cpu"]


@dataclass(frozen=True)
class Shape:
    """Rows and classes, and how a device cuts them."""

    rows: int
    classes: int
    row_mode: str | None
    long: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.classes}"


def shapes(dtype: torch.dtype, device: torch.device) -> list[Shape]:
    """One for each row mode; on the CPU, one for each way to share out rows. All have a partial piece at the end."""
    if device.type != "npu":
        return [Shape(96, 130, None), Shape(30, 5001, None), Shape(3, 35_001, None)]
    streaming = 35_001 if dtype.itemsize >= 4 else 75_001  # just too long for the unified buffer
    sizes = ((96, 130), (30, 5001), (3, 5001), (48, streaming))
    return [Shape(rows, cols, row_mode(rows, cols, dtype), long=cols == streaming) for rows, cols in sizes]


def row_mode(rows: int, classes: int, dtype: torch.dtype) -> str:
    """How a device kernel cuts logits [rows, classes], by the planner itself."""
    return ROW_MODES[_C.plan_rows(rows, classes, _C.KERNEL_INTERFACE["LogitsType"][SHORT_NAMES[dtype]])["mode"]]


@dataclass(frozen=True)
class Problem:
    """The inputs of a case, on the CPU and rounded to the dtype of the logits."""

    case: Case
    logits: Tensor  # [N, C]
    target: Tensor  # [N]
    weight: Tensor | None  # [C], float32
    upstream: Tensor  # [] or [N]


def make_problem(case: Case, rows: int, classes: int, dtype: torch.dtype) -> Problem:
    """Always the same for the same arguments.

    In each row one class has most of the probability, and over the rows it moves from the first class to the last: a
    piece of a row that is lost, wherever it lies, is most of some row. float16 gets the gradient that a GradScaler
    would send, since its small numbers would be lost otherwise.
    """
    generator = torch.Generator().manual_seed(rows * 1_000_003 + classes)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    row = torch.arange(rows)
    logits[row, (row * classes // rows + classes - 1) % classes] = torch.tensor(float(classes)).log() + 3
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[0] = classes - 1
    if case.ignored:
        target[1::3] = IGNORE
    weight = 0.1 + 0.9 * torch.rand(classes, generator=generator) if case.weight else None
    upstream = torch.tensor(case.upstream * (1024.0 if dtype == torch.float16 else 1.0))
    if case.options.get("reduction") == "none":
        upstream = upstream * (1 + row % 3)  # a row that gets another row's is wrong
    return Problem(case, logits.to(dtype), target, weight, upstream.to(dtype))
