"""Vector arithmetic against numpy: every operation and type, every form, masks, strides, ties, infinities and NaN."""

from __future__ import annotations

import re

import numpy as np
import pytest
from api_case import BITS, COUNT, COUNTER, PREFIX, REGISTER, Case, assert_same, half_patterns, offsets

import cann_sim

# The numbers of kernels/api_arithmetic.cpp.
NAMES = re.findall(
    r"\w+",
    "Add Sub Mul Max Min Adds Muls Maxs Mins Div Exp Ln Abs Reciprocal Sqrt Rsqrt Relu LeakyRelu FusedMulAdd Axpy "
    "MulAddDst ShiftLeft ShiftRight And Or Not",
)
OP = {name: number for number, name in enumerate(NAMES)}
RNG = np.random.default_rng(2)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity


def greater(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where((a > b) | np.isnan(a), a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def less(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where((a < b) | np.isnan(a), a, b) if a.dtype.kind == "f" else np.minimum(a, b)


# numpy computes float16 in float32 and rounds once, and wraps integers, which is what is asked for.
BINARY = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": greater,
    "Min": less,
    "And": np.bitwise_and,
    "Or": np.bitwise_or,
}
UNARY = {
    "Abs": np.abs,
    "Reciprocal": lambda a: a.dtype.type(1) / a,
    "Sqrt": np.sqrt,
    "Relu": lambda a: np.where((a > 0) | (a != a), a, a.dtype.type(0)),
    "Not": np.invert,
}
SCALAR = {
    "Adds": np.add,
    "Muls": np.multiply,
    "Maxs": greater,
    "Mins": less,
    "LeakyRelu": lambda a, s: np.where(a >= 0, a, a * s),
}
# Within one unit in the last place: the device gives no exact value for these.
NEAR = {"Exp": np.exp, "Ln": np.log, "Rsqrt": lambda a: 1 / np.sqrt(a)}

FLOATING = ["Add", "Sub", "Mul", "Max", "Min", "Div", "Adds", "Muls", "Maxs", "Mins", *UNARY, "LeakyRelu", "MulAdd"]
TYPES = {
    "float": (np.float32, [name for name in FLOATING if name != "Not"]),
    "half": (np.float16, [name for name in FLOATING if name != "Not"]),
    "int16": (np.int16, ["Add", "Sub", "Mul", "Max", "Min", "Adds", "Muls", "Maxs", "Mins", "And", "Or", "Not"]),
    "uint16": (np.uint16, ["And", "Or", "Not"]),
    "int32": (np.int32, ["Add", "Sub", "Mul", "Max", "Min", "Adds", "Muls", "Maxs", "Mins", "Relu"]),
}


def values(dtype: type, count: int) -> np.ndarray:
    """Any bit pattern for integers and half; floats of moderate size, with all the special ones among them."""
    if dtype != np.float32:
        return RNG.integers(0, 256, count * np.dtype(dtype).itemsize, np.uint8).view(dtype)
    x = (RNG.standard_normal(count) * np.exp2(RNG.integers(-8, 9, count))).astype(np.float32)
    special = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-40, 3.4028235e38, 1.1754944e-38]
    x[: len(special)] = special
    return RNG.permutation(x)


def result(name: str, a: np.ndarray, b: np.ndarray, scalar: float, dst: np.ndarray) -> np.ndarray:
    """The elements that operation `name` writes."""
    if name in BINARY:
        return BINARY[name](a, b)
    if name in UNARY:
        return UNARY[name](a)
    if name in SCALAR:
        return SCALAR[name](a, a.dtype.type(scalar))
    if name == "Axpy":
        return a * a.dtype.type(scalar) + dst
    return a * dst + b if name == "FusedMulAdd" else a * b + dst


def forms(binary: bool, itemsize: int) -> list[Case]:
    """Every form, with counts that are no multiple of anything, masks with holes and strides that are not 1 and 8."""
    width = 256 // itemsize
    unary = [(2, 1, 17, 9), (1, 0, 8, 1), (1, 3, 9, 24)]
    two = [(2, 1, 3, 17, 8, 25), (1, 0, 1, 8, 1, 0), (1, 1, 0, 8, 9, 1)]
    strides = two if binary else unary
    plain = (1, 1, 1, 8, 8, 8) if binary else (1, 1, 8, 8)
    odd = (0x8421_0F00_1234_5679, 0x8000_0000_0000_0001 if itemsize == 2 else 0)
    return [
        Case(form=COUNT, count=1),
        Case(form=COUNT, count=width),
        Case(form=COUNT, count=5 * width + 3),
        Case(form=PREFIX, mask=(width, 0), repeat=4, strides=plain),
        Case(form=PREFIX, mask=(width - 5, 0), repeat=3, strides=strides[0]),
        Case(form=PREFIX, mask=(width, 0), repeat=5, strides=strides[1]),
        Case(form=PREFIX, mask=(3, 0), repeat=7, strides=strides[2]),
        Case(form=BITS, mask=odd, repeat=3, strides=strides[0]),
        Case(form=BITS, mask=odd, repeat=2, strides=strides[1]),
        Case(form=COUNTER, count=2 * width + 9, strides=strides[0]),
        Case(form=REGISTER, mask=odd, repeat=3, strides=plain),
    ]


@pytest.mark.parametrize("type_name, name", [(t, name) for t, (_, names) in TYPES.items() for name in names])
def test_operation(type_name: str, name: str) -> None:
    dtype = TYPES[type_name][0]
    itemsize = np.dtype(dtype).itemsize
    for real in ("Axpy", "FusedMulAdd", "MulAddDst") if name == "MulAdd" else (name,):
        binary = real in BINARY or real in ("FusedMulAdd", "MulAddDst")
        for case in forms(binary, itemsize):
            if real in ("Axpy", "FusedMulAdd", "MulAddDst") and case.form == COUNTER:
                continue
            case.op, case.scalar = OP[real], 2.5 if np.dtype(dtype).kind == "f" else 3
            a, b, dst = (values(dtype, 24576 // itemsize) for _ in range(3))
            lanes = case.lanes(itemsize)
            if case.form == COUNT:
                at = [np.arange(case.count)] * 3
            else:
                operands = 3 if binary else 2
                pairs = [(case.strides[i], case.strides[operands + i]) for i in range(operands)]
                at = [offsets(lanes, block, repeat, itemsize) for block, repeat in pairs]
                at = at if binary else [*at, at[1]]
            expected = dst.copy()
            expected[at[0]] = result(real, a[at[1]], b[at[2]], case.scalar, dst[at[0]])
            actual = case.launch(f"api_arithmetic:arithmetic_{type_name}", [a, b], dst)
            assert_same(actual, expected, (real, case))


@pytest.mark.parametrize("name", ["Abs", "Reciprocal", "Sqrt", "Relu", "Exp", "Ln", "Rsqrt"])
def test_every_half(name: str) -> None:
    x = half_patterns()
    case = Case(op=OP[name], count=4096)
    actual = case.launch("api_arithmetic:arithmetic_half", [x], np.zeros_like(x), blocks=16)
    if name in UNARY:
        assert_same(actual, UNARY[name](x))
    else:
        exact = NEAR[name](x.astype(np.float64))
        assert_same(actual, exact.astype(np.float32).astype(np.float16))


@pytest.mark.parametrize("name, low, high", [("Exp", -104, 89), ("Ln", 1e-40, 1e38), ("Rsqrt", 1e-40, 1e38)])
def test_transcendental_of_float(name: str, low: float, high: float) -> None:
    x = np.concatenate([RNG.uniform(low, high, 4096), np.exp(RNG.uniform(-80, 80, 4096)).clip(None, high)])
    x = np.concatenate([x, [np.inf, np.nan, 0.0, 1.0, -np.inf if name == "Exp" else 4.0, 2.0, 3.0, 5.0]])
    x = x.astype(np.float32)
    case = Case(op=OP[name], count=x.size)
    actual = case.launch("api_arithmetic:arithmetic_float", [x], np.zeros_like(x)).astype(np.float64)
    exact = NEAR[name](x.astype(np.float64))
    assert_same(actual[-8:].astype(np.float32)[:3], exact[-8:].astype(np.float32)[:3])
    finite = np.isfinite(exact) & (exact < 3.4e38)
    ulp = np.spacing(np.abs(exact[finite]).astype(np.float32)).astype(np.float64)
    assert (np.abs(actual[finite] - exact[finite]) <= ulp).all()


def test_every_pair_of_half_exponents() -> None:
    """Sums and products that tie, cancel, underflow and overflow."""
    x = np.tile(half_patterns()[np.arange(0, 65536, 257)], 256)
    y = np.repeat(half_patterns()[np.arange(5, 65536, 251)][:256], 256)
    for name in ("Add", "Mul", "Div"):
        case = Case(op=OP[name], count=4096)
        actual = case.launch("api_arithmetic:arithmetic_half", [x, y], np.zeros_like(x), blocks=16)
        assert_same(actual, result(name, x, y, 0, x), name)


@pytest.mark.parametrize("name", ["Axpy", "MulAddDst"])
def test_half_into_float(name: str) -> None:
    a, b = (RNG.standard_normal(512).astype(np.float16) for _ in range(2))
    dst = RNG.standard_normal(512).astype(np.float32)
    factor = np.float32(1.75) if name == "Axpy" else b.astype(np.float32)
    whole = a.astype(np.float32) * factor + dst
    case = Case(op=OP[name], count=509, scalar=1.75)
    expected = np.where(np.arange(512) < 509, whole, dst)
    assert_same(case.launch("api_arithmetic:arithmetic_mixed", [a, b], dst), expected)
    strides = (1, 1, 8, 4) if name == "Axpy" else (1, 1, 1, 8, 4, 4)
    case = Case(op=OP[name], form=PREFIX, mask=(60, 0), repeat=8, strides=strides, scalar=1.75)
    expected = np.where(np.arange(512) % 64 < 60, whole, dst)
    assert_same(case.launch("api_arithmetic:arithmetic_mixed", [a, b], dst), expected)


@pytest.mark.parametrize("type_name", ["int16", "uint16", "int32"])
@pytest.mark.parametrize("name", ["ShiftLeft", "ShiftRight"])
def test_shift(type_name: str, name: str) -> None:
    dtype = {"int16": np.int16, "uint16": np.uint16, "int32": np.int32}[type_name]
    bits = 8 * np.dtype(dtype).itemsize
    x = values(dtype, 1024)
    for distance in range(bits + 1):
        wide = x.astype(np.int64)
        for rounded in (False, True):
            case = Case(op=OP[name], form=PREFIX, mask=(2048 // bits, 0), repeat=4, scalar=distance, flag=int(rounded))
            count = 4 * 2048 // bits
            shifted = wide << distance if name == "ShiftLeft" else wide >> distance
            if rounded and name == "ShiftRight" and distance and type_name != "uint16":
                shifted = shifted + ((wide >> (distance - 1)) & 1)
            expected = np.where(np.arange(1024) < count, shifted.astype(dtype), x)
            assert_same(case.launch(f"api_arithmetic:arithmetic_{type_name}", [x], x), expected, (distance, rounded))
    with pytest.raises(cann_sim.KernelError, match="distance") as caught:
        Case(op=OP[name], count=16, scalar=bits + 1).launch(f"api_arithmetic:arithmetic_{type_name}", [x], x)
    assert caught.value.kind == "params"
