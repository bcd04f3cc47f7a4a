"""Controls the simulated AscendCL of this process: hold streams, make calls fail, get its status.

    with acl.hold():  # streams run nothing; launched tasks wait
        ...
    with acl.fail("aclrtMallocAlign32", acl.OUT_OF_MEMORY):  # the next call
        ...
    assert not acl.status().errors

A stream argument is a handle (`torch.npu.Stream.npu_stream`), a stream object, or None for all streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

OUT_OF_MEMORY = 207001
KERNEL_ERROR = 507035  # a vector core exception


@dataclass(frozen=True)
class Error:
    """A broken rule: `kind` is a short slug, `count` the number of identical errors."""

    kind: str
    message: str
    count: int


@dataclass(frozen=True)
class Block:
    """Memory allocated by AscendCL; `number` is the allocation's sequence number."""

    number: int
    address: int
    bytes: int


@dataclass(frozen=True)
class Tensor:
    """A tensor that a caching allocator placed in a block."""

    address: int
    bytes: int


@dataclass(frozen=True)
class Device:
    """A device's memory."""

    device: int
    memory_bytes: int
    peak_bytes: int
    capacity_bytes: int
    blocks: tuple[Block, ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Stream:
    """A stream: tasks enqueued and done, and the code its next synchronisation returns (`fault`, 0: none).

    The handle of a device's default stream is 0.
    """

    id: int
    device: int
    handle: int
    enqueued: int
    done: int
    held: bool
    fault: int


@dataclass(frozen=True)
class Status:
    """The whole status: `calls` counts the calls of API functions and of "launch:<kernel>"."""

    devices: tuple[Device, ...]
    host_blocks: tuple[Block, ...]
    streams: tuple[Stream, ...]
    events: int
    errors: tuple[Error, ...]
    calls: Mapping[str, int]

    def of_kind(self, kind: str) -> list[Error]:
        """The errors of a kind: stream-race, wrong-device, use-after-free, canary, kernel."""
        return [error for error in self.errors if error.kind == kind]


def hold_streams(stream: Any = None) -> None:
    """Stops a stream from running tasks; None: all streams, including future ones."""
    _library().cann_sim_acl_hold(_handle(stream))


def release_streams(stream: Any = None) -> None:
    """Resumes a held stream; None: all."""
    _library().cann_sim_acl_release(_handle(stream))


@contextlib.contextmanager
def hold(stream: Any = None) -> Iterator[None]:
    """Holds a stream (None: all) inside a `with`. Synchronising it there would block forever."""
    hold_streams(stream)
    try:
        yield
    finally:
        release_streams(stream)


@contextlib.contextmanager
def fail(api: str, code: int, *, skip: int = 0, count: int = 1) -> Iterator[None]:
    """Inside a `with`, an API function (or "launch:<kernel>") fails with `code`: `count` calls, after `skip` others."""
    if code == 0 or skip < 0 or count < 1:
        raise ValueError(f"fail({api!r}): code {code} must not be 0, skip {skip} not negative, count {count} positive")
    _library().cann_sim_acl_fail(api.encode(), skip, count, code)
    try:
        yield
    finally:
        _library().cann_sim_acl_fail(api.encode(), 0, 0, 0)


@contextlib.contextmanager
def delay(api: str, milliseconds: float) -> Iterator[None]:
    """Inside a `with`, every call of an API function (or "launch:<kernel>") sleeps first."""
    _library().cann_sim_acl_delay(api.encode(), milliseconds)
    try:
        yield
    finally:
        _library().cann_sim_acl_delay(api.encode(), 0.0)


def calls(api: str) -> int:
    """How often an API function, or "launch:<kernel>", was called."""
    return int(_library().cann_sim_acl_calls(api.encode()))


def status() -> Status:
    """Memory, streams, events, errors and call counts. Also checks for overwritten canaries."""
    found = json.loads(_library().cann_sim_acl_status())
    return Status(
        devices=tuple(
            Device(
                **{key: value for key, value in device.items() if key not in ("blocks", "tensors")},
                blocks=tuple(Block(**block) for block in device["blocks"]),
                tensors=tuple(Tensor(**tensor) for tensor in device["tensors"]),
            )
            for device in found["devices"]
        ),
        host_blocks=tuple(Block(**block) for block in found["host_blocks"]),
        streams=tuple(Stream(**stream) for stream in found["streams"]),
        events=found["events"],
        errors=tuple(Error(**error) for error in found["errors"]),
        calls=found["calls"],
    )


def clear_errors() -> None:
    """Clears the errors, including those that a later synchronisation would return."""
    _library().cann_sim_acl_clear_errors()


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)  # symbols of all libraries loaded with RTLD_GLOBAL
    if not hasattr(library, "cann_sim_acl_status"):
        raise RuntimeError(
            "no simulated libascendcl.so is loaded in this process: run the program with `python -m cann_sim`"
        )
    library.cann_sim_acl_hold.argtypes = (ctypes.c_void_p,)
    library.cann_sim_acl_hold.restype = None
    library.cann_sim_acl_release.argtypes = (ctypes.c_void_p,)
    library.cann_sim_acl_release.restype = None
    library.cann_sim_acl_fail.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)
    library.cann_sim_acl_fail.restype = None
    library.cann_sim_acl_delay.argtypes = (ctypes.c_char_p, ctypes.c_double)
    library.cann_sim_acl_delay.restype = None
    library.cann_sim_acl_calls.argtypes = (ctypes.c_char_p,)
    library.cann_sim_acl_calls.restype = ctypes.c_uint64
    library.cann_sim_acl_status.restype = ctypes.c_char_p
    library.cann_sim_acl_clear_errors.restype = None
    return library


def _handle(stream: Any) -> int | None:
    return stream if stream is None or isinstance(stream, int) else int(stream.npu_stream)
