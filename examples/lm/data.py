"""Finds text, tokenises it once, caches the tokens, and cuts them into the windows of a batch."""

from __future__ import annotations

import codecs
import hashlib
import os
import random
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.checkpoint import DamagedFile, load, save_atomically, why_unwritable
from lm.processes import World
from lm.settings import END_OF_TEXT, SettingError, Settings, importing

CACHE_FORMAT = 1  # increment when splitting or tokenising changes, to ignore older caches
HELD_OUT = 20  # one file in 20 is kept for validation
VALIDATION_BATCHES = 16
TOKENISED = ("train", "held_out", "vocab_size")  # the required entries of a cached file


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # token ids
    held_out: Tensor
    vocab_size: int  # less than --vocab-size for a short text
    key: str

    def sizes(self) -> str:
        sizes = f"{len(self.train):,} training and {len(self.held_out):,} held-out tokens"
        return f"{sizes}, of a vocabulary of {self.vocab_size}"

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
    """The text and its size in bytes, cut to `max_bytes`; ("", 0) if it is not UTF-8 text."""
    try:
        with path.open("rb") as file:
            raw = file.read(min(max_bytes, os.fstat(file.fileno()).st_size))  # read allocates the requested size
            whole = not file.read(1)
        # A cut text may end inside a character; an incremental decoder drops it.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
    except (OSError, UnicodeDecodeError):
        return "", 0
    return ("", 0) if "\0" in text else (text, len(raw))


def read_texts(settings: Settings, world: World) -> list[str]:
    """The files that are text, sorted by path, up to --max-bytes in total."""
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
    """Training and held-out texts. Held out: every 20th file, or the last one of fewer, or the end of a single file."""
    if len(texts) == 1:
        cut = len(texts[0]) - len(texts[0]) // HELD_OUT
        return [texts[0][:cut]], [texts[0][cut:]]
    held_out = range(HELD_OUT - 1, len(texts), HELD_OUT) or [len(texts) - 1]
    return [text for i, text in enumerate(texts) if i not in held_out], [texts[i] for i in held_out]


def tokenise(texts: list[str], vocab_size: int) -> dict[str, Any]:
    """Trains a byte-level BPE on the training texts only, and encodes both parts with it."""
    with importing("tokenising", "pip install tokenizers"):
        from tokenizers import ByteLevelBPETokenizer
    train, held_out = split(texts)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size, min_frequency=0, show_progress=False, special_tokens=[END_OF_TEXT])
    end, length = tokenizer.token_to_id(END_OF_TEXT), 1 << 16

    def encode(part: list[str]) -> Tensor:
        ids = []
        for text in part:  # in pieces: an Encoding takes far more memory than its ids
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


def key_of(texts: list[str], vocab_size: int) -> str:
    """The cache key of the result of `tokenise`."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {vocab_size}".encode())
    for text in texts:
        raw = text.encode()
        digest.update(b" %d " % len(raw) + raw)
    return digest.hexdigest()[:32]


def load_corpus(settings: Settings, world: World, key: str | None) -> Corpus:
    """Reads the text and tokenises it, or loads cached tokens. Raises SettingError if the text does not match `key`."""
    texts, say = read_texts(settings, world), world.say
    found = key_of(texts, settings.vocab_size)
    if key not in (None, found):
        raise SettingError(
            f"--data {settings.data or '(left out)'}: its text has changed since the "
            "run started; bring it back, or start a new run in another --out"
        )
    path = settings.cache / f"{found}.pt"
    try:
        if os.path.isfile(path):  # also False without permission to search the folder
            corpus = corpus_of(load(path, TOKENISED), found, settings.context)
            say(f"Using the tokenizer and token ids cached in {path}: {corpus.sizes()}")
            return corpus
    except DamagedFile as error:
        say(f"The cached {path} cannot be loaded ({error}), so the text is tokenised again")

    # Warn before the long work, not after it.
    unwritable = why_unwritable(settings.cache)
    if unwritable:
        say(f"Note: --cache {settings.cache}: {unwritable}; name another folder, or every run tokenises its text anew")
    say(f"Training a tokenizer of {settings.vocab_size} tokens and encoding the text with it ...")
    start = time.perf_counter()
    tokenised = tokenise(texts, settings.vocab_size)
    said = f"... took {time.perf_counter() - start:.0f} s"
    corpus = corpus_of(tokenised, found, settings.context)  # may raise, so before writing the cache
    if not unwritable:
        try:
            save_atomically(path, tokenised)
            said += f" and is cached in {path}"
        except OSError as error:
            said += f"; it could not be cached in {path} ({error})"
    say(f"{said}; this run's peak memory on the CPU includes it")
    say(corpus.sizes())
    return corpus


def corpus_of(tokenised: dict[str, Any], key: str, context: int) -> Corpus:
    """The result of `tokenise` as a Corpus; SettingError if a part is not longer than a window."""
    corpus = Corpus(tokenised["train"], tokenised["held_out"], tokenised["vocab_size"], key)
    for name, part in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(part) <= context:
            raise SettingError(
                f"--context {context}: the {name} text has only {len(part)} tokens; "
                "give more text with --data, or a shorter --context"
            )
    return corpus


def cut_windows(tokens: Tensor, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Windows of tokens, and the next token of each."""
    windows = torch.stack([tokens[start : start + context + 1] for start in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def training_batch(corpus: Corpus, settings: Settings, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Random windows that depend only on seed, step and rank, so that a resumed run needs no generator state."""
    draw = random.Random(f"{settings.seed} {step} {rank}")
    starts = [draw.randrange(len(corpus.train) - settings.context) for _ in range(settings.batch)]
    return cut_windows(corpus.train, starts, settings.context)


def validation_batches(corpus: Corpus, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows spaced evenly over the held-out tokens."""
    size, tokens, context = settings.batch, corpus.held_out, settings.context
    last, windows = len(tokens) - context - 1, VALIDATION_BATCHES * size
    starts = [last * i // (windows - 1) for i in range(windows)]
    for i in range(0, windows, size):
        yield cut_windows(tokens, starts[i : i + size], context)
