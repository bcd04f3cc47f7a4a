"""The short examples: what they print is right, and what docs/padded_labels.md says.

train_lm.py and train_tp.py have files of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_the_examples_of_the_vendors_page(device: torch.device, simulated: bool) -> None:
    """Both losses are torch's, the gradients float64's to 1e-6 of the largest entry, and three calls are refused."""
    launcher = ("-m", "cann_sim") if simulated else ()
    output = run("npu_cross_entropy_loss.py", "--device", str(device), launcher=launcher)
    torch.manual_seed(0)
    logits, target = torch.randn(4096, 8080), torch.arange(4096)
    for options in ({"reduction": "mean"}, {"reduction": "sum", "ignore_index": 100}):
        expected = torch.nn.functional.cross_entropy(logits.double(), target, **options)
        words = re.escape(" and ".join(f'{k} "{v}"' if isinstance(v, str) else f"{k} {v}" for k, v in options.items()))
        said = re.search(rf"{words}: the loss is (\S+)\n(.*?)\n\n", output, flags=re.DOTALL)
        assert said is not None
        assert float(said[1]) == pytest.approx(float(expected), rel=1e-5)
        lines = said[2].split("\n")
        table = [line.split() for line in lines[:5]]
        assert [row[0] for row in table] == ["loss", "log_prob", "zloss", "lse_for_zloss", "input.grad"]
        assert [row[1] for row in table] == ["[1]", "[4096,", "[0]", "[0]", "[4096,"]
        assert {row[-1] for row in table} == {"float32"}
        error, largest = (float(figure) for figure in re.findall(r"\d\.\de[+-]\d\d", lines[5]))
        assert 0 < error < 1e-6 * largest
    refused = re.findall(
        r"^Refused (\d): .*\n  npu_cross_entropy_loss: (.*), but it is (.*)\. Pass", output, re.MULTILINE
    )
    assert [number for number, _, _ in refused] == ["1", "2", "3"]
    assert [seen for _, _, seen in refused] == ["3", "torch.int32", "0.0001"]


@pytest.mark.cpu
def test_an_npu_that_is_not_there_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch_npu is installed and CANN is not."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    output = run("npu_cross_entropy_loss.py", "--device", "npu:1", code=2)
    assert output.count("\n") == 1
    said = (
        "--device npu:1: torch_npu cannot be imported (ImportError: libhccl.so: cannot open shared object file); use "
    )
    assert said + "--device cpu, or install torch_npu and CANN" in output
    assert "python -m cann_sim" in output


def test_checkpoints_are_read_with_weights_only() -> None:
    """A file from elsewhere must not run code when it is loaded."""
    sources = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "npu_xent").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    loads = [call for path in sources for call in re.findall(r"torch\.load\((?!weights_only)[^)]*", path.read_text())]
    assert loads
    assert [call for call in loads if "weights_only=True" not in call] == []
