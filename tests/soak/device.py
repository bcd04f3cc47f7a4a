"""Faults and load on the simulated NPU. `python -m cann_sim device.py PART SECONDS`; __main__.py has their settings."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import torch
from calls import Call, new_calls, same_bits
from load import Calls, held
from tried import Tried, main

from cann_sim import acl

ALLOCATION = "aclrtMallocAlign32"
WAITS = ("aclrtSynchronizeStreamWithTimeout", "aclrtSynchronizeDeviceWithTimeout")


def right(call: Call, expected: list[torch.Tensor]) -> bool:
    return same_bits(call(), expected)


def counted(call: Call, prefix: str) -> dict[str, int]:
    """How often a call calls each function of AscendCL, or each kernel, whose name begins so."""
    before = acl.status().calls
    call()
    torch.npu.synchronize()
    after = acl.status().calls
    return {name: after[name] - before.get(name, 0) for name in after if name.startswith(prefix)}


def memory(tried: Tried, seconds: float) -> None:
    """No memory on the device, from each allocation of a call on; each tensor is an allocation of its own."""
    calls = new_calls("npu", large=False)
    for name, call in calls.items():
        expected = call()
        allocations = counted(call, ALLOCATION)[ALLOCATION]
        assert allocations > 3, "tensors are cut out of larger blocks: PYTORCH_NO_NPU_MEMORY_CACHING is not set"
        gc.collect()
        in_use = acl.status().devices[0].memory_bytes
        for skip in range(allocations):
            raised = False
            try:
                with acl.fail(ALLOCATION, acl.OUT_OF_MEMORY, skip=skip, count=1 << 20):
                    call()
                    torch.npu.synchronize()
            except RuntimeError as error:
                raised = str(acl.OUT_OF_MEMORY) in str(error) or isinstance(error, torch.OutOfMemoryError)
            tried("allocations that failed", raised, f"{name}, allocation {skip}: nothing was raised")
            gc.collect()
            now = acl.status().devices[0].memory_bytes
            tried("looks at the memory afterwards", now == in_use, f"{name}, allocation {skip}: {now - in_use} bytes")
            tried("calls after it", right(call, expected), f"{name}, allocation {skip}")
    tried("checks of the simulator", not acl.status().errors, str(acl.status().errors))


def faults(tried: Tried, seconds: float) -> None:
    """Each launch of a call fails in turn, and each wait for the device reports a fault; without torch_npu's queue."""
    for name, call in new_calls("npu", large=False).items():
        expected = call()
        for launch, count in counted(call, "launch:npu_xent").items():
            for skip in range(count):
                text = ""
                try:
                    with acl.fail(launch, acl.KERNEL_ERROR, skip=skip):
                        call()
                        torch.npu.synchronize()
                except RuntimeError as error:
                    text = str(error)
                tried("launches that failed", launch.partition(":")[2] in text, f"{name}, {launch} {skip}: {text!r}")
                tried("calls after it", right(call, expected), f"{name}, {launch} {skip}")
        tried("checks of the simulator", not acl.status().errors, str(acl.status().errors))
        for wait in WAITS:
            text = ""
            try:
                with acl.fail(wait, acl.KERNEL_ERROR, count=1 << 20):
                    call()
                    torch.npu.synchronize() if "Device" in wait else torch.npu.current_stream().synchronize()
            except RuntimeError as error:
                text = str(error)
            tried("faults that a wait reported", text != "", f"{name}, {wait}")
            torch.npu.synchronize()
            acl.clear_errors()  # torch_npu may read a result for which the wait has failed
            tried("calls after it", right(call, expected), f"{name}, {wait}")


ONE_FAULT = """
import torch, npu_xent
from cann_sim import acl
generator = torch.Generator().manual_seed(0)
x = torch.randn(64, 1000, generator=generator).npu().requires_grad_()
y = torch.randint(0, 1000, (64,), generator=generator).npu()
def step():
    loss = npu_xent.cross_entropy(x, y, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.item().hex(), grad.double().abs().sum().item().hex()
print(*step())
torch.npu.synchronize()
with acl.fail("launch:npu_xent_{kernel}", acl.KERNEL_ERROR, skip={skip}, count={count}):
    try:
        step()
        torch.npu.synchronize()
    except RuntimeError as error:
        print("raised:", "npu_xent_{kernel}" in str(error))
    else:
        print("nothing was raised")
"""
KERNELS = {"reduce_rows": 4, "row_stats_grad": 1, "scale": 1}


