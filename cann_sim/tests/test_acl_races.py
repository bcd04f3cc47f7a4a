"""Accesses that nothing orders are found whatever the timing; those that something orders are accepted."""

from __future__ import annotations

import ctypes
import itertools

import pytest
from acl_case import (
    COUNT,
    ON_DEVICE,
    RACE,
    TO_DEVICE,
    TO_HOST,
    Array,
    code,
    launch,
    library,
    made,
    message,
    ok,
    operator,
    record,
    synchronize,
    until_done,
    wait,
)

from cann_sim import acl


class Memory:
    """What the tasks below touch."""

    def __init__(self) -> None:
        self.a, self.b, self.c, self.d = (Array(value=value) for value in range(4))


def kernel_reads(m: Memory, stream: int) -> None:
    assert launch(stream, m.a, m.b) == 0


def kernel_writes(m: Memory, stream: int) -> None:
    assert launch(stream, m.c, m.a) == 0


def copy_reads(m: Memory, stream: int) -> None:
    ok("aclrtMemcpyAsync", m.d.address, m.d.bytes, m.a.address, m.a.bytes, ON_DEVICE, stream)


def copy_writes(m: Memory, stream: int) -> None:
    data = (ctypes.c_float * m.a.count)()
    ok("aclrtMemcpyAsync", m.a.address, m.a.bytes, ctypes.addressof(data), m.a.bytes, TO_DEVICE, stream)


def fill_writes(m: Memory, stream: int) -> None:
    ok("aclrtMemsetAsync", m.a.address, m.a.bytes, 0, m.a.bytes, stream)


def operator_reads(m: Memory, stream: int) -> None:
    with operator(stream) as touch:
        touch(m.a.address, m.a.bytes, write=False)


def operator_writes(m: Memory, stream: int) -> None:
    with operator(stream) as touch:
        touch(m.a.address, m.a.bytes, write=True)


READS = (kernel_reads, copy_reads, operator_reads)
WRITES = (kernel_writes, copy_writes, fill_writes, operator_writes)
CONFLICTS = [
    *itertools.product(WRITES, READS),
    *itertools.product(READS, WRITES),
    *itertools.product(WRITES, WRITES),
]
WORDS = {
    kernel_reads: "kernel shift on stream {} of device 0 reads",
    kernel_writes: "kernel shift on stream {} of device 0 writes",
    copy_reads: "a copy on the device on stream {} of device 0 reads",
    copy_writes: "a copy to the device on stream {} of device 0 writes",
    fill_writes: "a fill on stream {} of device 0 writes",
    operator_reads: "add on stream {} of device 0 reads",
    operator_writes: "add on stream {} of device 0 writes",
}


def name(case: object) -> str:
    return getattr(case, "__name__", str(case))


def number(stream: int) -> int:
    found = ctypes.c_int()
    ok("aclrtStreamGetId", stream, ctypes.byref(found))
    return found.value


def no_order(first: int, second: int, third: int) -> None:
    pass


def event(first: int, second: int, third: int) -> None:
    wait(second, record(first))


def event_by_way_of_a_third(first: int, second: int, third: int) -> None:
    wait(third, record(first))
    wait(second, record(third))


def stream_synchronised(first: int, second: int, third: int) -> None:
    ok("aclrtSynchronizeStream", first)


def device_synchronised(first: int, second: int, third: int) -> None:
    ok("aclrtSynchronizeDevice")


def event_synchronised(first: int, second: int, third: int) -> None:
    ok("aclrtSynchronizeEvent", record(first))


def event_seen_complete(first: int, second: int, third: int) -> None:
    seen, status = record(first), ctypes.c_int(0)
    while status.value == 0:
        ok("aclrtQueryEventStatus", seen, ctypes.byref(status))


def stream_seen_complete(first: int, second: int, third: int) -> None:
    until_done(first)


ORDERS = (
    event,
    event_by_way_of_a_third,
    stream_synchronised,
    device_synchronised,
    event_synchronised,
    event_seen_complete,
    stream_seen_complete,
)


def event_of_the_wrong_stream(first: int, second: int, third: int) -> None:
    wait(second, record(third))


def event_recorded_too_late(first: int, second: int, third: int) -> None:
    """The wait came before the recording: it saw none."""
    late = made("aclrtCreateEventExWithFlag", 0)
    wait(second, late)
    ok("aclrtRecordEvent", late, first)


def only_the_second_synchronised(first: int, second: int, third: int) -> None:
    ok("aclrtSynchronizeStream", second)


