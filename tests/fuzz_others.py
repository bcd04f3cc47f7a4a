"""The rest of tests/fuzz_functions.py: npu_xent.compat, npu_xent.distributed with one rank, and the operators."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from fuzz_functions import (
    _LOSS,
    Call,
    Near,
    Rules,
    Truth,
    _int64,
    _layer_rules,
    _loss_options,
    _plain_index,
    _reduced,
    _target_of,
    _token_outputs,
    _values,
    grad_terms,
    is_freed,
    linear_cross_entropy_truth,
    logit_numbers,
    loss_numbers,
    loss_terms,
    loss_truth,
    lse_terms,
    near,
    number,
    options,
    spoil,
    z_terms,
)
from fuzz_functions import _head as head
from fuzz_functions import _rows_shape as rows_shape
from fuzz_inputs import INTEGERS, LOGITS, Source
from reference import stats_dtype, truth
from torch import Tensor

import npu_xent
from npu_xent import compat, distributed


def rows_of(
    x: Tensor, y: Tensor, of_loss: Any, upstream: Tensor | None, dtype: torch.dtype, **chosen: Any
) -> tuple[Near, Near]:
    """A loss made of the rows' losses by `of_loss`, and the gradient of the rows' logits."""
    plain = truth(x, y, reduction="none", **chosen)
    rows = plain.loss.clone().requires_grad_()
    loss = of_loss(rows)
    grad = torch.ones_like(loss) if upstream is None else upstream.double().reshape(loss.shape)
    (by_row,) = torch.autograd.grad(loss, rows, grad, allow_unused=True)
    by_row = torch.zeros_like(rows) if by_row is None else by_row
    t = truth(x, y, reduction="none", grad_loss=by_row, **chosen)
    options = {"reduction": "none", "label_smoothing": 0.0, **chosen}
    terms = loss_terms(t, y, x.shape[1], None, options)
    terms = of_loss(terms.nan_to_num(0, 0, 0) + t.loss.abs().nan_to_num(0, 0, 0)).detach().abs()
    loss = loss.detach()
    return near(loss, 2 * terms.nan_to_num(0, 0, 0), dtype, 2, of=x.dtype), near(
        t.grad, grad_terms(t).nan_to_num(0, 0, 0), x.dtype, 2
    )


# nnsight --------------------------------------------------------------------------------------------------------------


def nnsight(source: Source) -> Call:
    chosen, _ = options(source, ("shift", "avg_batch", "avg_token"))
    kind = source.random()
    shape = [source.pick((0, 1, 2, 3)), source.pick((0, 1, 2, 5))] if kind < 0.7 else [source.rows()]
    dtype, classes = source.pick(LOGITS), source.classes()
    x = source.logits([*shape, classes], dtype, -1)
    x = x.clamp(-100, 100) if dtype is torch.float16 else x
    arguments: dict[str, Any] = {"logits": x, "target_ids": source.target(shape, classes, -100)}
    spoil(source, arguments, ("logits", "target_ids"))
    return Call(
        "npu_xent.compat.nnsight.cross_entropy_loss",
        compat.nnsight.cross_entropy_loss,
        arguments | chosen,
        ("logits",),
        nnsight_rules,
        nnsight_truth,
    )


def nnsight_rules(r: Rules) -> None:
    a = r.a
    r.flag("shift", "avg_batch", "avg_token")
    if not r.dense("logits", "target_ids"):
        return
    x, y = a["logits"], a["target_ids"]
    r.logits("logits")
    r.stored("logits", "target_ids")
    if x.is_meta != y.is_meta:  # from one device to another is documented, but not to meta and back
        r.open |= {"logits", "target_ids", "device"}
    if y.dtype not in INTEGERS:  # "converted to int64"
        r.open |= {"target_ids", "target"}
    x_shape = (1, *x.shape) if x.dim() == 2 else tuple(x.shape)
    y_shape = (1, *y.shape) if y.dim() == 1 else tuple(y.shape)
    if not r.need(len(x_shape) == 3 and x_shape[:2] == y_shape, AssertionError, "logits", "target_ids"):
        return
    r.need(x_shape[2] > 0, ValueError, "logits")
    if y.dtype not in INTEGERS or y.is_meta or x.is_meta or is_freed(y):
        return
    scored = _int64(y.cpu()).reshape(y_shape)
    scored = scored[:, 1:] if a.get("shift") else scored
    bad = ((scored < 0) | (scored >= x_shape[2])) & (scored != -100)
    r.in_range(not bool(bad.any()), x.device, IndexError, "target_ids")


def nnsight_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y = _values(a, "logits"), _int64(_values(a, "target_ids"))
    shape = x.shape
    x = x[None] if x.dim() == 2 else x
    y = y[None] if y.dim() == 1 else y
    batch, length, classes = x.shape
    shift, avg_batch, avg_token = bool(a.get("shift")), bool(a.get("avg_batch", True)), bool(a.get("avg_token", True))
    if shift and length:
        y = torch.cat([y[:, 1:], torch.full((batch, 1), -100)], 1)

    def of_loss(rows: Tensor) -> Tensor:
        loss = rows.view(batch, length)
        if avg_token:
            loss = loss.sum(1) / (y != -100).sum(1)
        elif shift:
            loss = loss[:, : max(length - 1, 0)]
        return loss.mean(0) if avg_batch else loss

    dtype = stats_dtype(x.dtype) if a["autocast"] else x.dtype
    up = upstream["loss"].detach().cpu().as_subclass(Tensor) if "loss" in upstream else None
    rows = x.reshape(batch * length, classes)
    loss, grad = rows_of(rows, y.reshape(-1), of_loss, up, dtype, ignore_index=-100)
    return {"loss": loss, "logits": Near(grad.value.view(shape), grad.allowed.view(shape), grad.dtype)}


# unit_scaling ---------------------------------------------------------------------------------------------------------


def unit_scaling(source: Source) -> Call:
    chosen, compared = options(source, ("ignore_index", "reduction", "mult"))
    if source.maybe(0.05):
        chosen.update(
            source.pick(
                (
                    {"weight": torch.ones(3)},
                    {"label_smoothing": 0.1},
                    {"label_smoothing": torch.tensor([0.0, 0.1])},
                    {"reduce": True},
                    {"size_average": False},
                    {"label_smoothing": 0},
                    {"weight": 0.0},
                )
            )
        )
    dtype, classes = source.pick(LOGITS), source.classes()
    shape = [source.rows(), classes] if source.maybe(0.85) else [classes] if source.maybe(0.7) else [2, classes, 3]
    dim = min(len(shape) - 1, 1)
    x = source.logits(shape, dtype, dim)
    y = _target_of(source, x, dim, chosen.get("ignore_index", -100), 0.1)
    x = x.clamp(-50, 50) if dtype is torch.float16 else x
    if y.is_floating_point():
        x = x.nan_to_num(0, 0, 0).clamp(-20, 20)
    arguments: dict[str, Any] = {"input": x, "target": y}
    spoil(source, arguments, ("input", "target"))
    call = Call(
        "npu_xent.compat.unit_scaling.cross_entropy",
        compat.unit_scaling.cross_entropy,
        arguments | chosen,
        ("input",),
        unit_scaling_rules,
        unit_scaling_truth,
        compared=compared,
    )
    if source.maybe(0.3):
        call.name = "npu_xent.compat.unit_scaling.CrossEntropyLoss"
        call.function = lambda input, target, **keywords: compat.unit_scaling.CrossEntropyLoss(**keywords)(
            input, target
        )
    return call


def unit_scaling_rules(r: Rules) -> None:
    a = r.a
    r.reduction(("mean", "sum"), AssertionError)
    for name, default in (("weight", None), ("size_average", None), ("reduce", None), ("label_smoothing", 0)):
        value = a.get(name, default)
        kept = value is default or (isinstance(value, (int, float)) and default is not None and value == default)
        r.need(kept, ValueError, name)
    if "mult" in a:
        r.number("mult", -1.7976931348623157e308, 1.7976931348623157e308)
    ignore_index = r.number("ignore_index", -(2**63), 2**63 - 1, whole=True)
    if not r.dense("input", "target"):
        return
    x, y = a["input"], a["target"]
    r.logits("input")
    r.one_device("input", "target")
    r.stored("input", "target")
    if not r.need(x.dim() in (1, 2), AssertionError, "input"):
        return
    rows, classes = (1, len(x)) if x.dim() == 1 else x.shape
    r.need(classes > 0, ValueError, "input")
    r.need(classes != 1, ZeroDivisionError, "division", "V")
    r.need(rows > 0 or a.get("reduction", "mean") != "mean", ZeroDivisionError, "division", "N")
    if y.is_floating_point():
        r.need(y.shape == x.shape, ValueError, "target")
        r.need(ignore_index is None or ignore_index < 0, RuntimeError, "ignore_index")
        if y.dtype not in LOGITS:
            r.open.add("target")
        return
    single = x.dim() == 1 and y.numel() == 1
    r.need(y.shape == x.shape[:-1] or single, ValueError, "target")
    if single and y.dim():
        r.open.add("target")
    if r.need(y.dtype in INTEGERS, TypeError, "target"):
        r.classes_in("target", classes, -100 if ignore_index is None else ignore_index)


def unit_scaling_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y = _values(a, "input"), _values(a, "target")
    if y.is_floating_point():
        return {}
    shape, classes = x.shape, x.shape[-1]
    x, y = x.reshape(shape[:-1].numel(), classes), _int64(y).reshape(-1)
    factor = 1 / len(x) if a.get("reduction", "mean") == "mean" else 1.0
    ignore_index = _plain_index(a.get("ignore_index", -100))
    t = truth(
        x,
        y,
        reduction="sum",
        logit_scale=number(a.get("mult"), 1.0),
        ignore_index=ignore_index,
        grad_scale=classes / math.sqrt(classes - 1),
        grad_loss=_reduced(upstream, "loss"),
    )
    dtype = stats_dtype(x.dtype) if a["autocast"] else x.dtype
    grad = near(t.grad, grad_terms(t), x.dtype, 3)
    options = {"reduction": "sum", "label_smoothing": 0.0, "ignore_index": ignore_index}
    terms = loss_terms(t, y, classes, None, options)
    return {
        "loss": near(t.loss * factor, 2 * terms * factor, dtype, 3, of=x.dtype),
        "input": Near(grad.value.view(shape), grad.allowed.view(shape), x.dtype),
    }


# mindformers ----------------------------------------------------------------------------------------------------------


def mindformers(source: Source) -> Call:
    rows, classes, dtype = source.rows(), source.classes(), source.pick(LOGITS)
    x = source.logits([rows, classes], dtype, 1)
    mask = (torch.rand(rows, generator=source.tensors) * 1.5).floor() if source.maybe(0.6) else torch.rand(rows)
    kind = source.pick((torch.float32, torch.float32, torch.bool, torch.int64, torch.float64, torch.bfloat16))
    mask = mask.to(kind)
    probabilities = source.maybe(0.15)
    label = (
        source.normal([rows, classes], torch.float32).softmax(1).to(dtype)
        if probabilities
        else source.target([rows], classes, -100)
    )
    if probabilities:
        x = x.nan_to_num(0, 0, 0).clamp(-20, 20)
    elif source.maybe(0.9):
        label = _int64(label).to(source.pick((torch.int64, torch.int32)))
    if source.maybe(0.2) and rows % 2 == 0:
        mask = mask.view(2, -1)
    arguments: dict[str, Any] = {"logits": x, "label": label, "input_mask": mask}
    spoil(source, arguments, ("logits", "label", "input_mask"))
    built: dict[str, Any] = {}
    if source.maybe(0.2):
        built["parallel_config"] = source.pick((None, {}, {"model_parallel": 1}, {"model_parallel": None}, object()))
    if source.maybe(0.3):
        built["calculate_per_token_loss"] = source.pick((True, True, False, 1))
    if source.maybe(0.05):
        built[source.pick(("reduction", "weight", "anything"))] = source.pick(("mean", None, 3))

    def function(logits: Any, label: Any, input_mask: Any) -> Any:
        return compat.mindformers.CrossEntropyLoss(**built)(logits, label, input_mask)

    pair = bool(built.get("calculate_per_token_loss"))
    return Call(
        "npu_xent.compat.mindformers.CrossEntropyLoss",
        function,
        arguments,
        ("logits", "label"),
        mindformers_rules,
        mindformers_truth,
        outputs=("loss", "denominator"),
        notes={"pair": pair, "built": built},
    )


def mindformers_rules(r: Rules) -> None:
    a = r.a
    if not r.dense("logits", "label", "input_mask"):
        return
    x, y, mask = a["logits"], a["label"], a["input_mask"]
    r.logits("logits")
    r.one_device("logits", "label", "input_mask")
    r.stored("logits", "label", "input_mask")
    r.need(not (mask.dtype is torch.float64 and r.on_npu()), TypeError, "input_mask")
    if mask.is_complex():
        r.need(False, (TypeError, ValueError, RuntimeError), "input_mask")
    if mask.dtype not in (*LOGITS, *INTEGERS, torch.bool):
        r.open.add("input_mask")
    r.need(not (mask.requires_grad and r.grad_mode), RuntimeError, "input_mask")
    if not r.need(x.dim() == 2 and x.shape[-1] > 0, ValueError, "logits"):
        return
    n, classes = x.shape
    r.need(mask.numel() == n, ValueError, "input_mask")
    r.need(n > 0, RuntimeError, "logits", "rows")
    if y.is_floating_point():
        r.need(y.shape == x.shape, ValueError, "label")
        if y.dtype not in LOGITS:
            r.open.add("label")
        return
    r.need(y.numel() == n, ValueError, "label")
    good = r.need(y.dtype in (torch.int32, torch.int64), TypeError, "label")
    if (
        good
        and y.numel() == n == mask.numel()
        and not (y.is_meta or mask.is_meta or mask.is_complex() or is_freed(y) or is_freed(mask))
    ):
        y, kept = _int64(y.cpu()).reshape(-1), mask.reshape(-1).cpu() != 0
        bad = ((y < 0) | (y >= classes)) & kept
        r.in_range(not bool(bad.any()), a["label"].device, IndexError, "label")


def mindformers_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y, mask = _values(a, "logits"), _values(a, "label"), _values(a, "input_mask")
    dtype = torch.float64 if torch.float64 in (x.dtype, mask.dtype) else torch.float32
    weights = mask.reshape(-1).to(dtype).double()
    if y.is_floating_point():
        return {}
    pair = a["notes"]["pair"]
    y = _int64(y).reshape(-1).masked_fill(weights == 0, -(2**40))
    denominator = weights.sum().reshape(1) + 1e-8

    def of_loss(rows: Tensor) -> Tensor:
        numerator = (rows * weights).sum()
        return numerator if pair else numerator / denominator

    up = upstream["loss"].detach().cpu().as_subclass(Tensor) if "loss" in upstream else None
    loss, grad = rows_of(x, y, of_loss, up, dtype, ignore_index=-(2**40))
    found = {"loss": loss, "logits": grad}
    if pair:
        found["denominator"] = near(denominator, 2 * weights.abs().sum(), dtype)
    return found


# npu_xent.distributed, of one rank ------------------------------------------------------------------------------------


def _group() -> Any:
    """The group of this process alone, made when it is first needed."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def _sharded(source: Source, chosen: dict[str, Any], columns: int) -> None:
    """Values of group, num_classes, class_range and normalizer."""
    group = _group()
    if source.maybe(0.2):
        chosen["group"] = source.pick((None, group, group, "world", 1))
    if source.maybe(0.25):
        chosen["num_classes"] = source.pick(
            (columns, columns, max(columns - 1, 0), columns + 1, None, -1, "5", 2.5, 2**63)
        )
        if source.maybe(0.4):
            chosen["class_range"] = source.pick(
                ((0, columns), (0, max(columns - 1, 0)), (1, columns), (0, columns + 1), (-1, 2), None, (0,), "ab", 3)
            )


