"""docs/rl.md: its functions compute what trainers compute, and a policy trains as it does with plain PyTorch.

The code is taken from the page. The truth is the textbook's formula in float64, from probabilities where the page has
log-probabilities, and shares nothing with the page.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import npu_xent

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "rl.md").read_text()
PROGRAM = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^```\n\n```\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)

SEQUENCES, TIME, CLASSES, WIDTH = 4, 6, 50, 16
TEMPERATURES = (0.6, 1.0, 1.7)


# The page -------------------------------------------------------------------------------------------------------------


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    return re.split(r"^#+ .*$", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def functions(heading: str) -> dict[str, Any]:
    """What the programs below a heading define, after the first program of the page."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for program in dict.fromkeys((PROGRAM.findall(PAGE)[0], *PROGRAM.findall(section(heading)))):
            exec(program, names)
    return names


def test_every_program_is_tested_below() -> None:
    """A section that is added needs a test that names it."""
    headings = [
        heading
        for heading in re.findall(r"^#{2,3} (.*)$", re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S), flags=re.M)
        if PROGRAM.search(section(heading))
    ]
    tests = Path(__file__).read_text()
    assert len(headings) == 13
    assert not [heading for heading in headings if f'("{heading}")' not in tests]


def test_the_first_program() -> None:
    names = functions("Log-probabilities for RL and preference training")
    target, logits, kept = names["target"], names["logits"], names["mask"]
    assert target.tolist() == [[7, 21, 3, -100, -100], [-100, 12, 4, 5, -100]]
    for result in names["log_probs"], names["entropy"]:
        assert result.shape == target.shape
        assert result.dtype == torch.float32
        assert not result[~kept].any()
    x = logits.detach().double().requires_grad_()
    loss = -(plain_log_probs(x, target).sum() + 0.01 * plain_entropy(x, target).sum()) / 6
    loss.backward()
    torch.testing.assert_close(names["loss"].double(), loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(logits.grad.double(), x.grad, rtol=2**-8, atol=1e-8)
    assert names["top1"].tolist() == ((x.argmax(-1) == target) & kept).tolist()


def test_what_bfloat16_loses() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        functions("float32")
    assert [printed.getvalue()] == OUTPUT.findall(section("float32"))


# The truth ------------------------------------------------------------------------------------------------------------


def plain_log_probs(logits: Tensor, target: Tensor, temperature: Any = 1.0) -> Tensor:
    """log(p[target]) in float64, and 0 in ignored rows."""
    kept = target != -100
    p = (logits.double() / temperature).softmax(-1)
    return torch.where(kept, p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1).log(), 0.0)


def plain_entropy(logits: Tensor, target: Tensor, temperature: Any = 1.0) -> Tensor:
    """-sum(p log p) in float64, and 0 in ignored rows."""
    p = (logits.double() / temperature).softmax(-1)
    return torch.where(target != -100, -(p * p.log()).sum(-1), 0.0)


def random_logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(SEQUENCES, TIME, CLASSES, generator=generator)


def random_target(seed: int = 0) -> Tensor:
    """Classes, with a prompt and padding of -100 in each sequence but the first."""
    target = torch.randint(0, CLASSES, (SEQUENCES, TIME), generator=torch.Generator().manual_seed(seed))
    for row in range(1, SEQUENCES):
        target[row, : row - 1] = -100
        target[row, TIME - row :] = -100
    return target


