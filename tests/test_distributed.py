"""Losses over sharded classes, on one to four ranks of gloo: every case of distributed_ranks.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from distributed_ranks import CASES
from processes import aborted_at_exit

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]
PROGRAM = Path(__file__).with_name("distributed_ranks.py")
SECONDS = 180  # of all ranks together


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{} ranks".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case. All cases of a number of ranks share one launch."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    outs = [folder / f"{rank}.json" for rank in range(ranks)]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", PROGRAM, str(rank), str(ranks), folder / "store", out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0 or aborted_at_exit(process.returncode, said), said[-5000:]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize("case", CASES)
def test_sharded(case: str, found: list[dict[str, Any]]) -> None:
    """Right, and the same bits on all ranks and in a second run."""
    for rank, of_rank in enumerate(found):
        assert of_rank[case]["error"] == "", f"rank {rank}: {of_rank[case]['error'][-3000:]}"
    assert len({of_rank[case]["bits"] for of_rank in found}) == 1, "ranks differ"
