"""Train a small GPT to predict the next token, with npu_xent's fused cross entropy as the loss.

A complete training program, with checkpoints, resuming and data parallelism. `--loss torch` runs it with
F.cross_entropy for comparison. It needs tokenizers and tqdm, plots if matplotlib is installed, downloads nothing, and
takes about three minutes on two CPU cores:

    python examples/train_lm.py                                   # on the Python standard library's sources
    python examples/train_lm.py --data texts/ --out runs/mine     # on your own text; Ctrl-C saves and stops
    python examples/train_lm.py --out runs/mine --resume          # gives the same losses as without the stop
    python examples/train_lm.py --out runs/mine --resume --steps 600          # extends the run
    torchrun --nproc_per_node 8 examples/train_lm.py --device npu --dtype bf16
    python -m cann_sim examples/train_lm.py --device npu          # an NPU simulated on the host: slow, with checks

Read this file from the bottom up: main, train_and_report, and Run with the training loop. The loss is called in
Run.loss_of. The other parts are in the folder lm.
"""

from __future__ import annotations

import errno
import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

# Only --device npu imports torch_npu: without CANN, autoloading it would break `import torch`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
from torch import Tensor, nn

from lm.checkpoint import remove_leftovers, save_atomically, set_earlier_run_aside, storable, why_unwritable
from lm.data import VALIDATION_BATCHES, Corpus, load_corpus, training_batch, validation_batches
from lm.losses import make_loss
from lm.model import GPT
from lm.optimizer import learning_rate, make_optimizer
from lm.processes import StopSignal, World, command_line, open_device, peak_megabytes
from lm.report import first_metrics, truncate_metrics, write_report
from lm.settings import SettingError, Settings, build_parser, importing, read_settings

SECONDS_BETWEEN_LINES = 5.0

# What the system says of a folder that cannot be written any more.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


