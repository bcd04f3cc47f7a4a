"""Processes that tests start: the ranks of torch.distributed, and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 180  # of all ranks together


def aborted_at_exit(code: int, output: str) -> bool:
    """Whether a process of torch.distributed aborted after all its work was done.

    On a busy machine a process may abort at its very end, because a thread of torch.distributed still runs: seen in one
    run of 16 with torch alone. Whether the work was done is for the caller to check.
    """
    return code == 1 and "terminate called without an active exception" in output and "SIGABRT" in output


def run_ranks(program: str | None, ranks: int, folder: Path, *cases: str) -> list[dict[str, Any]]:
    """Run `program RANKS FOLDER [CASE ...]`, and return what each rank wrote as JSON: what it found, by case."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(program), str(ranks), folder, *cases],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    finish(process, SECONDS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """What a process prints. It must end well within so many seconds; its children do not outlive it."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        stop(process)
    assert process.returncode == 0 or aborted_at_exit(process.returncode, output), output[-5000:]
    return output


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a process that was started with start_new_session, and its process group.

    The ranks of torchrun have sessions of their own: it ends them when it gets SIGTERM.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
