"""The short examples: what they print is right, and what docs/padded_labels.md says. (train_lm.py has its own file.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import npu_xent

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "padded_labels.md").read_text()
PICTURE = ROOT / "docs" / "padded_labels.png"
PNG = b"\x89PNG\r\n\x1a\n"


def run(script: str, *arguments: str, launcher: tuple[str, ...] = (), code: int = 0) -> str:
    """What the script prints, errors included, from the folder of the npu_xent that these tests import."""
    path = [str(Path(npu_xent.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, *launcher, str(EXAMPLES / script), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == code, ran.stderr
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def padded_labels(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """What padded_labels.py prints, and its picture."""
    pytest.importorskip("matplotlib")
    picture = tmp_path_factory.mktemp("drawn") / "picture.png"
    return run("padded_labels.py", "--out", str(picture)), picture.read_bytes()


@pytest.mark.cpu
def test_padded_labels(padded_labels: tuple[str, bytes]) -> None:
    """Both halves of the tutorial, each by hand and by a call, and the losses of the rows, as on the page."""
    output, _ = padded_labels
    assert output.count("= 2.5207") == 2
    assert output.count("1.8159") == 4
    rows = re.findall(r"^   row \d: (\d\.\d{4})", output, flags=re.MULTILINE)
    assert len(rows) == 8
    assert str(rows) in PAGE
    for losses in re.findall(r"tensor\(\[(.*)\]\), of which", output):
        assert str(losses.split(", ")) in PAGE


@pytest.mark.cpu
def test_the_picture_on_the_page_is_the_one_that_is_drawn(padded_labels: tuple[str, bytes]) -> None:
    """Of the same size, that is; fonts and colours are matplotlib's."""
    _, drawn = padded_labels
    assert f"]({PICTURE.name})" in PAGE
    assert drawn.startswith(PNG)
    size = slice(16, 24)  # width and height
    assert PICTURE.read_bytes()[size] == drawn[size]
    assert PICTURE.stat().st_size < 100_000
