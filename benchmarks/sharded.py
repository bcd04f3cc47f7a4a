"""Times a training step of npu_xent.distributed on two ranks, as ratios to Megatron's losses and torch's loss_parallel.

    python benchmarks/sharded.py [--quick] [--only loss linear] [--memory malloc "huge pages" jemalloc]

Both ranks run on this machine, with gloo and one thread each. All methods take turns in the same processes. A step is a
forward and a backward; its time is that of the slower rank. Before each step, outside of its time, the logits get their
values back, because Megatron's losses (and consume_logits) overwrite them. Each memory allocator is a run of its own.

Megatron is measured if it can be imported. Its requirements would replace torch, so:

    pip install --target build/megatron --no-deps megatron-core==0.16.1     # einops and numpy are installed already
    PYTHONPATH=build/megatron python benchmarks/sharded.py
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cpu.cases import DTYPES
from cpu.methods import OutputOf
from cpu.parts import jemalloc, say
from npu_xent import distributed

RANKS = 2
OURS, CONSUME = "npu_xent", "npu_xent, consume_logits"
MEGATRON, FUSED, FUSED_EAGER = "Megatron", "Megatron, fused", "Megatron, fused, not compiled"
PARALLEL, PARALLEL_COMPILED = "loss_parallel", "loss_parallel, compiled"
# The target: our time is at most this share of the peer's. Those of the linear layer share its matrix products.
AT_MOST = {MEGATRON: 0.5, FUSED: 0.5, FUSED_EAGER: 0.5, PARALLEL: 0.15, PARALLEL_COMPILED: 0.15}

ALLOCATORS = {"malloc": {}, "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"}}
if environment_of_jemalloc := jemalloc():
    ALLOCATORS["jemalloc"] = environment_of_jemalloc

Result = tuple[Tensor, ...]  # the mean loss, and this rank's gradients


class Case(NamedTuple):
    """What is measured: rows x classes of a rank, after a linear layer if there are features."""

    rows: int
    classes: int
    dtype: str
    features: int = 0

    def __str__(self) -> str:
        sizes = [self.rows, *([self.features] if self.features else []), self.classes]
        return f"{'linear ' if self.features else ''}{' x '.join(map(str, sizes))} a rank, {self.dtype}"


FULL = {
    "loss": (Case(1024, 32000, "float32"), Case(1024, 64128, "bfloat16")),
    "linear": (Case(1024, 32000, "float32", 512), Case(1024, 32000, "bfloat16", 512)),
}
Times = tuple[Case, dict[str, list[float]]]  # seconds of each method in each round
TINY = {"loss": (Case(64, 100, "float32"), Case(64, 100, "bfloat16")), "linear": (Case(64, 100, "float32", 16),)}
ROUNDS = {"full": {"loss": 15, "linear": 9}, "quick": {"loss": 5, "linear": 3}, "tiny": {"loss": 2, "linear": 2}}
SECONDS = {"full": 1800, "quick": 900, "tiny": 120}  # of one run, after which its processes are killed


# The methods ----------------------------------------------------------------------------------------------------------


class Data:
    """This rank's tensors. All methods share the memory of the logits."""

    def __init__(self, case: Case, rank: int) -> None:
        dtype = DTYPES[case.dtype]
        common = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(1 + rank)
        self.target = torch.randint(RANKS * case.classes, (case.rows,), generator=common)
        self.shape = (case.rows, case.classes)
        if case.features:
            self.hidden = torch.randn(case.rows, case.features, generator=common).to(dtype).requires_grad_()
            weight = torch.randn(case.classes, case.features, generator=own) / case.features**0.5
            self.weight = weight.to(dtype).requires_grad_()
        else:
            self.values = torch.randn(self.shape, generator=own).to(dtype)
            self.buffer = self.values.clone()
            self.logits = self.buffer.detach().requires_grad_()

    def refresh(self) -> None:
        """Undo what a step did to the logits."""
        if hasattr(self, "buffer"):
            self.buffer.copy_(self.values)


Step = Callable[[], Result]


def gradients(loss: Tensor, *leaves: Tensor) -> Result:
    """The loss and its gradients."""
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def ours(data: Data, linear: bool) -> dict[str, Step]:
    """npu_xent's."""
    if linear:
        leaves = (data.hidden, data.weight)
        return {OURS: lambda: gradients(distributed.vocab_parallel_linear_cross_entropy(*leaves, data.target), *leaves)}
    loss = distributed.vocab_parallel_cross_entropy
    anchor = torch.zeros((), requires_grad=True)

    def consuming() -> Result:
        logits = OutputOf.apply(anchor, data.buffer)
        return gradients(loss(logits, data.target, consume_logits=True).mean(), logits)

    return {OURS: lambda: gradients(loss(data.logits, data.target).mean(), data.logits), CONSUME: consuming}