def parallel_cross_entropy(source: Source) -> Call:
    chosen, compared = options(source, (*_LOSS, "loss_dtype", "return_lse", "return_z_loss", "consume_logits"))
    of_rows, classes, dtype = rows_shape(source), source.classes(), source.pick(LOGITS)
    if chosen.get("loss_dtype", 0) is None and source.maybe(0.9):
        del chosen["loss_dtype"]
    _sharded(source, chosen, classes)
    if source.maybe(0.1):
        chosen["normalizer"] = source.pick((torch.tensor(2.0), _group(), (_group(),), torch.ones(2), 3.0, ()))
    x = source.logits([*of_rows, classes], dtype, -1)
    x = x.clamp(-100, 100) if torch.float16 in (dtype, chosen.get("loss_dtype")) else x
    arguments: dict[str, Any] = {
        "logits": x,
        "target": source.target(of_rows, classes, _plain_index(chosen.get("ignore_index", -100))),
    }
    if source.maybe(0.3):
        arguments["weight"] = source.weight(classes, torch.float32)
    spoil(source, arguments, ("logits", "target", "weight"))
    return Call(
        "npu_xent.distributed.vocab_parallel_cross_entropy",
        distributed.vocab_parallel_cross_entropy,
        arguments | chosen,
        ("logits",),
        parallel_rules,
        parallel_truth,
        outputs=("loss", "lse", "z_loss"),
        with_gradient=("loss", "lse"),
        compared=compared,
    )


