"""The ranks of test_distributed.py, like distributed_ranks.py: the losses of DTensors.

python dtensor_ranks.py RANKS FOLDER [CASE ...]
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_ranks import SIZES, Rank, close, main, problem
from option_values import factors
from reference import case_id, make_weight, pairwise
from releases import DTENSORS_KEEP_PARTIAL_GRADIENTS, DTENSORS_KEEP_STRIDES, FSDP2_AVERAGES_ON_GLOO
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

import npu_xent
from npu_xent import distributed

# What each dimension of the mesh shards.
ONE = ("replicate",), ("rows",), ("classes",)
TWO = ("rows", "classes"), ("classes", "rows"), ("rows", "rows"), ("rows", "replicate"), ("replicate", "classes")
SHAPES = {"[N, C]": 0, "[N, C, d] rows in N": 0, "[N, C, d] rows in d": 2}  # the dimension of the logits that has rows
if not DTENSORS_KEEP_STRIDES:
    del SHAPES["[N, C, d] rows in d"]
BACKWARDS = ("backward", "full_tensor", "redistribute")
SHARED: dict[str, Any] = {
    "mesh": ONE + TWO,
    "size": tuple(SIZES),
    "rows": (36, 37, 3),
    "plain_target": (False, True),
    "backward": BACKWARDS,
    "loss_parallel": (False, True),
}
LOSSES = pairwise(
    SHARED
    | factors(
        *("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", "softcap", "logit_scale"),
        *("return_lse", "return_z_loss"),
        shape=tuple(SHAPES),
        consume=(False, True),
    )
)
LINEAR = pairwise(
    SHARED
    | factors(
        *("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", "softcap", "logit_scale"),
        shape=("[N, H]", "[B, T, H]"),
        bias=(False, True),
        chunk_rows=(None, 5),
    )
)
LOG_PROBS = pairwise(
    SHARED
    | factors(
        *("dtype", "softcap", "logit_scale", "temperature", "temperature_by_row", "return_entropy", "return_top1"),
        shape=("[N, C]", "[B, T, C]"),
        consume=(False, True),
    )
)


@functools.cache
def mesh_of(ranks: int, dims: int, *, backwards: bool = False) -> DeviceMesh:
    """All ranks, in one or two dimensions: 2 x 2 of four."""
    if backwards:
        return DeviceMesh("cpu", list(range(ranks))[::-1])
    return init_device_mesh("cpu", (ranks,) if dims == 1 else (2, ranks // 2) if ranks % 2 == 0 else (1, ranks))


def placed(mesh: tuple[str, ...], rows: Any, classes: Any) -> list[Any]:
    """Placements on dimensions of the mesh that shard rows, and on those that shard classes."""
    return [{"replicate": Replicate(), "rows": rows, "classes": classes}[what] for what in mesh]


def counted(call: Callable[[], Any], expected: dict[str, int]) -> Any:
    """What a call returns, after a check of its collectives."""
    with CommDebugMode() as debug:
        result = call()
    seen = dict.fromkeys(expected, 0)
    for op, count in debug.get_comm_counts().items():
        kind = next((kind for kind in expected if kind in str(op)), str(op))
        seen[kind] = seen.get(kind, 0) + count
    assert seen == expected, f"collectives {seen}, not {expected}"
    return result


def run(
    case: dict[str, Any],
    call: Callable[[], Any],
    upstream: dict[str, Tensor],
    sums: set[str],
    row_placements: list[Any],
    *,
    reduces: int = 0,
    gathers: int | None = None,
) -> list[Tensor | None]:
    """Call, check the placements and the collectives of the outputs, and go backward. The whole outputs.

    `upstream` has the gradients of the outputs that have one, by name; `sums` names the outputs that are sums of rows.
    """
    expected = {
        "allreduce": reduces,
        "allgather": case["mesh"].count("classes") if gathers is None else gathers,
    }
    with loss_parallel() if case["loss_parallel"] else contextlib.nullcontext():
        out = counted(call, expected)
        outputs = {"loss": out} if isinstance(out, Tensor) else out._asdict()
        outputs = {name: output for name, output in outputs.items() if output is not None}
        for name, output in outputs.items():
            wanted = row_placements
            if name in sums:
                wanted = [Partial() if p.is_shard() else p for p in row_placements]
            assert list(output.placements) == wanted, f"{name} has {output.placements}, not {wanted}"
        mesh = next(iter(outputs.values())).device_mesh
        given = {name: outputs[name] for name in upstream}
        if case["backward"] == "backward":
            grads = [
                distribute_tensor(g.to(t.dtype), mesh, [p if p.is_shard() else Replicate() for p in t.placements])
                for g, t in zip(upstream.values(), given.values(), strict=True)
            ]
            backward = functools.partial(torch.autograd.backward, list(given.values()), grads)
            counted(backward, {"allreduce": 0}) if DTENSORS_KEEP_PARTIAL_GRADIENTS else backward()
        else:
            whole = [
                t.to_local()
                if not DTENSORS_KEEP_PARTIAL_GRADIENTS and all(p.is_replicate() for p in t.placements)
                else t.full_tensor()
                if case["backward"] == "full_tensor"
                else t.redistribute(placements=[Replicate()] * mesh.ndim).to_local()
                for t in given.values()
            ]
            torch.autograd.backward(whole, [g.to(t.dtype) for g, t in zip(upstream.values(), whole, strict=True)])
    return [output.detach().full_tensor() for output in outputs.values()]


def checked_grad(name: str, leaf: DTensor, wanted: list[Any], true: Tensor, dtype: torch.dtype, size: float) -> Tensor:
    """The whole gradient, after a check."""
    exact = not DTENSORS_KEEP_PARTIAL_GRADIENTS or list(leaf.grad.placements) == wanted
    assert exact, f"gradient of {name} has {leaf.grad.placements}, not {wanted}"
    grad = leaf.grad.full_tensor()
    close(f"gradient of {name}", grad, true, dtype, size)
    return grad


def exact_of(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def target_of(case: dict[str, Any], target: Tensor, mesh: DeviceMesh, placements: list[Any]) -> Tensor:
    """A DTensor, or a plain tensor where that is allowed."""
    plain = case["plain_target"] and "rows" not in case["mesh"]
    return target if plain else distribute_tensor(target, mesh, placements)


def loss(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """cross_entropy beside that of the whole logits in float64."""
    dtype, classes, axis = case["dtype"], SIZES[case["size"]], SHAPES[case["shape"]]
    mesh = mesh_of(at.ranks, len(case["mesh"]))
    logits, target = (x[: case["rows"]] for x in problem(classes, dtype))
    if case["shape"] != "[N, C]":
        logits, target = logits[:36].view(-1, 3, classes).movedim(-1, 1), target[:36].view(-1, 3)
    weight = make_weight(classes, torch.float32, torch.device("cpu")) if case["weighted"] else None
    options = {
        name: case[name]
        for name in ("reduction", "label_smoothing", "lse_square_scale", "softcap", "logit_scale", "return_lse")
    } | {"return_z_loss": case["return_z_loss"]}
    where = placed(case["mesh"], Shard(axis), Shard(1))
    rows = placed(case["mesh"], Shard(min(axis, 1)), Replicate())
    leaf = distribute_tensor(logits, mesh, where).requires_grad_()
    of_rows = target_of(case, target, mesh, rows)
    class_weight = weight
    if weight is not None and case["plain_target"]:
        class_weight = distribute_tensor(weight, mesh, [Replicate()] * mesh.ndim)
    mean = options["reduction"] == "mean"
    upstream = {"loss": torch.tensor(1.5)}
    if options["reduction"] == "none":
        upstream = {"loss": torch.linspace(0.5, 2.0, target.numel()).view(target.shape)}
    if case["return_lse"]:
        upstream["lse"] = torch.linspace(-1.0, 1.0, target.numel()).view(target.shape)
    outputs = run(
        case,
        lambda: npu_xent.cross_entropy(
            leaf * 1,
            of_rows,
            class_weight,
            **options,
            loss_dtype=exact_of(dtype),
            consume_logits=case["consume"] and logits.dim() == 2,
        ),
        upstream,
        set() if options["reduction"] == "none" else {"loss", "z_loss"},
        rows,
        reduces=case["mesh"].count("rows") if mean else 0,
    )
    whole = logits.double().requires_grad_()
    options |= {"return_lse": True, "return_z_loss": True}
    truth = npu_xent.cross_entropy(whole, target, None if weight is None else weight.double(), **options)
    torch.autograd.backward([getattr(truth, name) for name in upstream], [g.double() for g in upstream.values()])
    size = float(logits.abs().max()) ** (2 if options["lse_square_scale"] else 1)
    size *= target.numel() if options["reduction"] == "sum" else 1
    names = ["loss", *(name for name in ("lse", "z_loss") if case[f"return_{name}"])]
    for name, output in zip(names, outputs, strict=True):
        close(name, output, getattr(truth, name), exact_of(dtype), size)
    grad = checked_grad("input", leaf, where, whole.grad, dtype, float(whole.grad.abs().max()))
    return [*outputs, grad]


def log_probs(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """token_log_probs beside that of the whole logits in float64."""
    dtype, classes = case["dtype"], SIZES[case["size"]]
    mesh = mesh_of(at.ranks, len(case["mesh"]))
    logits, target = (x[: case["rows"]] for x in problem(classes, dtype))
    target[1:] = torch.where(torch.arange(1, len(target)) % 2 == 0, logits[1:].argmax(1), target[1:])
    by_row, axis = case["temperature_by_row"] and "classes" not in case["mesh"], 0
    if case["shape"] != "[N, C]":
        logits, target, axis = logits[:36].view(-1, 3, classes), target[:36].view(-1, 3), 1
    options = {name: case[name] for name in ("softcap", "logit_scale", "return_entropy", "return_top1")}
    where, rows = (
        placed(case["mesh"], Shard(axis), Shard(logits.dim() - 1)),
        placed(case["mesh"], Shard(axis), Replicate()),
    )
    temperature: Any = case["temperature"]
    if by_row:
        temperature = torch.linspace(0.5, 1.5, target.numel(), dtype=exact_of(dtype)).view(target.shape)
    leaf = distribute_tensor(logits, mesh, where).requires_grad_()
    of_rows = target_of(case, target, mesh, rows)
    placed_temperature = target_of(case, temperature, mesh, rows) if by_row else temperature
    upstream = {"log_probs": torch.linspace(0.5, 2.0, target.numel()).view(target.shape)}
    if case["return_entropy"]:
        upstream["entropy"] = torch.linspace(-1.0, 1.0, target.numel()).view(target.shape)
    if not (case["return_entropy"] or case["return_top1"]):
        upstream = {"loss": upstream["log_probs"]}
    outputs = run(
        case,
        lambda: npu_xent.token_log_probs(
            leaf * 1,
            of_rows,
            temperature=placed_temperature,
            **options,
            consume_logits=case["consume"],
        ),
        upstream,
        set(),
        rows,
    )
    whole = logits.double().requires_grad_()
    if by_row:
        temperature = temperature.double()
    truth = npu_xent.token_log_probs(whole, target, temperature=temperature, **options)
    truth = [truth] if isinstance(truth, Tensor) else [x for x in truth if x is not None]
    torch.autograd.backward(truth[: len(upstream)], [g.double() for g in upstream.values()])
    for output, true in zip(outputs, truth, strict=True):
        if true.dtype == torch.bool:
            assert torch.equal(output, true), "top1 differs"
        else:
            close("output", output, true, exact_of(dtype), 40.0)
    return [*outputs, checked_grad("logits", leaf, where, whole.grad, dtype, 20.0)]


def linear(at: Rank, case: dict[str, Any]) -> list[Tensor]:
    """linear_cross_entropy beside that of the whole layer in float64."""
    dtype, classes, features = case["dtype"], SIZES[case["size"]], 8
    mesh, number = mesh_of(at.ranks, len(case["mesh"])), case["rows"]
    generator = torch.Generator().manual_seed(classes)
    x, layer = (torch.randn(size, features, generator=generator).to(dtype) for size in (number, classes))
    bias = torch.randn(classes, generator=generator).to(dtype) if case["bias"] else None
    target = torch.randint(classes, (number,), generator=generator)
    target[::5] = -100
    axis = 0
    if case["shape"] != "[N, H]":
        x, target, axis = x[:36].view(-1, 3, features).movedim(0, 1), target[:36].view(-1, 3).T, 1
    weight = make_weight(classes, torch.float32, torch.device("cpu")) if case["weighted"] else None
    options = {name: case[name] for name in ("reduction", "label_smoothing", "lse_square_scale", "softcap")}
    options |= {"logit_scale": case["logit_scale"], "chunk_rows": case["chunk_rows"]}
    rows = placed(case["mesh"], Shard(axis), Replicate())
    of_layer = placed(case["mesh"], Replicate(), Shard(0))
    leaves = [distribute_tensor(x, mesh, rows).requires_grad_()]
    leaves += [distribute_tensor(t, mesh, of_layer).requires_grad_() for t in (layer, bias) if t is not None]
    of_rows = target_of(case, target, mesh, rows)
    mean = options["reduction"] == "mean"
    upstream = torch.tensor(1.5)
    if options["reduction"] == "none":
        upstream = torch.linspace(0.5, 2.0, target.numel()).view(target.shape)
    # One gather a chunk of this rank's rows; without rows one too, to compare the classes.
    local_rows = leaves[0].to_local().shape[:-1].numel()
    chunks = (1 if case["chunk_rows"] is None else max(1, -(-local_rows // 5))) * ("classes" in case["mesh"])
    outputs = run(
        case,
        lambda: npu_xent.linear_cross_entropy(
            leaves[0] * 1,
            leaves[1],
            of_rows,
            linear_bias=leaves[2] if bias is not None else None,
            weight=weight,
            loss_dtype=exact_of(dtype),
            **options,
        ),
        {"loss": upstream},
        set() if options["reduction"] == "none" else {"loss"},
        rows,
        reduces=case["mesh"].count("rows") if mean else 0,
        gathers=int(chunks),
    )
    whole = [t.double().requires_grad_() for t in (x, layer, bias) if t is not None]
    truth = npu_xent.linear_cross_entropy(
        *whole[:2],
        target,
        linear_bias=whole[2] if bias is not None else None,
        weight=None if weight is None else weight.double(),
        **options,
    )
    truth.backward(upstream.double())
    close("loss", outputs[0], truth, dtype, 60.0 * float(truth.abs().max() if options["reduction"] == "sum" else 1))
    summed = [Partial() if what == "classes" else p for what, p in zip(case["mesh"], rows, strict=True)]
    of_sums = placed(case["mesh"], Partial(), Shard(0))
    grads, size = [], 20.0 * float(max(t.grad.abs().max() for t in whole))
    for name, leaf, wanted, t in zip(
        ("input", "weight", "bias"), leaves, (summed, of_sums, of_sums), whole, strict=False
    ):
        grads.append(checked_grad(name, leaf, wanted, t.grad, dtype, size))
    return [*outputs, *grads]


def leaf_of(tensor: Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    return distribute_tensor(tensor, mesh, placements).requires_grad_()


def one_row(at: Rank, _: Any) -> list[Tensor]:
    """[C] logits and a target of no dimension."""
    mesh, logits, target = mesh_of(at.ranks, 1), torch.linspace(-1, 1, 7), torch.tensor(3)
    leaf = leaf_of(logits, mesh, Shard(0))
    out = npu_xent.cross_entropy(leaf, target, return_lse=True)
    assert out.loss.shape == out.lse.shape == ()
    torch.testing.assert_close(out.loss.full_tensor(), npu_xent.cross_entropy(logits, target))
    torch.testing.assert_close(npu_xent.token_log_probs(leaf, target).full_tensor(), -out.loss.full_tensor())
    return [out.loss.full_tensor(), out.lse.full_tensor()]


def other_orders(at: Rank, _: Any) -> list[Tensor]:
    """A mesh whose ranks are not in ascending order: this rank's classes are those of its place in the mesh."""
    mesh = mesh_of(at.ranks, 1, backwards=True)
    logits, target = problem(61, torch.float64)
    begin, end = Rank(at.ranks - 1 - at.rank, at.ranks).bounds(61)
    local = logits[:, begin:end].clone().requires_grad_()
    leaf = DTensor.from_local(local, mesh, [Shard(1)], shape=logits.shape, stride=logits.stride())
    whole = logits.clone().requires_grad_()
    mine, true = npu_xent.cross_entropy(leaf, target), npu_xent.cross_entropy(whole, target)
    torch.testing.assert_close(mine.to_local(), true)
    mine.backward()
    true.backward()
    torch.testing.assert_close(local.grad, whole.grad[:, begin:end])
    # Of equal logits the first is top-1.
    equal, each = torch.zeros(61, 61), torch.arange(61)
    shard = DTensor.from_local(equal[:, begin:end], mesh, [Shard(1)], shape=equal.shape, stride=equal.stride())
    top1 = npu_xent.token_log_probs(shard, each, return_top1=True).top1.to_local()
    assert torch.equal(top1, each == 0)
    return [mine.to_local().detach(), top1]


