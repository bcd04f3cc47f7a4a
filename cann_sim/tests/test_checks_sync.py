"""Queues and event flags used against their rules, each beside the same kernel with the rule kept."""

from __future__ import annotations

import pytest
from kernel_file import Broken, check_complete, check_passes, check_refused, kernel_file

FILE = kernel_file("queues")

QUEUES = [
    Broken("foreign_tensor", "queue", "EnQue"),
    Broken("scratch_tensor", "queue", "EnQue"),
    Broken("dequeue_of_nothing", "queue", "DeQue empty EnQue missing?"),
    Broken("free_twice", "queue", "FreeTensor"),
    Broken("free_while_queued", "queue", "FreeTensor"),
    Broken("enqueue_twice", "queue", "EnQue"),
    Broken("too_shallow", "queue", "EnQue depth 1", mark="DEPTH"),
    Broken("use_after_free_vector", "queue", "Adds FreeTensor"),
    Broken("write_after_free", "queue", "DataCopy FreeTensor"),
    Broken("use_after_free_copy", "queue", "DataCopy FreeTensor"),
    Broken("use_after_free_scalar", "queue", "GetValue FreeTensor"),
    Broken("alloc_beyond", "queue", "AllocTensor VECIN free: ), FreeTensor missing?"),
    Broken("alloc_before_init", "queue", "AllocTensor InitBuffer"),
    Broken("never_freed", "leak", "VECIN freed DeQue FreeTensor missing?"),
    Broken("never_dequeued", "leak", "VECIN freed EnQue"),
]

FLAGS = [
    Broken("set_twice", "flag", "SetFlag MTE2_V 0"),
    Broken("set_before_taken", "flag", "SetFlag MTE2_V 0 second WaitFlag V_MTE2"),
    Broken("set_after_barrier", "flag", "SetFlag V_MTE3 4 second WaitFlag MTE3_V"),
    Broken("set_by_issue", "flag", "SetFlag S_V 0 second WaitFlag V_S"),
    Broken("set_two_ids", "flag", "SetFlag MTE2_MTE3 0 second WaitFlag another id"),
    Broken("never_waited", "flag", "SetFlag V_MTE3 3 waited"),
    Broken("wait_of_nothing", "deadlock", "WaitFlag MTE2_V 2"),
    Broken("wait_twice", "deadlock", "WaitFlag MTE2_V 2"),
    Broken("another_id", "deadlock", "WaitFlag MTE2_V 2"),
    Broken("another_event", "deadlock", "WaitFlag V_MTE2 1"),
    Broken("wait_before_set", "deadlock", "WaitFlag V_MTE2 1"),
    Broken("id_of_a_queue", "flag", "SetFlag MTE2_V EnQue"),
    Broken("id_wanted_by_a_queue", "flag", "EnQue SetFlag MTE2_V AllocEventID"),
    Broken("flag_of_a_queue", "flag", "WaitFlag MTE2_V EnQue AllocEventID"),
    Broken("set_id", "flag", "SetFlag 8", bad=8, good=7),
    Broken("set_id", "flag", "SetFlag -1", bad=-1, good=0),
    Broken("wait_id", "flag", "WaitFlag 8", bad=8, good=7),
    Broken("ids_run_out", "flag", "AllocEventID V_S 8", bad=9, good=8),
    Broken("id_released_twice", "flag", "ReleaseEventID"),
    Broken("id_never_released", "leak", "V_S"),
]


@pytest.mark.parametrize("case", QUEUES + FLAGS, ids=lambda case: f"{case.kernel}-{case.bad}")
def test_misuse(case: Broken) -> None:
    error = check_refused(FILE, case)
    if (case.kernel.startswith("set_") and case.kernel != "set_id") or case.kernel == "id_wanted_by_a_queue":
        assert FILE.place(case.kernel, "FIRST") in str(error)


@pytest.mark.parametrize("case", QUEUES + FLAGS, ids=lambda case: f"{case.kernel}-{case.good}")
def test_proper_use(case: Broken) -> None:
    check_passes(FILE, case)


def test_every_kernel_has_a_case() -> None:
    check_complete(FILE, QUEUES + FLAGS)
