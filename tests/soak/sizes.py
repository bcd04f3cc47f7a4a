"""Tensors of more than 2^31 elements, and strides above 2^31, on the CPU. `python sizes.py PART SECONDS`

Memory that is only read, or read in few places, is an anonymous mapping that takes almost no memory. The largest part
takes 9 GiB.
"""

from __future__ import annotations

import math
import mmap

import torch
from calls import same_bits
from torch import Tensor
from tried import Tried, main

import npu_xent

FAR = (1 << 31) + 5  # elements
MAP_NORESERVE = 0x4000  # on Linux; Python's mmap has no name for it before 3.13


def mapped(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags), dtype=dtype)


def loss_and_grad(x: Tensor, y: Tensor, **options: object) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    loss = npu_xent.cross_entropy(leaf, y, **options)  # type: ignore[call-overload]
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return [loss.detach(), grad]


def elements(tried: Tried, seconds: float) -> None:
    """More than 2^31 logits: many rows, few long rows, one row; also from `npu_cross_entropy_loss`."""
    generator = torch.Generator().manual_seed(0)
    for rows, classes in ((FAR // 1000 + 1, 1000), (FAR // 100 + 1, 100), (5, FAR // 4), (1, FAR)):
        row = torch.randn(classes, generator=generator).bfloat16() if classes < FAR else mapped(classes, torch.bfloat16)
        row[-1] = 7.0
        x = row.expand(rows, classes)
        y = torch.full((rows,), classes - 1)
        y[: rows // 2] = 1
        for reduction in ("sum", "none"):
            loss, grad = loss_and_grad(x, y, reduction=reduction)
            if rows == 1:  # all logits are 0 but the last, which is 7 and the target's
                p = 1 / (classes - 1 + math.exp(7))
                true = torch.tensor([-math.log(p) - 7, p, p, p, p * math.exp(7) - 1])
                found = torch.cat([loss.view(1), grad[0, [0, FAR // 2, FAR - 2, -1]]]).float()
                right = torch.allclose(found, true, rtol=2**-8, atol=0)
                tried("rows of more than 2^31 elements", right, f"{found} {true}")
                continue
            few = [0, rows - 1]
            expected = loss_and_grad(x[few], y[few], reduction="none")
            name = f"{rows} x {classes}, {reduction}"
            tried("rows of more than 2^31 elements", same_bits([grad[few]], expected[1:]), name)
            if reduction == "none":
                tried("rows of more than 2^31 elements", same_bits([loss[few]], expected[:1]), name)
            firsts, lasts = rows // 2, rows - rows // 2
            for part, value in ((grad[:firsts], expected[1][:1]), (grad[-lasts:], expected[1][-1:])):
                for begin in range(0, len(part), max(1, (1 << 26) // classes)):
                    block = part[begin : begin + max(1, (1 << 26) // classes)]
                    equal = bool((block.view(torch.int16) == value.view(torch.int16)).all())
                    tried("blocks of such gradients", equal, f"{name}, rows from {begin}")
            del loss, grad


def strides(tried: Tried, seconds: float) -> None:
    """Strides above 2^31 and 2^32 elements: of rows, of classes, of images."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for stride in (FAR, 2 * FAR):
            memory = mapped(3 * stride, dtype)
            for n, classes in ((3, 70), (3, 5000), (2, 70000)):
                x = memory.as_strided((n, classes), (stride, 1))
                x.copy_(torch.randn(n, classes, generator=generator))
                compare(tried, f"rows {stride} apart, {classes} classes, {dtype}", x, torch.arange(n))
            classes_apart = memory.as_strided((40, 3), (1, stride))
            classes_apart.copy_(torch.randn(40, 3, generator=generator))
            compare(tried, f"classes {stride} apart, {dtype}", classes_apart, torch.arange(40) % 3)
            images = memory.as_strided((3, 5, 40), (stride, 40, 1))
            images.copy_(torch.randn(3, 5, 40, generator=generator))
            compare(tried, f"images {stride} apart, {dtype}", images, torch.arange(120).view(3, 40) % 5)


def compare(tried: Tried, name: str, x: Tensor, y: Tensor) -> None:
    """Every function has the bits of a dense copy."""
    dense = x.contiguous()
    for reduction in ("mean", "none"):
        found, expected = (loss_and_grad(z, y, reduction=reduction) for z in (x, dense))
        tried("calls with strides above 2^31", same_bits(found, expected), f"{name}, {reduction}")
    if x.dim() == 2:
        found, expected = ([npu_xent.token_log_probs(z, y)] for z in (x, dense))
        tried("calls with strides above 2^31", same_bits(found, expected), f"{name}, token_log_probs")


if __name__ == "__main__":
    main({part.__name__: part for part in (elements, strides)})
