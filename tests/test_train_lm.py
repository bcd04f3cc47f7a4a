"""examples/train_lm.py as a user runs it: losses learn, interruption changes no bit, two ranks are one run.

Each run is a subprocess with a tiny model, for signals, exit codes and process groups are what is tested.
Most of the time goes into importing torch, so runs that do not need each other go side by side. With --device npu, the
runs on the device are held against the CPU's.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import aborted_at_exit

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_lm.py"
LOSSES = ("torch", "npu_xent", "npu_xent_strict")
TINY = ["--vocab-size=512", "--context=32", "--width=32", "--layers=2", "--batch=4", "--lr=0.01"]
FILES = {"checkpoint.pt", "loss.png", "metrics.csv", "summary.json"}  # of a run
STEPS = 120  # enough to be interrupted half-way
PATIENCE = 300  # seconds, after which a run counts as hung; busy machines are slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

Start = Callable[..., "subprocess.Popen[str]"]
Refused = Callable[..., str]
AsPrinted = Callable[[str], "subprocess.Popen[str]"]
Runs = dict[str, tuple[Path, int, str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small generated texts."""
    folder = tmp_path_factory.mktemp("text")
    words = ["".join(random.Random(i).choices("abcdefgh", k=1 + i % 7)) for i in range(200)]
    for name in range(5):
        text = " ".join(random.Random(f"{name}").choices(words, weights=range(200, 0, -1), k=3000))
        (folder / f"{name}.txt").write_text(text)
    (folder / "binary.dat").write_bytes(b"\xff\xfe\x00not text")
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    # The script must find the npu_xent that these tests import, be it installed or built in place.
    spec = importlib.util.find_spec("npu_xent")
    path = [str(Path(spec.origin).parents[1])] if spec and spec.origin else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("WORLD_SIZE", None)
    return environment


