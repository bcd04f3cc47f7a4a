"""Builds the extension with CMake against the torch that is installed. Metadata is in pyproject.toml.

Needs torch, cmake and ninja in the building environment: `pip install --no-build-isolation .`

The part for NPUs is also built if torch_npu is installed and ASCEND_HOME_PATH is set (by the toolkit's set_env.sh).
SOC_VERSION names the chips, one or several (`SOC_VERSION="ascend910b1;ascend910_9391"`); if unset, npu-smi is asked.
NPU_XENT_BUILD_NPU=0 leaves that part out; NPU_XENT_BUILD_NPU=1 makes it an error if it cannot be built.

NPU_XENT_LOCAL_VERSION=1 adds the torch and CANN releases that the extension is built against to its version, as
`make wheel` does.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

# With torch_npu installed but no CANN, `import torch` raises unless this is set.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

ROOT = Path(__file__).resolve().parent
PACKAGE = "npu_xent"


def load_module(name: str) -> ModuleType:
    """A module of npu_xent, loaded without importing the package, which is not built yet."""
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}{name}", ROOT / PACKAGE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_tool(name: str) -> str:
    """The path of a build tool, from this Python environment or else from PATH."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build {PACKAGE} and was not found: pip install {name}")
    return found


def check_compiler() -> None:
    """Report missing build dependencies before CMake does; its messages do not name the packages to install."""
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SystemExit(
            f"a C++ compiler is needed to build {PACKAGE} and was not found: apt-get install g++ (Debian and Ubuntu), "
            "or set CXX to its path"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise SystemExit(
            f"the headers of Python are needed to build {PACKAGE}, and there is no Python.h in {headers}: "
            "apt-get install python3-dev (Debian and Ubuntu)"
        )


@contextlib.contextmanager
def one_build_at_a_time() -> Iterator[None]:
    """Locks the build folders against concurrent builds."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / ".cmake.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def hidden_version(name: str) -> str | None:
    """The version of an installed package that pip hides from this isolated build, or None.

    pip puts the packages of an isolated build into a temporary folder at the front of sys.path.
    """
    if not any("pip-build-env-" in folder for folder in sys.path):
        return None
    folders = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    return next((found.version for found in importlib.metadata.distributions(name=name, path=folders)), None)


def torch_requirement() -> str:
    """The wheel's requirements: the torch release that it is built against, since it loads with no other.

    Any build of that release will do: CPU and CUDA builds have the same C++ interface. Without torch, the requirement
    is the range that the code supports. An sdist marks its requirement as dynamic.
    """
    try:
        version = importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "torch>=2.7.1"
    hidden = (hidden_version("torch") or version).partition("+")[0]
    if hidden != version:
        raise SystemExit(
            f"torch {hidden} is installed here, but this isolated build has got torch {version}, and what it builds "
            f"would replace yours. To keep torch {hidden}: pip install --no-build-isolation . (with cmake and ninja "
            f"installed). To have torch {version}: pip install torch=={version} first."
        )
    return f"torch=={version}"


def local_version(torch_version: str, npu: NpuPart | None) -> str:
    """The local version of a wheel: torch2.13.0.cpu, or torch2.13.0.cann8.5.0 with the part for NPUs.

    Letters and digits, separated by dots. It omits the chips: kernels built for one run on the whole family.
    """
    part = "cpu" if npu is None else f"cann{npu.toolkit_version or ''}"
    return re.sub(r"[^a-z0-9]+", ".", f"torch{torch_version.partition('+')[0]}.{part}".lower())


def release(version: str) -> str:
    """The version without its local part and post-releases: torch_npu 2.13.0.post1 goes with torch 2.13.0+cpu."""
    return re.match(r"[\d.]*\d", version)[0]


@dataclass(frozen=True)
class NpuPart:
    """The toolchain of the part for NPUs."""

    torch_npu: Path
    torch_npu_version: str
    toolkit: Path
    soc_versions: tuple[str, ...]

    @property
    def toolkit_version(self) -> str | None:
        """The toolkit's version, from its own files."""
        return load_module("_toolkit").version(self.toolkit)


def find_npu_part(torch_version: str) -> NpuPart | None:
    """The toolchain for NPUs; None, with a printed reason, if something is missing."""
    wanted = os.environ.get("NPU_XENT_BUILD_NPU", "")
    if wanted == "0":
        return None
    spec = importlib.util.find_spec("torch_npu")
    home = load_module("_toolkit").home()
    missing = [
        *(["torch_npu is not installed"] if spec is None else []),
        *(["ASCEND_HOME_PATH is not set (source the toolkit's set_env.sh)"] if not home else []),
    ]
    if home and spec is None and (hidden := hidden_version("torch_npu")):
        raise SystemExit(
            f"torch_npu {hidden} is installed, but pip hides it from an isolated build: pip install "
            "--no-build-isolation . (with torch, cmake and ninja installed), or set NPU_XENT_BUILD_NPU=0 to build "
            "without the part for NPUs"
        )
    if missing:
        text = f"{PACKAGE}: the part for NPUs is left out: {' and '.join(missing)}"
        if wanted == "1":
            raise SystemExit(f"NPU_XENT_BUILD_NPU=1, but {text}")
        print(text, flush=True)
        return None
    version = importlib.metadata.version("torch_npu")
    if release(version) != release(torch_version):
        raise SystemExit(
            f"torch_npu {version} goes with torch {release(version)}, but torch {torch_version} is installed: install "
            f"torch_npu=={release(torch_version)}, or set NPU_XENT_BUILD_NPU=0 to build without the part for NPUs"
        )
    soc = load_module("_soc")
    names = os.environ.get("SOC_VERSION") or soc.detect()
    if not names:
        raise SystemExit(
            "SOC_VERSION is not set and npu-smi does not tell which chip this is: set it (for instance "
            "SOC_VERSION=ascend910b1, or several: SOC_VERSION='ascend910b1;ascend910_9391'), or set "
            "NPU_XENT_BUILD_NPU=0 to build without the part for NPUs"
        )
    try:
        soc_versions = soc.parse_list(names)
    except ValueError as error:
        raise SystemExit(f"SOC_VERSION: {error}") from None
    return NpuPart(Path(spec.origin).parent, version, home.resolve(), soc_versions)


def bill_of_materials(version: str, torch_version: str, npu: NpuPart | None) -> dict[str, Any]:
    """What a wheel holds, as CycloneDX: this package, and the headers whose code is compiled into it.

    Libraries that are loaded at run time are not in the wheel; its requirements name them.
    """

    def component(name: str, version: str | None, license: str | None, **rest: str) -> dict[str, Any]:
        entry = {"type": "library", "bom-ref": name, "name": name, **({"version": version} if version else {}), **rest}
        return entry | ({"licenses": [{"license": {"id": license}}]} if license else {})

    def package(name: str, version: str, license: str) -> dict[str, Any]:
        # In a package URL, "+" is percent-encoded.
        purl = f"pkg:pypi/{name.replace('_', '-')}@{version.replace('+', '%2B')}"
        return component(name, version, license, purl=purl)

    held = [
        package("torch", torch_version, "BSD-3-Clause"),
        component("pybind11", None, "BSD-3-Clause", description="the release that torch contains"),
    ]
    if npu is not None:
        held.append(package("torch_npu", npu.torch_npu_version, "BSD-3-Clause"))
        held.append(component("CANN toolkit", npu.toolkit_version, None, description="Ascend C headers of the kernels"))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": package(PACKAGE, version, "Apache-2.0")},
        "components": held,
        "dependencies": [
            {"ref": PACKAGE, "dependsOn": [entry["bom-ref"] for entry in held]},
            *({"ref": entry["bom-ref"]} for entry in held),
        ],
    }


