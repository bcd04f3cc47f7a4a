"""Names of Ascend SoCs: conversion to the toolkit's spelling, detection, and the choice of kernels for a SoC.

The build uses this module too, so it imports nothing from the package.
"""

from __future__ import annotations

import re
import subprocess

# Atlas A2 and A3, one family in the toolkit (dav-2201). Kernels read the number of cores at run time, so kernels built
# for one of these SoCs run on all of them.
SUPPORTED = (
    *("Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1"),
    *("Ascend910_9362", "Ascend910_9372", "Ascend910_9381", "Ascend910_9382", "Ascend910_9391", "Ascend910_9392"),
)


def canonical(name: str) -> str:
    """Return a SoC's name in the toolkit's spelling: Ascend910B1 for ascend910b1, 910b1 or ASCEND910B1.

    Raises:
        ValueError: npu_xent has no kernels for this SoC.
    """
    written = f"Ascend{name.strip().upper().removeprefix('ASCEND')}"
    if written not in SUPPORTED:
        raise ValueError(
            f"SoC {name.strip()!r} is not one that npu_xent has kernels for: {', '.join(SUPPORTED)} (Atlas A2 and A3)"
        )
    return written


def parse_list(text: str) -> tuple[str, ...]:
    """Split a list at commas, semicolons or spaces into canonical names without duplicates.

    Raises:
        ValueError: a name is not supported, or the list is empty.
    """
    names = tuple(dict.fromkeys(canonical(part) for part in re.split(r"[;,\s]+", text) if part))
    if not names:
        raise ValueError(f"no SoC in {text!r}")
    return names


def choose(running: str, built: tuple[str, ...]) -> str | None:
    """Choose, among the SoCs that kernels were built for, one whose kernels run on `running`; None if there is none."""
    try:
        wanted = canonical(running)
    except ValueError:
        return None
    return wanted if wanted in built else next(iter(built), None)


def detect() -> str | None:
    """The SoC of the first NPU that npu-smi reports, or None."""
    for line in (npu_smi("info", "-m") or "").splitlines():
        ids = re.match(r"\s*(\d+)\s+(\d+)\s+\d+\s", line)  # NPU, chip and logic id: controllers have no logic id
        if ids:
            return from_board(npu_smi("info", "-t", "board", "-i", ids[1], "-c", ids[2]) or "")
    return None


def from_board(report: str) -> str | None:
    """The SoC that `npu-smi info -t board` describes: "Chip Type" + "Chip Name" on A2, with "NPU Name" on A3."""
    fields = dict(
        re.findall(r"^[ \t]*(Chip Type|Chip Name|NPU Name)[ \t]*:[ \t]*(\S+)[ \t]*$", report, flags=re.MULTILINE)
    )
    chip, npu = fields.get("Chip Name", ""), fields.get("NPU Name")
    try:
        return canonical(f"{chip}_{npu}" if npu else chip)
    except ValueError:
        return None


def npu_smi(*arguments: str) -> str | None:
    """Return the output of npu-smi; None if it is not installed, fails, or does not answer."""
    try:
        command = ["npu-smi", *arguments]
        return subprocess.run(command, capture_output=True, errors="replace", timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
