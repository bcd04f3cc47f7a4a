"""The configuration of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """The configuration of a launch. CANN_SIM_* environment variables apply on top: they multiply scales or disable.

    check            False: no checks, only data, counts and times (several times faster)
    trace_core       the core to record, instruction by instruction, for `Report.timeline`
    bandwidth_scale  factor of the cost model's GM bandwidth, per core and of the chip
    vector_scale     factor of the vector unit's speed
    scalar_scale     factor of the scalar unit's speed
    threads          host threads; None: one per host core
    remove_sync      index (or indices) of synchronisation sites in `Report.sync_sites` whose ordering is ignored
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
