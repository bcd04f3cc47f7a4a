"""Train with Hugging Face's Trainer and npu_xent's loss: a small Llama with random weights, on the text of train_lm.py.

It downloads nothing and takes less than a minute on a CPU core; --compare takes two. It needs

    pip install transformers accelerate tokenizers matplotlib          # accelerate is Trainer's, matplotlib --compare's

    python examples/finetune_hf.py --loss npu_xent                # patch_transformers(): the loss of logits
    python examples/finetune_hf.py --loss fused                   # fuse_lm_head(model): the loss without logits
    python examples/finetune_hf.py --loss hf                      # transformers' own loss
    python examples/finetune_hf.py --compare losses.png           # all three: losses, time and memory
    python -m cann_sim examples/finetune_hf.py --device npu --steps 3          # an NPU simulated on the host

To fine-tune a model of your own, replace `make_model` and `Windows`. Nothing else depends on them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Only --device npu imports torch_npu: without CANN, autoloading it would break `import torch`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch
from torch import Tensor, nn

from lm.data import load_corpus
from lm.processes import World, command_line, open_device
from lm.settings import SettingError, Settings, absolute, check, importing, positive

LOSSES = {"hf": "transformers' loss", "npu_xent": "patch_transformers()", "fused": "fuse_lm_head(model)"}
CONTEXT, WIDTH, HEADS, LAYERS = 128, 128, 4, 2


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Consecutive windows of the text. The labels are not shifted: the model does that."""

    def __init__(self, tokens: Tensor) -> None:
        self.windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def make_model(vocab_size: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "max_position_embeddings": CONTEXT}
    blocks = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, use_cache=False, **size, **blocks)
    return LlamaForCausalLM(config)


def replace_loss(name: str, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What uses npu_xent. Most programs call the function once and never undo it, so they need no `with`."""
    from npu_xent.integrations.transformers import fuse_lm_head, patch_transformers

    if name == "npu_xent":
        return patch_transformers()
    return fuse_lm_head(model) if name == "fused" else contextlib.nullcontext()


def memory(device: torch.device, *, peak: bool) -> float:
    """MiB now, which also begins a new peak, or the peak since then: of the process, or allocated on the device."""
    if device.type == "cpu":
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 2**10 if found else 0.0
    of = getattr(torch, device.type)
    if not peak:
        of.reset_peak_memory_stats(device)
    return float(of.max_memory_allocated(device) if peak else of.memory_allocated(device)) / 2**20


def train(args: Settings, device: torch.device, world: World) -> dict[str, Any]:
    """The losses of all steps, the median seconds of a step, and the peak MiB of training."""
    with importing("Trainer", "pip install transformers accelerate"):
        import accelerate  # noqa: F401
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    losses, times = [], []

    class Progress(TrainerCallback):
        def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
            if "loss" in logs:  # not the summary at the end
                losses.append(logs["loss"])
                times.append(time.perf_counter())
                step = state.global_step
                if step in (1, args.steps) or step % args.print_every == 0:
                    world.say(f"step {step}: loss {logs['loss']:.4f}")

    corpus = load_corpus(args, world, None)
    set_seed(args.seed)
    model = make_model(corpus.vocab_size)
    with tempfile.TemporaryDirectory() as folder, replace_loss(args.loss, model):
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            bf16=args.dtype == "bfloat16",  # autocast; the weights stay in float32
            use_cpu=device.type == "cpu",
            seed=args.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=Windows(corpus.train), callbacks=[Progress()])
        trainer.remove_callback(PrinterCallback)
        before = memory(device, peak=False)
        trainer.train()
    peak = memory(device, peak=True) - before
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 1 else 0.0
    world.say(
        f"--loss {args.loss}, {args.dtype}: {seconds:.3f} s per step, peak {peak:.0f} MiB more than before training"
    )
    return {"losses": losses, "seconds": seconds, "mebibytes": peak}


def compare(args: Settings, argv: Sequence[str], world: World) -> None:
    """Runs the three losses in processes of their own, so that each has its own peak memory, and draws the results."""
    with importing("--compare", "pip install matplotlib"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    load_corpus(args, world, None)  # into the cache: memory that tokenising has freed would hide some of the first peak
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for loss in LOSSES:
            result = Path(folder) / f"{loss}.json"
            command = [*command_line(world), *argv, f"--loss={loss}", f"--result={result}", "--compare="]
            code = subprocess.run(command, check=False).returncode
            if code:
                raise SettingError(f"--compare: the run with --loss {loss} ended with exit code {code}; see above")
            results[loss] = json.loads(result.read_text())

    figure, (curves, *bars) = pyplot.subplots(
        1, 3, figsize=(12, 4), layout="constrained", gridspec_kw={"width_ratios": [2, 1, 1]}
    )
    for (loss, result), style in zip(results.items(), ("-", "--", ":"), strict=True):
        curves.plot(range(1, args.steps + 1), result["losses"], style, linewidth=2, label=f"{loss}: {LOSSES[loss]}")
    curves.set(title="loss", xlabel="step", ylabel="nats per token")
    curves.legend()
    for axes, key, title in zip(
        bars, ("seconds", "mebibytes"), ("seconds per step", "peak MiB of training"), strict=True
    ):
        drawn = axes.bar(list(results), [result[key] for result in results.values()], color=["C0", "C1", "C2"])
        axes.bar_label(drawn, fmt="{:.3g}" if key == "seconds" else "{:.0f}")
        axes.set_title(title)
        axes.margins(y=0.1)  # for the labels
    figure.suptitle(f"{args.device}, {args.dtype}, {args.batch} x {CONTEXT} tokens, --vocab-size {args.vocab_size}")
    figure.savefig(args.compare, dpi=120, format="png")
    world.say(f"Wrote {args.compare}")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, count = parser.add_argument, positive(int)
    add("--loss", choices=LOSSES, default="npu_xent", help="; ".join(f"{k}: {v}" for k, v in LOSSES.items()))
    add("--compare", metavar="FILE.png", help="run all three and draw their losses, times and memory")
    add("--device", choices=("cpu", "npu"), default="cpu", help="where to train")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 runs under autocast")
    add("--steps", type=count, default=40, help="optimizer steps")
    add("--batch", type=count, default=8, help=f"windows of {CONTEXT} tokens a step")
    add("--vocab-size", type=count, default=32000, help="byte-level BPE tokens, at most")
    add("--lr", type=positive(float), default=2e-3, help="peak learning rate")
    add("--data", type=absolute, help="UTF-8 text, a file or a folder; without it, Python's standard library")
    add("--max-bytes", type=count, default=8_000_000, help="read no more text than this")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    add("--cache", type=absolute, default=f"{cache}/npu_xent", help="folder for tokenizer and token ids")
    add("--seed", type=int, default=0, help="of the weights and the order of the windows")
    add("--print-every", type=count, default=10, help="steps between printed losses")
    add("--result", type=Path, help="write losses, time and memory to this JSON file")
    parser.set_defaults(context=CONTEXT, width=WIDTH, heads=HEADS)
    args, world = parser.parse_args(argv, Settings()), World(0, 0, 1, False)
    try:
        check(args)
        if args.compare:
            compare(args, argv, world)
            return 0
        if args.device == "cpu":  # transformers would import an installed torch_npu, which fails without CANN
            sys.modules.setdefault("torch_npu", None)  # type: ignore[arg-type]
        result = train(args, open_device(args.device, world), world)
        if args.result:
            args.result.write_text(json.dumps(result))
    except SettingError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
