"""What each rank sends: counted from the tensors of the collectives, received by the sockets, said in docs/scaling.md.

A ring of W ranks sends (W - 1) times the bytes of an all_gather's input, (W - 1) / W times those of a reduce_scatter's,
and twice that for an all_reduce. `traffic` is a case of distributed_ranks.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npu_xent import distributed

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
GATHER, SCATTER, REDUCE, REDUCE_DTENSOR = "_allgather_base_", "_reduce_scatter_base_", "allreduce_", "all_reduce"
INPUT = {GATHER: 1, SCATTER: 1, REDUCE: 0, REDUCE_DTENSOR: 0}  # which argument of the operator
FACTS = 4 * 8  # bytes that ranks compare in each all_gather on the CPU
ROWS, COLUMNS, FEATURES, CHUNK = 4096, 3, 8, 1024
MOST = 8  # ranks, on which the losses of others are counted too


class Traffic(TorchDispatchMode):
    """The collectives of a block, and the bytes that a ring sends for them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.sent = Fraction(0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):  # not imported, which takes a second
            return NotImplemented  # it then calls the collectives of its shards
        space, name = function._schema.name.split("::")
        if space in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            given = args[INPUT[name]]  # a KeyError: a collective that is not counted yet
            given = given[0] if isinstance(given, (list, tuple)) else given
            ranks = dist.get_world_size()
            times = {GATHER: Fraction(ranks - 1), SCATTER: Fraction(ranks - 1, ranks)}
            self.calls.append(name)
            self.sent += times.get(name, Fraction(2 * (ranks - 1), ranks)) * given.numel() * given.element_size()
        return function(*args, **(kwargs or {}))


def received() -> int:
    """The bytes that all TCP sockets of this process have received, by Linux's count."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, or not TCP
            if os.readlink(entry).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                total += struct.unpack_from("=Q", info, 128)[0]  # tcpi_bytes_received
    return total


def counted(call: Callable[[], Any]) -> tuple[Traffic, int]:
    """The collectives of a call, and the bytes that this rank received meanwhile."""
    dist.barrier()
    before = received()
    with Traffic() as found:
        call()
    after = received()
    dist.barrier()
    return found, after - before


def documented() -> dict[int, list[float]]:
    """The page's table of bytes a row, by the number of ranks."""
    rows = re.findall(r"^\| (\d+) \|((?: [\d.,]+ \|){5})$", PAGE.read_text(), flags=re.MULTILINE)
    return {int(ranks): [float(x.replace(",", "")) for x in cells.split("|")[:-1]] for ranks, cells in rows}


def formulas(ranks: int) -> list[float]:
    """The same columns: gathers of 3, 4 and 6 float32, and all-reduces of 12 and 10 bytes."""
    gathered = [(ranks - 1) * 4 * numbers for numbers in (3, 4, 6)]
    reduced = [2 * (ranks - 1) / ranks * size for size in (12, 10)]
    return [round(size, 2) for size in (*gathered, *reduced)]


# A loss: its name, function and options, its collectives, the page's column, and the bytes that each call gathers once.
Loss = tuple[str, Callable[..., Any], dict[str, Any], list[str], int, int]
HALF, DOUBLE = {"dtype": torch.bfloat16}, {"dtype": torch.float64}


def losses() -> Iterator[Loss]:
    """Ours."""
    loss, log_probs = distributed.vocab_parallel_cross_entropy, distributed.vocab_parallel_token_log_probs
    yield "loss", loss, {}, [GATHER], 0, FACTS
    yield "loss, bfloat16", loss, HALF, [GATHER], 0, FACTS
    yield "loss, float64", loss, DOUBLE, [GATHER], 0, FACTS
    yield "z-loss", loss, {"lse_square_scale": 0.1, "return_lse": True}, [GATHER], 0, FACTS
    yield "smoothing", loss, {"label_smoothing": 0.1}, [GATHER], 1, FACTS + 4
    yield "log-probabilities", log_probs, {}, [GATHER], 0, FACTS
    yield "entropy", log_probs, {"return_entropy": True}, [GATHER], 1, FACTS
    yield "top1", log_probs, {"return_entropy": True, "return_top1": True}, [GATHER], 2, FACTS + 8


