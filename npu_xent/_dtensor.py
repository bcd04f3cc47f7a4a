"""The losses of DTensors, from the local tensors of each rank.

Whole rows go to the plain functions. Rows whose classes are sharded, and a "mean" over rows that are sharded, go to
npu_xent.distributed. No operation of DTensor runs, so loss_parallel() changes nothing. docs/api/distributed.md has the
table of placements. The public functions import this module with the first DTensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from . import _linear, _log_probs, distributed, functional
from ._options import CROSS_ENTROPY, LINEAR, LOG_PROBS
from ._tensors import check_not_leaf, is_autocast_on

_Placements = tuple[Placement, ...]


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, *, loss_dtype: torch.dtype | None, **options: Any
) -> Tensor | functional.CrossEntropyOutput:
    """npu_xent.cross_entropy of DTensors."""
    axis = min(input.dim() - 1, 1)
    logits, layout = _logits(CROSS_ENTROPY, "input", input, target, axis)
    indices = _local(CROSS_ENTROPY, "target", target, layout.shape, layout.mesh, layout.rows)
    weight = _local(CROSS_ENTROPY, "weight", weight, input.shape[axis : axis + 1], layout.mesh, layout.replicated)
    compute: Callable[..., Any] = functional.cross_entropy
    needs_others = layout.needs_others(options["reduction"])
    if options["consume_logits"] and input.requires_grad and torch.is_grad_enabled():
        # A refusal of some ranks alone would leave the others waiting: [N, C, d] with d = 1 is contiguous.
        if needs_others and axis != input.dim() - 1:
            raise ValueError("npu_xent.cross_entropy: consume_logits needs contiguous logits; leave it off")
        _note_overwriting(CROSS_ENTROPY, input, logits)
    if needs_others:
        compute, logits = distributed.vocab_parallel_cross_entropy, logits.movedim(axis, -1)
        loss_dtype = _loss_dtype(loss_dtype, logits)
        options.update(layout.shard(input.shape[axis]), **layout.normalizer(options["reduction"]))
    out = compute(logits, indices, weight, loss_dtype=loss_dtype, **options)
    by_row = options["reduction"] == "none"
    if isinstance(out, Tensor):
        return layout.of_mesh(out, by_row)
    lse, z_loss = (x if x is None else layout.of_mesh(x, kind) for x, kind in ((out.lse, True), (out.z_loss, by_row)))
    return functional.CrossEntropyOutput(layout.of_mesh(out.loss, by_row), lse, z_loss)


def token_log_probs(
    logits: Tensor, target: Tensor, *, temperature: float | Tensor, **options: Any
) -> Tensor | _log_probs.TokenLogProbs:
    """npu_xent.token_log_probs of DTensors."""
    rows, layout = _logits(LOG_PROBS, "logits", logits, target, logits.dim() - 1)
    indices = _local(LOG_PROBS, "target", target, layout.shape, layout.mesh, layout.rows)
    compute: Callable[..., Any] = _log_probs.token_log_probs
    by_row: float | Tensor | None = temperature
    if isinstance(temperature, Tensor):
        if layout.class_dim is not None:
            raise ValueError(
                "npu_xent.token_log_probs: temperature must be a number where a DTensor's classes are sharded; divide "
                "the logits by it"
            )
        shape, placed = (layout.shape, layout.rows) if temperature.dim() else (torch.Size(), layout.replicated)
        by_row = _local(LOG_PROBS, "temperature", temperature, shape, layout.mesh, placed)
    if options["consume_logits"] and logits.requires_grad and torch.is_grad_enabled():
        _note_overwriting(LOG_PROBS, logits, rows)
    if layout.class_dim is not None:
        compute = distributed.vocab_parallel_token_log_probs
        options.update(layout.shard(logits.shape[-1]))
    out = compute(rows, indices, temperature=by_row, **options)
    if isinstance(out, Tensor):
        return layout.of_mesh(out, True)
    entropy, top1 = (x if x is None else layout.of_mesh(x, True) for x in out[1:])
    return _log_probs.TokenLogProbs(layout.of_mesh(out.log_probs, True), entropy, top1)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    loss_dtype: torch.dtype | None,
    return_lse: bool,
    return_z_loss: bool,
    **options: Any,
) -> Tensor:
    """npu_xent.linear_cross_entropy of DTensors."""
    if return_lse or return_z_loss:
        raise ValueError(
            "npu_xent.linear_cross_entropy: of DTensors it returns the loss alone; leave return_lse and return_z_loss "
            "out"
        )
    layout = _linear_layout(input, linear_weight, linear_bias, target)
    mesh, rows, classes = layout.mesh, layout.rows, layout.class_dim
    # Each rank's part of a sum over classes, for input, and over rows, for the layer.
    x = input.to_local(grad_placements=tuple(Partial() if i == classes else p for i, p in enumerate(input.placements)))  # type: ignore[attr-defined]
    placed = tuple(Shard(0) if i == classes else Replicate() for i in range(mesh.ndim))
    summed = tuple(Partial() if row.is_shard() else p for row, p in zip(rows, placed, strict=True))
    classes_shape = linear_weight.shape[:1]
    layer = _local(LINEAR, "linear_weight", linear_weight, linear_weight.shape, mesh, placed, summed)
    bias = _local(LINEAR, "linear_bias", linear_bias, classes_shape, mesh, placed, summed)
    indices = _local(LINEAR, "target", target, layout.shape, mesh, rows)
    weight = _local(LINEAR, "weight", weight, classes_shape, mesh, layout.replicated)
    compute: Callable[..., Tensor] = _linear.linear_cross_entropy
    if layout.needs_others(options["reduction"]):
        compute, loss_dtype = distributed.vocab_parallel_linear_cross_entropy, _loss_dtype(loss_dtype, x)
        options.update(layout.shard(linear_weight.shape[0]), **layout.normalizer(options["reduction"]))
        options["reduce_input_grad"] = False
    loss = compute(x, layer, indices, linear_bias=bias, weight=weight, loss_dtype=loss_dtype, **options)
    return layout.of_mesh(loss, options["reduction"] == "none")


class _Layout(NamedTuple):
    """How rows, and the classes of each, lie on a mesh."""

    mesh: DeviceMesh
    shape: torch.Size  # of one value a row
    rows: _Placements  # of one value a row: Replicate, or Shard of rows
    class_dim: int | None  # the dimension of the mesh that shards the classes

    @property
    def replicated(self) -> _Placements:
        """Of tensors that each rank has all of."""
        return (Replicate(),) * self.mesh.ndim

    def needs_others(self, reduction: str) -> bool:
        """Whether a rank needs other ranks' values."""
        return self.class_dim is not None or (reduction == "mean" and any(p.is_shard() for p in self.rows))

    def shard(self, classes: int) -> dict[str, Any]:
        """This rank's classes, as npu_xent.distributed takes them."""
        if self.class_dim is None:
            return {"group": distributed.ALONE}
        at = self.mesh.get_coordinate()[self.class_dim]  # type: ignore[index]
        chunk = -(-classes // self.mesh.size(self.class_dim))
        return {
            "group": self.mesh.get_group(self.class_dim),  # its ranks are sorted, which the mesh's need not be
            "num_classes": classes,
            "class_range": (min(classes, at * chunk), min(classes, (at + 1) * chunk)),
        }

    def normalizer(self, reduction: str) -> dict[str, Any]:
        """The groups that share the rows of a "mean"."""
        groups = tuple(self.mesh.get_group(i) for i, p in enumerate(self.rows) if p.is_shard())
        return {"normalizer": groups} if groups and reduction == "mean" else {}

    def of_mesh(self, value: Tensor, by_row: bool) -> DTensor:
        """The DTensor of one value a row, or of this rank's part of a sum over rows."""
        if not by_row:
            sums = [Partial() if p.is_shard() else p for p in self.rows]
            return DTensor.from_local(value, self.mesh, sums, run_check=False)
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(value, self.mesh, self.rows, run_check=False, shape=self.shape, stride=stride)


def _logits(function: str, argument: str, logits: Tensor, target: Tensor, axis: int) -> tuple[Tensor, _Layout]:
    """The local logits, and the layout of rows whose classes are dimension `axis`."""
    if not isinstance(logits, DTensor):
        raise ValueError(
            f"npu_xent.{function}: {argument} is a plain tensor among DTensors; pass DTensor.from_local({argument}, "
            "mesh, placements), or the others' to_local()"
        )
    _check_placements(function, argument, logits, target)
    class_dims = [i for i, p in enumerate(logits.placements) if p.is_shard(axis)]
    if len(class_dims) > 1:
        raise ValueError(
            f"npu_xent.{function}: {argument} must have its classes sharded over one dimension of the mesh at most, "
            f"but has the placements {list(logits.placements)}; pass {argument}.redistribute(placements=...)"
        )
    rows = tuple(
        Shard(p.dim - (p.dim > axis)) if isinstance(p, Shard) and p.dim != axis else Replicate()
        for p in logits.placements
    )
    shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    return logits.to_local(), _Layout(logits.device_mesh, shape, rows, class_dims[0] if class_dims else None)


def _note_overwriting(function: str, logits: Tensor, local: Tensor) -> None:
    """Let operations that save the DTensor raise: autograd sees its version, not that of the local tensor."""
    check_not_leaf(function, logits)
    if torch.compiler.is_compiling():  # functionalization keeps what was saved
        return
    torch.autograd.graph.increment_version(logits)
    local.register_hook(lambda _: torch.autograd.graph.increment_version(logits))  # the backward may be what overwrites


def _linear_layout(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> _Layout:
    """The layout of a linear layer's output."""
    if not isinstance(linear_weight, DTensor) or not (linear_bias is None or isinstance(linear_bias, DTensor)):
        raise ValueError(
            "npu_xent.linear_cross_entropy: linear_weight and linear_bias must be DTensors if input or target is one, "
            "which says how their gradients are summed; pass DTensor.from_local(linear_weight, mesh, [Replicate()])"
        )
    if isinstance(input, DTensor) and any(p.is_shard(input.dim() - 1) for p in input.placements):
        raise ValueError(
            f"npu_xent.linear_cross_entropy: input must have whole rows on each rank, but has the placements "
            f"{list(input.placements)}; pass input.redistribute(placements=...)"
        )
    by_row = isinstance(input, DTensor) and any(
        p.is_shard() and not q.is_replicate() for p, q in zip(input.placements, linear_weight.placements, strict=False)
    )
    if not isinstance(input, DTensor) or by_row:
        what = "input has other rows on each rank" if by_row else "input is a plain tensor"
        raise ValueError(
            f"npu_xent.linear_cross_entropy: linear_weight is a DTensor with the placements "
            f"{list(linear_weight.placements)}, but {what}. If FSDP2 shards it, call the loss in the forward of the "
            "module that has it, or after module.unshard(); or pass "
            "linear_weight.full_tensor(grad_placements=[Partial()] * mesh.ndim), since plain full_tensor() loses the "
            "gradients of other ranks, and divide its gradient by mesh.size(). In tensor parallelism pass an input "
            "with Replicate() on that dimension of the mesh"
        )
    _check_placements(LINEAR, "input", input, target)
    _check_placements(LINEAR, "linear_weight", linear_weight, target)
    class_dims = [i for i, p in enumerate(linear_weight.placements) if p.is_shard(0)]
    rows = tuple(p if p.is_shard() else Replicate() for p in input.placements)
    return _Layout(input.device_mesh, input.shape[:-1], rows, class_dims[0] if class_dims else None)


def _check_placements(function: str, argument: str, tensor: DTensor, target: Tensor) -> None:
    """What holds for logits and for the tensors that they are computed from."""
    if tensor.device_mesh.get_coordinate() is None:
        raise ValueError(f"npu_xent.{function}: this rank is not in the mesh of {argument}")
    for placement in tensor.placements:
        # Not isinstance: releases of torch differ in whether _StridedShard is a Shard. Not `in`: for Dynamo.
        if type(placement) is not Replicate and type(placement) is not Shard:
            raise ValueError(
                f"npu_xent.{function}: {argument} must be Replicate() or Shard(dim) on each dimension of the mesh, but "
                f"has the placements {list(tensor.placements)}; pass {argument}.redistribute(placements=...)"
            )
    if target.is_floating_point():
        raise ValueError(
            f"npu_xent.{function}: target must hold class indices if {argument} is a DTensor, but is {target.dtype}; "
            "for class probabilities pass plain tensors, such as full_tensor()"
        )


def _local(
    function: str,
    argument: str,
    tensor: Tensor | None,
    shape: torch.Size,
    mesh: DeviceMesh,
    placements: _Placements,
    grad_placements: _Placements | None = None,
) -> Tensor | None:
    """The local part of a tensor that must have that shape and be placed so. A plain tensor counts as replicated."""
    if tensor is None:
        return None
    if isinstance(tensor, DTensor):
        fits = tensor.device_mesh == mesh and tensor.placements == placements
        seen = f"has {list(tensor.placements)} on {tensor.device_mesh}"
        remedy = f"{argument}.redistribute(mesh, placements)"
    else:
        fits = all(p.is_replicate() for p in placements)
        seen = "is a plain tensor"
        remedy = f"DTensor.from_local({argument}, mesh, placements) of this rank's rows"
    if not fits:
        raise ValueError(
            f"npu_xent.{function}: {argument} must have the placements {list(placements)} on {mesh}, which follow from "
            f"the other arguments', but {seen}; pass {remedy}"
        )
    if tensor.shape != shape:  # before any collective: local shapes may fit on some ranks
        raise ValueError(
            f"npu_xent.{function}: {argument} must have shape {list(shape)} (of all ranks), but has "
            f"{list(tensor.shape)}"
        )
    return tensor.to_local(grad_placements=grad_placements) if isinstance(tensor, DTensor) else tensor


def _loss_dtype(loss_dtype: torch.dtype | None, logits: Tensor) -> torch.dtype:
    """The default of the plain functions, which npu_xent.distributed does not have."""
    autocast = is_autocast_on(logits) and logits.dtype != torch.float64
    return loss_dtype or (torch.float32 if autocast else logits.dtype)