def megatron(data: Data, linear: bool, compiled: bool) -> dict[str, Step]:
    """Megatron's losses of [s, b, v / p], and its linear layer, whose backward overlaps the all-reduce."""
    try:
        from megatron.core import parallel_state
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel import layers, vocab_parallel_cross_entropy
    except ImportError as error:
        if dist.get_rank() == 0:
            say(f"Megatron is not measured: {error}. The docstring says how to install it.")
        return {}
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(RANKS)
    group = parallel_state.get_tensor_model_parallel_group()
    target = data.target.unsqueeze(1)

    def logits() -> Tensor:
        if not linear:
            return data.logits.unsqueeze(1)
        return layers.linear_with_grad_accumulation_and_async_allreduce(
            data.hidden.unsqueeze(1),
            data.weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=True,
            sequence_parallel=False,
            tp_group=group,
        )

    leaves = (data.hidden, data.weight) if linear else (data.logits,)

    def eager() -> Result:
        with torch.compiler.set_stance("force_eager"):
            return fused()

    def fused() -> Result:
        return gradients(fused_vocab_parallel_cross_entropy(logits(), target, group).mean(), *leaves)

    return {
        MEGATRON: lambda: gradients(vocab_parallel_cross_entropy(logits(), target).mean(), *leaves),
        **({FUSED: fused} if compiled else {}),  # by Megatron itself
        FUSED_EAGER: eager,
    }


