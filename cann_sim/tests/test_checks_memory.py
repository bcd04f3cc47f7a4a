"""Room, alignment, range and overlap in UB; copy parameters; GM outside the launch; bytes that nothing wrote."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_file import ELEMENTS, Broken, check_complete, check_passes, check_refused, kernel_file

import cann_sim

USABLE = 192 * 1024 - 256 - 8 * 1024  # bytes of UB that InitBuffer may give away

MEMORY = [
    Broken("buffer_bytes", "ub-overflow", "188160", bad=USABLE + 32, good=USABLE),
    Broken(
        "queue_bytes",
        "ub-overflow",
        "188160 taken VECCALC memory.cpp:19",
        bad=(USABLE - 8192) // 2 + 32,
        good=(USABLE - 8192) // 64 * 32,
    ),
    Broken("buffers_of_a_position", "queue", "VECIN 8", bad=5, good=4),
    Broken("buffers_of_a_kernel", "queue", "64", bad=65, good=64),
    Broken("buffer_of_nothing", "params", "InitBuffer 0", bad=0, good=1),
    Broken("queue_of_nothing", "params", "InitBuffer 0", bad=0, good=1),
    Broken("queue_twice", "queue", "InitBuffer", bad=0, good=1),
    Broken("get_before_init", "bounds", "Get InitBuffer", bad=0, good=1),
    Broken("tensor_without_memory", "bounds", "Duplicate", bad=0, good=1),
    Broken("placed_tensor", "ub-overflow", "LocalTensor 188160", bad=USABLE, good=USABLE - 32),
    Broken("vector_source_alignment", "alignment", "Adds 32", bad=1, good=8),
    Broken("vector_destination_alignment", "alignment", "Adds 32", bad=4, good=16),
    Broken("copy_in_alignment", "alignment", "DataCopy 32", bad=7, good=8),
    Broken("copy_out_alignment", "alignment", "DataCopy 32", bad=1, good=8),
    Broken("pad_in_alignment", "alignment", "DataCopyPad 32", bad=1, good=8),
    Broken("pad_out_alignment", "alignment", "DataCopyPad 32", bad=1, good=8),
    Broken("gm_element_alignment", "alignment", "DataCopy 4", bad=2, good=4),
    Broken("gm_scalar_alignment", "alignment", "SetValue 4", bad=2, good=4),
    Broken("offset_alignment", "alignment", "GetWithOffset 32", bad=16, good=32),
    Broken("offset_range", "bounds", "GetWithOffset", bad=4096, good=4096 - 32),
    Broken("get_range", "bounds", "Get", bad=1025, good=1024),
    Broken("get_range", "bounds", "Get", bad=0, good=8),
    Broken("index_range", "bounds", "", bad=1032, good=1016),
    Broken("vector_write_range", "bounds", "Duplicate", bad=1024 - 256 + 1, good=1024 - 256),
    Broken("vector_read_range", "bounds", "Adds", bad=257, good=256),
    Broken("copy_in_range", "bounds", "DataCopyPad", bad=33, good=32),
    Broken("copy_out_range", "bounds", "DataCopy", bad=264, good=256),
    Broken("scalar_read_range", "bounds", "GetValue", bad=1024, good=1023),
    Broken("scalar_write_range", "bounds", "SetValue", bad=1024, good=1023),
    Broken("vector_overlap", "overlap", "Adds", bad=8, good=0),
    Broken("vector_overlap", "overlap", "Adds", bad=248, good=256),
    Broken("vector_second_source_overlap", "overlap", "Add", bad=8, good=0),
    Broken("copy_overlap", "overlap", "DataCopy", bad=8, good=256),
]

COPIES = [
    Broken("block_count_in", "copy-params", "blockCount 4096 4095", bad=4096, good=4095),
    Broken("block_count_out", "copy-params", "blockCount 4096 4095", bad=4096, good=4095),
    Broken("block_count_plain", "copy-params", "blockCount 4096 4095", bad=4096, good=4095),
    Broken("block_len_in", "copy-params", "blockLen 2097152 2097151", bad=1 << 21, good=4096),
    Broken("block_len_in", "copy-params", "blockLen 4", bad=6, good=4),
    Broken("block_len_out", "copy-params", "blockLen 2097152 2097151", bad=1 << 21, good=4096),
    Broken("block_len_out", "copy-params", "blockLen 4", bad=7, good=4),
    Broken("left_padding", "copy-params", "leftPadding 9 32", bad=9, good=8),
    Broken("right_padding", "copy-params", "rightPadding 9 32", bad=9, good=8),
    Broken("padding_value_of_8_bytes", "copy-params", "paddingValue 0", bad=1, good=0),
    Broken("plain_count_in", "copy-params", "DataCopy 32", bad=9, good=16),
    Broken("plain_count_in", "copy-params", "DataCopy 32", bad=7, good=8),
    Broken("plain_count_out", "copy-params", "DataCopy 32", bad=9, good=16),
    Broken("gm_read_end", "gm-bounds", "DataCopyPad read", bad=ELEMENTS - 8 + 1, good=ELEMENTS - 8),
    Broken("gm_plain_read_end", "gm-bounds", "DataCopy read", bad=ELEMENTS - 7, good=ELEMENTS - 8),
    Broken("gm_read_last_row", "gm-bounds", "DataCopyPad read", bad=1352, good=1348),
    Broken("gm_write_end", "gm-bounds", "DataCopyPad write", bad=ELEMENTS - 8 + 1, good=ELEMENTS - 8),
    Broken("gm_read_start", "gm-bounds", "DataCopy read", bad=-1, good=0),
    Broken("gm_write_start", "gm-bounds", "DataCopy write", bad=-1, good=0),
    Broken("gm_scalar_read", "gm-bounds", "GetValue read", bad=ELEMENTS, good=ELEMENTS - 1),
    Broken("gm_scalar_read", "gm-bounds", "GetValue read", bad=-1, good=0),
    Broken("gm_scalar_write", "gm-bounds", "SetValue write", bad=ELEMENTS, good=ELEMENTS - 1),
    Broken("gm_scalar_write", "gm-bounds", "SetValue write", bad=-1, good=0),
]

NULL = [
    Broken("gm_null_read", "gm-bounds", "DataCopy null", bad=256, good=None),
    Broken("gm_null_scalar_read", "gm-bounds", "GetValue null", bad=0, good=None),
    Broken("gm_null_write", "gm-bounds", "DataCopy null", bad=256, good=None),
]

UNINITIALISED = [
    Broken("vector_read", "uninitialised", "Adds"),
    Broken("copy_out_read", "uninitialised", "DataCopy"),
    Broken("scalar_read", "uninitialised", "GetValue"),
    Broken("last_element", "uninitialised", "Adds"),
    Broken("hole", "uninitialised", "Adds"),
    Broken("behind_the_block", "uninitialised", "Adds"),
    Broken("padding_without_value", "uninitialised", "Adds"),
    Broken("left_padding_without_value", "uninitialised", "Adds"),
    Broken("gap_between_rows", "uninitialised", "Adds"),
    Broken("stale", "uninitialised", "Adds"),
    Broken("stale_tail", "uninitialised", "Adds"),
    Broken("masked_write", "uninitialised", "Adds"),
    Broken("reduction_read", "uninitialised", "WholeReduceSum"),
]

UNINITIALISED_GM = [
    Broken("gm_copy_in_read", "uninitialised", "DataCopy"),
    Broken("gm_scalar_read", "uninitialised", "GetValue"),
    Broken("gm_one_beyond", "uninitialised", "DataCopyPad"),
]


def named(cases: list[Broken]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"{case.kernel}-{case.bad}")


@named(MEMORY)
def test_tensors_in_ub(case: Broken) -> None:
    check_refused(kernel_file("memory"), case)
    check_passes(kernel_file("memory"), case)


def inputs(case: Broken) -> dict[str, np.ndarray]:
    """The launch's buffers: as many elements as the largest legal copy needs, and no more."""
    needed = 4096 * 8 if case.kernel.startswith("block_count") else ELEMENTS
    return {"x": np.ones(needed, np.float32), "y": np.ones(needed, np.float32)}


