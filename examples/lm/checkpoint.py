"""Checkpoints: files are written atomically, checked when loaded, and never overwrite another run's."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

FILES = ("checkpoint.pt", "metrics.csv", "summary.json", "loss.png")  # of a run, in its folder


class DamagedFile(Exception):
    """torch.load cannot load a file, or the file lacks an entry. The message is a short reason."""


def why_unwritable(folder: Path) -> str:
    """The reason why a folder, which need not exist, is not writable; "" if it is. Creates nothing."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces `path` atomically at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(path: Path, content: dict[str, Any]) -> None:
    """Raises OSError with the system's reason, such as a full disk; torch.save alone says "unexpected pos"."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Loads a dict written by save_atomically, tensors on the CPU. Raises DamagedFile, also if a name is missing."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # torch.load ignores the checksums
        content = None if wrong else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedFile(error.strerror or type(error).__name__) from error
    except Exception as error:  # a damaged file can raise anything, often with a long message
        raise DamagedFile(type(error).__name__) from error
    if wrong:
        raise DamagedFile("a checksum is wrong")
    if not isinstance(content, dict) or not set(names) <= set(content):
        raise DamagedFile("something is missing")
    return content


def storable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run inherits, in types that torch.load(weights_only=True) accepts."""
    kept = {name: value for name, value in settings.items() if name not in ("out", "resume")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def remove_leftovers(out: Path) -> None:
    """Removes the temporary files of a run that was killed while it wrote them."""
    for name in FILES:
        for leftover in out.glob(f"{name}.*.tmp"):
            leftover.unlink()


def set_earlier_run_aside(out: Path) -> list[str]:
    """Renames the files of an earlier run to previous-*, instead of overwriting them. Returns their names."""
    moved = [name for name in FILES if (out / name).exists()]
    for name in moved:
        os.replace(out / name, out / f"previous-{name}")
    return moved