@pytest.fixture(scope="module")
def start(text: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts the script on the text: start(out, *flags, launcher=...)."""
    cache = tmp_path_factory.mktemp("cache")

    def start(out: Path, *flags: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, str(SCRIPT), "--data", str(text), "--cache", str(cache)]
        command += ["--out", str(out), *TINY, *flags]  # a flag given twice: the last one counts
        output = subprocess.PIPE
        return subprocess.Popen(command, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT)

    return start


@pytest.fixture
def as_printed(environment: dict[str, str]) -> AsPrinted:
    """Starts a command that the script has printed, as a user who copies it into a shell does."""

    def start(command: str) -> subprocess.Popen[str]:
        output = subprocess.PIPE
        return subprocess.Popen(
            command, shell=True, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT
        )

    return start


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code or (code == 0 and aborted_at_exit(process.returncode, output)), output
    return output


def cut_short(path: Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return "BadZipFile"


def empty(path: Path) -> str:
    os.truncate(path, 0)
    return "BadZipFile"


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    return "a checksum is wrong"


def replace(path: Path) -> str:
    torch.save({"step": 3, "train": torch.zeros(4)}, path)
    return "something is missing"


# What each does to a file, and the reason that is then given for not loading it.
DAMAGES = {"cut short": cut_short, "empty": empty, "a bit is flipped": flip_a_bit, "of another program": replace}


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
    outputs = {loss: process.communicate(timeout=PATIENCE)[0] for loss, process in processes.items()}
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
@pytest.mark.parametrize("seconds", [0, 3600])
def test_in_a_log_progress_is_a_line_now_and_then(
    seconds: int, text: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    program = f"import train_lm; train_lm.SECONDS_BETWEEN_LINES = {seconds}; train_lm.main()"
    flags = ["--data", str(text), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), *TINY]
    run = subprocess.run(
        [sys.executable, "-c", program, *flags, "--loss", "torch", "--steps", "12"],
        cwd=SCRIPT.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" of 12: loss ") == (12 if seconds == 0 else 0)
    assert "\r" not in run.stdout + run.stderr


@pytest.mark.cpu
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_the_losses_are_those_of_torch(runs: Runs, loss: str) -> None:
    """At first: each step multiplies what rounding makes of the gradients."""
    ours, torchs = ([float(value) for value in losses_of(runs[name][0])[:15]] for name in (loss, "torch"))
    assert len(ours) == 15
    assert ours == pytest.approx(torchs, abs=1e-4, rel=0)


def stop(process: subprocess.Popen[str], out: Path, number: signal.Signals, code: int | None = None) -> tuple[int, str]:
    """Sends the signal in the middle of training: it must save and stop. Returns the steps done and how to resume."""
    deadline = time.monotonic() + PATIENCE
    while not ((out / "metrics.csv").is_file() and (out / "metrics.csv").read_text().count("\n") > 10):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, finish(process)
        time.sleep(0.002)
    process.send_signal(number)
    output = finish(process, 128 + number if code is None else code)
    steps = len(losses_of(out))
    assert 10 <= steps < STEPS
    said, _, command = output.partition("To resume:\n")
    assert f"Stopped by {number.name} and saved, after {steps} of {STEPS} steps. " in said
    assert (out / "checkpoint.pt").is_file()
    assert not (out / "summary.json").exists()
    return steps, command.partition("\n")[0]


@pytest.mark.cpu
def test_interrupted_and_resumed_is_bitwise_uninterrupted(
    start: Start, as_printed: AsPrinted, runs: Runs, tmp_path: Path
) -> None:
    """Resumed by the command that it printed, for a folder whose name a shell would split."""
    whole, parts, ended = runs["npu_xent"][0], tmp_path / "it's in parts", tmp_path / "ended"
    steps, command = stop(start(parts, "--loss", "npu_xent", "--steps", str(STEPS)), parts, signal.SIGINT)
    with (parts / "metrics.csv").open("a") as file:  # as after a crash: a later step, and a line cut short
        file.write(f"{steps},9.9,1.0,1.0\n{steps + 1},9")
    resumed = as_printed(command)  # the other settings are the checkpoint's
    stop(start(ended, "--loss", "torch", "--steps", str(STEPS)), ended, signal.SIGTERM)
    assert f"checkpoint.pt after {steps} of {STEPS} steps" in finish(resumed)
    assert losses_of(parts) == losses_of(whole)
    ends = [json.loads((out / "summary.json").read_text())["validation_loss"] for out in (parts, whole)]
    assert ends[0] == ends[1]


@pytest.mark.cpu
def test_two_ranks_average_their_own_windows(start: Start, runs: Runs, tmp_path: Path) -> None:
    output = finish(start(tmp_path, "--loss", "torch", "--steps", "12", launcher=TORCHRUN))
    losses = losses_of(tmp_path)
    assert len(losses) == 12
    assert output.count("Validation loss") == 1  # rank 0 alone speaks and writes
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "summary.json").read_text())["ranks"] == 2
    assert losses[0] != losses_of(runs["torch"][0])[0]  # rank 1 brings windows of its own


@pytest.mark.cpu
def test_two_ranks_are_resumed_by_the_command_that_they_printed(
    start: Start, as_printed: AsPrinted, tmp_path: Path
) -> None:
    process = start(tmp_path, "--loss", "torch", "--steps", str(STEPS), launcher=TORCHRUN)
    _, command = stop(process, tmp_path, signal.SIGTERM, code=1)  # torchrun's own
    finish(as_printed(command))
    assert len(losses_of(tmp_path)) == STEPS
    assert json.loads((tmp_path / "summary.json").read_text())["ranks"] == 2


@pytest.mark.cpu
def test_a_finished_run_is_extended(start: Start, runs: Runs, tmp_path: Path) -> None:
    """Both ended in, or went through, the same warm-up, and have the same rates after it: those of 120 steps."""
    finish(start(tmp_path, "--loss", "npu_xent", "--steps", "20"))
    output = finish(start(tmp_path, "--resume", "--steps", str(STEPS)))
    assert f"checkpoint.pt after 20 of {STEPS} steps" in output
    assert f"From here on the learning rate is that of a run of {STEPS} steps" in output
    assert losses_of(tmp_path) == losses_of(runs["npu_xent"][0])
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == STEPS


# Damaged files, and a cache that cannot be written --------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_said_and_made_anew(
    damage: str, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    settings, data, processes = (importlib.import_module(f"lm.{name}") for name in ("settings", "data", "processes"))
    chosen = settings.build_parser("").parse_args(["--data", str(text), "--cache", str(tmp_path), *TINY])

    def load() -> tuple[list[int], str]:
        corpus = data.load_corpus(chosen, processes.World(0, 0, 1, False), None)
        return corpus.train.tolist(), capsys.readouterr().out

    whole, output = load()
    (cached,) = tmp_path.iterdir()
    assert f"and is cached in {cached}" in output
    reason = DAMAGES[damage](cached)
    again, output = load()
    assert f"The cached {cached} cannot be loaded ({reason}), so the text is tokenised again" in output
    assert again == whole
    again, output = load()
    assert f"Using the tokenizer and token ids cached in {cached}" in output
    assert again == whole


class RunsCode:
    """Pickled, it is a call that writes a file, which torch.load(weights_only=False) makes."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.file, "written")


@pytest.mark.cpu
def test_a_file_with_code_is_damaged_and_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    checkpoint = importlib.import_module("lm.checkpoint")
    checkpoint.save_atomically(tmp_path / "file.pt", {"model": RunsCode(tmp_path / "trace")})
    with pytest.raises(checkpoint.DamagedFile, match="UnpicklingError"):
        checkpoint.load(tmp_path / "file.pt", ["model"])
    assert not (tmp_path / "trace").exists()


@pytest.mark.cpu
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "two ranks"])
def test_a_cache_that_cannot_be_written_is_said_first_and_done_without(
    launcher: tuple[str, ...], start: Start, runs: Runs, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    output = finish(
        start(tmp_path / "out", "--loss", "torch", "--steps", "2", "--cache", str(cache), launcher=launcher)
    )
    note = f"Note: --cache {cache}: {tmp_path / 'file'} is not a folder; name another folder, or every run"
    assert output.count("--cache") == output.count(note) == 1
    assert output.index(note) < output.index("Training a tokenizer")
    losses = losses_of(tmp_path / "out")
    assert len(losses) == 2
    if not launcher:
        assert losses == losses_of(runs["torch"][0])[:2]


@pytest.mark.cpu
def test_a_folder_without_permission_is_unwritable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked of the folder that exists. (Whoever runs this as root may write everywhere, hence no real one.)"""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    checkpoint = importlib.import_module("lm.checkpoint")
    missing = tmp_path / "not" / "yet"
    assert checkpoint.why_unwritable(missing) == ""
    assert not missing.parent.exists()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert checkpoint.why_unwritable(missing) == f"{tmp_path} cannot be written"


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> Callable[..., str]:
    """refused(*flags): what the script says when it refuses them, of which it must leave no trace in tmp_path."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    train_lm: ModuleType = importlib.import_module("train_lm")
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}

    def refused(*flags: str) -> str:
        before = files()
        folders = ["--cache", str(tmp_path / "cache" / "below"), "--out", str(tmp_path / "out" / "below")]
        with pytest.raises(SystemExit) as stopped:
            train_lm.main([*folders, "--loss", "torch", *flags])
        assert stopped.value.code == 2
        assert files() == before
        return capsys.readouterr().err.partition("error: ")[2]

    return refused


