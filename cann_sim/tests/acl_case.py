"""The simulated libascendcl.so through ctypes: its calls, device arrays, and a kernel to launch on streams.

Built for the installed torch_npu, whose headers it is compiled against; without one the tests are skipped.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cann_sim
from cann_sim import _torch_runtime, acl

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # aclrtMemcpyKind
PARAM_INVALID, INVALID_DEVICE, CONTEXT_NULL, STREAM_CONTEXT = 107000, 107001, 107002, 107003
INVALID_HANDLE, OUT_OF_MEMORY, MEMORY_FREE, RACE = 107017, 207001, 207002, 507000
NOT_COMPLETE, KERNEL_ERROR, STREAM_TIMEOUT, EVENT_TIMEOUT = 507004, 507035, 507046, 507047
COUNT = 64  # floats a core; two cores


@functools.cache
def folder() -> Path:
    try:
        return _torch_runtime.build_ascendcl()
    except _torch_runtime.SetupError as error:
        pytest.skip(f"the simulated AscendCL cannot be built: {error}")


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(folder() / "libascendcl.so"), ctypes.RTLD_GLOBAL)


@functools.cache
def kernels() -> cann_sim.KernelLibrary:
    return cann_sim.compile(Path(__file__).parent / "kernels" / "acl.cpp")


def code(name: str, *args: Any) -> int:
    """What an API function returns. Integers are passed as 64 bits, which is right for handles, sizes and ints."""
    function = getattr(library(), name)
    function.restype = ctypes.c_int
    return function(*(ctypes.c_uint64(arg) if isinstance(arg, int) and arg >= 0 else arg for arg in args))


def ok(name: str, *args: Any) -> None:
    result = code(name, *args)
    assert result == 0, f"{name}: {result}: {message()}"


def made(name: str, *args: Any) -> int:
    """A handle or an address that a function returns through its first argument."""
    out = ctypes.c_void_p()
    ok(name, ctypes.byref(out), *args)
    assert out.value
    return out.value


def message() -> str:
    function = library().aclGetRecentErrMsg
    function.restype = ctypes.c_char_p
    return (function() or b"").decode()


class Array:
    """`count` floats on the current device."""

    def __init__(self, count: int = 2 * COUNT, value: float | None = None) -> None:
        self.count, self.bytes = count, 4 * count
        self.address = made("aclrtMalloc", self.bytes, 0)
        if value is not None:
            self.set(value)

    def set(self, value: float) -> None:
        """By the host, at once."""
        data = np.full(self.count, value, np.float32)
        ok("aclrtMemcpy", self.address, self.bytes, data.ctypes.data, self.bytes, TO_DEVICE)

    def raw(self) -> np.ndarray:
        """The memory itself: looking at it is no access that anybody checks."""
        return np.ctypeslib.as_array((ctypes.c_float * self.count).from_address(self.address))

    def free(self) -> None:
        ok("aclrtFree", self.address)


def launch(stream: int, source: Array | int, target: Array | int, plus: float = 1, count: int = COUNT) -> int:
    """target = source + plus on a stream; what the launcher returns."""
    function = kernels()._library.aclrtlaunch_shift
    function.restype = ctypes.c_uint32
    places = [ctypes.c_void_p(it if isinstance(it, int) else it.address) for it in (source, target)]
    return function(2, ctypes.c_void_p(stream), *places, ctypes.c_uint32(count), ctypes.c_float(plus))


@contextmanager
def operator(stream: int | None, name: bytes = b"add") -> Iterator[Callable[..., None]]:
    """A task of this thread in the place of a kernel; gives what notes an access: touch(address, bytes, write=...)."""
    library().cann_sim_acl_begin.restype = ctypes.c_uint64
    task = ctypes.c_uint64(library().cann_sim_acl_begin(ctypes.c_void_p(stream), name))

    def touch(address: int, size: int, *, write: bool) -> None:
        library().cann_sim_acl_touch(task, ctypes.c_void_p(address), ctypes.c_size_t(size), int(write))

    yield touch
    library().cann_sim_acl_end(task)


def synchronize(*streams: int | None) -> list[int]:
    return [code("aclrtSynchronizeStream", stream) for stream in streams]


def until_done(stream: int) -> None:
    """By asking, which tells no error as synchronising does."""
    status = ctypes.c_int(1)
    while status.value != 0:
        ok("aclrtStreamQuery", stream, ctypes.byref(status))


def record(stream: int) -> int:
    """A new event, recorded on a stream."""
    event = made("aclrtCreateEventExWithFlag", 0)
    ok("aclrtRecordEvent", event, stream)
    return event


def wait(stream: int, event: int) -> None:
    ok("aclrtStreamWaitEvent", stream, event)


@contextmanager
def device(number: int) -> Iterator[None]:
    ok("aclrtSetDevice", number)
    try:
        yield
    finally:
        ok("aclrtSetDevice", 0)


def clean_up(streams: list[int]) -> None:
    """Nothing of a test is left for the next."""
    acl.release_streams()
    for stream in streams:
        code("aclrtDestroyStream", stream)
    for found in acl.status().devices:
        for tensor in found.tensors:
            library().cann_sim_acl_tensor_freed(ctypes.c_void_p(tensor.address))
        for block in found.blocks:
            code("aclrtFree", block.address)
    for block in acl.status().host_blocks:
        code("aclrtFreeHost", block.address)
    acl.clear_errors()
    message()
