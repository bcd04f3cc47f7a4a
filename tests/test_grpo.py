"""examples/grpo.py: the reward rises, and both losses give the same run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_xent

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = 20
FLAGS = f"--steps {STEPS} --vocab-size 64 --width 16 --lr 0.02 --temperature 0.9".split()
LINE = re.compile(
    r"step (\d+): reward (\d\.\d+), loss (-?\d\.\d+), entropy (\d\.\d+), \d+\.\d+ s/step, peak [1-9]\d* MiB"
)


def run(loss: str, capsys: pytest.CaptureFixture[str]) -> list[tuple[float, ...]]:
    """Step, reward, loss and entropy of each line that it prints."""
    with torch.random.fork_rng():
        assert importlib.import_module("grpo").main([*FLAGS, "--loss", loss]) == 0
    matches = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    return [tuple(float(number) for number in match.groups()) for match in matches if match]


def test_both_losses_learn_alike(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    calls, function = [], npu_xent.linear_token_log_probs

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return function(*arguments, **options)

    monkeypatch.setattr(npu_xent, "linear_token_log_probs", counted)
    theirs = run("torch", capsys)
    assert not calls
    ours = run("npu_xent", capsys)
    assert len(calls) == 2 * STEPS
    for lines in (theirs, ours):
        steps, rewards, _, entropies = zip(*lines, strict=True)
        assert steps == (1, 10, STEPS)
        assert 0.3 < rewards[0] < 0.7
        assert rewards[-1] > 0.9
        assert entropies[-1] < entropies[0] - 1
    # The loss of the second update, so of the gradient of the first. Later, rounding may change a token.
    assert ours[0] == pytest.approx(theirs[0], abs=2e-5, rel=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--group", "1"], "--group 1: advantages compare completions of a prompt; use 2 or more"),
        (["--width", "30"], "--width 30: not a multiple of the 4 heads; change it"),
        (["--device", "tpu"], "--device tpu: unknown; use cpu, npu or cuda"),
    ],
)
def test_flags_are_checked(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit):
        importlib.import_module("grpo").main(flags)
    assert said in capsys.readouterr().err
