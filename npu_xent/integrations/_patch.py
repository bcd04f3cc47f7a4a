"""Replaces functions in modules, and undoes it."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

_lock = threading.Lock()
_active: list[PatchHandle] = []  # all patches, in the order of creation
_removed: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # replacements that are: what they covered


def restored(value: Any) -> Any:
    """What to restore where a patch has found `value`: not the replacement of a patch that has been removed since."""
    while isinstance(value, FunctionType) and value in _removed:
        value = _removed[value]
    return value


def note_removed(replacement: Any, covered: Any) -> None:
    """Let `restored` know of a replacement that is removed."""
    if isinstance(replacement, FunctionType):
        _removed[replacement] = covered


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
                setattr(self._module, self._name, restored(getattr(covered, "_replacement", covered)))

    def _latest(self) -> PatchHandle | None:
        """The latest active patch of the same function."""
        same = (p for p in reversed(_active) if p._module is self._module and p._name == self._name)
        return next(same, None)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Replacement(NamedTuple):
    """What takes the place of a framework's function: make(the function).

    Names and order of its parameters must be `parameters`, or those and more (with defaults) after them. Those of a
    torch.autograd.Function, or of its apply, are those of its forward.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Callable[..., Any]], Callable[..., Any]]


class FrameworkPatch:
    """A patch of functions of a framework, in all its modules. `remove()` or the end of a `with` statement undoes it.

    A module that took a function with `from ... import` has a name of its own for it, which is replaced too, now and
    on removal, also in modules that are imported later.
    """

    def __init__(self, function: str, package: str, tried: str, replacements: Iterable[Replacement]) -> None:
        """Check all signatures, then patch.

        Args:
            function: the public function that patches, for messages.
            package: the framework's package. Names in its modules are replaced.
            tried: its versions that were tried, for messages.
            replacements: what to replace.

        Raises:
            RuntimeError: the package is not installed, or lacks a function, or has it with another signature.
        """
        self._package, self._handles = package, list[PatchHandle]()
        self._pairs: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = []
        for module, name, parameters, make in replacements:
            original = _original(function, package, tried, module, name, parameters)
            self._pairs.append((name, original, make(original)))
        for name, original, replacement in self._pairs:
            for loaded in self._modules():
                if loaded.__dict__.get(name) is original:
                    self._handles.append(PatchHandle(loaded, name, replacement))

    def remove(self) -> None:
        """Restore the functions, as PatchHandle.remove does."""
        if not self._handles:
            return
        for handle in reversed(self._handles):
            handle.remove()
        self._handles.clear()
        for name, original, replacement in self._pairs:
            note_removed(replacement, original)
            for module in self._modules():  # imported since
                if module.__dict__.get(name) is replacement:
                    setattr(module, name, restored(original))

    def _modules(self) -> list[ModuleType]:
        """The loaded modules of the package."""
        loaded = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == self._package]
        return [m for m in loaded if isinstance(m, ModuleType)]

    def __enter__(self) -> FrameworkPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _original(
    function: str, package: str, tried: str, module: str, name: str, parameters: tuple[str, ...]
) -> Callable[..., Any]:
    """The framework's function, of which the signature is as expected."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise RuntimeError(f"npu_xent.{function}: {package} is not installed, so there is nothing to patch") from None
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        found = None
    seen = None if found is None else tuple(_signature(found).parameters.values())
    extra = [p for p in seen[len(parameters) :] if p.default is p.empty and p.kind < p.VAR_POSITIONAL] if seen else []
    if found is None or seen is None or tuple(p.name for p in seen[: len(parameters)]) != parameters or extra:
        has = f"has no {module}.{name}" if seen is None else f"has {module}.{name}({', '.join(p.name for p in seen)})"
        raise RuntimeError(
            f"npu_xent.{function}: {package} {_version(module)} {has}, but this patch replaces "
            f"{name}({', '.join(parameters)}); it was tried with {package} {tried}. Install such a version, or call "
            "npu_xent's functions yourself"
        )
    return found


def _version(module: str) -> str:
    """The version that the outermost package around the module states: a namespace package states none."""
    parts = module.split(".")
    packages = (sys.modules.get(".".join(parts[:n])) for n in range(1, len(parts) + 1))
    return next((v for p in packages if (v := getattr(p, "__version__", None))), "of unknown version")


def _signature(found: Callable[..., Any]) -> inspect.Signature:
    """That of a function; of a torch.autograd.Function, and of its apply, that of its forward."""
    found = inspect.unwrap(found)
    owner = getattr(found, "__self__", found)
    return inspect.signature(getattr(owner, "forward", found) if isinstance(owner, type) else found)
