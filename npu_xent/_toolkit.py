"""The CANN toolkit: its folder and version.

The build uses this module too, so it imports nothing from the package.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def home() -> Path | None:
    """Return the folder that the toolkit's set_env.sh names; None if set_env.sh was not sourced."""
    folder = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return Path(folder) if folder else None


def version(toolkit: Path) -> str | None:
    """Read the version from the toolkit's files: `toolkit_running_version=[7.6.0.1.220:8.0.0]`, or `Version=8.0.0`."""
    for name in ("version.cfg", "compiler/version.info", "opp/version.info"):
        try:
            text = (toolkit / name).read_text(errors="replace")
        except OSError:  # missing, or no permission to read it
            continue
        # Not \s, which would read blank lines again from each of them.
        versions: dict[str, str] = dict(
            re.findall(r"^[ \t]*(\w*version)[ \t]*=[ \t]*\[?([^\s\],]+)", text.lower(), re.MULTILINE)
        )
        found = versions.get("toolkit_running_version") or next(iter(versions.values()), None)
        release = (found or "").rpartition(":")[2]  # the public release number follows an internal one
        if release:
            return release
    return None
