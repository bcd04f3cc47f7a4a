"""Times a training step of a model of transformers, and its peak memory: transformers' loss, ours, and Apple's.

    python benchmarks/hugging_face.py [--quick] [--tiny]

A step is the forward and the backward of a Llama with few layers and a large vocabulary. All methods take turns in one
process, with one thread; the time is the CPU time of that process. The peak memory is the growth of the resident set in
a second step, in a process of its own for each method, whose allocators keep no freed memory. It includes the gradients
of all parameters. Apple's loss has no patch for this release of transformers: it gets the backbone's output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cpu.cases import DTYPES
from cpu.memory import ENVIRONMENT, peak_resident
from cpu.methods import NotAvailable, cut_linear
from cpu.parts import say

sys.modules.setdefault("torch_npu", None)  # type: ignore[arg-type]  # transformers would import it, CANN may be missing
import transformers  # noqa: E402

from npu_xent.integrations.transformers import fuse_lm_head, patch_transformers  # noqa: E402

OWN, OF_LOGITS, FUSED, CUT = "transformers", "patch_transformers", "fuse_lm_head", "cut-cross-entropy"
METHODS = (OWN, OF_LOGITS, FUSED, CUT)
Step = Callable[[], Any]


class Size(NamedTuple):
    """Of a run."""

    batch: int
    tokens: int
    hidden: int
    layers: int
    classes: int
    rounds: int


SIZES = {
    "full": Size(2, 512, 256, 2, 128256, 11),
    "quick": Size(2, 512, 256, 2, 128256, 3),
    "tiny": Size(2, 8, 16, 1, 100, 2),
}


def steps(size: Size, dtype: str, methods: tuple[str, ...]) -> dict[str, Step]:
    """A step of each method, of one model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.classes,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).to(DTYPES[dtype]).train()
    ids = torch.randint(1, size.classes, (size.batch, size.tokens))

    def step(loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        value = loss()
        value.backward()
        gradient = model.lm_head.weight.grad[:1000].clone()
        model.zero_grad()  # so that the memory of each step has gradients
        return value.detach(), gradient

    def own() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    def of_logits() -> Tensor:
        with patch_transformers(model):
            return own()

    def fused() -> Tensor:
        with fuse_lm_head(model):
            return own()

    losses: dict[str, Callable[[], Tensor]] = {OWN: own, OF_LOGITS: of_logits, FUSED: fused}
    if CUT in methods:
        try:
            linear = cut_linear()
        except NotAvailable as error:
            say(f"{CUT} is not measured: {error}")
        else:
            target = F.pad(ids[:, 1:], (0, 1), value=-100)
            losses[CUT] = lambda: linear(model.model(ids).last_hidden_state, model.lm_head.weight, target)
    return {name: lambda loss=loss: step(loss) for name, loss in losses.items() if name in methods}


def check(found: dict[str, tuple[Tensor, Tensor]], dtype: str) -> None:
    """Raise if a method computes something else."""
    allowed = 1e-4 if dtype == "float32" else 2e-2
    loss, gradient = found[OWN]
    for name, (value, grad) in found.items():
        off = float((grad.float() - gradient.float()).norm() / gradient.float().norm())
        assert abs(float(value - loss)) <= allowed * float(loss), f"{name}: loss {value}, but {loss}"
        assert off <= allowed, f"{name}: the gradient is off by {off:.1e}"


def measure_times(size: Size, dtype: str, methods: tuple[str, ...]) -> dict[str, float]:
    """The median CPU seconds of a step of each method."""
    of = steps(size, dtype, methods)
    check({name: step() for name, step in of.items()}, dtype)
    times: dict[str, list[float]] = {name: [] for name in of}
    for turn in range(size.rounds):
        for name in of if turn % 2 == 0 else reversed(of):
            start = time.process_time()
            of[name]()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(size: Size, dtype: str, method: str) -> int:
    """The peak of a step in bytes, in this process."""
    (step,) = steps(size, dtype, (method,)).values()
    step()
    return peak_resident(step)


def memory_elsewhere(mode: str, dtype: str, method: str) -> int:
    """The peak of a step in bytes, in a process of its own, except for tests."""
    if mode == "tiny":
        return measure_memory(SIZES[mode], dtype, method)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--memory", mode, dtype, method],
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(child.stdout.splitlines()[-1]))


def main() -> None:
    """Prints a table for each dtype."""
    if sys.argv[1:2] == ["--memory"]:
        mode, dtype, method = sys.argv[2:]
        torch.set_num_threads(1)
        print(json.dumps(measure_memory(SIZES[mode], dtype, method)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick", default="full", help="few rounds")
    parser.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="takes seconds; for tests")
    mode = parser.parse_args().mode
    size, methods = SIZES[mode], METHODS if mode != "tiny" else METHODS[:-1]  # compiles nothing
    torch.set_num_threads(1)
    for dtype in ("float32", "bfloat16"):
        say(f"{dtype}: times")
        times = measure_times(size, dtype, methods)
        memory = {}
        for method in times:
            say(f"{dtype}: memory of {method}")
            memory[method] = memory_elsewhere(mode, dtype, method)
        shape = (
            f"{size.batch} x {size.tokens} tokens, hidden {size.hidden}, {size.layers} layers, {size.classes} classes"
        )
        print(f"\nLlama, {shape}, {dtype}\n")
        print("| method | CPU time | ratio | peak memory | ratio |\n|---|---|---|---|---|")
        for method, seconds in times.items():
            print(
                f"| {method} | {1e3 * seconds:.0f} ms | {seconds / times[OWN]:.2f} | {memory[method] / 2**20:.0f} MiB "
                f"| {memory[method] / max(memory[OWN], 1):.2f} |"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
