"""The examples run as their users would run them, and need each of their synchronisations."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np

import cann_sim
from cann_sim.removal import removed_syncs, summary

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(example: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / example / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_softmax(tmp_path: Path) -> None:
    """Built through CMake; each type agrees with numpy; the timeline is drawn."""
    picture = tmp_path / "softmax.png"
    assert run("softmax", "--timeline", str(picture)).count("agree with numpy") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_layer_norm() -> None:
    assert run("layer_norm").count("agree with numpy") == 2


def test_every_synchronisation_of_the_softmax_is_needed() -> None:
    """Rows of several chunks: each site removed on its own is a race that the launch is refused for."""
    library = cann_sim.compile(EXAMPLES / "softmax" / "softmax_half.cpp")
    rows, cols, chunk = 4, 600, 128
    x = np.random.default_rng(0).normal(0, 4, (rows, cols)).astype(np.float16)

    def launch(config: cann_sim.Config) -> cann_sim.Report:
        tiling = (ctypes.c_uint32 * 3)(rows, cols, chunk)
        return library.launch("softmax_half", 2, x, cann_sim.Uninit(np.zeros_like(x)), bytes(tiling), config=config)

    removals = removed_syncs(launch)
    assert len(removals) >= 14
    assert all(removal.caught and removal.error.kind == "race" for removal in removals), summary(removals)
