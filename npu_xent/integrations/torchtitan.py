"""Replaces torchtitan's cross entropy."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..distributed import vocab_parallel_cross_entropy
from ..functional import cross_entropy
from ._patch import FrameworkPatch, Replacement
from ._serves import serves_rows

_IGNORED = -100


def patch_torchtitan() -> FrameworkPatch:
    """Replace torchtitan's cross_entropy_loss, whole and loss-parallel, for all its callers::

        from npu_xent.integrations.torchtitan import patch_torchtitan

        patch_torchtitan()                  # before the trainer builds its loss

        with patch_torchtitan():            # for a while
            ...

    torchtitan's CrossEntropyLoss, MTPLoss and ChunkedLossWrapper take the function when they are built. A loss keeps
    the function that it was built with. Logits are not copied to float32. With tensor parallelism, one all_gather takes
    the place of three all-reduces.

    npu_xent serves dense cpu and npu tensors and DTensors of them: pred [B, S, C] in float32, bfloat16, float16 or
    float64 (not on an NPU), labels [B, S] in int64. The classes may be sharded over one dimension of a mesh: as a
    DTensor, or a plain tensor under the backend "spmd_types" with global_vocab_size. torchtitan's function gets all
    other calls with the arguments as given: other devices, dtypes and shapes; placements and shards that it refuses;
    transforms of torch.func; calls while spmd_types checks types. compute_logprobs is not replaced.

    Results are the sum of the rows that are not ignored, float32, in the same placements as torchtitan's. What differs:

    - NaN in ignored rows does not propagate.
    - A label out of range raises IndexError on the CPU, and makes the loss NaN on an NPU. torchtitan's loss-parallel
      form counts it as 0.
    - Second derivatives raise RuntimeError.
    - On the CPU, labels in which tensor-parallel ranks differ raise ValueError, on every rank; but a label that is out
      of range on one rank alone raises there, and the others wait for it until the group's timeout.

    Returns:
        A handle, also a context manager, whose remove() undoes the patch.

    Raises:
        RuntimeError: torchtitan is not installed, or its function has another signature.
    """
    replacement = Replacement(
        "torchtitan.components.loss", "cross_entropy_loss", ("pred", "labels", "global_vocab_size"), _make
    )
    return FrameworkPatch("patch_torchtitan", "torchtitan", "0.3.0", [replacement])


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    spmd: Any = importlib.import_module("spmd_types")
    meshes: Any = importlib.import_module("torchtitan.distributed.spmd_types")

    @functools.wraps(original)
    def cross_entropy_loss(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Any:
        found = None
        if not spmd.is_type_checking():
            backend = meshes.get_spmd_backend()
            if isinstance(pred, DTensor):
                found = _of_dtensors(pred, labels, backend)
            elif backend == "spmd_types" and meshes.spmd_mesh_size("tp") > 1:
                found = _of_shard(pred, labels, meshes.current_spmd_mesh().get_group("tp"), global_vocab_size)
            elif _serves(pred, labels):
                found = _sum(cross_entropy, pred.flatten(0, 1), labels.flatten(0, 1))
        return original(pred, labels, global_vocab_size=global_vocab_size) if found is None else found

    return cross_entropy_loss


def _of_dtensors(pred: DTensor, labels: Tensor, backend: str) -> Any:
    """npu_xent's loss of a DTensor. None: a call that it does not serve."""
    last, placed = pred.dim() - 1, pred.placements
    vocabulary = [i for i, p in enumerate(placed) if isinstance(p, Shard) and p.dim == last]
    if isinstance(labels, DTensor):
        expected = tuple(Replicate() if i in vocabulary else p for i, p in enumerate(placed))
        plain = all(type(p) in (Shard, Replicate) for p in placed) and len(vocabulary) < 2
        local = _serves(pred._local_tensor, labels._local_tensor)
        if not (plain and local and labels.placements == expected and labels.device_mesh == pred.device_mesh):
            return None
        return _sum(cross_entropy, pred.movedim(-1, 1), labels)
    if backend == "partial_dtensor" and placed == (Shard(last),):
        return _of_shard(pred.to_local(), labels, pred.device_mesh.get_group(), pred.shape[-1])
    return None


def _of_shard(pred: Tensor, labels: Tensor, group: dist.ProcessGroup, classes: int | None) -> Any:
    """npu_xent's loss of one rank's classes, torch.chunk's. None: a call that it does not serve."""
    if classes is None or not _serves(pred, labels):
        return None
    chunk = -(-classes // group.size())
    if pred.shape[-1] != min(classes, (group.rank() + 1) * chunk) - min(classes, group.rank() * chunk):
        return None
    return _sum(vocab_parallel_cross_entropy, pred, labels, group=group, num_classes=classes)


def _sum(loss: Callable[..., Any], pred: Tensor, labels: Tensor, **shard: Any) -> Any:
    return loss(pred, labels, reduction="sum", ignore_index=_IGNORED, loss_dtype=torch.float32, **shard)


def _serves(pred: Tensor, labels: Tensor) -> bool:
    return pred.dim() == 3 and labels.dtype is torch.int64 and serves_rows(pred, labels)