def shard_rules(r: Rules, columns: int) -> int | None:
    """The number of classes; None if it is not one, or more than the columns."""
    a = r.a
    group = a.get("group")
    r.need(group is None or isinstance(group, dist.ProcessGroup), TypeError, "group")
    total, within = a.get("num_classes"), a.get("class_range")
    known = r.need(
        total is None or (isinstance(total, int) and -1 < total < 2**63), (TypeError, ValueError), "num_classes"
    )
    if within is not None:
        r.need(total is not None, ValueError, "num_classes")
        fits = isinstance(within, tuple) and len(within) == 2 and all(isinstance(n, int) for n in within)
        if not r.need(fits, (TypeError, ValueError), "class_range") or total is None or not known:
            return None
        fits = 0 <= within[0] <= within[1] <= total and within[1] - within[0] <= columns
        r.need(fits, ValueError, "class_range")
        # One rank must have all classes.
        if not r.need(not fits or within == (0, total), ValueError, "class_range"):
            r.open.add("target")  # its values are checked first
        r.need(total > 0, ValueError, "logits", "num_classes")
        return total if within == (0, total) else None
    if not known:
        return None
    total = columns if total is None else total
    r.need(total <= columns, ValueError, "num_classes", "columns")
    r.need(total > 0, ValueError, "logits", "num_classes")
    return total if 0 < total <= columns else None