def without_kept_rows(at: Rank, _: Any) -> list[Tensor]:
    """The mean of no rows is NaN, and its gradient 0, as of whole tensors."""
    mesh, logits, target = mesh_of(at.ranks, 1), torch.ones(5, 7), torch.full((5,), -100)
    out = []
    for where, rows in ((Shard(0), Shard(0)), (Shard(1), Replicate())):
        leaf = leaf_of(logits, mesh, where)
        mine = npu_xent.cross_entropy(leaf, distribute_tensor(target, mesh, [rows])).full_tensor()
        mine.backward()
        assert mine.isnan()
        assert not leaf.grad.full_tensor().any()
        out.append(mine.detach())
    return out


def dtypes(at: Rank, _: Any) -> list[Tensor]:
    """The loss has the dtype of cross_entropy's, with autocast and without."""
    mesh, target = mesh_of(at.ranks, 1), torch.arange(6)
    for where, rows in ((Shard(0), Shard(0)), (Shard(1), Replicate())):
        logits = distribute_tensor(torch.ones(6, 8, dtype=torch.bfloat16), mesh, [where])
        of_rows = distribute_tensor(target, mesh, [rows])
        x, layer = distribute_tensor(torch.ones(6, 4), mesh, [rows]), torch.ones(8, 4)
        layer = distribute_tensor(layer, mesh, [Shard(0) if rows.is_replicate() else Replicate()])
        assert npu_xent.cross_entropy(logits, of_rows).dtype == torch.bfloat16
        assert npu_xent.linear_cross_entropy(x, layer, of_rows).dtype == torch.float32
        assert npu_xent.linear_cross_entropy(x.bfloat16(), layer.bfloat16(), of_rows).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert npu_xent.cross_entropy(logits, of_rows).dtype == torch.float32
            assert npu_xent.linear_cross_entropy(x, layer, of_rows).dtype == torch.float32
    return []


