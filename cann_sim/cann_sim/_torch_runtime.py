"""The libraries that `python -m cann_sim` runs PyTorch on: the simulated AscendCL and npu operators on the host.

Both are compiled against the installed torch and torch_npu, at first use. They are cached in `CANN_SIM_CACHE` (default
~/.cache/cann_sim), keyed by everything they depend on.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._runtime import PROJECT, TOOLKIT, cache_folder, compiler_command, find_tool, runtime, toolkit_path

FIRST_LIBRARY = "libascendcl.so"  # the others only forward to it
BUILD_LOG = 40  # lines of a failed build to show
BEING_BUILT = ".building-"  # part of the name of a cache folder during its build


class SetupError(Exception):
    """PyTorch cannot run on the simulator in this environment. The message says what to install."""


@dataclass(frozen=True)
class Installed:
    """The torch and torch_npu of this environment, found without importing them."""

    torch: Path
    torch_version: str
    torch_npu: Path
    torch_npu_version: str


def installed() -> Installed:
    """Finds torch and torch_npu, and checks that their versions match and their requirements are installed."""
    torch, torch_npu = _package("torch"), _package("torch_npu")
    if torch is None:
        raise SetupError("torch is not installed: pip install torch torch_npu pyyaml numpy, of one version each")
    version = importlib.metadata.version("torch")
    wanted = _release(version)
    remedy = f"pip install torch_npu=={wanted} --no-deps && pip install pyyaml numpy"
    if torch_npu is None:
        raise SetupError(f"torch_npu is not installed, and torch is {version}: {remedy}")
    npu_version = importlib.metadata.version("torch_npu")
    if _release(npu_version) != wanted:
        raise SetupError(
            f"torch_npu {npu_version} is for torch {_release(npu_version)}, and torch is {version}: {remedy}"
        )
    missing = [name for name, module in (("pyyaml", "yaml"), ("numpy", "numpy")) if _package(module) is None]
    if missing:
        raise SetupError(f"torch_npu needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return Installed(torch, version, torch_npu, npu_version)


def build_ascendcl() -> Path:
    """The folder with libascendcl.so and the other CANN libraries that torch_npu links; built if missing."""
    found = installed()
    runtime()  # in a source tree, builds libcann_sim.so
    options = {
        "TORCH_NPU_DIR": found.torch_npu,
        "TORCH_LIB_DIR": found.torch / "lib",
        "CANN_SIM_TOOLKIT": TOOLKIT,
        "Python3_EXECUTABLE": sys.executable,
    }
    return _built("acl", found, options, "the simulated AscendCL")


def build_host_operators() -> Path:
    """The folder with cann_sim_torch.so; built if missing."""
    found = installed()
    options = {"TORCH_DIR": found.torch, "TORCH_NPU_DIR": found.torch_npu}
    return _built("torch", found, options, "the operators on the host")


def prepare() -> Callable[[], None]:
    """Enables this process and its children to import torch_npu; call it before importing torch.

    Returns a function that installs the operators after that import.
    """
    if "torch_npu" in sys.modules:
        raise SetupError("torch_npu was imported before the simulator: start the program with python -m cann_sim")
    libraries, operators = build_ascendcl(), build_host_operators() / "cann_sim_torch.so"
    for path in sorted(libraries.glob("*.so"), key=lambda path: path.name != FIRST_LIBRARY):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    os.environ.setdefault("ASCEND_HOME_PATH", toolkit_path())
    os.environ.setdefault("ASCEND_OPP_PATH", str(TOOLKIT / "opp"))  # torch_npu requires it if ASCEND_HOME_PATH is set
    # Disable autoloading: here the hook of __main__ imports torch_npu, and child processes, such as the many workers of
    # DataLoader, import it only if they use it. They find the libraries through LD_LIBRARY_PATH.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    before = os.environ.get("LD_LIBRARY_PATH")
    os.environ["LD_LIBRARY_PATH"] = f"{libraries}:{before}" if before else str(libraries)

    def install() -> None:
        import torch

        torch.ops.load_library(str(operators))
        torch.ops.cann_sim.install()
        _let_go_of_frames()

    return install


def _let_go_of_frames() -> None:
    """Clears tracebacks of import errors that torch_npu keeps for optional parts. They hold the frames of the importing
    program, and so would keep its tensors alive."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torch_npu":
            for value in list(vars(module).values()):
                error = value
                while isinstance(error, BaseException):
                    error.__traceback__ = None
                    error = error.__cause__ or error.__context__


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _release(version: str) -> str:
    match = re.match(r"\d+(\.\d+)*", version)
    return match.group() if match else version


