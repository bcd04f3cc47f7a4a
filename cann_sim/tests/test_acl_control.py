"""Calls that fail or are slow on demand, counters, the status, the leak report, and what the environment sets."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from acl_case import (
    KERNEL_ERROR,
    NOT_COMPLETE,
    OUT_OF_MEMORY,
    Array,
    code,
    folder,
    launch,
    library,
    made,
    message,
    ok,
    operator,
    synchronize,
    until_done,
)

from cann_sim import _torch_runtime, acl

PROGRAM = """
import ctypes, sys
from cann_sim._runtime import runtime
runtime()
acl = ctypes.CDLL({library!r}, ctypes.RTLD_GLOBAL)
acl.aclGetRecentErrMsg.restype = acl.aclrtGetSocName.restype = ctypes.c_char_p
out = ctypes.c_void_p()
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of its own, which has the library loaded as `acl`."""
    source = PROGRAM.format(library=str(folder() / "libascendcl.so")) + textwrap.dedent(program)
    path = os.pathsep.join([str(Path(acl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=True,
        timeout=60,
    )


def test_calls_fail_when_they_are_told_to(streams: list[int]) -> None:
    out = ctypes.c_void_p()

    def allocate() -> int:
        result = code("aclrtMalloc", ctypes.byref(out), 64, 0)
        if result == 0:
            ok("aclrtFree", out.value)
        return result

    with acl.fail("aclrtMalloc", OUT_OF_MEMORY, skip=1, count=2):
        assert [allocate() for _ in range(5)] == [0, OUT_OF_MEMORY, OUT_OF_MEMORY, 0, 0]
        message()
    with acl.fail("aclrtMalloc", OUT_OF_MEMORY, count=100):
        assert allocate() == OUT_OF_MEMORY
        assert "aclrtMalloc was told to fail with 207001" in message()
    assert allocate() == 0
    with pytest.raises(ValueError, match="must not be 0"), acl.fail("aclrtMalloc", 0):
        pass


def test_launches_fail_when_they_are_told_to(streams: list[int]) -> None:
    a, b = Array(value=1), Array(value=0)
    before = acl.calls("launch:shift")
    with acl.fail("launch:shift", KERNEL_ERROR, skip=1):
        assert launch(streams[0], a, b, 1) == 0
        assert launch(streams[0], a, b, 2) == KERNEL_ERROR
        assert launch(streams[0], a, b, 3) == 0
    assert synchronize(streams[0]) == [0]
    assert (b.raw() == 4).all()
    assert acl.calls("launch:shift") - before == 3


def test_calls_are_slow_when_they_are_told_to(streams: list[int]) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        synchronize(streams[0])
        return time.perf_counter() - start

    with acl.delay("aclrtSynchronizeStream", 300):
        assert seconds() > 0.3
    assert min(seconds() for _ in range(5)) < 0.3  # one may have been held up


def test_the_status_tells_what_there_is(streams: list[int]) -> None:
    before = acl.status()
    array = Array(16, value=0)
    made("aclrtMallocHost", 64)
    library().cann_sim_acl_tensor_allocated(ctypes.c_void_p(array.address + 8), ctypes.c_size_t(24))
    event = made("aclrtCreateEventExWithFlag", 0)
    with acl.hold(streams[0]):
        ok("aclrtRecordEvent", event, streams[0])
        after = acl.status()
    first = after.devices[0]
    assert len(after.devices) == 2
    assert first.memory_bytes == before.devices[0].memory_bytes + 64
    assert first.capacity_bytes == 4096 << 20
    assert [(block.address, block.bytes) for block in first.blocks] == [(array.address, 64)]
    assert [(tensor.address, tensor.bytes) for tensor in first.tensors] == [(array.address + 8, 24)]
    assert [block.bytes for block in after.host_blocks] == [64]
    assert after.events == before.events + 1
    (stream,) = [stream for stream in after.streams if stream.handle == streams[0]]
    assert (stream.device, stream.enqueued, stream.done, stream.held, stream.fault) == (0, 1, 0, True, 0)
    ok("aclrtMemsetAsync", array.address, 64, 0, 64, None)
    (default,) = [stream for stream in acl.status().streams if stream.handle == 0]
    assert default.enqueued > 0
    assert synchronize(None) == [0]
    assert after.calls["aclrtMalloc"] == before.calls.get("aclrtMalloc", 0) + 1
    assert after.calls["aclrtMalloc"] == acl.calls("aclrtMalloc")


def test_errors_are_kept_until_they_are_cleared(streams: list[int]) -> None:
    fresh, out = Array(), Array()
    for _ in range(2):
        launch(streams[0], fresh, out)
    synchronize(streams[0])
    launch(streams[0], fresh, out)
    until_done(streams[0])
    (error,) = acl.status().errors
    assert (error.kind, error.count) == ("kernel", 3)
    acl.clear_errors()
    assert acl.status().errors == ()
    assert synchronize(streams[0]) == [0]


def test_an_error_is_said_once_on_standard_error(streams: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    a, b = Array(value=1), Array(value=1)
    for _ in range(2):
        launch(streams[0], a, b)
        launch(streams[1], b, a)
        synchronize(*streams)
    text = capfd.readouterr().err
    assert text.count("cann_sim: stream-race: ") == len(acl.status().errors) > 0


def test_of_very_many_errors_the_number_is_kept(streams: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    kept, more = 1000, 50
    array = Array(kept + more)
    with operator(streams[0]) as touch:
        touch(array.address, array.bytes, write=True)
    with operator(streams[1]) as touch:
        for start in range(0, array.bytes, 4):  # a race each, of other bytes
            touch(array.address + start, 4, write=True)
    errors = acl.status().errors
    assert len(errors) == kept + 1
    assert errors[-1].count == more
    assert "further errors" in errors[-1].message
    assert capfd.readouterr().err.count("cann_sim: stream-race: ") == kept + 1
    acl.clear_errors()
    with operator(streams[2]) as touch:
        touch(array.address, 4, write=True)
    (error,) = acl.status().errors
    assert "further errors" not in error.message


def test_leaks_are_told_at_exit(streams: list[int]) -> None:
    program = """
        acl.aclrtSetDevice(1)
        def block(size, name="aclrtMalloc"):
            getattr(acl, name)(ctypes.byref(out), ctypes.c_size_t(size), 0)
            return ctypes.c_void_p(out.value)
        kept = block(100)
        acl.aclrtFree(block(200))
        block(300, "aclrtMallocHost")
        acl.cann_sim_acl_tensor_allocated(kept, ctypes.c_size_t(32))
        for _ in range(2):
            acl.aclrtCreateStream(ctypes.byref(out))
            acl.aclrtCreateEventExWithFlag(ctypes.byref(ctypes.c_void_p()), 0)
        acl.aclrtDestroyStream(ctypes.c_void_p(out.value))
    """
    lines = run(program, CANN_SIM_LEAKS="1").stderr.splitlines()
    assert [line.split(" at 0x")[0].removeprefix("cann_sim: leak: ") for line in lines] == [
        "device 1: block 1 of 100 bytes was never freed",
        "device 1: a tensor of 32 bytes",
        "host block 3 of 300 bytes was never freed",
        "stream 0 of device 1 was never destroyed",
        "2 events were never destroyed",
    ]
    assert run(program).stderr == ""
    fork = "\nimport os, sys\nif os.fork() == 0:\n    sys.exit(0)\nos.wait()\n"
    assert len(run(textwrap.dedent(program) + fork, CANN_SIM_LEAKS="1").stderr.splitlines()) == len(lines)


BUSY = """
acl.aclrtSetDevice(0)
acl.aclrtCreateStream(ctypes.byref(out))
stream = ctypes.c_void_p(out.value)
acl.aclrtCreateEventExWithFlag(ctypes.byref(out), 0)
event = ctypes.c_void_p(out.value)
acl.aclrtMalloc(ctypes.byref(out), ctypes.c_size_t(BYTES), 0)
for _ in range(TIMES):
    acl.aclrtMemsetAsync(out, ctypes.c_size_t(BYTES), 0, ctypes.c_size_t(BYTES), ON)
