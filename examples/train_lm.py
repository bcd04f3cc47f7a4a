"""Train a small GPT to predict the next token, with npu_xent's fused cross entropy as the loss.

A whole training program, not one call: what a loss is worth shows in a run that learns, stops, resumes and
scales. `--loss torch` is the same run on F.cross_entropy, for comparison. It needs tokenizers and tqdm, draws
with matplotlib if that is there, downloads nothing, and takes about three minutes on two CPU cores:

    python examples/train_lm.py                                   # on the Python standard library's sources
    python examples/train_lm.py --data texts/ --out runs/mine     # on your own text; Ctrl-C saves and stops
    python examples/train_lm.py --out runs/mine --resume          # goes on to the very same losses
    torchrun --nproc_per_node 8 examples/train_lm.py --device npu --dtype bf16
    python -m cann_sim examples/train_lm.py --device npu          # an NPU simulated on the host: slow, and checked
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import hashlib
import json
import math
import os
import random
import re
import resource
import shlex
import signal
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# Only --device npu imports torch_npu: where CANN is missing, its autoload would break `import torch`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

CACHE_FORMAT = 1  # raise it when splitting or tokenising changes: older caches are then left alone
END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the bytes and END_OF_TEXT
HELD_OUT = 20  # one file in so many is kept for validation
VALIDATION_BATCHES = 16
METRICS_HEADER = "step,loss,tokens_per_s,peak_mb"
BACKENDS = {"cpu": "gloo", "npu": "hccl", "cuda": "nccl"}


class SettingError(Exception):
    """A flag that cannot be honoured. The message names the flag, the value seen and the way out."""


@contextlib.contextmanager
def importing(what: str, way_out: str) -> Iterator[None]:
    """Turns a failing import into a SettingError; torch_npu without CANN raises more than ImportError."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        raise SettingError(f"{what}: {type(error).__name__}: {error}; {way_out}") from error


# ------------------------------------------------------------------------------------------------ settings


class Settings(argparse.Namespace):
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


# What a run's losses depend on: resuming takes these from the checkpoint and refuses other values.
RUN_FLAGS = (
    "data",
    "max_bytes",
    "vocab_size",
    "layers",
    "heads",
    "width",
    "context",
    "dtype",
    "steps",
    "batch",
    "lr",
    "seed",
)


def positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse says "invalid positive int value: '0'"
    return parse


