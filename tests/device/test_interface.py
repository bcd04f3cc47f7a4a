"""What the extension tells of the structs and numbers that kernels are launched with, as benchmarks/device uses it."""

from __future__ import annotations

import ctypes
from copy import deepcopy

import pytest
from kernels import INTERFACE, Args, Plan, structure

from npu_xent import _C

pytestmark = pytest.mark.cpu


def test_plan_has_the_members_of_the_planner() -> None:
    answer = _C.plan_rows(8, 151936, 2)
    members = [name for name, _ in Plan._fields_]
    assert members == list(answer)[: len(members)]
    assert bytes(Plan(**{name: answer[name] for name in members})) == b"".join(
        answer[name].to_bytes(8, "little") for name in members
    )


def test_no_member_is_hidden_by_another() -> None:
    for struct in (Plan, Args):
        names = [name for name, _ in struct._fields_]
        assert len(set(names)) == len(names)
        assert sum(ctypes.sizeof(kind) for _, kind in struct._fields_) == ctypes.sizeof(struct)


@pytest.mark.parametrize("change", ["size", "offset", "missing"])
def test_a_layout_that_ctypes_does_not_make_raises(change: str) -> None:
    layout = deepcopy(INTERFACE["XentArgs"])
    if change == "size":
        layout["size"] += 8
    elif change == "offset":
        name, offset, kind = layout["members"][-1]
        layout["members"][-1] = (name, offset + 4, kind)
    else:
        del layout["members"][3]
    with pytest.raises(RuntimeError, match="XentArgs is laid out as"):
        structure("XentArgs", layout)


@pytest.mark.parametrize("name", ["Stage", "Reduction", "RowMode", "LogitsType"])
def test_numbers_of_an_enum_are_counted_up_from_0(name: str) -> None:
    assert list(INTERFACE[name].values()) == list(range(len(INTERFACE[name])))
