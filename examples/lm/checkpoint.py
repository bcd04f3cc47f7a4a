"""Checkpoints, and how files are written and loaded: whole or not at all, and never over another run's."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


class DamagedFile(Exception):
    """A file that torch.load cannot load, or that lacks something. The message is the reason, in a few words."""


def why_unwritable(folder: Path) -> str:
    """Why files cannot be written in a folder, which need not exist; "" if they can. Creates nothing."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"


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


def load(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """What save_atomically wrote, with these names at least; tensors on the CPU. Raises DamagedFile."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # torch.load ignores the checksums
        content = None if wrong else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedFile(error.strerror or type(error).__name__) from error
    except Exception as error:  # whatever the damage leads to, in many words
        raise DamagedFile(type(error).__name__) from error
    if wrong:
        raise DamagedFile("a checksum is wrong")
    if not isinstance(content, dict) or not set(names) <= set(content):
        raise DamagedFile("something is missing")
    return content


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
