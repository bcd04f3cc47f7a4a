"""Duplicate, Copy, Brcb, CreateVecIndex, Gather, Compare and Select against numpy."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
from api_case import BITS, COUNT, COUNTER, PREFIX, REGISTER, Case, assert_same, half_patterns, offsets

import cann_sim

NAMES = re.findall(r"\w+", "Duplicate Copy Brcb CreateVecIndex Gather Compare Compares CompareScalar")
OP = {name: number for number, name in enumerate(NAMES)}
# bfloat16 as its bits
TYPES = {
    "int16": np.dtype(np.int16),
    "bfloat16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "half": np.dtype(np.float16),
    "float": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
RNG = np.random.default_rng(6)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity


def values(dtype: np.dtype, count: int) -> np.ndarray:
    return (RNG.standard_normal(count) * 100).astype(dtype) if dtype.kind == "f" else RNG.integers(0, 99, count, dtype)


def bit_mask(itemsize: int) -> tuple[int, int]:
    return 0x9000_0000_0AFF_0305, 0x8000_0001_0000_0000 if itemsize == 2 else 0


@pytest.mark.parametrize("type_name", TYPES)
def test_duplicate(type_name: str) -> None:
    dtype = TYPES[type_name]
    width, odd = 256 // dtype.itemsize, bit_mask(dtype.itemsize)
    scalar = {"bfloat16": np.uint16(0x4140)}.get(type_name, dtype.type(12))
    for case in [
        Case(form=COUNT, count=0),
        Case(form=COUNT, count=3 * width + 1),
        Case(form=PREFIX, mask=(width - 1, 0), repeat=3, strides=(1, 0, 8, 0)),
        Case(form=PREFIX, mask=(width, 0), repeat=2, strides=(3, 0, 30, 0)),
        Case(form=BITS, mask=odd, repeat=3, strides=(1, 0, 9, 0)),
        Case(form=COUNTER, count=width + 3, strides=(2, 0, 16, 0)),
        Case(form=REGISTER, mask=odd, repeat=2, strides=(1, 0, 8, 0)),
    ]:
        case.op, case.scalar = OP["Duplicate"], 12
        dst = values(dtype, 8192 // dtype.itemsize)
        expected = dst.copy()
        stride = (1, 8) if case.form == COUNT else (case.strides[0], case.strides[2])
        expected[offsets(case.lanes(dtype.itemsize), *stride, dtype.itemsize)] = scalar
        assert_same(case.launch(f"api_move:move_{type_name}", [dst], dst), expected, case)


@pytest.mark.parametrize("type_name", TYPES)
def test_copy(type_name: str) -> None:
    dtype = TYPES[type_name]
    width, odd = 256 // dtype.itemsize, bit_mask(dtype.itemsize)
    for case in [
        Case(form=PREFIX, mask=(width, 0), repeat=4),
        Case(form=PREFIX, mask=(width - 3, 0), repeat=3, strides=(2, 3, 17, 25)),
        Case(form=BITS, mask=odd, repeat=3, strides=(1, 0, 9, 1)),
        Case(form=REGISTER, mask=odd, repeat=2),
        Case(form=COUNTER, count=2 * width + 16, repeat=2, strides=(1, 3, 30, 1)),
    ]:
        case.op = OP["Copy"]
        x, dst = (values(dtype, 16384 // dtype.itemsize) for _ in range(2))
        lanes = case.lanes(dtype.itemsize)
        if case.form == COUNTER:  # so many elements in each repeat, over as many blocks as that takes
            lanes = np.array([(repeat, lane) for repeat in range(case.repeat) for lane in range(case.count)])
        expected = dst.copy()
        expected[offsets(lanes, case.strides[0], case.strides[2], dtype.itemsize)] = x[
            offsets(lanes, case.strides[1], case.strides[3], dtype.itemsize)
        ]
        assert_same(case.launch(f"api_move:move_{type_name}", [x], dst), expected, case)


@pytest.mark.parametrize("type_name", TYPES)
def test_brcb(type_name: str) -> None:
    dtype = TYPES[type_name]
    per_block = 32 // dtype.itemsize
    for repeat, block, stride in [(1, 1, 8), (4, 1, 8), (3, 2, 17), (2, 1, 30)]:
        x, dst = values(dtype, 64), values(dtype, 8192 // dtype.itemsize)
        expected = dst.copy()
        for i in range(8 * repeat):
            start = (i // 8 * stride + i % 8 * block) * per_block
            expected[start : start + per_block] = x[i]
        case = Case(op=OP["Brcb"], repeat=repeat, strides=(block, 0, stride, 0))
        assert_same(case.launch(f"api_move:move_{type_name}", [x], dst), expected, case)


@pytest.mark.parametrize("type_name", ["int16", "int32", "half", "float"])
def test_create_index(type_name: str) -> None:
    dtype = TYPES[type_name]
    width, odd = 256 // dtype.itemsize, bit_mask(dtype.itemsize)
    for case in [
        Case(form=COUNT, count=2 * width + 5),
        Case(form=PREFIX, mask=(width - 3, 0), repeat=3, strides=(2, 0, 17, 0)),
        Case(form=BITS, mask=odd, repeat=2, strides=(1, 0, 8, 0)),
    ]:
        case.op, case.scalar = OP["CreateVecIndex"], 7
        dst = values(dtype, 8192 // dtype.itemsize)
        lanes = case.lanes(dtype.itemsize)
        stride = (1, 8) if case.form == COUNT else (case.strides[0], case.strides[2])
        expected = dst.copy()
        expected[offsets(lanes, *stride, dtype.itemsize)] = (7 + lanes[:, 0] * width + lanes[:, 1]).astype(dtype)
        assert_same(case.launch(f"api_move:move_{type_name}", [dst], dst), expected, case)


@pytest.mark.parametrize("type_name", TYPES)
def test_gather(type_name: str) -> None:
    dtype = TYPES[type_name]
    width = 256 // dtype.itemsize
    x, dst = values(dtype, 512), values(dtype, 1024)
    at = RNG.integers(0, 500, 1024).astype(np.uint32) * np.uint32(dtype.itemsize)
    for case in [
        Case(form=COUNT, count=3 * width + 1),
        Case(form=PREFIX, mask=(width - 7, 0), repeat=3, strides=(1, 0, 9, 0)),
        Case(form=BITS, mask=bit_mask(dtype.itemsize), repeat=2, strides=(1, 0, 8, 0)),
    ]:
        case.op, case.scalar = OP["Gather"], 4 * dtype.itemsize
        lanes = case.lanes(dtype.itemsize)
        stride = 8 if case.form == COUNT else case.strides[2]
        expected = dst.copy()
        taken = at[lanes[:, 0] * width + lanes[:, 1]] // dtype.itemsize + 4
        expected[offsets(lanes, 1, stride, dtype.itemsize)] = x[taken]
        assert_same(case.launch(f"api_move:move_{type_name}", [x, at], dst), expected, case)
    for offset, kind in ((512 * dtype.itemsize, "bounds"), (1, "alignment")):
        with pytest.raises(cann_sim.KernelError) as caught:
            Case(op=OP["Gather"], count=8).launch(
                f"api_move:move_{type_name}", [x, np.full(1024, offset, np.uint32)], dst
            )
        assert caught.value.kind == kind


MODES = [operator.lt, operator.gt, operator.eq, operator.le, operator.ge, operator.ne]  # CMPMODE's order


def comparable(dtype: np.dtype, count: int) -> np.ndarray:
    if dtype.kind == "i":
        return RNG.integers(-2, 3, count).astype(dtype)
    x = RNG.integers(-2, 3, count).astype(dtype)
    x[RNG.integers(0, count, count // 4)] = RNG.choice([np.nan, np.inf, -np.inf, -0.0], count // 4)
    return x


@pytest.mark.parametrize("type_name", ["float", "half", "int32"])
@pytest.mark.parametrize("name", ["Compare", "Compares", "CompareScalar"])
def test_compare(type_name: str, name: str) -> None:
    dtype = TYPES[type_name]
    width = 256 // dtype.itemsize
    a, b, dst = comparable(dtype, 4096), comparable(dtype, 4096), RNG.integers(0, 255, 512, np.uint8)
    for mode, compare in enumerate(MODES):
        for case in [
            Case(form=COUNT, count=5 * width),
            # The mask has no effect on Atlas A2, and dst is written without gaps.
            Case(form=PREFIX, mask=(3, 0), repeat=4, strides=(1, 1, 1, 8, 8, 9) if name == "Compare" else (1, 1, 8, 8)),
            Case(form=BITS, mask=(5, 0), repeat=3, strides=(1, 2, 0, 8, 17, 1) if name == "Compare" else (1, 2, 8, 17)),
        ]:
            case.op, case.mode, case.scalar = OP[name], mode, 1
            if type_name == "int32" and compare is not operator.eq:
                with pytest.raises(cann_sim.KernelError) as caught:
                    case.launch(f"api_move:compare_{type_name}", [a, b], dst)
                assert caught.value.kind == "params"
                continue
            repeats = 5 if case.form == COUNT else case.repeat
            lanes = np.array([(repeat, lane) for repeat in range(repeats) for lane in range(width)])
            at = [np.arange(lanes.shape[0])] * 2
            if case.form != COUNT:
                half = len(case.strides) // 2
                at = [offsets(lanes, case.strides[i], case.strides[half + i], dtype.itemsize) for i in range(1, half)]
            bits = np.packbits(compare(a[at[0]], b[at[1]] if name == "Compare" else dtype.type(1)), bitorder="little")
            expected = np.append(bits, dst[bits.size :])
            assert_same(case.launch(f"api_move:compare_{type_name}", [a, b], dst), expected, case)


def test_compare_every_half() -> None:
    x = half_patterns()
    for mode, compare in enumerate(MODES):
        case = Case(op=OP["Compares"], count=4096, mode=mode, scalar=1.5)
        actual = case.launch("api_move:compare_half", [x], np.zeros(8192, np.uint8), blocks=16)
        np.testing.assert_array_equal(np.unpackbits(actual, bitorder="little"), compare(x, np.float16(1.5)))


@pytest.mark.parametrize("type_name", ["float", "half"])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_select(type_name: str, mode: int) -> None:
    dtype = TYPES[type_name]
    width, odd = 256 // dtype.itemsize, bit_mask(dtype.itemsize)
    for case in [
        Case(form=COUNT, count=width - 5),
        Case(form=COUNT, count=4 * width + 9),
        Case(form=PREFIX, mask=(width - 3, 0), repeat=3, strides=(1, 2, 1, 9, 16, 8)),
        Case(form=BITS, mask=odd, repeat=4, strides=(2, 1, 0, 17, 8, 0)),
    ]:
        case.mode, case.scalar, case.flag = mode, -2.5, int(mode == 1)
        a, b, dst = (values(dtype, 8192 // dtype.itemsize) for _ in range(3))
        packed = RNG.integers(0, 255, 512, np.uint8)
        bits = np.unpackbits(packed, bitorder="little").astype(bool)
        lanes = case.lanes(dtype.itemsize)
        at = [np.arange(lanes.shape[0])] * 3
        if case.form != COUNT:
            at = [offsets(lanes, case.strides[i], case.strides[3 + i], dtype.itemsize) for i in range(3)]
        chosen = bits[(0 if mode == 0 else lanes[:, 0] * width) + lanes[:, 1]]
        expected = dst.copy()
        expected[at[0]] = np.where(chosen, a[at[1]], dtype.type(-2.5) if mode == 1 else b[at[2]])
        assert_same(case.launch(f"api_move:select_{type_name}", [a, b, packed], dst), expected, case)
