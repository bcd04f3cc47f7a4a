"""Short runs of the fuzzers, always of the same cases, and the inputs that once failed. `make fuzz` runs longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_calls
import fuzz_parsers
import pytest
import torch
from fuzz_functions import Call
from fuzz_inputs import Source
from torch.nn import functional as F

import npu_xent

pytestmark = pytest.mark.cpu
TESTS = Path(__file__).parent


def test_random_calls() -> None:
    """In a process of their own, which has a process group."""
    command = [sys.executable, str(TESTS / "fuzz_calls.py"), "--calls", "300", "--seed", "23"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "300 calls" in run.stdout


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_wrong_loss_is_found_where_torchs_overflows(factor: float) -> None:
    """With label smoothing torch sums float16 over the classes."""
    x = torch.full((1, 5000), -20.0, dtype=torch.float16)
    x[0, 0] = 20.0
    x.requires_grad_()
    arguments = {"input": x, "target": torch.tensor([0]), "label_smoothing": 0.5}
    assert F.cross_entropy(**arguments).isinf()
    case = fuzz_calls.Case.__new__(fuzz_calls.Case)
    case.source, case.mode, case.leaves = Source(1, 1, torch.device("cpu")), "grad", {"input": x}
    case.call = Call(
        "npu_xent.patch_torch",
        npu_xent.cross_entropy,
        arguments,
        ("input",),
        lambda rules: None,
        torchs=F.cross_entropy,
    )
    loss = npu_xent.cross_entropy(**arguments) * factor
    if factor == 1.0:
        assert case._same_as_torch(loss, None, []) == "right"
    else:
        with pytest.raises(fuzz_calls.Failure, match=r"^loss: \[\d+"):
            case._same_as_torch(loss, None, [])


@pytest.mark.parametrize("name", fuzz_parsers.parsers())
def test_random_bytes(name: str) -> None:
    _, data, why = fuzz_parsers.mutate(name, fuzz_parsers.parsers()[name], seed=1, seconds=60, most=40)
    assert data is None, f"{why}{data!r}"


FAILED: dict[str, tuple[bytes, ...]] = {
    "toolkit_version": (b"runtime\n" + b"\n" * 60_000, b"Version=8.0:\n", b"Version=::\n"),
    "npu_smi": (b" \n" * 30_000, b"\f" + b"\n" * 60_000),
    "driver": (b"\n" * 60_000, b"model\xcc\xe7 name: x\n", b"model name\n\n" * 5_000),
    "refusals": (
        b"k.cpp:1:2: error: cann_sim does not model " + b":" * 60_000 + b"x" + b">" * 60_000 + b"y\n",
        b" " * 60_000 + b"\n" + b"k.cpp:1: error: cann_sim does not model X\n",
    ),
    "metrics": (
        b"step,loss,tokens_per_s,peak_mb\n0,a,b,c\n",
        b"step\n\xac,1,2,3\n",
        b"step\n" + b"9" * 5000 + b",1,2,3\n",
    ),
}


@pytest.mark.parametrize("name, number", [(name, i) for name, all_of in FAILED.items() for i in range(len(all_of))])
def test_bytes_that_failed_once(name: str, number: int) -> None:
    with fuzz_parsers.time_limit():
        fuzz_parsers.parsers()[name].run(FAILED[name][number])