def assert_same(result: Tensor, truth: Tensor, *inputs: Tensor) -> None:
    """A float32 result and its gradients; the truth is a function of the same inputs."""
    assert result.dtype == torch.float32
    weights = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(result.double(), truth.double(), rtol=2e-6, atol=2e-6)
    got = torch.autograd.grad((result * weights.float()).sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad((truth * weights).sum(), inputs, retain_graph=True)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


# In the trainers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def logits() -> Tensor:
    return random_logits().requires_grad_()


@pytest.fixture
def target() -> Tensor:
    return random_target()


@pytest.fixture
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [batch, time, width], weight, bias."""
    generator = torch.Generator().manual_seed(2)
    shapes = (SEQUENCES, TIME, WIDTH), (CLASSES, WIDTH), (CLASSES,)
    hidden, weight, bias = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return hidden, weight, bias


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_trl_from_logits(temperature: float, logits: Tensor, target: Tensor) -> None:
    trl = functions("TRL")
    everything = torch.zeros_like(target)
    truth, entropy = plain_log_probs(logits, target, temperature), plain_entropy(logits, target, temperature)
    mask, index = (target != -100).long(), target.clamp(min=0)
    assert_same(trl["selective_log_softmax"](logits, index, temperature, mask), truth, logits)
    unmasked = trl["selective_log_softmax"](logits, index, temperature)
    assert_same(unmasked, plain_log_probs(logits, index, temperature), logits)
    assert_same(trl["entropy_from_logits"](logits), plain_entropy(logits, everything), logits)
    both = trl["selective_log_softmax_and_entropy"](logits, index, temperature=temperature, row_mask=mask)
    assert_same(both[0], truth, logits)
    assert_same(both[1], entropy, logits)
    assert not trl["selective_log_softmax_and_entropy"](logits, index, entropy_requires_grad=False)[1].requires_grad

    several = logits.detach().topk(3).indices
    log_p = (logits.double() / temperature).softmax(-1).log().gather(-1, several)
    assert_same(trl["selective_log_softmax"](logits, several, temperature), log_p, logits)
    rows = mask.unsqueeze(-1).expand_as(several)
    assert_same(trl["selective_log_softmax"](logits, several, temperature, rows), log_p * rows, logits)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_trl_from_hidden_states(
    softcap: float | None, with_bias: bool, layer: tuple[Tensor, Tensor, Tensor], target: Tensor
) -> None:
    hidden, weight, bias = layer
    rows, index = hidden.flatten(0, 1), target.clamp(min=0).flatten()
    z = rows.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
    z = z * 0.25
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7
    inputs = layer if with_bias else layer[:2]
    call = functions("TRL")["chunked_log_probs"]
    arguments = rows, weight, bias if with_bias else None, index, 0.7, 32768, softcap, 0.25
    log_probs, entropy, sum_of_squares, mean_logits, top1 = call(
        *arguments, ("log_probs", "entropy", "is_top1", "mean_logits")
    )
    assert_same(log_probs, plain_log_probs(z, index), *inputs)
    assert_same(entropy, plain_entropy(z, index), *inputs)
    assert torch.equal(top1, z.argmax(-1) == index)
    assert sum_of_squares is None
    assert (mean_logits is None) == (softcap is not None)
    if mean_logits is not None:
        torch.testing.assert_close(mean_logits.double(), z.mean(-1), rtol=1e-5, atol=1e-6)
        assert not mean_logits.requires_grad
    log_probs, *others = call(*arguments, ("log_probs",))
    assert_same(log_probs, plain_log_probs(z, index), *inputs)
    assert others == [None] * 4


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_verl(temperature: float, logits: Tensor, target: Tensor, layer: tuple[Tensor, Tensor, Tensor]) -> None:
    verl = functions("verl")
    index = target.clamp(min=0)
    assert_same(verl["logprobs_from_logits"](logits, index), plain_log_probs(logits, index), logits)

    per_token = torch.tensor([temperature, 1.0, 0.3, 2.0], dtype=torch.float64).unsqueeze(1)
    log_probs, entropy = verl["log_probs_and_entropy"](logits, target, per_token)
    divisor = per_token.float().unsqueeze(-1)
    assert_same(log_probs, plain_log_probs(logits, target, divisor), logits)
    assert_same(entropy, plain_entropy(logits, target, divisor), logits)

    hidden, weight, _ = layer
    log_probs, entropy = verl["linear_cross_entropy"](hidden, weight, index, temperature)
    z = hidden.double() @ weight.double().T
    assert_same(log_probs, plain_log_probs(z, index, temperature), hidden, weight)
    assert_same(entropy, plain_entropy(z, index, temperature), hidden, weight)


def test_torchtitan(logits: Tensor, target: Tensor) -> None:
    compute_logprobs = functions("torchtitan")["compute_logprobs"]
    assert_same(compute_logprobs(logits, target), plain_log_probs(logits, target), logits)
    log_probs, entropy = compute_logprobs(logits, target, return_entropy=True)
    assert_same(log_probs, plain_log_probs(logits, target), logits)
    torch.testing.assert_close(entropy.double(), plain_entropy(logits, target).detach(), rtol=2e-6, atol=2e-6)
    assert not entropy.requires_grad


@pytest.mark.parametrize("shifted", [False, True])
def test_veomni(shifted: bool, layer: tuple[Tensor, Tensor, Tensor], target: Tensor) -> None:
    hidden, weight, _ = layer
    z = hidden.double() @ weight.double().T
    chunk_logprobs_function = functions("VeOmni")["chunk_logprobs_function"]
    if shifted:
        log_probs, entropy = chunk_logprobs_function(hidden, weight, target, shift_labels=target, temperature=0.7)
        truth, truth_entropy = plain_log_probs(z, target, 0.7), plain_entropy(z, target, 0.7)
    else:  # position t predicts label t + 1, and the last position nothing
        log_probs, entropy = chunk_logprobs_function(hidden, weight, target, temperature=0.7)
        truth = F.pad(plain_log_probs(z[:, :-1], target[:, 1:], 0.7), (0, 1))
        truth_entropy = F.pad(plain_entropy(z[:, :-1], target[:, 1:], 0.7), (0, 1))
    assert_same(log_probs, truth, hidden, weight)
    assert_same(entropy, truth_entropy, hidden, weight)


def test_llama_factory_openrlhf_mindspeed(logits: Tensor, target: Tensor) -> None:
    others = functions("LLaMA-Factory, OpenRLHF, MindSpeed-RL")
    sums, lengths = others["get_batch_logps"](logits, target)
    assert_same(sums, plain_log_probs(logits[:, :-1], target[:, 1:]).sum(-1), logits)
    assert lengths.tolist() == [int((row[1:] != -100).sum()) for row in target]
    index = target.clamp(min=0)
    assert_same(others["log_probs_from_logits"](logits, index, 0.7), plain_log_probs(logits, index, 0.7), logits)
    assert_same(others["compute_log_probs"](logits, index), plain_log_probs(logits, index), logits)


# Losses ---------------------------------------------------------------------------------------------------------------


def both_of(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of npu_xent, and those of the formula."""
    return npu_xent.token_log_probs(logits, target), plain_log_probs(logits, target)


def test_ppo_and_grpo(logits: Tensor, target: Tensor) -> None:
    names = functions("PPO and GRPO")
    mask = target != -100
    new, entropy, _ = npu_xent.token_log_probs(logits, target, return_entropy=True)
    (old, p_old), (reference, p_reference) = (
        both_of(logits.detach() + 0.3 * random_logits(seed), target) for seed in (1, 2)
    )
    advantages = names["group_advantages"](torch.tensor([[0.0, 1.0], [2.0, 3.5]])).view(4, 1)
    torch.testing.assert_close(advantages.squeeze(1), torch.tensor([-1.0, 1.0, -1.0, 1.0]) / 2**0.5, rtol=1e-3, atol=0)
    loss = names["policy_loss"](new, old, reference, advantages, entropy, mask, 0.2, 0.05, 0.01)

    total = torch.zeros((), dtype=torch.float64)
    p, p_old, p_reference = plain_log_probs(logits, target).exp(), p_old.exp(), p_reference.exp()
    clipped = [0, 0]
    for row, time in mask.nonzero().tolist():
        ratio, advantage = p[row, time] / p_old[row, time], advantages[row, 0].double()
        # A ratio has no gradient where it has moved past the clip range in the direction that the advantage favours.
        bound = 1.2 if advantage > 0 else 0.8
        passed = ratio > bound if advantage > 0 else ratio < bound
        clipped[int(advantage > 0)] += int(passed)
        total = total - advantage * (bound if passed else ratio)
        share = p_reference[row, time] / p[row, time]
        total = total + 0.05 * (share - 1 - share.log())
    truth = (total - 0.01 * plain_entropy(logits, target).sum()) / mask.sum()
    assert min(clipped) > 0
    assert_same(loss, truth, logits)


def pair_of(logits: Tensor, target: Tensor, mean: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Of the chosen and the rejected sequences: sums or means over the tokens, npu_xent's and the formula's."""
    lengths = (target != -100).sum(-1) if mean else torch.ones(len(target))
    got, truth = (log_probs.sum(-1) / lengths for log_probs in both_of(logits, target))
    return list(got.chunk(2)), list(truth.chunk(2))


def test_dpo(logits: Tensor, target: Tensor) -> None:
    got, (chosen, rejected) = pair_of(logits, target, mean=False)
    reference, (r_chosen, r_rejected) = pair_of(random_logits(1), target, mean=False)
    loss = functions("DPO")["dpo_loss"](*got, *reference, beta=0.3)
    odds = (chosen.exp() / r_chosen.exp() / (rejected.exp() / r_rejected.exp())) ** 0.3
    assert_same(loss, -(odds / (1 + odds)).log().mean(), logits)


def test_orpo(logits: Tensor, target: Tensor) -> None:
    got, truth = pair_of(logits, target, mean=True)
    loss = functions("ORPO")["orpo_loss"](*got, beta=0.3)
    chosen, rejected = (log_prob.exp() for log_prob in truth)
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    assert_same(loss, -(chosen.log() + 0.3 * (ratio / (1 + ratio)).log()).mean(), logits)


def test_simpo(logits: Tensor, target: Tensor) -> None:
    got, (chosen, rejected) = pair_of(logits, target, mean=True)
    loss = functions("SimPO")["simpo_loss"](*got, beta=1.5, gamma=0.4)
    assert_same(loss, (1 + (0.4 - 1.5 * (chosen - rejected)).exp()).log().mean(), logits)


def test_kto(logits: Tensor, target: Tensor) -> None:
    desirable = torch.tensor([True, False, True, False])
    got, truth = (log_probs.sum(-1) for log_probs in both_of(logits, target))
    reference, r_truth = (log_probs.sum(-1) for log_probs in both_of(random_logits(1), target))
    loss = functions("KTO")["kto_loss"](got, reference, desirable, torch.tensor(0.7), 0.3, 1.1, 0.9)
    terms = []
    for wanted, ratio in zip(desirable.tolist(), truth - r_truth, strict=True):
        value = 1 / (1 + (-0.3 * (ratio - 0.7)).exp())
        terms.append(1.1 * (1 - value) if wanted else 0.9 * value)
    assert_same(loss, torch.stack(terms).mean(), logits)


def test_sft(logits: Tensor, target: Tensor) -> None:
    labels = target.clone()
    labels[0, 1:3] = logits[0, 0:2].argmax(-1)  # predicted
    loss, logs = functions("Token accuracy of SFT")["sft_step"](logits, labels)
    rows, classes = logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    assert_same(loss, F.cross_entropy(rows, classes), logits)
    kept = classes != -100
    accuracy = (rows.argmax(-1) == classes)[kept].double().mean()
    assert accuracy > 0
    torch.testing.assert_close(logs["accuracy"].double(), accuracy)
    entropy = torch.distributions.Categorical(logits=rows[kept]).entropy().mean()
    torch.testing.assert_close(logs["entropy"].double(), entropy, rtol=2e-6, atol=0.0)
    assert not logs["entropy"].requires_grad


def test_distillation(logits: Tensor, target: Tensor) -> None:
    names = functions("Top-k distillation")
    teacher_logits, mask = random_logits(1), target != -100
    index, teacher = names["top_k_of"](teacher_logits, 5)
    loss = names["distillation_loss"](logits, index, teacher, mask)
    p, q = logits.double().softmax(-1), teacher_logits.double().softmax(-1)
    best = q >= q.topk(5).values[..., -1:]
    divergence = torch.where(best, q * (q / p).log(), 0.0).sum(-1)
    assert_same(loss, divergence[mask].mean(), logits)


# Training -------------------------------------------------------------------------------------------------------------

ROLLOUTS, UPDATES, GROUPS, SAMPLES, PROMPT, LENGTH, VOCABULARY = 10, 2, 4, 8, 4, 16, 256
TEMPERATURE = 0.8

Score = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]  # model, tokens, target -> log-probs, entropy
Batch = tuple[Tensor, Tensor, Tensor]  # tokens, target, advantages


def by_formula(model: Any, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (model(tokens) / TEMPERATURE).log_softmax(-1)
    kept = target != -100
    log_probs = log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return log_probs * kept, -(log_p.exp() * log_p).sum(-1) * kept


def by_token_log_probs(model: Any, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    out = npu_xent.token_log_probs(model(tokens), target, temperature=TEMPERATURE, return_entropy=True)
    return out.log_probs, out.entropy


def by_linear_token_log_probs(model: Any, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = model.hidden(tokens), model.token.weight
    out = npu_xent.linear_token_log_probs(
        hidden, weight, target, temperature=TEMPERATURE, return_entropy=True, chunk_rows=100
    )
    return out.log_probs, out.entropy


@pytest.fixture(scope="module")
def lm_model() -> ModuleType:
    """The model of examples/train_lm.py."""
    spec = importlib.util.spec_from_file_location("lm_model", ROOT / "examples" / "lm" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(model: Any, number: int, group_advantages: Callable[[Tensor], Tensor]) -> Batch:
    """Completions of random prompts, of random length. The reward is the share of even tokens in a completion."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (GROUPS, PROMPT), generator=generator).repeat_interleave(SAMPLES, 0)
    while tokens.shape[1] < LENGTH:
        p = (model(tokens)[:, -1] / TEMPERATURE).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], 1)
    ends = torch.randint(PROMPT + 4, LENGTH + 1, (len(tokens), 1), generator=generator)
    position = torch.arange(LENGTH)
    completion = (position >= PROMPT) & (position < ends)
    labels = tokens.where(completion, -100)
    rewards = ((tokens % 2 == 0) & completion).sum(1) / completion.sum(1)
    return tokens, F.pad(labels[:, 1:], (0, 1), value=-100), group_advantages(rewards.view(GROUPS, SAMPLES)).view(-1, 1)


