"""Replaces torch_npu.npu_cross_entropy_loss for code that calls it."""

from __future__ import annotations

import functools
import importlib.util
import sys

import torch

from .._options import check_flags
from ..functional import npu_cross_entropy_loss
from ._patch import PatchHandle

_NAME = "npu_cross_entropy_loss"


def patch_torch_npu(
    *, strict: bool | None = None, loss_dtype: torch.dtype | None = None, need_log_prob: bool = True
) -> PatchHandle:
    """Replace torch_npu.npu_cross_entropy_loss with npu_xent.npu_cross_entropy_loss, for all callers::

        npu_xent.patch_torch_npu()              # from here on

        with npu_xent.patch_torch_npu():        # for a while
            ...

    Arguments and, by default, results stay the same as the vendor's. Code that imported the function earlier
    (`from torch_npu import npu_cross_entropy_loss`) keeps the function it imported. The operator
    torch.ops.npu.npu_cross_entropy_loss is not replaced.

    Args:
        strict: what happens to a call that only breaks a documented restriction of the vendor's. None computes it and
            warns, once for each restriction. True raises ConstraintError, so that calls that pass also run without the
            patch. False computes it without a warning.
        loss_dtype, need_log_prob: as for `npu_cross_entropy_loss`, in calls that do not pass them. loss_dtype
            torch.float32 gives callers with 16-bit logits a loss that is not rounded to 16 bits. need_log_prob=False
            saves memory and time if no caller uses log_prob, which then has shape [0].

    Returns:
        A handle, also a context manager, whose remove() undoes the patch. Patches nest: the latest one that has not
        been removed is in effect.

    Raises:
        RuntimeError: torch_npu has not been imported (npu_xent does not import it), is not installed, or has no such
            function.
    """
    check_flags("patch_torch_npu", strict=True if strict is None else strict, need_log_prob=need_log_prob)
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
    replacement = functools.partial(
        npu_cross_entropy_loss, strict=strict, loss_dtype=loss_dtype, need_log_prob=need_log_prob
    )
    return PatchHandle(module, _NAME, replacement)
