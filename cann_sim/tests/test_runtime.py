"""Launching from Python: arguments, configuration, what is reported, launches at the same time."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest

import cann_sim
from cann_sim._runtime import runtime


class Range(ctypes.Structure):
    """cann_sim_range."""

    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("written", ctypes.c_int32))


SOURCE = """
#include <atomic>
#include <stdexcept>
#include "kernel_operator.h"
using namespace AscendC;

struct Options {
  uint32_t count;
  float factor;
};

extern "C" __global__ __aicore__ void numbers(GM_ADDR out, const Options options, float f, uint8_t small, int64_t wide,
                                              const int32_t* table) {
  GlobalTensor<float> values;
  values.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out));
  values(0) = options.factor * options.count;
  values(1) = f;
  values(2) = small;
  values(3) = static_cast<float>(wide);
  values(4) = table == nullptr ? -1.0f : static_cast<float>(table[0]);
}

// When this core ran, counted over all launches, in a cache line of its own.
extern "C" __global__ __aicore__ void turn(GM_ADDR out) {
  static std::atomic<int32_t> turns{0};
  GlobalTensor<int32_t> values;
  values.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(out));
  values(GetBlockIdx() * 16) = turns++;
}

// Copies `bytes` from one place to the other through UB.
extern "C" __global__ __aicore__ void move(GM_ADDR from, GM_ADDR to, uint32_t bytes) {
  TPipe pipe;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> queue;
  pipe.InitBuffer(queue, 2, bytes);
  GlobalTensor<uint8_t> source, target;
  source.SetGlobalBuffer(from + GetBlockIdx() * bytes);
  target.SetGlobalBuffer(to + GetBlockIdx() * bytes);
  const DataCopyExtParams whole(1, bytes, 0, 0, 0);
  auto tile = queue.AllocTensor<uint8_t>();
  DataCopyPad(tile, source, whole, DataCopyPadExtParams<uint8_t>());
  queue.EnQue(tile);
  tile = queue.DeQue<uint8_t>();
  DataCopyPad(target, tile, whole);
  queue.FreeTensor(tile);
}

extern "C" __global__ __aicore__ void asserts(GM_ADDR, uint32_t count) {
  ASCENDC_ASSERT(count < 8, { KERNEL_LOG(KERNEL_ERROR, "count"); });
}

extern "C" __global__ __aicore__ void throws(GM_ADDR, uint32_t count) {
  if (GetBlockIdx() == 1 && count >= 8) {
    throw std::runtime_error("of its own");
  }
}

extern "C" __global__ __aicore__ void fails_on(GM_ADDR, uint32_t first) {
  if (GetBlockIdx() >= first) {
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, 1 << 20);
  }
}
"""


@pytest.fixture(scope="module")
def library() -> cann_sim.KernelLibrary:
    return cann_sim.compile(SOURCE, name="runtime")


class Options(ctypes.Structure):
    """Options of the kernel `numbers`."""

    _fields_ = (("count", ctypes.c_uint32), ("factor", ctypes.c_float))


def test_arguments_arrive(library: cann_sim.KernelLibrary) -> None:
    out, table = np.zeros(5, np.float32), np.array([9], np.int32)
    library.launch("numbers", 1, out, Options(3, 0.5), 0.25, 255, -7, table)
    assert out.tolist() == [1.5, 0.25, 255, -7, 9]
    library.launch("numbers", 1, out, bytes(Options(2, 2)), ctypes.c_float(4), np.uint8(3), 1, None)
    assert out.tolist() == [4, 4, 3, 1, -1]


def test_arguments_that_do_not_fit_are_refused(library: cann_sim.KernelLibrary) -> None:
    out, good = np.zeros(5, np.float32), Options(1, 1)
    with pytest.raises(
        TypeError, match=r"takes 6 arguments \(1: a GM buffer, 2: a struct of 8 bytes, 3: a 32-bit float, .*\), 2 given"
    ):
        library.launch("numbers", 1, out, good)
    with pytest.raises(OverflowError, match="argument 4: an unsigned 8-bit integer is wanted, 256 does not fit"):
        library.launch("numbers", 1, out, good, 1.0, 256, 0, None)
    with pytest.raises(TypeError, match="argument 2: a struct of 8 bytes is wanted, 3 bytes given"):
        library.launch("numbers", 1, out, b"abc", 1.0, 1, 0, None)
    for wrong in (8, "abcdefgh", None):
        with pytest.raises(TypeError, match=f"a struct of 8 bytes is wanted, {type(wrong).__name__} given"):
            library.launch("numbers", 1, out, wrong, 1.0, 1, 0, None)
    with pytest.raises(TypeError, match="argument 5: a signed 64-bit integer is wanted, ndarray given"):
        library.launch("numbers", 1, out, good, 1.0, 1, out, None)
    with pytest.raises(TypeError, match=r"argument 1: a GM buffer \(an array, .*\) is wanted, list given"):
        library.launch("numbers", 1, [1, 2], good, 1.0, 1, 0, None)
    with pytest.raises(ValueError, match="not contiguous"):
        library.launch("numbers", 1, np.zeros(10, np.float32)[::2], good, 1.0, 1, 0, None)
    with pytest.raises(ValueError, match="blocks"):
        library.launch("numbers", 0, out, good, 1.0, 1, 0, None)
    with pytest.raises(AttributeError, match="no kernel 'number'; it has asserts, fails_on, move, numbers, throws"):
        library.launch("number", 1)


def test_a_library_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"libcann_sim.so has no kernels: a library that ascendc_library"):
        cann_sim.KernelLibrary(Path(cann_sim.toolkit_path()) / "lib64" / "libcann_sim.so")


def test_a_view_is_a_buffer_of_its_own(library: cann_sim.KernelLibrary) -> None:
    memory = np.arange(96, dtype=np.uint8)
    library.launch("move", 1, memory[:32], memory[64:], 32)
    assert memory[64:].tolist() == list(range(32))
    with pytest.raises(cann_sim.KernelError, match=r"\[0, 40\) of a GM buffer of 32 bytes") as caught:
        library.launch("move", 1, memory[:32], memory[32:], 40)
    assert caught.value.kind == "gm-bounds"


def test_outputs_and_workspace_are_unwritten_at_first(library: cann_sim.KernelLibrary) -> None:
    data, fresh = np.ones(32, np.uint8), np.ones(32, np.uint8)
    for unwritten in (cann_sim.Uninit(fresh), cann_sim.Workspace(32)):
        library.launch("move", 1, data, unwritten, 32)
        with pytest.raises(cann_sim.KernelError) as caught:
            library.launch("move", 1, unwritten, data, 32)
        assert caught.value.kind == "uninitialised"


def test_a_seed_changes_the_order_of_the_cores(
    library: cann_sim.KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each launch anew; without one, and after it, the order is ascending."""

    def order() -> list[int]:
        turns = np.zeros((20, 16), np.int32)
        library.launch("turn", 20, turns, config=cann_sim.Config(threads=1))
        return [int(turn) for turn in turns[:, 0] - turns[:, 0].min()]

    ascending = list(range(20))
    assert order() == ascending
    monkeypatch.setenv("CANN_SIM_SEED", "7")
    orders = [order() for _ in range(3)]
    assert [sorted(found) for found in orders] == [ascending] * 3
    assert len({tuple(found) for found in [*orders, ascending]}) == 4
    monkeypatch.delenv("CANN_SIM_SEED")
    assert order() == ascending