acl.aclrtRecordEvent(event, ON)
"""


def busy(bytes_each: int, times: int, on: str = "stream") -> str:
    """A stream and an event, recorded when many fills have run."""
    return BUSY.replace("BYTES", str(bytes_each)).replace("TIMES", str(times)).replace("ON", on)


def test_a_process_ends_while_streams_have_work(streams: list[int]) -> None:
    run(busy(1 << 20, 10000))


WAITING = (
    "acl.aclrtSynchronizeStream(ON)",
    "acl.aclrtSynchronizeDevice()",
    "acl.aclrtSynchronizeEvent(event)",
    "acl.aclrtResetDevice(0)",
    "acl.aclrtMemcpyAsync(host, ctypes.c_size_t(64), out, ctypes.c_size_t(64), 2, ON)",
    f"acl.cann_sim_acl_begin(ON, b'operator') or {NOT_COMPLETE}",
)


@pytest.mark.parametrize(
    ("call", "on"),
    [
        *((call, on) for call in WAITING for on in ("stream", "None")),
        ("acl.aclrtDestroyStream(stream)", "stream"),
        ("acl.aclrtDestroyStreamForce(stream)", "stream"),
    ],
)
def test_what_waits_after_the_streams_have_ended_fails(streams: list[int], call: str, on: str) -> None:
    """An exit handler or a static destructor that was there before the library's first call comes after its end."""
    program = f"""
        host = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
        def last(*_):
            code = {call.replace("ON", on)}
            print(code, acl.aclGetRecentErrMsg().decode(), flush=True)
        libc.on_exit(last, None)
    """
    ending = "\nlibc.exit(0)\n"  # with Python as it is
    result = run(textwrap.dedent(program) + busy(16 << 20, 400, on) + ending)
    assert result.stdout.startswith(f"{NOT_COMPLETE} the process is at its end"), result.stdout


