"""Calls of every public function on small and large inputs, for tests of what must hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from heads import make_head
from reference import make_logits, make_target, make_weight
from torch import Tensor

import npu_xent

Call = Callable[[], list[Tensor]]


def call(function: Callable[..., Any], leaves: list[Tensor], *others: Any, **options: Any) -> Call:
    """A call with a backward, unless gradients are off: its outputs and the gradients of the leaves.

    Calls may run at once: they share inputs.
    """

    def run() -> list[Tensor]:
        inputs = [leaf.detach().requires_grad_(torch.is_grad_enabled()) for leaf in leaves]
        result = function(*inputs, *others, **options)
        outputs = [output for output in ([result] if isinstance(result, Tensor) else result) if output is not None]
        if not torch.is_grad_enabled():
            return outputs
        ends = [output for output in outputs if output.requires_grad]
        grads = torch.autograd.grad(ends, inputs, [torch.full_like(end, 0.5) for end in ends])
        return [output.detach() for output in outputs] + list(grads)

    return run


def consumed(logits: Tensor, target: Tensor) -> Tensor:
    return npu_xent.cross_entropy(logits * 1, target, consume_logits=logits.requires_grad)


def mindformers(logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    mask = torch.ones(target.shape, device=target.device)
    return npu_xent.compat.mindformers.CrossEntropyLoss()(logits, target, mask)


def new_calls(device: str = "cpu", *, large: bool = True) -> dict[str, Call]:
    """By name. `large`: also gradients of 32 MiB and more, which use the pool of large outputs."""
    at = torch.device(device)

    def rows(n: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
        return [make_logits(n, classes, dtype, at)], make_target(n, classes, at, ignore_index=-100)

    few, wide, long = rows(37, 101), rows(24, 5000), rows(3, 70000)
    half, bfloat = rows(24, 5000, torch.float16), rows(24, 5000, torch.bfloat16)
    head = make_head(48, 32, 1000, torch.float32, at)
    of_head = make_target(48, 1000, at, ignore_index=-100)
    images = [make_logits(4 * 50, 21, torch.float32, at).view(4, 50, 21).transpose(1, 2)]
    probabilities = make_logits(24, 5000, torch.float32, at).softmax(1)
    index = torch.arange(24 * 7, device=at).view(24, 7)
    linear = [head.input, head.linear_weight]
    kept = (bfloat[0], make_target(24, 5000, at))
    calls = {
        "cross_entropy, few classes": call(npu_xent.cross_entropy, *few, label_smoothing=0.1),
        "cross_entropy": call(npu_xent.cross_entropy, *wide, make_weight(5000, torch.float32, at), softcap=20.0),
        "cross_entropy, long rows": call(npu_xent.cross_entropy, *long, lse_square_scale=1e-4, return_lse=True),
        "cross_entropy, none": call(npu_xent.cross_entropy, *bfloat, reduction="none"),
        "cross_entropy, float16": call(npu_xent.cross_entropy, *half, reduction="sum"),
        "cross_entropy, consumed": call(consumed, *bfloat),
        "cross_entropy, images": call(
            npu_xent.cross_entropy, images, make_target(200, 21, at, ignore_index=-100).view(4, 50)
        ),
        "cross_entropy, probabilities": call(npu_xent.cross_entropy, [*wide[0], probabilities]),
        "CrossEntropyLoss": call(npu_xent.CrossEntropyLoss(label_smoothing=0.2), *wide),
        "npu_cross_entropy_loss": call(npu_xent.npu_cross_entropy_loss, *kept),
        "linear_cross_entropy": call(npu_xent.linear_cross_entropy, linear, of_head, linear_bias=head.linear_bias),
        "linear_cross_entropy, chunks": call(npu_xent.linear_cross_entropy, linear, of_head, chunk_rows=11),
        "token_log_probs": call(
            npu_xent.token_log_probs, *wide, temperature=0.7, return_entropy=True, return_top1=True
        ),
        "linear_token_log_probs": call(
            npu_xent.linear_token_log_probs, linear, of_head, chunk_rows=16, return_entropy=True
        ),
        "selected_log_probs": call(npu_xent.selected_log_probs, wide[0], index),
        "compat.nnsight": call(
            npu_xent.compat.nnsight.cross_entropy_loss, [few[0][0].view(1, 37, 101)], few[1].view(1, 37)
        ),
        "compat.mindformers": call(mindformers, [few[0][0]], make_target(37, 101, at)),
    }
    if device == "cpu":  # where no rounding to float32 hides the order of additions
        calls["cross_entropy, float64"] = call(npu_xent.cross_entropy, *rows(3, 70000, torch.float64))
    if large:
        calls["cross_entropy, large output"] = call(npu_xent.cross_entropy, *rows(8400, 1000))
        calls["npu_cross_entropy_loss, large output"] = call(
            npu_xent.npu_cross_entropy_loss, [rows(8500, 2000, torch.bfloat16)[0][0]], make_target(8500, 2000, at)
        )
    return calls


def bits(results: list[Tensor]) -> list[Tensor]:
    """The bytes of results, on the CPU, so that NaN equals NaN and -0 is not 0."""
    return [result.cpu().contiguous().view(-1).view(torch.uint8) for result in results]


def same_bits(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, bits(actual), bits(expected)))
