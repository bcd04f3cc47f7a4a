"""Reductions against numpy: the order of additions bit for bit, extremes with their index, masks, strides, layouts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from api_case import BITS, COUNT, PREFIX, Case, assert_same, offsets

import cann_sim

NAMES = re.findall(
    r"\w+",
    "WholeReduceSum WholeReduceMax WholeReduceMin BlockReduceSum BlockReduceMax BlockReduceMin PairReduceSum "
    "RepeatReduceSum ReduceSum ReduceMax ReduceMin ReduceRepeat ReduceDataBlock ReducePairElem",
)
OP = {name: number for number, name in enumerate(NAMES)}
VALUE_INDEX, INDEX_VALUE, ONLY_VALUE, ONLY_INDEX = range(4)
TYPES = {"float": np.dtype(np.float32), "half": np.dtype(np.float16)}
RNG = np.random.default_rng(4)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity


def values(dtype: np.dtype, count: int) -> np.ndarray:
    """Sums of these depend on the order of the additions, and extremes occur more than once."""
    x = RNG.standard_normal(count) * np.exp2(RNG.integers(-6, 7, count))
    x[RNG.integers(0, count, count // 4)] = RNG.choice([300.0, -300.0, 0.0, -0.0], count // 4)
    return x.astype(dtype)


def tree(x: np.ndarray) -> np.generic:
    """Neighbours, then neighbouring sums, each rounded to the type."""
    while x.size > 1:
        x = x[0::2] + x[1::2]
    return x[0]


def reduce_lanes(kind: str, lanes: np.ndarray, x: np.ndarray, width: int) -> tuple[np.generic, int]:
    """What one group of `width` lanes gives, of which lanes[i] holds x[i]."""
    if kind == "Sum":
        whole = np.full(width, -0.0, x.dtype)
        whole[lanes % width] = x
        return tree(whole), 0
    first = int(np.nanargmax(x) if kind == "Max" else np.nanargmin(x))
    if np.isnan(x).any():
        first = int(np.flatnonzero(np.isnan(x))[0])
    return x[first], int(lanes[first])


def kind_of(name: str) -> str:
    return {"ReduceRepeat": "Max", "ReduceDataBlock": "Sum", "ReducePairElem": "Sum"}.get(name, name[-3:])


def masked_cases(itemsize: int) -> list[Case]:
    """`strides` are dst repeat, src block, src repeat."""
    width = 256 // itemsize
    odd = (0xF000_0000_00FF_0305, 0x8000_0001_0000_0000 if itemsize == 2 else 0)
    return [
        Case(form=PREFIX, mask=(width, 0), repeat=6, strides=(1, 1, 8)),
        Case(form=PREFIX, mask=(width - 11, 0), repeat=5, strides=(3, 1, 9)),
        Case(form=PREFIX, mask=(width // 2 + 1, 0), repeat=3, strides=(2, 2, 17)),
        Case(form=PREFIX, mask=(1, 0), repeat=255, strides=(1, 1, 1)),
        Case(form=PREFIX, mask=(width, 0), repeat=2, strides=(1, 0, 1)),
        Case(form=BITS, mask=odd, repeat=4, strides=(5, 3, 2)),
    ]


WHOLE = ["WholeReduceSum", "WholeReduceMax", "WholeReduceMin", "RepeatReduceSum", "ReduceRepeat"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("type_name", TYPES)
def test_whole(type_name: str, name: str) -> None:
    dtype = TYPES[type_name]
    index_type = np.dtype(f"u{dtype.itemsize}")
    orders = range(4) if kind_of(name) != "Sum" else [ONLY_VALUE]
    for case in masked_cases(dtype.itemsize):
        for order in orders:
            case.op, case.mode = OP[name], order
            x = values(dtype, 16384 // dtype.itemsize)
            dst = RNG.integers(0, 255, 8192, np.uint8)
            expected = dst.copy()
            unit = {ONLY_VALUE: dtype.itemsize, ONLY_INDEX: 4}.get(order, 2 * dtype.itemsize)
            lanes = case.lanes(dtype.itemsize)
            for repeat in range(case.repeat):
                mine = lanes[lanes[:, 0] == repeat]
                taken = x[offsets(mine, case.strides[1], case.strides[2], dtype.itemsize)]
                value, index = reduce_lanes(kind_of(name), mine[:, 1], taken, 256 // dtype.itemsize)
                parts = {
                    VALUE_INDEX: [value, index_type.type(index)],
                    INDEX_VALUE: [index_type.type(index), value],
                    ONLY_VALUE: [value],
                    ONLY_INDEX: [np.uint32(index)],
                }[order]
                at = repeat * case.strides[0] * unit
                expected[at : at + unit] = np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)
            assert_same(case.launch(f"api_reduce:reduce_{type_name}", [x], dst), expected, (name, case))


GROUPS = ["BlockReduceSum", "BlockReduceMax", "BlockReduceMin", "ReduceDataBlock", "PairReduceSum", "ReducePairElem"]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("type_name", TYPES)
def test_groups(type_name: str, name: str) -> None:
    """Groups none of whose lanes take part keep what dst held."""
    dtype = TYPES[type_name]
    group = 2 if "Pair" in name else 32 // dtype.itemsize
    groups = 256 // dtype.itemsize // group
    for case in masked_cases(dtype.itemsize):
        case.op = OP[name]
        case.repeat = min(case.repeat, 30)
        x, dst = values(dtype, 16384 // dtype.itemsize), values(dtype, 16384 // dtype.itemsize)
        expected = dst.copy()
        lanes = case.lanes(dtype.itemsize)
        taken = x[offsets(lanes, case.strides[1], case.strides[2], dtype.itemsize)]
        for repeat in range(case.repeat):
            for g in range(groups):
                mine = (lanes[:, 0] == repeat) & (lanes[:, 1] // group == g)
                if mine.any():
                    at = repeat * case.strides[0] * groups + g
                    expected[at] = reduce_lanes(kind_of(name), lanes[mine, 1], taken[mine], group)[0]
        assert_same(case.launch(f"api_reduce:reduce_{type_name}", [x], dst), expected, (name, case))


@pytest.mark.parametrize("name", ["WholeReduceMax", "WholeReduceMin", "BlockReduceMax", "BlockReduceMin"])
@pytest.mark.parametrize("type_name", TYPES)
def test_special_values(type_name: str, name: str) -> None:
    """A NaN is the extreme wherever it stands, infinities count, and of equal zeros the first is taken."""
    dtype = TYPES[type_name]
    width = 256 // dtype.itemsize
    group = width if "Whole" in name else 32 // dtype.itemsize
    x = np.zeros(width * 64, dtype)
    kinds = [[-0.0, 0.0], [-np.inf, np.inf], [-np.inf, -np.inf], [np.nan, 1]]
    for row, chunk in enumerate(x.reshape(-1, group)):
        chunk[:] = RNG.permutation(kinds[row % 4] * (group // 2))
    expected = np.array([reduce_lanes(name[-3:], np.arange(group), chunk, group)[0] for chunk in x.reshape(-1, group)])
    case = Case(op=OP[name], form=PREFIX, mask=(width, 0), repeat=64, strides=(1, 1, 8), mode=ONLY_VALUE)
    actual = case.launch(f"api_reduce:reduce_{type_name}", [x], np.zeros(expected.size, dtype))
    assert_same(actual, expected.astype(dtype))


@pytest.mark.parametrize("type_name", TYPES)
def test_reduce_sum(type_name: str) -> None:
    dtype = TYPES[type_name]
    width = 256 // dtype.itemsize
    for count in (1, 7, width - 1, width, width + 1, 3 * width, 40 * width + 5):
        x, dst = values(dtype, 16384 // dtype.itemsize), values(dtype, 32)
        repeats = np.resize(np.append(x[:count], np.full(-count % width, -0.0, dtype)), (-(-count // width), width))
        total = tree(repeats[0])
        for row in repeats[1:]:
            total = total + tree(row)
        expected = np.append(total, dst[1:])
        case = Case(op=OP["ReduceSum"], count=count)
        actual = case.launch(f"api_reduce:reduce_{type_name}", [x, values(dtype, 32)], dst)
        assert_same(actual, expected, count)
    for repeat in (1, 2, 60, 65):  # over repeats by pairs, too
        x, dst = values(dtype, 32768 // dtype.itemsize), values(dtype, 32)
        case = Case(op=OP["ReduceSum"], form=PREFIX, mask=(width - 3, 0), repeat=repeat, strides=(0, 1, 9))
        lanes = case.lanes(dtype.itemsize)
        sums = np.full(-(-repeat // width) * width, -0.0, dtype)
        for r in range(repeat):
            mine = lanes[lanes[:, 0] == r]
            sums[r] = reduce_lanes("Sum", mine[:, 1], x[offsets(mine, 1, 9, dtype.itemsize)], width)[0]
        level = np.append([tree(row) for row in sums.reshape(-1, width)], np.full(width, -0.0))[:width].astype(dtype)
        actual = case.launch(f"api_reduce:reduce_{type_name}", [x, values(dtype, 128)], dst)
        assert_same(actual, np.append(tree(level), dst[1:]), repeat)


@pytest.mark.parametrize("name", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("type_name", TYPES)
def test_reduce_extreme(type_name: str, name: str) -> None:
    dtype = TYPES[type_name]
    width, index_type = 256 // dtype.itemsize, np.dtype(f"u{dtype.itemsize}")
    for flag in (0, 1):
        for count in (1, 2, width - 1, width, width + 1, 3 * width, 40 * width + 5):
            x, dst = values(dtype, 16384 // dtype.itemsize), values(dtype, 32)
            if count == 3 * width:
                x[2 * width] = np.nan
            value, index = reduce_lanes(name[-3:], np.arange(count), x[:count], width)
            expected = dst.copy()
            expected[: 1 + flag] = np.array([value, np.array([index], index_type).view(dtype)[0]], dtype)[: 1 + flag]
            case = Case(op=OP[name], count=count, flag=flag)
            actual = case.launch(f"api_reduce:reduce_{type_name}", [x, values(dtype, 256)], dst)
            assert_same(actual.view(index_type)[1:], expected.view(index_type)[1:], count)
            assert_same(actual[:1], expected[:1], count)
        case = Case(op=OP[name], form=PREFIX, mask=(width - 9, 0), repeat=21, strides=(0, 1, 10), flag=flag)
        x, dst = values(dtype, 16384 // dtype.itemsize), values(dtype, 32)
        at = offsets(case.lanes(dtype.itemsize), 1, 10, dtype.itemsize)
        value, index = reduce_lanes(name[-3:], at, x[at], width)
        expected = dst.copy()
        expected[: 1 + flag] = np.array([value, np.array([index], index_type).view(dtype)[0]], dtype)[: 1 + flag]
        actual = case.launch(f"api_reduce:reduce_{type_name}", [x, values(dtype, 256)], dst)
        assert_same(actual.view(index_type), expected.view(index_type), case)


def test_results_are_ordered_with_what_follows() -> None:
    x, dst = np.arange(512, dtype=np.float32), np.zeros(8, np.float32)
    for op, result in ((0, x[:500].sum()), (1, 499)):
        actual = Case(op=op, count=500).launch("api_reduce:reduce_then_use", [x, np.zeros(64, np.float32)], dst)
        assert actual[0] == result + 1


@pytest.mark.parametrize(
    "case, kind, words",
    [
        (Case(op=OP["ReduceMax"], count=512, flag=1), "bounds", "sharedTmpBuffer"),
        (Case(op=OP["WholeReduceMax"], form=PREFIX, mask=(64, 0), repeat=9, strides=(1, 1, 8)), "bounds", "src"),
        (Case(op=OP["WholeReduceMax"], form=PREFIX, mask=(64, 0), repeat=8, strides=(5, 1, 8)), "bounds", "dst"),
        (Case(op=OP["WholeReduceMax"], form=PREFIX, mask=(64, 0), strides=(65536, 1, 8)), "params", "65536"),
        (Case(op=OP["WholeReduceMax"], form=PREFIX, mask=(64, 0), repeat=256, strides=(0, 1, 0)), "repeat", "256"),
        (Case(op=OP["BlockReduceSum"], form=BITS, mask=(1, 1), strides=(1, 1, 8)), "mask", "0x1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules(case: Case, kind: str, words: str) -> None:
    x = np.zeros(512, np.float32)
    with pytest.raises(cann_sim.KernelError) as caught:
        case.launch("api_reduce:reduce_float", [x, np.zeros(8, np.float32)], np.zeros(64, np.float32))
    assert caught.value.kind == kind
    for word in words.split():
        assert word in caught.value.message


def test_count_form_of_nothing_does_nothing() -> None:
    dst = np.arange(32, dtype=np.float32)
    case = Case(op=OP["ReduceSum"], form=COUNT, count=0)
    assert_same(case.launch("api_reduce:reduce_float", [dst, dst], dst), dst)
