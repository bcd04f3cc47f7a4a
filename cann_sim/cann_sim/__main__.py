"""Runs a PyTorch program on a simulated NPU: the real torch_npu, over an AscendCL that computes on the host.

usage: python -m cann_sim [--leaks] SCRIPT [ARGS]
       python -m cann_sim [--leaks] -m MODULE [ARGS]
       python -m cann_sim [--leaks] -c CODE [ARGS]

The program runs as under plain Python. The exit code is the program's, or 3 if that is 0 and the simulator found an
error: a race between streams, a write outside of a tensor, a kernel that broke a rule.

  --leaks     list device memory that is still in use at the end, and exit with 3 if there is any
  -h, --help  show this and exit
"""

from __future__ import annotations

import ctypes
import gc
import importlib.abc
import importlib.machinery
import io
import os
import runpy
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import acl
from ._torch_runtime import SetupError, prepare

FOUND_ERRORS = 3
USAGE_ERROR = 2
LONGEST_LIST = 20


def main(arguments: Sequence[str]) -> int:
    """Runs `python -m cann_sim`. Returns the exit code."""
    rest = list(arguments)
    leaks = False
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
        option = rest.pop(0)
        if option in ("-h", "--help"):
            print((__doc__ or "").strip())
            return 0
        if option == "--":
            break
        if option != "--leaks":
            return _usage(f"unknown option {option}")
        leaks = True
    if not rest or (rest[0] in ("-m", "-c") and len(rest) == 1):
        return _usage(f"{rest[0]} needs an argument" if rest else "no program is given")
    try:
        sys.meta_path.insert(0, _Imports(prepare()))
    except (SetupError, ImportError) as error:
        print(f"cann_sim: {error}", file=sys.stderr)
        return USAGE_ERROR
    code = _run(rest)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()  # as Python does at exit
    found = _finish(leaks)
    return code or found


def _usage(what: str) -> int:
    print(f"cann_sim: {what}; see python -m cann_sim --help", file=sys.stderr)
    return USAGE_ERROR


def _import_torch_npu() -> None:
    """Imports torch_npu, also beside a CUDA build of torch."""
    ctypes.CDLL(None).cann_sim_acl_remove_keys_of_cuda()
    importlib.import_module("torch_npu")


class _Imports(importlib.abc.MetaPathFinder):
    """An import hook: importing torch also imports torch_npu, and then installs the operators on the host."""

    def __init__(self, install: Callable[[], None]) -> None:
        self.then = {"torch": _import_torch_npu, "torch_npu": install}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The other finders' spec of torch or torch_npu, with a loader that then runs the next step."""
        if name not in self.then:
            return None
        found = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_go_on(module: types.ModuleType) -> None:
                load(module)
                self.then.pop(name, lambda: None)()  # not in find_spec, since a spec can be found without an import

            spec.loader.exec_module = load_and_go_on  # type: ignore[method-assign]
        return spec


# ------------------------------------------------------------------------------------------------- the program


def _run(rest: list[str]) -> int:
    """Runs the program as Python would, and returns its exit code."""
    own = sys.modules["__main__"]
    try:
        if rest[0] == "-m":
            sys.argv = rest[1:]
            _set_first_path(os.getcwd())
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        elif rest[0] == "-c":
            sys.argv = ["-c", *rest[2:]]
            _set_first_path("")
            _execute(compile(rest[1], "<string>", "exec"), None)
        else:
            _run_script(rest)
        return 0
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        _show_traceback()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 128 + signal.SIGINT
    except BaseException:
        _show_traceback()
        return 1
    finally:
        for name in ("__main__", "__mp_main__"):  # the latter in multiprocessing's children
            if name in sys.modules:
                sys.modules[name] = own


def _run_script(rest: list[str]) -> None:
    script = rest[0]
    sys.argv = rest
    if Path(script).is_dir() or not Path(script).exists() or script.endswith((".zip", ".pyz")):
        if not Path(script).exists():
            raise SystemExit(f"cann_sim: there is no file {script}")
        runpy.run_path(script, run_name="__main__")
        return
    _set_first_path(str(Path(script).resolve().parent))
    with io.open_code(str(Path(script).resolve())) as file:
        source = file.read()
    _execute(compile(source, script, "exec"), script)


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):  # with -P or PYTHONSAFEPATH there is no such entry
        sys.path[0] = folder


def _execute(code: types.CodeType, path: str | None) -> None:
    """Runs code in a fresh module __main__, and removes the module afterwards."""
    module = types.ModuleType("__main__")
    if path is not None:
        module.__file__ = path
        module.__dict__["__cached__"] = None
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _show_traceback() -> None:
    """Prints the current exception, with the traceback from the program's first frame on."""
    kind, error, trace = sys.exc_info()
    assert kind is not None
    assert error is not None
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    error.__traceback__ = trace
    sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace
    sys.excepthook(kind, error, trace)


# ------------------------------------------------------------------------------------------------- the end


def _finish(leaks: bool) -> int:
    """Reports the device's errors and leaks after the program. Returns 0, or 3 for an error."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "npu"):
        return 0
    found = 0
    acl.release_streams()  # streams that are still held would never finish
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):  # they keep the program's locals alive
        vars(sys).pop(name, None)
    if torch.npu.is_initialized():
        for device in range(torch.npu.device_count()):
            try:
                torch.npu.synchronize(device)
            except RuntimeError as error:
                _say(f"npu:{device}: {str(error).splitlines()[0]}")
                found = FOUND_ERRORS
        gc.collect()
        torch.npu.empty_cache()
        if hasattr(torch.ops.cann_sim, "settle"):  # not when the import of torch_npu failed halfway
            torch.ops.cann_sim.settle()
    status = acl.status()
    if status.errors:
        _say(f"the simulator found {sum(error.count for error in status.errors)} error(s):")
        for error in status.errors[:LONGEST_LIST]:
            _say(f"  {error.kind}: {error.message}" + (f" ({error.count} times)" if error.count > 1 else ""))
        found = FOUND_ERRORS
    return max(found, _report_leaks(torch, status) if leaks else 0)


def _say(message: str) -> None:
    print(f"cann_sim: {message}", file=sys.stderr, flush=True)


def _report_leaks(torch: Any, status: acl.Status) -> int:
    """Lists the tensors that the allocator still has in use, after the program's globals have been freed."""
    left = [(device.device, tensor) for device in status.devices for tensor in device.tensors]
    if not left:
        _say("no device memory is leaked")
        return 0
    known: dict[int, str] = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.Tensor) and candidate.device.type == "npu":
            known[candidate.untyped_storage().data_ptr()] = f", {tuple(candidate.shape)} of {candidate.dtype}"
    _say(f"{sum(tensor.bytes for _, tensor in left)} bytes of device memory are leaked, in {len(left)} tensors:")
    for device, tensor in sorted(left, key=lambda item: -item[1].bytes)[:LONGEST_LIST]:
        _say(f"  npu:{device}: {tensor.bytes} bytes{known.get(tensor.address, '')}")
    return FOUND_ERRORS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