def test_a_process_waits_for_what_runs_on_the_default_stream(streams: list[int]) -> None:
    """At its end, as for other streams: the memory is about to go."""
    program = """
        libc = ctypes.CDLL(None)
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def slow(_):
            started.set()
            time.sleep(0.5)
            print("done", flush=True)
        import threading, time
        started = threading.Event()
        acl.aclrtSetDevice(0)
        acl.aclrtLaunchHostFunc(None, slow, None)
        started.wait()
        libc.exit(0)
    """
    assert run(program).stdout == "done\n"


def test_a_child_that_is_forked_finds_no_lock_taken_and_no_worker(streams: list[int]) -> None:
    program = """
        import os, signal
        status = ctypes.c_int()
        for _ in range(200):
            for _ in range(200):
                acl.aclrtMemsetAsync(out, ctypes.c_size_t(64), 0, ctypes.c_size_t(64), stream)
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                acl.aclrtStreamQuery(stream, ctypes.byref(status))
                acl.aclrtMemsetAsync(out, ctypes.c_size_t(64), 0, ctypes.c_size_t(64), stream)
                code = acl.aclrtSynchronizeStream(stream)
                os._exit(0 if code == 507004 else 1)
            assert os.waitpid(child, 0)[1] == 0
        print(acl.aclrtSynchronizeStream(stream))
    """
    assert run(busy(64, 1) + textwrap.dedent(program)).stdout == "0\n"


