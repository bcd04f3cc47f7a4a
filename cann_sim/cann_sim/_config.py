"""How a launch is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How a launch is run. The CANN_SIM_* environment variables scale or switch off on top of it.

    check            False: no checks, only data, counts and times (several times faster)
    trace_core       the core whose every instruction is recorded, for `Report.timeline`
    bandwidth_scale  GM bandwidth of the cost model, of a core and of the chip, times this
    vector_scale     speed of the vector unit times this
    scalar_scale     speed of the scalar unit times this
    threads          host threads; None: as many as there are cores
    remove_sync      index (or indices) of the synchronisation in `Report.sync_sites` whose ordering is ignored
    """

    check: bool = True
    trace_core: int | None = None
    bandwidth_scale: float = 1.0
    vector_scale: float = 1.0
    scalar_scale: float = 1.0
    threads: int | None = None
    remove_sync: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("bandwidth_scale", "vector_scale", "scalar_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
