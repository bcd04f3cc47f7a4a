"""What operands of one instruction may share, what the mask register holds, and types that are refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from api_case import Case

import cann_sim


def tensor() -> np.ndarray:
    return np.arange(1024, dtype=np.float32)


# Kernel, case, and whether it is refused; `flag` is how many elements after dst the source starts.
OVERLAPS = [
    ("overlap_count", Case(count=200, flag=0), False),
    ("overlap_count", Case(count=200, flag=200), False),
    ("overlap_count", Case(count=200, flag=192), True),
    ("overlap_count", Case(count=200, flag=8), True),
    ("overlap_repeat", Case(mask=(64, 0), repeat=4, strides=(1, 1, 1, 8, 8, 8)), False),
    ("overlap_repeat", Case(mask=(64, 0), repeat=4, strides=(1, 1, 1, 16, 16, 16)), False),
    ("overlap_repeat", Case(mask=(64, 0), repeat=4, strides=(1, 1, 1, 16, 16, 16), flag=64), False),
    ("overlap_repeat", Case(mask=(64, 0), repeat=2, strides=(1, 1, 1, 8, 9, 9)), True),
    ("overlap_repeat", Case(mask=(8, 0), repeat=2, strides=(1, 1, 1, 8, 9, 9)), False),
    ("overlap_repeat", Case(mask=(64, 0), repeat=4, strides=(1, 1, 1, 4, 4, 4)), True),
    ("overlap_repeat", Case(mask=(32, 0), repeat=4, strides=(1, 1, 1, 4, 4, 4)), False),
    ("overlap_repeat", Case(mask=(64, 0), repeat=1, strides=(1, 1, 1, 8, 8, 8), flag=8), True),
    ("overlap_repeat", Case(mask=(64, 0), repeat=2, strides=(2, 1, 1, 16, 8, 8)), True),
    # dst is what a later repeat reads: only a sum that stays in place may
    ("accumulate_add", Case(mask=(64, 0), repeat=4, strides=(1, 1, 1, 0, 8, 0), flag=64), False),
    ("accumulate_div", Case(mask=(64, 0), repeat=4, strides=(1, 1, 1, 0, 8, 0), flag=64), True),
    ("overlap_cast", Case(count=200, flag=0), True),
    ("overlap_cast", Case(count=200, flag=104), False),
    ("reduce_in_place", Case(mask=(64, 0), repeat=8, strides=(1,)), False),
    ("reduce_in_place", Case(mask=(64, 0), repeat=4, strides=(200,)), True),
]


@pytest.mark.parametrize("kernel, case, refused", OVERLAPS)
def test_overlap(kernel: str, case: Case, refused: bool) -> None:
    if not refused:
        case.launch(f"api_rules:{kernel}", [], tensor())
        return
    with pytest.raises(cann_sim.KernelError) as caught:
        case.launch(f"api_rules:{kernel}", [], tensor())
    assert caught.value.kind == "overlap"


def test_repeats_accumulate_in_order() -> None:
    case = Case(mask=(64, 0), repeat=4, strides=(1, 1, 1, 0, 8, 0), flag=64)
    x = tensor()
    result = case.launch("api_rules:accumulate_add", [], x)
    np.testing.assert_array_equal(result[:64], x[:64] + x[64:320].reshape(4, 64).sum(0))
    np.testing.assert_array_equal(result[64:], x[64:])


@pytest.mark.parametrize("mode, lanes", [(0, 5), (1, 64), (2, 64)])
def test_mask_register(mode: int, lanes: int) -> None:
    x = tensor()
    result = Case(mask=(5, 0), mode=mode).launch("api_rules:mask_register", [], x)
    expected = x.copy()
    expected[:5] += 1
    expected[:lanes] += 1
    expected[64:72] += mode == 1
    np.testing.assert_array_equal(result, expected)


# A statement, and what its message has to say.
REFUSED = {
    "LocalTensor<bfloat16_t> t; Add(t, t, t, 64)": "Add supports these element types on Atlas A2",
    "LocalTensor<int32_t> t; Exp(t, t, 64)": "Exp supports these element types on Atlas A2: half, float",
    "LocalTensor<bfloat16_t> t; Muls(t, t, bfloat16_t(1), 64)": "Muls supports these element types",
    "LocalTensor<bfloat16_t> t; LocalTensor<half> u; Cast(u, t, RoundMode::CAST_RINT, 64)": "Cast does not convert",
    "LocalTensor<int32_t> t; LocalTensor<half> u; Cast(u, t, RoundMode::CAST_NONE, 64)": "SetDeqScale",
    "LocalTensor<int32_t> t; WholeReduceMax(t, t, 64, 1, 1, 1, 8)": "WholeReduceMax supports these element types",
    "LocalTensor<float> t; And(t, t, t, 64)": "And supports these element types on Atlas A2: int16_t, uint16_t",
    "LocalTensor<int64_t> t; Duplicate(t, int64_t(1), 64)": "Duplicate supports these element types",
    "LocalTensor<float> t; Adds(t, t, 1.0, 64)": "no matching function for call to",
}


def test_types_are_refused_by_name() -> None:
    lines = "".join(f"inline void refused{i}() {{ {statement}; }}\n" for i, statement in enumerate(REFUSED))
    calls = "".join(f"refused{i}();" for i in range(len(REFUSED)))
    source = f'#include "kernel_operator.h"\nusing namespace AscendC;\n{lines}' + (
        f'extern "C" __global__ __aicore__ void k(GM_ADDR) {{\n{calls}}}\n'
    )
    with pytest.raises(cann_sim.CompileError) as caught:
        cann_sim.compile(source, name="refused_types")
    message = re.sub(r"\s+", " ", str(caught.value))
    for statement, words in REFUSED.items():
        assert words in message, statement
