"""examples/train_lm.py as a user runs it: losses learn, interruption changes no bit, two ranks are one run.

Each run is a subprocess with a tiny model, for signals, exit codes and process groups are what is tested.
Most of the time goes into importing torch, so runs that do not need each other go side by side. With --device npu, the
runs on the device are held against the CPU's.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lm.py"
LOSSES = ("torch", "npu_xent", "npu_xent_strict")
TINY = ["--vocab-size=512", "--context=32", "--width=32", "--layers=2", "--batch=4", "--lr=0.01"]
STEPS = 120  # enough to be interrupted half-way

Start = Callable[..., "subprocess.Popen[str]"]
Runs = dict[str, tuple[Path, int, str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts the script on a small generated text: start(out, *flags, launcher=...)."""
    folder = tmp_path_factory.mktemp("text")
    words = ["".join(random.Random(i).choices("abcdefgh", k=1 + i % 7)) for i in range(200)]
    for name in range(5):
        text = " ".join(random.Random(f"{name}").choices(words, weights=range(200, 0, -1), k=3000))
        (folder / f"{name}.txt").write_text(text)
    (folder / "binary.dat").write_bytes(b"\xff\xfe\x00not text")
    cache = tmp_path_factory.mktemp("cache")

    # The script must find the npu_xent that these tests import, be it installed or built in place.
    spec = importlib.util.find_spec("npu_xent")
    path = [str(Path(spec.origin).parents[1])] if spec and spec.origin else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("WORLD_SIZE", None)

    def start(out: Path, *flags: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, str(SCRIPT), "--data", str(folder), "--cache", str(cache)]
        command += ["--out", str(out), *TINY, *flags]  # a flag given twice: the last one counts
        output = subprocess.PIPE
        return subprocess.Popen(command, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT)

    return start


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def losses_of(out: Path) -> list[str]:
    """The losses in metrics.csv as they are written; exactly one line for each step, in order."""
    header, *lines = (out / "metrics.csv").read_text().splitlines()
    assert header == "step,loss,tokens_per_s,peak_mb"
    rows = [line.split(",") for line in lines]
    assert [row[0] for row in rows] == [str(step) for step in range(len(rows))]
    assert all(float(rate) > 0 and float(peak) > 0 for _, _, rate, peak in rows)
    return [row[1] for row in rows]


@pytest.fixture(scope="module")
def runs(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """An uninterrupted run with each loss: its folder, exit code and output."""
    folder = tmp_path_factory.mktemp("runs")
    processes = {loss: start(folder / loss, "--loss", loss, "--steps", str(STEPS)) for loss in LOSSES}
    outputs = {loss: process.communicate(timeout=120)[0] for loss, process in processes.items()}
    return {loss: (folder / loss, processes[loss].returncode, outputs[loss]) for loss in LOSSES}


@pytest.mark.cpu
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_learns_and_leaves_its_files(runs: Runs, loss: str) -> None:
    out, code, output = runs[loss]
    assert code == 0, output
    losses = [float(value) for value in losses_of(out)]
    summary = json.loads((out / "summary.json").read_text())
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(512), abs=0.1)  # nothing learnt yet
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert summary["uniform_loss"] == math.log(512)
    assert summary["unigram_loss"] < summary["uniform_loss"]
    assert summary["validation_loss"] < losses[0] - 1
    assert f"Validation loss {summary['validation_loss']:.3f}" in output
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoint.pt").is_file()


@pytest.mark.cpu
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_the_losses_are_those_of_torch(runs: Runs, loss: str) -> None:
    """At first: each step multiplies what rounding makes of the gradients."""
    ours, torchs = ([float(value) for value in losses_of(runs[name][0])[:15]] for name in (loss, "torch"))
    assert len(ours) == 15
    assert ours == pytest.approx(torchs, abs=1e-4, rel=0)


