"""Accesses that nothing orders: a race that names both places for each pair of pipes without its flag, none with it."""

from __future__ import annotations

import pytest
from kernel_file import Broken, check_complete, check_passes, check_refused, kernel_file

FILE = kernel_file("races")

# The two instructions and their pipes are in the message.
CASES = [
    Broken("mte2_v_raw", "race", "DataCopy MTE2 Adds V"),
    Broken("mte2_v_waw", "race", "DataCopy MTE2 Duplicate V"),
    Broken("v_mte2_war", "race", "Adds V DataCopy MTE2"),
    Broken("v_mte2_waw", "race", "Duplicate V DataCopy MTE2"),
    Broken("v_mte3_raw", "race", "Duplicate V DataCopy MTE3"),
    Broken("mte3_v_war", "race", "DataCopy MTE3 Duplicate V"),
    Broken("mte2_mte3_raw", "race", "DataCopy MTE2 MTE3"),
    Broken("mte3_mte2_war", "race", "DataCopy MTE3 MTE2"),
    Broken("mte2_mte2_waw", "race", "DataCopy MTE2"),
    Broken("v_v_raw", "race", "Adds V PipeBarrier"),
    Broken("v_v_war", "race", "Adds V PipeBarrier"),
    Broken("v_v_waw", "race", "Adds V PipeBarrier"),
    Broken("v_v_war_in_place", "race", "Adds V PipeBarrier"),
    Broken("v_v_one_block", "race", "Adds V"),
    Broken("barrier_of_another_pipe", "race", "Adds V"),
    Broken("s_v_raw", "race", "SetValue S Adds V"),
    Broken("s_v_waw", "race", "SetValue S Duplicate V"),
    Broken("s_v_war", "race", "GetValue S Duplicate V"),
    Broken("v_s_raw", "race", "Duplicate V GetValue S"),
    Broken("v_s_war", "race", "Adds V SetValue S"),
    Broken("v_s_waw", "race", "Duplicate V SetValue S"),
    Broken("mte2_s_raw", "race", "DataCopy MTE2 GetValue S"),
    Broken("mte2_s_waw", "race", "DataCopy MTE2 SetValue S"),
    Broken("s_mte2_waw", "race", "SetValue S DataCopy MTE2"),
    Broken("s_mte2_war", "race", "GetValue S DataCopy MTE2"),
    Broken("s_mte3_raw", "race", "SetValue S DataCopy MTE3"),
    Broken("mte3_s_war", "race", "DataCopy MTE3 SetValue S"),
    Broken("v_s_does_not_order_mte3", "race", "Duplicate V DataCopy MTE3"),
    Broken("gm_mte3_mte2_raw", "race", "DataCopy MTE3 MTE2"),
    Broken("gm_mte2_mte3_war", "race", "DataCopy MTE2 MTE3"),
    Broken("gm_mte3_mte3_waw", "race", "DataCopy MTE3"),
    Broken("gm_s_mte2_raw", "race", "SetValue S DataCopy MTE2"),
    Broken("gm_s_mte3_waw", "race", "SetValue S DataCopy MTE3"),
    Broken("gm_s_mte3_war", "race", "GetValue S DataCopy MTE3"),
    Broken("gm_mte2_s_war", "race", "DataCopy MTE2 SetValue S"),
    Broken("gm_mte3_s_raw", "race", "DataCopy MTE3 GetValue S"),
    Broken("gm_mte3_s_waw", "race", "DataCopy MTE3 SetValue S"),
    Broken("flag_too_early", "race", "DataCopy MTE2 Add V"),
    Broken("wait_too_late", "race", "DataCopy MTE2 Adds V"),
    Broken("second_tile", "race", "Adds V DataCopy MTE2"),
    Broken("strided_row", "race", "DataCopyPad MTE2 Adds V"),
    Broken("queue_passed_by", "race", "DataCopy MTE2 Adds V"),
    Broken("queue_does_not_order_s", "race", "DataCopy MTE2 GetValue S"),
    Broken("queue_does_not_order_v", "race", "Adds V"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_its_synchronisation_it_is_a_race(case: Broken) -> None:
    error = check_refused(FILE, case)
    assert FILE.place(case.kernel, case.mark) in str(error)
    assert FILE.place(case.kernel, "FIRST") in error.message
    later_line = FILE.line(case.kernel, "FIRST") > FILE.line(case.kernel, case.mark)
    assert ("that ran earlier" in error.message) == later_line


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_it_there_is_none(case: Broken) -> None:
    check_passes(FILE, case)


def test_every_kernel_has_a_case() -> None:
    check_complete(FILE, CASES)
