"""The CANN toolkit: where it is, and which version.

Used by the build as well, so it imports nothing of the package.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def home() -> Path | None:
    """The folder that the toolkit's set_env.sh names; None if it was not sourced."""
    folder = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return Path(folder) if folder else None


def version(toolkit: Path) -> str | None:
    """As the toolkit's own files tell it: `toolkit_running_version=[7.6.0.1.220:8.0.0]`, or `Version=8.0.0`."""
    for name in ("version.cfg", "compiler/version.info", "opp/version.info"):
        try:
            text = (toolkit / name).read_text(errors="replace")
        except OSError:  # it is not there, or not for everybody to read
            continue
        versions: dict[str, str] = dict(
            re.findall(r"^\s*(\w*version)\s*=\s*\[?([^\s\],]+)", text.lower(), re.MULTILINE)
        )
        found = versions.get("toolkit_running_version") or next(iter(versions.values()), None)
        if found:
            return found.rpartition(":")[2]  # the release's own number, after an internal one
    return None
