"""What the other ranks say when one is killed or hangs, and when, as docs/api/distributed.md has it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed_dead_rank import STEPS
from processes import stop

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]
PROGRAM = Path(__file__).with_name("distributed_dead_rank.py")
TIMEOUT = 5  # seconds, of the group
MARGIN = 15  # for a busy machine
SECONDS = 60  # for the first steps


@pytest.mark.parametrize("ranks, number", [(4, signal.SIGKILL), (2, signal.SIGSTOP)], ids=["killed", "hanging"])
def test_each_of_the_others_raises(ranks: int, number: signal.Signals, tmp_path: Path) -> None:
    """In a ring of four, rank 1 has no connection to rank 3. Only the timeout tells it of its death."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", PROGRAM, str(rank), str(ranks), tmp_path, str(TIMEOUT)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]
    last, others = started[-1], started[:-1]
    try:
        deadline = time.monotonic() + SECONDS
        while len(list(tmp_path.glob("*.ready"))) < ranks:
            assert [process.poll() for process in started] == [None] * ranks
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begin = time.monotonic()  # one clock for all processes
        last.send_signal(number)
        for process in others:
            process.communicate(timeout=TIMEOUT + MARGIN)
    finally:
        last.kill()
        for process in started:
            stop(process)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks - 1)]
    seconds = [of_rank["at"] - begin for of_rank in found]
    for of_rank in found:
        assert of_rank["step"] >= STEPS
        assert of_rank["error"] == "RuntimeError"
        assert re.search(f"by peer|Broken pipe|Timed out waiting {TIMEOUT}000ms", of_rank["text"])
    assert min(seconds) > 0
    assert max(seconds) < TIMEOUT + MARGIN
    if number == signal.SIGKILL:
        assert min(seconds) < TIMEOUT  # those with a connection to it wait for nothing