def queued(tried: Tried, seconds: float) -> None:
    """A launch fails in torch_npu's queue: the process hears of it; a fresh one has the results of before."""
    results = set()
    for kernel, count in KERNELS.items():
        for skip in range(count):
            code = ONE_FAULT.format(kernel=kernel, skip=skip, count=1)
            run = subprocess.run(
                [sys.executable, "-m", "cann_sim", "-c", code], capture_output=True, text=True, timeout=300
            )
            lines = run.stdout.splitlines()
            results.add(lines[0] if lines else "nothing")
            said = lines[1:] == ["raised: True"]
            tried("launches that failed in the queue", said, f"{kernel} {skip}: {lines[1:]} {run.stderr[-500:]}")
            tried("fresh processes after it", len(results) == 1, f"{kernel} {skip}: {results}")


def steps(tried: Tried, seconds: float) -> None:
    """500 calls with a backward (more in more time): neither memory nor descriptors nor threads grow."""
    calls = new_calls("npu", large=False)
    names, n = list(calls), 0
    before, device = held(), 0
    while n < 500 or tried.seconds() < seconds:
        calls[names[n % len(names)]]()
        tried("steps")
        n += 1
        if n == 200:
            torch.npu.synchronize()
            before, device = held(), torch.npu.memory_allocated()
    torch.npu.synchronize()
    grown = {what: now - before[what] for what, now in held().items()}
    grown["bytes of the device"] = torch.npu.memory_allocated() - device
    for what, more in grown.items():
        tried("looks at what a process holds", more <= (8 << 20 if what == "bytes" else 0), f"{more} more {what}")
    tried("checks of the simulator", not acl.status().errors, str(acl.status().errors))


def threads(tried: Tried, seconds: float) -> None:
    """Eight threads on streams of their own call different functions, while launches are slow at times."""
    calls = new_calls("npu", large=False)
    expected = {name: call() for name, call in calls.items()}
    torch.npu.synchronize()
    lock, names = threading.Lock(), list(calls)

    def work(number: int) -> None:
        torch.npu.set_device(0)
        stream = torch.npu.Stream()
        stream.wait_stream(torch.npu.default_stream())
        with torch.npu.stream(stream):
            n = number
            while tried.seconds() < seconds or n < number + 2:
                name = names[n % len(names)]
                same = right(calls[name], expected[name])
                with lock:
                    tried("calls from 8 threads on streams of their own", same, name)
                n += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    n = 0
    while any(worker.is_alive() for worker in workers):
        kernel = ("row_stats", "row_grad", "row_stats_grad", "reduce_rows")[n % 4]
        with acl.delay(f"launch:npu_xent_{kernel}", 3.0):
            workers[n % 8].join(0.2)
        n += 1
    tried("checks of the simulator", not acl.status().errors, str(acl.status().errors))


class ForwardCalls(Calls):
    """Calls without a backward."""

    @torch.no_grad()
    def __getitem__(self, item: int) -> bool:
        return super().__getitem__(item)


def forks(tried: Tried, seconds: float) -> None:
    """Workers of a DataLoader that compute on the CPU, beside a parent that computes on the device."""
    on_device, calls = new_calls("npu", large=False), new_calls(large=False)
    with torch.no_grad():  # torch refuses a backward in a child if its parent has had one on a device
        expected = {name: call() for name, call in calls.items()}
    expected_there = {name: call() for name, call in on_device.items()}
    while tried.seconds() < seconds or not tried.counts["calls in workers of a DataLoader"]:
        loader = torch.utils.data.DataLoader(ForwardCalls(calls, expected), num_workers=2, batch_size=None, timeout=60)
        for name, same in zip(calls, loader, strict=True):
            tried("calls in workers of a DataLoader", bool(same), "other bits")
            if name in on_device:  # not float64
                tried("calls on the device between them", right(on_device[name], expected_there[name]), name)


if __name__ == "__main__":
    main({part.__name__: part for part in (memory, faults, queued, steps, threads, forks)})
