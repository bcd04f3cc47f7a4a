"""PyTorch programs on a simulated NPU: operators, training, streams; each group in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_case import npu

ON_NPU = Path(__file__).parent / "on_npu"


@pytest.mark.parametrize("group", ["operators", "training", "streams"])
def test_group(group):
    passes(group)


@pytest.mark.parametrize("queue", ["0", "2"])
def test_task_queue(queue):
    """1 is the default, and what the others run with."""
    passes("streams", TASK_QUEUE_ENABLE=queue)


def passes(group: str, **environment: str) -> None:
    result = npu("-m", "pytest", "-x", "-p", "no:cacheprovider", str(ON_NPU / f"{group}.py"), **environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
