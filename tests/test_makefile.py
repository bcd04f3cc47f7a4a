"""What `make` builds again and when, in a small checkout whose Python notes its calls and builds nothing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    *("csrc/ops.cpp", "csrc/ascendc/row_stats.cpp", "cmake/flags.cmake", "npu_xent/_soc.py", "npu_xent/_toolkit.py"),
    *("CMakeLists.txt", "setup.py", "pyproject.toml", "tests/aarch64_root"),
    *("cann_sim/src/core.cpp", "cann_sim/cann_sim/toolkit/include/kernel_operator.h"),
    *("cann_sim/CMakeLists.txt", "cann_sim/setup.py", "cann_sim/pyproject.toml"),
)
PYTHON = """#!/bin/sh
case "$*" in "-m pip "*) echo "$PIP_CONSTRAINT" >>constrained ;; esac
case "$*" in
  *sysconfig*) echo .venv ;;
  *--editable*) echo "begin $*" >>calls; [ -e fail ] && exit 1; sleep "$(cat seconds)"; echo "end $*" >>calls ;;
esac
"""
EXTENSION, SIMULATOR = "--editable .", "--editable ./cann_sim"

Make = Callable[..., subprocess.Popen]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """All that the Makefile names, and the Python of an environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv" / ".created").write_text("")
    (tmp_path / "seconds").write_text("0")
    return tmp_path


@pytest.fixture
def make(checkout: Path) -> Make:
    """Starts make there, as from a terminal: not as a part of the make that runs the tests."""

    def start(*arguments: str) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "TORCH"))}
        return subprocess.Popen(
            ["make", *arguments],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process: subprocess.Popen, code: int = 0) -> str:
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    return said


def builds(checkout: Path, what: str = EXTENSION) -> int:
    """How often `what` has been built."""
    calls = checkout / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return sum(line.startswith("end") and line.endswith(what) for line in lines)


def wait_for_a_build(checkout: Path) -> None:
    deadline = time.monotonic() + 30
    while not (checkout / "calls").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("target", ["build", "build-npu"])
def test_what_is_built_is_built_once(target: str, checkout: Path, make: Make) -> None:
    for _ in range(2):
        finish(make(target))
    assert builds(checkout) == 1
    finish(make("build"))  # the build for NPUs has the rest too
    assert builds(checkout) == 1


@pytest.mark.parametrize(
    "target, source",
    [
        *(("build", name) for name in ("csrc/ops.cpp", "CMakeLists.txt", "npu_xent/_soc.py")),
        *(("build-npu", name) for name in ("csrc/ops.cpp", "csrc/ascendc/row_stats.cpp", "cann_sim/src/core.cpp")),
        ("build-npu", "cann_sim/cann_sim/toolkit/include/kernel_operator.h"),
    ],
)
def test_an_edit_is_built(target: str, source: str, checkout: Path, make: Make) -> None:
    finish(make(target))
    (checkout / source).write_text("edited")
    finish(make(target))
    assert builds(checkout) == 2
    assert builds(checkout, SIMULATOR) == (0 if target == "build" else 2 if source.startswith("cann_sim") else 1)


@pytest.mark.parametrize("target", ["build", "build-npu"])
def test_an_edit_during_a_build_is_built(target: str, checkout: Path, make: Make) -> None:
    finish(make(target))
    (checkout / "csrc/ops.cpp").write_text("edited")
    (checkout / "calls").unlink()
    (checkout / "seconds").write_text("1")
    running = make(target)
    wait_for_a_build(checkout)
    (checkout / "csrc/ops.cpp").write_text("edited again")
    finish(running)
    assert builds(checkout) == 1
    (checkout / "seconds").write_text("0")
    for _ in range(2):
        finish(make(target))
    assert builds(checkout) == 2


def test_a_second_make_waits_and_finds_the_work_done(checkout: Path, make: Make) -> None:
    (checkout / "seconds").write_text("1")
    first = make("build")
    wait_for_a_build(checkout)
    second = make("build")
    assert "Waiting for another make in this folder" in finish(second)
    finish(first)
    assert builds(checkout) == 1


def test_a_build_that_failed_is_tried_again(checkout: Path, make: Make) -> None:
    (checkout / "fail").write_text("")
    assert "g++" not in finish(make("build"), 2)  # setup.py and CMake say what is missing, where something is
    (checkout / "fail").unlink()
    finish(make("build"))
    assert builds(checkout) == 1


def test_what_pip_installs_is_pinned() -> None:
    """In the Makefile or in constraints.txt; except torch, torch_npu, the newest frameworks, and uv, which pins."""
    installs = re.findall(r"\$\(PIP\) install ([^&|\n]*)", (ROOT / "Makefile").read_text().replace("\\\n", " "))
    words = {word for line in installs if "--no-build-isolation" not in line for word in shlex.split(line)}
    named = {
        re.match(r"[\w-]+", word)[0] for word in words if word[0] not in "-$" and "/" not in word and "==" not in word
    }
    assert named >= {"numpy", "setuptools", "pytest", "auditwheel", "uv"}
    pins = re.findall(r"^([\w-]+)==\d", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert named - {"uv"} <= set(pins)
    assert not {"torch", "torch_npu"} & set(pins)


@pytest.mark.parametrize("mine", ["", "/mine.txt "])
def test_pip_gets_the_pins(mine: str, checkout: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After those of the user, if any; and not for the newest frameworks."""
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    if mine:
        monkeypatch.setenv("PIP_CONSTRAINT", mine)
    finish(make("build-npu"))
    assert set((checkout / "constrained").read_text().splitlines()) == {f"{mine}{checkout / 'constraints.txt'}"}
    assert re.search(r"^PIP_CONSTRAINT= \S+ -m pip .* transformers ", finish(make("-n", "frameworks")), re.MULTILINE)


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="this Python is not the one that make sets up")
def test_the_environment_is_fit_for_plain_use() -> None:
    """torch_npu is installed there for the simulated NPU; without CANN it would make `import torch` raise."""
    plain = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    for program in (["-c", "import npu_xent"], ["-m", "npu_xent.doctor", "--help"]):
        run = subprocess.run([sys.executable, *program], cwd=ROOT, env=plain, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("target", ["test-cpp", "test-cpp-sanitized", "test-cpp-threads", "test-aarch64"])
def test_targets_that_need_no_more_install_torch(target: str, make: Make) -> None:
    assert "Installing torch==2.9.1 " in finish(make("--dry-run", target, "TORCH=torch==2.9.1"))


def test_wheels_for_arm_need_only_the_torch_for_arm(make: Make) -> None:
    said = finish(make("--dry-run", "wheel", "ARCH=aarch64"))
    assert "Installing torch==2.10.0 for aarch64" in said
    assert said.count("Installing torch") == 1
    assert "Installing torch==2.9.1 for aarch64" in finish(make("-n", "wheel", "ARCH=aarch64", "TORCH=torch==2.9.1"))
    assert "ARCH=arm64: wheels are" in finish(make("wheel", "ARCH=arm64"), 2)