REFUSED = {  # flags, and what is said about them; {} is the test's folder
    "--lr 0": "argument --lr: invalid positive float value: '0'",
    "--seed 18446744073709551616": "argument --seed: invalid seed value: '18446744073709551616'",
    "--width 30 --heads 4": "--width 30: not a multiple of --heads 4; change one of them",
    "--vocab-size 256": "--vocab-size 256: the 256 bytes and <|endoftext|> alone are 257 tokens; ask for more",
    "--device tpu": "--device tpu: unknown; use cpu, npu or cuda",
    "--device cuda:99": "--device cuda:99: ",
    "--out {}/file": "--out {}/file: {}/file is not a folder; name a folder that can be written",
    "--out {}/file/below": "--out {}/file/below: {}/file is not a folder; name a folder that can be written",
    "--resume": "--resume: there is no {}/out/below/checkpoint.pt; name the run's folder with --out, or start without",
    "--data {}/missing": "--data {}/missing: no such file or folder; name one, or leave --data out",
    "--data {}/file": "--data {}/file: no UTF-8 text in its 1 file(s); name another",
    "--data {}/short.txt": "--context 128: the held-out text has only ",
}


@pytest.mark.cpu
@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_refused_leaves_nothing_behind(flags: str, refused: Refused, tmp_path: Path) -> None:
    """Neither the folder of the run nor the cache's; the message names the flag, the value and the way out."""
    (tmp_path / "file").touch()
    (tmp_path / "short.txt").write_text("to be or not to be " * 100)
    assert refused(*flags.format(tmp_path).split()).startswith(REFUSED[flags].format(*[tmp_path] * 2))


