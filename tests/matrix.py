"""Builds and tests the last commit with one torch release after another: `make matrix`.

Each release gets a clone of the repository and an environment in build/matrix. Both are removed afterwards, because a
CUDA build of torch takes gigabytes; the logs stay. The results become rows of the table in docs/compatibility.md.
SUITES=cpu in the environment leaves the simulated NPU out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"

# The releases of torch, and the torch_npu of each; None: only the CPU part is tested.
RELEASES = {
    "2.7.1": "2.7.1.post11",
    "2.8.0": None,
    "2.9.0": "2.9.0.post9",
    "2.10.0": "2.10.0.post7",
    "2.11.0": None,
    "2.12.0": "2.12.0.post3",
    "2.13.0": "2.13.0",
    "2.14.1": None,
    "2.15.0": None,
}
SPACE = 15 * 2**30  # bytes of disk that one release may take
SUITE = re.compile(r"^(cpu|npu): (.*)$", re.MULTILINE)  # the lines that tests/run_suites.py ends with


@dataclass
class Result:
    """The results with one release; the fields are the columns of the table."""

    torch: str
    torch_npu: str = "none"
    python: str = "?"
    compiler: str = "?"
    build: str = "failed"
    cpu: str = "not run"
    npu: str = "not run"

    @property
    def passed(self) -> bool:
        suites = [self.cpu] if self.torch_npu == "none" else [self.cpu, self.npu]
        return all(" passed, 0 failed" in suite for suite in suites)

    def row(self) -> str:
        return f"| {' | '.join(vars(self).values())} |"


class Checkout:
    """A clone of the last commit, whose make installs one torch and writes to one log."""

    def __init__(self, torch: str, torch_npu: str | None) -> None:
        self.folder, self.log = FOLDER / torch, FOLDER / f"{torch}.log"
        self.versions = [f"TORCH=torch=={torch}", *([f"TORCH_NPU=torch_npu=={torch_npu}"] if torch_npu else [])]
        self.remove()
        self.log.write_text("")
        subprocess.run(["git", "clone", "--quiet", ROOT, self.folder], check=True)

    def make(self, *arguments: str) -> bool:
        """Run make; whether it succeeded."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
        command = ["make", *arguments, *self.versions, f"PYTHON={sys.executable}"]
        with self.log.open("a") as log:
            return subprocess.run(command, cwd=self.folder, env=environment, stdout=log, stderr=log).returncode == 0

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def compiler() -> str:
    """The C++ compiler that CMake picks, with its version."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    said = subprocess.run([*name.split(), "--version"], capture_output=True, text=True).stdout
    version = re.search(r"\d+\.\d+\.\d+", said)
    return f"{'clang' if 'clang' in said else 'g++'} {version[0] if version else '?'}"


def run(torch: str) -> Result:
    """Build and test with one release."""
    torch_npu = RELEASES.get(torch) if "npu" in os.environ.get("SUITES", "cpu npu") else None
    result = Result(torch, torch_npu or "none", ".".join(map(str, sys.version_info[:3])), compiler())
    checkout = Checkout(torch, torch_npu)
    try:
        if not checkout.make(".venv/.test", *([".venv/.torch_npu"] if torch_npu else [])):
            result.build = "packages cannot be installed"
            return result
        start = time.monotonic()
        if checkout.make("build-npu" if torch_npu else "build"):
            minutes, seconds = divmod(round(time.monotonic() - start), 60)
            result.build = f"{minutes} min {seconds} s"
            checkout.make("test", f"SUITES={'cpu npu' if torch_npu else 'cpu'}")
            vars(result).update(SUITE.findall(checkout.log.read_text(errors="replace")))
    finally:
        checkout.remove()
    return result


def release(line: str) -> list[int]:
    """The torch of a row, as numbers to sort by."""
    return [int(number) for number in line.split("|")[1].strip().split(".")]


def with_row(page: str, row: str) -> str:
    """The page with a row of its table replaced or added."""
    lines = page.splitlines()
    first = lines.index("|---|---|---|---|---|---|---|") + 1
    end = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = [line for line in lines[first:end] if release(line) != release(row)] + [row]
    return "\n".join([*lines[:first], *sorted(rows, key=release), *lines[end:], ""])


def main(*releases: str) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = []
    for torch in releases or RELEASES:
        if shutil.disk_usage(FOLDER).free < SPACE:
            sys.exit(f"{FOLDER} has less than {SPACE >> 30} GiB free, which torch {torch} may need")
        print(f"== torch {torch}: log in {FOLDER / f'{torch}.log'}", flush=True)
        result = run(torch)
        print(result.row(), flush=True)
        PAGE.write_text(with_row(PAGE.read_text(), result.row()))
        failed += [] if result.passed else [torch]
    if failed:
        print(f"Failed: {' '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
