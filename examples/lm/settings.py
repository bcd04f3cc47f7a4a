"""The command line: flags, their defaults, and errors for invalid ones."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.checkpoint import DamagedFile, load

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the bytes and END_OF_TEXT

# The settings that losses depend on, besides --steps: --resume takes them from the checkpoint and rejects other values.
RUN_FLAGS = (
    *("data", "max_bytes", "vocab_size"),
    *("layers", "heads", "width", "context"),
    *("dtype", "batch", "lr", "seed"),
)
CHECKPOINT = ("step", "model", "optimizer", "settings", "corpus", "ranks")


class SettingError(Exception):
    """An invalid flag. The message names the flag, the value and a remedy."""


@contextlib.contextmanager
def importing(what: str, way_out: str) -> Iterator[None]:
    """Turns a failing import into a SettingError; torch_npu without CANN raises more than ImportError."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        raise SettingError(f"{what}: {type(error).__name__}: {error}; {way_out}") from error


class Settings(argparse.Namespace):
    """The parsed command line."""

    data: Path | None
    max_bytes: int
    vocab_size: int
    cache: Path
    layers: int
    heads: int
    width: int
    context: int
    loss: str
    device: str
    dtype: str
    steps: int
    batch: int
    lr: float
    seed: int
    out: Path
    save_every: int
    resume: bool


def positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse says "invalid positive int value: '0'"
    return parse


def seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:  # the range of torch.manual_seed
        raise ValueError
    return value


def absolute(text: str) -> Path:
    return Path(text).expanduser().resolve()


def common_parser(description: str) -> argparse.ArgumentParser:
    """The flags that the training programs share."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, cache = positive(int), os.environ.get("XDG_CACHE_HOME") or "~/.cache"

    add = parser.add_argument_group("text").add_argument
    text = "UTF-8 text; of a folder, all such files but hidden ones; without it, Python's standard library"
    add("--data", type=absolute, metavar="FILE_OR_FOLDER", help=text)
    add("--max-bytes", type=count, default=16_000_000, help="read no more text than this")
    add("--vocab-size", type=count, default=8192, help="byte-level BPE tokens, at most")
    add("--cache", type=absolute, default=f"{cache}/npu_xent", help="folder for tokenizer and token ids")

    add = parser.add_argument_group("model").add_argument
    add("--layers", type=count, default=4, help="transformer blocks")
    add("--heads", type=count, default=4, help="attention heads")
    add("--width", type=count, default=192, help="size of the residual stream")
    add("--context", type=count, default=128, help="tokens in a window")

    add = parser.add_argument_group("training").add_argument
    devices = (
        "cpu, npu or cuda, or one of several: npu:1; an NPU is simulated on the host by "
        "python -m cann_sim examples/%(prog)s --device npu"
    )
    add("--device", default="cpu", help=devices)
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 runs under autocast")
    steps = "optimizer steps in all, over which the learning rate falls to a tenth of --lr"
    add("--steps", type=count, default=300, help=steps)
    add("--batch", type=count, default=16, help="windows a step, for each copy of the model")
    add("--lr", type=positive(float), default=2e-3, help="peak learning rate")
    add("--seed", type=seed, default=0, help="of the initial weights and the order of the data")
    return parser


def build_parser(description: str) -> argparse.ArgumentParser:
    """The flags of train_lm.py."""
    parser = common_parser(description)
    add = parser.add_argument_group("loss and output").add_argument
    losses = "npu_xent.cross_entropy, npu_xent.npu_cross_entropy_loss or F.cross_entropy"
    add("--loss", choices=("npu_xent", "npu_xent_strict", "torch"), default="npu_xent", help=losses)
    add("--out", type=absolute, default="runs/train_lm", help="folder of this run")
    add("--save-every", type=positive(int), default=100, help="steps between checkpoints")
    resume = (
        "go on from OUT/checkpoint.pt, with its settings; a larger --steps extends the run: from there on the learning "
        "rate is that of a run of so many steps, so it rises once more"
    )
    add("--resume", action="store_true", help=resume)
    return parser


def check(settings: Settings) -> None:
    """Raises SettingError for flags that do not go together."""
    if settings.width % settings.heads:
        raise SettingError(f"--width {settings.width}: not a multiple of --heads {settings.heads}; change one of them")
    if settings.vocab_size < SMALLEST_VOCAB:
        raise SettingError(
            f"--vocab-size {settings.vocab_size}: the 256 bytes and {END_OF_TEXT} alone "
            f"are {SMALLEST_VOCAB} tokens; ask for more"
        )


def read_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[Settings, dict[str, Any] | None]:
    """The settings and, when resuming, the checkpoint, whose settings become the defaults."""
    settings, checkpoint = parser.parse_args(argv, Settings()), None
    if settings.resume:
        path = settings.out / "checkpoint.pt"
        if not path.is_file():
            raise SettingError(
                f"--resume: there is no {path}; name the run's folder with --out, or start without --resume"
            )
        try:
            checkpoint = load(path, CHECKPOINT)
        except DamagedFile as error:
            raise SettingError(
                f"--resume: {path} cannot be loaded ({error}): it is cut short, damaged, or not this program's; bring "
                f"back a copy of it, or start again without --resume, which moves it to previous-{path.name}"
            ) from error
        saved = checkpoint["settings"]
        parser.set_defaults(**saved)
        settings = parser.parse_args(argv, Settings())
        for name in RUN_FLAGS:
            if str(getattr(settings, name)) != str(saved[name]):
                flag = "--" + name.replace("_", "-")
                raise SettingError(
                    f"{flag} {getattr(settings, name)}: the run in {settings.out} has "
                    f"{saved[name]}; leave {flag} out, or start a new run in another --out"
                )
        if settings.steps < checkpoint["step"]:
            raise SettingError(
                f"--steps {settings.steps}: the run in {settings.out} has taken {checkpoint['step']} already; ask for "
                "more, or start a new run in another --out"
            )
    check(settings)
    return settings, checkpoint
