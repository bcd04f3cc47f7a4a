"""The calls that are compared, each as a step without arguments that can be run repeatedly.

A step's key is its method and its figure: ("eager", "training step"). A training step is forward and backward with a
newly allocated gradient of the logits, as if they were the output of a linear layer.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import npu_xent

from . import plain

OURS, EAGER, COMPILE, COPY = "npu_xent", "F.cross_entropy", "torch.compile", "copy_"
# Run in a process with THP_MEM_ALLOC_ENABLE=1: torch then requests huge pages for all large tensors.
EAGER_THP, COPY_THP = "F.cross_entropy, huge pages", "copy_, huge pages"
# The same process has NPU_XENT_KEEP_MEMORY=0: every gradient is allocated in fresh pages.
OURS_FRESH = "npu_xent, fresh pages"
# Run under jemalloc, which keeps freed memory, in huge pages: the best configuration of PyTorch that we know.
EAGER_JEMALLOC, COPY_JEMALLOC = "F.cross_entropy, jemalloc", "copy_, jemalloc"
OURS_JEMALLOC, STREAM, PLAIN_C = "npu_xent, jemalloc", "streaming copy", "C and OpenMP"
JAX, COPY_JAX = "JAX", "copy_, beside JAX"
# The copy_ that was timed in the same process.
COPY_BESIDE = {
    EAGER_THP: COPY_THP,
    OURS_FRESH: COPY_THP,
    **dict.fromkeys((EAGER_JEMALLOC, OURS_JEMALLOC, STREAM, PLAIN_C), COPY_JEMALLOC),
    JAX: COPY_JAX,
}
LINEAR, LINEAR_COMPILE = "F.linear + F.cross_entropy", "torch.compile of both"
TORCH_LINEAR, TORCH_CHUNKED = "F.linear_cross_entropy", "F.linear_cross_entropy, chunked"
CUT, PRODUCTS = "cut-cross-entropy", "the three products"

FORWARD, TRAINING, CONSUME = "forward", "training step", "consume_logits"
NONE, LOG_PROB, HALF, COPIED = "reduction none", "log_prob", "half ignored", "copy"

Step = Callable[[], Any]
Steps = dict[tuple[str, str], Step]


class NotAvailable(Exception):
    """A method is not installed; the message says what is missing."""


class OutputOf(torch.autograd.Function):
    """Makes a buffer the output of an operation, as consume_logits requires, without a copy."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor) -> Tensor:
        """Returns the buffer, which consume_logits overwrites."""
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Discards the gradient."""
        return torch.zeros(()), None


def make_logits(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Standard normal logits, and targets."""
    generator = torch.Generator().manual_seed(0)
    # Row by row: a float32 tensor of random numbers would need twice the memory of 16-bit logits.
    logits = torch.empty(rows, classes, dtype=dtype)
    for row in logits:
        row.copy_(torch.randn(classes, generator=generator))
    return logits, torch.randint(classes, (rows,), generator=generator)


