"""Cast against exact arithmetic: every pair of types, every rounding mode, every 16-bit pattern, ties and extremes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from api_case import BITS, COUNTER, PREFIX, REGISTER, Case, assert_same, half_patterns, offsets

import cann_sim

NONE, RINT, FLOOR, CEIL, ROUND, TRUNC, ODD = range(7)
DIRECTED = {RINT, FLOOR, CEIL, ROUND, TRUNC}
# The documented pairs and their modes.
PAIRS = {
    ("int8", "half"): {NONE},
    ("uint8", "half"): {NONE},
    ("int16", "half"): DIRECTED | {NONE},
    ("int16", "float"): {NONE},
    ("half", "int8"): DIRECTED | {NONE},
    ("half", "uint8"): DIRECTED | {NONE},
    ("half", "int16"): DIRECTED,
    ("half", "int32"): DIRECTED,
    ("half", "float"): {NONE},
    ("bfloat16", "int32"): DIRECTED,
    ("bfloat16", "float"): {NONE},
    ("int32", "int16"): {NONE},
    ("int32", "float"): DIRECTED | {NONE},
    ("int32", "int64"): {NONE},
    ("float", "int16"): DIRECTED,
    ("float", "half"): DIRECTED | {NONE, ODD},
    ("float", "bfloat16"): DIRECTED,
    ("float", "int32"): DIRECTED,
    ("float", "float"): DIRECTED,
    ("float", "int64"): DIRECTED,
    ("int64", "int32"): {NONE},
    ("int64", "float"): DIRECTED,
}
STORAGE = {"half": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16), "float": np.dtype(np.float32)}
# Significant bits, exponent of the last bit of subnormals, largest exponent.
FORMATS = {"half": (11, -24, 15), "bfloat16": (8, -133, 127), "float": (24, -149, 127)}
RNG = np.random.default_rng(3)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity


def storage(name: str) -> np.dtype:
    return STORAGE.get(name) or np.dtype(name)


def widened(name: str, x: np.ndarray) -> np.ndarray:
    """Exact values: floats as float64, integers as Python's."""
    if name == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64) if x.dtype.kind == "f" else x.astype(object)


def round_to_integer(mode: int, x: np.ndarray) -> np.ndarray:
    """float64 to integral float64; exact, as every value here has few bits."""
    if mode in (NONE, RINT):
        return np.rint(x)
    if mode == ROUND:
        return np.copysign(np.floor(np.abs(x) + 0.5), x)
    if mode == ODD:
        down = np.floor(x)
        return np.where(x == down, x, np.where(down % 2 != 0, down, down + 1))
    return {FLOOR: np.floor, CEIL: np.ceil, TRUNC: np.trunc}[mode](x)


def round_to_format(mode: int, x: np.ndarray, name: str) -> np.ndarray:
    """float64 to the values of a binary format, as float64."""
    digits, least, most = FORMATS[name]
    finite = np.where(np.isfinite(x), x, 0)
    exponent = np.frexp(finite)[1]
    unit = np.ldexp(1.0, np.maximum(exponent - digits, least))
    rounded = round_to_integer(mode, finite / unit) * unit
    largest = np.ldexp(2.0 - np.ldexp(1.0, 1 - digits), most)
    beyond = np.abs(rounded) > largest
    stops = {FLOOR: rounded > 0, CEIL: rounded < 0, TRUNC: beyond, ODD: beyond}.get(mode, np.zeros_like(beyond))
    rounded = np.where(beyond, np.copysign(np.where(stops, largest, np.inf), rounded), rounded)
    return np.where(np.isfinite(x), np.copysign(rounded, x), x)


def expected_cast(source: str, target: str, mode: int, x: np.ndarray) -> np.ndarray:
    dtype = storage(target)
    exact = widened(source, x)
    if dtype.kind in "iu" and target != "bfloat16":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if x.dtype.kind == "f" or source == "bfloat16":
            exact = round_to_integer(mode, np.nan_to_num(exact, nan=0.0, posinf=1e300, neginf=-1e300))
        return np.array([min(max(int(value), low), high) for value in exact], dtype)
    if x.dtype.kind in "iu" and source != "bfloat16":
        if source == "int64":
            return np.array([integer_to_format(mode, int(value), target) for value in exact]).astype(dtype)
        return round_to_format(mode, x.astype(np.float64), target).astype(dtype)
    if source == target:
        return np.copysign(round_to_integer(mode, exact), exact).astype(dtype)
    rounded = round_to_format(mode, exact, target)
    if target == "bfloat16":
        return (rounded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return rounded.astype(dtype)


def integer_to_format(mode: int, value: int, name: str) -> float:
    """By fractions: int64 has more bits than float64."""
    unit = max(abs(value).bit_length() - FORMATS[name][0], 0)
    quotient = Fraction(value, 2**unit)
    down = quotient.numerator // quotient.denominator
    rest = quotient - down
    up = {
        FLOOR: False,
        CEIL: rest > 0,
        TRUNC: value < 0 and rest > 0,
        ROUND: rest > Fraction(1, 2) or (rest == Fraction(1, 2) and value > 0),
    }.get(mode, rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1))
    return float((down + int(up)) * 2**unit)


