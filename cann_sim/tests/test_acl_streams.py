"""Streams and events of the simulated AscendCL: asynchronous, in order, waited for; launches on the wrong device."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import pytest
from acl_case import (
    CONTEXT_NULL,
    COUNT,
    EVENT_TIMEOUT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    KERNEL_ERROR,
    NOT_COMPLETE,
    STREAM_CONTEXT,
    STREAM_TIMEOUT,
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
    operator,
    record,
    synchronize,
    wait,
)

from cann_sim import acl


def test_a_launch_returns_before_the_kernel_runs(streams: list[int]) -> None:
    source, target = Array(value=2), Array(value=0)
    with acl.hold(streams[0]):
        assert launch(streams[0], source, target) == 0
        time.sleep(0.05)
        assert (target.raw() == 0).all()
        assert code("aclrtSynchronizeStreamWithTimeout", streams[0], 20) == STREAM_TIMEOUT
        assert "20 ms" in message()
    assert synchronize(streams[0]) == [0]
    assert (target.raw() == 3).all()


def test_tasks_of_a_stream_run_in_order(streams: list[int]) -> None:
    a, b = Array(value=1), Array()
    with acl.hold():
        for _ in range(10):
            assert launch(streams[0], a, b, 1) == 0
            assert launch(streams[0], b, a, 1) == 0
    assert synchronize(streams[0]) == [0]
    assert (a.raw() == 21).all()
    assert not acl.status().errors


def test_other_streams_go_on_while_one_is_held(streams: list[int]) -> None:
    arrays = [Array(value=1) for _ in range(4)]
    with acl.hold(streams[0]):
        launch(streams[0], arrays[0], arrays[1])
        launch(streams[1], arrays[2], arrays[3])
        assert synchronize(streams[1]) == [0]
        assert (arrays[3].raw() == 2).all()
        assert (arrays[1].raw() == 1).all()


def test_query_says_whether_a_stream_is_done(streams: list[int]) -> None:
    status = ctypes.c_int(7)
    a, b = Array(value=1), Array(value=0)
    with acl.hold(streams[0]):
        launch(streams[0], a, b)
        ok("aclrtStreamQuery", streams[0], ctypes.byref(status))
        assert status.value == 1
    synchronize(streams[0])
    ok("aclrtStreamQuery", streams[0], ctypes.byref(status))
    assert status.value == 0


def test_a_function_of_the_host_has_its_turn(streams: list[int]) -> None:
    seen: list[float] = []
    a, b = Array(value=1), Array(value=0)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def look(_: int) -> None:
        seen.append(float(b.raw()[0]))

    with acl.hold(streams[0]):
        ok("aclrtLaunchHostFunc", streams[0], look, None)
        launch(streams[0], a, b, 1)
        ok("aclrtLaunchHostFunc", streams[0], look, None)
        launch(streams[0], a, b, 2)
        assert seen == []
    synchronize(streams[0])
    assert seen == [0, 2]


def test_a_device_waits_for_all_its_streams(streams: list[int]) -> None:
    arrays = [Array(value=1) for _ in range(6)]
    launch_on = [*streams[:2], None]  # None: the default stream runs copies as well
    acl.hold_streams()
    for stream, (a, b) in zip(launch_on, zip(arrays[::2], arrays[1::2], strict=True), strict=True):
        ok("aclrtMemcpyAsync", b.address, b.bytes, a.address, a.bytes, 3, stream)
        ok("aclrtMemsetAsync", b.address, b.bytes, 0, b.bytes, stream)
    assert code("aclrtSynchronizeDeviceWithTimeout", 1) == STREAM_TIMEOUT
    timer = threading.Timer(0.05, acl.release_streams)
    timer.start()
    ok("aclrtSynchronizeDevice")
    assert all((b.raw() == 0).all() for b in arrays[1::2])
    timer.join()


def test_a_host_operator_waits_for_its_turn_and_blocks_the_stream(streams: list[int]) -> None:
    a, b = Array(value=1), Array(value=0)
    begin, end = library().cann_sim_acl_begin, library().cann_sim_acl_end
    begin.restype = ctypes.c_uint64
    acl.hold_streams(streams[0])
    launch(streams[0], a, b, 1)
    timer = threading.Timer(0.05, acl.release_streams, [streams[0]])
    timer.start()
    before = acl.calls("aclrtSynchronizeStream")
    task = begin(ctypes.c_void_p(streams[0]), b"operator")
    assert task != 0
    assert (b.raw() == 2).all()  # what was enqueued before has run
    launch(streams[0], a, b, 5)
    time.sleep(0.05)
    assert (b.raw() == 2).all()  # what is enqueued after has not
    assert end(ctypes.c_uint64(task)) == 0
    assert acl.calls("aclrtSynchronizeStream") == before
    synchronize(streams[0])
    assert (b.raw() == 6).all()
    assert begin(ctypes.c_void_p(12345), b"operator") == 0
    assert "no stream" in message()
    assert end(ctypes.c_uint64(task)) == INVALID_HANDLE
    timer.join()


def test_a_stream_waits_for_an_event_of_another(streams: list[int]) -> None:
    first, second = streams[:2]
    a, b, c = Array(value=1), Array(value=0), Array(value=0)
    with acl.hold(first):
        launch(first, a, b, 1)
        wait(second, record(first))
        launch(second, b, c, 1)
        assert code("aclrtSynchronizeStreamWithTimeout", second, 50) == STREAM_TIMEOUT
        assert (c.raw() == 0).all()
    assert synchronize(second) == [0]
    assert (c.raw() == 3).all()
    assert not acl.status().errors


def test_a_wait_is_for_the_recording_it_saw(streams: list[int]) -> None:
    """An event recorded again later holds nobody back who waited for it before."""
    first, second = streams[:2]
    event = record(first)
    synchronize(first)
    with acl.hold(first):
        wait(second, event)
        ok("aclrtRecordEvent", event, first)
        assert synchronize(second) == [0]
        wait(second, event)
        assert code("aclrtSynchronizeStreamWithTimeout", second, 20) == STREAM_TIMEOUT


def test_the_host_waits_for_events(streams: list[int]) -> None:
    done, milliseconds = ctypes.c_int(7), ctypes.c_float()
    never = made("aclrtCreateEventExWithFlag", 0)
    ok("aclrtSynchronizeEvent", never)  # nothing to wait for
    ok("aclrtQueryEventStatus", never, ctypes.byref(done))
    assert done.value == 0
    start = record(streams[0])
    ok("aclrtSynchronizeEvent", start)
    with acl.hold(streams[0]):
        end = record(streams[0])
        ok("aclrtQueryEventStatus", end, ctypes.byref(done))
        assert done.value == 0
        assert code("aclrtEventElapsedTime", ctypes.byref(milliseconds), start, end) != 0
        assert code("aclrtSynchronizeEventWithTimeout", end, 20) == EVENT_TIMEOUT
        time.sleep(0.02)
    ok("aclrtSynchronizeEvent", end)
    ok("aclrtQueryEventStatus", end, ctypes.byref(done))
    assert done.value == 1
    ok("aclrtEventElapsedTime", ctypes.byref(milliseconds), start, end)
    assert 30 < milliseconds.value < 10_000
    for event in (never, start, end):
        ok("aclrtDestroyEvent", event)
    assert code("aclrtSynchronizeEvent", end) == INVALID_HANDLE


def test_destroyed_streams_are_gone(streams: list[int]) -> None:
    a, b = Array(value=1), Array(value=0)
    stream = made("aclrtCreateStream")
    before = len(acl.status().streams)
    launch(stream, a, b, 1)
    ok("aclrtDestroyStream", stream)  # when its tasks are done
    assert (b.raw() == 2).all()
    assert len(acl.status().streams) == before - 1
    assert launch(stream, a, b) == INVALID_HANDLE
    assert code("aclrtSynchronizeStream", stream) == INVALID_HANDLE
    forced = made("aclrtCreateStream")
    with acl.hold(forced):
        launch(forced, a, b, 9)
        event = record(forced)
        assert code("aclrtDestroyStream", forced) == NOT_COMPLETE
        wait(streams[0], event)
        ok("aclrtDestroyStreamForce", forced)
    assert (b.raw() == 2).all()
    assert synchronize(streams[0]) == [0]  # the dropped recording holds nobody back


def test_a_stream_destroyed_by_force_waits_for_what_runs(streams: list[int]) -> None:
    """A task that runs, and an operator that a thread is in or waits to begin; the rest is dropped."""
    a, b = Array(value=1), Array(value=0)
    stream = made("aclrtCreateStream")
    may_end, events = threading.Event(), []

    def state() -> tuple[int, int]:
        return next((it.enqueued, it.done) for it in acl.status().streams if it.handle == stream)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def running(_: int) -> None:
        events.append("task begins")
        may_end.wait()
        events.append("task ends")

    def work() -> None:
        with operator(stream) as touch:
            events.append("operator begins")
            touch(b.address, b.bytes, write=True)
            time.sleep(0.05)
            events.append("operator ends")

    def destroy() -> None:
        ok("aclrtSetDevice", 0)
        ok("aclrtDestroyStreamForce", stream)
        events.append("destroyed")

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    ok("aclrtLaunchHostFunc", stream, running, None)
    launch(stream, a, b, 9)
    waiting, destroying = threading.Thread(target=work, daemon=True), threading.Thread(target=destroy, daemon=True)
    waiting.start()
    until(lambda: state()[0] == 3 and events == ["task begins"])
    destroying.start()
    time.sleep(0.05)
    assert events == ["task begins"]
    assert state() == (3, 0)
    may_end.set()
    for thread in (waiting, destroying):
        thread.join(30)
    assert events == ["task begins", "task ends", "operator begins", "operator ends", "destroyed"]
    assert (b.raw() == 0).all()  # the launch was dropped


@pytest.mark.parametrize("default", [False, True])
def test_a_device_that_is_reset_waits_for_its_streams(streams: list[int], default: bool) -> None:
    ended: list[bool] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def slow(_: int) -> None:
        time.sleep(0.1)
        ended.append(True)

    ok("aclrtLaunchHostFunc", None if default else streams[0], slow, None)
    ok("aclrtResetDevice", 0)
    assert ended == [True]
    assert code("aclrtGetDevice", ctypes.byref(ctypes.c_int())) == CONTEXT_NULL
    ok("aclrtSetDevice", 0)


def test_launches_belong_to_the_device_of_their_stream(streams: list[int]) -> None:
    a, b = Array(value=1), Array(value=0)
    with device(1):
        other = made("aclrtCreateStream")
        assert launch(streams[0], a, b) == STREAM_CONTEXT
        assert "device 1" in message()
        assert launch(other, a, b) == 0
        assert code("aclrtSynchronizeStream", other) == KERNEL_ERROR
        assert "wrong-device" in message()
        ok("aclrtDestroyStream", other)
    (error,) = acl.status().of_kind("wrong-device")
    assert "kernel shift" in error.message
    assert "which is on device 0" in error.message
    acl.clear_errors()
    assert launch(streams[0], a, b) == 0
    assert synchronize(streams[0]) == [0]
    assert not acl.status().errors


def test_a_thread_has_no_device_until_it_sets_one(streams: list[int]) -> None:
    found: list[int] = []
    a, b = Array(value=1), Array(value=0)

    def work() -> None:
        number = ctypes.c_int(-1)
        found.append(code("aclrtGetDevice", ctypes.byref(number)))
        found.append(launch(streams[0], a, b))
        found.append(code("aclrtMalloc", ctypes.byref(ctypes.c_void_p()), 64, 0))
        ok("aclrtSetDevice", 1)
        ok("aclrtGetDevice", ctypes.byref(number))
        found.append(number.value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [CONTEXT_NULL, CONTEXT_NULL, CONTEXT_NULL, 1]
    number = ctypes.c_int(-1)
    ok("aclrtGetDevice", ctypes.byref(number))
    assert number.value == 0
    assert code("aclrtSetDevice", 2) == INVALID_DEVICE
    assert "CANN_SIM_DEVICES" in message()


def test_contexts_carry_a_device_from_thread_to_thread(streams: list[int]) -> None:
    own, number = ctypes.c_void_p(), ctypes.c_int(-1)
    ok("aclrtGetCurrentContext", ctypes.byref(own))
    other = made("aclrtCreateContext", 1)  # which makes it the thread's
    ok("aclrtGetDevice", ctypes.byref(number))
    assert number.value == 1
    ok("aclrtSetCurrentContext", own.value)
    ok("aclrtGetDevice", ctypes.byref(number))
    assert number.value == 0
    found: list[int] = []

    def work() -> None:
        found.append(code("aclrtSetCurrentContext", other))
        ok("aclrtGetDevice", ctypes.byref(number))
        found.append(number.value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0, 1]
    ok("aclrtDestroyContext", other)
    assert code("aclrtSetCurrentContext", other) == CONTEXT_NULL
    assert code("aclrtDestroyContext", other) == CONTEXT_NULL


def test_copies_from_ordinary_memory_are_taken_at_once(streams: list[int]) -> None:
    """It may be gone when the stream comes to it; page-locked memory has to stay, and is read then."""
    a = Array(COUNT, value=0)
    ordinary = (ctypes.c_float * COUNT)(*[5] * COUNT)
    locked = made("aclrtMallocHost", 4 * COUNT)
    floats = (ctypes.c_float * COUNT).from_address(locked)
    for memory, expected in ((ctypes.addressof(ordinary), 5), (locked, 6)):
        values = ordinary if memory != locked else floats
        values[:] = [5] * COUNT
        with acl.hold(streams[0]):
            ok("aclrtMemcpyAsync", a.address, a.bytes, memory, a.bytes, TO_DEVICE, streams[0])
            values[:] = [6] * COUNT
        synchronize(streams[0])
        assert (a.raw() == expected).all()
    ordinary[:] = floats[:] = [0] * COUNT
    acl.hold_streams(streams[0])
    timer = threading.Timer(0.1, acl.release_streams)
    timer.start()
    ok("aclrtMemcpyAsync", ctypes.addressof(ordinary), a.bytes, a.address, a.bytes, TO_HOST, streams[0])
    assert list(ordinary) == [6] * COUNT  # without a synchronisation: the call has waited
    timer.join()
    with acl.hold(streams[0]):
        ok("aclrtMemcpyAsync", locked, a.bytes, a.address, a.bytes, TO_HOST, streams[0])
        assert list(floats) == [0] * COUNT
    synchronize(streams[0])
    assert list(floats) == [6] * COUNT


@pytest.mark.parametrize("name", ["aclrtSynchronizeStream", "aclrtDestroyStream", "aclrtStreamQuery"])
def test_a_handle_that_is_no_stream_is_refused(streams: list[int], name: str) -> None:
    assert code(name, 0xDEAD, ctypes.byref(ctypes.c_int())) == INVALID_HANDLE
    assert "0xdead is no stream" in message()