@named(COPIES)
def test_copies(case: Broken) -> None:
    check_refused(kernel_file("copies"), case, **inputs(case))
    check_passes(kernel_file("copies"), case, **inputs(case))


@named(NULL)
def test_null_pointer(case: Broken) -> None:
    """An argument that is None is a null pointer: nothing may be read or written there."""
    file = kernel_file("copies")
    arguments = [np.ones(ELEMENTS, np.float32) for _ in range(2)]
    arguments["write" in case.kernel] = None
    with pytest.raises(cann_sim.KernelError) as caught:
        file.library.launch(case.kernel, 1, *arguments, case.bad)
    assert caught.value.kind == "gm-bounds"
    assert caught.value.line == file.line(case.kernel)
    for word in case.words.split():
        assert word in caught.value.message
    file.library.launch(case.kernel, 1, np.ones(ELEMENTS, np.float32), np.ones(ELEMENTS, np.float32), case.bad)


def test_copies_of_nothing_touch_nothing() -> None:
    """A blockCount or blockLen of 0 does nothing, wherever it points."""
    y = np.full(ELEMENTS, 3.0, np.float32)
    kernel_file("copies").launch("copies_of_nothing", 1 << 20, y=y)
    assert (y == 3.0).all()


@named(UNINITIALISED)
def test_ub_that_nothing_wrote(case: Broken) -> None:
    check_refused(kernel_file("uninitialised"), case)
    check_passes(kernel_file("uninitialised"), case)


@pytest.mark.parametrize("kind", ["workspace", "output"])
@named(UNINITIALISED_GM)
def test_gm_that_nothing_wrote(case: Broken, kind: str) -> None:
    def empty() -> object:
        return cann_sim.Workspace(ELEMENTS * 4) if kind == "workspace" else cann_sim.Uninit(np.ones(ELEMENTS, "f4"))

    check_refused(kernel_file("uninitialised"), case, y=empty())
    check_passes(kernel_file("uninitialised"), case, y=empty())
    kernel_file("uninitialised").launch(case.kernel, case.bad)  # an array has contents, so the same kernel may read it


def test_every_kernel_has_a_case() -> None:
    check_complete(kernel_file("memory"), MEMORY)
    check_complete(kernel_file("copies"), COPIES + NULL, ("copies_of_nothing",))
    check_complete(kernel_file("uninitialised"), UNINITIALISED + UNINITIALISED_GM)
