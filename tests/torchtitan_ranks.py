"""The ranks of test_framework_torchtitan.py: torchtitan's cross entropy of sharded logits, before and after the patch.

python torchtitan_ranks.py RANKS FOLDER [CASE ...]
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import Rank, main
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F
from torchtitan.components import loss as titan
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import get_spmd_backend, set_spmd_backend

import npu_xent.integrations.torchtitan as ours
from npu_xent.integrations.torchtitan import patch_torchtitan

B, S, CLASSES = 4, 6, 25
ROWS, SEQUENCE, VOCABULARY, ALL = Shard(0), Shard(1), Shard(2), Replicate()
DTENSORS: dict[str, tuple[Placement, ...]] = {
    "classes": (VOCABULARY,),
    "rows": (ROWS,),
    "sequence": (SEQUENCE,),
    "replicated": (ALL,),
    "rows and classes": (ROWS, VOCABULARY),
    "sequence and classes": (SEQUENCE, VOCABULARY),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and labels, the same on all ranks; some rows are ignored."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(B, S, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (B, S), generator=generator)
    labels[:, ::3] = -100
    return logits.to(dtype), labels


def truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradient, in float64."""
    x = logits.double().requires_grad_()
    loss = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@contextlib.contextmanager
def patched() -> Iterator[list[str]]:
    """The patch, and the names of the losses that are called under it."""
    calls: list[str] = []

    def counting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            calls.append(name)
            return function(*args, **keywords)

        return call

    with (
        mock.patch.object(ours, "cross_entropy", counting(ours.cross_entropy, "whole")),
        mock.patch.object(ours, "vocab_parallel_cross_entropy", counting(ours.vocab_parallel_cross_entropy, "sharded")),
        mock.patch.object(F, "cross_entropy", counting(F.cross_entropy, "torch's")),
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, "all_reduce")),
        mock.patch.object(titan.funcol, "all_reduce", counting(titan.funcol.all_reduce, "all_reduce")),
        patch_torchtitan(),
    ):
        yield calls


@contextlib.contextmanager
def backend(name: str, mesh: DeviceMesh | None = None) -> Iterator[None]:
    """torchtitan's backend, and its mesh."""
    before = get_spmd_backend()
    set_spmd_backend(name)
    try:
        with set_current_spmd_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            yield
    finally:
        set_spmd_backend(before)


