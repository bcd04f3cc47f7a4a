"""Load on the CPU: many threads, forks, signals, many steps. `python load.py PART SECONDS`"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import torch
from calls import Call, new_calls, same_bits
from torch import Tensor
from tried import Tried, main

THREADS = 16
STEPS = 10_000


def threads(tried: Tried, seconds: float) -> None:
    """16 threads call different functions at once, with 1 to 3 threads of torch each."""
    torch.set_num_threads(1)
    calls = new_calls()
    expected = {name: call() for name, call in calls.items()}
    products = [name for name in calls if name.startswith("linear")]
    lock = threading.Lock()

    def work(seed: int) -> None:
        chosen, n = random.Random(seed), 0
        while tried.seconds() < seconds or n < 5:
            n += 1
            name = chosen.choice(list(calls))
            # torch's products have the same bits only with the same number of threads.
            torch.set_num_threads(1 if name in products else chosen.choice([1, 2, 3]))
            right = same_bits(calls[name](), expected[name])
            with lock:
                tried("calls from 16 threads at once", right, f"{name} has other bits")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


class Calls(torch.utils.data.Dataset[bool]):
    """Each item is a call in a worker, right or not."""

    def __init__(self, calls: dict[str, Call], expected: dict[str, list[Tensor]]) -> None:
        self.calls, self.expected = calls, expected

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, item: int) -> bool:
        name = list(self.calls)[item]
        return same_bits(self.calls[name](), self.expected[name])


def in_child(names: list[str], expected: dict[str, list[Tensor]], right: multiprocessing.connection.Connection) -> None:
    """A process that multiprocessing has started."""
    torch.set_num_threads(1)
    calls = new_calls(large=False)
    right.send([same_bits(calls[name](), expected[name]) for name in names])


def start(method: str, names: list[str], expected: dict[str, list[Tensor]]) -> list[bool]:
    """What a process started by `method` finds; no answer within two minutes counts as wrong."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(names, expected, there))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(120) else [False]
    except EOFError:
        return [False]
    finally:
        process.join(10)
        process.kill()
        process.join()


def raw(results: list[Tensor]) -> list[bytes]:
    """Their bits."""
    return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in results]


def forks(tried: Tried, seconds: float) -> None:
    """Children by fork and spawn and workers of a DataLoader, before the parent's first call, and between its calls."""
    calls = new_calls(large=False)
    names = list(calls)
    torch.set_num_threads(1)
    # Nothing has been called yet.
    here, there = multiprocessing.Pipe(duplex=False)
    first = os.fork()
    if first == 0:
        try:
            there.send([raw(call()) for call in (*calls.values(), *calls.values())])
        finally:
            os._exit(0)
    there.close()
    try:
        of_child = here.recv() if here.poll(120) else []
    except EOFError:
        of_child = []
    os.waitpid(first, 0)
    expected = {name: call() for name, call in calls.items()}
    mine = [raw(results) for results in expected.values()]
    tried("children by fork before the first call", of_child == 2 * mine, "other bits, or no answer")
    while tried.seconds() < seconds or not tried.counts["calls in workers of a DataLoader"]:
        torch.set_num_threads(1 + tried.counts["children by spawn"] % 3)
        for name in names[:9]:
            tried("calls between forks", same_bits(calls[name](), expected[name]), name)
        loader = torch.utils.data.DataLoader(Calls(calls, expected), num_workers=2, batch_size=None, timeout=60)
        for right in loader:
            tried("calls in workers of a DataLoader", bool(right), "other bits")
        torch.set_num_threads(1)
        for method in ("fork", "spawn"):
            tried(f"children by {method}", all(start(method, names, expected)), "other bits, or no answer")


def busy_forks(tried: Tried, seconds: float) -> None:
    """Forks while other threads take memory from the pool of large outputs and give it back."""
    torch.set_num_threads(1)
    rows, classes = 8400, 1000
    x, y, totals = torch.randn(rows, classes), torch.zeros(rows, dtype=torch.int64), torch.ones(3)
    ops, done = torch.ops.npu_xent, threading.Event()

    def gradient() -> Tensor:
        return ops.row_stats_grad(x, y, None, totals, reduction="sum")[-1]

    def work() -> None:
        while not done.is_set():
            gradient()

    expected = gradient()
    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        while tried.seconds() < seconds or tried.counts["children of a busy parent"] < 20:
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # ends a child that waits for a lock
                os._exit(0 if torch.equal(gradient(), expected) else 1)
            code = os.waitpid(child, 0)[1]
            tried("children of a busy parent", code == 0, f"wait status {code}")
    finally:
        done.set()
    for worker in workers:
        worker.join()


class Alarm(Exception):
    """What the handler of SIGALRM raises, in every second case."""


def signals(tried: Tried, seconds: float) -> None:
    """SIGALRM, SIGUSR1 and SIGINT at random moments of a call, whose handlers count or raise."""
    torch.set_num_threads(2)
    calls = new_calls()
    chosen, received = random.Random(0), [0]
    torch.set_num_threads(1)
    expected = {name: call() for name, call in calls.items()}
    lasts, sent, interrupts = {}, 0, 0
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        lasts[name] = time.perf_counter() - began

    def count(number: int, frame: FrameType | None) -> None:
        received[0] += 1

    def interrupt(number: int, frame: FrameType | None) -> None:
        received[0] += 1
        raise Alarm

    signal.signal(signal.SIGUSR1, count)
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    while tried.seconds() < seconds or not tried.counts["calls after a signal"]:
        name = chosen.choice(list(calls))
        number = chosen.choice([signal.SIGALRM, signal.SIGUSR1, signal.SIGINT])
        signal.signal(signal.SIGALRM, chosen.choice([count, interrupt]))
        delay = chosen.uniform(0, 1.2) * lasts[name]
        sender = threading.Timer(delay, signal.pthread_kill, (main_thread, number))
        try:
            sent += 1
            sender.start()
            right = same_bits(calls[name](), expected[name])
            tried(f"calls during which {number.name} came", right, name)
            sender.join()
        except (Alarm, KeyboardInterrupt) as error:
            interrupts += isinstance(error, KeyboardInterrupt)
            tried(f"calls that {number.name} ended", number != signal.SIGUSR1)
        sender.join()
        tried("calls after a signal", same_bits(calls[name](), expected[name]), f"{name} after {number.name}")
    arrived = received[0] + interrupts
    tried("looks at how many signals arrived", arrived == sent, f"{arrived} of {sent}")


def held() -> dict[str, int]:
    """Resident bytes, file descriptors and threads of this process."""
    return {
        "bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def steps(tried: Tried, seconds: float) -> None:
    """10,000 calls with a backward (more in more time): neither memory nor descriptors nor threads grow."""
    torch.set_num_threads(2)
    calls = new_calls()
    names = list(calls)
    before, n = held(), 0
    while n < STEPS or tried.seconds() < seconds:
        name = names[n % len(names)]
        if not name.endswith("large output") or n // len(names) % 10 == 0:
            calls[name]()
            tried("steps")
        if n % 100 == 0:  # more large outputs at once than the pool keeps afterwards
            alive = [calls[names[-1]]() for _ in range(2)]
            del alive
            tried("times that the pool had to unmap")
        n += 1
        if n == STEPS // 5:
            before = held()
    grown = {what: now - before[what] for what, now in held().items()}
    for what, allowed in (("bytes", 4 << 20), ("file descriptors", 0), ("threads", 0)):
        tried("looks at what a process holds", grown[what] <= allowed, f"{grown[what]} more {what}")


if __name__ == "__main__":
    main({part.__name__: part for part in (threads, forks, busy_forks, signals, steps)})
