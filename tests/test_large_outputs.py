"""Outputs of 32 MiB and more on the CPU: written past the caches, into memory that is used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from reference import assert_same_bits, consuming, loss_and_grad, make_logits, make_target

import npu_xent

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="is about the CPU's memory")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [4096, 8191, 33333])
def test_past_the_cache_and_over_the_logits_are_the_same_bits(dtype: torch.dtype, classes: int) -> None:
    """Odd numbers of classes begin their rows anywhere in a cache line."""
    rows = (33 << 20) // (classes * dtype.itemsize) + 1
    logits = make_logits(rows, classes, dtype, CPU)
    target = make_target(rows, classes, CPU, ignore_index=-100)
    logits[3, 5] = float("nan")
    target[3], target[4] = 1, -100
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, reduction="sum")
    over_loss, over_grad = loss_and_grad(consuming(npu_xent.cross_entropy), logits, target, reduction="sum")
    assert_same_bits(loss, over_loss)
    assert_same_bits(grad, over_grad)
    assert grad[3].isnan().all()
    assert not grad[4].any()
    parts = torch.cat(
        [
            loss_and_grad(npu_xent.cross_entropy, logits[n : n + 50], target[n : n + 50], reduction="sum")[1]
            for n in range(0, rows, 50)
        ]
    )
    assert_same_bits(grad, parts)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [8191, 5_000_001])
def test_log_prob_and_the_gradient_of_each_row_are_the_same_bits(dtype: torch.dtype, classes: int) -> None:
    """Few long rows are shared out in chunks; the last rows alone are no large output."""
    rows = (33 << 20) // (classes * dtype.itemsize) + 2
    logits = make_logits(rows, classes, dtype, CPU)
    target = make_target(rows, classes, CPU)
    part = slice(rows - 1, rows)
    log_prob = npu_xent.npu_cross_entropy_loss(logits, target)[1]
    assert_same_bits(log_prob[part], npu_xent.npu_cross_entropy_loss(logits[part], target[part])[1])
    grad = loss_and_grad(npu_xent.cross_entropy, logits, target, reduction="none")[1]
    assert_same_bits(grad[part], loss_and_grad(npu_xent.cross_entropy, logits[part], target[part], reduction="none")[1])


def test_memory_that_no_element_is_aligned_in() -> None:
    rows, classes = 2200, 4000
    buffer = bytearray(4 * rows * classes + 1)
    logits = torch.frombuffer(buffer, dtype=torch.float32, offset=1, count=rows * classes).view(rows, classes)
    target = torch.zeros(rows, dtype=torch.int64)
    target[1] = -100
    totals = torch.tensor([rows - 1.0, rows - 1.0, classes])
    aligned = logits.clone()
    for x in (logits, aligned):
        torch.ops.npu_xent.row_stats_grad_(x, target, None, totals, reduction="mean")
    assert_same_bits(logits.clone(), aligned)


def test_a_child_process_takes_and_gives_back_memory() -> None:
    kept = gradient()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP has no threads after fork
        os._exit(0 if torch.equal(gradient(), kept) else 1)
    assert os.waitpid(child, 0)[1] == 0


def gradient(rows: int = 9000) -> torch.Tensor:
    logits = torch.zeros(rows, 1000, requires_grad=True)
    npu_xent.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64)).backward()
    assert logits.grad is not None
    return logits.grad


def test_memory_is_used_again_once_nobody_has_it() -> None:
    others = gradient(20000), gradient(20000)
    del others  # now nothing else is kept, and these are too large for what follows
    first = gradient()
    second = gradient()
    address = first.data_ptr()
    assert second.data_ptr() != address
    view = first[1:]
    del first
    assert gradient().data_ptr() != address, "a view still has it"
    del view
    assert gradient().data_ptr() == address
    assert gradient(8800).data_ptr() == address, "for a batch that is a little smaller, too"
    torch.testing.assert_close(second, gradient())


def test_such_a_tensor_may_be_resized_shared_and_given_away() -> None:
    grad = gradient()
    expected = grad.clone()
    grad.resize_(10000, 1000)
    assert torch.equal(grad[:9000], expected)
    assert torch.equal(gradient().share_memory_(), expected)
    shrunk = gradient()
    shrunk.untyped_storage().resize_(0)
    assert shrunk.untyped_storage().nbytes() == 0


KEPT = """
import torch, npu_xent
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
logits = torch.zeros(20000, 1000, requires_grad=True)
target = torch.zeros(20000, dtype=torch.int64)
npu_xent.cross_entropy(logits, target).backward()
before = resident()
logits.grad = None
print(before - resident() > 70 << 20)
"""


def lets_go_of_memory(value: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("NPU_XENT_KEEP_MEMORY", value)
    return subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True).stdout == "True\n"


def test_keeping_memory_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lets_go_of_memory("0", monkeypatch)
    assert not lets_go_of_memory("1", monkeypatch)