def loss_parallel(data: Data, linear: bool, compiled: bool) -> dict[str, Step]:
    """PyTorch's, of DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, parallel

    mesh = init_device_mesh("cpu", (RANKS,))

    def shard(local: Tensor, dim: int) -> Tensor:
        return DTensor.from_local(local.detach(), mesh, [Shard(dim)], run_check=False).requires_grad_()

    leaf = shard(data.weight, 0) if linear else shard(data.buffer, 1)
    leaves = (data.hidden, leaf) if linear else (leaf,)

    def whole(loss: Callable[[Tensor, Tensor], Tensor]) -> Result:
        with parallel.loss_parallel():
            logits = leaf
            if linear:
                logits = F.linear(DTensor.from_local(data.hidden, mesh, [Replicate()], run_check=False), leaf)
            found = gradients(loss(logits, data.target), *leaves)
        return tuple(x.to_local() if isinstance(x, DTensor) else x for x in found)

    steps = {PARALLEL: lambda: whole(F.cross_entropy)}
    if compiled:
        loss = torch.compile(F.cross_entropy)
        steps[PARALLEL_COMPILED] = lambda: whole(loss)
    return steps


# Checking and timing, on a rank ---------------------------------------------------------------------------------------


def truth(data: Data, linear: bool) -> Result:
    """In float64, of all classes, some rows at a time."""
    mine = data.weight.detach() if linear else data.values
    shards = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(shards, mine)
    total, grads, rank = torch.zeros((), dtype=torch.float64), [], dist.get_rank()
    if linear:
        weight = torch.cat(shards).double().requires_grad_()
        hidden = data.hidden.detach().double().requires_grad_()
    for rows in torch.arange(len(data.target)).split(64):
        logits = hidden[rows] @ weight.T if linear else torch.cat([x[rows] for x in shards], 1).double()
        logits = logits if linear else logits.requires_grad_()
        loss = F.cross_entropy(logits, data.target[rows], reduction="sum") / len(data.target)
        total += loss.detach()
        loss.backward()
        if not linear:
            grads.append(logits.grad.chunk(RANKS, 1)[rank])
    return (total, hidden.grad, weight.grad.chunk(RANKS)[rank]) if linear else (total, torch.cat(grads))


def check(name: str, found: Result, expected: Result, dtype: torch.dtype) -> None:
    """Raise if a method computes something else."""
    # Megatron's fused loss rounds every gradient to bfloat16; loss_parallel's loss has the dtype of the logits.
    coarse = dtype != torch.float32
    allowed = [2**-7 if coarse else 1e-5, *[2**-6 if coarse else 2**-8 if name.startswith(FUSED) else 1e-5] * 2]
    for what, mine, true, most in zip(("loss", "gradient", "gradient"), found, expected, allowed, strict=False):
        off = float((mine.double().view_as(true) - true).abs().max() / true.abs().max())
        assert off <= most, f"{name}: the {what} is off by {off:.1e} of the largest value; allowed are {most:.1e}"


def measure(case: Case, rounds: int, compiled: bool) -> dict[str, list[float]]:
    """The seconds of each method in each round."""
    torch._dynamo.reset()
    data, linear = Data(case, dist.get_rank()), case.features > 0
    steps = {**ours(data, linear), **megatron(data, linear, compiled), **loss_parallel(data, linear, compiled)}
    expected = truth(data, linear)
    for name, step in steps.items():
        for _ in range(2):  # compiles
            data.refresh()
            check(name, step(), expected, DTYPES[case.dtype])
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in steps if turn % 2 == 0 else reversed(steps):
            data.refresh()
            dist.barrier()
            start = time.perf_counter()
            found = steps[name]()
            times[name].append(time.perf_counter() - start)
            del found
    return times


def run_rank(rank: int, store: str, mode: str, parts: list[str], out: str) -> None:
    """All cases on one rank."""
    signal.alarm(SECONDS[mode])  # ends this process even if its parent is gone
    torch.set_num_threads(1)
    torch._dynamo.config.automatic_dynamic_shapes = False
    limit = datetime.timedelta(seconds=300)  # one rank may compile longer than the other
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS, timeout=limit)
    start, found = time.monotonic(), []
    for part in parts:
        for case in (TINY if mode == "tiny" else FULL)[part]:
            times = measure(case, ROUNDS[mode][part], mode != "tiny")
            of_ranks: list[Any] = [None] * RANKS
            dist.all_gather_object(of_ranks, times)
            slower = {name: [max(pair) for pair in zip(*(of[name] for of in of_ranks), strict=True)] for name in times}
            found.append((case, slower))
            if rank == 0:  # after each case, so that a run that is killed keeps its times
                Path(out).with_suffix(".new").write_text(json.dumps(found))
                Path(out).with_suffix(".new").rename(out)
                say(f"{case}: done after {time.monotonic() - start:.0f} s")
    dist.destroy_process_group()


# Launching and reporting ----------------------------------------------------------------------------------------------


def launch(allocator: str, mode: str, parts: list[str]) -> tuple[list[Times], bool]:
    """A run of both ranks under one allocator, and whether it came to its end."""
    single = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**os.environ, **single, **ALLOCATORS[allocator]}
    with tempfile.TemporaryDirectory() as folder:
        store, out = f"{folder}/store", Path(folder, "times.json")
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--rank", str(rank), store, mode, str(out), *parts],
                # In a common cache, torch 2.13 finds the code that another rank compiled for loss_parallel, which looks
                # for targets in the other rank's classes.
                env={**environment, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled{rank}"},
                start_new_session=True,
            )
            for rank in range(RANKS)
        ]
        try:
            deadline = time.monotonic() + SECONDS[mode]
            while any(process.poll() is None for process in started) and time.monotonic() < deadline:
                if any(process.poll() for process in started):  # the other rank would wait for it
                    break
                time.sleep(0.1)
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        codes = [process.returncode for process in started]
        if any(codes):
            say(f"{allocator}: stopped early, exit codes {codes}; the limit is {SECONDS[mode]} s")
        found = json.loads(out.read_text()) if out.exists() else []
        return [(Case(*case), times) for case, times in found], not any(codes)


def report(allocator: str, found: list[Times], judged: bool) -> None:
    """A table for each case."""

    def ratio(times: dict[str, list[float]], mine: str, peer: str) -> float:
        return statistics.median(a / b for a, b in zip(times[mine], times[peer], strict=True))

    for case, times in found:
        mine = [name for name in (OURS, CONSUME) if name in times]
        said = ", ".join(f"{name} {1e3 * statistics.median(times[name]):.1f} ms" for name in mine)
        print(f"\n{case}, {allocator}: {said}\n")
        print("| peer | its time | " + " | ".join(f"{name} / peer" for name in mine) + " | target |")
        print("|---" * (3 + len(mine)) + "|")
        for peer in times:
            if peer in mine:
                continue
            ratios = [ratio(times, name, peer) for name in mine]
            target = "-"
            if judged and not case.features:
                target = f"<= {AT_MOST[peer]}: {'met' if ratios[0] <= AT_MOST[peer] else 'missed'}"
            figures = " | ".join(f"{figure:.2f}" for figure in ratios)
            print(f"| {peer} | {1e3 * statistics.median(times[peer]):.1f} ms | {figures} | {target} |")
    print(flush=True)


def main() -> None:
    """Runs under each allocator, and prints tables."""
    if sys.argv[1:2] == ["--rank"]:
        rank, store, mode, out, *parts = sys.argv[2:]
        run_rank(int(rank), store, mode, parts, out)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick", default="full", help="few rounds")
    parser.add_argument(
        "--tiny", dest="mode", action="store_const", const="tiny", help="takes seconds, compiles nothing; for tests"
    )
    parser.add_argument("--only", nargs="+", choices=FULL, default=list(FULL), help="the loss, or that with the layer")
    parser.add_argument("--memory", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS), help="the allocators")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # launch then ends its processes
    complete = True
    for allocator in options.memory:
        found, ended = launch(allocator, options.mode, options.only)
        report(allocator, found, options.mode != "tiny")
        complete &= ended
    sys.exit(not complete)


if __name__ == "__main__":
    main()