def normalizer_rules(r: Rules) -> None:
    value = r.a.get("normalizer")
    if value is None:
        return
    r.need(r.a.get("reduction", "none") != "none", ValueError, "normalizer")
    groups = value if isinstance(value, tuple) and value else (value,)
    fits = all(isinstance(g, dist.ProcessGroup) for g in groups) or (isinstance(value, Tensor) and value.numel() == 1)
    r.need(fits, TypeError, "normalizer")


def parallel_rules(r: Rules) -> None:
    a = r.a
    r.flag("return_lse", "return_z_loss", "consume_logits")
    r.reduction()
    loss_numbers(r)
    normalizer_rules(r)
    if not (r.dense("logits", "target") & r.dense("weight", optional=True)):
        return
    x, y = a["logits"], a["target"]
    r.logits("logits")
    r.loss_dtype("logits")
    r.need(a.get("loss_dtype", 0) is not None, TypeError, "loss_dtype")
    r.one_device("logits", "target", "weight")
    r.stored("logits", "target", "weight")
    if not r.need(x.dim() > 0 and y.shape == x.shape[:-1], ValueError, "target"):
        return
    total = shard_rules(r, x.shape[-1])
    w = a.get("weight")
    if w is not None and total is not None:
        r.class_weight(total, x.dtype)
    elif w is not None:
        r.open.add("weight")
    if r.need(y.dtype in INTEGERS, TypeError, "target") and total is not None:
        r.classes_in("target", total, _plain_index(a.get("ignore_index", -100)))
    r.consumable("logits", -1)