def compare(
    theirs: tuple[Tensor, Tensor], mine: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    """Float32 within 1e-5 of torchtitan's and of the truth; bfloat16 no farther from the truth than torchtitan's."""
    assert [x.dtype for x in mine] == [x.dtype for x in theirs] == [torch.float32, dtype]
    torch.testing.assert_close(mine[0].double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=0)
    errors = [float((x[1].double() - expected[1]).abs().max()) for x in (mine, theirs)]
    assert errors[0] <= (1e-5 if dtype is torch.float32 else errors[1] + 1e-9), errors


def dtensors(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """Logits and labels are DTensors; results have torchtitan's placements."""
    placed, dtype = case["placed"], case["dtype"]
    shape, names = ((at.ranks,), ("tp",)) if len(placed) == 1 else ((1, at.ranks), ("dp", "tp"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    logits, labels = problem(dtype)
    indices = distribute_tensor(labels, mesh, [ALL if p == VOCABULARY else p for p in placed])

    def step() -> tuple[DTensor, DTensor]:
        leaf = distribute_tensor(logits, mesh, placed).requires_grad_()
        loss = titan.cross_entropy_loss(leaf, indices)
        loss.backward()
        return loss.detach(), leaf.grad

    theirs = step()
    with patched() as calls:
        mine = step()
    assert calls == ["whole"]
    assert [x.placements for x in mine] == [x.placements for x in theirs]
    found = [tuple(x.full_tensor() for x in pair) for pair in (theirs, mine)]
    compare(*found, truth(logits, labels), dtype)
    return [found[1][0]]


def plain_labels(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """Only the logits are a DTensor, under the backend "partial_dtensor"."""
    mesh = init_device_mesh("cpu", (at.ranks,), mesh_dim_names=("tp",))
    logits, labels = problem(case["dtype"])

    def step() -> tuple[Tensor, Tensor]:
        leaf = distribute_tensor(logits, mesh, [VOCABULARY]).requires_grad_()
        loss = titan.cross_entropy_loss(leaf, labels)
        loss.backward()
        return loss.detach(), leaf.grad.full_tensor()

    with backend("partial_dtensor"):
        theirs = step()
        with patched() as calls:
            mine = step()
    assert calls == ["sharded"]
    assert not isinstance(mine[0], DTensor)
    compare(theirs, mine, truth(logits, labels), case["dtype"])
    return [mine[0]]


def plain_shards(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """Plain tensors under the backend "spmd_types", through torchtitan's class."""
    mesh = init_device_mesh("cpu", (at.ranks,), mesh_dim_names=("tp",))
    logits, labels = problem(case["dtype"])

    def step() -> tuple[Tensor, Tensor]:
        leaf, shard = at.shard(logits)
        loss, _ = titan.CrossEntropyLoss(titan.CrossEntropyLoss.Config(global_vocab_size=CLASSES))(shard, labels)
        loss.backward()
        return loss.detach(), leaf.grad

    with backend("spmd_types", mesh):
        theirs = step()
        with patched() as calls:
            mine = step()
    assert calls == ["sharded" if at.ranks > 1 else "whole"]
    loss, gradient = truth(logits, labels)
    compare(theirs, mine, (loss, gradient[..., slice(*at.bounds(CLASSES))]), case["dtype"])
    return [mine[0]]


def left(at: Rank, _: Any) -> list[Tensor]:
    """What torchtitan refuses reaches torchtitan, on every rank."""
    mesh = init_device_mesh("cpu", (at.ranks,), mesh_dim_names=("tp",))
    logits, labels = problem()
    leaf = distribute_tensor(logits, mesh, [VOCABULARY])
    _, shard = at.shard(logits)
    with patched() as calls:
        loss = titan.cross_entropy_loss
        with pytest.raises(ValueError, match="expected labels placements"):
            loss(leaf, distribute_tensor(labels, mesh, [ROWS]))
        with pytest.raises(AssertionError):
            loss(leaf, labels)  # the backend is spmd_types
        if at.ranks > 1:
            with backend("spmd_types", mesh):
                with pytest.raises(ValueError, match="expected local vocab size"):
                    loss(shard, labels, global_vocab_size=CLASSES + 2)
                with pytest.raises(TypeError):
                    loss(shard, labels)
    assert calls == []
    twice = init_device_mesh("cpu", (1, at.ranks), mesh_dim_names=("cp", "tp"))

    def theirs(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> str:
        return "torchtitan's"

    with mock.patch.object(titan, "cross_entropy_loss", theirs), patched() as calls:
        for placed, of in (((VOCABULARY, VOCABULARY), labels), ((ALL, VOCABULARY), labels.int())):
            pred, indices = distribute_tensor(logits, twice, placed), distribute_tensor(of, twice, [ALL, ALL])
            assert titan.cross_entropy_loss(pred, indices) == "torchtitan's"
    assert calls == []
    return []


CASES: dict[str, tuple[Callable[[Rank, Any], list[Tensor]], Any]] = {
    **{
        f"{how} {name}": (dtensors, {"placed": placed, "dtype": dtype})
        for how, placed in DTENSORS.items()
        for name, dtype in DTYPES.items()
    },
    **{f"plain_labels {name}": (plain_labels, {"dtype": dtype}) for name, dtype in DTYPES.items()},
    **{f"plain_shards {name}": (plain_shards, {"dtype": dtype}) for name, dtype in DTYPES.items()},
    "left": (left, None),
}

if __name__ == "__main__":
    main(CASES, *sys.argv[1:])