def module(at: Rank, _: Any) -> list[Tensor]:
    """CrossEntropyLoss, and logits that are still being gathered."""
    mesh = mesh_of(at.ranks, 1)
    logits, target = problem(60, torch.float32)
    criterion = npu_xent.CrossEntropyLoss(make_weight(60, torch.float32, torch.device("cpu")))
    leaf = leaf_of(logits, mesh, Shard(1))
    mine = criterion(leaf, target).full_tensor()
    torch.testing.assert_close(mine, criterion(logits, target))
    gathered = leaf.redistribute(placements=[Replicate()], async_op=True)
    late = criterion(gathered, target).full_tensor()
    torch.testing.assert_close(late, mine)
    late.backward()
    return [mine.detach(), late.detach(), leaf.grad.full_tensor()]


def overwritten(at: Rank, _: Any) -> list[Tensor]:
    """consume_logits uses the memory of the logits, and an operation that has saved them raises in its backward."""
    mesh = mesh_of(at.ranks, 1)
    values, target = problem(60, torch.float32)
    layouts = ((Shard(0), Shard(0)), (Shard(1), Replicate()), (Replicate(), Replicate()))
    for (where, rows), reduction in itertools.product(layouts, ("mean", "sum", "none")):
        loss = functools.partial(npu_xent.cross_entropy, reduction=reduction, consume_logits=True)
        of_rows = distribute_tensor(target, mesh, [rows])
        leaf = leaf_of(values, mesh, where)
        logits = leaf * 1
        loss(logits, of_rows).full_tensor().sum().backward()
        torch.testing.assert_close(logits.to_local(), leaf.grad.to_local())
        logits = leaf.tanh()
        with torch.no_grad():
            kept = logits.to_local().clone()
            loss(logits, of_rows)
            assert torch.equal(kept, logits.to_local())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss(logits, of_rows).full_tensor().sum().backward()
        if reduction == "none":  # overwritten in the backward: what has saved them after the loss raises too
            logits = leaf * 1
            total = loss(logits, of_rows).full_tensor().sum()
            squares = logits.square()
            total.backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                squares.sum().backward()
    return []


