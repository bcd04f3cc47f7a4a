"""Streams, events and device memory as operators on the host use them. Run by test_torch_programs.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch

import cann_sim
from cann_sim import acl

KERNEL = """
#include "kernel_operator.h"
using namespace AscendC;

// y = x + 1, count floats, a multiple of 8, on one core
extern "C" __global__ __aicore__ void add_one(GM_ADDR x, GM_ADDR y, uint32_t count) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, count * sizeof(float));
  LocalTensor<float> tile = buffer.Get<float>();
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  DataCopy(tile, from, count);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  Adds(tile, tile, 1.0f, count);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopy(to, tile, count);
}
"""


@pytest.fixture(autouse=True)
def no_errors():
    yield
    torch.npu.synchronize()
    assert not acl.status().errors


def add_one(x: torch.Tensor, y: torch.Tensor, count: int) -> None:
    library = ctypes.CDLL(str(cann_sim.compile(KERNEL, name="add_one").path))
    stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y)]
    assert library.aclrtlaunch_add_one(1, stream, *pointers, ctypes.c_uint32(count)) == 0


def error(kind: str) -> str:
    """The message of the one error there is; the errors are cleared."""
    with contextlib.suppress(RuntimeError):
        torch.npu.synchronize()
    errors = acl.status().errors
    acl.clear_errors()
    assert [error.kind for error in errors] == [kind], errors
    return errors[0].message


def synchronisations() -> dict[str, int]:
    return {name: count for name, count in acl.status().calls.items() if name.startswith("aclrtSynchronize")}


def test_operators_wait_for_kernels_of_their_stream():
    x, y = torch.arange(64.0, device="npu"), torch.empty(64, device="npu")
    add_one(x, y, 64)  # compiled here, which takes its time
    stream = torch.npu.current_stream().npu_stream
    acl.hold_streams(stream)
    add_one(x, y, 64)
    add_one(y, y, 64)
    threading.Timer(0.2, acl.release_streams, [stream]).start()
    z = y * 2
    assert torch.equal(z.cpu(), (torch.arange(64.0) + 2) * 2)


def test_operators_synchronise_nothing():
    x = torch.ones(64, device="npu")
    before = synchronisations()
    y = (x + 1).t().contiguous()[::2].fill_(3)
    torch.cat([x, y]).half().sum()
    assert synchronisations() == before
    x.nonzero()  # its shape has to be known
    assert synchronisations() != before


def test_a_write_past_a_tensor_is_found():
    x, y = torch.ones(64, device="npu"), torch.empty(56, device="npu")
    add_one(x, y, 64)
    assert "gm-bounds" in error("kernel")
    add_one(x, y, 56)
    assert y.sum().item() == 112


def test_a_read_of_what_nobody_wrote_is_found():
    x, y = torch.empty(64, device="npu"), torch.empty(64, device="npu")
    add_one(x, y, 64)
    assert "uninitialised" in error("kernel")
    x[::2] = 1.0
    add_one(x, y, 64)
    assert "uninitialised" in error("kernel")
    x[1::2] = 2.0
    add_one(x, y, 64)
    assert y.sum().item() == 32 * 5


def test_a_tensor_that_takes_the_place_of_another_one_is_new():
    for _ in range(3):
        x = torch.ones(64, device="npu")
        y = torch.empty(64, device="npu")
        add_one(x, y, 64)
        del x, y
    x = torch.empty(64, device="npu")
    y = torch.empty(64, device="npu")
    add_one(x, y, 64)
    assert "uninitialised" in error("kernel")


def test_kernels_keep_their_tensors_when_others_take_their_place():
    x = torch.arange(64.0, device="npu")
    with acl.hold(torch.npu.current_stream()):
        for size in (64, 48, 8, 128, 16):
            y = torch.empty(size, device="npu")
            add_one(x, y, min(size, 64))
            del y
    torch.npu.synchronize()


def test_side_streams():
    x, side = torch.ones(64, device="npu"), torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        y = x + 1
        done = torch.npu.Event()
        done.record()
    x.record_stream(side)
    torch.npu.current_stream().wait_event(done)
    y.record_stream(torch.npu.current_stream())
    assert (y * 2).sum().item() == 256


def test_a_missing_wait_is_found():
    x, side = torch.ones(64, device="npu"), torch.npu.Stream()
    torch.npu.synchronize()
    x.add_(1)
    with pytest.raises(RuntimeError, match="aten::mul broke a rule"), torch.npu.stream(side):
        x * 2
    for stream in (torch.npu.current_stream(), side):  # it is an error of both
        with contextlib.suppress(RuntimeError):
            stream.synchronize()
    message = error("stream-race")
    assert "aten::mul" in message
    assert "aten::add_" in message
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        assert (x * 2).sum().item() == 256


@pytest.mark.parametrize("rows", [8, 5000, 70000])  # the last one is in too many pieces to tell them all
def test_different_columns_do_not_race(rows):
    x, y, side = torch.empty(rows, 8, device="npu"), torch.empty(64, device="npu"), torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    x[:, :4] = 1
    with torch.npu.stream(side):
        x[:, 4:] = 2
    torch.npu.current_stream().wait_stream(side)
    assert x.sum().item() == rows * 4 * 3
    add_one(x, y, 64)  # all of it counts as written
    assert y.sum().item() == 8 * (4 * 2 + 4 * 3)


def test_a_device_does_not_wait_for_the_queue_of_another_one():
    x, y = torch.ones(64, device="npu:0"), torch.ones(64, device="npu:0")
    torch.npu.synchronize()
    with acl.delay("aclrtMemcpyAsync", 300):  # in the thread that empties the queue
        y.copy_(x)
        other = torch.empty(64, device="npu:1")
        other.fill_(1)
        torch.npu.synchronize()
    with torch.npu.device(1):
        result = torch.empty(64, device="npu:1")
        add_one(other, result, 64)
        torch.npu.synchronize()
        assert result.sum().item() == 128


def test_threads_with_streams_of_their_own():
    """Tensors come and go on two devices, in places that other threads have just given back."""
    failed = []

    def work(device: int) -> None:
        try:
            with torch.npu.device(device), torch.npu.stream(torch.npu.Stream()):
                for size in 25 * (64, 72, 80, 88):
                    x, y = torch.empty(size, device="npu"), torch.empty(size, device="npu")
                    x.fill_(size)
                    add_one(x, y, size)
                    z = y.clone()
                    assert z.add_(1).sum().item() == (size + 2) * size
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(device,)) for device in (0, 0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_record_stream_keeps_memory_back():
    side = torch.npu.Stream()
    x = torch.ones(1 << 20, device="npu")
    address = x.data_ptr()
    side.wait_stream(torch.npu.current_stream())
    with acl.hold(side), torch.npu.stream(side):
        # A kernel that waits: operators on the host would wait with it.
        y = torch.empty(1 << 20, device="npu")
        add_one(x, y, 64)
        x.record_stream(side)
        del x
        other = torch.empty(1 << 20, device="npu")
        assert other.data_ptr() != address
        tensors = {tensor.address for tensor in acl.status().devices[0].tensors}
        assert address in tensors
    torch.npu.synchronize()


def test_tensors_are_told_with_their_own_bytes():
    x = torch.empty(7, dtype=torch.int16, device="npu")
    torch.npu.synchronize()
    torch.ops.cann_sim.settle()
    known = {tensor.address: tensor.bytes for tensor in acl.status().devices[0].tensors}
    assert known[x.data_ptr()] == 14
    address = x.data_ptr()
    del x
    torch.ops.cann_sim.settle()
    assert address not in {tensor.address for tensor in acl.status().devices[0].tensors}


def test_toolkit_is_this_one():
    assert Path(os.environ["ASCEND_HOME_PATH"]) == Path(cann_sim.toolkit_path())
