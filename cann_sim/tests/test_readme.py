"""The README's example is complete: built by its own commands and run, it does what is said."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cann_sim

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("given_by", ["-D", "environment"])
def test_the_example_runs(tmp_path: Path, given_by: str) -> None:
    cmake = Path(sys.executable).parent / "cmake"
    command = str(cmake) if cmake.exists() else shutil.which("cmake")
    assert command, "no cmake"
    (tmp_path / "my_kernel.cpp").write_text(blocks("cpp")[0])
    (tmp_path / "CMakeLists.txt").write_text(blocks("cmake")[0])
    (tmp_path / "example.py").write_text("\n".join(blocks("python")))  # the launch, and the removals after it
    environment = {**os.environ, "ASCEND_HOME_PATH": cann_sim.toolkit_path()}
    environment.pop("SOC_VERSION", None)
    options = ["-DSOC_VERSION=Ascend910B3"] if given_by == "-D" else []
    if not options:
        environment["SOC_VERSION"] = "Ascend910B3"
    subprocess.run([command, "-B", "build", *options], cwd=tmp_path, env=environment, check=True)
    subprocess.run([command, "--build", "build"], cwd=tmp_path, env=environment, check=True)
    environment["PYTHONPATH"] = str(Path(cann_sim.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=environment, check=True, text=True, capture_output=True
    )
    assert "2 removed, 2 caught, 0 redundant" in run.stdout
    assert (tmp_path / "my_kernel.png").stat().st_size > 0
