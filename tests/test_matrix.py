"""`make matrix` tests one release after another, removes each environment, and fills a table."""

from __future__ import annotations

import subprocess
from pathlib import Path

import matrix
import pytest

pytestmark = pytest.mark.cpu

PAGE = """# A page

| torch | torch_npu | Python | compiler | build | CPU | simulated NPU |
|---|---|---|---|---|---|---|
| 2.8.0 | none | 3 | g++ | old | old | old |

More text.
"""
# What it is asked for goes into a file beside the clone; tests of torch 2.10.0 fail, and torch 2.9.0 does not build.
MAKEFILE = """
.venv/.%:
\t@echo "$@ $(TORCH) $(TORCH_NPU)" >>../asked
build build-npu:
\t@echo "$@ $(TORCH) $(TORCH_NPU)" >>../asked
\t@test $(TORCH) != torch==2.9.0
test:
\t@echo "test $(SUITES)" >>../asked
\t@echo "cpu: 3 passed, $(if $(filter %2.10.0,$(TORCH)),1,0) failed, 2 skipped"
\t@case "$(SUITES)" in *npu*) echo "npu: 4 passed, 0 failed, 0 skipped" ;; esac
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose make builds nothing."""
    for name in ("SUITES", "TORCH", "TORCH_NPU"):  # a make that runs this test may have been given them
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    (tmp_path / "page.md").write_text(PAGE)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "a"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    for name, value in (("ROOT", tmp_path), ("FOLDER", tmp_path / "build"), ("PAGE", tmp_path / "page.md")):
        monkeypatch.setattr(matrix, name, value)
    return tmp_path


def test_releases_become_rows(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main("2.10.0", "2.8.0", "2.9.0") == 2
    assert "Failed: 2.10.0 2.9.0" in capsys.readouterr().out
    lines = (repository / "page.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:7]]
    assert [row[0] for row in cells] == ["2.8.0", "2.9.0", "2.10.0"]
    assert [row[1] for row in cells] == ["none", "2.9.0.post9", "2.10.0.post7"]
    assert [row[4] for row in cells] == ["0 min 0 s", "failed", "0 min 0 s"]
    assert [row[5] for row in cells] == ["3 passed, 0 failed, 2 skipped", "not run", "3 passed, 1 failed, 2 skipped"]
    assert [row[6] for row in cells] == ["not run", "not run", "4 passed, 0 failed, 0 skipped"]
    assert lines[7:] == ["", "More text."]
    asked = (repository / "build" / "asked").read_text().splitlines()
    assert asked[-3:] == [
        ".venv/.test torch==2.9.0 torch_npu==2.9.0.post9",
        ".venv/.torch_npu torch==2.9.0 torch_npu==2.9.0.post9",
        "build-npu torch==2.9.0 torch_npu==2.9.0.post9",
    ]
    assert "test cpu npu" in asked
    assert "test cpu" in asked


def test_the_simulated_npu_can_be_left_out(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITES", "cpu")
    assert matrix.main("2.9.0", "2.12.0") == 1
    assert "npu" not in (repository / "build" / "asked").read_text()


def test_nothing_but_logs_and_the_table_is_left(repository: Path) -> None:
    matrix.main("2.8.0")
    assert sorted(path.name for path in (repository / "build").iterdir()) == ["2.8.0.log", "asked"]


def test_a_full_disk_is_told(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "SPACE", 2**70)
    with pytest.raises(SystemExit, match=r"GiB free, which torch 2\.8\.0 may need"):
        matrix.main("2.8.0")
