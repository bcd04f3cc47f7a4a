"""Replaces torch_npu.npu_cross_entropy_loss for code that calls it."""

from __future__ import annotations

import functools
import importlib.util
import sys

from ..functional import npu_cross_entropy_loss
from ._patch import PatchHandle

_NAME = "npu_cross_entropy_loss"


def patch_torch_npu(*, strict: bool = True) -> PatchHandle:
    """Replace torch_npu.npu_cross_entropy_loss with npu_xent.npu_cross_entropy_loss, for all callers::

        npu_xent.patch_torch_npu()              # from here on

        with npu_xent.patch_torch_npu():        # for a while
            ...

    Arguments and results stay the same as the vendor's. Code that imported the function earlier (`from torch_npu import
    npu_cross_entropy_loss`) keeps the function it imported. The operator torch.ops.npu.npu_cross_entropy_loss is not
    replaced.

    Args:
        strict: enforce the documented constraints, as `npu_cross_entropy_loss` does, so that the same calls also run
            without the patch. False lifts the vendor's restrictions.

    Returns:
        A handle, also a context manager, whose remove() undoes the patch. Patches nest: the latest one that has not
        been removed is in effect.

    Raises:
        RuntimeError: torch_npu has not been imported (npu_xent does not import it), is not installed, or has no such
            function.
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
    return PatchHandle(module, _NAME, replacement)
