"""The planner of csrc/tiling/row_plan.h: whatever the shape, its plans fit a core's memory and cover the logits once.

Sizes go up to 2^31 rows and columns, where nothing could be launched: what is wrong with a plan is seen in its numbers.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels import LogitsType, RowMode

from npu_xent import _C

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
SHORT, RESIDENT, STREAMING, SPLIT = RowMode.short, RowMode.resident, RowMode.streaming, RowMode.split
FP32, FP16, BF16 = LogitsType.fp32, LogitsType.fp16, LogitsType.bf16
ELEMENT_BYTES = {FP32: 4, FP16: 2, BF16: 2}
MOST = 2**31

# The hardware: the unified buffer less what the toolkit keeps, and the widths of an instruction's fields.
UB_BYTES = 192 * 1024 - 256 - 8 * 1024
MOST_REPEATS = MOST_BLOCK_STRIDE = 255
DATA_BLOCK = 32
LANES = 64

# Constants of row_plan.h.
MAX_CORES = 48
SHORT_COLS = 1024
MAX_TILE_ROWS = 128
CHUNK_UNIT, MIN_CHUNK, MAX_CHUNK = 512, 1024, 4096
STREAM_SLOTS = 6
EXTRA_SLOTS = 5

CORES = (1, 20, 24, 40, 48)

# The mode of each shape in fp32, and in fp16 and bf16 where it differs.
SHAPES: dict[tuple[int, int], str] = {
    (4096, 8080): "resident",
    (4096, 32000): "resident",
    (2048, 128256): "streaming",
    (8, 151936): "split",
    (65536, 64): "short",
    (1, 1): "short",
    (3, 3): "short",
    (88, 97): "short",
    (6038, 21): "short",
    (19138, 1833): "resident",
    (237, 29951): "resident",
    (40, 52211): "split resident",
    (293, 14127): "resident",
    (160, 26494): "resident",
    (1024, 4095): "resident",
    (49, 112595): "streaming",
    (128, 4191): "resident",
    (2, 16): "short",
    (1, MOST): "split",
    (MOST, 1): "short",
    (MOST, MOST): "streaming",
    # The last and the first of their kind.
    (1, 1024): "short",
    (47, 1025): "resident",
    (24, 1025): "split",
    (25, 8000): "resident",
    (17, 152000): "split",
    (48, 1025): "resident",
    (48, 34816): "resident",
    (48, 34817): "streaming resident",
    (48, 74752): "streaming resident",
    (48, 74753): "streaming",
    (47, 74753): "split",
    # Even parts would have a little more than a chunk, of 4096 columns and of 1024; less than one.
    (2, 128256): "split",
    (1, 60000): "split",
    (1, 20000): "split",
}


@dataclass(frozen=True)
class Plan:
    """What the planner answers, with the question."""

    rows: int
    cols: int
    dtype: int
    softcap: bool
    by_row: bool
    mode: int
    rows_per_tile: int
    chunk_cols: int
    chunks: int
    parts: int
    chunks_per_part: int
    slots: int
    ub_bytes: int
    work_items: int
    chunk_items: int

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    def long_bytes(self, chunk_cols: int, slots: int) -> int:
        """Memory for long rows: what is cut into chunks, and what this plan has beside it."""
        return self.ub_bytes + self._chunk_bytes(chunk_cols, slots) - self._chunk_bytes(self.chunk_cols, self.slots)

    def _chunk_bytes(self, chunk_cols: int, slots: int) -> int:
        """The ring of chunks; two of them and their class weights in fp32; for a softcap one more and bits for half."""
        cap = chunk_cols * 4 + chunk_cols // 2 // 8 if self.softcap else 0
        return chunk_cols * (slots * self.element_bytes + 3 * 4) + cap

    def resident_chunks(self) -> list[int]:
        """The numbers of chunks in which all of a row and what moves beside it fit UB."""
        counts = [(width, div_up(self.cols, width)) for width in range(MIN_CHUNK, MAX_CHUNK + 1, CHUNK_UNIT)]
        return [n for width, n in counts if self.long_bytes(width, n + EXTRA_SLOTS) <= UB_BYTES]


def div_up(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return div_up(a, b) * b


def plan_of(rows: int, cols: int, dtype: int, softcap: bool = False, by_row: bool = False) -> Plan:
    return Plan(rows, cols, dtype, softcap, by_row, **_C.plan_rows(rows, cols, dtype, softcap=softcap, by_row=by_row))


def near(units: tuple[int, ...], most: int) -> st.SearchStrategy[int]:
    """Numbers beside multiples, where a rounding goes wrong."""
    return st.builds(
        lambda unit, n, step: max(1, unit * n + step), st.sampled_from(units), st.integers(0, most), st.integers(-1, 1)
    )


def magnitudes() -> st.SearchStrategy[int]:
    """Up to 2^34, small ones as often as large ones."""
    return st.integers(0, 33).flatmap(lambda bits: st.integers(1 << bits, 2 << bits))


ROWS = st.one_of(st.integers(1, 2 * MAX_CORES), near((MAX_CORES, MAX_TILE_ROWS), 200), magnitudes())
COLS = st.one_of(
    st.integers(1, 2 * SHORT_COLS), near((LANES, CHUNK_UNIT, MAX_CHUNK), 200), st.integers(1, 100_000), magnitudes()
)
PLANS = st.tuples(ROWS, COLS, st.sampled_from(LogitsType), st.booleans(), st.booleans())
Shape = tuple[int, int, int, bool, bool]
Check = Callable[[Shape], None]


def any_shape(check: Check) -> Check:
    """Check random shapes and those of SHAPES; derandomised, so the same ones on every run."""
    for rows, cols in SHAPES:
        for dtype in LogitsType:
            for softcap in (False, True):
                check = example((rows, cols, dtype, softcap, not softcap))(check)
                check = example((rows, cols, dtype, softcap, softcap))(check)
    return settings(max_examples=400, deadline=None, derandomize=True, database=None)(given(PLANS)(check))


# Memory and instructions


def test_ub_is_what_the_toolkit_leaves() -> None:
    assert _C.UB_BYTES == UB_BYTES == 188160


@any_shape
def test_fits_ub(shape: Shape) -> None:
    plan = plan_of(*shape)
    assert plan.ub_bytes <= UB_BYTES
    assert plan.ub_bytes % DATA_BLOCK == 0


@any_shape
def test_memory_counts_what_is_moved(shape: Shape) -> None:
    """A sum that forgets the tile or the chunks would fit, too."""
    plan = plan_of(*shape)
    if plan.mode == SHORT:  # in fp32 twice; two tiles coming in, two going out; by row, three operands and four vectors
        tile = plan.rows_per_tile * round_up(plan.cols, DATA_BLOCK // plan.element_bytes)
        by_row = 4 * round_up(plan.rows_per_tile, LANES) * (2 * 3 + 4) * plan.by_row
        assert plan.ub_bytes >= tile * ((2 + plan.softcap) * 4 + 4 * plan.element_bytes) + by_row
    else:
        beside = plan.long_bytes(0, 0)
        assert beside > 0
        alone = plan_of(1, MOST, FP32, plan.softcap, plan.by_row)
        assert beside == alone.long_bytes(0, 0), "what is beside the chunks has one size"
        # Three facts and two results of 64 rows, and the sums of an entropy.
        by_row = beside - plan_of(1, MOST, FP32, plan.softcap).long_bytes(0, 0)
        assert by_row >= 4 * (5 * 64 + 2 * LANES + LANES) if plan.by_row else by_row == 0


@any_shape
def test_instructions_can_count_so_far(shape: Shape) -> None:
    plan = plan_of(*shape)
    if plan.mode == SHORT:  # a repeat a row; from row to row so many data blocks of fp32
        assert 1 <= plan.rows_per_tile <= MAX_TILE_ROWS <= MOST_REPEATS
        assert round_up(plan.cols, DATA_BLOCK // plan.element_bytes) * 4 // DATA_BLOCK <= MOST_BLOCK_STRIDE
    else:
        assert plan.chunk_cols // LANES <= MOST_REPEATS


# The choice of a mode


@pytest.mark.parametrize("dtype", [dtype.name for dtype in LogitsType])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_mode_of_known_shapes(shape: tuple[int, int], dtype: str) -> None:
    fp32, *half = SHAPES[shape].split()
    expected = half[0] if half and dtype != "fp32" else fp32
    assert plan_of(*shape, LogitsType[dtype]).mode == RowMode[expected]


@any_shape
def test_mode_is_chosen_as_documented(shape: Shape) -> None:
    """Short: at most 1024 columns. Split: fewer rows than cores; of rows that can stay in UB, at most half as many.

    With numbers by row no sweep has statistics and an output, so rows need not stay.
    """
    plan = plan_of(*shape)
    if plan.cols <= SHORT_COLS:
        assert plan.mode == SHORT
    elif plan.rows < MAX_CORES and (2 * plan.rows <= MAX_CORES or not plan.resident_chunks()):
        assert plan.mode == SPLIT
    else:
        assert plan.mode == (RESIDENT if plan.resident_chunks() and not plan.by_row else STREAMING)


@any_shape
def test_slots_are_for_the_mode(shape: Shape) -> None:
    """A resident row has all its chunks in UB, and those that move; others have as many as are in flight."""
    plan = plan_of(*shape)
    assert plan.slots == {SHORT: 2, RESIDENT: plan.chunks + EXTRA_SLOTS}.get(plan.mode, STREAM_SLOTS)


@any_shape
def test_fields_of_other_modes(shape: Shape) -> None:
    plan = plan_of(*shape)
    assert (plan.rows_per_tile > 0) == (plan.mode == SHORT)
    assert (plan.parts > 1) == (plan.mode == SPLIT)
    if plan.mode == SHORT:
        assert (plan.chunk_cols, plan.chunks) == (plan.cols, 1)
    if plan.mode != SPLIT:
        assert (plan.parts, plan.chunks_per_part) == (1, plan.chunks)


# Everything once


@any_shape
def test_tiles_cover_the_rows_once(shape: Shape) -> None:
    plan = plan_of(*shape)
    if plan.mode == SHORT:
        assert (plan.work_items - 1) * plan.rows_per_tile < plan.rows <= plan.work_items * plan.rows_per_tile
        assert plan.chunk_items == plan.work_items
    else:
        assert plan.work_items == plan.rows * plan.parts
        assert plan.chunk_items == plan.rows * plan.chunks


@any_shape
def test_chunks_cover_the_columns_once(shape: Shape) -> None:
    plan = plan_of(*shape)
    assert (plan.chunks - 1) * plan.chunk_cols < plan.cols <= plan.chunks * plan.chunk_cols
    if plan.mode != SHORT:
        assert plan.chunk_cols % CHUNK_UNIT == 0
        assert CHUNK_UNIT <= plan.chunk_cols <= MAX_CHUNK


@any_shape
def test_chunks_are_few(shape: Shape) -> None:
    """As few as fit for a resident row, as wide as they get for a streaming one; and of one size."""
    plan = plan_of(*shape)
    if plan.mode == RESIDENT:
        assert plan.chunks == min(plan.resident_chunks())
    if plan.mode == STREAMING:
        assert plan.chunks == div_up(plan.cols, MAX_CHUNK)
    if plan.mode != SHORT:
        assert plan.chunk_cols == round_up(div_up(plan.cols, plan.chunks), CHUNK_UNIT)


@any_shape
def test_parts_cover_the_chunks_once(shape: Shape) -> None:
    plan = plan_of(*shape)
    assert (plan.parts - 1) * plan.chunks_per_part < plan.chunks <= plan.parts * plan.chunks_per_part


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(total=st.one_of(st.integers(0, 300), st.integers(0, 2**50)), cores=st.integers(1, 400))
@pytest.mark.parametrize("known", [None, *CORES], ids=lambda known: f"{known or 'any number of'} cores")
def test_shares_cover_the_total_once(known: int | None, total: int, cores: int) -> None:
    cores = known or cores
    shares = [_C.share_of(total, core, cores) for core in range(cores)]
    ends = [end for _, end in shares]
    assert [begin for begin, _ in shares] == [0, *ends[:-1]]
    assert ends[-1] == total
    sizes = [end - begin for begin, end in shares]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data(), total=st.integers(0, 2**50), cores=st.integers(2, 2**31))
def test_neighbours_shares_meet(data: st.DataObject, total: int, cores: int) -> None:
    """The same for more cores than can be listed."""
    core = data.draw(st.integers(0, cores - 2), label="core")
    (begin, end), (next_begin, next_end) = (_C.share_of(total, c, cores) for c in (core, core + 1))
    assert begin <= end == next_begin <= next_end
    assert {end - begin, next_end - next_begin} <= {total // cores, div_up(total, cores)}
    assert _C.share_of(total, 0, cores)[0] == 0
    assert _C.share_of(total, cores - 1, cores)[1] == total


# Cores are used


@any_shape
def test_tiles_are_of_a_cores_rows(shape: Shape) -> None:
    """Short: a tile has no more rows than the evenest cut gives the busiest of 48 cores.

    So up to 48 rows have a core each, and more rows have more than half of the cores; all of them, as far as a tile
    that may be larger is cut for UB.
    """
    plan = plan_of(*shape)
    if plan.mode == SHORT:
        assert plan.rows_per_tile <= div_up(plan.rows, MAX_CORES)
        assert plan.work_items >= min(plan.rows, MAX_CORES // 2 + 1)
        if plan.rows <= MAX_CORES:
            assert plan.work_items == plan.rows


@any_shape
def test_tiles_are_no_smaller_than_need_be(shape: Shape) -> None:
    """Short: with one tile less for each core, a tile would be too large for an instruction or for UB."""
    plan = plan_of(*shape)
    if plan.mode == SHORT:
        tiles_each = div_up(plan.work_items, MAX_CORES)
        assert plan.rows_per_tile == div_up(plan.rows, MAX_CORES * tiles_each)
        if tiles_each > 1:
            larger = div_up(plan.rows, MAX_CORES * (tiles_each - 1))
            row = round_up(plan.cols, DATA_BLOCK // plan.element_bytes)
            row *= (2 + plan.softcap) * 4 + 4 * plan.element_bytes
            lanes = LANES * 256 + LANES * plan.cols // 8 + 4 * LANES * (2 * 3 + 4) * plan.by_row
            fewest = plan.ub_bytes + (larger - plan.rows_per_tile) * row
            assert larger > MAX_TILE_ROWS or fewest + 2 * lanes > UB_BYTES


@any_shape
def test_whole_rows_use_all_cores(shape: Shape) -> None:
    """Resident and streaming: a row is a piece of work; there are 48 or more, or over 24 that are read once."""
    plan = plan_of(*shape)
    if plan.mode in (RESIDENT, STREAMING):
        assert plan.rows >= MAX_CORES or (plan.resident_chunks() and 2 * plan.rows > MAX_CORES)
        for cores in CORES:
            assert plan.work_items >= min(cores, plan.rows)


@any_shape
def test_split_rows_use_the_cores(shape: Shape) -> None:
    """Split: the busiest of 48 cores has at most half as much again as an even share of the columns of all rows.

    A quarter as much for rows that are too long for UB. To that comes what whole chunks ask for: 512 columns each, and
    at least 1024.
    """
    plan = plan_of(*shape)
    if plan.mode == SPLIT:
        items_of_busiest = div_up(plan.work_items, MAX_CORES)
        busiest = items_of_busiest * plan.chunks_per_part * plan.chunk_cols
        even = plan.rows * plan.cols / MAX_CORES
        uneven = 1.5 if plan.resident_chunks() else 1.25
        whole_chunks = items_of_busiest * max(MIN_CHUNK, plan.chunks_per_part * CHUNK_UNIT)
        assert busiest <= uneven * even + whole_chunks
        assert plan.chunk_cols >= MIN_CHUNK


@any_shape
def test_the_same_plan_every_time(shape: Shape) -> None:
    """Whatever was shared out among how many cores meanwhile."""
    *sizes, softcap, by_row = shape
    plan = _C.plan_rows(*sizes, softcap=softcap, by_row=by_row)
    for cores in CORES:
        _C.share_of(plan["work_items"], cores - 1, cores)
        assert _C.plan_rows(*sizes, softcap=softcap, by_row=by_row) == plan


def test_no_number_of_cores_in_a_plan() -> None:
    """Nothing tells the planner: it takes three numbers and two bools. Its C++ function takes no more, see below."""
    for cores in CORES:
        with pytest.raises(TypeError):
            _C.plan_rows(4096, 8080, FP32, cores)
        with pytest.raises(TypeError):
            _C.plan_rows(4096, 8080, FP32, cores=cores)


# Errors


@pytest.mark.parametrize("rows, cols, dtype", [(0, 1, 0), (-1, 1, 0), (1, 0, 0), (1, -1, 0), (1, 1, -1), (1, 1, 3)])
def test_plan_refuses(rows: int, cols: int, dtype: int) -> None:
    with pytest.raises(ValueError, match="plan_rows wants rows > 0, cols > 0 and a dtype"):
        _C.plan_rows(rows, cols, dtype)


@pytest.mark.parametrize("total, core, cores", [(-1, 0, 1), (1, -1, 1), (1, 1, 1), (1, 5, 4), (1, 0, 0), (1, 0, -1)])
def test_share_refuses(total: int, core: int, cores: int) -> None:
    with pytest.raises(ValueError, match="share_of wants total >= 0 and 0 <= core < cores"):
        _C.share_of(total, core, cores)


@pytest.mark.parametrize("function", ["plan_rows", "share_of"])
@pytest.mark.parametrize("arguments", [(), (1, 1), (1, 1.5, 1), (1, "1", 1), (1, None, 1), (2**63, 1, 1)], ids=str)
def test_refuses_what_is_no_int64(function: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        getattr(_C, function)(*arguments)


# The header as such


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("side", ["host", "device"])
def test_header_compiles_alone(side: str, tmp_path: Path) -> None:
    """Without torch and CANN, without warnings; on the device its functions have an attribute, which is empty here."""
    program = tmp_path / "row_plan_constexpr"
    source = Path(__file__).with_name("row_plan_constexpr.cpp")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ROOT / 'csrc'}"]
    flags += ["-D__aicore__="] if side == "device" else []
    compiled = subprocess.run(["g++", *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    assert subprocess.run([str(program)]).returncode == 0
