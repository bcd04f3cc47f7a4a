"""What cores of one launch do to each other, and two launches at once, which must not notice one another."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from kernel_file import ELEMENTS, Broken, check_complete, check_passes, check_refused, kernel_file

import cann_sim

FILE = kernel_file("cores")

# Refused at the line of the lower core; the message names the other core's line too.
CONFLICTS = [
    Broken("two_copies_out", "cross-core", "DataCopy write 0 1"),
    Broken("copies_from_two_lines", "cross-core", "DataCopy write 0 1", mark="FIRST"),
    Broken("scalars_in_one_line", "cross-core", "SetValue 64 0 1"),
    Broken("scalar_beside_copy", "cross-core", "SetValue DataCopy 64 0 1", mark="FIRST"),
    Broken("copy_in_of_another_cores", "cross-core", "DataCopy read 0 1", mark="FIRST"),
    Broken("scalar_read_of_another_cores", "cross-core", "GetValue read 0 1", mark="FIRST"),
    Broken("in_place_with_halo", "cross-core", "DataCopy read 0 1", mark="FIRST"),
]
ALONE = [Broken("third_core_only", "uninitialised", "Adds", core=2)]


@pytest.mark.parametrize("case", CONFLICTS, ids=str)
def test_two_cores_in_one_place(case: Broken) -> None:
    error = check_refused(FILE, case, blocks=2)
    assert FILE.place(case.kernel, "HERE") in error.message
    assert FILE.place(case.kernel, case.mark) in error.message


@pytest.mark.parametrize(
    "case", [case for case in CONFLICTS if "read_of" in case.kernel or "in_of" in case.kernel], ids=str
)
def test_read_of_an_output_that_another_core_writes(case: Broken) -> None:
    """Not an uninitialised read: some core does write there, only nothing says when."""
    check_refused(FILE, case, blocks=2, y=cann_sim.Uninit(np.ones(ELEMENTS, np.float32)))


@pytest.mark.parametrize("case", CONFLICTS, ids=str)
def test_each_core_in_its_own(case: Broken) -> None:
    check_passes(FILE, case, blocks=2)


@pytest.mark.parametrize("threads", [1, 2, None])
def test_the_core_that_failed_is_named(threads: int | None) -> None:
    config = cann_sim.Config(threads=threads)
    for _ in range(3):  # whichever thread came first
        buffers = [np.ones(ELEMENTS, np.float32) for _ in range(2)]
        with pytest.raises(cann_sim.KernelError) as caught:
            FILE.library.launch("third_core_only", 5, *buffers, 0, config=config)
        assert caught.value.core == 2
        assert "third_core_only" in str(caught.value)
    check_passes(FILE, ALONE[0], blocks=5)


def test_every_kernel_has_a_case() -> None:
    check_complete(FILE, CONFLICTS + ALONE)


def test_two_launches_at_once() -> None:
    """One thread's launches fail, in two ways, while another's pass: each sees its own errors and results only."""
    good = kernel_file("good").library
    FILE.launch("two_copies_out", 1, blocks=2)
    start = threading.Barrier(3)
    rounds = 20
    wrong: list[str] = []

    def add() -> None:
        rng = np.random.default_rng(0)
        start.wait()
        for i in range(rounds):
            x, y = rng.standard_normal((2, 1000 + i), np.float32)
            z = np.zeros_like(x)
            report = good.launch("add_float", 4, x, y, cann_sim.Uninit(z), x.size, 64)
            if not np.array_equal(z, x + y):
                wrong.append(f"sum {i}")
            if report.read_bytes != 8 * x.size or report.written_bytes != 4 * x.size:
                wrong.append(f"bytes {i}: {report.read_bytes} {report.written_bytes}")

    def fail(case: Broken, blocks: int) -> None:
        start.wait()
        for i in range(rounds):
            try:
                FILE.launch(case.kernel, case.bad, blocks=blocks)
                wrong.append(f"{case} {i} passed")
            except cann_sim.KernelError as error:
                if (error.kernel, error.kind, error.core) != (case.kernel, case.kind, case.core):
                    wrong.append(f"{case} {i}: {error}")

    threads = [
        threading.Thread(target=add),
        threading.Thread(target=fail, args=(CONFLICTS[0], 2)),
        threading.Thread(target=fail, args=(ALONE[0], 4)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
