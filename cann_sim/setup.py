"""Builds the runtime library with CMake and puts it into the package's toolkit.

Beside it go the sources of what `python -m cann_sim` builds at first use, for the torch and torch_npu it finds then.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILT_AT_FIRST_USE = ("acl", "torch")


class BuildRuntime(build_py):
    """build_py, and the runtime library beside what it copied."""

    def run(self) -> None:
        """Copies the package, then builds toolkit/lib64/libcann_sim.so where it will be looked for."""
        super().run()
        package = ROOT / "cann_sim" if self.editable_mode else Path(self.build_lib).resolve() / "cann_sim"
        build = Path(self.get_finalized_command("build").build_temp).resolve() / "runtime"
        configure = ["-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DCANN_SIM_TOOLKIT={package / 'toolkit'}"]
        subprocess.run([*cmake(), *configure], check=True)
        subprocess.run([*cmake(), "--build", build], check=True)
        if not self.editable_mode:  # there they are found in src
            for part in BUILT_AT_FIRST_USE:
                folder, ignored = package / "toolkit" / "src" / part, shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / "src" / part, folder, ignore=ignored, dirs_exist_ok=True)


class BinaryDistribution(Distribution):
    """A wheel with a compiled library in it is for one platform."""

    def has_ext_modules(self) -> bool:
        """Yes: the runtime, though it is no extension module."""
        return True


def cmake() -> list[str]:
    """The cmake of this environment if it has one, else the one on the path."""
    beside = Path(sys.executable).parent / "cmake"
    return [str(beside)] if beside.exists() else ["cmake"]


setup(cmdclass={"build_py": BuildRuntime}, distclass=BinaryDistribution)
