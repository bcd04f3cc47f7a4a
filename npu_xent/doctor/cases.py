"""The cases that the doctor computes: every option of the losses, on shapes for every row mode."""

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
    """One way to call an operator. All layouts and both functions must give the same numbers."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: bool = False
    ignored: bool = False  # every third row
    upstream: float = 1.0  # the gradient that reaches the loss
    grad: bool = True  # False: only the loss, which other kernels compute
    # "classes second": [B, C, T]; "strided": columns of a wider tensor, full of NaN; "layer": [C, N], the weight of a
    # linear layer whose input is the unit matrix, so that its output is exactly the logits.
    layout: str = "rows"
    contract: bool = False  # npu_cross_entropy_loss instead of cross_entropy
    log_probs: bool = False  # token_log_probs instead (or linear_token_log_probs): log-probabilities, entropy and top1
    temperature_by_row: bool = False
    everywhere: bool = False  # also run on long rows, where other cases take too much time
    transform: Callable[[Tensor], Tensor] = lambda logits: logits  # an option's change to each logit


CAP = 10.0


def temperatures(rows: int) -> Tensor:
    """Return the temperatures of the cases with one for each row."""
    return torch.linspace(0.5, 2.0, rows)


SMOOTHING = {"label_smoothing": 0.1}
Z_LOSS = {"lse_square_scale": 0.05, "return_z_loss": True}
ALL = {"reduction": "sum", **SMOOTHING, **Z_LOSS, "return_lse": True}
CONTRACT_ALL = {**SMOOTHING, "lse_square_scale_for_zloss": 0.05, "return_zloss": True, "strict": False}

CASES = (
    Case("mean", everywhere=True),
    Case("sum", {"reduction": "sum"}),
    Case("none", {"reduction": "none"}, everywhere=True),
    # For 16-bit logits, lse in float32 shows errors that a loss rounded to 16 bits hides.
    Case("loss and lse alone", {"return_lse": True}, grad=False),
    Case("upstream gradient 3", upstream=3.0),
    Case("weight", weight=True),
    Case("ignore_index", ignored=True),
    Case("label_smoothing", SMOOTHING),
    Case("weight, label_smoothing", SMOOTHING, weight=True),
    Case("z-loss", Z_LOSS),
    # Run everywhere, because softcap changes the arithmetic of every row mode.
    Case("softcap", {"softcap": CAP, **SMOOTHING}, True, everywhere=True, transform=lambda x: CAP * (x / CAP).tanh()),
    Case("logit_scale", {"logit_scale": 0.7, **SMOOTHING}, everywhere=True, transform=lambda x: 0.7 * x),
    Case("loss_dtype", {"loss_dtype": torch.float32, "reduction": "none"}),
    Case("return_lse", {"return_lse": True}),
    Case("consume_logits", {"consume_logits": True}),
    Case("all options", ALL, weight=True, ignored=True, everywhere=True),
    Case("all, mean", {**ALL, "reduction": "mean"}, weight=True, ignored=True),
    Case("all, none", {**ALL, "reduction": "none"}, weight=True, ignored=True),
    Case("all, consume_logits", {**ALL, "consume_logits": True}, weight=True, ignored=True),
    Case("classes second", {"reduction": "none", **SMOOTHING}, layout="classes second"),
    Case("strided rows", ALL, weight=True, ignored=True, layout="strided"),
    Case("linear_cross_entropy", {**SMOOTHING, "chunk_rows": 32}, weight=True, ignored=True, layout="layer"),
    Case("npu_cross_entropy_loss", contract=True),
    Case("npu_cross_entropy_loss, all", CONTRACT_ALL, weight=True, ignored=True, contract=True),
    Case("token_log_probs", log_probs=True, everywhere=True),
    Case(
        "token_log_probs, all",
        {"softcap": CAP, "consume_logits": True},
        ignored=True,
        log_probs=True,
        temperature_by_row=True,
        everywhere=True,
        transform=lambda x: CAP * (x / CAP).tanh() / temperatures(len(x)).double()[:, None].to(x.dtype),
    ),
    Case("linear_token_log_probs", {"chunk_rows": 32}, ignored=True, log_probs=True, layout="layer"),
)


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Return the dtypes that the operators support on a device."""
    return [d for d in SHORT_NAMES if d != torch.float64 or device.type == "cpu"]


@dataclass(frozen=True)
class Shape:
    """Number of rows and classes, and the row mode in which a device processes them."""

    rows: int
    classes: int
    row_mode: str | None
    long: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.classes}"


def shapes(dtype: torch.dtype, device: torch.device) -> list[Shape]:
    """Return one shape per row mode, or on the CPU one per way to split rows over threads. All have a partial tail."""
    if device.type != "npu":
        return [Shape(96, 130, None), Shape(30, 5001, None), Shape(3, 35_001, None)]
    streaming = 35_001 if dtype.itemsize >= 4 else 75_001  # slightly too long for the unified buffer
    sizes = ((96, 130), (30, 5001), (3, 5001), (48, streaming))
    return [Shape(rows, cols, row_mode(rows, cols, dtype), long=cols == streaming) for rows, cols in sizes]


def row_mode(rows: int, classes: int, dtype: torch.dtype) -> str:
    """Return the row mode of a device kernel for logits [rows, classes], as the planner chooses it."""
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
    """Make the inputs of a case; the same arguments always give the same inputs.

    In each row one class has most of the probability. It moves from the first class to the last over the rows, so that
    a lost piece of a row, wherever it lies, is most of some row. The upstream gradient of float16 is scaled as by a
    GradScaler, because small gradients would underflow otherwise.
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
    if case.log_probs or case.options.get("reduction") == "none":
        upstream = upstream * (1 + row % 3)  # differs by row, so that mixed-up rows are detected
    return Problem(case, logits.to(dtype), target, weight, upstream.to(dtype))
