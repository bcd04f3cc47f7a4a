"""What npu_xent.distributed computes on each rank, for all shards in one process: on any device, without a group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import assert_near, make_logits, make_target, make_weight, truth
from torch import Tensor

import npu_xent
from npu_xent.distributed import _merged, _of_this_shard, _row_grad, _Shard, _Statistics, _Wanted

BOUNDS = [0, 9, 9, 30, 31]  # one shard is empty
SHARDS = [_Shard(begin, end - begin, 31) for begin, end in itertools.pairwise(BOUNDS)]
OPTIONS: dict[str, Any] = {"ignore_index": -100, "softcap": 8.0, "logit_scale": 0.7}
ALL = _Wanted(need_wsum=True, need_entropy=True, need_top1=True)


def merged(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shards: Sequence[_Shard] = SHARDS,
    options: dict[str, Any] = OPTIONS,
) -> _Statistics:
    """The statistics over all shards, as after an all_gather."""
    of = [_of_this_shard(logits[:, s.start : s.start + s.columns], target, weight, s, options, ALL) for s in shards]
    return _merged({name: torch.stack([shard[name] for shard in of]) for name in of[0]})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_make_up_the_whole(dtype: torch.dtype, weighted: bool, device: torch.device) -> None:
    """Loss and gradient with smoothing, and log-probabilities, entropy and top-1."""
    logits, target = make_logits(13, 31, dtype, device), make_target(13, 31, device, ignore_index=-100)
    weight = make_weight(31, torch.float32, device) if weighted else None
    stats = merged(logits, target, weight)
    named = {"reduction": "none", "label_smoothing": 0.1, **OPTIONS}
    ops = torch.ops.npu_xent
    of_all = {"ignore_index": -100, "label_smoothing": 0.1, "reduction": "none", "num_classes": 31}
    totals = ops.reduce_rows(target, weight, **of_all, loss_dtype=torch.float32)[2]
    loss = ops.reduce_rows(target, weight, *stats[:4], totals, **of_all, loss_dtype=torch.float32)[0]
    expected = truth(logits, target, weight, **named)
    assert_near(loss, expected.loss, expected.loss_terms)
    operands = {"totals": totals, "grad_loss": torch.ones(13, device=device), **named}
    for shard in SHARDS:
        columns = slice(shard.start, shard.start + shard.columns)
        grad = _row_grad(logits[:, columns], target, weight, stats[:2], shard, False, **operands)
        assert_near(grad, expected.grad[:, columns], expected.grad_terms[:, columns])
    out = npu_xent.token_log_probs(logits, target, **OPTIONS, return_entropy=True, return_top1=True)
    kept = target != -100
    assert torch.equal(stats.top1[kept], out.top1[kept])
    torch.testing.assert_close(stats.entropy[kept], out.entropy[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((stats.picked - stats.lse)[kept], out.log_probs[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("logit_scale", [0.7, -0.7, 0.0])
def test_the_first_of_equal_classes_is_top1_in_any_order_of_ranks(
    softcap: float | None, logit_scale: float, device: torch.device
) -> None:
    """One row for each target: all equal, equal in some shards, and -inf, of which a softcap makes -softcap."""
    target = torch.arange(31, device=device).repeat(4)
    logits = torch.zeros(4, 31, 31, device=device)
    logits[1, :, [3, 4, 12, 20, 30]] = math.copysign(1.0, logit_scale)
    logits[2] = -math.inf
    logits[3, :, :9] = -math.inf
    logits = logits.flatten(0, 1)
    options = {"ignore_index": -100, "softcap": softcap, "logit_scale": logit_scale}
    expected = npu_xent.token_log_probs(logits, target, **options, return_top1=True).top1
    for shards in itertools.permutations(SHARDS):
        assert torch.equal(merged(logits, target, None, shards, options).top1, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_shards_further_apart_than_the_largest_float(weighted: bool, device: torch.device) -> None:
    """Classes of weight 0 add nothing to the smoothing, also where their logarithms are -inf."""
    logits = torch.zeros(3, 31, device=device)
    logits[:, :9] = -3e38
    logits[:, 9:] = 3e38
    logits[1, 30] = -3e38
    target = torch.tensor([9, 12, 29], device=device)
    weight = None
    if weighted:
        weight = torch.ones(31, device=device)
        weight[:9] = weight[30] = 0
    options = {"ignore_index": -100, "logit_scale": 1.0}
    stats = merged(logits, target, weight, options=options)
    named = {"reduction": "none", "label_smoothing": 0.1, **options}
    of_all = {"num_classes": 31, "loss_dtype": torch.float32, **named}
    totals = torch.ops.npu_xent.reduce_rows(target, weight, **of_all)[2]
    loss = torch.ops.npu_xent.reduce_rows(target, weight, *stats[:4], totals, **of_all)[0]
    torch.testing.assert_close(loss, npu_xent.cross_entropy(logits, target, weight, **named))
    out = npu_xent.token_log_probs(logits, target, return_entropy=True)
    torch.testing.assert_close(stats.entropy, out.entropy)


def test_infinite_logits_are_those_of_the_whole(device: torch.device) -> None:
    """Of +inf the logsumexp is +inf, unless another logit is NaN."""
    logits = torch.zeros(4, 31, device=device)
    logits[:3, 30] = math.inf
    logits[1, :9] = -math.inf
    logits[2, 3] = math.nan
    logits[3] = -math.inf
    target = torch.tensor([0, 30, 30, 30], device=device)
    options = {"ignore_index": -100, "logit_scale": 1.0}
    stats = merged(logits, target, None, options=options)
    whole = npu_xent.cross_entropy(logits, target, return_lse=True)
    torch.testing.assert_close(stats.lse, whole.lse, equal_nan=True)
