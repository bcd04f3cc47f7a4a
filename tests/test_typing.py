"""The types that npu_xent is shipped with, as a user's type checker sees them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).with_name("typing_program.py")


def test_a_users_program_has_the_errors_that_it_says() -> None:
    if importlib.util.find_spec("mypy") is None:
        reason = "needs mypy, which `make check` installs"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(PROGRAM)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = enumerate(PROGRAM.read_text().splitlines(), start=1)
    expected = [(number, said[1]) for number, line in lines if (said := re.search(r"# error: (\S+)$", line))]
    found = {(int(number), code) for number, code in re.findall(r":(\d+): error: .*\[(\S+)\]$", run.stdout, re.M)}
    assert len(expected) == 10
    assert sorted(found) == expected, run.stdout + run.stderr