def remove_npu_part(folder: Path) -> None:
    """Remove an earlier build's part for NPUs, so that a build without it does not ship it."""
    shutil.rmtree(folder / "kernels", ignore_errors=True)
    for library in folder.glob("_npu.*so"):
        library.unlink()


class LabelledVersion(egg_info):
    """egg_info, with local_version() in the version if NPU_XENT_LOCAL_VERSION=1.

    Wheels of one release then have different names, and pip can select one by version, as for flash-attn and
    torchvision (2.8.3+cu12torch2.8, 0.28.0+cpu). A build tag would not be part of the installed version. It is not the
    default because pip refuses an sdist that builds another version than its own.
    """

    def finalize_options(self) -> None:
        """Append the local version."""
        if os.environ.get("NPU_XENT_LOCAL_VERSION") == "1":
            torch_version = importlib.metadata.version("torch")
            self.tag_build = "+" + local_version(torch_version, find_npu_part(torch_version))
        super().finalize_options()


class FreshBuildPy(build_py):
    """build_py into an empty folder: setuptools would also pack the files of an earlier build."""

    def run(self) -> None:
        """Empty the folder, then copy the package."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()


class DocumentedWheel(bdist_wheel):
    """bdist_wheel with a bill of materials in .dist-info/sboms, where PEP 770 puts it."""

    def write_wheelfile(self, wheelfile_base: str, **options: Any) -> None:
        """Write the bill of materials with the last file that setuptools writes into .dist-info."""
        super().write_wheelfile(wheelfile_base, **options)
        torch_version = importlib.metadata.version("torch")
        bill = bill_of_materials(self.distribution.get_version(), torch_version, find_npu_part(torch_version))
        path = Path(wheelfile_base, "sboms", f"{PACKAGE}.cdx.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(bill, indent=2) + "\n")


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; writes the libraries where setuptools expects the extensions."""

    npu: NpuPart | None = None

    def run(self) -> None:
        """Build, and for in-place builds copy the results into the source tree."""
        with one_build_at_a_time():
            super().run()

    def build_extensions(self) -> None:
        """Run CMake, once for all extensions, for the torch of this environment."""
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise SystemExit(
                f"{PACKAGE} is built against the torch it will run with, and torch cannot be imported ({error}). "
                "Install torch first, then: pip install --no-build-isolation ."
            ) from error

        check_compiler()
        self.npu = find_npu_part(torch.__version__)
        output = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).resolve().parent
        # One build folder per torch and Python, so that switching between them stays incremental.
        tag = f"torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
        output.mkdir(parents=True, exist_ok=True)
        remove_npu_part(output)
        if self.npu is not None:
            self.build_kernels(self.npu, output / "kernels")
        # Do not unset TORCH_NPU_DIR in a build without that part: removing the target would delete its objects.
        npu_options = [f"-DTORCH_NPU_DIR={self.npu.torch_npu}"] if self.npu else []
        self.run_cmake(
            ROOT,
            ROOT / "build" / tag,
            *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", *npu_options),
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DPYTHON_INCLUDE_DIR={sysconfig.get_path('include')}",
            f"-DEXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DNPU_XENT_OUTPUT_DIR={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            targets=("_C", "_npu") if self.npu else ("_C",),
        )
        self.write_record(output / "_build.py", torch.__version__)

    def build_kernels(self, npu: NpuPart, output: Path) -> None:
        """Build the device kernels, one library per chip, as a separate project: the toolkit sets up its compilers."""
        for soc in npu.soc_versions:
            version = re.sub(r"[^\w.-]", "-", npu.toolkit_version or "toolkit")
            build = ROOT / "build" / f"kernels-{soc}-{version}"
            # No rpath: importing torch_npu loads the toolkit's libraries before the kernels.
            definitions = (f"-DASCEND_HOME_PATH={npu.toolkit}", f"-DSOC_VERSION={soc}", "-DCMAKE_SKIP_RPATH=ON")
            # The toolkit's build reads files that only Makefile generators write.
            self.run_cmake(ROOT / "csrc" / "ascendc", build, "-G", "Unix Makefiles", *definitions)
            library = "libnpu_xent_kernels.so"
            built = max(build.rglob(library), key=lambda path: path.stat().st_mtime, default=None)
            if built is None:
                raise SystemExit(f"the toolkit at {npu.toolkit} has built no {library} under {build}")
            (output / soc).mkdir(parents=True)
            shutil.copy(built, output / soc / library)

    def run_cmake(self, source: Path, build: Path, *options: str, targets: tuple[str, ...] = ("all",)) -> None:
        """Configure, and build the targets."""
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run([find_tool("cmake"), "-S", source, "-B", build, *options], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([find_tool("cmake"), "--build", build, "--parallel", jobs, "--target", *targets], check=True)

    def write_record(self, path: Path, torch_version: str) -> None:
        """The record of the versions built against. It is read before loading a library, which may crash."""
        npu = self.npu
        path.write_text(
            '"""Written by the build: this version, and what the extension was compiled against."""\n\n'
            f'VERSION = "{self.get_finalized_command("egg_info").egg_version}"\n'
            f'TORCH_VERSION = "{torch_version}"\n'
            "# None: built without the part for NPUs.\n"
            f"TORCH_NPU_VERSION = {(npu.torch_npu_version if npu else None)!r}\n"
            f"CANN_VERSION = {(npu.toolkit_version if npu else None)!r}\n"
            f"SOC_VERSIONS = {(npu.soc_versions if npu else ())!r}\n"
        )

    def copy_extensions_to_source(self) -> None:
        """For in-place and editable builds: copy the record and the kernels next to the libraries."""
        built, source = Path(self.build_lib) / PACKAGE, ROOT / PACKAGE
        remove_npu_part(source)
        super().copy_extensions_to_source()
        shutil.copy(built / "_build.py", source / "_build.py")
        if self.npu is not None:
            shutil.copytree(built / "kernels", source / "kernels")


extensions = [
    Extension(f"{PACKAGE}._C", sources=[]),
    Extension(f"{PACKAGE}._npu", sources=[], optional=True),
]
setup(
    ext_modules=extensions,
    cmdclass={
        "bdist_wheel": DocumentedWheel,
        "build_ext": CMakeBuild,
        "build_py": FreshBuildPy,
        "egg_info": LabelledVersion,
    },
    install_requires=[torch_requirement()],
)
