"""What setup.py finds out: the chips to build for, the toolkit, torch, what is missing. Nothing is built."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest
import setuptools

from npu_xent import _soc

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]

BOARD_A2 = """
        NPU ID                         : 0
        Chip ID                        : 0
        Chip Type                      : Ascend
        Chip Name                      : 910B4
"""
BOARD_A3 = """
        NPU ID                         : 0
        NPU Name                       : 9392
        Chip ID                        : 0
        Chip Name                      : Ascend910
"""
MAPPING = """
        NPU ID                         Chip ID                        Chip Logic ID                  Chip Name
        2                              1                              -                              Mcu
        2                              0                              0                              Ascend 910B4
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """setup.py as a module that sets nothing up, where torch_npu 2.13.0 and a toolkit seem to be installed."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("npu_xent_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look for it there
    spec.loader.exec_module(module)
    installed = types.SimpleNamespace(origin="/site/torch_npu/__init__.py")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed if name == "torch_npu" else find_spec(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0.post1")
    for name in ("ASCEND_TOOLKIT_HOME", "NPU_XENT_BUILD_NPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/toolkit")
    monkeypatch.setenv("SOC_VERSION", "ascend910b1")
    monkeypatch.setenv("PATH", "/nowhere")  # no npu-smi
    return module


def test_everything_is_there(build: types.ModuleType) -> None:
    npu = build.find_npu_part("2.13.0+cpu")
    assert npu.torch_npu == Path("/site/torch_npu")
    assert npu.torch_npu_version == "2.13.0.post1"
    assert npu.toolkit == Path("/toolkit")
    assert npu.soc_versions == ("Ascend910B1",)


@pytest.mark.parametrize(
    "missing, said",
    [
        ({"ASCEND_HOME_PATH": ""}, "ASCEND_HOME_PATH is not set"),
        ({"torch_npu": None}, "torch_npu is not installed"),
    ],
)
def test_what_is_missing_is_left_out_or_an_error(
    missing: dict[str, Any],
    said: str,
    build: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "torch_npu" in missing:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setenv("ASCEND_HOME_PATH", "")
    assert build.find_npu_part("2.13.0") is None
    assert f"the part for NPUs is left out: {said}" in capsys.readouterr().out
    monkeypatch.setenv("NPU_XENT_BUILD_NPU", "1")
    with pytest.raises(SystemExit, match=said):
        build.find_npu_part("2.13.0")
    monkeypatch.setenv("NPU_XENT_BUILD_NPU", "0")
    assert build.find_npu_part("2.13.0") is None
    assert capsys.readouterr().out == ""


def test_another_torch_is_refused(build: types.ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"torch_npu 2\.13\.0\.post1 goes with torch 2\.13\.0, but torch 2\.12\.1 is"):
        build.find_npu_part("2.12.1")


@pytest.mark.parametrize(
    "text", ["ascend910b1;ascend910_9391", " Ascend910B1, ASCEND910_9391 ", "910b1 910_9391 910B1"]
)
def test_chips_as_users_write_them(text: str, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOC_VERSION", text)
    assert build.find_npu_part("2.13.0").soc_versions == ("Ascend910B1", "Ascend910_9391")


@pytest.mark.parametrize("text", ["ascend310p3", "910", "Ascend910B5", "Ascend910_9999", "Ascend910_93", "a;b"])
def test_chips_without_kernels(text: str, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOC_VERSION", text)
    with pytest.raises(SystemExit, match=r"is not one that npu_xent has kernels for: Ascend910B1, .* Ascend910_9392"):
        build.find_npu_part("2.13.0")


def test_a_chip_that_nobody_tells(build: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOC_VERSION")
    with pytest.raises(SystemExit, match="SOC_VERSION is not set and npu-smi does not tell which chip this is"):
        build.find_npu_part("2.13.0")


@pytest.mark.parametrize("board, soc", [(BOARD_A2, "Ascend910B4"), (BOARD_A3, "Ascend910_9392")])
def test_npu_smi_is_asked(board: str, soc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first line that is a processor's, not a controller's."""
    tool = tmp_path / "npu-smi"
    tool.write_text(
        "#!/bin/bash\n"
        f"if [ \"$*\" = 'info -m' ]; then echo '{MAPPING}'; "
        f"elif [ \"$*\" = 'info -t board -i 2 -c 0' ]; then echo '{board}'; else exit 1; fi\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert _soc.detect() == soc


@pytest.mark.parametrize("report", ["", "Chip Name : 310P3", "Chip Type : Ascend"])
def test_boards_without_kernels(report: str) -> None:
    assert _soc.from_board(report) is None


@pytest.mark.parametrize(
    "file, text, version",
    [
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.6.0.1.220:8.0.0]\n"
         "toolkit_running_version=[7.6.0.1.220:8.0.1]\n", "8.0.1"),
        ("version.cfg", "kind=simulated\nversion=0.1.0-simulated\n", "0.1.0-simulated"),
        ("compiler/version.info", "Version=8.5.0\nversion_dir=8.5.0\n", "8.5.0"),
        ("other", "version=1", None),
    ],
)  # fmt: skip
def test_the_toolkit_tells_its_version(
    file: str, text: str, version: str | None, build: types.ModuleType, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert build.NpuPart(tmp_path, "2.13.0", tmp_path, ("Ascend910B1",)).toolkit_version == version


@pytest.mark.parametrize(
    "toolkit, label",
    [
        (None, "torch2.13.0.cpu"),
        ("8.5.0", "torch2.13.0.cann8.5.0"),
        ("0.1.0-simulated", "torch2.13.0.cann0.1.0.simulated"),
        ("8.5.RC1", "torch2.13.0.cann8.5.rc1"),
    ],
)
def test_wheels_are_told_apart(toolkit: str | None, label: str, build: types.ModuleType, tmp_path: Path) -> None:
    npu = None
    if toolkit is not None:
        (tmp_path / "version.cfg").write_text(f"version={toolkit}\n")
        npu = build.NpuPart(tmp_path, "2.13.0", tmp_path, ("Ascend910B1",))
    assert build.local_version("2.13.0+cpu", npu) == label


def test_the_bill_of_materials(build: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "version.cfg").write_text("version=8.5.0\n")
    npu = build.NpuPart(tmp_path, "2.13.0.post1", tmp_path, ("Ascend910B1",))
    bill = build.bill_of_materials("0.1.0+torch2.13.0.cann8.5.0", "2.13.0+cpu", npu)
    assert (bill["bomFormat"], bill["metadata"]["component"]["purl"]) == (
        "CycloneDX",
        "pkg:pypi/npu-xent@0.1.0%2Btorch2.13.0.cann8.5.0",
    )
    versions = {"torch": "2.13.0+cpu", "pybind11": None, "torch_npu": "2.13.0.post1", "CANN toolkit": "8.5.0"}
    assert {entry["name"]: entry.get("version") for entry in bill["components"]} == versions
    assert bill["dependencies"][0] == {"ref": "npu_xent", "dependsOn": list(versions)}
    assert {entry["ref"] for entry in bill["dependencies"]} == {"npu_xent", *versions}

    on_cpu = build.bill_of_materials("0.1.0", "2.13.0", None)
    assert [entry["name"] for entry in on_cpu["components"]] == ["torch", "pybind11"]


def test_a_wheel_gets_the_bill_of_materials(
    build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPU_XENT_BUILD_NPU", "0")
    wheel = build.DocumentedWheel(setuptools.Distribution({"name": "npu_xent", "version": "0.1.0"}))
    monkeypatch.setattr(wheel, "get_tag", lambda: ("cp311", "cp311", "linux_x86_64"))
    wheel.ensure_finalized()
    wheel.write_wheelfile(str(tmp_path))
    bill = json.loads((tmp_path / "sboms" / "npu_xent.cdx.json").read_text())
    assert bill == build.bill_of_materials("0.1.0", importlib.metadata.version("torch"), None)
    assert "Root-Is-Purelib" in (tmp_path / "WHEEL").read_text()


@pytest.mark.parametrize("version", ["2.13.0", "2.14.0.dev20261101"])
def test_the_torch_built_against_is_required(
    version: str, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{version}+cu130")
    assert build.torch_requirement() == f"torch=={version}"


def test_without_torch_the_oldest_is_required(build: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert build.torch_requirement() == "torch>=2.7.1"


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is installed, where pip builds in isolation and lets a build see other packages."""
    monkeypatch.syspath_prepend(str(tmp_path / "pip-build-env-x1y2z3" / "overlay" / "site-packages"))
    installed = tmp_path / "site-packages"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(installed))
    return installed


def install(name: str, version: str, folder: Path) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_isolated_build_does_not_replace_torch(
    isolated: Path, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.14.1")
    assert build.torch_requirement() == "torch==2.14.1"  # none is there
    install("torch", "2.13.0+cpu", isolated)
    with pytest.raises(
        SystemExit, match=r"torch 2\.13\.0 is installed .* To keep .*--no-build-isolation \. .*==2\.14\.1"
    ):
        build.torch_requirement()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cu130")
    assert build.torch_requirement() == "torch==2.13.0"


def test_an_isolated_build_does_not_leave_the_npu_part_out_unsaid(
    isolated: Path, build: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert build.find_npu_part("2.13.0") is None
    install("torch_npu", "2.13.0.post1", isolated)
    with pytest.raises(SystemExit, match=r"torch_npu 2\.13\.0\.post1 is installed, but pip hides it .*--no-build-isol"):
        build.find_npu_part("2.13.0")
    monkeypatch.setenv("NPU_XENT_BUILD_NPU", "0")
    assert build.find_npu_part("2.13.0") is None


def test_a_compiler_that_is_missing_is_said_before_anything_is_built(
    build: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture's PATH has none."""
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"a C\+\+ compiler is needed .* apt-get install g\+\+ .*, or set CXX"):
        build.check_compiler()
    monkeypatch.setenv("CXX", "/opt/bin/g++-11")
    build.check_compiler()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere/include")
    with pytest.raises(SystemExit, match=r"no Python\.h in /nowhere/include: apt-get install python3-dev"):
        build.check_compiler()


def test_cmake_by_hand_says_to_use_setup_py(build: types.ModuleType, tmp_path: Path) -> None:
    command = [build.find_tool("cmake"), "-S", ROOT, "-B", tmp_path]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert "run setup.py instead, with pip install --no-build-isolation ." in " ".join(said.split())


def test_builds_wait_for_one_another(build: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    lock = tmp_path / "build" / ".cmake.lock"
    with build.one_build_at_a_time(), lock.open() as second, pytest.raises(BlockingIOError):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open() as second:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