@pytest.mark.parametrize("seed", ["", "1", "2"])
def test_the_lowest_core_is_reported(
    seed: str, library: cann_sim.KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANN_SIM_SEED", seed)
    for first in (0, 3, 11):
        for threads in (1, 4):
            with pytest.raises(cann_sim.KernelError) as caught:
                library.launch("fails_on", 12, None, first, config=cann_sim.Config(threads=threads))
            assert (caught.value.core, caught.value.kernel, caught.value.kind) == (first, "fails_on", "ub-overflow")
            assert f"runtime.cpp:{caught.value.line}: ub-overflow" in str(caught.value)


def test_an_assertion_of_the_kernel(library: cann_sim.KernelLibrary) -> None:
    library.launch("asserts", 2, None, 7)
    with pytest.raises(cann_sim.KernelError) as caught:
        library.launch("asserts", 2, None, 8)
    error = caught.value
    assert (error.kind, error.kernel, error.core) == ("assert", "asserts", 0)
    assert "count < 8" in error.message
    assert "ASCENDC_ASSERT" in SOURCE.splitlines()[error.line - 1]


def test_an_exception_in_the_kernel(library: cann_sim.KernelLibrary) -> None:
    library.launch("throws", 2, None, 7)
    with pytest.raises(cann_sim.KernelError) as caught:
        library.launch("throws", 2, None, 8)
    assert (caught.value.kind, caught.value.kernel, caught.value.core) == ("exception", "throws", 1)
    assert "of its own" in caught.value.message


def test_an_executor_takes_the_launches_on_streams(library: cann_sim.KernelLibrary) -> None:
    """Those on the null stream run at once, as before; its own it may run when it likes."""
    submit_type = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p)
    taken: list[tuple[int, int]] = []

    @submit_type
    def submit(stream: int, task: int) -> int:
        if stream == 0xBAD:
            return 99
        taken.append((stream, task))
        return 0

    launch = ctypes.CDLL(str(library.path)).aclrtlaunch_move
    data, out = np.full(32, 7, np.uint8), np.zeros(32, np.uint8)
    places = [array.ctypes.data for array in (data, out)]
    handles = [runtime().cann_sim_register(place, 32, 1) for place in places]
    set_executor = runtime().cann_sim_set_executor
    set_executor.restype = ctypes.c_void_p
    before = set_executor(submit)
    try:
        for stream in (None, 0x5EA):
            out[:] = 0
            assert launch(1, ctypes.c_void_p(stream), *map(ctypes.c_void_p, places), 32) == 0
            assert (out == (0 if stream else 7)).all()
        assert launch(1, ctypes.c_void_p(0xBAD), *map(ctypes.c_void_p, places), 32) == 99
        ((stream, task),) = taken
        assert stream == 0x5EA
        assert runtime().cann_sim_task_run(ctypes.c_void_p(task)) == 0
        assert (out == 7).all()
        runtime().cann_sim_task_free(ctypes.c_void_p(task))
    finally:
        set_executor(ctypes.c_void_p(before))
        for handle in handles:
            runtime().cann_sim_unregister(handle)


