"""The device build: a CMake project as it would be for CANN, built with ASCEND_HOME_PATH pointing at the toolkit."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cann_sim

CMAKE = """
cmake_minimum_required(VERSION 3.16)
project(user LANGUAGES CXX)
set(RUN_MODE "npu" CACHE STRING "")
set(SOC_VERSION "$ENV{SOC_VERSION}" CACHE STRING "")
set(ASCEND_CANN_PACKAGE_PATH $ENV{ASCEND_HOME_PATH} CACHE PATH "")
include(${ASCEND_CANN_PACKAGE_PATH}/@FOLDER@/tikcpp/ascendc_kernel_cmake/ascendc.cmake)
ascendc_library(kernels SHARED kernels/scale.cpp kernels/nothing.cpp)
ascendc_compile_definitions(kernels PRIVATE FACTOR=3 HAVE_WORKSPACE)
ascendc_include_directories(kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/include)
ascendc_compile_options(kernels PRIVATE -Wno-unused -O1 --cce-auto-sync=off
                        -forward-options-to-host-compiler -fno-math-errno)
add_executable(host main.cpp)
target_include_directories(host PRIVATE include)
target_link_libraries(host PRIVATE kernels)
"""
TILING = "struct Tiling {\n  unsigned count;\n  float shift;\n};\n"
SCALE = """
#include "kernel_operator.h"
#include "tiling.h"
using namespace AscendC;
extern "C" __global__ __aicore__ void scale(GM_ADDR x, GM_ADDR y, Tiling tiling, int32_t twice) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, tiling.count * sizeof(float));
  LocalTensor<float> tile = buffer.Get<float>();
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  DataCopy(tile, from, tiling.count);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  Muls(tile, tile, static_cast<float>(FACTOR * (twice ? 2 : 1)), tiling.count);
  PipeBarrier<PIPE_V>();
  Adds(tile, tile, tiling.shift, tiling.count);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopy(to, tile, tiling.count);
}
"""
NOTHING = '#include "kernel_operator.h"\nextern "C" __global__ __aicore__ void nothing() {}\n'
MAIN = """
#include <cstdio>
#include "tiling.h"
#include "aclrtlaunch_nothing.h"
#include "aclrtlaunch_scale.h"
#include "cann_sim/launch.h"
int main() {
  float x[8] = {0, 1, 2, 3, 4, 5, 6, 7}, y[8];
  cann_sim_register(x, sizeof(x), 1);
  cann_sim_register(y, sizeof(y), 0);
  Tiling tiling = {8, 0.5f};
  uint32_t failed = ACLRT_LAUNCH_KERNEL(scale)(1, nullptr, x, y, &tiling, 1);
  failed += ACLRT_LAUNCH_KERNEL(nothing)(4, nullptr);
  std::printf("%u %.1f", failed, y[7]);
  tiling.count = 16;
  return aclrtlaunch_scale(1, nullptr, x, y, &tiling, 0) != 0 ? 0 : 1;
}
"""


class Tiling(ctypes.Structure):
    """Tiling of the kernel `scale`."""

    _fields_ = (("count", ctypes.c_uint32), ("shift", ctypes.c_float))


def write_project(folder: Path, where: str = "tools") -> None:
    files = {
        "CMakeLists.txt": CMAKE.replace("@FOLDER@", where),
        "include/tiling.h": TILING,
        "kernels/scale.cpp": SCALE,
        "kernels/nothing.cpp": NOTHING,
        "main.cpp": MAIN,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def cmake(*arguments: object, soc: str = "Ascend910B3") -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).parent
    path = f"{beside}{os.pathsep}{os.environ['PATH']}"
    command = shutil.which("cmake", path=path)
    if command is None:
        pytest.skip("cmake is not installed")
    environment = {**os.environ, "PATH": path, "ASCEND_HOME_PATH": cann_sim.toolkit_path(), "SOC_VERSION": soc}
    return subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("where, generator", [("tools", "Unix Makefiles"), ("compiler", "Ninja")])
def test_a_project_builds_and_runs(tmp_path: Path, where: str, generator: str) -> None:
    if generator == "Ninja" and not (Path(sys.executable).parent / "ninja").exists() and shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    write_project(tmp_path, where)
    build, installed = tmp_path / "build", tmp_path / "out"
    for step in (
        ("-S", tmp_path, "-B", build, "-G", generator, f"-DCMAKE_INSTALL_PREFIX={installed}"),
        ("--build", build),
        ("--install", build),
    ):
        result = cmake(*step)
        assert result.returncode == 0, result.stdout + result.stderr

    result = subprocess.run([build / "host"], capture_output=True, text=True)
    assert result.stdout == "0 42.5"
    assert result.returncode == 0
    assert f"kernel scale, core 0, {tmp_path}/kernels/scale.cpp:13: gm-bounds" in result.stderr

    assert (installed / "include" / "kernels" / "aclrtlaunch_scale.h").exists()
    library = cann_sim.KernelLibrary(installed / "lib" / "libkernels.so")
    x, y = np.arange(8, dtype=np.float32), np.empty(8, np.float32)
    library.launch("scale", 1, x, cann_sim.Uninit(y), Tiling(8, 1), 0)
    assert (y == 3 * x + 1).all()


@pytest.mark.parametrize("soc, words", [("", "SOC_VERSION is not set"), ("Ascend310P3", "cann_sim models")])
def test_another_chip_is_refused(tmp_path: Path, soc: str, words: str) -> None:
    write_project(tmp_path)
    result = cmake("-S", tmp_path, "-B", tmp_path / "build", soc=soc)
    assert result.returncode != 0
    assert words in result.stderr


def test_version_says_that_it_is_simulated() -> None:
    """Also the line that builds record as the toolkit's version."""
    text = (Path(cann_sim.toolkit_path()) / "version.cfg").read_text()
    assert "cann_sim" in text
    assert f"version={cann_sim.__version__}-simulated" in text.splitlines()