@pytest.mark.cpu
@pytest.mark.parametrize(
    "package, what", [("npu_xent", "--loss npu_xent"), ("tqdm", "training"), ("tokenizers", "token")]
)
def test_a_missing_package_leaves_nothing_behind(
    package: str, what: str, refused: Refused, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refused("--data", str(text), *TINY, "--loss", "npu_xent")
    assert message.startswith(what)
    assert "pip install" in message


@pytest.fixture
def finished(runs: Runs, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(runs["torch"][0], tmp_path / "finished")


@pytest.mark.cpu
def test_a_resumed_run_is_not_touched_by_what_is_refused(refused: Refused, finished: Path, tmp_path: Path) -> None:
    resume = ("--resume", "--out", str(finished))
    assert refused(*resume, "--width", "64").startswith(f"--width 64: the run in {finished} has 32; leave --width out")
    steps = refused(*resume, "--steps", "119")
    assert steps.startswith(f"--steps 119: the run in {finished} has taken 120 already; ask for more")
    (finished / "metrics.csv").write_text("step,loss,tokens_per_s,peak_mb\n0,6.2,1.0,1.0\n")
    assert f"{finished / 'metrics.csv'} has 1 of the 120 steps" in refused(*resume)


@pytest.mark.cpu
def test_a_run_whose_text_has_changed_is_not_touched(
    start: Start, refused: Refused, text: Path, tmp_path: Path
) -> None:
    data, out = shutil.copytree(text, tmp_path / "data"), tmp_path / "run"
    finish(start(out, "--data", str(data), "--loss", "torch", "--steps", "1"))
    (data / "1.txt").write_text("something else " * 1000)
    message = refused("--resume", "--out", str(out))
    assert message.startswith(f"--data {data}: its text has changed since the run started; bring it back")


@pytest.mark.cpu
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: str, refused: Refused, finished: Path) -> None:
    path = finished / "checkpoint.pt"
    reason = DAMAGES[damage](path)
    message = refused("--resume", "--out", str(finished))
    assert message.startswith(f"--resume: {path} cannot be loaded ({reason}): it is cut short, damaged, or not this")
    assert (
        "bring back a copy of it, or start again without --resume, which moves it to previous-checkpoint.pt" in message
    )


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """full_disk(n): from now on no file of this process may have more than n bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.cpu
@pytest.mark.parametrize("part", [0.0, 0.02, 0.6, 0.999])
def test_a_full_disk_leaves_the_file_as_it_was(
    part: float, full_disk: Callable[[int], None], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the error is the system's. A disk may fill at each byte of the file."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    checkpoint = importlib.import_module("lm.checkpoint")
    path = finished / "checkpoint.pt"
    before, content = path.read_bytes(), torch.load(path, weights_only=True)
    full_disk(int(part * len(before)))
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        checkpoint.save_atomically(path, content)
    assert path.read_bytes() == before
    assert {file.name for file in finished.iterdir()} == FILES


@pytest.mark.cpu
def test_a_full_disk_is_said(
    full_disk: Callable[[int], None],
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    train_lm = importlib.import_module("train_lm")
    path = finished / "checkpoint.pt"
    before = path.read_bytes()
    full_disk(len(before) // 2)
    with pytest.raises(SystemExit) as stopped:
        train_lm.main(["--resume", "--out", str(finished), "--steps", str(STEPS + 9), "--save-every", "3"])
    assert stopped.value.code == 2
    said = f"--out {finished} cannot be written ({os.strerror(errno.EFBIG)}), after {STEPS + 3} of {STEPS + 9} steps; "
    assert said + "make room there, and use --resume: the last checkpoint is whole" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.cpu
def test_what_a_killed_run_left_is_removed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "checkpoint.pt.12345.tmp").write_bytes(b"half a checkpoint")
    (finished / "mine.tmp").touch()
    monkeypatch.syspath_prepend(SCRIPT.parent)
    assert importlib.import_module("train_lm").main(["--resume", "--out", str(finished)]) == 0
    assert {path.name for path in finished.iterdir()} == FILES | {"mine.tmp"}


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


@pytest.mark.simulated
def test_a_simulated_run_is_resumed_by_the_command_that_it_printed(
    device: torch.device, start: Start, as_printed: AsPrinted, tmp_path: Path
) -> None:
    process = start(tmp_path, "--steps", str(STEPS), "--device", str(device), launcher=("-m", "cann_sim"))
    _, command = stop(process, tmp_path, signal.SIGINT)
    assert f"on {device.type}:{device.index or 0} in fp32" in finish(as_printed(command))
    assert len(losses_of(tmp_path)) == STEPS


@pytest.mark.npu
def test_a_device_that_does_not_exist_is_refused(refused: Refused, text: Path) -> None:
    count = torch.npu.device_count()
    message = refused("--data", str(text), *TINY, "--device", f"npu:{count}")
    assert message.startswith(f"--device npu:{count}: npu:{count}, but torch finds {count}; ")