def test_the_memory_of_a_launch_is_what_its_pointers_fall_into() -> None:
    """Among many allocations, some of them overlapping; parts go before the wholes they are cut out of."""
    library, random, alive = runtime(), np.random.default_rng(1), {}
    seen: list[tuple[int, int]] = []

    @ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p)
    def submit(_: int, task: int) -> int:
        ranges = ctypes.POINTER(Range)()
        library.cann_sim_task_buffers.restype = ctypes.c_size_t
        count = library.cann_sim_task_buffers(ctypes.c_void_p(task), ctypes.byref(ranges))
        seen.extend((ranges[i].start, ranges[i].end) for i in range(count))
        return 1

    def found(address: int) -> list[tuple[int, int]]:
        seen.clear()
        pointers = (ctypes.c_void_p * 1)(address)
        arguments = (b"none", 1, ctypes.c_void_p(1), None, None, ctypes.c_size_t(0), pointers, ctypes.c_size_t(1))
        assert library.cann_sim_launch(*arguments) == 1  # refused by the above
        return sorted(seen)

    library.cann_sim_register_part.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    library.cann_sim_register_part.restype = ctypes.c_uint64
    library.cann_sim_set_executor.restype = ctypes.c_void_p
    before = library.cann_sim_set_executor(submit)
    try:
        for _ in range(2000):
            if alive and random.random() < 0.4:
                handle = random.choice(list(alive))
                library.cann_sim_unregister(int(handle))
                del alive[handle]
            else:
                start, size, part = (int(random.integers(*limits)) for limits in ((64, 1000), (0, 60), (0, 2)))
                handle = (
                    library.cann_sim_register_part(start, size) if part else library.cann_sim_register(start, size, 0)
                )
                alive[handle] = (start, start + size, part)
            address = int(random.integers(64, 1100))
            holding = [it for it in alive.values() if it[0] <= address < it[1]]
            parts = [it for it in holding if it[2]]
            assert found(address) == sorted(it[:2] for it in parts or holding)
    finally:
        library.cann_sim_set_executor(ctypes.c_void_p(before))
        for handle in alive:
            library.cann_sim_unregister(handle)


def test_checks_can_be_switched_off(library: cann_sim.KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.ones(32, np.uint8)
    unwritten = cann_sim.Uninit(np.ones(32, np.uint8))
    library.launch("move", 1, unwritten, data, 32, config=cann_sim.Config(check=False))
    monkeypatch.setenv("CANN_SIM_CHECK", "0")
    library.launch("move", 1, unwritten, data, 32)


def test_a_synchronisation_can_be_ignored(library: cann_sim.KernelLibrary) -> None:
    data, out = np.ones(64, np.uint8), np.zeros(64, np.uint8)
    (site,) = library.launch("move", 2, data, out, 32).sync_sites
    assert (site.kind, Path(site.file).name, site.count) == ("EnQue/DeQue<MTE2_MTE3>", "runtime.cpp", 2)
    assert SOURCE.splitlines()[site.line - 1].strip().startswith("tile = queue.DeQue")
    for remove in (site.index, (site.index,)):
        with pytest.raises(cann_sim.KernelError, match="MTE2_MTE3") as caught:
            library.launch("move", 2, data, out, 32, config=cann_sim.Config(remove_sync=remove))
        assert caught.value.kind == "race"
    with pytest.raises(ValueError, match="remove_sync=1"):
        library.launch("move", 2, data, out, 32, config=cann_sim.Config(remove_sync=1))


def test_launches_at_the_same_time(library: cann_sim.KernelLibrary) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        data, out = np.full(32 * 4, seed, np.uint8), np.zeros(32 * 4, np.uint8)
        try:
            for _ in range(20):
                out[:] = 0
                report = library.launch("move", 4, data, cann_sim.Uninit(out), 32)
                assert (out == seed).all()
                assert report.read_bytes == 128
                with pytest.raises(cann_sim.KernelError):
                    library.launch("move", 5, data, cann_sim.Uninit(out), 32)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_does_not_exist_or_compile_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cann_sim.compile(tmp_path / "nowhere.cpp")
    with pytest.raises(cann_sim.CompileError, match="kernel k: the type of parameter 'Unknown u'"):
        cann_sim.compile('#include "kernel_operator.h"\nextern "C" __global__ __aicore__ void k(Unknown u) {}\n')
    with pytest.raises(ValueError, match="vector_scale"):
        cann_sim.Config(vector_scale=0)


def test_a_compiler_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANN_SIM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "env g++ -DGIVEN")
    source = '#include "kernel_operator.h"\n#ifdef GIVEN\nextern "C" __global__ __aicore__ void given() {}\n#endif\n'
    assert cann_sim.compile(source).kernels() == ["given"]
