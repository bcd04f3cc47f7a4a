"""The tests run against the package beside them when cann_sim is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("cann_sim") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
