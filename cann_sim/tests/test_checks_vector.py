"""Masks, repeats, strides, alignment and rounding modes that a vector instruction does not take."""

from __future__ import annotations

import pytest
from kernel_file import Broken, check_complete, check_passes, check_refused, kernel_file

FILE = kernel_file("vector")

CASES = [
    Broken("mask_of_float", "mask", "Adds 65 64", bad=65, good=64),
    Broken("mask_of_float", "mask", "Adds 0", bad=0, good=1),
    Broken("mask_of_half", "mask", "Duplicate 129 128", bad=129, good=128),
    Broken("mask_bits_of_float", "mask", "Adds", bad=1, good=0),
    Broken("mask_bits_empty", "mask", "Adds", bad=0, good=1),
    Broken("mask_of_binary", "mask", "Add 65 64", bad=65, good=64),
    Broken("mask_of_reduction", "mask", "WholeReduceSum 65 64", bad=65, good=64),
    Broken("repeats_of_reduction", "repeat", "WholeReduceMax 256 255", bad=256, good=128),
    Broken("repeat_range", "bounds", "Adds", bad=17, good=16),
    Broken("stride_range", "bounds", "Adds", bad=255, good=16),
    Broken("repeat_alignment", "alignment", "Add 32", bad=4, good=8),
    Broken("reduction_alignment", "alignment", "WholeReduceMax", bad=1, good=2),
    Broken("compare_count", "params", "CompareScalar 256", bad=96, good=128),
    Broken("compare_of_int32", "params", "Compare EQ"),
    Broken("count_below_zero", "params", "Abs -1", bad=-1, good=0),
    Broken("shift_distance", "params", "ShiftLeft 33 32", bad=33, good=32),
    Broken("block_stride_of_destination", "params", "Adds stride dst", bad=0, good=1),
    Broken("stride_of_reduction", "params", "WholeReduceSum -1", bad=-1, good=1),
    Broken("reduction_overlap", "overlap", "WholeReduceSum", bad=64, good=0),
    Broken("mask_length", "mask", "SetVectorMask -1", bad=-1, good=64),
    Broken("mask_length", "mask", "SetVectorMask 65", bad=65, good=1),
    Broken("counted_elements", "mask", "Adds counter", bad=1 << 20, good=1000),
    Broken("counted_elements", "bounds", "Adds", bad=1025, good=1024),
    Broken("compare_overlap", "overlap", "Compare dst"),
    Broken("select_overlap", "overlap", "Select selMask"),
    Broken("select_mode_of_scalar", "params", "Select VSEL_TENSOR_SCALAR_MODE"),
    Broken("select_mode_of_tensors", "params", "Select VSEL_TENSOR_TENSOR_MODE"),
    Broken("broadcast_overlap", "overlap", "Brcb", bad=0, good=8),
    Broken("cast_half_to_float", "rounding", "Cast CAST_RINT half float"),
    Broken("cast_float_to_bfloat16", "rounding", "Cast CAST_NONE float bfloat16"),
    Broken("cast_bfloat16_to_float", "rounding", "Cast CAST_FLOOR bfloat16 float"),
    Broken("cast_float_to_bfloat16_odd", "rounding", "Cast CAST_ODD float bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.bad}")
def test_against_the_rules(case: Broken) -> None:
    check_refused(FILE, case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.good}")
def test_within_the_rules(case: Broken) -> None:
    check_passes(FILE, case)


def test_every_kernel_has_a_case() -> None:
    check_complete(FILE, CASES)
