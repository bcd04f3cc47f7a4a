"""Checkpoints, and how a file of a run is written: whole or not at all, and never over another run's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once written: nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What was saved, on the CPU: another device may go on with it."""
    return torch.load(path, map_location="cpu", weights_only=True)


def storable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a later run may take over, in types that torch.load takes for safe."""
    kept = {name: value for name, value in settings.items() if name not in ("out", "resume")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def set_earlier_run_aside(out: Path) -> list[str]:
    """Moves the files of a run that was not resumed to previous-*, for it may be wanted. Returns their names."""
    moved = [name for name in ("checkpoint.pt", "metrics.csv", "summary.json", "loss.png") if (out / name).exists()]
    for name in moved:
        os.replace(out / name, out / f"previous-{name}")
    return moved
