"""examples/finetune_hf.py: the three losses give the same run of Trainer, and two of them are npu_xent's."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from frameworks import Calls, import_without_torch_npu
from processes import finish

import npu_xent

pytest.importorskip("tokenizers", reason="needs tokenizers")
pytest.importorskip("accelerate", reason="needs accelerate, which transformers' Trainer needs")
if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS, VOCAB = 8, 600
FLAGS = f"--vocab-size {VOCAB} --batch 2 --lr 0.01 --print-every 1".split()
LOSSES = ("hf", "npu_xent", "fused")
SECONDS = 240  # of the comparison in processes, on a busy machine
# The operators that each loss calls in its forwards.
CALLS = {"hf": {}, "npu_xent": {"row_stats_grad": STEPS}, "fused": {"linear_row_stats_grad": STEPS}}


class Run(NamedTuple):
    """The loss of each step, and how often our operators were called."""

    losses: list[float]
    calls: Counter[str]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """With a text and a cache of their own."""
    folder = tmp_path_factory.mktemp("finetune")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=1 + i % 7)) for i in range(200)]
    for name in ("a", "b"):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / name).write_text(" ".join(draw.choices(words, weights=range(200, 0, -1), k=4000)))
    return [*FLAGS, f"--data={folder / 'text'}", f"--cache={folder / 'cache'}"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def ran(
    request: pytest.FixtureRequest, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Run]]:
    """The dtype, and what each loss gave."""
    result, runs = tmp_path_factory.mktemp("result") / "result.json", {}
    import_without_torch_npu("transformers", "transformers.trainer", "accelerate")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.syspath_prepend(EXAMPLES)
        patch.setitem(sys.modules, "torch_npu", None)  # as main sets it, and undone
        main = importlib.import_module("finetune_hf").main
        for loss in LOSSES:
            with Calls() as seen:
                arguments = [f"--loss={loss}", f"--dtype={request.param}", f"--steps={STEPS}", f"--result={result}"]
                assert main([*flags, *arguments]) == 0
            written = json.loads(result.read_text())
            assert written["seconds"] > 0
            assert written["mebibytes"] >= 0
            runs[loss] = Run(written["losses"], seen.of)
    return request.param, runs


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_its_name(loss: str, ran: tuple[str, dict[str, Run]]) -> None:
    assert ran[1][loss].calls == CALLS[loss]


def test_the_losses_agree(ran: tuple[str, dict[str, Run]]) -> None:
    dtype, runs = ran
    theirs = runs["hf"].losses
    assert len(theirs) == STEPS
    assert theirs[0] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert theirs[-1] < theirs[0] - 0.5
    for loss in ("npu_xent", "fused"):
        assert runs[loss].losses == pytest.approx(theirs, abs=1e-4 if dtype == "float32" else 1e-2, rel=0)


def test_the_comparison_is_drawn(flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = [str(Path(npu_xent.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    plot = tmp_path / "losses.png"
    command = [sys.executable, "-W", "ignore", "finetune_hf.py", *flags, "--steps=2", f"--compare={plot}"]
    process = subprocess.Popen(
        command,
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = finish(process, SECONDS).splitlines()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {plot}" in said
    assert [line.split()[1] for line in said if line.startswith("--loss")] == [f"{loss}," for loss in LOSSES]
    for step in (1, 2):  # printed with four digits
        losses = [float(line.split()[-1]) for line in said if line.startswith(f"step {step}: loss")]
        assert losses == pytest.approx([losses[0]] * 3, abs=2e-4, rel=0)
        assert len(losses) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vocab-size=9"], "--vocab-size 9: the 256 bytes and <|endoftext|> alone are 257 tokens; ask for more"),
        (["--loss=other"], "argument --loss: invalid choice: 'other'"),
    ],
)
def test_flags_are_checked(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit):
        importlib.import_module("finetune_hf").main(arguments)
    assert said in capsys.readouterr().err
