"""cann_sim: Ascend C kernels, compiled with g++ and run on the host, checked and timed.

    library = cann_sim.compile("add.cpp")
    report = library.launch("add", 8, x, y, cann_sim.Uninit(z), n)
    print(report.table())

A launch computes the kernel's result, proves that every schedule allowed by the documented orderings gives the same
result, counts the bytes moved, and estimates the time with a published cost model.
"""

from ._compile import CompileError, compile
from ._config import Config
from ._library import KernelError, KernelLibrary, Uninit, Workspace
from ._runtime import toolkit_path
from .removal import Removal, removed_syncs
from .report import CoreReport, Report

__version__ = "0.1.0"
__all__ = [
    "CompileError",
    "Config",
    "CoreReport",
    "KernelError",
    "KernelLibrary",
    "Removal",
    "Report",
    "Uninit",
    "Workspace",
    "compile",
    "removed_syncs",
    "toolkit_path",
]
