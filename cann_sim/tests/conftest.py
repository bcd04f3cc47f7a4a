"""The tests run against the package beside them when cann_sim is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("cann_sim") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture
def streams() -> Iterator[list[int]]:
    """Three streams of device 0 of the simulated AscendCL, which is built and loaded for it."""
    import acl_case

    acl_case.library()
    acl_case.ok("aclrtSetDevice", 0)
    made = [acl_case.made("aclrtCreateStream") for _ in range(3)]
    yield made
    acl_case.clean_up(made)
