"""Builds the extension with CMake against the torch that is installed. Metadata is in pyproject.toml.

Needs torch, cmake and ninja in the building environment: `pip install --no-build-isolation .`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# With torch_npu installed and no CANN in sight, `import torch` raises unless this is set.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

ROOT = Path(__file__).resolve().parent
PACKAGE = "npu_xent"


def find_tool(name: str) -> str:
    """The path of a build tool: the one of this Python environment, else the one on PATH."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build {PACKAGE} and was not found: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; the library lands where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        """Run CMake for the torch of this environment."""
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise SystemExit(
                f"{PACKAGE} is built against the torch it will run with, and torch cannot be imported ({error}). "
                "Install torch first, then: pip install --no-build-isolation ."
            ) from error

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder for each torch and Python, so that going back and forth stays incremental.
        tag = f"torch{torch.__version__}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / tag
        build.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        configure = [
            find_tool("cmake"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DPYTHON_INCLUDE_DIR={sysconfig.get_path('include')}",
            f"-DEXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DNPU_XENT_OUTPUT_DIR={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([find_tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)
        # Read before the library is loaded: against another torch, loading it would fail with a missing symbol.
        (output / "_build.py").write_text(
            '"""Written by the build: this version, and the torch that the extension was compiled against."""\n\n'
            f'VERSION = "{self.distribution.get_version()}"\n'
            f'TORCH_VERSION = "{torch.__version__}"\n'
        )

    def copy_extensions_to_source(self) -> None:
        """In place and editable builds: the build record goes where the library goes."""
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / PACKAGE / "_build.py", ROOT / PACKAGE / "_build.py")


setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
