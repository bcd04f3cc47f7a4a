"""A pytest plugin of `make coverage`: workers of pytest-xdist end without what a process does at its end, such as
writing the counters of C++."""

from __future__ import annotations

import ctypes


def pytest_sessionfinish() -> None:
    from npu_xent import _C

    ctypes.CDLL(_C.__file__).__gcov_dump()
