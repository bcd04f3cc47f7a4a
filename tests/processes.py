"""How processes end that tests start."""

from __future__ import annotations


def aborted_at_exit(code: int, output: str) -> bool:
    """Whether a process of torch.distributed aborted after all its work was done.

    On a busy machine a process may abort at its very end, because a thread of torch.distributed still runs: seen in one
    run of 16 with torch alone. Whether the work was done is for the caller to check.
    """
    return code == 1 and "terminate called without an active exception" in output and "SIGABRT" in output
