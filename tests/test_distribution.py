"""What is in an sdist and in a wheel, which version they have, what they require. Nothing is compiled."""

from __future__ import annotations

import ast
import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import torch

import npu_xent
from npu_xent import _build

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
IN_A_CHECKOUT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for the files")

# What builds in place leave beside the sources, and editors and interpreters anywhere.
PRODUCTS = (
    "npu_xent/_build.py",
    "npu_xent/_C.cpython-310-x86_64-linux-gnu.so",
    "npu_xent/_npu.cpython-310-x86_64-linux-gnu.so",
    "npu_xent/kernels/Ascend910B3/libnpu_xent_kernels.so",
    "npu_xent/__pycache__/old.cpython-310.pyc",
    "tests/__pycache__/old.cpython-310.pyc",
    "build/lib.linux-x86_64-cpython-310/npu_xent/_npu.cpython-310-x86_64-linux-gnu.so",
    "dist/npu_xent-0.0.1.tar.gz",
)
AT_THE_TOP = (
    *("CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "NOTICE", "README.md"),
    *("SECURITY.md", "pyproject.toml", "setup.py"),
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree in which all of PRODUCTS lie about."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "cann_sim", "*.so", "*.egg-info")
    copy = shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    for product in PRODUCTS:
        (copy / product).parent.mkdir(parents=True, exist_ok=True)
        (copy / product).write_text("")
    return copy


def setup(source: Path, *arguments: str, **variables: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NPU_XENT", "ASCEND", "SOC_", "PYTHON"))}
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    subprocess.run(command, cwd=source, env=environment | variables, check=True)


def version_in_pyproject() -> str:
    return re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def test_the_version_is_that_of_pyproject() -> None:
    assert npu_xent.__version__ == _build.VERSION
    assert _build.VERSION.partition("+")[0] == version_in_pyproject()


def test_the_changelog_is_of_this_version() -> None:
    newest = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == version_in_pyproject()


def test_kernels_of_an_earlier_build_are_no_package(source: Path) -> None:
    """A build without the NPU part removes them, and then setuptools must not look for them."""
    code = "from setuptools import Distribution as D; d = D(); d.parse_config_files(); print(*d.packages)"
    packages = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    found = packages.stdout.split()
    assert "npu_xent.compat" in found
    assert not [name for name in found if name.startswith("npu_xent.kernels")]


def metadata(source: Path, **variables: str) -> Message:
    setup(source, "egg_info", **variables)
    return email.message_from_string((source / "npu_xent.egg-info" / "PKG-INFO").read_text())


def test_the_metadata(source: Path) -> None:
    found = metadata(source)
    assert found["Version"] == version_in_pyproject()
    release = torch.__version__.partition("+")[0]
    assert [need for need in found.get_all("Requires-Dist") if "extra" not in need] == [f"torch=={release}"]


def test_the_local_version_is_there_when_asked_for(source: Path) -> None:
    release = torch.__version__.partition("+")[0]
    found = metadata(source, NPU_XENT_LOCAL_VERSION="1", NPU_XENT_BUILD_NPU="0")
    assert found["Version"] == f"{version_in_pyproject()}+torch{release}.cpu"


def test_the_package_imports_what_it_requires() -> None:
    """torch alone; torch_npu is looked for, and never needed."""
    for file in (ROOT / "npu_xent").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {*sys.stdlib_module_names, "torch", "torch_npu", "npu_xent"}, file


def sdist(source: Path) -> set[str]:
    setup(source, "sdist", "--dist-dir", str(source / "out"))
    (archive,) = (source / "out").iterdir()
    assert archive.name == f"npu_xent-{version_in_pyproject()}.tar.gz"
    with tarfile.open(archive) as opened:
        return {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}


@IN_A_CHECKOUT
def test_the_sdist_has_all_sources(source: Path) -> None:
    """Of every folder but cann_sim, which is a distribution of its own."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    tracked = [file for file in listed.split() if (ROOT / file).exists() and not file.startswith((".", "cann_sim/"))]
    wanted = {file for file in tracked if "/" in file or file in AT_THE_TOP}
    assert wanted >= {"csrc/ops.cpp", "cmake/CpuVariants.cmake", *AT_THE_TOP}
    assert wanted - sdist(source) == set()


def test_the_sdist_has_no_build_products(source: Path) -> None:
    files = sdist(source)
    assert files & set(PRODUCTS) == set()
    assert not [file for file in files if file.endswith((".so", ".pyc"))]


def test_a_wheel_has_no_build_products(source: Path) -> None:
    """Neither what a build in place has left beside the sources, nor what an earlier wheel has left in the folder."""
    output = source / "out"
    earlier = output / "npu_xent" / "removed_since.py"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("")
    setup(source, "build_py", "--build-lib", str(output))
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    kinds = ("*.py", "*.pyi", "py.typed")
    sources = {str(path.relative_to(source)) for kind in kinds for path in (source / "npu_xent").rglob(kind)}
    # _build.py is copied, and written anew by build_ext.
    assert files == sources
    assert files >= {"npu_xent/py.typed", "npu_xent/_C.pyi"}


@pytest.fixture
def repack() -> types.ModuleType:
    """.ci/repack.py, which make wheel ends with."""
    if not (ROOT / ".ci").exists():
        pytest.skip("an sdist has no .ci")
    spec = importlib.util.spec_from_file_location("repack", ROOT / ".ci" / "repack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack(folder: Path, files: dict[str, bytes], umask: int, when: int) -> tuple[Path, Path]:
    """An sdist and a wheel of the files, in their order, as built with this umask at this time."""
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o777 & ~umask)
        path.write_bytes(content)
        path.chmod((0o777 if name.endswith(".so") else 0o666) & ~umask)
        os.utime(path, (when, when))
    with tarfile.open(folder / "p-1.tar.gz", "w:gz") as sdist:
        for name in dict.fromkeys([*(name.partition("/")[0] for name in files), *files]):
            sdist.add(folder / name, name, recursive=False)
    with zipfile.ZipFile(folder / "p-1-py3-none-any.whl", "w") as wheel:
        for name in files:
            wheel.write(folder / name, name)
    return folder / "p-1.tar.gz", folder / "p-1-py3-none-any.whl"


def test_equal_contents_are_equal_archives(
    repack: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built by another user, in another folder, at another time, from files in another order."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    files = {"p/b.py": b"b", "p/_C.so": b"C", "p-1.dist-info/RECORD": b"R", "p-1.dist-info/METADATA": b"M"}
    one = pack(tmp_path / "one", files, 0o022, 1600000000)
    other = pack(tmp_path / "in_another_folder", dict(reversed(files.items())), 0o077, 1500000001)
    assert [path.read_bytes() for path in one] != [path.read_bytes() for path in other]
    repack.main(*map(str, one + other))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]

    (sdist, wheel) = one
    assert sdist.read_bytes()[3:8] == bytes(5)  # in the header of gzip, neither a file name nor a time
    with tarfile.open(sdist) as opened:
        members = {member.name: member for member in opened.getmembers()}
        assert {name: opened.extractfile(name).read() for name in files} == files
    assert list(members) == sorted(members)
    assert {member.mtime for member in members.values()} == {1700000000}
    assert {(member.uid, member.uname) for member in members.values()} == {(0, "")}
    assert [oct(members[name].mode) for name in ("p", "p/_C.so", "p/b.py")] == ["0o755", "0o755", "0o644"]
    with zipfile.ZipFile(wheel) as opened:
        assert opened.namelist() == ["p-1.dist-info/METADATA", "p/_C.so", "p/b.py", "p-1.dist-info/RECORD"]
        assert {name: opened.read(name) for name in files} == files
        modes = {entry.filename: oct(entry.external_attr >> 16) for entry in opened.infolist()}
    assert (modes["p/_C.so"], modes["p/b.py"]) == ("0o100755", "0o100644")


def test_libraries_do_not_name_the_folders_of_the_build() -> None:
    """Else two builds would differ; and a path in an rpath would name a folder that others may own."""
    package = Path(npu_xent.__file__).parent
    libraries = [*package.glob("*.so"), *package.glob("kernels/*/*.so")]
    assert [library for library in libraries if library.name.startswith("_C.")]
    for library in libraries:
        content = library.read_bytes()
        for folder in {ROOT, package.parent, Path(torch.__file__).parents[1], Path(sysconfig.get_path("purelib"))}:
            assert os.fsencode(folder) not in content, library
        if readelf := shutil.which("readelf"):
            entries = subprocess.run([readelf, "-d", library], check=True, capture_output=True, text=True).stdout
            assert "PATH)" not in entries, library  # RPATH, RUNPATH; an empty one is the current folder


@IN_A_CHECKOUT
def test_nothing_unpickles_or_evaluates() -> None:
    """SECURITY.md promises it of the package, the examples and the benchmarks."""
    for folder in ("npu_xent", "examples", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                    assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, file
                elif isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    assert called not in ("eval", "exec"), file
                    if called == "torch.load":
                        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                        assert arguments.get("weights_only") == "True", file