@pytest.mark.parametrize(
    ("soc", "vector"),
    [("Ascend910B1", 48), ("Ascend910B2", 48), ("Ascend910B3", 40), ("Ascend910B4", 40), ("Ascend910_9391", 48)],
)
def test_the_chip_is_chosen_by_name(streams: list[int], soc: str, vector: int) -> None:
    program = """
        value = ctypes.c_int64()
        assert acl.aclInit(None) == 0
        counts = []
        for what in (1, 0):
            assert acl.aclGetDeviceCapability(0, what, ctypes.byref(value)) == 0
            counts.append(value.value)
        count = ctypes.c_uint32()
        acl.aclrtGetDeviceCount(ctypes.byref(count))
        print(acl.aclrtGetSocName().decode(), *counts, count.value)
    """
    assert run(program, CANN_SIM_SOC=soc, CANN_SIM_DEVICES="3").stdout.split() == [
        soc,
        str(vector),
        str(vector // 2),
        "3",
    ]


def test_a_chip_that_is_not_modelled_is_refused(streams: list[int]) -> None:
    program = "print(acl.aclInit(None), acl.aclGetRecentErrMsg().decode())"
    text = run(program, CANN_SIM_SOC="Ascend310P3").stdout
    assert text.startswith("507008 CANN_SIM_SOC=Ascend310P3: cann_sim models")


def test_the_capacity_comes_from_the_environment(streams: list[int]) -> None:
    program = """
        acl.aclrtSetDevice(0)
        print(*(acl.aclrtMalloc(ctypes.byref(out), ctypes.c_size_t(size << 20), 0) for size in (2, 2, 1)))
    """
    assert run(program, CANN_SIM_MEMORY_MB="3").stdout.split() == ["0", str(OUT_OF_MEMORY), "0"]


def test_the_version_is_one_that_torch_npu_parses(streams: list[int]) -> None:
    version = ctypes.create_string_buffer(1024)
    ok("aclsysGetVersionStr", None, version)
    assert version.value == b"8.5.0"
    ok("aclsysGetCANNVersion", 0, version)
    assert version.raw.startswith(b"8.5.0\0")
    assert b"simulated by cann_sim" in version.raw


def test_operators_of_the_vendor_are_refused_by_name(streams: list[int]) -> None:
    result = library().aclopCompileAndExecute(
        b"Add", 0, None, None, 0, None, None, None, 0, 0, None, ctypes.c_void_p(None)
    )
    assert result == 100024  # ACL_ERROR_OP_NOT_FOUND
    assert "operator Add" in message()


def test_collectives_may_be_asked_to_be_deterministic(streams: list[int]) -> None:
    """torch_npu does so before its first operator, by a function that it looks up in libhccl.so."""
    deterministic, accelerator, not_supported = 0, 1, 5
    function = ctypes.CDLL(str(folder() / "libhccl.so")).HcclSetConfig
    assert [function(deterministic, value) for value in (0, 1)] == [0, 0]
    assert function(accelerator, 0) == not_supported
    with acl.fail("HcclSetConfig", 4):
        assert function(deterministic, 1) == 4
        message()


def test_everything_that_torch_npu_links_against_is_there(streams: list[int]) -> None:
    """And its five other libraries bring it in."""
    found = _torch_runtime.installed()
    sys.path.insert(0, str(_torch_runtime._sources("acl")))
    try:
        import torch_npu_symbols
    finally:
        sys.path.pop(0)
    names = torch_npu_symbols.libraries(found.torch_npu, found.torch / "lib")
    assert names == ["acl_op_compiler", "acl_tdt_channel", "ge_runner", "graph", "hccl"]
    for name in names:
        assert hasattr(ctypes.CDLL(str(folder() / f"lib{name}.so")), "aclrtSetDevice")
    missing = torch_npu_symbols.stubs(found.torch_npu, [folder() / "libascendcl.so"])
    assert [line for line in missing.splitlines() if line.startswith("long ")] == [
        "long cann_sim_acl_not_modelled(const char *);"
    ]
    assert library().rtKernelLaunch() == 200001  # ACL_ERROR_API_NOT_SUPPORT: a stub
    assert "rtKernelLaunch" in message()
