"""Puts the launchers of the device kernels (benchmarks/device/kernels.py) on the path, and says what they need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "device"))

try:
    import cann_sim  # noqa: F401
except ImportError as error:
    raise pytest.UsageError("tests/device runs kernels on cann_sim: pip install ./cann_sim") from error
