"""Reinforcement learning by GRPO, with npu_xent's log-probabilities: a tiny GPT learns to write even tokens.

The model is random, the reward counts, and nothing is downloaded: half a minute on a CPU core. `--loss torch` computes
the same from logits in memory, for comparison. The rewards rise alike, up to the rounding that sampling amplifies:

    python examples/grpo.py
    python examples/grpo.py --loss torch
    python examples/grpo.py --device npu --steps 100                # not tried yet

Each step

1. samples completions of some prompts, several of each prompt, without gradient;
2. turns rewards into advantages: how much better a completion is than the others of its prompt;
3. takes two optimizer steps on the clipped ratio of the probabilities now to those that sampled.

The loss needs one number per token, its log-probability, and here the entropy too: npu_xent.linear_token_log_probs
computes both from hidden states, without materializing logits [tokens, vocabulary].
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

# Only --device npu imports torch_npu: without CANN, autoloading it would break `import torch`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
from torch import Tensor
from torch.nn import functional as F

import npu_xent
from lm.model import GPT
from lm.processes import World, open_device, peak_megabytes
from lm.settings import SettingError, positive

PROMPT, COMPLETION = 4, 8  # tokens
UPDATES, CLIP, BONUS = 2, 0.2, 1e-3  # of each sample; of the ratio; for the entropy


def log_probs_and_entropy(model: GPT, tokens: Tensor, temperature: float, loss: str) -> tuple[Tensor, Tensor]:
    """Of each token of the completions, [rows, COMPLETION], in float32."""
    hidden, target = model.hidden(tokens)[:, PROMPT - 1 : -1], tokens[:, PROMPT:]
    if loss == "torch":
        log_probs = (F.linear(hidden, model.token.weight).float() / temperature).log_softmax(-1)
        picked = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return picked, -(log_probs.exp() * log_probs).sum(-1)
    out = npu_xent.linear_token_log_probs(
        hidden, model.token.weight, target, temperature=temperature, return_entropy=True
    )
    return out.log_probs, out.entropy


@torch.no_grad()
def sample(model: GPT, prompts: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """The prompts with completions. Random numbers are drawn on the CPU, so they are the same on every device."""
    tokens = prompts
    for _ in range(COMPLETION):
        logits = F.linear(model.hidden(tokens)[:, -1], model.token.weight).float().cpu()
        chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)
        tokens = torch.cat([tokens, chosen.to(tokens.device)], 1)
    return tokens


def reward_of(tokens: Tensor) -> Tensor:
    """The share of even tokens in each completion."""
    return (tokens[:, PROMPT:] % 2 == 0).float().mean(1)


def advantages_of(rewards: Tensor, group: int) -> Tensor:
    """[rows] -> [rows, 1]: in units of the deviation of the rewards of the same prompt."""
    grouped = rewards.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def train(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    model = GPT(args.vocab_size, PROMPT + COMPLETION, layers=2, heads=4, width=args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    draw = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    for step in range(1, args.steps + 1):
        prompts = torch.randint(args.vocab_size, (args.prompts, PROMPT), generator=draw).to(device)
        tokens = sample(model, prompts.repeat_interleave(args.group, 0), args.temperature, draw)
        rewards = reward_of(tokens)
        advantages = advantages_of(rewards, args.group)
        old: Tensor | None = None
        for _ in range(UPDATES):
            new, entropy = log_probs_and_entropy(model, tokens, args.temperature, args.loss)
            old = new.detach() if old is None else old
            ratio = (new - old).exp()
            gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            loss = -(gain + BONUS * entropy).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step in (1, args.steps) or step % 10 == 0:
            seconds, peak = (time.perf_counter() - begin) / step, peak_megabytes(device)
            print(
                f"step {step}: reward {rewards.mean():.4f}, loss {loss:.5f}, entropy {entropy.mean():.4f}, "
                f"{seconds:.3f} s/step, peak {peak:.0f} MiB"
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    count = positive(int)
    parser.add_argument("--loss", choices=("npu_xent", "torch"), default="npu_xent", help="what computes the loss")
    parser.add_argument("--steps", type=count, default=60, help="samples, of which each is used twice")
    parser.add_argument("--prompts", type=count, default=8, help="different prompts in a step")
    parser.add_argument("--group", type=count, default=8, help="completions of each prompt, at least 2")
    parser.add_argument("--vocab-size", type=count, default=2048, help="tokens, of which half are even")
    parser.add_argument("--width", type=count, default=32, help="size of the residual stream, a multiple of 4")
    parser.add_argument("--lr", type=positive(float), default=3e-3, help="learning rate")
    parser.add_argument("--temperature", type=positive(float), default=1.0, help="of sampling and of the loss")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and samples")
    parser.add_argument("--device", default="cpu", help="cpu, npu or cuda")
    args = parser.parse_args(argv)
    try:
        if args.group < 2:
            raise SettingError(f"--group {args.group}: advantages compare completions of a prompt; use 2 or more")
        if args.width % 4:
            raise SettingError(f"--width {args.width}: not a multiple of the 4 heads; change it")
        train(args, open_device(args.device, World(0, 0, 1, False)))
    except SettingError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
