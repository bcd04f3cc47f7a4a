"""The two examples of torch_npu.npu_cross_entropy_loss's page with npu_xent's function, and three calls that raise.

    python examples/npu_cross_entropy_loss.py                                   # on the CPU, in seconds
    python examples/npu_cross_entropy_loss.py --device npu                      # or npu:1
    python -m cann_sim examples/npu_cross_entropy_loss.py --device npu          # an NPU simulated on the host

Both examples have 4096 x 8080 logits and run forward and backward, one with reduction "mean", one with reduction "sum"
and ignore_index=100. "mean" with a gradient allows no ignore_index: that is the first call that raises.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable

# Only --device npu imports torch_npu: without CANN, autoloading it would break `import torch`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
from torch import Tensor

import npu_xent

ROWS, CLASSES = 4096, 8080


def gradient_error(logits: Tensor, target: Tensor, reduction: str, ignore_index: int) -> tuple[float, float]:
    """The largest error of logits.grad against (softmax - onehot) in float64, and the largest entry of the latter."""
    error = largest = 0.0
    kept = target != ignore_index
    divisor = int(kept.sum()) if reduction == "mean" else 1
    assert logits.grad is not None
    for row in range(0, len(target), 512):  # in blocks, since float64 takes twice the memory
        rows = slice(row, row + 512)
        truth = logits.detach()[rows].cpu().double().softmax(1)
        truth[range(len(truth)), target[rows].cpu()] -= 1
        truth *= kept[rows].cpu().unsqueeze(1) / divisor
        error = max(error, float((logits.grad[rows].cpu() - truth).abs().max()))
        largest = max(largest, float(truth.abs().max()))
    return error, largest


def example(title: str, device: str, reduction: str = "mean", ignore_index: int = -100) -> None:
    """Run forward and backward, and print the results."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES).to(device).requires_grad_()
    target = torch.arange(ROWS, device=device)
    loss, log_prob, zloss, lse_for_zloss = npu_xent.npu_cross_entropy_loss(
        logits, target, reduction=reduction, ignore_index=ignore_index
    )
    loss.backward()
    print(f"\n{title}: the loss is {loss.item():.4f}")
    outputs = {"loss": loss, "log_prob": log_prob, "zloss": zloss, "lse_for_zloss": lse_for_zloss}
    for name, output in (outputs | {"input.grad": logits.grad}).items():
        print(f"  {name:13} {list(output.shape)!s:12} {str(output.dtype).removeprefix('torch.')}")
    error, largest = gradient_error(logits, target, reduction, ignore_index)
    print(f"  input.grad is within {error:.1e} of float64's, whose largest entry is {largest:.1e}")


def refusals(device: str) -> None:
    """Calls that violate a documented constraint raise ConstraintError, a ValueError, before any work."""
    logits = torch.randn(4, 10, device=device, requires_grad=True)
    target = torch.arange(4, device=device)
    calls: dict[str, Callable[[], object]] = {
        "ignore_index with reduction 'mean' and a gradient": lambda: npu_xent.npu_cross_entropy_loss(
            logits, target, ignore_index=3
        ),
        "an int32 target": lambda: npu_xent.npu_cross_entropy_loss(logits, target.int()),
        "a z-loss": lambda: npu_xent.npu_cross_entropy_loss(logits, target, lse_square_scale_for_zloss=1e-4),
    }
    for number, (what, call) in enumerate(calls.items(), 1):
        try:
            call()
        except npu_xent.ConstraintError as error:
            print(f"\nRefused {number}: {what}\n  {error}")
        else:
            raise AssertionError(f"{what} was accepted")


def open_npu(device: str) -> str:
    """Make `device` the current device. Returns the reason if that fails, else ""."""
    try:
        import torch_npu

        count = torch_npu.npu.device_count()
    except Exception as error:  # without CANN torch_npu raises more than ImportError
        reason = (str(error).splitlines() or [""])[0]
        return f"torch_npu cannot be imported ({type(error).__name__}: {reason})"
    if int(device.partition(":")[2] or 0) >= count:
        return f"torch_npu sees {count or 'no'} NPU" + "s" * (count > 1)
    torch_npu.npu.set_device(device)
    return ""


def main() -> None:
    """Run both examples, then the calls that raise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, npu or npu:1; see above for a simulated one")
    device = parser.parse_args().device
    if not re.fullmatch(r"cpu|npu(:\d+)?", device):
        parser.error(f"argument --device: {device!r} is none of cpu, npu, npu:0, npu:1, ...")
    if device != "cpu" and (obstacle := open_npu(device)):
        parser.exit(
            2,
            f"{parser.prog}: --device {device}: {obstacle}; use --device cpu, or install torch_npu and CANN and source "
            f"its set_env.sh, or install cann_sim: python -m cann_sim {sys.argv[0]} --device npu simulates an NPU\n",
        )
    print(f"npu_xent.npu_cross_entropy_loss on {device}: logits [{ROWS}, {CLASSES}] in float32")
    example('Example 1, reduction "mean"', device)
    example('Example 2, reduction "sum" and ignore_index 100', device, "sum", 100)
    refusals(device)


if __name__ == "__main__":
    main()