class Trained:
    """Twenty steps of GRPO with the loss of the page, on the batches given or on batches that the policy samples."""

    def __init__(self, lm_model: ModuleType, score: Score, batches: list[Batch] | None = None) -> None:
        names = functions("PPO and GRPO")
        policy_loss = names["policy_loss"]
        torch.manual_seed(0)
        self.policy, reference = (lm_model.GPT(VOCABULARY, LENGTH, layers=2, heads=2, width=32) for _ in range(2))
        reference.load_state_dict(self.policy.state_dict())
        # Adam divides gradients by their size, so where they are near 0 it would amplify the roundings of all.
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=0.3, momentum=0.9)
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        self.clipped = 0
        for rollout in range(ROLLOUTS):
            with torch.no_grad():
                batch = batches[rollout] if batches else sample(self.policy, rollout, names["group_advantages"])
                tokens, target, advantages = batch
                (old, _), (fixed, _) = (score(model, tokens, target) for model in (self.policy, reference))
            self.batches.append(batch)
            mask = target != -100
            for _ in range(UPDATES):
                new, entropy = score(self.policy, tokens, target)
                loss = policy_loss(new, old, fixed, advantages, entropy, mask, 0.1, 0.04, 0.01)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                optimizer.step()
                self.losses.append(loss.item())
                self.clipped += int((((new - old).exp() - 1).abs() > 0.1).sum())

    def distance(self, other: Trained) -> tuple[float, float]:
        """The largest difference of the losses, and of the weights relative to the largest weight of their tensor."""
        losses = max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))
        pairs = zip(self.policy.parameters(), other.policy.parameters(), strict=True)
        return losses, max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.fixture(scope="module")
