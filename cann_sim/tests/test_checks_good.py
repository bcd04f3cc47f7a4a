"""Kernels that keep every rule: accepted, with the right results, whatever the number of cores and threads."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from kernel_file import aligned, kernel_file

import cann_sim
from cann_sim import Uninit, Workspace

RNG = np.random.default_rng(5)


def launch(kernel: str, blocks: int, *args: object, **config: object):
    return kernel_file("good").library.launch(kernel, blocks, *args, config=cann_sim.Config(**config))


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize("total", [1, 7, 8, 64, 65, 128, 1000, 4099])
@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_add(total: int, blocks: int) -> None:
    x, y = normal(2, total)
    z = np.full_like(x, np.nan)
    report = launch("add_float", blocks, x, y, Uninit(z), total, 64)
    np.testing.assert_array_equal(z, x + y)
    assert report.read_bytes == 8 * total
    assert report.written_bytes == 4 * total
    assert len(report.cores) == blocks


@pytest.mark.parametrize("total", [1, 15, 16, 17, 300])
def test_add_half(total: int) -> None:
    x, y = normal(2, total).astype(np.float16)
    z = np.zeros_like(x)
    launch("add_half", 2, x, y, Uninit(z), total, 32)
    np.testing.assert_array_equal(z, x + y)


def test_add_is_the_same_on_any_number_of_threads() -> None:
    x, y = normal(2, 3000)
    times = set()
    for threads, _ in itertools.product([1, 2, None], range(2)):
        z = np.zeros_like(x)
        times.add(launch("add_float", 7, x, y, Uninit(z), x.size, 64, threads=threads).time_ns)
        np.testing.assert_array_equal(z, x + y)
    assert len(times) == 1


@pytest.mark.parametrize("tiles, waits", [(2, 0), (3, 3), (5, 9)])
def test_buffers_take_turns(tiles: int, waits: int) -> None:
    """Of two buffers, the one that has been free for longer is next: two tiles never wait for one another."""
    x, y = normal(2, 64 * tiles)
    report = launch("add_float", 1, x, y, Uninit(np.zeros_like(x)), x.size, 64)
    assert sum(site.count for site in report.sync_sites if site.kind.startswith("FreeTensor")) == waits


class Rows(ctypes.Structure):
    """As in the kernels' file."""

    _fields_ = (("rows", ctypes.c_uint32), ("columns", ctypes.c_uint32), ("pitch", ctypes.c_uint32))


@pytest.mark.parametrize("rows, columns, pitch", [(1, 8, 8), (5, 100, 100), (9, 37, 50), (3, 2000, 2001)])
@pytest.mark.parametrize("blocks", [1, 4])
def test_softmax(rows: int, columns: int, pitch: int, blocks: int) -> None:
    x = normal(rows, pitch)
    y = np.full_like(x, -1.0)
    shape = Rows(rows, columns, pitch)
    launch("softmax", blocks, x, y, shape if blocks == 1 else bytes(shape))
    part = x[:, :columns].astype(np.float64)
    expected = np.exp(part - part.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(y[:, :columns], expected, rtol=1e-5)
    assert (y[:, columns:] == -1.0).all()


def test_scale_rows() -> None:
    x = RNG.uniform(1, 2, (24, 64)).astype(np.float32)
    y = np.zeros_like(x)
    launch("scale_rows", 1, x, Uninit(y), 3)
    np.testing.assert_allclose(y, x / x.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("rows, columns, pitch", [(1, 8, 8), (4, 5, 9), (16, 24, 31), (7, 1, 3)])
def test_strided_block(rows: int, columns: int, pitch: int) -> None:
    x = normal(rows, pitch)
    y = np.zeros_like(x)
    launch("strided_block", 1, x, y, Rows(rows, columns, pitch))
    expected = np.zeros_like(x)
    expected[:, :columns] = x[:, :columns] + np.float32(0.5)
    np.testing.assert_array_equal(y, expected)


def test_parts_of_a_buffer() -> None:
    x = normal(640)
    y = np.zeros_like(x)
    launch("parts_of_a_buffer", 1, x, Uninit(y), x.size)
    np.testing.assert_array_equal(y, (x.astype(np.float16) + np.float16(1)).astype(np.float32))


@pytest.mark.parametrize("blocks", [1, 3])
def test_in_place(blocks: int) -> None:
    x = normal(640)
    before = x.copy()
    launch("in_place", blocks, x, x.size)
    np.testing.assert_array_equal(x, before + 1)


def test_rounds_in_a_workspace() -> None:
    y = np.zeros(256, np.float32)
    launch("rounds_in_gm", 1, Workspace(1024), Uninit(y), 5)
    assert (y == 5).all()


def test_pass_through() -> None:
    x = normal(1280)
    y = np.zeros_like(x)
    report = launch("pass_through", 1, x, Uninit(y), x.size)
    np.testing.assert_array_equal(y, x)
    assert report.read_bytes == report.written_bytes == x.nbytes


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_preload(tiles: int) -> None:
    x = normal(64 * tiles)
    y = np.zeros_like(x)
    launch("preload", 1, x, Uninit(y), tiles)
    np.testing.assert_array_equal(y, 2 * x)


def test_other_spellings() -> None:
    x = normal(64 * 3)
    y = np.zeros_like(x)
    launch("other_spellings", 1, x, Uninit(y), 3)
    np.testing.assert_array_equal(y, x + 1)


@pytest.mark.parametrize("kernel, distance", [("line_per_core", 16), ("number_per_core", 1)])
def test_one_number_per_core(kernel: str, distance: int) -> None:
    y = aligned(16 * 6)
    launch(kernel, 6, y)
    np.testing.assert_array_equal(y[: 6 * distance : distance], np.arange(1, 7))


def test_all_read_one_writes() -> None:
    x = normal(256)
    y = np.zeros_like(x)
    launch("all_read_one_writes", 5, x, Uninit(y))
    np.testing.assert_array_equal(y, x + 1)


def test_ordered_by_others() -> None:
    x = normal(512)
    y = np.zeros_like(x)
    launch("ordered_by_others", 1, x, Uninit(y))
    np.testing.assert_array_equal(y, x + 1)


def test_reads_of_one_tensor() -> None:
    x = normal(256)
    y = np.zeros(768, np.float32)
    launch("reads_of_one_tensor", 1, x, Uninit(y))
    np.testing.assert_array_equal(y.reshape(3, 256), [x + 1, 2 * x, x + 1])


@pytest.mark.parametrize("check", [True, False])
def test_with_and_without_checks(check: bool) -> None:
    """Without the checks the results and the simulated time stay as they are."""
    x, y = normal(2, 500)
    z = np.zeros_like(x)
    checked = launch("add_float", 2, x, y, Uninit(np.zeros_like(x)), x.size, 64)
    report = launch("add_float", 2, x, y, Uninit(z), x.size, 64, check=check)
    np.testing.assert_array_equal(z, x + y)
    assert report.time_ns == checked.time_ns