def seen_incomplete(first: int, second: int, third: int) -> None:
    status = ctypes.c_int()
    with acl.hold(first):
        seen = record(first)
        ok("aclrtQueryEventStatus", seen, ctypes.byref(status))
        assert status.value == 0
        ok("aclrtStreamQuery", first, ctypes.byref(status))
        assert status.value == 1


NO_ORDERS = (
    no_order,
    event_of_the_wrong_stream,
    event_recorded_too_late,
    only_the_second_synchronised,
    seen_incomplete,
)


@pytest.mark.parametrize(("first", "second"), CONFLICTS, ids=name)
def test_conflicts_are_found(streams: list[int], first: object, second: object) -> None:
    memory = Memory()
    first(memory, streams[0])
    second(memory, streams[1])
    codes = synchronize(*streams[:2])
    assert sorted(codes) == [0, RACE]
    text = message()
    assert text.startswith("stream-race: ")
    for task, stream in ((first, streams[0]), (second, streams[1])):
        assert WORDS[task].format(number(stream)) in text
    assert "record_stream" in text
    assert len(acl.status().of_kind("stream-race")) == 1
    assert synchronize(*streams) == [0, 0, 0]  # told once


@pytest.mark.parametrize("order", [*ORDERS, *NO_ORDERS], ids=name)
@pytest.mark.parametrize(
    ("first", "second"),
    [(kernel_writes, kernel_reads), (kernel_reads, kernel_writes), (copy_writes, operator_reads)],
    ids=name,
)
def test_what_orders_and_what_does_not(streams: list[int], first: object, second: object, order: object) -> None:
    memory = Memory()
    first(memory, streams[0])
    order(*streams)
    second(memory, streams[1])
    codes = synchronize(*streams)
    errors = acl.status().of_kind("stream-race")
    assert (codes == [0, 0, 0]) == (order in ORDERS)
    assert (errors == []) == (order in ORDERS)


@pytest.mark.parametrize("late", [0, 1])
def test_timing_changes_nothing(streams: list[int], late: int) -> None:
    """The same race whichever of the two really comes first."""
    memory = Memory()
    acl.hold_streams()
    kernel_writes(memory, streams[0])
    kernel_reads(memory, streams[1])
    acl.release_streams(streams[1 - late])
    first = synchronize(streams[1 - late])
    acl.release_streams()
    assert first == [0]
    assert synchronize(streams[late]) == [RACE]
    assert "kernel shift" in message()