def plain(lm_model: ModuleType) -> Trained:
    return Trained(lm_model, by_formula)


def test_the_plain_formula_learns(plain: Trained) -> None:
    """The reward rises, ratios leave the clip range, and the policy leaves the reference."""
    assert len(plain.losses) == 20
    shares = [((target % 2 == 0) & (target >= 0)).sum() / (target >= 0).sum() for _, target, _ in plain.batches]
    assert shares[-1] > shares[0] + 0.1
    assert plain.clipped > 100


@pytest.mark.parametrize("score", [by_token_log_probs, by_linear_token_log_probs])
def test_a_policy_trains_as_with_the_plain_formula(score: Score, plain: Trained, lm_model: ModuleType) -> None:
    losses, weights = Trained(lm_model, score, plain.batches).distance(plain)
    assert losses <= 1e-5
    assert weights <= 1e-5


@pytest.mark.parametrize("wrong", ["no gradient of the entropy", "entropy of z times 1.001", "no temperature"])
def test_the_tolerance_sees(wrong: str, plain: Trained, lm_model: ModuleType) -> None:
    def score(model: Any, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, entropy = by_formula(model, tokens, target)
        if wrong == "no temperature":
            return npu_xent.token_log_probs(model(tokens), target), entropy
        return log_probs, entropy.detach() if wrong == "no gradient of the entropy" else 1.001 * entropy

    assert Trained(lm_model, score, plain.batches).distance(plain)[1] > 2e-5