def inputs(name: str, target: str) -> np.ndarray:
    """Every pattern of a 16-bit type; of wider ones edges, ties of the target, and random patterns."""
    if name == "half":
        return half_patterns()
    if name == "bfloat16":
        return np.arange(65536, dtype=np.uint16)
    if name in ("int8", "uint8"):
        return np.resize(np.arange(256, dtype=np.uint8), 4096).view(name)
    if name == "int16":
        return np.arange(65536, dtype=np.uint16).view(np.int16)
    if name == "float":
        pattern = RNG.integers(0, 2**32, 8192, np.uint32).view(np.float32)
        small = RNG.integers(-(2**20), 2**20, 8192).astype(np.float32) / np.float32(8)
        values = np.ldexp(RNG.uniform(-2, 2, 4096), RNG.integers(-30, 66, 4096)).astype(np.float32)
        every = half_patterns().astype(np.float32) if target == "half" else np.zeros(0, np.float32)
        if target == "bfloat16":
            every = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
        step = np.uint32(1 << (12 if target == "half" else 15))
        ties = (every.view(np.uint32) + step).view(np.float32)
        near = [np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
        edges = np.float32(
            [2.0**e * s + d for e in (7, 8, 15, 23, 24, 31, 63) for s in (-1, 1) for d in (-0.5, 0, 0.5)]
        )
        special = np.float32([np.inf, -np.inf, np.nan, 0.0, -0.0, 65504, 65519.99, 65520, 65536, 1e-45, -3e-8, 2.5e-8])
        return pad(np.concatenate([pattern, small, values, every, ties, *near, edges, special]))
    bits = 8 * storage(name).itemsize
    wide = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 2048, np.int64) >> RNG.integers(0, bits - 1, 2048)
    ties = [s * ((1 << e) + k * (1 << (e - 24))) for e in range(24, bits - 1) for s in (-1, 1) for k in range(-3, 4)]
    edges = [s * (1 << e) + d for e in range(bits - 1) for s in (-1, 1) for d in (-1, 0, 1)]
    return pad(np.array([*wide, *ties, *edges, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1]).astype(name))


def pad(x: np.ndarray) -> np.ndarray:
    """Whole cores of 4096 elements."""
    return np.resize(x, (x.size + 4095) // 4096 * 4096)


@pytest.mark.parametrize("source, target", PAIRS)
def test_every_mode(source: str, target: str) -> None:
    x = inputs(source, target)
    dst = np.zeros(x.size, storage(target))
    for mode in sorted(PAIRS[source, target]):
        case = Case(count=4096, mode=mode)
        actual = case.launch(f"api_cast:cast_{source}_{target}", [x], dst, blocks=x.size // 4096)
        expected = expected_cast(source, target, mode, x)
        if target == "bfloat16":  # compared as numbers, so that any NaN will do
            actual, expected = ((a.astype(np.uint32) << 16).view(np.float32) for a in (actual, expected))
        assert_same(actual, expected, mode)


@pytest.mark.parametrize("source, target", PAIRS)
def test_other_modes_are_refused(source: str, target: str) -> None:
    x = np.zeros(32, storage(source))
    for mode in set(range(7)) - PAIRS[source, target]:
        with pytest.raises(cann_sim.KernelError) as caught:
            Case(count=8, mode=mode).launch(f"api_cast:cast_{source}_{target}", [x], np.zeros(32, storage(target)))
        assert caught.value.kind == "rounding"


@pytest.mark.parametrize("source, target", [("half", "float"), ("float", "half"), ("half", "int8"), ("int64", "int32")])
def test_masks_and_strides(source: str, target: str) -> None:
    """A repeat has as many lanes as fit of the wider type; each tensor has strides of its own blocks."""
    source_type, target_type = storage(source), storage(target)
    widest = max(source_type.itemsize, target_type.itemsize)
    width, blocks = (
        256 // widest,
        (256 // widest * target_type.itemsize // 32, 256 // widest * source_type.itemsize // 32),
    )
    mode = min(PAIRS[source, target])
    low = 0x8000_1248_F731_0005 & ((1 << width) - 1)
    odd = (low, 0x8000_0000_0000_0001 if width == 128 else 0)
    for case in [
        Case(form=PREFIX, mask=(width - 3, 0), repeat=5, strides=(1, 1, *blocks)),
        Case(form=PREFIX, mask=(width, 0), repeat=4, strides=(2, 3, 17, 25)),
        Case(form=BITS, mask=odd, repeat=3, strides=(1, 2, 9, 0)),
        Case(form=REGISTER, mask=odd, repeat=2, strides=(3, 1, 30, 8)),
        Case(form=COUNTER, count=2 * width + 5, strides=(1, 1, *blocks)),
    ]:
        case.mode = mode
        x = (RNG.standard_normal(16384 // source_type.itemsize) * 50).astype(source_type)
        dst = RNG.integers(0, 100, 16384 // target_type.itemsize).astype(target_type)
        lanes = case.lanes(widest)
        expected = dst.copy()
        taken = x[offsets(lanes, case.strides[1], case.strides[3], source_type.itemsize)]
        at = offsets(lanes, case.strides[0], case.strides[2], target_type.itemsize)
        expected[at] = expected_cast(source, target, mode, taken)
        assert_same(case.launch(f"api_cast:cast_{source}_{target}", [x], dst), expected, case)
