"""Memory of the simulated AscendCL: bounds, canaries, poison, capacity, tensors inside blocks."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
from acl_case import (
    COUNT,
    KERNEL_ERROR,
    MEMORY_FREE,
    ON_DEVICE,
    OUT_OF_MEMORY,
    PARAM_INVALID,
    RACE,
    TO_DEVICE,
    TO_HOST,
    Array,
    code,
    device,
    launch,
    library,
    made,
    message,
    ok,
    synchronize,
)

from cann_sim import acl


def tensor(start: int, bytes_: int) -> None:
    library().cann_sim_acl_tensor_allocated(ctypes.c_void_p(start), ctypes.c_size_t(bytes_))


def tensor_freed(start: int) -> None:
    library().cann_sim_acl_tensor_freed(ctypes.c_void_p(start))


def test_fresh_memory_is_nan_in_every_type(streams: list[int]) -> None:
    array = Array(8)
    memory = (ctypes.c_uint8 * array.bytes).from_address(array.address)
    data = np.frombuffer(bytes(memory), np.uint8)
    for dtype in (np.float16, np.float32, np.float64):
        assert np.isnan(data.view(dtype)).all()
    assert all(math.isnan(value) for value in (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32))  # bf16


@pytest.mark.parametrize(("offset", "where"), [(-1, "before its start"), (200, "behind its end"), (711, "behind")])
def test_what_is_written_outside_a_block_is_found(streams: list[int], offset: int, where: str) -> None:
    array = Array(50)
    ctypes.c_uint8.from_address(array.address + offset).value = 0
    (error,) = acl.status().of_kind("canary")
    assert where in error.message
    assert "of 200 bytes" in error.message
    assert f"byte {offset}" in error.message
    assert len(acl.status().errors) == 1
    assert code("aclrtFree", array.address) == 0  # it has been told
    other = Array(50)
    ctypes.c_uint8.from_address(other.address + offset).value = 0
    assert code("aclrtFree", other.address) == MEMORY_FREE
    assert where in message()


def test_what_is_written_inside_is_not(streams: list[int]) -> None:
    array = Array(50)
    for offset in (0, 199):
        ctypes.c_uint8.from_address(array.address + offset).value = 0
    assert not acl.status().errors
    array.free()
    assert not acl.status().errors


def test_a_device_runs_out_of_memory(streams: list[int]) -> None:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ok("aclrtGetMemInfo", 0, ctypes.byref(free), ctypes.byref(total))
    assert free.value == total.value == 4096 << 20
    array = Array(1 << 20)
    ok("aclrtGetMemInfo", 0, ctypes.byref(free), ctypes.byref(total))
    assert free.value == total.value - array.bytes
    out = ctypes.c_void_p()
    assert code("aclrtMallocAlign32", ctypes.byref(out), free.value + 1, 0) == OUT_OF_MEMORY
    assert "CANN_SIM_MEMORY_MB" in message()
    with device(1):  # has its own
        ok("aclrtGetMemInfo", 0, ctypes.byref(free), ctypes.byref(total))
        assert free.value == total.value
    array.free()
    first = acl.status().devices[0]
    assert (first.memory_bytes, first.blocks) == (0, ())
    assert first.peak_bytes >= array.bytes


def test_freeing_what_is_not_there_is_refused(streams: list[int]) -> None:
    array = Array()
    assert code("aclrtFree", array.address + 4) == PARAM_INVALID
    assert "inside a block" in message()
    assert code("aclrtFreeHost", array.address) == PARAM_INVALID
    assert "device memory" in message()
    array.free()
    assert code("aclrtFree", array.address) == PARAM_INVALID
    assert "freed before" in message()
    assert code("aclrtMalloc", ctypes.byref(ctypes.c_void_p()), 0, 0) == PARAM_INVALID


@pytest.mark.parametrize("asynchronous", [False, True])
def test_copies_keep_within_blocks_and_kinds(streams: list[int], asynchronous: bool) -> None:
    a, b = Array(value=1), Array(value=2)
    host = (ctypes.c_float * a.count)()
    memory = ctypes.addressof(host)

    def copy(to: int, room: int, source: int, size: int, kind: int) -> int:
        arguments = (to, room, source, size, kind)
        return code("aclrtMemcpyAsync", *arguments, streams[0]) if asynchronous else code("aclrtMemcpy", *arguments)

    assert copy(a.address, a.bytes, b.address, a.bytes, ON_DEVICE) == 0
    assert synchronize(streams[0]) == [0]
    assert (a.raw() == 2).all()
    for to, room, source, size, kind, words in (
        (a.address, a.bytes + 4, b.address, a.bytes + 4, ON_DEVICE, "beyond its block: bytes [0, 516) of 512"),
        (a.address + 4, a.bytes, b.address, a.bytes, ON_DEVICE, "dst goes beyond its block: bytes [4, 516) of 512"),
        (memory, a.bytes, b.address + 4, a.bytes, TO_HOST, "src goes beyond"),
        (a.address, a.bytes - 4, b.address, a.bytes, ON_DEVICE, "512 bytes into room for 508"),
        (memory, a.bytes, b.address, a.bytes, TO_DEVICE, "dst is 0x"),
        (a.address, a.bytes, b.address, a.bytes, TO_DEVICE, "src is 0x"),
        (a.address, a.bytes, memory, a.bytes, ON_DEVICE, "no device memory"),
        (a.address, a.bytes, 0, a.bytes, TO_DEVICE, "null pointer"),
    ):
        assert copy(to, room, source, size, kind) == PARAM_INVALID, words
        assert words in message()
    assert (a.raw() == 2).all()


def test_fills(streams: list[int]) -> None:
    a = Array(value=1)
    ok("aclrtMemset", a.address, a.bytes, 0, a.bytes // 2)
    assert (a.raw()[: a.count // 2] == 0).all()
    assert (a.raw()[a.count // 2 :] == 1).all()
    ok("aclrtMemsetAsync", a.address, a.bytes, 0, a.bytes, streams[0])
    synchronize(streams[0])
    assert (a.raw() == 0).all()
    assert code("aclrtMemset", a.address, a.bytes + 1, 0, a.bytes + 1) == PARAM_INVALID
    assert code("aclrtMemsetAsync", a.address, a.bytes, 0, a.bytes + 1, streams[0]) == PARAM_INVALID


def test_pointers_say_where_they_point(streams: list[int]) -> None:
    class Attributes(ctypes.Structure):
        _fields_ = (("id", ctypes.c_uint32), ("type", ctypes.c_int), ("rest", ctypes.c_uint32 * 5))

    attributes = Attributes()
    with device(1):
        array, locked = Array(), made("aclrtMallocHost", 64)
    ordinary = ctypes.c_float()
    for address, expected in (
        (array.address + 8, (1, 1)),
        (locked + 8, (0, 1)),
        (ctypes.addressof(ordinary), (2, 0)),
    ):
        ok("aclrtPointerGetAttributes", address, ctypes.byref(attributes))
        assert (attributes.type, attributes.id) == expected


def test_kernels_keep_within_their_buffers(streams: list[int]) -> None:
    a, b = Array(value=1), Array(2 * COUNT - 8, value=0)
    assert launch(streams[0], a, b) == 0
    assert synchronize(streams[0]) == [KERNEL_ERROR]
    assert "kernel: kernel shift, core 1, " in (text := message())
    assert "gm-bounds" in text
    (error,) = acl.status().of_kind("kernel")
    assert error.message in text
    assert synchronize(streams[0]) == [0]
    assert message() == ""


def test_kernels_read_what_was_written(streams: list[int]) -> None:
    """By a copy, a fill, an operator or an earlier task of the stream; else it is an error."""
    fresh, copied, filled, computed, out = (Array() for _ in range(5))
    data = np.ones(copied.count, np.float32)
    with acl.hold(streams[0]):  # nothing is written yet when the launches are enqueued
        ok("aclrtMemcpyAsync", copied.address, copied.bytes, data.ctypes.data, copied.bytes, TO_DEVICE, streams[0])
        ok("aclrtMemsetAsync", filled.address, filled.bytes, 0, filled.bytes, streams[0])
        launch(streams[0], copied, computed)
        for array in (copied, filled, computed):
            assert launch(streams[0], array, out) == 0
    assert synchronize(streams[0]) == [0]
    launch(streams[0], fresh, out)
    assert synchronize(streams[0]) == [KERNEL_ERROR]
    assert "uninitialised" in message()
    begin = library().cann_sim_acl_begin
    begin.restype = ctypes.c_uint64
    for half in (0, 1):  # an operator that writes half of it, then all
        task = ctypes.c_uint64(begin(ctypes.c_void_p(streams[0]), b"operator"))
        start = fresh.address + half * fresh.bytes // 2
        library().cann_sim_acl_touch(task, ctypes.c_void_p(start), ctypes.c_size_t(fresh.bytes // 2), 1)
        library().cann_sim_acl_end(task)
        launch(streams[0], fresh, out)
        assert synchronize(streams[0]) == [0 if half else KERNEL_ERROR]


def test_a_tensor_bounds_the_pointers_into_it(streams: list[int]) -> None:
    segment, source = Array(8 * COUNT, value=0), Array(value=1)
    bytes_ = 2 * COUNT * 4
    launch(streams[0], source, segment.address + 2 * bytes_)
    assert synchronize(streams[0]) == [0]  # without tensors, the segment is the bound
    tensor(segment.address, bytes_)
    tensor(segment.address + bytes_, bytes_ - 32)
    assert launch(streams[0], source, segment) == 0
    assert synchronize(streams[0]) == [0]
    launch(streams[0], source, segment.address + bytes_)
    assert synchronize(streams[0]) == [KERNEL_ERROR]
    assert f"[256, 512) of a GM buffer of {bytes_ - 32} bytes" in message()
    tensor_freed(segment.address + bytes_)
    launch(streams[0], source, segment.address + bytes_)
    assert synchronize(streams[0]) == [0]
    assert [(it.address, it.bytes) for it in acl.status().devices[0].tensors] == [(segment.address, bytes_)]


def test_a_tensor_counts_as_unwritten_when_it_is_allocated(streams: list[int]) -> None:
    segment, out = Array(value=0), Array()
    launch(streams[0], segment, out)
    assert synchronize(streams[0]) == [0]
    tensor(segment.address, segment.bytes)
    launch(streams[0], segment, out)
    assert synchronize(streams[0]) == [KERNEL_ERROR]
    assert "uninitialised" in message()
    segment.set(1)
    launch(streams[0], segment, out)
    assert synchronize(streams[0]) == [0]
    tensor(segment.address, segment.bytes)  # another one in its place
    launch(streams[0], segment, out)
    assert synchronize(streams[0]) == [KERNEL_ERROR]


def test_a_launch_keeps_the_tensors_it_was_given(streams: list[int]) -> None:
    """A tensor that is freed and replaced between a launch and its turn is the launch's own to the end."""
    segment, source, out = Array(value=0), Array(value=1), Array()
    tensor(segment.address, segment.bytes)
    with acl.hold(streams[0]):
        launch(streams[0], source, segment)
        launch(streams[0], segment, out)
        tensor_freed(segment.address)
        tensor(segment.address, 32)
    assert synchronize(streams[0]) == [0]
    launch(streams[0], segment, out)
    assert synchronize(streams[0]) == [KERNEL_ERROR]  # nobody has written the new one, and it is smaller


def test_memory_that_is_freed_too_early_is_found(streams: list[int]) -> None:
    a, b, c = Array(value=1), Array(value=0), Array(value=0)
    with acl.hold(streams[0]):
        launch(streams[0], a, b)
        ok("aclrtMemcpyAsync", c.address, c.bytes, a.address, a.bytes, ON_DEVICE, streams[0])
        a.free()
    assert synchronize(streams[0]) == [KERNEL_ERROR]
    errors = acl.status().of_kind("use-after-free")
    assert len(errors) == 2
    assert "kernel shift" in errors[0].message
    assert "a copy on the device" in errors[1].message
    assert RACE not in synchronize(streams[0])
