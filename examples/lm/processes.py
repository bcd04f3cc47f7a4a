"""Processes, devices and signals."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lm.settings import SettingError, importing

# gloo broadcasts rank 0's token ids, which are on the CPU.
BACKENDS = {"cpu": "gloo", "npu": "cpu:gloo,npu:hccl", "cuda": "cpu:gloo,cuda:nccl"}

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The rank of this process. Without torchrun there is one process, and no process group."""

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

    def join(self, device: torch.device) -> None:
        """Joins the process group, waiting for the other processes."""
        if self.grouped:
            dist.init_process_group(BACKENDS[device.type])

    def leave(self) -> None:
        if self.grouped:
            dist.barrier()
            dist.destroy_process_group()

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0 and broadcasts its result to every rank."""
        made = [make() if self.rank == 0 else None]
        if self.grouped:
            dist.broadcast_object_list(made)
        return made[0]  # type: ignore[return-value]

    def share(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model, wrapped to average its gradients over the processes."""
        if not self.grouped:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device.index])

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
    count = getattr(torch, kind).device_count()
    if device.index >= count:
        asked = f"{device} for local rank {world.local_rank}" if world.grouped else device
        raise SettingError(f"--device {name}: {asked}, but torch finds {count}; use fewer ranks, or a lower number")
    getattr(torch, kind).set_device(device)
    return device


def command_line(world: World) -> list[str]:
    """The command that started the program, up to the script and without its arguments.

    With torchrun, that is the command line of the parent process, which ends with the script and the arguments.
    """
    command, arguments = sys.orig_argv, len(sys.argv) - 1
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if world.grouped and parent.is_file():
        launcher = parent.read_text().split("\0")[:-1]
        command = launcher if launcher[-len(sys.argv) :] == sys.argv else command
    return command[: len(command) - arguments]


def peak_megabytes(device: torch.device) -> float:
    if device.type != "cpu":
        return float(getattr(torch, device.type).max_memory_allocated(device)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere


class StopSignal:
    """While entered, records SIGINT or SIGTERM instead of raising, so that the step can finish and be saved."""

    number = 0

    def __enter__(self) -> StopSignal:
        self.previous = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
