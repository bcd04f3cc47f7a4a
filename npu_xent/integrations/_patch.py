"""Replaces a function in a module, and undoes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

_lock = threading.Lock()
_active: list[PatchHandle] = []  # all patches, in the order of creation


class PatchHandle:
    """A patch of a module's function. `remove()` or the end of a `with` statement undoes it."""

    def __init__(self, module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
        self._module, self._name, self._replacement = module, name, replacement
        with _lock:
            found: Callable[..., Any] = getattr(module, name)
            before = self._latest()
            # The patch that this one covers, or the function of the module or of other code.
            self._covers = before if before is not None and before._replacement is found else found
            _active.append(self)
            setattr(module, name, replacement)

    def remove(self) -> None:
        """Restore what the patch has replaced: an earlier patch that has not been removed, or else the function.

        Patches may be removed in any order, and more than once. If other code has replaced the function since, that
        replacement stays.
        """
        with _lock:
            if self not in _active:
                return
            latest = self._latest() is self
            _active.remove(self)
            for later in _active:
                if later._covers is self:
                    later._covers = self._covers
            if latest and getattr(self._module, self._name, None) is self._replacement:
                covered = self._covers
                setattr(self._module, self._name, getattr(covered, "_replacement", covered))

    def _latest(self) -> PatchHandle | None:
        """The latest active patch of the same function."""
        same = (p for p in reversed(_active) if p._module is self._module and p._name == self._name)
        return next(same, None)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
