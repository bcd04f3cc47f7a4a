"""Runs programs as `python -m cann_sim` does; without torch and torch_npu the tests are skipped."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cann_sim import _torch_runtime

PROJECT = Path(__file__).parent.parent


@functools.cache
def build() -> None:
    """Builds what programs need, whose time and whose words are not theirs then."""
    _torch_runtime.build_ascendcl()
    _torch_runtime.build_host_operators()


def npu(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    try:
        _torch_runtime.installed()
    except _torch_runtime.SetupError as error:
        pytest.skip(str(error))
    build()
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "cann_sim", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