def partial_backward(at: Rank, _: Any) -> list[Tensor]:
    """Backward of a Partial loss without a gradient of its own."""
    logits, target = problem(60, torch.float32)
    mesh, whole = mesh_of(at.ranks, 1), logits.clone().requires_grad_()
    leaf = leaf_of(logits, mesh, Shard(0))
    npu_xent.cross_entropy(leaf, distribute_tensor(target, mesh, [Shard(0)])).backward()
    F.cross_entropy(whole, target).backward()
    torch.testing.assert_close(leaf.grad.full_tensor(), whole.grad)
    return []


def compiled(at: Rank, _: Any) -> list[Tensor]:
    """One graph, with gradients."""
    mesh = mesh_of(at.ranks, 1)
    logits, target = problem(60, torch.float32)
    x, layer = torch.linspace(-1, 1, 37 * 4).view(37, 4), torch.linspace(-1, 1, 60 * 4).view(60, 4)
    out = []
    for where, rows in ((Shard(0), Shard(0)), (Shard(1), Replicate())):
        of_rows = distribute_tensor(target, mesh, [rows])
        leaves = [leaf_of(logits, mesh, where), leaf_of(x, mesh, rows)]
        leaves.append(leaf_of(layer, mesh, Shard(0) if rows.is_replicate() else Replicate()))

        def step(z: DTensor, x: DTensor, layer: DTensor, of_rows: DTensor = of_rows) -> Tensor:
            losses = [
                npu_xent.cross_entropy(z, of_rows),
                npu_xent.token_log_probs(z, of_rows),
                npu_xent.linear_cross_entropy(x, layer, of_rows),
            ]
            return sum(loss.full_tensor().sum() for loss in losses)

        results = []
        for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            total = function(*leaves)
            grads = torch.autograd.grad(total, leaves)
            results.append([total.detach(), *(grad.full_tensor() for grad in grads)])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
        out += results[0]
    return out