class Run:
    """The state of a run, which a checkpoint saves: model, optimizer and number of the next step."""

    def __init__(self, settings: Settings, corpus: Corpus, device: torch.device, world: World) -> None:
        self.settings, self.corpus, self.device, self.world = settings, corpus, device, world
        self.loss = make_loss(settings.loss)
        torch.manual_seed(settings.seed)
        gpt = GPT(corpus.vocab_size, settings.context, settings.layers, settings.heads, settings.width)
        self.gpt = gpt.to(device)  # initialised on the CPU, so identical on every device
        self.optimizer = make_optimizer(self.gpt, settings.lr)
        self.step = 0

    def loss_of(self, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of the model's predictions for a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
            logits = model(tokens.to(self.device))
            return self.loss(logits.view(-1, logits.shape[-1]), targets.to(self.device).view(-1))

    def take_step(self, model: nn.Module) -> float:
        """One optimizer step. Returns this rank's loss."""
        loss = self.loss_of(model, *training_batch(self.corpus, self.settings, self.step, self.world.rank))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def train(self) -> int:
        """Takes the remaining steps. Returns the signal that stopped the run early, or 0."""
        from tqdm import tqdm

        settings, world, writes = self.settings, self.world, self.world.rank == 0
        model = world.share(self.gpt, self.device)
        tokens, stopped_by = settings.batch * settings.context * world.size, 0
        on_terminal, said = sys.stderr.isatty(), time.monotonic()
        with (
            StopSignal() as stop,
            open(settings.out / "metrics.csv" if writes else os.devnull, "a", buffering=1) as metrics,
            tqdm(total=settings.steps, initial=self.step, unit="step", disable=not (writes and on_terminal)) as bar,
        ):
            while self.step < settings.steps and not stopped_by:
                start = time.perf_counter()
                loss = self.take_step(model)
                # Sum the losses, and whether a rank got a signal: all ranks must stop after the same step.
                told = [float(stop.number == number) for number in (signal.SIGINT, signal.SIGTERM)]
                loss, interrupted, terminated = world.sum([loss / world.size, *told], self.device)
                stopped_by = signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0
                rate, peak = tokens / (time.perf_counter() - start), peak_megabytes(self.device)
                metrics.write(f"{self.step - 1},{loss!r},{rate:.1f},{peak:.1f}\n")
                progress = f"loss {loss:.3f}, {rate:,.0f} tokens/s, peak {peak:,.0f} MB"
                bar.set_postfix_str(progress, False)
                bar.update()
                if not on_terminal and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    world.say(f"step {self.step} of {settings.steps}: {progress}")
                due = self.step % settings.save_every == 0 or self.step == settings.steps
                if writes and (due or stopped_by):
                    self.save()
        return stopped_by

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over batches of held-out text."""
        batches = validation_batches(self.corpus, self.settings)
        return statistics.fmean(self.loss_of(self.gpt, *batch).item() for batch in batches)

    def save(self) -> None:
        content = {
            "step": self.step,
            "model": self.gpt.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": storable(vars(self.settings)),
            "corpus": self.corpus.key,
            "ranks": self.world.size,
        }
        save_atomically(self.settings.out / "checkpoint.pt", content)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["ranks"] != self.world.size:
            self.world.say(
                f"Note: {checkpoint['ranks']} rank(s) before and {self.world.size} now, so the "
                "batches differ from an uninterrupted run's"
            )
        self.gpt.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step = checkpoint["step"]
        steps = self.settings.steps
        self.world.say(f"Resuming {self.settings.out / 'checkpoint.pt'} after {self.step} of {steps} steps")
        if steps != checkpoint["settings"]["steps"]:
            self.world.say(f"From here on the learning rate is that of a run of {steps} steps")

    def report(self) -> None:
        """Prints the validation loss with two baselines, the unigram and the uniform distribution."""
        say = self.world.say
        say(f"Validating on {VALIDATION_BATCHES} batches of held-out text ...")
        validation, unigram, uniform = self.validate(), self.corpus.unigram_loss(), math.log(self.corpus.vocab_size)
        say(
            f"Validation loss {validation:.3f} nats per token; unigram baseline {unigram:.3f}, "
            f"uniform baseline ln V {uniform:.3f}"
        )
        summary = {
            "validation_loss": validation,
            "unigram_loss": unigram,
            "uniform_loss": uniform,
            "steps": self.step,
            "loss": self.settings.loss,
            "device": str(self.device),
            "dtype": self.settings.dtype,
            "ranks": self.world.size,
            "vocab_size": self.corpus.vocab_size,
            "parameters": self.gpt.size(),
            "torch": torch.__version__,
        }
        say(write_report(self.settings.out, summary))


def check_out(settings: Settings, checkpoint: dict[str, Any] | None) -> None:
    """Raises SettingError if --out is not writable or its metrics do not match the checkpoint. Creates nothing."""
    unwritable = why_unwritable(settings.out)
    if unwritable:
        raise SettingError(f"--out {settings.out}: {unwritable}; name a folder that can be written")
    if checkpoint:
        first_metrics(settings.out / "metrics.csv", checkpoint["step"])


def train_and_report(settings: Settings, checkpoint: dict[str, Any] | None, world: World) -> int:
    """Runs the program for the parsed settings. Returns the exit code."""
    device, say = open_device(settings.device, world), world.say
    make_loss(settings.loss)  # report a missing package now, not after tokenising
    with importing("training", "pip install tqdm"):
        import tqdm  # noqa: F401
    if world.rank == 0:
        check_out(settings, checkpoint)
    world.join(device)

    key = checkpoint["corpus"] if checkpoint else None
    corpus = world.from_rank_0(lambda: load_corpus(settings, world, key))
    run = Run(settings, corpus, device, world)
    say(
        f"A GPT of {run.gpt.size():,} parameters: {settings.layers} layers of width {settings.width}, "
        f"{settings.heads} heads, context {settings.context}"
    )
    if checkpoint:
        run.restore(checkpoint)
    if world.rank == 0:
        remove_leftovers(settings.out)
        for name in [] if checkpoint else set_earlier_run_aside(settings.out):
            say(f"Moved the earlier run's {name} to {settings.out / f'previous-{name}'}")

    say(
        f"Training with --loss {settings.loss} on {device} in {settings.dtype}, {settings.batch} "
        f"windows a step on each of {world.size} rank(s); Ctrl-C saves and stops"
    )
    try:
        if world.rank == 0:
            truncate_metrics(settings.out / "metrics.csv", run.step)
        stopped_by = run.train()
        if not stopped_by and world.rank == 0:
            run.report()
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        saved = (settings.out / "checkpoint.pt").is_file()
        raise SettingError(
            f"--out {settings.out} cannot be written ({error.strerror}), after {run.step} of {settings.steps} steps; "
            f"make room there, and {'use --resume: the last checkpoint is whole' if saved else 'start again'}"
        ) from error
    if stopped_by:
        command = shlex.join([*command_line(world), "--out", str(settings.out), "--resume"])
        name = signal.Signals(stopped_by).name
        say(f"Stopped by {name} and saved, after {run.step} of {settings.steps} steps. To resume:\n{command}")
    world.leave()
    return 128 + stopped_by if stopped_by else 0


def main(argv: Sequence[str] | None = None) -> int:
    world, parser = World.from_environment(), build_parser((__doc__ or "").partition("\n")[0])
    try:
        return train_and_report(*read_settings(parser, argv), world)
    except SettingError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        world.say("Interrupted outside the training steps: nothing to save")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
