"""The ranks of test_framework_megatron.py: Megatron's losses and models on the CPU, before and after the patch.

python megatron_ranks.py RANKS FOLDER [CASE ...]
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from distributed_ranks import Rank, main
from torch import Tensor

import npu_xent.integrations.megatron as ours
from npu_xent.integrations.megatron import patch_megatron

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it misses Apex and TransformerEngine
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions import fused_cross_entropy
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig

S, B, K = 7, 3, 24
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Counts:
    """Calls of npu_xent's loss, and collectives."""

    served = gathers = reduces = 0


@contextlib.contextmanager
def patched() -> Iterator[Counts]:
    """The patch, and what is called under it."""
    counts = Counts()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            setattr(counts, name, getattr(counts, name) + 1)
            return function(*args, **keywords)

        return call

    with (
        mock.patch.object(ours, "vocab_parallel_cross_entropy", counting("served", ours.vocab_parallel_cross_entropy)),
        mock.patch("npu_xent.distributed._all_gather", counting("gathers", dist.all_gather_into_tensor)),
        mock.patch.object(dist, "all_reduce", counting("reduces", dist.all_reduce)),
        patch_megatron(),
    ):
        yield counts


def start(at: Rank) -> dist.ProcessGroup:
    """Megatron's groups: all ranks share the classes."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(at.ranks)
    torch.compiler.set_stance("force_eager")  # Megatron compiles parts of its fused loss
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and the upstream gradient, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(S, B, K, generator=generator)
    target = torch.randint(K, (S, B), generator=generator)
    return logits.to(dtype), target, torch.rand(S, B, generator=generator)


def truth(logits: Tensor, target: Tensor, upstream: Tensor, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """Megatron's formula over all classes, in float64: the target keeps 1 - alpha, the others share alpha."""
    x = logits.detach().double().requires_grad_()
    classes = x.shape[-1]
    share = torch.full_like(x, alpha / (classes - 1)).scatter(-1, target.unsqueeze(-1), 1 - alpha)
    loss = -(share * x.log_softmax(-1)).sum(-1)
    return loss.detach(), torch.autograd.grad(loss, x, upstream.double())[0]


def step(at: Rank, loss: Callable[[Tensor], Tensor], logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of this rank's classes."""
    leaf, shard = at.shard(logits)
    found = loss(shard)
    found.backward(upstream)
    assert leaf.grad is not None
    return found.detach(), leaf.grad


def off(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], at: Rank) -> list[float]:
    """The largest errors of a loss and of its gradient."""
    columns = slice(*at.bounds(K))
    return [
        float((f.double() - e).abs().max())
        for f, e in zip(found, (expected[0], expected[1][..., columns]), strict=True)
    ]


