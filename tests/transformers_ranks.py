"""The ranks of test_framework_transformers.py: training steps of a sharded model, without logits and with.

python transformers_ranks.py RANKS FOLDER [CASE ...]
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.modules["torch_npu"] = None  # type: ignore[assignment]  # transformers would import it, and CANN may be missing
import transformers  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from npu_xent.integrations.transformers import fuse_lm_head  # noqa: E402

CLASSES, TIME = 96, 12


class Calls(TorchDispatchMode):
    """Counts the operators of npu_xent: those of linear losses, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.other = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu_xent" and "_row_" in func._schema.name:
            self.linear += "linear" in func._schema.name
            self.other += "linear" not in func._schema.name
        return func(*args, **(kwargs or {}))


def small_model(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=CLASSES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).train()


def batch(rank: int) -> dict[str, Tensor]:
    ids = torch.randint(1, CLASSES, (2, TIME), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[0, : 4 + rank] = -100
    return {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(19)}


def ddp(model: nn.Module, ranks: int) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: Any, ranks: int, head: bool = True, reshard: bool = True, **policy: torch.dtype) -> nn.Module:
    options = {"mesh": init_device_mesh("cpu", (ranks,)), "mp_policy": MixedPrecisionPolicy(**policy)}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head:
        fully_shard(model.lm_head, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
    return model


BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
CASES: dict[str, Any] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp without resharding": lambda m, n: fsdp(m, n, reshard=False),
    "fsdp of the root": lambda m, n: fsdp(m, n, head=False),
    "fsdp tied": lambda m, n: fsdp(m, n, head=False),
    "fsdp bf16": lambda m, n: fsdp(m, n, **BF16),
    "fsdp output dtype": lambda m, n: fsdp(m, n, output_dtype=torch.bfloat16, **BF16),
}


def train(case: str, rank: int, ranks: int, fused: bool) -> tuple[list[float], dict[str, Tensor], Calls]:
    """Two steps: losses, the gradients of the second, and the calls of npu_xent."""
    base = small_model(tied="tied" in case)
    if fused:
        fuse_lm_head(base)
    model = CASES[case](base, ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    with Calls() as calls:
        for step in range(2):
            optimizer.zero_grad()
            loss = model(**batch(2 * step + rank)).loss
            losses.append(loss.item())
            loss.backward()
            if step == 0:
                optimizer.step()
    gradients = {k: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for k, p in base.named_parameters()}
    return losses, gradients, calls


def run(case: str, rank: int, ranks: int) -> dict[str, Any]:
    losses, gradients, own = train(case, rank, ranks, fused=False)
    try:
        found, ours, calls = train(case, rank, ranks, fused=True)
    except RuntimeError as error:
        return {"error": str(error)}
    return {
        "losses": losses,
        "found": found,
        "largest": max(g.abs().max().item() for g in gradients.values()),
        "off": max((gradients[k] - ours[k]).abs().max().item() for k in gradients),
        "parameters": len(ours),
        "calls": [own.linear, own.other, calls.linear, calls.other],
    }


def rank_main(rank: int, ranks: int, folder: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks, timeout=limit)
    found = {case: run(case, rank, ranks) for case in cases or CASES}
    dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_main, (int(sys.argv[1]), sys.argv[2], sys.argv[3:]), nprocs=int(sys.argv[1]))
