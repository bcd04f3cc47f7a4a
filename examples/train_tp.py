"""Train the small GPT of train_lm.py with its vocabulary sharded over the ranks (tensor parallel).

The embedding, which is also the head, is by far the largest matrix. Each rank keeps a chunk of its rows. All else is
replicated, and every rank sees the same batches. The losses are those of one process, up to rounding:

    python examples/train_tp.py                                        # one process, nothing sharded: the reference
    torchrun --nproc_per_node 2 examples/train_tp.py                   # two shards, by gloo on the CPU
    torchrun --nproc_per_node 8 examples/train_tp.py --device npu --dtype bf16          # HCCL; not tried yet

Four things differ from training in one process:

1. The embedding: a rank looks up its own tokens, and the vectors are summed over the ranks.
2. The loss: npu_xent.distributed computes it from the shards, without materializing the logits. It also sums the
   gradient of the hidden states over the ranks, so that replicated parameters get the same gradient on every rank.
3. Clipping: the norm of all gradients needs the shards of the other ranks.
4. The check at the end: a forgotten sum lets replicated parameters drift apart, without an error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

# Only --device npu imports torch_npu: without CANN, autoloading it would break `import torch`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lm.checkpoint import set_earlier_run_aside
from lm.data import Corpus, load_corpus, training_batch
from lm.model import GPT
from lm.optimizer import learning_rate, make_optimizer
from lm.processes import World, open_device, peak_megabytes
from lm.report import METRICS_HEADER
from lm.settings import SettingError, Settings, absolute, check, common_parser
from npu_xent import linear_cross_entropy
from npu_xent.distributed import vocab_parallel_linear_cross_entropy


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks.

    What comes after it is the same on all ranks, so each of them has the whole gradient already. The backward must not
    sum it once more, as that of torch.distributed.nn.functional.all_reduce does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class ShardedEmbedding(nn.Module):
    """This rank's rows of an embedding. It takes tokens of the whole vocabulary."""

    def __init__(self, whole: nn.Embedding, world: World) -> None:
        super().__init__()
        shards = whole.weight.detach().chunk(world.size)  # the last one may be shorter
        if len(shards) < world.size:
            raise SettingError(
                f"{world.size} ranks: a vocabulary of {len(whole.weight)} has no chunk for each; use fewer"
            )
        self.start = world.rank * len(shards[0])
        self.weight = nn.Parameter(shards[world.rank].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.start
        elsewhere = (local < 0) | (local >= len(self.weight))
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return SumOverRanks.apply(vectors.masked_fill(elsewhere.unsqueeze(-1), 0))


def make_model(settings: Settings, vocab_size: int, world: World) -> GPT:
    """Every rank draws the same weights and keeps its shard, so that any number of ranks starts alike."""
    torch.manual_seed(settings.seed)
    gpt = GPT(vocab_size, settings.context, settings.layers, settings.heads, settings.width)
    if world.grouped:
        gpt.token = ShardedEmbedding(gpt.token, world)
    return gpt


def loss_of(gpt: GPT, tokens: Tensor, targets: Tensor, vocab_size: int, world: World) -> Tensor:
    """The mean cross entropy of the predictions, the same on all ranks."""
    hidden = gpt.hidden(tokens)
    if world.grouped:
        return vocab_parallel_linear_cross_entropy(hidden, gpt.token.weight, targets, num_classes=vocab_size)
    return linear_cross_entropy(hidden, gpt.token.weight, targets)


def clip_gradients(gpt: GPT, world: World) -> None:
    """Clips to a norm of 1 over all parameters: the sum over the shards, and replicated ones once."""
    shard = gpt.token.weight
    square = shard.grad.square().sum()
    if world.grouped:
        dist.all_reduce(square)
    replicated = nn.utils.get_total_norm([p.grad for p in gpt.parameters() if p is not shard])
    nn.utils.clip_grads_with_norm_(gpt.parameters(), 1.0, (square + replicated.square()).sqrt())


def train(gpt: GPT, corpus: Corpus, settings: Settings, device: torch.device, world: World) -> None:
    optimizer = make_optimizer(gpt, settings.lr)
    writes = bool(settings.out) and world.rank == 0
    if writes:
        settings.out.mkdir(parents=True, exist_ok=True)
        set_earlier_run_aside(settings.out)
    with open(settings.out / "metrics.csv" if writes else os.devnull, "w", buffering=1) as metrics:
        metrics.write(METRICS_HEADER + "\n")
        for step in range(settings.steps):
            begin = time.perf_counter()
            tokens, targets = training_batch(corpus, settings, step, rank=0)  # the same on all ranks
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
                loss = loss_of(gpt, tokens.to(device), targets.to(device), corpus.vocab_size, world)
            loss.backward()
            clip_gradients(gpt, world)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            rate, peak = tokens.numel() / (time.perf_counter() - begin), peak_megabytes(device)
            metrics.write(f"{step},{value!r},{rate:.1f},{peak:.1f}\n")
            if (step + 1) % 10 == 0 or step + 1 == settings.steps:
                world.say(f"step {step + 1} of {settings.steps}: loss {value:.4f}, {rate:,.0f} tokens/s")


@torch.no_grad()
def differing(gpt: GPT, device: torch.device, world: World) -> int:
    """How many replicated parameters are not bit for bit those of rank 0, over all ranks."""
    count = 0
    for parameter in gpt.parameters():
        if world.grouped and parameter is not gpt.token.weight:
            first = parameter.clone()
            dist.broadcast(first, 0)
            count += not torch.equal(first, parameter)
    return int(world.sum([count], device)[0])


def run(settings: Settings, world: World) -> int:
    check(settings)
    device = open_device(settings.device, world)
    world.join(device)
    corpus = world.from_rank_0(lambda: load_corpus(settings, world, None))
    gpt = make_model(settings, corpus.vocab_size, world).to(device)
    world.say(
        f"{world.size} rank(s) on {device.type}; rank 0 has {len(gpt.token.weight)} of {corpus.vocab_size} tokens"
    )
    train(gpt, corpus, settings, device, world)
    drifted = differing(gpt, device, world)
    world.say(f"Replicated parameters that differ between ranks: {drifted}")
    world.leave()
    return 1 if drifted else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = common_parser((__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=absolute, metavar="FOLDER", help="write the loss of each step to metrics.csv here"
    )
    try:
        return run(parser.parse_args(argv, Settings()), World.from_environment())
    except SettingError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
