"""The program of `make soak`: a part in its shortest form, and that a crash of one counts as a failure."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu
SOAK = Path(__file__).parent / "soak"


def soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(folder), *arguments], capture_output=True, text=True)


def test_a_part_that_passes() -> None:
    """Strides above 2^31: the only test of them on the CPU."""
    run = soak(SOAK, "--seconds", "0", "strides")
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"strides +calls with strides above 2\^31 +(\d+) +0$", run.stdout, re.M)[1]) > 50


@pytest.mark.parametrize("end", ["os.abort()", 'print(\'{"counts": {}, "failures": []}\')', "pass"])
def test_a_part_that_crashes_or_tries_nothing(end: str, tmp_path: Path) -> None:
    program, processes = (SOAK / "__main__.py").read_text(), (SOAK.parent / "processes.py").read_text()
    (tmp_path / "soak").mkdir()
    (tmp_path / "soak" / "__main__.py").write_text(program)
    (tmp_path / "processes.py").write_text(processes)
    (tmp_path / "soak" / "load.py").write_text(f"import os\n{end}\n")
    run = soak(tmp_path / "soak", "threads")
    assert run.returncode == 1
    assert "threads: 1 tries, 1 failures" in run.stdout


def test_a_part_that_is_unknown() -> None:
    assert "no such part: nothing; there are threads, forks" in soak(SOAK, "nothing").stderr
