"""`make test` runs every suite, whatever fails in another one, and ends with a line for each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import run_suites

pytestmark = pytest.mark.cpu


def test_all_suites_run_and_are_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_good.py").write_text("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip()\n")
    (tmp_path / "test_bad.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")

    def suite(name: str, *command: str) -> tuple[Path, list[str], Path]:
        return tmp_path, [sys.executable, *command], tmp_path / f"{name}.xml"

    good, bad = ("-m", "pytest", "-q", "test_good.py"), ("-m", "pytest", "-q", "test_bad.py")
    crash = ("-c", "import os; os._exit(9)")
    commands = {"cpp": crash, "cpp_sanitized": good, "cpu": bad, "npu": good, "cann_sim": good}
    monkeypatch.setattr(run_suites, "SUITES", {name: suite(name, *command) for name, command in commands.items()})
    monkeypatch.setattr(run_suites, "LOGS", tmp_path / "logs")
    assert run_suites.main() == 1
    assert capsys.readouterr().out.split("== Summary\n")[1].splitlines() == [
        "cpp: exit code 9, and no report of the tests",
        "cpp_sanitized: 1 passed, 0 failed, 1 skipped",
        "cpu: 1 passed, 1 failed, 0 skipped",
        "npu: 1 passed, 0 failed, 1 skipped",
        "cann_sim: 1 passed, 0 failed, 1 skipped",
    ]
    monkeypatch.setattr(run_suites, "SUITES", {name: suite(name, *good) for name in commands})
    assert run_suites.main() == 0


def test_some_suites_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_good.py").write_text("def test_a(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "test_good.py"]
    named = ("cpp", "cann_sim_sanitized", "cpu", "npu", "cann_sim")
    suites = {name: (tmp_path, command, tmp_path / f"{name}.xml") for name in named}
    monkeypatch.setattr(run_suites, "SUITES", suites)
    monkeypatch.setattr(run_suites, "LOGS", tmp_path / "logs")
    for names in (["cpu"], ["npu"], ["cpu", "cann_sim"], ["cann_sim_sanitized"]):
        assert run_suites.main(*names) == 0
        summary = capsys.readouterr().out.split("== Summary\n")[1].splitlines()
        assert summary == [f"{name}: 1 passed, 0 failed, 0 skipped" for name in names]
    with pytest.raises(SystemExit, match="no such suite: gpu; there are cpp, cann_sim_sanitized, cpu, npu, cann_sim"):
        run_suites.main("gpu")
    assert run_suites.main() == 0  # all but those that run only if they are named
    assert "cann_sim_sanitized" not in capsys.readouterr().out
