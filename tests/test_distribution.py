"""What is in an sdist and in a wheel, which version they have, what they require. Nothing is compiled."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
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
    *("CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md"),
    *("pyproject.toml", "setup.py"),
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