def absolute(text: str) -> Path:
    return Path(text).expanduser().resolve()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count, cache = positive(int), os.environ.get("XDG_CACHE_HOME") or "~/.cache"

    add = parser.add_argument_group("text").add_argument
    add(
        "--data",
        type=absolute,
        metavar="FILE_OR_FOLDER",
        help="UTF-8 text; of a folder, all such files but hidden ones; without it, Python's standard library",
    )
    add("--max-bytes", type=count, default=16_000_000, help="read no more text than this")
    add("--vocab-size", type=count, default=8192, help="byte-level BPE tokens, at most")
    add("--cache", type=absolute, default=f"{cache}/npu_xent", help="folder for tokenizer and token ids")

    add = parser.add_argument_group("model").add_argument
    add("--layers", type=count, default=4, help="transformer blocks")
    add("--heads", type=count, default=4, help="attention heads")
    add("--width", type=count, default=192, help="size of the residual stream")
    add("--context", type=count, default=128, help="tokens in a window")

    add = parser.add_argument_group("training").add_argument
    add(
        "--loss",
        choices=("npu_xent", "npu_xent_strict", "torch"),
        default="npu_xent",
        help="npu_xent.cross_entropy, npu_xent.npu_cross_entropy_loss or F.cross_entropy",
    )
    add(
        "--device",
        default="cpu",
        help="cpu, npu or cuda, or one of several: npu:1; an NPU is simulated on the host by "
        "python -m cann_sim examples/train_lm.py --device npu",
    )
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 runs under autocast")
    add("--steps", type=count, default=300, help="optimizer steps in all, the schedule's horizon")
    add("--batch", type=count, default=16, help="windows a step, on each rank")
    add("--lr", type=positive(float), default=2e-3, help="peak learning rate")
    add("--seed", type=int, default=0, help="of the initial weights and the order of the data")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=absolute, default="runs/train_lm", help="folder of this run")
    add("--save-every", type=count, default=100, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt, with its settings")
    return parser


def read_settings(argv: Sequence[str] | None) -> tuple[Settings, dict[str, Any] | None]:
    """The settings, and when resuming the checkpoint, whose settings are then the defaults."""
    parser = build_parser()
    settings, checkpoint = parser.parse_args(argv, Settings()), None
    if settings.resume:
        path = settings.out / "checkpoint.pt"
        if not path.is_file():
            raise SettingError(
                f"--resume: there is no {path}; name the run's folder with --out, or start without --resume"
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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
    if settings.width % settings.heads:
        raise SettingError(f"--width {settings.width}: not a multiple of --heads {settings.heads}; change one of them")
    if settings.vocab_size < SMALLEST_VOCAB:
        raise SettingError(
            f"--vocab-size {settings.vocab_size}: the 256 bytes and {END_OF_TEXT} alone "
            f"are {SMALLEST_VOCAB} tokens; ask for more"
        )
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"--out {settings.out}: {error}; name a folder that can be written") from error
    return settings, checkpoint


# ----------------------------------------------------------------------------------- processes and devices


@dataclass(frozen=True)
class World:
    """Which process this is. Without torchrun there is one, and no process group."""

    rank: int
    local_rank: int
    size: int
    grouped: bool

    @staticmethod
    def from_environment() -> World:
        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        return World(
            number("RANK", 0), number("LOCAL_RANK", 0), number("WORLD_SIZE", 1), grouped="WORLD_SIZE" in os.environ
        )

    def say(self, message: str) -> None:
        if self.rank == 0:
            print(message, flush=True)

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        if not self.grouped:
            return values
        total = torch.tensor(values, dtype=torch.float32, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]


def open_device(name: str, world: World) -> torch.device:
    match = re.fullmatch(r"(cpu|npu|cuda)(:\d+)?", name)
    if not match:
        raise SettingError(f"--device {name}: unknown; use cpu, npu or cuda")
    kind, index = match.groups()
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "npu":
        with importing("--device npu", "install torch_npu and CANN and source CANN's set_env.sh, or use --device cpu"):
            import torch_npu  # noqa: F401  (registers the device)
    if not getattr(torch, kind).is_available():
        raise SettingError(f"--device {name}: torch finds no such device; use --device cpu")
    device = torch.device(name if index and not world.grouped else f"{kind}:{world.local_rank}")
    getattr(torch, kind).set_device(device)
    return device


def peak_megabytes(device: torch.device) -> float:
    if device.type != "cpu":
        return float(getattr(torch, device.type).max_memory_allocated(device)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere


class StopSignal:
    """While entered, holds back the first SIGINT or SIGTERM, so that the step can end and be saved."""

    number = 0

    def __enter__(self) -> StopSignal:
        self.previous = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number


# ---------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # token ids
    held_out: Tensor
    vocab_size: int  # a short text gives fewer tokens than --vocab-size
    key: str

    def unigram_loss(self) -> float:
        """Cross entropy of the held-out tokens under the training frequencies, add-one smoothed."""
        counts = torch.bincount(self.train, minlength=self.vocab_size).double() + 1
        return -(counts / counts.sum()).log()[self.held_out].mean().item()


def list_files(data: Path | None) -> list[Path]:
    found: Iterable[Path]
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        found = (path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    elif data.is_file():
        found = [data]
    elif data.is_dir():
        found = (
            path for path in data.rglob("*") if not any(part.startswith(".") for part in path.relative_to(data).parts)
        )
    else:
        raise SettingError(
            f"--data {data}: no such file or folder; name one, or leave --data out "
            "to train on Python's standard library"
        )
    return sorted(path for path in found if path.is_file())


def read_text(path: Path, max_bytes: int) -> tuple[str, int]:
    """The text and its size in bytes, no more than `max_bytes` of them; ("", 0) if it is no text."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes)
            whole = not file.read(1)
        # What is cut off may end inside a character, which an incremental decoder then leaves out.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
    except (OSError, UnicodeDecodeError):
        return "", 0
    return ("", 0) if "\0" in text else (text, len(raw))


def read_texts(settings: Settings, world: World) -> list[str]:
    """The texts among the files, in the order of their paths, up to --max-bytes in all."""
    source = settings.data or sysconfig.get_paths()["stdlib"]
    files, texts, left = list_files(settings.data), [], settings.max_bytes
    for path in files:
        text, size = read_text(path, left)
        left -= size
        if text.strip():
            texts.append(text)
        if left == 0:
            break
    if not texts:
        raise SettingError(f"--data {source}: no UTF-8 text in its {len(files)} file(s); name another")
    cut = "; --max-bytes leaves out the rest" if left == 0 else ""
    world.say(
        f"Read {settings.max_bytes - left:,} bytes of text from {len(texts)} of {len(files)} file(s) of {source}{cut}"
    )
    return texts


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: every 20th file, or the last of fewer, or the end of a single one."""
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // HELD_OUT
        return [texts[0][:cut]], [texts[0][cut:]]
    held_out = range(HELD_OUT - 1, len(texts), HELD_OUT) or [len(texts) - 1]
    return [text for i, text in enumerate(texts) if i not in held_out], [texts[i] for i in held_out]


def tokenise(texts: list[str], vocab_size: int) -> dict[str, Any]:
    """Trains a byte-level BPE on the training texts alone, and encodes both parts with it."""
    with importing("tokenising", "pip install tokenizers"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    train, held_out = split(texts)
    tokenizer.train_from_iterator(train, trainer)
    end, length = tokenizer.token_to_id(END_OF_TEXT), 1 << 16

    def encode(part: list[str]) -> Tensor:
        ids = []
        for text in part:  # piece by piece: an Encoding weighs far more than its ids
            pieces = [text[i : i + length] for i in range(0, len(text), length)]
            ids += [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(pieces)]
            ids.append(torch.tensor([end]))
        return torch.cat(ids)

    return {
        "train": encode(train),
        "held_out": encode(held_out),
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer": tokenizer.to_str(),
    }


def load_corpus(settings: Settings, world: World) -> Corpus:
    """Reads the text and tokenises it, unless the cache knows it. One process a machine does the work."""
    texts = read_texts(settings, world)
    digest = hashlib.sha256(f"{CACHE_FORMAT} {settings.vocab_size}".encode())
    for text in texts:
        raw = text.encode()
        digest.update(b" %d " % len(raw) + raw)
    key = digest.hexdigest()[:32]
    path = settings.cache / f"{key}.pt"
    if path.is_file():
        world.say(f"Using the tokenizer and token ids cached in {path}")
    elif world.local_rank == 0:
        world.say(f"Training a tokenizer of {settings.vocab_size} tokens and encoding the text with it ...")
        start = time.perf_counter()
        try:
            save_atomically(path, tokenise(texts, settings.vocab_size))
        except OSError as error:
            raise SettingError(f"--cache {settings.cache}: {error}; name a folder that can be written") from error
        world.say(
            f"... took {time.perf_counter() - start:.0f} s and is cached in {path}; this run's peak "
            "memory on the CPU includes it"
        )
    if world.grouped:
        dist.barrier()
    cached = torch.load(path, weights_only=True)
    corpus = Corpus(cached["train"], cached["held_out"], cached["vocab_size"], key)
    for name, part in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(part) <= settings.context:
            raise SettingError(
                f"--context {settings.context}: the {name} text has only {len(part)} tokens; "
                "give more text with --data, or a shorter --context"
            )
    world.say(
        f"{len(corpus.train):,} training and {len(corpus.held_out):,} held-out tokens, of a "
        f"vocabulary of {corpus.vocab_size}"
    )
    return corpus


def cut_windows(tokens: Tensor, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Windows of tokens, and each token's next."""
    windows = torch.stack([tokens[start : start + context + 1] for start in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def training_batch(corpus: Corpus, settings: Settings, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Depends on seed, step and rank alone: a resumed run needs no generator state."""
    draw = random.Random(f"{settings.seed} {step} {rank}")
    starts = [draw.randrange(len(corpus.train) - settings.context) for _ in range(settings.batch)]
    return cut_windows(corpus.train, starts, settings.context)


# --------------------------------------------------------------------------------------------------- model


class Block(nn.Module):
    """Attention, then a two-layer perceptron; each normalises its input and adds to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Decoder-only transformer, its embedding tied to the output: tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, vocab_size: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        # Small weights make the first logits nearly equal, so that the first loss is about ln V. What adds
        # to the residual stream, 2 * layers times, is smaller still.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                additions = 2 * layers if name.endswith("_out.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(additions))

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return F.linear(self.norm(self.blocks(x)), self.token.weight)

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def make_loss(name: str) -> Loss:
    """A function of logits [N, C] and targets [N]: their mean cross entropy, a scalar."""
    if name == "torch":
        return F.cross_entropy
    with importing(f"--loss {name}", "pip install . in npu_xent's repository, or use --loss torch"):
        import npu_xent

    def strict(logits: Tensor, targets: Tensor) -> Tensor:
        loss, _log_prob, _zloss, _lse = npu_xent.npu_cross_entropy_loss(logits, targets)
        return loss.squeeze(0)  # the documented contract makes it [1]

    return strict if name == "npu_xent_strict" else npu_xent.cross_entropy


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, settings.steps // 10)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


# ------------------------------------------------------------------------------------------ files of a run


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once written: nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)


def set_earlier_run_aside(out: Path, world: World) -> None:
    """A new run must not be taken for the one before, which a forgotten --resume should not destroy."""
    for name in ("checkpoint.pt", "metrics.csv", "summary.json", "loss.png"):
        if (out / name).exists():
            os.replace(out / name, out / f"previous-{name}")
            world.say(f"Moved the earlier run's {name} to {out / f'previous-{name}'}")


def metric_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    return [line for line in lines if line.count(",") == METRICS_HEADER.count(",")]


def truncate_metrics(path: Path, steps: int) -> None:
    """Leaves the header and the lines of the first `steps` steps."""
    kept = [line for line in metric_lines(path) if int(line.partition(",")[0]) < steps]
    if len(kept) != steps:
        raise SettingError(
            f"--resume: {path} has {len(kept)} of the {steps} steps in checkpoint.pt, so they "
            "are not of one run; start a new one in another --out"
        )
    with replacing(path) as temporary:
        temporary.write_text("\n".join([METRICS_HEADER, *kept]) + "\n")


def draw(path: Path, metrics: list[list[float]], summary: dict[str, Any]) -> bool:
    """The loss curve; False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [row[0] for row in metrics], [row[1] for row in metrics]
    smoothed = []  # a centred mean, since a trailing one would lag behind the fall
    for i in range(len(losses)):
        reach = min(len(losses) // 40, i)
        smoothed.append(statistics.fmean(losses[i - reach : i + reach + 1]))
    validation, unigram = summary["validation_loss"], summary["unigram_loss"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss, each step")
    axes.plot(steps, smoothed, color="tab:blue", linewidth=2, label="training loss, smoothed")
    axes.plot(steps[-1], validation, "o", color="tab:red", label=f"validation loss, {validation:.2f}")
    axes.axhline(unigram, color="tab:gray", linestyle="--", label=f"unigram baseline, {unigram:.2f}")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)")
    axes.set_title("--loss {loss} on {device} in {dtype}, vocabulary of {vocab_size}".format(**summary))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    return True


# ------------------------------------------------------------------------------------------------ training


class Run:
    """Model, optimizer and the next step: what a checkpoint holds, and what training moves on."""

    def __init__(self, settings: Settings, corpus: Corpus, device: torch.device, world: World) -> None:
        self.settings, self.corpus, self.device, self.world = settings, corpus, device, world
        self.loss = make_loss(settings.loss)
        torch.manual_seed(settings.seed)
        gpt = GPT(corpus.vocab_size, settings.context, settings.layers, settings.heads, settings.width)
        self.gpt = gpt.to(device)  # initialised on the CPU, so alike for every device
        self.optimizer = make_optimizer(self.gpt, settings.lr)
        self.step = 0

    def save(self) -> None:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.settings).items()
            if name not in ("out", "resume")
        }
        save_atomically(
            self.settings.out / "checkpoint.pt",
            {
                "step": self.step,
                "model": self.gpt.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "settings": settings,
                "corpus": self.corpus.key,
                "ranks": self.world.size,
            },
        )

    def restore(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["corpus"] != self.corpus.key:
            raise SettingError(
                f"--data {self.settings.data or '(left out)'}: its text has changed since the "
                "run started; bring it back, or start a new run in another --out"
            )
        if checkpoint["ranks"] != self.world.size:
            self.world.say(
                f"Note: {checkpoint['ranks']} rank(s) before and {self.world.size} now, so the "
                "batches differ from an uninterrupted run's"
            )
        self.gpt.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step = checkpoint["step"]

    def loss_of(self, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
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
        """Takes the steps that are left. Returns the signal that ended them early, or 0."""
        from tqdm import tqdm

        settings, world, writes = self.settings, self.world, self.world.rank == 0
        model: nn.Module = self.gpt
        if world.grouped:
            ids = None if self.device.type == "cpu" else [self.device.index]
            model = nn.parallel.DistributedDataParallel(self.gpt, device_ids=ids)
        tokens, stopped_by = settings.batch * settings.context * world.size, 0
        with (
            StopSignal() as stop,
            open(settings.out / "metrics.csv" if writes else os.devnull, "a", buffering=1) as metrics,
            tqdm(total=settings.steps, initial=self.step, unit="step", disable=not writes) as bar,
        ):
            while self.step < settings.steps and not stopped_by:
                start = time.perf_counter()
                loss = self.take_step(model)
                # The ranks' losses, and whether any was told to stop: all must stop after the same step.
                told = [float(stop.number == number) for number in (signal.SIGINT, signal.SIGTERM)]
                loss, interrupted, terminated = world.sum([loss / world.size, *told], self.device)
                stopped_by = signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0
                rate, peak = tokens / (time.perf_counter() - start), peak_megabytes(self.device)
                metrics.write(f"{self.step - 1},{loss!r},{rate:.1f},{peak:.1f}\n")
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s, peak {peak:,.0f} MB", False)
                bar.update()
                due = self.step % settings.save_every == 0 or self.step == settings.steps
                if writes and (due or stopped_by):
                    self.save()
        return stopped_by

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over batches of windows spaced evenly over the held-out tokens."""
        size, tokens, context = self.settings.batch, self.corpus.held_out, self.settings.context
        last, windows = len(tokens) - context - 1, VALIDATION_BATCHES * size
        starts = [last * i // (windows - 1) for i in range(windows)]
        batches = (cut_windows(tokens, starts[i : i + size], context) for i in range(0, windows, size))
        return statistics.fmean(self.loss_of(self.gpt, *batch).item() for batch in batches)

    def report(self) -> None:
        """The validation loss, beside what knows only the tokens' frequencies and what knows nothing."""
        settings, out, say = self.settings, self.settings.out, self.world.say
        say(f"Validating on {VALIDATION_BATCHES} batches of held-out text ...")
        metrics = [[float(value) for value in line.split(",")] for line in metric_lines(out / "metrics.csv")]
        validation, unigram = self.validate(), self.corpus.unigram_loss()
        uniform = math.log(self.corpus.vocab_size)
        say(
            f"Validation loss {validation:.3f} nats per token; unigram baseline {unigram:.3f}, "
            f"uniform baseline ln V {uniform:.3f}"
        )
        summary = {
            "validation_loss": validation,
            "unigram_loss": unigram,
            "uniform_loss": uniform,
            "first_loss": metrics[0][1],
            "last_loss": metrics[-1][1],
            "steps": self.step,
            "tokens_per_s": statistics.median(row[2] for row in metrics),
            "peak_mb": max(row[3] for row in metrics),
            "loss": settings.loss,
            "device": str(self.device),
            "dtype": settings.dtype,
            "ranks": self.world.size,
            "vocab_size": self.corpus.vocab_size,
            "parameters": self.gpt.size(),
            "torch": torch.__version__,
        }
        with replacing(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
        if draw(out / "loss.png", metrics, summary):
            say(f"Wrote metrics.csv, summary.json, checkpoint.pt and loss.png in {out}")
        else:
            say(
                f"Wrote metrics.csv, summary.json and checkpoint.pt in {out}; "
                "loss.png needs matplotlib (pip install matplotlib)"
            )


def train_and_report(settings: Settings, checkpoint: dict[str, Any] | None, world: World) -> int:
    """Everything after the command line. Returns the exit code."""
    device = open_device(settings.device, world)
    make_loss(settings.loss)  # a missing package should show now, not after the tokenising
    with importing("training", "pip install tqdm"):
        import tqdm  # noqa: F401
    if world.grouped:
        dist.init_process_group(BACKENDS[device.type])
    run = Run(settings, load_corpus(settings, world), device, world)
    world.say(
        f"A GPT of {run.gpt.size():,} parameters: {settings.layers} layers of width {settings.width}, "
        f"{settings.heads} heads, context {settings.context}"
    )
    if checkpoint:
        run.restore(checkpoint)
        world.say(f"Resuming {settings.out / 'checkpoint.pt'} after {run.step} of {settings.steps} steps")
    if world.rank == 0:
        if not checkpoint:
            set_earlier_run_aside(settings.out, world)
        truncate_metrics(settings.out / "metrics.csv", run.step)
    world.say(
        f"Training with --loss {settings.loss} on {device} in {settings.dtype}, {settings.batch} "
        f"windows a step on each of {world.size} rank(s); Ctrl-C saves and stops"
    )
    stopped_by = run.train()
    if stopped_by:
        command = shlex.join([*(arg for arg in sys.argv if arg != "--resume"), "--resume"])
        world.say(
            f"Stopped by {signal.Signals(stopped_by).name} and saved, after {run.step} of "
            f"{settings.steps} steps. To resume, add --resume to the same command: {command}"
        )
    elif world.rank == 0:
        run.report()
    if world.grouped:
        dist.barrier()
        dist.destroy_process_group()
    return 128 + stopped_by if stopped_by else 0


def main(argv: Sequence[str] | None = None) -> int:
    world = World.from_environment()
    try:
        return train_and_report(*read_settings(argv), world)
    except SettingError as error:
        build_parser().error(str(error))
    except KeyboardInterrupt:
        world.say("Interrupted outside the training steps: nothing to save")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
