"""A kernel library and its launches: arguments in, report or error out."""

from __future__ import annotations

import ctypes
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._config import Config
from ._runtime import Parameter, RunConfig, Site, runtime
from .report import CoreReport, Event, Report, SyncSite

# Keyed by a parameter's kind and size in bytes.
SCALARS = {
    ("i", 1): ctypes.c_int8,
    ("i", 2): ctypes.c_int16,
    ("i", 4): ctypes.c_int32,
    ("i", 8): ctypes.c_int64,
    ("u", 1): ctypes.c_uint8,
    ("u", 2): ctypes.c_uint16,
    ("u", 4): ctypes.c_uint32,
    ("u", 8): ctypes.c_uint64,
    ("f", 4): ctypes.c_float,
    ("f", 8): ctypes.c_double,
}


class KernelError(Exception):
    """A kernel broke a rule. `kind` is a short slug of the rule, `file` and `line` the place, `message` the details."""

    def __init__(self, kind: str, kernel: str, core: int, file: str, line: int, message: str) -> None:
        self.kind, self.kernel, self.core, self.file, self.line, self.message = kind, kernel, core, file, line, message
        place = f", {file}:{line}" if file else ""
        super().__init__(f"kernel {kernel}, core {core}{place}: {kind}: {message}")

    def __reduce__(self) -> Any:
        return KernelError, (self.kind, self.kernel, self.core, self.file, self.line, self.message)


class Uninit:
    """An array that counts as uninitialized, as outputs do: reading it before writing is an error."""

    def __init__(self, array: Any) -> None:
        self.array = array


class Workspace:
    """Uninitialized device memory that is allocated for the launch."""

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"a workspace of {nbytes} bytes")
        self.nbytes = nbytes
        self.memory = ctypes.create_string_buffer(b"\xff" * (nbytes + 64), nbytes + 64)
        self.address = (ctypes.addressof(self.memory) + 63) // 64 * 64


