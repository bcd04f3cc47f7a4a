"""The vendor's npu_cross_entropy_loss replaced where other code calls it."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..functional import npu_cross_entropy_loss

_NAME = "npu_cross_entropy_loss"

_lock = threading.Lock()
_active: list[PatchHandle] = []  # in the order in which they were made: the last one decides
_vendors: Any = None  # what stands below them


class PatchHandle:
    """A patch of torch_npu: `remove()` takes it back, and so does leaving a `with` statement."""

    def __init__(self, module: ModuleType, replacement: Callable[..., Any]) -> None:
        global _vendors
        self._module = module
        self._replacement = replacement
        with _lock:
            if not _active:
                _vendors = getattr(module, _NAME)
            _active.append(self)
            setattr(module, _NAME, replacement)

    def remove(self) -> None:
        """Bring back what was there before: an earlier patch that has not been removed, else the vendor's function.

        Patches may be removed in any order, and again. A function that other code has put there since stays.
        """
        with _lock:
            if self not in _active:
                return
            _active.remove(self)
            if getattr(self._module, _NAME, None) is self._replacement:
                setattr(self._module, _NAME, _active[-1]._replacement if _active else _vendors)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def patch_torch_npu(*, strict: bool = True) -> PatchHandle:
    """Put npu_xent.npu_cross_entropy_loss in the place of torch_npu.npu_cross_entropy_loss, for all who call it::

        npu_xent.patch_torch_npu()              # from here on

        with npu_xent.patch_torch_npu():        # for a while
            ...

    Arguments and results are the vendor's. Whoever looked the function up earlier (`from torch_npu import
    npu_cross_entropy_loss`) keeps the one that was there then; the operator torch.ops.npu.npu_cross_entropy_loss
    itself stays the vendor's.

    Args:
        strict: enforce the documented constraints, as `npu_cross_entropy_loss` does: what runs then also runs without
            the patch. False lifts the restrictions.

    Returns:
        A handle, also a context manager, whose remove() takes the patch back. Patches nest: the latest that is not
        removed decides.

    Raises:
        RuntimeError: torch_npu has not been imported (npu_xent does not do it by itself), is not installed, or has no
            such function.
    """
    module = sys.modules.get("torch_npu")
    if module is None:
        if importlib.util.find_spec("torch_npu") is None:
            raise RuntimeError(
                "npu_xent.patch_torch_npu: torch_npu is not installed, so there is nothing to patch; call "
                "npu_xent.npu_cross_entropy_loss, which needs no torch_npu"
            )
        raise RuntimeError("npu_xent.patch_torch_npu: torch_npu is not imported yet; import torch_npu first")
    if not hasattr(module, _NAME):
        raise RuntimeError(
            f"npu_xent.patch_torch_npu: torch_npu {module.__version__} has no {_NAME} to replace; call npu_xent.{_NAME}"
        )
    replacement = npu_cross_entropy_loss if strict else functools.partial(npu_cross_entropy_loss, strict=False)
    return PatchHandle(module, replacement)
