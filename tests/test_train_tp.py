"""examples/train_tp.py: with one and with two ranks its losses are those of train_lm.py with PyTorch's loss."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import finish, stop
from torch import nn

import npu_xent

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")  # train_lm.py's

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TOKENS = 511  # of which the first of two ranks has one more
STEPS = 50
# Small enough to be quick. The norm of the gradients is above 1 in every step, so that each of them is clipped.
FLAGS = f"--steps {STEPS} --vocab-size {TOKENS} --context 32 --width 64 --layers 2 --batch 1 --lr 0.01".split()
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_tp.py")
SECONDS = 120  # of the run with two ranks


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], str]]:
    """The losses of each run, and what it printed. Two ranks run beside those that need one process, this one."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=1 + i % 7)) for i in range(200)]
    for name in "ab":
        (folder / "text" / name).write_text(" ".join(draw.choices(words, weights=range(200, 0, -1), k=4000)))
    path = [str(Path(npu_xent.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    said = {}

    def flags(run: str) -> list[str]:
        return [*FLAGS, f"--data={folder / 'text'}", f"--cache={folder / 'cache'}", f"--out={folder / run}"]

    two_ranks = subprocess.Popen(
        [sys.executable, *TORCHRUN, *flags("two ranks")],
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
            patch.syspath_prepend(EXAMPLES)
            patch.delenv("WORLD_SIZE", raising=False)
            for run, program, more in (("train_lm", "train_lm", ["--loss=torch"]), ("one process", "train_tp", [])):
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    assert importlib.import_module(program).main([*flags(run), *more]) == 0
                said[run] = printed.getvalue()
        said["two ranks"] = finish(two_ranks, SECONDS)
    finally:
        stop(two_ranks)
    lines = {run: (folder / run / "metrics.csv").read_text().splitlines()[1:] for run in said}
    return {run: ([float(line.split(",")[1]) for line in lines[run]], said[run]) for run in said}


@pytest.mark.parametrize("name", ["one process", "two ranks"])
def test_the_losses_are_those_of_one_process_with_whole_logits(
    name: str, ran: dict[str, tuple[list[float], str]]
) -> None:
    (losses, said), (expected, _) = ran[name], ran["train_lm"]
    assert losses[0] == pytest.approx(math.log(TOKENS), abs=0.1)
    assert losses[-1] < losses[0] - 1
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, abs=1e-4, rel=0)
    assert f"rank 0 has {256 if name == 'two ranks' else TOKENS} of {TOKENS} tokens" in said
    assert "Replicated parameters that differ between ranks: 0" in said


def test_a_rank_without_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.chunk makes 3 chunks of 2 of them, not 4."""
    monkeypatch.syspath_prepend(EXAMPLES)
    train_tp, processes, settings = (importlib.import_module(n) for n in ("train_tp", "lm.processes", "lm.settings"))
    world = processes.World(0, 0, 4, True)
    assert train_tp.ShardedEmbedding(nn.Embedding(7, 2), world).weight.shape == (2, 2)
    with pytest.raises(settings.SettingError, match="4 ranks: a vocabulary of 6 has no chunk for each; use fewer"):
        train_tp.ShardedEmbedding(nn.Embedding(6, 2), world)


def test_flags_are_checked_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        importlib.import_module("train_tp").main(["--width", "30"])
    assert "--width 30: not a multiple of --heads 4; change one of them" in capsys.readouterr().err