class KernelLibrary:
    """A shared library of kernels, built by `ascendc_library` or `cann_sim.compile`."""

    _sites: dict[tuple[str, str], list[tuple[str, str, int]]] = {}  # noqa: RUF012  # by library and kernel, in order
    _sites_lock = threading.Lock()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()
        self._runtime = runtime()
        self._library = ctypes.CDLL(str(self.path))
        if not self.kernels():
            raise ValueError(
                f"{self.path} has no kernels: a library that ascendc_library or cann_sim.compile built is wanted"
            )

    def __repr__(self) -> str:
        return f"KernelLibrary({str(self.path)!r})"

    def kernels(self) -> list[str]:
        """Names of the kernels whose launchers the library defines or imports."""
        names = {name.decode() for name in re.findall(rb"(?<=\0aclrtlaunch_)\w+(?=\0)", self.path.read_bytes())}
        return sorted(name for name in names if hasattr(self._library, f"cann_sim_parameters_{name}"))

    def parameters(self, kernel: str) -> list[tuple[str, int]]:
        """Kind ('p', 'i', 'u', 'f', 's') and size in bytes of each parameter of the kernel."""
        try:
            entries = (Parameter * 256).in_dll(self._library, f"cann_sim_parameters_{kernel}")
        except ValueError:
            names = ", ".join(self.kernels())
            raise AttributeError(f"{self.path.name} has no kernel {kernel!r}; it has {names}") from None
        found = []
        for entry in entries:
            if entry.kind == b"\0":
                break
            found.append((entry.kind.decode(), entry.bytes))
        return found

    def launch(self, kernel: str, blocks: int, *args: Any, config: Config | None = None) -> Report:
        """Runs `blocks` cores of a kernel and reports; raises KernelError when a rule is broken.

        `args` are the kernel's, in order: numpy arrays and CPU tensors (updated in place), `Uninit(array)`,
        `Workspace(nbytes)`, None (a null pointer), numbers, and bytes or a ctypes.Structure for a struct by value.
        """
        config = config or Config()
        parameters = self.parameters(kernel)
        if len(args) != len(parameters):
            wanted = ", ".join(f"{number}: {_wanted(*parameter)}" for number, parameter in enumerate(parameters, 1))
            takes = f"{len(parameters)} arguments ({wanted})" if parameters else "no arguments"
            raise TypeError(f"kernel {kernel} takes {takes}, {len(args)} given")
        if not 1 <= blocks <= 65535:
            raise ValueError(f"blocks must be 1 to 65535, not {blocks}")
        function = getattr(self._library, f"aclrtlaunch_{kernel}")
        function.restype = ctypes.c_uint32
        registered: list[int] = []
        try:
            values = [
                self._argument(kernel, number, kind, size, arg, registered)
                for number, ((kind, size), arg) in enumerate(zip(parameters, args, strict=True), 1)
            ]
            run_config = self._run_config(kernel, config)
            self._runtime.cann_sim_configure(ctypes.byref(run_config))
            try:
                function(ctypes.c_uint32(blocks), ctypes.c_void_p(None), *values)
            finally:
                self._runtime.cann_sim_configure(None)
            result = json.loads(self._runtime.cann_sim_last_report())
        finally:
            for handle in registered:
                self._runtime.cann_sim_unregister(handle)
        if not result:
            raise RuntimeError(self._runtime.cann_sim_last_error().decode())
        if error := result.get("error"):
            raise KernelError(error["kind"], kernel, error["core"], error["file"], error["line"], error["message"])
        return self._report(kernel, blocks, result, config)

    def _argument(self, kernel: str, number: int, kind: str, size: int, arg: Any, registered: list[int]) -> Any:
        """A ctypes value; device memory is registered for the launch."""
        what = f"kernel {kernel}, argument {number}"
        if kind == "p":
            if arg is None:
                return ctypes.c_void_p(None)
            if isinstance(arg, Workspace):
                address, size, written = arg.address, arg.nbytes, False
            else:
                written = not isinstance(arg, Uninit)
                address, size = _memory(what, arg.array if isinstance(arg, Uninit) else arg)
            registered.append(self._runtime.cann_sim_register(address, size, written))
            return ctypes.c_void_p(address)
        if kind == "s":
            try:
                data = None if isinstance(arg, int) else bytes(arg)  # bytes(3) would be three zeros
            except TypeError:
                data = None
            if data is None or len(data) != size:
                given = type(arg).__name__ if data is None else f"{len(data)} bytes"
                raise TypeError(f"{what}: {_wanted(kind, size)} is wanted, {given} given")
            return ctypes.c_char_p(data)  # the launcher copies it
        if isinstance(arg, ctypes._SimpleCData):
            arg = arg.value
        try:
            value = SCALARS[kind, size](arg)
        except TypeError:
            raise TypeError(f"{what}: {_wanted(kind, size)} is wanted, {type(arg).__name__} given") from None
        if kind != "f" and value.value != arg:
            raise OverflowError(f"{what}: {_wanted(kind, size)} is wanted, {arg} does not fit")
        return value

    def _run_config(self, kernel: str, config: Config) -> RunConfig:
        removed = config.remove_sync
        indices = () if removed is None else (removed,) if isinstance(removed, int) else tuple(removed)
        known = self._sites.get((str(self.path), kernel), [])
        for index in indices:
            if not 0 <= index < len(known):
                raise ValueError(
                    f"remove_sync={index}: {len(known)} synchronisations of kernel {kernel} are known; indices are "
                    "those of an earlier launch's sync_sites"
                )
        sites = (Site * len(indices))(*(Site(k.encode(), f.encode(), n) for k, f, n in map(known.__getitem__, indices)))
        return RunConfig(
            check=config.check,
            trace_core=-1 if config.trace_core is None else config.trace_core,
            threads=config.threads or 0,
            quiet=1,
            bandwidth_scale=config.bandwidth_scale,
            vector_scale=config.vector_scale,
            scalar_scale=config.scalar_scale,
            removed=sites,
            removed_count=len(indices),
        )

    def _report(self, kernel: str, blocks: int, result: dict[str, Any], config: Config) -> Report:
        return Report(
            kernel=kernel,
            blocks=blocks,
            cores=[CoreReport(**core) for core in result["cores"]],
            time_ns=result["time_ns"],
            config=config,
            sync_sites=self._number(kernel, result["sync_sites"]),
            trace=[Event(*event) for event in result["trace"]],
            trace_core=config.trace_core,
        )

    def _number(self, kernel: str, sites: Sequence[Sequence[Any]]) -> list[SyncSite]:
        """Gives each site the index from its first launch of this kernel, so that indices are stable."""
        with self._sites_lock:
            known = self._sites.setdefault((str(self.path), kernel), [])
            numbered = []
            for kind, file, line, count in sites:
                if (kind, file, line) not in known:
                    known.append((kind, file, line))
                numbered.append(SyncSite(known.index((kind, file, line)), kind, file, line, count))
        return sorted(numbered)


def _wanted(kind: str, size: int) -> str:
    """A parameter's description for an error message."""
    bits = f"{size * 8}-bit"
    words = {"p": "a GM buffer", "s": f"a struct of {size} bytes", "f": f"a {bits} float"}
    return words.get(kind) or f"{'an unsigned' if kind == 'u' else 'a signed'} {bits} integer"


def _memory(what: str, array: Any) -> tuple[int, int]:
    """Address and size in bytes of a contiguous numpy array or CPU tensor."""
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            raise TypeError(f"{what}: the tensor is on {array.device}, not on the CPU")
        if not array.is_contiguous():
            raise ValueError(f"{what}: the tensor is not contiguous")
        return array.data_ptr(), array.numel() * array.element_size()
    if hasattr(array, "__array_interface__") and hasattr(array, "ctypes"):
        if not array.flags["C_CONTIGUOUS"]:
            raise ValueError(f"{what}: the array is not contiguous")
        return array.ctypes.data, array.nbytes
    raise TypeError(
        f"{what}: {_wanted('p', 8)} (an array, a CPU tensor, Uninit, Workspace or None) is wanted, "
        f"{type(array).__name__} given"
    )