def parallel_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y = _values(a, "logits"), _int64(_values(a, "target"))
    w = None if a.get("weight") is None else _values(a, "weight")
    chosen = _loss_options({"reduction": "none"} | a)
    dtype = a.get("loss_dtype") or torch.float32
    if a.get("normalizer") is not None:
        return {}
    columns, total = x.shape[-1], a.get("num_classes") or x.shape[-1]
    rows = x.reshape(y.numel(), columns)[:, :total]
    t = loss_truth(rows, y.reshape(-1), w, upstream, chosen)
    of_loss = y.shape if chosen["reduction"] == "none" else ()
    terms = loss_terms(t, y.reshape(-1), total, w, chosen)
    found = {"loss": near(t.loss, terms, dtype, shape=of_loss, of=x.dtype)}
    if a.get("return_lse"):
        found["lse"] = near(t.lse, lse_terms(rows, chosen, t.lse), stats_dtype(x.dtype), shape=y.shape)
    if a.get("return_z_loss"):
        found["z_loss"] = near(t.z_loss, z_terms(t, rows, chosen), dtype, shape=of_loss, of=x.dtype)
    found["logits"] = _padded(near(t.grad, grad_terms(t), x.dtype, 2), columns - total, x.shape)
    return found


def _padded(n: Near, padding: int, shape: Any) -> Near:
    value, allowed = (torch.nn.functional.pad(t, (0, padding)).reshape(shape) for t in (n.value, n.allowed))
    return Near(value, allowed, n.dtype)


