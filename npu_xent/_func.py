"""One gradient of torch.func (grad, vjp, grad_and_value) with the fused operators, whose C++ functions refuse it.

Inside other transforms the losses run by torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ._tensors import forward_mode


def one_gradient(*tensors: Tensor | None) -> bool:
    """Whether torch.func takes one gradient of these tensors, and nothing else can differentiate that."""
    if torch.compiler.is_dynamo_compiling() or forward_mode() or not (level := _one_level()):
        return False
    from torch._C._functorch import get_unwrapped, is_gradtrackingtensor

    given = [t for t in tensors if t is not None]
    below = [get_unwrapped(t) if is_gradtrackingtensor(t) else t for t in given]
    recorded = level.prev_grad_mode() and any(t.requires_grad for t in below)
    return any(map(is_gradtrackingtensor, given)) and not recorded


def _one_level() -> Any:
    """The transform's interpreter, if one transform is active and it takes a gradient."""
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    levels = retrieve_all_functorch_interpreters()
    return levels[0] if len(levels) == 1 and levels[0].key() == TransformType.Grad else None


def one_compiled_gradient() -> bool:
    """Whether Dynamo compiles one gradient: the loss is then a call of `whole`, since Dynamo cannot trace _Fused."""
    return torch.compiler.is_dynamo_compiling() and _leave_whole()


def _leave_whole() -> bool:
    if not _one_level():
        return False
    torch.compiler.allow_in_graph(whole)  # not at import, since it imports torch._dynamo
    return True


# A constant to Dynamo, which runs it while it compiles, with the transform active.
_leave_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]


def whole(function: str, *args: Any, **kwargs: Any) -> Any:
    """npu_xent.function(...), one node of Dynamo's graph. AOTAutograd runs it, on tensors wrapped as in eager code."""
    return getattr(import_module("npu_xent"), function)(*args, **kwargs)


def fused_gradient(
    loss: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...], class_dim: int
) -> tuple[Tensor, ...]:
    """loss(*tensors), of which the first output is differentiable in those tensors that torch.func tracks.

    A loss for each row is differentiable in logits, whose classes are dimension class_dim.
    """
    from torch._C._functorch import is_gradtrackingtensor

    wanted = tuple(t is not None and is_gradtrackingtensor(t) and t.is_floating_point() for t in tensors)
    outputs: tuple[Tensor, ...] = _Fused.apply(loss, wanted, class_dim, *tensors)  # type: ignore[no-untyped-call]
    return outputs[sum(wanted) :]


class _Fused(torch.autograd.Function):
    """The forward also computes the gradient, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        loss: Callable[..., tuple[Tensor, ...]], wanted: tuple[bool, ...], class_dim: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            given = [
                t.detach().requires_grad_() if t is not None and needed else t
                for t, needed in zip(tensors, wanted, strict=True)
            ]
            outputs = loss(*given)
            grads = torch.autograd.grad(
                outputs[0].sum(), [t for t, needed in zip(given, wanted, strict=True) if t is not None and needed]
            )
        return *grads, *(t.detach() for t in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.wanted, ctx.class_dim, *_ = inputs
        ctx.n_grads = sum(ctx.wanted)
        ctx.save_for_backward(*output[: ctx.n_grads])
        ctx.mark_non_differentiable(*output[: ctx.n_grads], *output[ctx.n_grads + 1 :])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream[ctx.n_grads]
        factor = factor.unsqueeze(ctx.class_dim) if factor.dim() else factor
        grads = ((grad * factor).to(grad.dtype) for grad in ctx.saved_tensors)
        return None, None, None, *(next(grads) if needed else None for needed in ctx.wanted)
