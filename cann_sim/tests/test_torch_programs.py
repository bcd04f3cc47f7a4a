"""PyTorch programs on a simulated NPU: operators, training, streams; all in one process, which takes long to start."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_case import npu

ON_NPU = Path(__file__).parent / "on_npu"


def test_programs():
    passes("operators", "training", "streams")


@pytest.mark.parametrize("queue", ["0", "2"])
def test_task_queue(queue):
    """1 is the default, and what the others run with."""
    passes("streams", TASK_QUEUE_ENABLE=queue)


def passes(*groups: str, **environment: str) -> None:
    files = [str(ON_NPU / f"{group}.py") for group in groups]
    result = npu("-m", "pytest", "-x", "-p", "no:cacheprovider", *files, **environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
