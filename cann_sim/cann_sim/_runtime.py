"""Paths, and the runtime library's C interface through ctypes (toolkit/include/cann_sim/launch.h)."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

TOOLKIT = Path(__file__).resolve().parent / "toolkit"
LIBRARY = TOOLKIT / "lib64" / "libcann_sim.so"
PROJECT = Path(__file__).resolve().parent.parent
SOURCES = PROJECT / "src"  # exists in a source tree, not in an installed package


class Site(ctypes.Structure):
    """A synchronisation site, as cann_sim_site."""

    _fields_ = (("kind", ctypes.c_char_p), ("file", ctypes.c_char_p), ("line", ctypes.c_int32))


class RunConfig(ctypes.Structure):
    """The configuration of this thread's launches, as cann_sim_config."""

    _fields_ = (
        ("check", ctypes.c_int32),
        ("trace_core", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("quiet", ctypes.c_int32),
        ("bandwidth_scale", ctypes.c_double),
        ("vector_scale", ctypes.c_double),
        ("scalar_scale", ctypes.c_double),
        ("removed", ctypes.POINTER(Site)),
        ("removed_count", ctypes.c_uint32),
    )


class Parameter(ctypes.Structure):
    """A kernel's parameter, as cann_sim_parameter."""

    _fields_ = (("kind", ctypes.c_char), ("bytes", ctypes.c_uint32))


def toolkit_path() -> str:
    """The folder to set ASCEND_HOME_PATH to."""
    _build_in_source_tree()
    return str(TOOLKIT)


def cache_folder() -> Path:
    """The cache folder for compiled kernels and the libraries of PyTorch programs."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cann_sim"
    return Path(os.environ.get("CANN_SIM_CACHE") or default)


@functools.cache
def runtime() -> ctypes.CDLL:
    """libcann_sim.so, with its functions declared."""
    _build_in_source_tree()
    if not LIBRARY.exists():
        raise ImportError(f"{LIBRARY} is missing: install cann_sim with pip")
    library = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    library.cann_sim_register.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)
    library.cann_sim_register.restype = ctypes.c_uint64
    library.cann_sim_unregister.argtypes = (ctypes.c_uint64,)
    library.cann_sim_unregister.restype = None
    library.cann_sim_configure.argtypes = (ctypes.POINTER(RunConfig),)
    library.cann_sim_configure.restype = None
    library.cann_sim_last_report.restype = ctypes.c_char_p
    library.cann_sim_last_error.restype = ctypes.c_char_p
    return library


@functools.cache
def _build_in_source_tree() -> None:
    """Builds the runtime with CMake if the package is used from a source tree with newer sources."""
    if not (SOURCES.is_dir() and (PROJECT / "CMakeLists.txt").is_file()):  # site-packages may have a folder src
        return
    LIBRARY.parent.mkdir(exist_ok=True)
    lock = os.open(LIBRARY.parent, os.O_RDONLY)  # one process builds, the others wait for it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current():
            build = str(PROJECT / "build" / "runtime")
            _cmake("-S", str(PROJECT), "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DCANN_SIM_TOOLKIT={TOOLKIT}")
            _cmake("--build", build)
            LIBRARY.touch()  # CMake does not relink if only a header changed that the runtime does not include
    finally:
        os.close(lock)


def _is_current() -> bool:
    inputs = [PROJECT / "CMakeLists.txt", *SOURCES.glob("*.[ch]*"), *(TOOLKIT / "include").rglob("*")]
    return LIBRARY.exists() and LIBRARY.stat().st_mtime >= max(path.stat().st_mtime for path in inputs)


def compiler_command() -> list[str]:
    """The compiler command in CXX, which may have several words ("ccache g++"); default: g++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def find_tool(name: str) -> str | None:
    """The path of a program in this environment or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _cmake(*arguments: str) -> None:
    command = find_tool("cmake")
    if command is None:
        raise ImportError(f"{LIBRARY.name} has to be built from {SOURCES} and there is no cmake: pip install cmake")
    result = subprocess.run([command, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise ImportError(f"building {LIBRARY.name} failed:\n{result.stdout}{result.stderr}")