def losses_of_others(ranks: int) -> Iterator[Loss]:
    """PyTorch's, and Megatron's if it can be imported."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (ranks,))

    def parallel(logits: Tensor, target: Tensor) -> Tensor:
        sharded = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)
        return torch.nn.functional.cross_entropy(sharded, target)

    yield "loss_parallel", parallel, {}, 3 * [REDUCE_DTENSOR], 3, 0
    yield "loss_parallel, bfloat16", parallel, HALF, 3 * [REDUCE_DTENSOR], 4, 0
    try:
        from megatron.core import parallel_state
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    except ImportError:
        return
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(ranks)
    group = {"tp_group": parallel_state.get_tensor_model_parallel_group()}
    yield "Megatron", vocab_parallel_cross_entropy, {}, 3 * [REDUCE], 3, 0
    yield "Megatron, bfloat16", vocab_parallel_cross_entropy, HALF, 3 * [REDUCE], 3, 0
    yield "Megatron, fused", fused_vocab_parallel_cross_entropy, group, 2 * [REDUCE], 3, 0


def traffic(at: Any, _: Any) -> list[Tensor]:
    """Collectives and bytes of a step, forward and backward, are those of the page."""
    page = documented().get(at.ranks) or formulas(at.ranks)
    for loss in losses():
        check(loss, at.ranks, page)
    for parallel in (False, True):
        linear(at.ranks, parallel, page)
    if at.ranks == MOST:
        from torch.distributed.tensor.parallel import loss_parallel

        with loss_parallel(), torch.compiler.set_stance("force_eager"):
            for loss in losses_of_others(at.ranks):
                check(loss, at.ranks, page)
    return []


def check(loss: Loss, ranks: int, page: list[float]) -> None:
    """A step of one loss."""
    name, function, options, calls, column, once = loss
    options = dict(options)
    leaf = torch.ones(ROWS, COLUMNS, dtype=options.pop("dtype", torch.float32), requires_grad=True)

    def step() -> None:
        found = function(leaf * 1, target_of(ranks), **options)
        (found if isinstance(found, Tensor) else found[0]).sum().backward()

    found, wire = counted(step)
    size = 8 if leaf.dtype == torch.float64 else 4
    assert found.calls == calls, f"{name}: {found.calls}"
    row = round(float(found.sent - (ranks - 1) * once) / ROWS, 2)
    assert row == page[column] * size / 4, f"{name}: {row} bytes a row, not {page[column]} x {size // 4}"
    check_wire(name, found.sent, wire)


def target_of(ranks: int) -> Tensor:
    """Classes of all ranks."""
    return torch.arange(ROWS) % (COLUMNS * ranks)


def linear(ranks: int, parallel: bool, page: list[float]) -> None:
    """The linear function: a gather for each chunk, and the input's gradient, or with sequence_parallel its rows."""
    own = ROWS // ranks if parallel else ROWS
    rows = own * ranks if parallel else ROWS
    x, head = torch.ones(own, FEATURES, requires_grad=True), torch.ones(COLUMNS, FEATURES, requires_grad=True)
    found, wire = counted(
        lambda: distributed.vocab_parallel_linear_cross_entropy(
            x, head, target_of(ranks)[:rows], chunk_rows=CHUNK, sequence_parallel=parallel
        ).backward()
    )
    chunks = -(-rows // CHUNK)
    assert found.calls == ([GATHER] * (chunks + 1) + [SCATTER] if parallel else [GATHER] * chunks + [REDUCE])
    of_input = Fraction(2 * (ranks - 1), ranks) * rows * FEATURES * 4
    row = round(float(found.sent - of_input - (ranks - 1) * FACTS * chunks) / rows, 2)
    assert row == page[0], f"linear: {row} bytes a row besides the input, not {page[0]}"
    if not parallel:  # gloo's reduce_scatter is an all_reduce
        check_wire("linear", found.sent, wire)


def check_wire(name: str, sent: Fraction, wire: int) -> None:
    """The sockets received what the formula says, and gloo's headers."""
    assert sent <= wire <= 1.25 * float(sent) + 4096, f"{name}: {float(sent)} bytes by the formula, {wire} received"
