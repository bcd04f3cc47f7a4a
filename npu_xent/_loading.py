"""Loads the compiled operators and the NPU kernels; errors and warnings say why loading failed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ._constraints import is_fake

_INSTALL = "in a checkout of npu_xent, pip install --no-build-isolation --no-deps --force-reinstall ."
_REBUILD = f"Rebuild it: {_INSTALL}"

_DEVICE = "npu"
_FOLDER = Path(__file__).resolve().parent

_lock = threading.Lock()
_loaded = False
_settled = False  # loaded, or the warning about missing kernels was given: nothing left to do
_warned_of_capture = False


def _public(version: str) -> str:
    """Drop the local part of a version: pip can install the rest."""
    return version.partition("+")[0]


def _release(version: str) -> str:
    """Drop the local part and the post-release: 2.13.0+cpu and 2.13.0.post2 have the C++ interface of 2.13.0."""
    return _public(version).partition(".post")[0]


def check_torch(built: str, running: str) -> None:
    """Raise ImportError unless the extension was built for this torch: the C++ interface differs between releases."""
    if _release(built) != _release(running):
        raise ImportError(
            f"npu_xent was built against torch {built}, but torch {running} is installed. {_REBUILD} "
            f"(or install torch=={_public(built)})."
        )


def load_operators() -> None:
    """Register torch.ops.npu_xent, and the NPU kernels if torch_npu has already initialised its device.

    Raises:
        ImportError: the extension was never built here, or was built against another torch.
    """
    try:
        from . import _build
    except ImportError as error:
        raise ImportError(
            f"npu_xent has no compiled extension in {_FOLDER}. If it is installed already, Python has found a checkout "
            "before it: start from another folder. To use a checkout from its own folder, build it there: "
            "pip install --no-build-isolation -e ."
        ) from error
    check_torch(_build.TORCH_VERSION, torch.__version__)
    from . import _C  # noqa: F401

    _load_if_npu_is_at_work()


def load_npu() -> None:
    """Load the NPU kernels now, and raise if they cannot be loaded.

    The functions and modules of npu_xent load the kernels at their first npu tensor, and only warn if loading fails.
    Call load_npu if none of them runs first, such as for an exported program in a new process, or if training must not
    start without the kernels. torch_npu must have been imported; load_npu initialises its device. A second call does
    nothing.

    Raises:
        RuntimeError: npu_xent was built without its NPU part, for another torch_npu or another kind of NPU; torch_npu
            is not imported, or sees no NPU; or a library cannot be loaded. The message says what to do.
    """
    global _loaded, _settled
    with _lock:
        if not _loaded:
            _load_kernels()
            _loaded = _settled = True


def prepare(tensor: Tensor) -> None:
    """If `tensor` is the first npu tensor, load the NPU kernels, or warn that they are missing."""
    if not tensor.is_cpu and tensor.device.type == _DEVICE:  # is_cpu is the cheaper check
        if is_fake(tensor):
            _load_if_npu_is_at_work()  # a fake tensor runs no kernel: no device is initialised, no warning given
        else:
            _load_or_warn()


def _kernels_are_required() -> bool:
    """Whether NPU_XENT_REQUIRE_KERNELS makes missing kernels an error."""
    return os.environ.get("NPU_XENT_REQUIRE_KERNELS", "0") not in ("", "0")


def _load_or_warn() -> None:
    """Call load_npu at the first call; its error becomes a warning unless the kernels are required."""
    global _settled
    if _loaded or (_settled and not _kernels_are_required()):
        return
    if _is_capturing():
        _refuse_in_capture()
        return
    try:
        load_npu()
    except RuntimeError as error:
        if _kernels_are_required():
            raise _required(error) from error
        with _lock:
            first, _settled = not _settled, True
        if first:
            warnings.warn(
                f"{error} Until then npu tensors are served by PyTorch operations: the same results up to rounding, "
                "but more time and memory.",
                stacklevel=4,  # the caller of the public function
            )


def _is_capturing() -> bool:
    """Whether the current stream is being captured into a graph. Loading the kernels would then break the capture."""
    npu = getattr(sys.modules.get("torch_npu"), "npu", None)
    capturing = getattr(npu, "is_current_stream_capturing", None)
    return capturing is not None and capturing()


def _refuse_in_capture() -> None:
    """Warn at the first call in a graph capture, or raise if the kernels are required. A later call loads them."""
    global _warned_of_capture
    error = _missing(
        "the first npu tensor came while a graph was being captured, when they cannot be loaded. Call "
        "npu_xent.load_npu() before the capture."
    )
    if _kernels_are_required():
        raise _required(error)
    with _lock:
        first, _warned_of_capture = not _warned_of_capture, True
    if first:
        warnings.warn(
            f"{error} PyTorch operations are captured instead: the same results up to rounding, but more time and "
            "memory at every replay. Calls after the capture use the kernels.",
            stacklevel=5,  # the caller of the public function
        )


# The compiler calls this function instead of tracing it, so the kernels are loaded before the compiled code runs.
# torch.compiler.assume_constant_result sets the same attribute, but imports torch._dynamo, which takes a second.
_load_or_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load_if_npu_is_at_work() -> None:
    """Call load_npu if the program has already initialised the device. Errors are reported later."""
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is not None and hasattr(torch_npu, "npu") and torch_npu.npu.is_initialized() and not _is_capturing():
        with contextlib.suppress(RuntimeError):  # the first npu tensor will warn
            load_npu()


_load_if_npu_is_at_work._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _load_kernels() -> None:
    """Register the kernels that run on this NPU, or raise RuntimeError."""
    from . import _build, _soc

    built_with = getattr(_build, "TORCH_NPU_VERSION", None)
    cann = getattr(_build, "CANN_VERSION", None)
    socs = tuple(getattr(_build, "SOC_VERSIONS", ()))
    if built_with is None or not socs:
        raise _missing(
            "it was built without its NPU part. With torch_npu installed, source CANN's set_env.sh, which sets "
            f"ASCEND_HOME_PATH, and rebuild it: {_INSTALL.replace('pip', 'NPU_XENT_BUILD_NPU=1 pip', 1)}"
        )
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is None:
        raise _missing("torch_npu, whose device they run on, is not imported. Import torch_npu first.")
    if _release(built_with) != _release(torch_npu.__version__):
        raise _missing(
            f"it was built against torch_npu {built_with}, but torch_npu {torch_npu.__version__} is running. "
            f"{_REBUILD} (or install torch_npu=={_public(built_with)})."
        )
    if torch_npu.npu.device_count() == 0:
        raise _missing("torch_npu sees no NPU. Look at what npu-smi info and ASCEND_RT_VISIBLE_DEVICES say.")
    running = torch_npu.npu.get_device_name()
    soc = _soc.choose(running, socs)
    if soc is None:
        raise _missing(
            f"they were built for {', '.join(socs)}, but this device is {running}. They are written for Atlas A2 and "
            f"A3 alone: {', '.join(_soc.SUPPORTED)}."
        )
    path = _FOLDER / "kernels" / soc / "libnpu_xent_kernels.so"
    try:
        _share_runtime_symbols()
        importlib.import_module(f"{__package__}._npu").load(str(path))
    except (ImportError, OSError, RuntimeError) as error:
        raise _missing(
            f"a library of theirs cannot be loaded ({error}). Source CANN's set_env.sh before starting Python; they "
            f"were built with CANN {cann or 'of an unknown version'}, and {_INSTALL} builds them for another."
        ) from error


def _share_runtime_symbols() -> None:
    """Make the symbols of the toolkit's libraries visible to the kernels' library.

    The kernels' library calls their functions without always naming the libraries as dependencies, and torch_npu loads
    them with local visibility. Each release has a different set of these libraries.
    """
    for name in (
        "ascendcl",
        "acl_rt",
        "runtime",
        "profapi",
        "error_manager",
        "unified_dlog",
        "mmpa",
        "c_sec",
        "platform",
    ):
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"lib{name}.so", mode=ctypes.RTLD_GLOBAL)


def _missing(reason: str) -> RuntimeError:
    return RuntimeError(f"npu_xent's NPU kernels are not in use: {reason}")


def _required(error: RuntimeError) -> RuntimeError:
    return RuntimeError(f"{error} NPU_XENT_REQUIRE_KERNELS is set, which makes this an error.")
