"""The same bits in every run, as docs/numerics.md has it: of every public function.

Other files have the rest of that page: test_isa_and_threads.py numbers of threads with every option, on each
instruction set, and parts of a batch; device/test_kernels.py and npu/test_failures.py numbers of cores, chips, queues
and schedules; test_distributed.py ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from calls import Call, bits, new_calls, same_bits

PRODUCTS = "linear"  # of torch, which promises the same bits only for the same number of threads


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch.use_deterministic_algorithms; torch.empty then is NaN, so that nothing unwritten can be a result."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def calls(device: torch.device) -> dict[str, Call]:
    return new_calls(str(device), large=False)


def test_a_second_call(calls: dict[str, Call]) -> None:
    for name, call in calls.items():
        expected = call()
        assert same_bits(call(), expected), name


def test_deterministic_algorithms(calls: dict[str, Call], request: pytest.FixtureRequest) -> None:
    """They are accepted, and change no bit."""
    expected = {name: call() for name, call in calls.items()}
    request.getfixturevalue("deterministic")
    for name, call in calls.items():
        assert same_bits(call(), expected[name]), name


@pytest.mark.cpu
@pytest.mark.isa
def test_numbers_of_threads(calls: dict[str, Call], threads: object) -> None:
    torch.set_num_threads(1)
    for name, call in calls.items():
        if not name.startswith(PRODUCTS):
            torch.set_num_threads(1)
            expected = call()
            for count in (2, 3):
                torch.set_num_threads(count)
                assert same_bits(call(), expected), f"{name} with {count} threads"


@pytest.mark.cpu
@pytest.mark.parametrize("count", [1, 3])
def test_another_process(count: int, calls: dict[str, Call]) -> None:
    """With that number of threads from its environment, and other bytes in fresh memory than this one has."""
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(count), "MALLOC_PERTURB_": "165"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    found, expected = json.loads(run.stdout), digests(calls)
    assert found.keys() == expected.keys()
    assert {
        name for name in expected if found[name] != expected[name] and (count == 1 or not name.startswith(PRODUCTS))
    } == set()


def digests(calls: dict[str, Call]) -> dict[str, str]:
    """Of the results of each call."""
    found = {}
    for name, call in calls.items():
        digest = hashlib.sha256()
        for result in bits(call()):
            digest.update(result.numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(digests(new_calls(large=False))))