def test_two_reads_and_other_bytes_are_no_conflict(streams: list[int]) -> None:
    a, b, c = Array(value=1), Array(value=0), Array(value=0)
    launch(streams[0], a, b)
    launch(streams[1], a, c)
    half = Array(4 * COUNT, value=1)
    launch(streams[0], a, half.address)
    launch(streams[1], a, half.address + half.bytes // 2)
    assert synchronize(*streams[:2]) == [0, 0]
    assert not acl.status().errors
    launch(streams[0], a, half.address)
    launch(streams[1], a, half.address + half.bytes // 2 - 32)
    assert sorted(synchronize(*streams[:2])) == [0, RACE]
    (error,) = acl.status().errors
    assert f"bytes [{half.bytes // 2 - 32}, {half.bytes // 2}) of device block" in error.message


def test_a_read_is_not_forgotten_because_another_came_after_it(streams: list[int]) -> None:
    memory = Memory()
    kernel_reads(memory, streams[0])
    while any(it.done < it.enqueued for it in acl.status().streams):  # which orders nothing
        pass
    copy_reads(memory, streams[1])
    wait(streams[2], record(streams[1]))
    kernel_writes(memory, streams[2])
    assert RACE in synchronize(*streams)
    (error,) = acl.status().errors
    assert f"kernel shift on stream {number(streams[0])} of device 0 reads" in error.message


def test_the_host_must_wait_before_it_copies(streams: list[int]) -> None:
    """aclrtMemcpy does not wait for streams; its own error says so."""
    a, b = Array(value=1), Array(value=0)
    out = (ctypes.c_float * b.count)()
    launch(streams[0], a, b)
    wait(streams[1], record(streams[0]))
    synchronize(streams[1])  # the host now comes after the launch by way of stream 1
    ok("aclrtMemcpy", ctypes.addressof(out), b.bytes, b.address, b.bytes, TO_HOST)
    launch(streams[0], a, b)
    result = code("aclrtMemcpy", ctypes.addressof(out), b.bytes, b.address, b.bytes, TO_HOST)
    synchronize(streams[0])
    # Either side may really have come first; it is a race both times.
    assert result == RACE or acl.status().of_kind("stream-race")
    (error,) = acl.status().errors
    assert "a copy to the host on the host reads" in error.message
    assert "synchronise the stream" in error.message


def test_memory_given_to_another_stream_too_early_is_found(streams: list[int]) -> None:
    """What record_stream is for: a tensor freed while a second stream uses it, and its bytes handed out again."""
    segment, source = Array(value=0), Array(value=1)
    for recorded in (True, False):
        library().cann_sim_acl_tensor_allocated(ctypes.c_void_p(segment.address), ctypes.c_size_t(segment.bytes))
        launch(streams[0], source, segment)
        wait(streams[1], record(streams[0]))
        other = Array(value=0)
        launch(streams[1], segment, other)  # a second stream reads it
        library().cann_sim_acl_tensor_freed(ctypes.c_void_p(segment.address))
        if recorded:  # the allocator waits for an event of the second stream
            ok("aclrtSynchronizeEvent", record(streams[1]))
        library().cann_sim_acl_tensor_allocated(ctypes.c_void_p(segment.address), ctypes.c_size_t(segment.bytes))
        launch(streams[0], source, segment, 3)  # somebody else's tensor now
        codes = synchronize(*streams[:2])
        library().cann_sim_acl_tensor_freed(ctypes.c_void_p(segment.address))
        assert (sorted(codes) == [0, 0]) == recorded
    (error,) = acl.status().errors
    assert "record_stream" in error.message
    assert "of a tensor of 512 bytes" in error.message


def test_memory_that_was_freed_and_allocated_again_has_no_history(streams: list[int]) -> None:
    source = Array(value=1)
    seen = set()
    for _ in range(50):
        memory = Array(value=0)
        seen.add(memory.address)
        launch(streams[0], source, memory)
        synchronize(streams[0])
        memory.free()
    assert len(seen) < 50  # some address came back
    memory = Array()
    launch(streams[1], source, memory)
    assert synchronize(streams[1]) == [0]


def test_launches_without_checks_are_left_out(streams: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checks nobody knows what a kernel touched."""
    memory = Memory()
    monkeypatch.setenv("CANN_SIM_CHECK", "0")
    kernel_writes(memory, streams[0])
    kernel_reads(memory, streams[1])
    assert synchronize(*streams[:2]) == [0, 0]


@pytest.mark.parametrize("asked", [0, 1])
def test_either_stream_of_a_race_tells_it(streams: list[int], asked: int) -> None:
    """Once both have run; the other one does not tell it again, nor does the device."""
    memory = Memory()
    kernel_writes(memory, streams[0])
    kernel_reads(memory, streams[1])
    until_done(streams[0])
    until_done(streams[1])
    faults = {stream.handle: stream.fault for stream in acl.status().streams}
    assert [faults[stream] for stream in streams] == [RACE, RACE, 0]
    assert synchronize(streams[asked]) == [RACE]
    assert synchronize(streams[1 - asked]) == [0]
    assert code("aclrtSynchronizeDevice") == 0


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("task", [copy_reads, fill_writes, operator_reads, operator_writes], ids=name)
def test_the_default_stream_is_a_stream_like_any_other(streams: list[int], task: object, asked: int) -> None:
    memory, default = Memory(), None
    kernel_writes(memory, streams[0])
    task(memory, default)
    until_done(streams[0])
    until_done(default)
    faults = {stream.handle: stream.fault for stream in acl.status().streams if stream.device == 0}
    assert [faults[handle] for handle in (0, *streams)] == [RACE, RACE, 0, 0]
    first, second = (default, streams[0]) if asked == 0 else (streams[0], default)
    assert synchronize(first) == [RACE]
    assert synchronize(second) == [0]
    task(memory, default)  # is ordered now
    assert synchronize(default) == [0]


def test_what_was_noted_before_an_allocation_is_not_its_history(streams: list[int]) -> None:
    """As when a task notes its access to a block that has just been freed; here it goes beyond its block."""
    first = Array(COUNT)
    with operator(streams[0]) as touch:
        touch(first.address, 1 << 31, write=True)
    # The first ones may fill holes before it.
    behind = next(
        array for array in (Array(COUNT) for _ in range(100_000)) if 0 < array.address - first.address < 1 << 31
    )
    ok("aclrtMemsetAsync", behind.address, behind.bytes, 0, behind.bytes, streams[1])
    assert synchronize(streams[1]) == [0]