def parallel_token_log_probs(source: Source) -> Call:
    names = ("temperature", "softcap", "logit_scale", "ignore_index", "return_entropy", "return_top1", "consume_logits")
    chosen, compared = options(source, names)
    of_rows, classes, dtype = rows_shape(source), source.classes(), source.pick(LOGITS)
    _sharded(source, chosen, classes)
    x = source.logits([*of_rows, classes], dtype, -1)
    arguments: dict[str, Any] = {
        "logits": x,
        "target": source.target(of_rows, classes, _plain_index(chosen.get("ignore_index", -100))),
    }
    spoil(source, arguments, ("logits", "target"))
    return Call(
        "npu_xent.distributed.vocab_parallel_token_log_probs",
        distributed.vocab_parallel_token_log_probs,
        arguments | chosen,
        ("logits",),
        parallel_token_rules,
        parallel_token_truth,
        outputs=("log_probs", "entropy", "top1"),
        with_gradient=("log_probs", "entropy"),
        compared=compared,
    )


def parallel_token_rules(r: Rules) -> None:
    a = r.a
    r.flag("return_entropy", "return_top1", "consume_logits")
    logit_numbers(r)
    r.number("temperature", 1e-6, 1e6)  # no tensor of them
    if not r.dense("logits", "target"):
        return
    x, y = a["logits"], a["target"]
    r.logits("logits")
    r.one_device("logits", "target")
    r.stored("logits", "target")
    if not r.need(x.dim() > 0 and y.shape == x.shape[:-1], ValueError, "target"):
        return
    total = shard_rules(r, x.shape[-1])
    if r.need(y.dtype in INTEGERS, TypeError, "target") and total is not None:
        r.classes_in("target", total, _plain_index(a.get("ignore_index", -100)))
    r.consumable("logits", -1)