def _sources(part: str) -> Path:
    """The C++ sources of a part: in the toolkit of an installed package, or in src of a source tree."""
    for folder in (TOOLKIT / "src" / part, PROJECT / "src" / part):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise SetupError(
        f"{TOOLKIT / 'src' / part} is missing: this installation of cann_sim is incomplete; install it again"
    )


def _built(part: str, found: Installed, options: dict[str, Any], what: str) -> Path:
    """Builds a part once in a cache folder, atomically; other processes wait for the build."""
    sources, cache = _sources(part), cache_folder()
    compiler = _compiler()
    key = _key(part, sources, found, options, compiler)
    folder = cache / f"{part}-{key}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_interrupted(cache)
        lock = _lock_file(cache, folder.name)
    except OSError as error:
        raise SetupError(f"{cache} cannot be written ({error}): name another folder in CANN_SIM_CACHE") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            versions = f"torch {found.torch_version} and torch_npu {found.torch_npu_version}"
            _say(f"building {what} for {versions}, once; this takes a minute or two ...")
            start = time.monotonic()
            with tempfile.TemporaryDirectory(dir=cache, prefix=folder.name + BEING_BUILT) as temporary:
                output = Path(temporary) / "out"
                output.mkdir()
                _compile(sources, Path(temporary) / "build", {**options, "OUTPUT_DIR": output}, compiler, what)
                output.rename(folder)
            _say(f"built in {time.monotonic() - start:.0f} s, kept in {folder}")
    finally:
        os.close(lock)
    return folder


def _lock_file(cache: Path, name: str) -> int:
    return os.open(cache / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o644)


def _remove_interrupted(cache: Path) -> None:
    """Removes the folders of killed builds, that is those whose lock is free."""
    for folder in cache.glob(f"*{BEING_BUILT}*"):
        lock = _lock_file(cache, folder.name.partition(BEING_BUILT)[0])
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # a build holds the lock
        finally:
            os.close(lock)


def _key(part: str, sources: Path, found: Installed, options: dict[str, Any], compiler: list[str]) -> str:
    headers = TOOLKIT / "include" / "cann_sim"
    files = sorted(path for folder in (sources, headers) for path in folder.rglob("*") if path.is_file())
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256()
    for text in (part, found, options, sysconfig.get_config_var("SOABI"), compiler, version):
        digest.update(f"{text}\0".encode())
    for path in files:
        if path.suffix != ".pyc":
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _compiler() -> list[str]:
    """The compiler command; raises SetupError if there is no such program."""
    words = compiler_command()
    if shutil.which(words[0]) is None:
        raise SetupError(
            f"{words[0]} is not there to build the simulated runtime: "
            "install g++ 11 or newer, or name a compiler in CXX"
        )
    return words


def _compile(sources: Path, build: Path, options: dict[str, Any], compiler: list[str], what: str) -> None:
    cmake = find_tool("cmake")
    if cmake is None:
        raise SetupError(f"cmake is not there to build {what}: pip install cmake")
    ninja = find_tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    given = [f"-D{name}={value}" for name, value in options.items()]
    configure = [cmake, "-S", sources, "-B", build, *generator, f"-DCMAKE_CXX_COMPILER={';'.join(compiler)}", *given]
    for command in (configure, [cmake, "--build", build, "--parallel", str(os.cpu_count() or 1)]):
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if result.returncode != 0:
            lines = (result.stdout + result.stderr).splitlines()
            first = next((number for number, line in enumerate(lines) if "error" in line.lower()), -BUILD_LOG)
            raise SetupError(f"building {what} failed:\n" + "\n".join(lines[first:][:BUILD_LOG]))


def _say(message: str) -> None:
    print(f"cann_sim: {message}", file=sys.stderr, flush=True)