def stop(process: subprocess.Popen[str], out: Path, number: signal.Signals) -> int:
    """Sends the signal in the middle of training, to which it must save and stop. Returns the steps done."""
    deadline = time.monotonic() + 60
    while not ((out / "metrics.csv").is_file() and (out / "metrics.csv").read_text().count("\n") > 10):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, finish(process)
        time.sleep(0.002)
    process.send_signal(number)
    output = finish(process, 128 + number)
    steps = len(losses_of(out))
    assert 10 <= steps < STEPS
    assert f"Stopped by {number.name} and saved, after {steps} of {STEPS} steps. To resume, add" in output
    assert (out / "checkpoint.pt").is_file()
    assert not (out / "summary.json").exists()
    return steps


@pytest.mark.cpu
def test_interrupted_and_resumed_is_bitwise_uninterrupted(start: Start, runs: Runs, tmp_path: Path) -> None:
    whole, parts, ended = runs["npu_xent"][0], tmp_path / "parts", tmp_path / "ended"
    steps = stop(start(parts, "--loss", "npu_xent", "--steps", str(STEPS)), parts, signal.SIGINT)
    with (parts / "metrics.csv").open("a") as file:  # as after a crash: a later step, and a line cut short
        file.write(f"{steps},9.9,1.0,1.0\n{steps + 1},9")
    resumed = start(parts, "--resume")  # the other settings are the checkpoint's
    stop(start(ended, "--loss", "torch", "--steps", str(STEPS)), ended, signal.SIGTERM)
    assert f"checkpoint.pt after {steps} of {STEPS} steps" in finish(resumed)
    assert losses_of(parts) == losses_of(whole)
    ends = [json.loads((out / "summary.json").read_text())["validation_loss"] for out in (parts, whole)]
    assert ends[0] == ends[1]


@pytest.mark.cpu
def test_two_ranks_average_their_own_windows(start: Start, runs: Runs, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    output = finish(start(tmp_path, "--loss", "torch", "--steps", "12", launcher=launcher))
    losses = losses_of(tmp_path)
    assert len(losses) == 12
    assert output.count("Validation loss") == 1  # rank 0 alone speaks and writes
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"checkpoint.pt", "loss.png", "metrics.csv", "summary.json"}
    assert json.loads((tmp_path / "summary.json").read_text())["ranks"] == 2
    assert losses[0] != losses_of(runs["torch"][0])[0]  # rank 1 brings windows of its own


@pytest.mark.cpu
def test_errors_name_the_flag_the_value_and_the_way_out(start: Start, tmp_path: Path) -> None:
    missing = tmp_path / "no-such-folder"
    out = tmp_path / "out"
    processes = start(out, "--loss", "torch", "--data", str(missing)), start(out, "--resume")
    data, resume = (finish(process, 2) for process in processes)
    assert f"error: --data {missing}: no such file or folder; name one" in data
    assert f"error: --resume: there is no {out / 'checkpoint.pt'}; name the run's folder" in resume
    assert "Traceback" not in data + resume


@pytest.mark.npu
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_the_losses_on_the_device_are_the_cpus(
    loss: str, device: torch.device, simulated: bool, start: Start, tmp_path: Path
) -> None:
    """Both draw weights and data on the CPU. Resuming what has ended validates what was saved."""
    # Simulated runs also fail for device memory that they leave in use.
    launcher = ("-m", "cann_sim", "--leaks") if simulated else ()
    here, there, flags = tmp_path / "cpu", tmp_path / "device", ("--loss", loss, "--steps", "30")
    finish(start(here, *flags))
    output = finish(start(there, *flags, "--device", str(device), launcher=launcher))
    assert f"on {device.type}:{device.index or 0} in fp32" in output
    assert "kernels are not in use" not in output
    expected, actual = ([float(value) for value in losses_of(out)] for out in (here, there))
    assert len(actual) == 30
    assert actual == pytest.approx(expected, abs=1e-3, rel=0)
    summary = (there / "summary.json").read_text()
    assert "after 30 of 30 steps" in finish(start(there, "--resume", launcher=launcher))
    ends = [json.loads(text)["validation_loss"] for text in (summary, (there / "summary.json").read_text())]
    assert ends[0] == ends[1]
    assert ends[0] == pytest.approx(json.loads((here / "summary.json").read_text())["validation_loss"], abs=1e-3)