def parallel_token_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y = _values(a, "logits"), _int64(_values(a, "target"))
    columns, total = x.shape[-1], a.get("num_classes") or x.shape[-1]
    found = _token_outputs(a, x[..., :total], y, upstream, "logits")
    # The merge rounds each statistic once more.
    for name in ("log_probs", "entropy"):
        if name in found:
            found[name] = found[name]._replace(allowed=2 * found[name].allowed)
    grad = found["logits"]
    value, allowed = (torch.nn.functional.pad(t, (0, columns - total)) for t in (grad.value, grad.allowed))
    found["logits"] = Near(value, allowed, grad.dtype)
    return found


def parallel_linear(source: Source) -> Call:
    chosen, compared = options(source, (*_LOSS, "loss_dtype", "chunk_rows"))
    if chosen.get("loss_dtype", 0) is None and source.maybe(0.9):
        del chosen["loss_dtype"]
    arguments, of_rows, classes, _ = head(source)
    _sharded(source, chosen, classes)
    if source.maybe(0.1):
        chosen[source.pick(("sequence_parallel", "reduce_input_grad"))] = source.maybe(0.5)
    flat = [math.prod(of_rows)] if chosen.get("sequence_parallel") else of_rows
    arguments["target"] = source.target(flat, classes, _plain_index(chosen.get("ignore_index", -100)))
    if source.maybe(0.3):
        arguments["weight"] = source.weight(classes, torch.float32)
    spoil(source, arguments, ("input", "linear_weight", "linear_bias", "target", "weight"))
    return Call(
        "npu_xent.distributed.vocab_parallel_linear_cross_entropy",
        distributed.vocab_parallel_linear_cross_entropy,
        arguments | chosen,
        ("input", "linear_weight", "linear_bias"),
        parallel_linear_rules,
        parallel_linear_truth,
        compared=compared,
    )


def parallel_linear_rules(r: Rules) -> None:
    a = r.a
    r.reduction()
    loss_numbers(r)
    r.number("chunk_rows", 1, 2**63 - 1, optional=True, whole=True)
    if not (r.dense("input", "linear_weight", "target") & r.dense("linear_bias", "weight", optional=True)):
        return
    found = _layer_rules(r)
    if a.get("linear_bias") is not None:  # a ValueError for both here
        bias = a["linear_bias"]
        r.need(bias.dtype == a["input"].dtype or r.autocast, (TypeError, ValueError), "linear_bias")
    r.need(a.get("loss_dtype", 0) is not None, TypeError, "loss_dtype")
    if found is None:
        r.open.add("loss_dtype")
        return
    columns, dtype = found
    r.loss_dtype("input", cast=dtype)
    x, y = a["input"], a["target"]
    total = shard_rules(r, columns)
    if a.get("weight") is not None:
        r.class_weight(total, dtype)
        if r.autocast or total is None:
            r.open.add("weight")
    rows = [math.prod(x.shape[:-1])] if a.get("sequence_parallel") else list(x.shape[:-1])
    r.need(list(y.shape) == rows, ValueError, "target")
    if r.need(y.dtype in INTEGERS, TypeError, "target") and list(y.shape) == rows and total is not None:
        r.classes_in("target", total, _plain_index(a.get("ignore_index", -100)))


def parallel_linear_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    if a.get("num_classes") not in (None, a["linear_weight"].shape[0]) or a.get("sequence_parallel"):
        return {}
    return linear_cross_entropy_truth({"loss_dtype": torch.float32} | a, upstream)


DISTRIBUTED = (parallel_cross_entropy, parallel_token_log_probs, parallel_linear)


# load_npu, and the operators called directly --------------------------------------------------------------------------


def load_npu(source: Source) -> Call:
    def rules(r: Rules) -> None:
        if source.device.type != "npu":
            r.need(False, RuntimeError, "kernels")

    return Call("npu_xent.load_npu", npu_xent.load_npu, {}, (), rules, outputs=())