def fsdp2(at: Rank, _: Any) -> list[Tensor]:
    """The ways that the error names have the gradient of all ranks' rows; full_tensor() alone has not."""
    mesh, rows = mesh_of(at.ranks, 1), 4 * at.ranks
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 5, generator=generator), torch.randn(9, 5, generator=generator)
    target = torch.randint(9, (rows,), generator=generator)
    whole = weight.clone().requires_grad_()
    (F.cross_entropy(F.linear(x, whole), target, reduction="sum") / at.ranks).backward()
    mine, of_mine = x.chunk(at.ranks)[at.rank], target.chunk(at.ranks)[at.rank]

    def head() -> Any:
        layer = nn.Linear(5, 9, bias=False)
        layer.weight.data.copy_(weight)
        return fully_shard(layer, mesh=mesh)

    layer = head()
    for wrong in (mine, distribute_tensor(x, mesh, [Shard(0)])):
        with pytest.raises(ValueError, match=re.escape("module.unshard(); or pass linear_weight.full_tensor(grad_pla")):
            npu_xent.linear_cross_entropy(wrong, layer.weight, of_mine)
    gathered = layer.weight.full_tensor(grad_placements=[Partial()])
    (npu_xent.linear_cross_entropy(mine, gathered, of_mine, reduction="sum") / at.ranks).backward()
    torch.testing.assert_close(layer.weight.grad.full_tensor(), whole.grad)
    layer, trunk = head(), nn.Linear(5, 5, bias=False)  # the whole model, whose gradients FSDP2 averages
    nn.init.eye_(trunk.weight)
    true_trunk = torch.eye(5).requires_grad_()
    true_head = weight.clone().requires_grad_()
    F.cross_entropy(F.linear(x @ true_trunk.T, true_head), target).backward()
    fully_shard(trunk, mesh=mesh)
    gathered = layer.weight.full_tensor(grad_placements=[Partial()])
    gathered.register_hook(lambda grad: grad / at.ranks)
    npu_xent.linear_cross_entropy(trunk(mine), gathered, of_mine).backward()
    torch.testing.assert_close(layer.weight.grad.full_tensor(), true_head.grad)
    summed = 1 if FSDP2_AVERAGES_ON_GLOO else at.ranks
    torch.testing.assert_close(trunk.weight.grad.full_tensor(), true_trunk.grad * summed)
    layer = head()
    (npu_xent.linear_cross_entropy(mine, layer.weight.full_tensor(), of_mine, reduction="sum") / at.ranks).backward()
    assert at.ranks == 1 or not torch.allclose(layer.weight.grad.full_tensor(), whole.grad)
    return []


