"""The ranks of test_framework_verl.py: verl's functions of sharded classes, without and with the patch.

python verl_ranks.py RANKS FOLDER [CASE ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # verl compiles a product and a sum

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import Cases, Rank, main
from frameworks import TOLERANCE, Calls, compare, error
from torch import Tensor
from verl_import import import_verl

from npu_xent.integrations.verl import patch_verl

CLASSES = 60
SHAPE = (3, 5)


def functions(rank: Rank) -> Any:
    """verl's module, with Megatron's group of all ranks."""
    module = import_verl("utils.megatron.tensor_parallel")
    parallel_state = module.mpu
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(rank.ranks)
    return module


def draws(rank: Rank, dtype: torch.dtype, count: int = 6) -> list[list[Tensor]]:
    """This rank's classes of some logits, and all of them."""
    made = []
    for seed in range(count):
        logits = (3 * torch.randn(*SHAPE, CLASSES, generator=torch.Generator().manual_seed(seed))).to(dtype)
        begin, end = rank.bounds(CLASSES)
        made.append([logits[..., begin:end].clone().requires_grad_(), logits])
    return made


def labels_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(99))


def run(
    rank: Rank, dtype: torch.dtype, function: Callable[[Any, Tensor], Tensor], truth: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Compares a function of this rank's classes with the truth from the log-probabilities of all."""
    module, (begin, end) = functions(rank), rank.bounds(CLASSES)

    def true(shard: Tensor, whole: Tensor) -> Tensor:
        return truth(torch.cat([whole[..., :begin], shard, whole[..., end:]], -1).log_softmax(-1))

    compare(
        patch_verl,
        lambda shard, _: function(module, shard * 1),  # Megatron's loss overwrites float32 logits
        true,
        *draws(rank, dtype),
        calls={"row_stats": 1},
        rounds=dtype is torch.bfloat16,
    )
    with patch_verl():
        return [function(module, draws(rank, dtype)[0][0]).detach()]


def entropy_of(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def log_probs(rank: Rank, dtype: torch.dtype) -> list[Tensor]:
    labels = labels_of(SHAPE)
    return run(
        rank,
        dtype,
        lambda module, x: module.vocab_parallel_log_probs_from_logits(x, labels),
        lambda lp: lp.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
    )


def entropy(rank: Rank, dtype: torch.dtype) -> list[Tensor]:
    return run(rank, dtype, lambda module, x: module.vocab_parallel_entropy(x), entropy_of)


def entropy_in_chunks(rank: Rank, dtype: torch.dtype) -> list[Tensor]:
    """verl's has a backward only for a single chunk."""
    module, shard = functions(rank), draws(rank, dtype)[0][0]
    with patch_verl():
        module.vocab_parallel_entropy_with_chunking(shard, 2).sum().backward()
    assert shard.grad is not None
    return run(rank, dtype, lambda module, x: module.vocab_parallel_entropy_with_chunking(x, 5), entropy_of)


def float64_is_left_to_verl(rank: Rank, _: Any) -> list[Tensor]:
    module, shard = functions(rank), draws(rank, torch.float64)[0][0]
    with patch_verl(), Calls() as calls:
        module.vocab_parallel_log_probs_from_logits(shard * 1, labels_of(SHAPE))
        module.vocab_parallel_entropy_with_chunking(shard, 2)
    assert not calls.of
    return []


def the_logits_are_not_overwritten(rank: Rank, _: Any) -> list[Tensor]:
    module, shard = functions(rank), draws(rank, torch.float32)[0][0]
    logits = shard * 1
    with patch_verl():
        log_probs = module.vocab_parallel_log_probs_from_logits(logits, labels_of(SHAPE))
        (log_probs.sum() + module.vocab_parallel_entropy(logits).sum()).backward()
    assert torch.equal(logits, shard)
    return []


def a_label_out_of_range_raises(rank: Rank, _: Any) -> list[Tensor]:
    module, shard = functions(rank), draws(rank, torch.float32)[0][0]
    for label in (CLASSES, -1, -100):
        with patch_verl(), pytest.raises(IndexError):
            module.vocab_parallel_log_probs_from_logits(shard, torch.full(SHAPE, label))
    return []


def a_sharded_layer_is_left_to_verl(rank: Rank, _: Any) -> list[Tensor]:
    """But not in a group of one rank."""
    together = functions(rank).mpu.get_tensor_model_parallel_group()
    alone = [dist.new_group([other]) for other in range(rank.ranks)][rank.rank]
    module = import_verl("utils.kernel.linear_cross_entropy")
    arguments = torch.randn(4, 8), torch.randn(7, 8), torch.zeros(4, dtype=torch.int64), 1.0, "none"
    with patch_verl(), Calls() as calls:
        module.linear_cross_entropy(*arguments, alone)
        assert calls.of == {"linear_row_stats": 1}
        with pytest.raises((AssertionError, ModuleNotFoundError, RuntimeError)):  # it needs CUDA
            module.linear_cross_entropy(*arguments, together)
    assert calls.of == {"linear_row_stats": 1}
    return []


def the_group_is_megatrons(rank: Rank, _: Any) -> list[Tensor]:
    """Each rank has all classes, while torch.distributed has both ranks."""
    module = functions(rank)
    module.mpu.destroy_model_parallel()
    module.mpu.initialize_model_parallel(1)
    whole, labels = draws(rank, torch.float32)[0][1], labels_of(SHAPE)
    with patch_verl(), Calls() as calls:
        found = module.vocab_parallel_log_probs_from_logits(whole, labels)
    module.mpu.destroy_model_parallel()
    assert calls.of == {"row_stats": 1}
    assert error(found, whole.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)) <= TOLERANCE
    return []


CASES: Cases = {
    **{
        f"{case.__name__}-{dtype}": (case, dtype)
        for case in (log_probs, entropy, entropy_in_chunks)
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        case.__name__: (case, None)
        for case in (
            float64_is_left_to_verl,
            the_logits_are_not_overwritten,
            a_label_out_of_range_raises,
            a_sharded_layer_is_left_to_verl,
            the_group_is_megatrons,
        )
    },
}

if __name__ == "__main__":
    main(CASES, *sys.argv[1:])
