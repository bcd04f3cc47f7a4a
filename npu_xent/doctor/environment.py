"""Collects the environment of a run: machine, versions, build of the extension, environment variables."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

import npu_xent
from npu_xent import _C, _build, _soc, _toolkit

DRIVER = Path("/usr/local/Ascend/driver/version.info")
VARIABLES = re.compile(
    r"NPU_XENT_.*|ASCEND_.*|CANN_.*|ATEN_CPU_CAPABILITY|TORCH_DEVICE_BACKEND_AUTOLOAD|SOC_VERSION|OMP_NUM_THREADS"
    r"|TASK_QUEUE_ENABLE|PYTORCH_NPU_ALLOC_CONF|LD_LIBRARY_PATH"
)


def import_torch_npu() -> str | None:
    """Import torch_npu, which the kernels need. Returns the reason if no NPU is available, else None."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        torch_npu = importlib.import_module("torch_npu")
        count = torch_npu.npu.device_count()
    except Exception as error:  # a missing library, another torch, or any other cause: report it
        return f"torch_npu cannot be imported: {first_line(error)}"
    return None if count else "torch_npu sees no NPU"


def npu() -> Any:
    """Return torch.npu. torch_npu adds it, so torch's type stubs do not have it."""
    return torch.npu  # type: ignore[attr-defined]


def use_npu(device: str) -> str | None:
    """Make `device` the current device, which opens it. Returns the reason if that fails, else None."""
    try:
        npu().set_device(device)
    except Exception as error:  # a driver error, or another process has exclusive use
        return f"{device} cannot be used: {first_line(error)}"
    return None


def has_cann() -> bool:
    """Whether the environment names a CANN toolkit that is not a simulator's."""
    toolkit = _toolkit.home()
    return toolkit is not None and not _says_simulated(_toolkit.version(toolkit))


def gather() -> dict[str, Any]:
    """Return all values by name; unknown ones are None. Queries torch_npu only if it is already imported."""
    toolkit, npu_smi = _toolkit.home(), _soc.npu_smi("info")
    found: dict[str, Any] = {
        "system": f"{platform.platform()}, {_distribution()}",
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} CPUs",
        "python": f"{platform.python_version()} ({sys.executable})",
        "npu_xent": f"{npu_xent.__version__} ({Path(npu_xent.__file__).parent})",
        "torch": torch.__version__,
        "torch_npu": _installed("torch_npu"),
        "cann": _toolkit.version(toolkit) if toolkit else None,
        "cann_home": str(toolkit) if toolkit else None,
        "driver": _driver(npu_smi),
        "soc": None,
        "devices": 0,
        "built": {
            "version": _build.VERSION,
            "torch": _build.TORCH_VERSION,
            "torch_npu": getattr(_build, "TORCH_NPU_VERSION", None),
            "cann": getattr(_build, "CANN_VERSION", None),
            "soc": list(getattr(_build, "SOC_VERSIONS", ())),
            "compiler": _C.compiler,
        },
        "cpu_capability": _C.cpu_capability(),
        "compiled_cpu_capabilities": _C.compiled_cpu_capabilities(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if VARIABLES.fullmatch(name)},
        "npu_smi": npu_smi,
        "logs": os.environ.get("ASCEND_PROCESS_LOG_PATH") or os.path.expanduser("~/ascend/log"),
    }
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is not None and hasattr(torch_npu, "npu"):
        found["torch_npu"] = torch_npu.__version__
        with contextlib.suppress(Exception):  # use_npu reports a device that cannot be used
            found["devices"] = torch_npu.npu.device_count()
            found["soc"] = torch_npu.npu.get_device_name() if found["devices"] else None
    return found


def is_simulated(environment: dict[str, Any]) -> bool:
    """Whether the version of the running toolkit, or of the one at build time, names a simulator."""
    return any(map(_says_simulated, (environment["cann"], environment["built"]["cann"])))


def _says_simulated(version: str | None) -> bool:
    return "simulated" in (version or "")


def lines(environment: dict[str, Any]) -> list[str]:
    """Format the environment for people."""
    built = environment["built"]
    rows = {
        "system": environment["system"],
        "machine": environment["machine"],
        "python": environment["python"],
        "npu_xent": environment["npu_xent"],
        "torch": environment["torch"],
        "torch_npu": environment["torch_npu"] or "not installed",
        "CANN": f"{environment['cann'] or 'version not found'} ({environment['cann_home']})"
        if environment["cann_home"]
        else "ASCEND_HOME_PATH is not set",
        "driver": environment["driver"] or "not found",
        "NPUs": f"{environment['devices']} x {environment['soc']}" if environment["devices"] else "none",
        "built against": f"torch {built['torch']}, torch_npu {built['torch_npu']}, CANN {built['cann']}, "
        f"for {', '.join(built['soc']) or 'no NPU'}, by g++ {built['compiler']}",
        "CPU kernels": f"{environment['cpu_capability']}, of {environment['compiled_cpu_capabilities']}; "
        f"{environment['threads']} threads",
    }
    text = [f"  {name:<14} {value}" for name, value in rows.items()]
    return text + [f"  {name}={value}" for name, value in environment["variables"].items()]


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _installed(package: str) -> str | None:
    """Return a package's version, even if the package cannot be imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return "unknown distribution"


def _processor() -> str:
    """Read the processor from /proc/cpuinfo: "model name" on x86-64, numeric codes on Arm."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return "unknown processor"
    fields = dict(re.findall(r"^(model name|CPU implementer|CPU part)[ \t]*:[ \t]*(.*)$", text, re.MULTILINE))
    return fields.get("model name") or ", ".join(f"{name} {value}" for name, value in fields.items())


def _driver(npu_smi: str | None) -> str | None:
    """Return the driver's version from its own file, or else from npu-smi's output."""
    found = None
    with contextlib.suppress(OSError):  # a driver's files may be readable by one group only
        text = DRIVER.read_text(errors="replace")
        found = re.search(r"^[ \t]*Version[ \t]*=[ \t]*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    found = found or re.search(r"Version:\s*(\S+)", npu_smi or "")
    return found[1] if found else None
