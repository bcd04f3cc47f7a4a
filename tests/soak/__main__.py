"""Load and faults, which `make test` tries for seconds and this program for minutes: each part, and a table of counts.

python tests/soak [--seconds 30] [PART ...]

A part is a process of its own, and a crash or a hang of it is a failure. Parts that can go on take so many seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from processes import stop  # noqa: E402

CANN_SIM = ("-m", "cann_sim")


class Part(NamedTuple):
    """The program, the part of it, and what Python needs before it."""

    program: str
    part: str
    launcher: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012


PARTS = {
    "threads": Part("load.py", "threads"),
    "forks": Part("load.py", "forks"),
    "busy_forks": Part("load.py", "busy_forks"),
    "signals": Part("load.py", "signals"),
    "steps": Part("load.py", "steps"),
    # glibc then asks the system for each larger allocation, so that each can fail.
    "memory": Part("memory.py", "cpu", (), {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}),
    "elements": Part("sizes.py", "elements"),
    "strides": Part("sizes.py", "strides"),
    "full_disk": Part("checkpoints.py", "full_disk"),
    "kill": Part("checkpoints.py", "kill"),
    "npu_threads": Part("device.py", "threads", CANN_SIM),
    "npu_forks": Part("device.py", "forks", CANN_SIM),
    "npu_steps": Part("device.py", "steps", CANN_SIM),
    "npu_memory": Part("device.py", "memory", CANN_SIM, {"PYTORCH_NO_NPU_MEMORY_CACHING": "1"}),
    "npu_faults": Part("device.py", "faults", CANN_SIM, {"TASK_QUEUE_ENABLE": "0"}),
    "npu_queued": Part("device.py", "queued", CANN_SIM),
}


def run(part: Part, seconds: float) -> tuple[dict[str, int], list[str]]:
    """What a part has tried, how often, and what failed."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *part.launcher, str(HERE / part.program), part.part, str(seconds)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | part.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=1800 + 3 * seconds)
    except subprocess.TimeoutExpired:
        return {"the part itself": 1}, ["it hangs"]
    finally:
        stop(process)
    found = [line for line in output.splitlines() if line.startswith('{"counts"')]
    counts, failures = (json.loads(found[-1])[key] for key in ("counts", "failures")) if found else ({}, [])
    if process.returncode != 0:
        failures.append(f"exit code {process.returncode}: {output[-2000:]}")
    elif not counts:
        failures.append("nothing was tried")
    return counts or {"the part itself": 1}, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="of each part that can go on (default: 30)")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all by default: {', '.join(PARTS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    lines, failed = [], 0
    for name in arguments.parts or PARTS:
        began = time.monotonic()
        counts, failures = run(PARTS[name], arguments.seconds)
        took = time.monotonic() - began
        for failure in failures:
            print(f"{name}: {failure}", flush=True)
        for what, count in counts.items():
            of_this = sum(failure.startswith(f"{what}: ") for failure in failures)
            lines.append(f"{name:<12} {what:<45} {count:>9} {of_this:>9}")
        failed += len(failures)
        print(f"{name}: {sum(counts.values())} tries, {len(failures)} failures, {took:.0f} s", flush=True)
    print(f"\n{'part':<12} {'what was tried':<45} {'how often':>9} {'failures':>9}", *lines, sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