# Operators that write over their first argument.
WRITING = ("scale_", "row_grad_", "row_stats_grad_", "cross_entropy_", "token_log_probs_")
OPERATORS = (
    *("cross_entropy", "linear_cross_entropy", "prob_cross_entropy", "token_log_probs", "linear_token_log_probs"),
    *("selected_log_probs", "row_stats", "row_grad", "row_stats_grad", "prob_row_stats", "prob_row_grad"),
    *("linear_row_stats", "linear_row_grad", "linear_row_stats_grad", "reduce_rows"),
    *WRITING,
)


def operators(source: Source) -> Call:
    """An operator with arguments of its types; the same sizes most of the time. Any of the usual errors will do."""
    name = source.pick(OPERATORS)
    operator = getattr(torch.ops.npu_xent, name).default
    n, c, h = source.rows(), source.classes(), source.pick((0, 1, 3, 8))
    dtype, stats = source.pick(LOGITS), torch.float32
    stats = stats_dtype(dtype) if source.maybe(0.95) else torch.float16

    def tensor(argument: str) -> Tensor:
        if argument in ("logits", "self", "probabilities", "grad_log_prob"):
            return source.logits([n, c], dtype, 1)
        if argument == "input":
            return source.normal([n, h], dtype)
        if argument == "linear_weight":
            return source.normal([c, h], dtype)
        if argument == "linear_bias":
            return source.normal([c], dtype)
        if argument == "weight":
            return source.weight(c, dtype)
        if argument == "target":
            return source.target([n], c, -100).long()
        if argument == "index":
            return source.integers(0, c, [n, 3])
        if argument == "totals":
            return source.normal([3], torch.float64 if source.maybe(0.5) else stats)
        if argument in ("grad_loss", "grad_z_loss", "factor"):
            return source.normal([] if source.maybe(0.5) else [n], source.pick((stats, dtype)))
        return source.normal([n], stats)

    arguments: dict[str, Any] = {}
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        optional = argument.has_default_value() or kind.startswith("Optional")
        if optional and source.maybe(0.5):
            continue
        if "Tensor" in kind:
            arguments[argument.name] = tensor(argument.name)
        elif argument.name in ("class_start", "num_classes"):
            arguments[argument.name] = source.pick(
                (0, 1, c + 3, -1, 2**63 - 1, -(2**63))
                if source.maybe(0.1)
                else (0,)
                if argument.name == "class_start"
                else (c,)
            )
        elif "bool" in kind and "List" not in kind:
            arguments[argument.name] = source.maybe(0.5)
        elif "List" in kind:
            arguments[argument.name] = [source.maybe(0.5) for _ in range(source.pick((3, 3, 3, 2)))]
        elif argument.name == "loss_dtype" or "ScalarType" in kind:
            arguments[argument.name] = source.pick(
                (torch.float32, torch.float64, dtype, dtype, stats, torch.int64 if source.maybe(0.1) else stats)
            )
        elif argument.name == "reduction":
            arguments[argument.name] = source.pick(
                ("mean", "sum", "none", "none", "x" if source.maybe(0.1) else "none")
            )
        elif "float" in kind:
            arguments[argument.name] = source.pick(
                (0.0, 2.0, -1.0, 1e300, math.nan, math.inf) if source.maybe(0.05) else (1.0, 0.5)
            )
        else:
            arguments[argument.name] = source.pick((-100, 0, 1, 5, 2**62, -1))
    if source.maybe(0.15):
        names = [k for k, v in arguments.items() if isinstance(v, Tensor)]
        if names:
            which = source.pick(names)
            changed = source.spoilt(arguments[which])
            arguments[which] = changed if isinstance(changed, Tensor) else arguments[which]

    def rules(r: Rules) -> None:
        r.open.add("")

    written = ("self", "logits") if name in WRITING else ()
    return Call(f"torch.ops.npu_xent.{name}", operator, arguments, (), rules, outputs=(), notes={"written": written})
