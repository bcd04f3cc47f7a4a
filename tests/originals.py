"""Other packages that the tests compare with."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import pytest


def the_original(load: Callable[[], ModuleType]) -> ModuleType:
    """The module that `load` imports. If it cannot, the test fails in CI and is skipped elsewhere."""
    try:
        return load()
    except ImportError as error:
        reason = f"needs the original, which `make test` installs: {error}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
