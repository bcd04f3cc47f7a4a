"""Loads the compiled operators, or says in words why it cannot."""

from __future__ import annotations

import torch

_REBUILD = "Rebuild it: in a checkout of npu_xent, pip install --no-build-isolation --no-deps --force-reinstall ."


def _release(version: str) -> str:
    """The version without its local part: 2.13.0+cpu and 2.13.0+cu130 have the same C++ interface."""
    return version.partition("+")[0]


def check_torch(built: str, running: str) -> None:
    """Raise ImportError unless the extension was built for this torch, whose C++ interface differs between releases."""
    if _release(built) != _release(running):
        raise ImportError(
            f"npu_xent was built against torch {built}, but torch {running} is installed. {_REBUILD} "
            f"(or install torch=={_release(built)})."
        )


def load_operators() -> None:
    """Register torch.ops.npu_xent.

    Raises:
        ImportError: the extension was never built here, or was built against another torch.
    """
    try:
        from . import _build  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            "npu_xent has no compiled extension here. Build it with: pip install --no-build-isolation -e . "
            "(in a checkout; the import must not pick up a source folder that was never built)."
        ) from error
    check_torch(_build.TORCH_VERSION, torch.__version__)
    from . import _C  # noqa: F401
