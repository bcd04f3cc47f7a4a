"""When the device has no memory left, or a launch fails: an exception, and everything is as usable as before."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import assert_same_bits, make_logits, make_target

import npu_xent

acl = pytest.importorskip("cann_sim.acl")

pytestmark = [pytest.mark.npu, pytest.mark.simulated]

N, C = 3000, 8000  # more than what torch_npu keeps in reserve


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_out_of_memory(dtype: torch.dtype, device: torch.device) -> None:
    """In the forward, or where the gradient is made in the backward. Nothing shows afterwards that there was a call."""
    gc.collect()
    torch.npu.empty_cache()  # or the gradient would find room beside the logits
    before = make_logits(N, C, dtype, torch.device("cpu"))
    x, y = before.to(device).requires_grad_(), make_target(N, C, device)

    def step() -> torch.Tensor:
        return torch.autograd.grad(npu_xent.cross_entropy(x, y), x)[0]

    expected = step().cpu()
    in_use = torch.npu.memory_allocated()
    torch.npu.empty_cache()
    with acl.fail("aclrtMallocAlign32", acl.OUT_OF_MEMORY, count=1000), pytest.raises(torch.OutOfMemoryError):
        step()
    assert torch.npu.memory_allocated() == in_use
    assert_same_bits(x.detach().cpu(), before)
    assert_same_bits(step().cpu(), expected)


FAILING_LAUNCH = """
import torch, npu_xent
from cann_sim import acl

x, y = torch.randn(64, 1000).npu().requires_grad_(), torch.randint(0, 1000, (64,)).npu()
expected = npu_xent.cross_entropy(x, y)
torch.npu.synchronize()
try:
    with acl.fail("launch:npu_xent_{kernel}", acl.KERNEL_ERROR):
        npu_xent.cross_entropy(x, y).backward()
        torch.npu.synchronize()
except RuntimeError as error:
    print("raised:", "npu_xent_{kernel}" in str(error))
else:
    print("nothing was raised")
if {again}:
    x.grad = None
    loss = npu_xent.cross_entropy(x, y)
    loss.backward()
    print("again:", torch.equal(loss, expected), bool(x.grad.isfinite().all()))
"""


def run(code: str, **environment: str) -> str:
    """What a program of its own prints on the simulated NPU: what happens to it must not happen to the other tests."""
    result = subprocess.run(
        [sys.executable, "-m", "cann_sim", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    return result.stdout + result.stderr[-2000:] * (not result.stdout)


@pytest.mark.parametrize("kernel", ["reduce_rows", "row_stats_grad", "scale"])
def test_a_launch_that_fails_raises_and_is_over(kernel: str) -> None:
    """Without a queue the call itself raises, and the next one works."""
    out = run(FAILING_LAUNCH.format(kernel=kernel, again=True), TASK_QUEUE_ENABLE="0")
    assert out.splitlines() == ["raised: True", "again: True True"]


@pytest.mark.parametrize("queue", ["1", "2"])
def test_a_launch_that_fails_in_the_queue_raises(queue: str) -> None:
    """torch_npu says it at a later call, at the latest when something waits, and wants a new process then."""
    out = run(FAILING_LAUNCH.format(kernel="row_stats_grad", again=False), TASK_QUEUE_ENABLE=queue)
    assert out.splitlines() == ["raised: True"]


IDLE_KERNELS = """
#include <cstdint>
extern "C" uint32_t aclrtlaunch_npu_xent_scale(uint32_t, void*, void*, void*, void*) { return 0; }
"""


def test_kernels_that_do_not_run_are_not_taken_into_use(tmp_path: Path) -> None:
    """A launcher says 0, no error, also when its binary was refused: what it should have done tells."""
    source, folder = tmp_path / "idle.cpp", tmp_path / "kernels" / "Ascend910B3"
    source.write_text(IDLE_KERNELS)
    folder.mkdir(parents=True)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(folder / "libnpu_xent_kernels.so"), str(source)], check=True)
    out = run(f"""
import pathlib, warnings
import torch, npu_xent, npu_xent._loading

npu_xent._loading._FOLDER = pathlib.Path({str(tmp_path)!r})
x, y = torch.zeros(2, 4).npu(), torch.ones(2).long().npu()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(f"{{npu_xent.cross_entropy(x, y).item():.4f}}")
said = [str(w.message) for w in caught if "npu_xent" in str(w.message)]
print(["a test launch of a kernel did not run" in text for text in said])
""")
    assert out.splitlines() == ["1.3863", "[True]"]


SAME_EVERYWHERE = """
import torch, npu_xent

generator = torch.Generator().manual_seed(0)
for n, c in ((5, 9000), (300, 100), (50, 5000)):
    x = torch.randn(n, c, generator=generator).bfloat16().npu().requires_grad_()
    y = torch.randint(0, c, (n,), generator=generator).npu()
    loss = npu_xent.cross_entropy(x, y, label_smoothing=0.1)
    (loss * 3).backward()
    print(loss.item().hex(), x.grad.double().sum().item().hex(), x.grad.double().abs().sum().item().hex())
"""


def test_the_same_bits_on_every_chip_and_with_every_queue_and_schedule() -> None:
    """20 to 48 cores (Atlas A2 and A3), operators submitted at once or by one or two threads, cores in any order."""
    settings = (
        {"TASK_QUEUE_ENABLE": "0", "CANN_SIM_SOC": "Ascend910B1"},
        {"TASK_QUEUE_ENABLE": "1", "CANN_SIM_SOC": "Ascend910B4", "CANN_SIM_SEED": "1"},
        {"TASK_QUEUE_ENABLE": "2", "CANN_SIM_SOC": "Ascend910_9391", "CANN_SIM_SEED": "2"},
    )
    first, *others = (run(SAME_EVERYWHERE, **setting) for setting in settings)
    assert len(first.splitlines()) == 3
    for other in others:
        assert other == first


def test_without_kernels_torch_operations_serve() -> None:
    """As from an installation that was built without them: said once, and the results are the same."""
    out = run("""
import warnings
import torch, npu_xent, npu_xent._build

npu_xent._build.TORCH_NPU_VERSION = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        x = torch.zeros(2, 4).npu().requires_grad_()
        loss = npu_xent.cross_entropy(x, torch.ones(2).long().npu())
        loss.backward()
print([str(w.message).partition(". ")[0] for w in caught if "npu_xent" in str(w.message)])
print(f"{loss.item():.4f}", x.grad.tolist())
""")
    assert out.splitlines() == [
        '["npu_xent\'s NPU kernels are not in use: it was built without its NPU part"]',
        "1.3863 [[0.125, -0.375, 0.125, 0.125], [0.125, -0.375, 0.125, 0.125]]",
    ]
