"""examples/train_lm.py when its disk is full, and when it is killed. `python checkpoints.py PART SECONDS`"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tried import Tried, main

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_lm.py"
TINY = ["--vocab-size=512", "--context=32", "--width=32", "--layers=2", "--batch=4", "--lr=0.01", "--loss=npu_xent"]
STEPS = 150
KILLS = 50


class Runs:
    """Runs of a tiny model on generated text, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = ["".join(random.Random(i).choices("abcdefgh", k=1 + i % 7)) for i in range(200)]
        (folder / "text.txt").write_text(" ".join(random.Random(1).choices(words, weights=range(200, 0, -1), k=15000)))

    def start(self, name: str, *flags: str, limit: int | None = None) -> subprocess.Popen[str]:
        """Starts the program; `limit`: the largest file that it may write, in bytes, as on a disk that is full."""
        out, cache = self.folder / name, self.folder / "cache"
        command = [sys.executable, str(SCRIPT), "--data", str(self.folder / "text.txt"), "--cache", str(cache)]

        def set_limit() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [*command, "--out", str(out), *TINY, f"--steps={STEPS}", *flags],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=set_limit,
        )

    def losses(self, name: str) -> list[str]:
        """The losses in metrics.csv as they are written."""
        lines = (self.folder / name / "metrics.csv").read_text().splitlines()[1:]
        return [line.split(",")[1] for line in lines]

    def extra(self, name: str) -> list[str]:
        """Files that a finished run does not have."""
        files = {path.name for path in (self.folder / name).iterdir()}
        return sorted(files - {"checkpoint.pt", "metrics.csv", "summary.json", "loss.png"})


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def full_disk(tried: Tried, seconds: float) -> None:
    """The disk fills at each of several bytes of a checkpoint: a message, and the earlier checkpoint as it was."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        finished(runs.start("whole"))
        finished(runs.start("parts", "--steps=20"))
        path = runs.folder / "parts" / "checkpoint.pt"
        before = path.read_bytes()
        resume = ("--resume", "--save-every=1")
        for part in (0.02, 0.3, 0.6, 0.97, 0.9999):
            limit = int(len(before) * part)
            process = runs.start("parts", *resume, limit=limit)
            output, _ = process.communicate(timeout=600)
            last = output.strip().splitlines()[-1]
            says = process.returncode == 2 and "cannot be written" in last and "Traceback" not in output
            tried("disks that were full", says, f"at {limit} of {len(before)} bytes: {process.returncode}: {output}")
            tried("checkpoints from before", path.read_bytes() == before, f"other bytes after {limit}")
            tried("files left behind", not runs.extra("parts"), str(runs.extra("parts")))
        finished(runs.start("parts", *resume))
        tried("runs resumed with the same losses", runs.losses("parts") == runs.losses("whole"), "other losses")


def kill(tried: Tried, seconds: float) -> None:
    """kill -9 at random moments, KILLS times (more in more time), each followed by a resume to the same losses."""
    with tempfile.TemporaryDirectory() as folder:
        runs, chosen = Runs(Path(folder)), random.Random(time.time_ns())
        began = time.monotonic()
        finished(runs.start("whole", "--save-every=1"))
        longest, expected, number = time.monotonic() - began, runs.losses("whole"), 0
        while tried.counts["kills"] < KILLS or tried.seconds() < seconds:
            number += 1
            name = f"run {number}"

            def start(name: str = name) -> subprocess.Popen[str]:
                there = (runs.folder / name / "checkpoint.pt").is_file()
                return runs.start(name, "--save-every=1", *(["--resume"] if there else []))

            for _ in range(8):
                process = start()
                try:
                    process.communicate(timeout=chosen.uniform(0.3, 0.8) * longest)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    tried("kills")
                    whole = True
                    if (path := runs.folder / name / "checkpoint.pt").is_file():
                        with zipfile.ZipFile(path) as archive:
                            whole = archive.testzip() is None
                    tried("checkpoints after a kill", whole, "a checksum is wrong")
                if process.returncode != -signal.SIGKILL:
                    tried("ends that were no kill", process.returncode == 0, f"exit code {process.returncode}")
                    break
            else:
                finished(start())
            tried("runs resumed with the same losses", runs.losses(name) == expected, f"{name} has other losses")
            tried("files left behind", not runs.extra(name), str(runs.extra(name)))


if __name__ == "__main__":
    main({part.__name__: part for part in (full_disk, kill)})
