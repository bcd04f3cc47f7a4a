# Types of the compiled module, which csrc/module.cpp defines.
from typing import Any

from torch import Tensor

compiler: str
KERNEL_INTERFACE: dict[str, dict[str, Any]]
UB_BYTES: int

def compiled_cpu_capabilities() -> str: ...
def cpu_capability() -> str: ...
def plan_rows(rows: int, cols: int, dtype: int, *, softcap: bool = False, by_row: bool = False) -> dict[str, Any]: ...
def share_of(total: int, core: int, cores: int) -> tuple[int, int]: ...

# The loss, or None for a call that is not a usual one: see csrc/python_entry.cpp.
def cross_entropy(
    input: object,
    target: object,
    weight: object,
    ignore_index: object,
    reduction: object,
    label_smoothing: object,
    lse_square_scale: object,
    logit_scale: object,
    softcap: object,
    loss_dtype: object,
    /,
) -> Tensor | None: ...