def losses(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """Float32 within 1e-5 of Megatron's and of the truth, 16-bit no farther from the truth than Megatron's."""
    group, fused, dtype = start(at), case["fused"], case["dtype"]
    logits, target, upstream = problem(dtype)

    def loss(shard: Tensor) -> Tensor:  # the names are looked up when it is called
        if fused:
            return fused_cross_entropy.fused_vocab_parallel_cross_entropy(shard, target, group)
        return tensor_parallel.vocab_parallel_cross_entropy(shard, target)

    theirs = step(at, loss, logits, upstream)
    with patched() as counts:
        mine = step(at, loss, logits, upstream)
    assert (counts.served, counts.gathers, counts.reduces) == (1, int(at.ranks > 1), 0), vars(counts)
    assert (mine[0].dtype, mine[0].shape) == (theirs[0].dtype, theirs[0].shape) == (torch.float32, (S, B))
    assert mine[1].dtype == theirs[1].dtype == dtype
    expected = truth(logits, target, upstream)
    mine_off, theirs_off = off(mine, expected, at), off(theirs, expected, at)
    if dtype in (torch.float32, torch.float64):
        assert max(mine_off) < 1e-5, mine_off
        assert float((mine[0] - theirs[0]).abs().max()) < 1e-5
        assert fused or float((mine[1] - theirs[1]).abs().max()) < 1e-5
    else:
        assert mine_off[0] < 1e-5, mine_off
        assert mine_off[1] <= theirs_off[1] + 1e-9, (mine_off, theirs_off)
    return [mine[0]]


def smoothing(at: Rank, _: Any) -> list[Tensor]:
    """The formula over the whole vocabulary; with more ranks than one, Megatron's differs."""
    start(at)
    logits, target, upstream = problem()

    def loss(shard: Tensor) -> Tensor:
        return tensor_parallel.vocab_parallel_cross_entropy(shard, target, label_smoothing=0.2)

    theirs = step(at, loss, logits, upstream)
    with patched() as counts:
        mine = step(at, loss, logits, upstream)
    assert (counts.served, counts.reduces) == (1, 0)
    expected = truth(logits, target, upstream, 0.2)
    assert max(off(mine, expected, at)) < 1e-5, off(mine, expected, at)
    theirs_off = off(theirs, expected, at)
    assert (max(theirs_off) < 1e-5) == (at.ranks == 1), theirs_off
    return [mine[0]]


def no_class(at: Rank, _: Any) -> list[Tensor]:
    """Rows whose target is no class do not raise, are 0, and leave the other rows alone, even where they are NaN."""
    start(at)
    logits, target, upstream = problem()
    expected = truth(logits, target, upstream)
    bad = torch.zeros(S, B, dtype=torch.bool)
    for row, value in (((0, 0), -100), ((1, 2), -1), ((3, 1), K), ((6, 0), K + 100)):
        target[row], bad[row] = value, True

    def masked(shard: Tensor) -> Tensor:
        return tensor_parallel.vocab_parallel_cross_entropy(shard, target) * ~bad

    theirs = step(at, masked, logits, upstream)
    given = target.clone()
    with patched() as counts:
        mine = step(at, masked, logits, upstream)
        logits[0, 0] = math.nan
        with_nan = step(at, lambda x: tensor_parallel.vocab_parallel_cross_entropy(x, target), logits, upstream)
    assert (counts.served, counts.reduces) == (2, 0)
    assert torch.equal(target, given)
    kept = (expected[0] * ~bad, expected[1] * ~bad.unsqueeze(-1))
    for found in (theirs, mine, with_nan):
        assert max(off(found, kept, at)) < 1e-5
    return [mine[0]]


def logits_stay(at: Rank, _: Any) -> list[Tensor]:
    """The caller's logits keep their values, which Megatron overwrites; the loss may be overwritten."""
    start(at)
    logits, target, upstream = problem()
    expected = truth(logits, target, upstream)

    def loss(shard: Tensor) -> Tensor:
        found = tensor_parallel.vocab_parallel_cross_entropy(shard, target)
        kept.append(shard)
        return found.mul_(1)

    columns, kept = slice(*at.bounds(K)), list[Tensor]()
    step(at, loss, logits, upstream)
    with patched():
        mine = step(at, loss, logits, upstream)
    assert not torch.equal(kept[0], logits[..., columns])
    assert torch.equal(kept[1], logits[..., columns])
    assert max(off(mine, expected, at)) < 1e-5
    return [mine[0]]


def given_group(at: Rank, _: Any) -> list[Tensor]:
    """tp_group comes before Megatron's group: here each rank has all classes."""
    start(at)
    alone = [dist.new_group([rank]) for rank in range(at.ranks)][at.rank]
    logits, target, upstream = problem()
    expected = truth(logits, target, upstream)
    with patched() as counts:
        for loss in (
            lambda x: tensor_parallel.vocab_parallel_cross_entropy(x, target, tp_group=alone),
            lambda x: tensor_parallel.vocab_parallel_cross_entropy(x, target, 0.0, alone),
            lambda x: fused_cross_entropy.fused_vocab_parallel_cross_entropy(x, target, tp_group=alone),
        ):
            mine = step(Rank(0, 1), loss, logits, upstream)
            assert max(off(mine, expected, Rank(0, 1))) < 1e-5
    assert (counts.served, counts.gathers, counts.reduces) == (3, 0, 0)
    return [mine[0]]


def gpt(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """GPTModel, which takes the loss from two modules that imported it."""
    start(at)
    torch.manual_seed(0)
    fused = case["fused"]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=at.ranks,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        cross_entropy_fusion_impl="native",
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=K, max_sequence_length=S)
    ids = torch.randint(K, (B, S))
    later = torch.ones(1, 1, S, S).triu(1).bool()

    def train() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(ids, torch.arange(S).expand(B, S), later, labels=ids.roll(-1, 1))
        loss.mean().backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    # Its attention asks for the current device and for CUDA's random numbers, even without dropout.
    no_random = types.SimpleNamespace(fork=lambda *_: contextlib.nullcontext())
    with (
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        mock.patch.multiple(
            random, _CUDA_RNG_STATE_TRACKER=no_random, _CUDA_RNG_STATE_TRACKER_INITIALIZED=True, create=True
        ),
    ):
        config.cross_entropy_loss_fusion = False  # the fused loss rounds its gradient to bfloat16
        loss, grads = train()
        config.cross_entropy_loss_fusion = fused
        with patched() as counts:
            patched_loss, patched_grads = train()
    assert (counts.served, counts.gathers) == (1, int(at.ranks > 1))
    assert (patched_loss.dtype, patched_loss.shape) == (loss.dtype, loss.shape) == (torch.float32, (B, S))
    assert patched_loss.is_contiguous()
    assert float((loss - patched_loss).abs().max()) < 1e-5
    assert len(grads) == len(patched_grads) > 10
    for mine, theirs in zip(patched_grads, grads, strict=True):
        assert float((mine - theirs).abs().max()) < 1e-5
    return [patched_loss]


CASES: dict[str, tuple[Callable[[Rank, Any], list[Tensor]], Any]] = {
    **{
        f"losses-{name}{'-fused' * fused}": (losses, {"dtype": dtype, "fused": fused})
        for name, dtype in DTYPES.items()
        for fused in (False, True)
    },
    **{case.__name__: (case, None) for case in (smoothing, no_class, logits_stay, given_group)},
    **{f"gpt{'-fused' * fused}": (gpt, {"fused": fused}) for fused in (False, True)},
}

if __name__ == "__main__":
    main(CASES, *sys.argv[1:])