def refusals(at: Rank, _: Any) -> list[Tensor]:
    """On every rank."""
    mesh, two = mesh_of(at.ranks, 1), mesh_of(at.ranks, 2)
    plain, y, h, w = torch.ones(6, 8), torch.zeros(6, dtype=torch.long), torch.ones(6, 4), torch.ones(8, 4)
    rows, columns = distribute_tensor(plain, mesh, [Shard(0)]), distribute_tensor(plain, mesh, [Shard(1)])
    x, layer = distribute_tensor(h, mesh, [Replicate()]), distribute_tensor(w, mesh, [Shard(0)])
    whole = distribute_tensor(y, mesh, [Replicate()])
    partial = DTensor.from_local(plain, mesh, [Partial()])
    apart = leaf_of(plain.unsqueeze(2), mesh, Shard(1)) * 1
    twice = distribute_tensor(plain, two, [Shard(1), Shard(1)])
    ce, lp, linear_loss = npu_xent.cross_entropy, npu_xent.token_log_probs, npu_xent.linear_cross_entropy
    among = "is a plain tensor among DTensors; pass DTensor.from_local("
    placements = "target must have the placements [Shard(dim=0)] on "
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("cross_entropy: input " + among, lambda: ce(plain, whole)),
        ("token_log_probs: logits " + among, lambda: lp(plain, whole)),
        ("input must be Replicate() or Shard(dim) on each dimension of the mesh, but has", lambda: ce(partial, y)),
        ("logits must be Replicate() or Shard(dim) on each dimension of the mesh", lambda: lp(partial, y)),
        ("but has the placements [Partial(sum)]; pass input.redistribute(", lambda: ce(partial, y)),
        ("input must have its classes sharded over one dimension of the mesh at most", lambda: ce(twice, y)),
        (placements, lambda: ce(rows, y)),
        ("but is a plain tensor; pass DTensor.from_local(target, mesh, placements)", lambda: ce(rows, y)),
        (placements, lambda: lp(rows, whole)),
        (
            "logits is a DTensor; call npu_xent.cross_entropy",
            lambda: distributed.vocab_parallel_cross_entropy(columns, y),
        ),
        ("target must have shape [6] (of all ranks), but has [5]", lambda: ce(rows, rows_of(y[:5], mesh))),
        ("consume_logits needs contiguous logits", lambda: ce(apart, y[:, None], consume_logits=True)),
        ("consume_logits would overwrite a leaf", lambda: lp(leaf_of(plain, mesh, Shard(1)), y, consume_logits=True)),
        ("but has [Replicate()] on ", lambda: ce(rows, whole)),
        ("pass target.redistribute(mesh, placements)", lambda: ce(rows, whole)),
        ("target must have the placements", lambda: ce(columns, distribute_tensor(y, two, [Replicate()] * 2))),
        ("weight must have the placements", lambda: ce(columns, y, distribute_tensor(torch.ones(8), mesh, [Shard(0)]))),
        ("target must hold class indices if input is a DTensor, but is torch.float32", lambda: ce(columns, plain)),
        (
            "consume_logits would overwrite a leaf",
            lambda: ce(leaf_of(plain, mesh, Shard(1)), whole, consume_logits=True),
        ),
        ("temperature must be a number where", lambda: lp(columns, y, temperature=torch.ones(6))),
        ("temperature must have the placements", lambda: lp(rows, rows_of(y, mesh), temperature=torch.ones(6))),
        ("returns the loss alone; leave return_lse", lambda: linear_loss(x, layer, y, return_lse=True)),
        ("returns the loss alone; leave return_lse", lambda: linear_loss(x, layer, y, return_z_loss=True)),
        ("but input is a plain tensor. If FSDP2 shards it, call", lambda: linear_loss(h, layer, y)),
        ("but input has other rows on each rank. If FSDP2", lambda: linear_loss(rows_of(h, mesh), layer, y)),
        ("linear_weight and linear_bias must be DTensors if", lambda: linear_loss(x, w, y)),
        ("linear_weight and linear_bias must be DTensors if", lambda: linear_loss(x, layer, y, linear_bias=w[:, 0])),
        (
            "linear_bias must have shape [8] (of all ranks), but has [7]",
            lambda: linear_loss(x, layer, y, linear_bias=leaf_of(w[:7, 0], mesh, Shard(0))),
        ),
        (
            "linear_bias must have the placements",
            lambda: linear_loss(x, layer, y, linear_bias=leaf_of(w[:, 0], mesh, Replicate())),
        ),
        ("linear_weight must have the placements", lambda: linear_loss(x, distribute_tensor(w, mesh, [Shard(1)]), y)),
        (
            "input must have whole rows on each rank",
            lambda: linear_loss(distribute_tensor(h, mesh, [Shard(1)]), leaf_of(w, mesh, Replicate()), y),
        ),
        ("input must be Replicate() or", lambda: linear_loss(DTensor.from_local(h, mesh, [Partial()]), layer, y)),
        ("class probabilities pass plain tensors", lambda: linear_loss(x, layer, plain)),
    ]
    for words, call in calls:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    if at.ranks > 1:
        first = DeviceMesh("cpu", [0])
        if at.rank > 0:
            with pytest.raises(ValueError, match="this rank is not in the mesh of input"):
                ce(DTensor.from_local(plain, first, [Replicate()]), y)
    return []


def rows_of(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(tensor, mesh, [Shard(0)])


SINGLE = (
    *(one_row, other_orders, without_kept_rows, dtypes, module, overwritten, partial_backward, compiled),
    *(fsdp2, refusals),
)
CASES: dict[str, tuple[Callable[[Rank, Any], list[Tensor]], Any]] = {
    **{f"loss-{case_id(case)}": (loss, case) for case in LOSSES},
    **{f"linear-{case_id(case)}": (linear, case) for case in LINEAR},
    **{f"log_probs-{case_id(case)}": (log_probs, case) for case in LOG_PROBS},
    **{case.__name__: (case, None) for case in SINGLE},
}

if __name__ == "__main__":
    main(CASES, *sys.argv[1:])