def training(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Step:
    """Forward and backward of a reduced loss."""
    return lambda: torch.autograd.grad(loss(logits, target), logits)


def training_of_each_row(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> Step:
    """The same for reduction "none", with a gradient for each row."""
    upstream = torch.full(target.shape, 1 / len(target), dtype=logits.dtype)
    return lambda: torch.autograd.grad(loss(logits, target, reduction="none"), logits, upstream)


def gradients(outputs: tuple[Tensor, ...], inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of the sum of the outputs' means."""
    return torch.autograd.grad(outputs, inputs, [torch.full_like(out, 1 / out.numel()) for out in outputs])


def consumed_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The mean loss with consume_logits."""
    return (npu_xent.cross_entropy(logits, target, consume_logits=True),)


def consuming(
    logits: Tensor, target: Tensor, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = consumed_loss
) -> Step:
    """Each run overwrites the logits with gradients; the next run reads these, which takes as long."""
    anchor, buffer = torch.zeros((), requires_grad=True), logits.detach().clone()
    return lambda: gradients(function(OutputOf.apply(anchor, buffer), target), anchor)


def with_log_prob(logits: Tensor, target: Tensor) -> Step:
    """The loss with the vendor's signature, which also returns log_prob."""

    def step() -> Any:
        loss, log_prob, _, _ = npu_xent.npu_cross_entropy_loss(logits, target)
        return torch.autograd.grad(loss, logits), log_prob

    return step


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled again for the static shape of each case, which gives the fastest code."""
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = 1  # no worker processes during the measurement
    return torch.compile(function, dynamic=False)


def copying(logits: Tensor) -> Step:
    """The unit of time: `out.copy_(logits)` into a preallocated buffer."""
    out = torch.empty_like(logits, requires_grad=False).fill_(0)
    return lambda: out.copy_(logits.detach())


def cross_entropy_steps(
    rows: int, classes: int, dtype: torch.dtype, compile_training: bool, compile_forward: bool
) -> Steps:
    """All methods that take logits."""
    values, target = make_logits(rows, classes, dtype)
    logits, half = values.clone().requires_grad_(), target.clone()
    half[::2] = -100
    steps: Steps = {
        (COPY, COPIED): copying(logits),
        (OURS, FORWARD): lambda: npu_xent.cross_entropy(values, target),
        (OURS, TRAINING): training(npu_xent.cross_entropy, logits, target),
        (OURS, CONSUME): consuming(values, target),
        (OURS, NONE): training_of_each_row(npu_xent.cross_entropy, logits, target),
        (OURS, LOG_PROB): with_log_prob(logits, target),
        (OURS, HALF): training(npu_xent.cross_entropy, logits, half),
        **eager_steps(EAGER, logits, target),
    }
    if compile_training:
        loss = compiled(F.cross_entropy)
        steps[COMPILE, TRAINING] = training(loss, logits, target)
        if compile_forward:
            steps[COMPILE, FORWARD] = lambda: loss(values, target)
    return steps


def eager_steps(name: str, logits: Tensor, target: Tensor) -> Steps:
    """PyTorch's methods."""
    values = logits.detach()
    return {
        (name, FORWARD): lambda: F.cross_entropy(values, target),
        (name, TRAINING): training(F.cross_entropy, logits, target),
        (name, NONE): training_of_each_row(F.cross_entropy, logits, target),
    }


def huge_page_steps(rows: int, classes: int, dtype: torch.dtype) -> Steps:
    """Steps for a process with THP_MEM_ALLOC_ENABLE=1 and NPU_XENT_KEEP_MEMORY=0, which are read once."""
    logits, target = make_logits(rows, classes, dtype)
    return {
        (COPY_THP, COPIED): copying(logits),
        **eager_steps(EAGER_THP, logits.requires_grad_(), target),
        (OURS_FRESH, TRAINING): training(npu_xent.cross_entropy, logits, target),
        (OURS_FRESH, LOG_PROB): with_log_prob(logits, target),
    }


def jemalloc_steps(rows: int, classes: int, dtype: torch.dtype) -> Steps:
    """Steps for a process with jemalloc, and C for comparison."""
    try:
        plain.library()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotAvailable(f"gcc cannot compile {plain.SOURCE.name}: {error}") from error
    values, target = make_logits(rows, classes, dtype)
    logits = values.clone().requires_grad_()
    grad, losses = torch.zeros_like(values), torch.zeros(rows)
    steps: Steps = {
        (COPY_JEMALLOC, COPIED): copying(logits),
        (STREAM, COPIED): lambda: plain.stream_copy(grad, values),
        **eager_steps(EAGER_JEMALLOC, logits, target),
        (OURS_JEMALLOC, TRAINING): training(npu_xent.cross_entropy, logits, target),
        (OURS_JEMALLOC, CONSUME): consuming(values, target),
    }
    if dtype == torch.float32:
        steps[PLAIN_C, TRAINING] = lambda: plain.fused_classifier(grad, losses, values, target)
    return steps


def jax_steps(rows: int, classes: int, dtype: torch.dtype) -> Steps:
    """optax's loss and its gradient, compiled by XLA."""
    try:
        import jax
        import optax
    except ImportError as error:
        raise NotAvailable(f"{error}; pip install optax") from error
    logits, target = make_logits(rows, classes, dtype)

    def loss(x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    step = jax.jit(jax.value_and_grad(loss))
    x, y = jax.numpy.from_dlpack(logits), jax.numpy.from_dlpack(target.int())
    return {(COPY_JAX, COPIED): copying(logits), (JAX, TRAINING): lambda: jax.block_until_ready(step(x, y))}


def grid_steps(shape: tuple[int, ...], dtype: torch.dtype) -> Steps:
    """A step and a forward, of logits [N, C, ...]."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    logits = values.clone().requires_grad_()
    return {
        (name, figure): step
        for name, loss in ((EAGER, F.cross_entropy), (OURS, npu_xent.cross_entropy))
        for figure, step in (
            (TRAINING, training(loss, logits, target)),
            (FORWARD, functools.partial(loss, values, target)),
        )
    }


def training_steps(rows: int, classes: int, dtype: torch.dtype, with_compile: bool) -> Steps:
    """Training steps only, for small inputs and scaling."""
    values, target = make_logits(rows, classes, dtype)
    logits = values.clone().requires_grad_()
    steps = {
        (EAGER, TRAINING): training(F.cross_entropy, logits, target),
        (OURS, TRAINING): training(npu_xent.cross_entropy, logits, target),
        (OURS, CONSUME): consuming(values, target),
    }
    if with_compile:
        steps[COMPILE, TRAINING] = training(compiled(F.cross_entropy), logits, target)
    return steps


# With a linear layer ------------------------------------------------------------------------------------------------

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours_linear() -> LinearLoss:
    """npu_xent.linear_cross_entropy."""
    if not hasattr(npu_xent, "linear_cross_entropy"):
        raise NotAvailable(f"npu_xent {npu_xent.__version__} has no linear_cross_entropy")
    return npu_xent.linear_cross_entropy


def eager_linear() -> LinearLoss:
    """The usual code: a linear layer, then the loss."""
    return lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target)


def compiled_linear() -> LinearLoss:
    """The same, compiled."""
    return compiled(eager_linear())


def torch_linear(chunked: bool) -> LinearLoss:
    """F.linear_cross_entropy of torch 2.13 and newer, optionally chunked by its defaults."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotAvailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    if not chunked:
        return F.linear_cross_entropy
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def cut_linear() -> LinearLoss:
    """Apple's loss with impl="torch_compile". Its import needs triton, which it skips only on Darwin."""
    try:
        with mock.patch.object(platform, "system", return_value="Darwin"):
            from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise NotAvailable(f"{error}; pip install --no-deps cut-cross-entropy") from error
    return functools.partial(linear_cross_entropy, impl="torch_compile")


LINEAR_LOSSES: dict[str, Callable[[], LinearLoss]] = {
    OURS: ours_linear,
    LINEAR: eager_linear,
    LINEAR_COMPILE: compiled_linear,
    TORCH_LINEAR: functools.partial(torch_linear, chunked=False),
    TORCH_CHUNKED: functools.partial(torch_linear, chunked=True),
    CUT: cut_linear,
}


def linear_inputs(rows: int, features: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator).to(dtype).requires_grad_()
    # Logits of about 1, as in a model. Much larger logits give denormal gradients, which make a GEMM 50 times slower.
    weight = torch.randn(classes, features, generator=generator).mul_(features**-0.5).to(dtype).requires_grad_()
    return x, weight, torch.randint(classes, (rows,), generator=generator)


def linear_steps(
    rows: int, features: int, classes: int, dtype: torch.dtype, compile_cut: bool, compile_torch: bool
) -> tuple[Steps, dict[str, str]]:
    """Training steps of all methods with a linear layer, and the reasons why methods are missing."""
    x, weight, target = linear_inputs(rows, features, classes, dtype)
    steps: Steps = {}
    missing: dict[str, str] = {}
    for name, make in LINEAR_LOSSES.items():
        if (name == CUT and not compile_cut) or (name == LINEAR_COMPILE and not compile_torch):
            missing[name] = "left out of a short run, since it takes long to compile"
            continue
        try:
            steps[name, TRAINING] = functools.partial(linear_step, make(), x, weight, target)
        except NotAvailable as error:
            missing[name] = str(error)
    steps[PRODUCTS, TRAINING] = three_products(x.detach(), weight.detach())
    return steps, missing


def three_products(x: Tensor, weight: Tensor) -> Step:
    """The matrix products that no method avoids: the logits, and the gradients of input and weight."""
    logits, grad_x, grad_weight = x @ weight.T, torch.zeros_like(x), torch.zeros_like(weight)
    grad = logits.mul(1e-3)

    def step() -> None:
        torch.mm(x, weight.T, out=logits)
        torch.mm(grad, weight, out=grad_x)
        torch.mm(grad.T, x, out=grad_weight)

    return step


def linear_step(loss: LinearLoss, x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the input and of the weight."""
    return torch.autograd.grad(loss(x, weight, target), (x, weight))
