"""Errors of the loss and its gradient against float64, compared with PyTorch's errors on the same device.

Each row of the table is one kind of logits in one dtype. Both implementations and the float64 reference get the same
rounded logits, so input rounding does not count as an error. Prints a Markdown table; needs only torch.

    python benchmarks/accuracy.py [--device npu [--vendor]] [--rows N] [--classes C]
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import npu_xent

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Loss = Callable[..., Tensor]


def confident(x: Tensor, target: Tensor) -> Tensor:
    """The target is nearly certain: its probability differs from 1 by about 1e-5."""
    return x.scatter_add(1, target[:, None], torch.full_like(target[:, None], 22, dtype=x.dtype))


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda x, target: x,
    "normal x 10": lambda x, target: 10 * x,
    "normal + 1000": lambda x, target: x + 1000,
    "confident": confident,
}


def loss_and_gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and gradient of each row; an upstream gradient of 1 adds no rounding."""
    logits = logits.detach().clone().requires_grad_()
    out = loss(logits, target, reduction="none")
    out.backward(torch.ones_like(out))
    return out.detach().cpu().double(), logits.grad.cpu().double()


def errors(loss: Loss, logits: Tensor, target: Tensor) -> tuple[float, float, float]:
    """Largest errors: of the loss, absolute; of the gradient, relative to its row's largest entry; of the gradient at
    the target, relative to itself."""
    exact_loss, exact = loss_and_gradient(F.cross_entropy, logits.cpu().double(), target.cpu())
    got_loss, got = loss_and_gradient(loss, logits, target)
    off = (got - exact).abs()
    largest = exact.abs().amax(1, keepdim=True)
    at_target = target.cpu()[:, None]
    own = off.gather(1, at_target) / exact.gather(1, at_target).abs()
    return float((got_loss - exact_loss).abs().max()), float((off / largest).max()), float(own.max())


def vendors(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The loss by torch_npu's operator."""
    import torch_npu

    return torch_npu.npu_cross_entropy_loss(logits, target, reduction=reduction)[0]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, npu, ...")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--vendor", action="store_true", help="compare with torch_npu's operator, not F.cross_entropy")
    options = parser.parse_args()
    other, name = (vendors, "torch_npu's") if options.vendor else (F.cross_entropy, "F.cross_entropy")
    if options.device.startswith("npu"):
        import torch_npu  # noqa: F401 - registers the device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.rows, options.classes, generator=generator)
    target = torch.randint(options.classes, (options.rows,), generator=generator)
    print(f"{options.rows} x {options.classes} on {options.device} ({platform.machine()}), torch {torch.__version__},")
    print(f"npu_xent {npu_xent.__version__}. Largest errors of npu_xent / of {name}.\n")
    print("| logits | dtype | loss, absolute | gradient, of its row's largest | gradient at the target, of itself |")
    print("|---|---|---|---|---|")
    for kind, make in KINDS.items():
        for dtype in DTYPES:
            logits = make(x, target).to(dtype).to(options.device)
            both = [errors(loss, logits, target.to(options.device)) for loss in (npu_xent.cross_entropy, other)]
            cells = " | ".join(f"{ours:.1e} / {theirs:.1e}" for ours, theirs in zip(*both, strict=True))
            print(f"| {kind} | {str(dtype).removeprefix('torch.')} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
