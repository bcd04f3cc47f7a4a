"""What tests/fuzz_calls.py calls: for each public function random arguments, the documented rules, and the truth.

Rules are read from the docstrings, not from the code: a call that breaks none must return, and one that breaks some
must raise the error of one of them and name its argument.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz_inputs import BAD, EXTREME, FLAGS, GOOD, INTEGERS, LOGITS, OTHER_FLOATS, Source
from reference import scaled_and_capped, stats_dtype, tolerance, truth
from token_cases import selected_truth, token_truth
from torch import Tensor
from torch.nn import functional as F

import npu_xent
from npu_xent.integrations import torch as patched

Truth = dict[str, "Near"]
_torchs = F.cross_entropy
AUTOCAST = torch.bfloat16  # what autocast makes of tensors


class Near(NamedTuple):
    """An expected value in float64, how far from it a result may be, and the result's dtype."""

    value: Tensor
    allowed: Tensor
    dtype: torch.dtype


class Rule(NamedTuple):
    """A rule that a call breaks: the errors that it may raise, and names, one of which must be in the message."""

    errors: tuple[type[BaseException], ...]
    names: tuple[str, ...]


# The names that messages have for an argument.
NAMES = {
    "input": ("input", "logits"),
    "logits": ("logits", "input"),
    "target": ("target", "probabilities", "label", "target_ids"),
    "lse_square_scale_for_zloss": ("lse_square_scale_for_zloss", "lse_square_scale"),
    "target_ids": ("target_ids", "target"),
    "mult": ("mult", "logit_scale"),
}


@dataclass
class Call:
    """One call. `function` takes `arguments` by name; `truth` gives its outputs and gradients for upstream ones."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    rules: Callable[[Rules], None]
    truth: Callable[[dict[str, Any], dict[str, Tensor]], Truth] | None = None
    outputs: tuple[str, ...] = ("loss",)
    with_gradient: tuple[str, ...] = ("loss",)
    torchs: Callable[..., Any] | None = None  # must have the same outcome
    compared: bool = True  # False: the values are too extreme for float32
    notes: dict[str, Any] = field(default_factory=dict)


class Rules:
    """The broken rules of a call, and what its documentation leaves open."""

    def __init__(self, call: Call, grad_mode: bool, autocast: bool) -> None:
        self.a, self.broken, self.open = call.arguments, list[Rule](), set[str]()
        self.grad_mode, self.autocast, self.call = grad_mode, autocast, call

    def need(self, condition: bool, errors: Any, *names: str) -> bool:
        if not condition:
            of_all = tuple(n for name in names for n in NAMES.get(name, (name,)))
            self.broken.append(Rule(errors if isinstance(errors, tuple) else (errors,), of_all))
        return condition

    def dense(self, *names: str, optional: bool = False) -> bool:
        """Whether these are dense tensors, as they must be."""
        found = True
        for name in names:
            value = self.a.get(name)
            if optional and value is None:
                continue
            is_dense = isinstance(value, Tensor) and value.layout is torch.strided
            is_dense = is_dense and not (value.is_nested or value.is_quantized)
            found &= self.need(is_dense, TypeError, name)
        return found

    def stored(self, *names: str) -> None:
        """Their storages must not have been freed."""
        for name in names:
            t = self.a.get(name)
            self.need(not is_freed(t), RuntimeError, name)

    def one_device(self, *names: str) -> None:
        tensors = {n: self.a[n] for n in names if isinstance(self.a.get(n), Tensor)}
        devices = {t.device for t in tensors.values()}
        self.need(len(devices) < 2, (ValueError, RuntimeError), "device", *tensors)

    def on_meta(self) -> bool:
        return any(isinstance(t, Tensor) and t.is_meta for t in self.a.values())

    def number(
        self, name: str, low: float = -math.inf, high: float = math.inf, *, optional: bool = False, whole: bool = False
    ) -> float | None:
        """The number that an option stands for; None if it is none."""
        if name not in self.a:
            return None
        value = self.a[name]
        if optional and value is None:
            return None
        errors = (ValueError, TypeError)
        if isinstance(value, (Tensor, np.ndarray)):
            self.open.add(name)  # constant tensors are taken, but not documented
            if not (value.requires_grad if isinstance(value, Tensor) else False) and _size(value) == 1:
                value = _item(value)
                self.need(value is not None, errors, name)
            else:
                self.need(False, errors, name)
                return None
            if value is None:
                return None
        try:
            if isinstance(value, (str, bytes)) or value is float:
                raise TypeError
            found = operator.index(value) if whole else float(value)
        except TypeError:
            self.need(False, TypeError, name)
            return None
        except (OverflowError, ValueError):
            self.need(False, errors, name)
            return None
        self.need(low <= found <= high, ValueError, name)
        return found

    def flag(self, *names: str) -> None:
        for name in names:
            if not isinstance(self.a.get(name, False), bool):
                self.open.add(name)

    def reduction(self, values: Iterable[str] = ("mean", "sum", "none"), error: Any = ValueError) -> None:
        value = self.a.get("reduction", "mean")
        if isinstance(value, str):
            self.need(value in values, error, "reduction")
        else:
            self.need(False, (TypeError, error), "reduction")

    def loss_dtype(self, logits: str, *, optional: bool = True, cast: torch.dtype | None = None) -> None:
        """Of `loss_dtype`; `cast` is the dtype that autocast makes of the logits."""
        value = self.a.get("loss_dtype")
        dtype = cast or getattr(self.a.get(logits), "dtype", None)
        if value is None and ("loss_dtype" not in self.a or optional):
            return
        if dtype is None:
            self.need(isinstance(value, torch.dtype), TypeError, "loss_dtype")
            return
        allowed = {torch.float32, dtype} | ({torch.float64} if not self.on_npu() else set())
        self.need(isinstance(value, torch.dtype) and value in allowed, TypeError, "loss_dtype")

    def on_npu(self) -> bool:
        return any(isinstance(t, Tensor) and t.device.type == "npu" for t in self.a.values())

    def logits(self, name: str) -> None:
        t = self.a[name]
        self.need(t.dtype in LOGITS and not (t.dtype is torch.float64 and self.on_npu()), TypeError, name)

    def class_weight(self, classes: int | None, dtype: torch.dtype) -> None:
        """Of `weight`; a C of None is unknown."""
        w = self.a.get("weight")
        if not isinstance(w, Tensor):
            return
        self.need(classes is None or w.shape == (classes,), ValueError, "weight")
        allowed = w.dtype in (torch.float32, dtype) or (self.autocast and w.is_floating_point())
        self.need(allowed, TypeError, "weight")
        if w.requires_grad:
            if self.grad_mode:
                self.need(False, RuntimeError, "weight")
            else:
                self.open.add("weight")

    def classes_in(self, name: str, classes: int, ignore_index: Any, errors: Any = IndexError) -> None:
        """Class indices must be in range."""
        y = self.a[name]
        if y.is_meta or y.numel() == 0 or classes <= 0 or is_freed(y):
            return
        if ignore_index is not None and not -(2**63) <= ignore_index < 2**63:
            ignore_index = None
        y = _int64(y.cpu())
        bad = ((y < 0) | (y >= classes)) & (y != ignore_index if ignore_index is not None else True)
        self.in_range(not bool(bad.any()), self.a[name].device, errors, name)

    def in_range(self, are: bool, device: torch.device, errors: Any, name: str) -> None:
        """Class indices and temperatures are checked on the CPU. A device has NaN for them, which is not compared."""
        if device.type == "cpu":
            self.need(are, errors, name)
        elif not are:
            self.open.add("values that no device checks")

    def consumable(self, name: str, class_dim: int) -> None:
        """With consume_logits, where a gradient is needed."""
        t = self.a[name]
        if not (self.a.get("consume_logits") and t.requires_grad and self.grad_mode):
            return
        if is_freed(t):
            return
        if t.numel() == 0:  # nothing is overwritten
            self.open |= {name, "leaf"}
            return
        base = t._base
        self.need(
            not (t.is_leaf or (base is not None and base.is_leaf and base.requires_grad)), ValueError, name, "leaf"
        )
        self.need(t.movedim(class_dim, -1).is_contiguous() and not t.is_neg(), ValueError, name)


def is_freed(t: Any) -> bool:
    """Whether a tensor's storage has been freed or shrunk."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.is_meta or t.is_nested or not t.numel():
        return False
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    return t.untyped_storage().nbytes() < last * t.element_size()


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else value.size


def _ignored(a: dict[str, Any], y: Tensor) -> Tensor:
    """Where int64 targets are ignore_index. One beyond int64, which raises, is no target."""
    index = _plain_index(a.get("ignore_index", -100))
    return y == index if -(2**63) <= index < 2**63 else torch.zeros_like(y, dtype=torch.bool)


def _item(value: Any) -> Any:
    """The number in a tensor of one; None if there is none."""
    if isinstance(value, np.ndarray):
        return value.item() if value.ndim == 0 else None
    if value.is_meta or value.is_complex() or value.layout is not torch.strided:
        return None
    return value.item()


def _int64(y: Tensor) -> Tensor:
    """As int64; what is too large becomes the largest."""
    if y.dtype is torch.uint64:
        y = y.view(torch.int64) if y.is_contiguous() else y.contiguous().view(torch.int64)
        return torch.where(y < 0, torch.iinfo(torch.int64).max, y)
    return y.long()


# Options --------------------------------------------------------------------------------------------------------------


def options(source: Source, names: Iterable[str], *, spoil: float = 0.03) -> tuple[dict[str, Any], bool]:
    """Values of some of the options, and whether results with them can be compared."""
    chosen, compared = {}, True
    for name in names:
        if source.maybe(0.55):
            continue
        kind = source.random()
        if name not in GOOD:
            chosen[name] = source.pick(FLAGS) if kind < 0.1 else source.maybe(0.5)
        elif kind < spoil:
            chosen[name] = source.pick(BAD[name])
        elif kind < spoil + 0.04 and name in EXTREME:
            chosen[name], compared = source.pick(EXTREME[name]), False
        elif kind < 0.3:
            chosen[name] = source.pick(GOOD[name])
        else:
            chosen[name] = source.pick(
                [v for v in GOOD[name] if v is None or type(v) in (str, float, torch.dtype)] or [-100]
            )
    return chosen, compared


def spoil(source: Source, arguments: dict[str, Any], names: Iterable[str]) -> None:
    """Now and then one of the tensors, or two, become something else."""
    if source.maybe(0.3):
        for _ in range(1 + source.maybe(0.15)):
            name = source.pick([n for n in names if isinstance(arguments.get(n), Tensor)] or [None])
            if (
                name is not None
                and arguments[name].layout is torch.strided
                and not (arguments[name].is_nested or is_freed(arguments[name]))
            ):
                try:
                    arguments[name] = source.spoilt(arguments[name])
                except (RuntimeError, NotImplementedError, TypeError):  # torch has no such tensor
                    return


def number(value: Any, default: float) -> Any:
    """The number of an option that may be left out."""
    return default if value is None else float(value)


def index_of(value: Any) -> int:
    return -100 if value is None else _plain_index(value)


def _values(a: dict[str, Any], name: str) -> Tensor:
    """Their values on the CPU, plain; of meta tensors zeros."""
    t = a[name].detach()
    t = torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.cpu().as_subclass(Tensor)
    return t.resolve_neg()


def _reduced(upstream: dict[str, Tensor], name: str, shape: Any = None) -> Tensor | float:
    if name not in upstream:
        return 0.0
    return upstream[name].detach().cpu().double().as_subclass(Tensor).reshape(-1)


def near(
    value: Tensor, terms: Any, dtype: torch.dtype, roundings: int = 1, shape: Any = None, of: Any = torch.float64
) -> Near:
    """Within the tests' tolerance of a result in dtype, made of logits in the dtype `of`."""
    allowed = torch.as_tensor(tolerance(value, terms, dtype, roundings)).expand(value.shape)
    stats = torch.finfo(stats_dtype(of))
    if dtype is not torch.float64:  # an exponential below the smallest normal number may be 0
        allowed = allowed + 64 * torch.finfo(torch.float32).tiny
    if stats.bits == 32 and dtype is torch.float64:
        allowed = allowed + 4 * stats.eps * terms + stats.tiny
    if shape is not None:
        value, allowed = value.reshape(shape), allowed.reshape(shape)
    return Near(value, allowed, dtype)


def loss_truth(rows: Tensor, y: Tensor, w: Tensor | None, upstream: dict[str, Tensor], chosen: dict[str, Any]) -> Any:
    """reference.truth for upstream gradients of loss and lse, or of one of them."""
    grads = {"grad_loss": _reduced(upstream, "loss"), "grad_lse": _reduced(upstream, "lse")}
    t = truth(rows, y, w, **chosen, **grads)
    if "loss" not in upstream:  # then nothing is divided by the weights of the rows, which may add up to 0
        of_lse = truth(rows, y, w, **chosen | {"reduction": "sum"}, **grads)
        t = t._replace(grad=of_lse.grad, grad_terms=of_lse.grad_terms)
    return t


def loss_terms(t: Any, y: Tensor, classes: int, w: Tensor | None, chosen: dict[str, Any]) -> Tensor:
    """Of the loss: reference.truth's, and the sum of exponentials.

    log sum exp is the largest logit plus the logarithm of a sum of at least 1 in float32 (float64). The sum's rounding
    moves the logarithm by as much, however small the logits and the loss are.
    """
    kept, e = y != chosen["ignore_index"], chosen["label_smoothing"]
    weights = torch.ones(classes, dtype=torch.float64) if w is None else w.double()
    of_target = weights[y.masked_fill(~kept, 0)].masked_fill(~kept, 0)
    by_row = ((1 - e) * of_target + e * weights.mean()).masked_fill(~kept, 0)
    if chosen["reduction"] != "none":
        by_row = by_row.sum() / (of_target.sum() if chosen["reduction"] == "mean" else 1)
    return t.loss_terms + by_row.nan_to_num(0, 0, 0)


def grad_terms(t: Any) -> Tensor:
    """Of the gradient: reference.truth's, and what an exponential below the smallest normal number is off by.

    It may be 0, and is multiplied by a factor of the row's (of lse and its square too), which the target's term has.
    """
    stats = torch.finfo(torch.float32)
    return t.grad_terms + t.grad_terms.amax(1, keepdim=True) * (stats.tiny / stats.eps)


def lse_terms(rows: Tensor, chosen: dict[str, Any], lse: Tensor) -> Tensor:
    """Of log sum exp: the largest logit, and the logarithm of a sum of at least 1."""
    z, _ = scaled_and_capped(rows, chosen["logit_scale"], chosen["softcap"])
    return 1 + z.amax(1).abs().nan_to_num(0, 0, 0) + lse.abs().nan_to_num(0, 0, 0)


def z_terms(t: Any, rows: Tensor, chosen: dict[str, Any]) -> Tensor:
    """Of the z-loss: lse squared is off by twice lse times its own error."""
    lse = t.lse.abs().nan_to_num(0, 0, 0)
    by_row = chosen["lse_square_scale"] * (2 * lse * lse_terms(rows, chosen, t.lse) + lse.square())
    if chosen["reduction"] == "none":
        return by_row
    return 4 * t.z_loss.abs().nan_to_num(0, 0, 0) + (
        by_row.sum() if chosen["reduction"] == "sum" else by_row.amax() if len(by_row) else 0
    )


_LOSS = ("reduction", "label_smoothing", "lse_square_scale", "logit_scale", "softcap", "ignore_index")


def _loss_options(a: dict[str, Any]) -> dict[str, Any]:
    """The options of the loss as plain numbers."""
    softcap = a.get("softcap")
    return {
        "reduction": _reduction(a),
        "ignore_index": index_of(a.get("ignore_index")),
        "label_smoothing": number(a.get("label_smoothing"), 0.0),
        "lse_square_scale": number(a.get("lse_square_scale"), 0.0),
        "logit_scale": number(a.get("logit_scale"), 1.0),
        "softcap": None if softcap is None else float(softcap),
    }


def _reduction(a: dict[str, Any]) -> str:
    average, reduce = a.get("size_average"), a.get("reduce")
    if average is None and reduce is None:
        return str(a.get("reduction", "mean"))
    if not (reduce is None or reduce):
        return "none"
    return "mean" if average is None or average else "sum"


def _dtype_of_loss(a: dict[str, Any], name: str, autocast: bool) -> torch.dtype:
    dtype = a[name].dtype
    return a.get("loss_dtype") or (stats_dtype(dtype) if autocast else dtype)


# cross_entropy --------------------------------------------------------------------------------------------------------


def _shape(source: Source) -> list[int]:
    """[N, C], [C] or [N, C, d1, ...]."""
    kind = source.random()
    n, c = source.rows(), source.classes()
    if kind < 0.65:
        return [n, c]
    if kind < 0.73:
        return [c]
    if kind < 0.75:
        return []
    return [min(n, 4), min(c, 40), *(source.pick((0, 1, 2, 3, 3, 5)) for _ in range(source.pick((1, 1, 1, 2, 3))))]


def _target_of(source: Source, x: Tensor, dim: int, ignore_index: Any, probabilities: float = 0.14) -> Tensor:
    """Class indices of the rows of x, or probabilities."""
    classes = x.shape[dim] if x.dim() else 1
    if source.maybe(probabilities):
        q = source.normal(x.shape, torch.float32)
        q = q.softmax(dim) if x.dim() else q
        return q.to(x.dtype if source.maybe(0.8) else source.pick(LOGITS))
    shape = x.shape[:dim] + x.shape[dim + 1 :] if x.dim() else ()
    return source.target(shape, classes, _plain_index(ignore_index))


def _plain_index(value: Any) -> Any:
    try:
        return operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return -100


def cross_entropy(source: Source) -> Call:
    names = (*_LOSS, "loss_dtype", "return_lse", "return_z_loss", "consume_logits")
    chosen, compared = options(source, names)
    if source.maybe(0.04):
        chosen.update(
            source.pick(({"size_average": True}, {"size_average": False}, {"reduce": False, "size_average": 1}))
        )
    shape, dtype = _shape(source), source.pick(LOGITS)
    dim = min(len(shape) - 1, 1) if shape else 0
    x = source.logits(shape, dtype, dim)
    target = _target_of(source, x, dim, chosen.get("ignore_index", -100))
    if target.is_floating_point():
        x = x.nan_to_num(0, 0, 0).clamp(-20, 20)
        if source.maybe(0.9):
            chosen.pop("ignore_index", None)
            chosen.pop("consume_logits", None)
    if dtype is torch.float16 or chosen.get("loss_dtype") is torch.float16:
        x = x.clamp(-100, 100)
    arguments: dict[str, Any] = {"input": x, "target": target}
    if source.maybe(0.4):
        arguments["weight"] = source.weight(shape[dim] if shape else 1, dtype)
    spoil(source, arguments, ("input", "target", "weight"))
    call = Call(
        "npu_xent.cross_entropy",
        npu_xent.cross_entropy,
        arguments | chosen,
        ("input", "target"),
        cross_entropy_rules,
        cross_entropy_truth,
        outputs=("loss", "lse", "z_loss"),
        with_gradient=("loss", "lse"),
        compared=compared,
    )
    if source.maybe(0.2):
        return as_module(call)
    if source.maybe(0.12):
        return as_patched(call)
    return call


def as_module(call: Call) -> Call:
    """The same by npu_xent.CrossEntropyLoss."""

    def function(input: Any, target: Any, **keywords: Any) -> Any:
        module = npu_xent.CrossEntropyLoss(**keywords)
        repr(module)
        return module(input, target)

    call.name, call.function = "npu_xent.CrossEntropyLoss", function

    def rules(r: Rules) -> None:
        cross_entropy_rules(r)
        if not (r.a.get("weight") is None or isinstance(r.a.get("weight"), Tensor)):
            r.need(False, TypeError, "weight", "buffer")  # of torch's Module

    call.rules = rules
    return call


TORCHS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


def as_patched(call: Call) -> Call:
    """By F.cross_entropy under patch_torch, which must do what torch does with the same arguments."""

    def function(*args: Any, **keywords: Any) -> Any:
        with npu_xent.patch_torch():
            return F.cross_entropy(*args, **keywords)

    call.arguments = {name: value for name, value in call.arguments.items() if name in TORCHS}
    call.name, call.function, call.torchs = "npu_xent.patch_torch", function, _torchs
    call.outputs, call.with_gradient = ("loss",), ("loss",)
    return call


def is_served(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
) -> bool:
    """Whether patch_torch computes this call itself, and does not leave it to torch."""
    return patched._serves(input, target, weight, ignore_index, reduction, label_smoothing)


def cross_entropy_rules(r: Rules) -> None:
    a = r.a
    r.flag("return_lse", "return_z_loss", "consume_logits")
    if a.get("size_average") is None and a.get("reduce") is None:
        r.reduction()
    loss_numbers(r)
    r.loss_dtype("input")
    if not (r.dense("input", "target") & r.dense("weight", optional=True)):
        return
    x, y = a["input"], a["target"]
    r.logits("input")
    r.one_device("input", "target", "weight")
    r.stored("input", "target", "weight")
    if not r.need(x.dim() > 0, ValueError, "input", "target"):
        return
    dim = min(x.dim() - 1, 1)
    classes = x.shape[dim]
    r.need(classes > 0, ValueError, "input")
    r.class_weight(classes, x.dtype)
    ignore_index = r.number("ignore_index", -(2**63), 2**63 - 1, whole=True)
    if y.is_floating_point():
        r.need(y.shape == x.shape, ValueError, "target")
        if y.dtype not in LOGITS:
            r.open.add("target")
        r.need(ignore_index is None or ignore_index < 0, RuntimeError, "ignore_index")
        consumes = bool(a.get("consume_logits")) and x.requires_grad and r.grad_mode
        r.need(not consumes, ValueError, "consume_logits")
        return
    of_rows = x.shape[:dim] + x.shape[dim + 1 :]
    r.need(y.shape == of_rows, ValueError, "target")
    r.consumable("input", dim)
    if r.need(y.dtype in INTEGERS, TypeError, "target") and y.shape == of_rows:
        r.classes_in("target", classes, -100 if ignore_index is None else ignore_index)


def loss_numbers(r: Rules) -> None:
    r.number("label_smoothing", 0, 1)
    r.number("lse_square_scale", 0, 1.7976931348623157e308)
    scale = r.a.get("logit_scale")
    if isinstance(scale, Tensor):
        r.need(False, TypeError, "logit_scale")
    else:
        r.number("logit_scale", -1.7976931348623157e308, 1.7976931348623157e308)
    r.number("softcap", 1e-6, 1e6, optional=True)
    r.number("ignore_index", -(2**63), 2**63 - 1, whole=True)


def cross_entropy_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y = _values(a, "input"), _values(a, "target")
    w = None if a.get("weight") is None else _values(a, "weight")
    chosen, dtype = _loss_options(a), _dtype_of_loss(a, "input", a["autocast"])
    dim = min(x.dim() - 1, 1)
    of_rows = x.shape[:dim] + x.shape[dim + 1 :]
    of_loss = of_rows if chosen["reduction"] == "none" else ()
    if y.is_floating_point():
        return _probabilities_truth(x, y, w, dim, chosen, dtype, of_loss, a, upstream)
    rows, y = x.movedim(dim, -1).reshape(of_rows.numel(), x.shape[dim]), _int64(y).reshape(-1)
    t = loss_truth(rows, y, w, upstream, chosen)
    back = [*of_rows, x.shape[dim]]
    found = {"loss": near(t.loss, loss_terms(t, y, x.shape[dim], w, chosen), dtype, shape=of_loss, of=x.dtype)}
    if a.get("return_lse"):
        found["lse"] = near(t.lse, lse_terms(rows, chosen, t.lse), stats_dtype(x.dtype), shape=of_rows)
    if a.get("return_z_loss"):
        found["z_loss"] = near(t.z_loss, z_terms(t, rows, chosen), dtype, shape=of_loss, of=x.dtype)
    grad = near(t.grad, grad_terms(t), x.dtype, roundings=2, shape=back)
    found["input"] = Near(grad.value.movedim(-1, dim), grad.allowed.movedim(-1, dim), x.dtype)
    return found


def _probabilities_truth(
    x: Tensor,
    q: Tensor,
    w: Tensor | None,
    dim: int,
    chosen: dict[str, Any],
    dtype: torch.dtype,
    of_loss: Any,
    a: dict[str, Any],
    upstream: dict[str, Tensor],
) -> Truth:
    """By autograd in float64; the logits are finite and not large."""
    exact, probabilities = x.double().requires_grad_(), q.double().requires_grad_()
    z = exact * chosen["logit_scale"]
    if chosen["softcap"] is not None:
        z = chosen["softcap"] * (z / chosen["softcap"]).tanh()
    classes, e = x.shape[dim], chosen["label_smoothing"]
    weights = torch.ones(classes, dtype=torch.float64) if w is None else w.double()
    weights = weights.view(-1, *[1] * (x.dim() - 1 - dim))
    lse = z.logsumexp(dim)
    share = weights * ((1 - e) * probabilities + e / classes)
    z_rows = chosen["lse_square_scale"] * lse.square()
    rows = -(share * (z - lse.unsqueeze(dim))).sum(dim) + z_rows
    terms = (share.abs() * (z.abs() + lse.abs().unsqueeze(dim) + 1)).sum(dim) + z_rows.abs()
    count = rows.numel() if chosen["reduction"] == "mean" else 1
    loss, terms, z_loss = (
        t if chosen["reduction"] == "none" else t.sum() / count if count else t.sum() * math.nan
        for t in (rows, terms, z_rows)
    )
    z_loss = z_loss if chosen["lse_square_scale"] else torch.zeros_like(loss)
    found = {"loss": near(loss.detach(), 8 * terms.detach(), dtype, shape=of_loss, of=x.dtype)}
    if a.get("return_lse"):
        found["lse"] = near(lse.detach(), 4 * lse.detach().abs() + 4, stats_dtype(x.dtype))
    if a.get("return_z_loss"):
        found["z_loss"] = near(z_loss.detach(), 8 * z_loss.detach().abs(), dtype, shape=of_loss, of=x.dtype)
    outputs = [o for name, o in (("loss", loss), ("lse", lse)) if name in upstream]
    grads = [upstream[name].detach().cpu().double().as_subclass(Tensor) for name in ("loss", "lse") if name in upstream]
    if not outputs:
        return found
    if count == 0:
        outputs, grads = [o * 0 for o in outputs], grads
    of_x, of_q = torch.autograd.grad(outputs, [exact, probabilities], grads, allow_unused=True)
    size = max((float(g.abs().max()) for g in grads if g.numel()), default=1.0)
    size *= 60 * (1 + float(weights.max()) + abs(chosen["lse_square_scale"])) * (1 + abs(chosen["logit_scale"]))
    size *= 1 + float(lse.detach().abs().max()) if lse.numel() else 1
    # Of probabilities that do not add up to 1, terms are as large as their sum.
    size *= 1 + float(probabilities.detach().abs().sum(dim).max()) if lse.numel() else 1
    for name, of, like in (("input", of_x, x), ("target", of_q, q)):
        if of is not None:
            found[name] = near(
                of, size / max(count, 1) if "lse" not in upstream else size, like.dtype, roundings=3, of=x.dtype
            )
    return found


# npu_cross_entropy_loss -----------------------------------------------------------------------------------------------

_CONTRACT = ("reduction", "ignore_index", "label_smoothing", "lse_square_scale_for_zloss", "loss_dtype")


def contract(source: Source) -> Call:
    chosen, compared = options(source, (*_CONTRACT, "return_zloss", "need_log_prob"))
    if source.maybe(0.6):
        chosen["strict"] = source.pick((False, False, None, True))
    if chosen.get("strict", True) is not False and source.maybe(0.7):
        for name in ("lse_square_scale_for_zloss", "return_zloss", "label_smoothing"):
            chosen.pop(name, None)
    shape, dtype = [source.rows(), source.classes()], source.pick(LOGITS)
    x = source.logits(shape, dtype, 1)
    x = x.clamp(-100, 100) if dtype is torch.float16 else x
    arguments: dict[str, Any] = {"input": x, "target": _target_of(source, x, 1, chosen.get("ignore_index", -100), 0.02)}
    if source.maybe(0.3):
        arguments["weight"] = source.weight(shape[1], dtype)
    spoil(source, arguments, ("input", "target", "weight"))
    return Call(
        "npu_xent.npu_cross_entropy_loss",
        npu_xent.npu_cross_entropy_loss,
        arguments | chosen,
        ("input",),
        contract_rules,
        contract_truth,
        outputs=("loss", "log_prob", "zloss", "lse_for_zloss"),
        with_gradient=("loss", "zloss"),
        compared=compared,
    )


def contract_rules(r: Rules) -> None:
    a = r.a
    strict = a.get("strict", True)
    broken = npu_xent.ConstraintError if strict is True else ValueError
    r.flag("return_zloss", "need_log_prob")
    r.reduction()
    smoothing = r.number("label_smoothing", 0, 1)
    z = r.number("lse_square_scale_for_zloss", 0, 1.7976931348623157e308)
    ignore_index = r.number("ignore_index", -(2**63), 2**63 - 1, whole=True)
    if not (r.dense("input", "target") & r.dense("weight", optional=True)):
        return
    x, y, w = a["input"], a["target"], a.get("weight")
    # A ConstraintError comes first, and is a ValueError also for a dtype.
    typed = (TypeError, ValueError) if strict in (True, None) else TypeError
    r.need(x.dtype in LOGITS and not (x.dtype is torch.float64 and r.on_npu()), typed, "input")
    r.loss_dtype("input")
    r.one_device("input", "target", "weight")
    r.stored("input", "target", "weight")
    if not r.need(x.dim() == 2, ValueError, "input", "target"):
        return
    n, classes = x.shape
    r.need(classes > 0, ValueError, "input")
    if isinstance(w, Tensor):
        r.need(w.shape == (classes,), ValueError, "weight")
        r.need(
            w.dtype in (torch.float32, x.dtype) or (r.autocast and w.is_floating_point() and not strict),
            typed,
            "weight",
        )
        if w.dtype is not torch.float32 and w.is_floating_point() and r.autocast:
            r.open.add("weight")
        if w.requires_grad:
            r.need(not r.grad_mode, RuntimeError, "weight") or r.need(False, ValueError, "weight")
            r.open.add("weight")
    r.need(y.shape == (n,), ValueError, "target")
    good_dtype = r.need(y.dtype in INTEGERS, typed, "target")
    if y.shape == (n,) and good_dtype:
        r.classes_in("target", classes, -100 if ignore_index is None else ignore_index, (broken, IndexError))
    if strict is True:
        r.need(x.dtype is not torch.float64, broken, "input")
        r.need(0 < n <= 200_000, broken, "input")
        r.need(y.dtype is torch.int64, broken, "target")
        r.need(ignore_index is None or ignore_index < classes, broken, "ignore_index")
        r.need(smoothing is None or smoothing < 1, broken, "label_smoothing")
        r.need(not z, broken, "lse_square_scale_for_zloss")
        r.need(not a.get("return_zloss"), broken, "return_zloss")
        if isinstance(w, Tensor):
            r.need(w.dtype is torch.float32, broken, "weight")
            if w.device.type == "cpu" and not (w.is_complex() or is_freed(w) or w.dtype in OTHER_FLOATS):
                r.need(bool(((w > 0) & (w <= 1)).all()), broken, "weight")
        if x.requires_grad and r.grad_mode:
            if a.get("reduction", "mean") == "mean":
                r.need(w is None, broken, "weight")
                r.need(ignore_index in (None, -100), broken, "ignore_index")
            r.need(not smoothing, broken, "label_smoothing")


def contract_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y = _values(a, "input"), _int64(_values(a, "target"))
    w = None if a.get("weight") is None else _values(a, "weight")
    dtype = a.get("loss_dtype") or x.dtype
    b = a | {"lse_square_scale": a.get("lse_square_scale_for_zloss")}
    chosen = _loss_options(b)
    t = truth(
        x,
        y,
        w,
        **chosen,
        grad_loss=_reduced(upstream, "loss"),
        grad_z_loss=_reduced(upstream, "zloss") if "zloss" in upstream else 0.0,
    )
    of_loss = (len(x),) if chosen["reduction"] == "none" else (1,)
    found = {"loss": near(t.loss, loss_terms(t, y, x.shape[1], w, chosen), dtype, shape=of_loss, of=x.dtype)}
    nothing = torch.zeros(0, dtype=torch.float64)
    terms = (1 + x.double().abs() + t.lse.abs()[:, None]).nan_to_num(0, 0, 0)  # 1: see loss_terms
    with_log_prob = a.get("need_log_prob", True)
    found["log_prob"] = near(t.log_prob, terms, x.dtype) if with_log_prob else near(nothing, 0.0, x.dtype)
    found["zloss"] = (
        near(t.z_loss, z_terms(t, x, chosen), dtype, shape=of_loss, of=x.dtype)
        if a.get("return_zloss")
        else near(nothing, 0, dtype)
    )
    lse = t.lse if chosen["lse_square_scale"] else nothing
    found["lse_for_zloss"] = near(lse, lse_terms(x, chosen, t.lse) if len(lse) else 0.0, dtype, roundings=2, of=x.dtype)
    found["input"] = near(t.grad, grad_terms(t), x.dtype, roundings=2)
    return found


# Log-probabilities ----------------------------------------------------------------------------------------------------

_TOKEN = ("temperature", "softcap", "logit_scale")


def _rows_shape(source: Source) -> list[int]:
    """[...], without the classes."""
    kind = source.random()
    if kind < 0.6:
        return [source.rows()]
    if kind < 0.68:
        return []
    return [source.pick((0, 1, 2, 3, 3)) for _ in range(source.pick((2, 2, 3, 4)))]


def _temperature(source: Source, chosen: dict[str, Any], shape: list[int], dtype: torch.dtype) -> bool:
    """A tensor of temperatures now and then; whether results can be compared."""
    if not source.maybe(0.25):
        return True
    of_rows = shape if source.maybe(0.7) else []
    rows = 4 ** (2 * torch.rand(of_rows, generator=source.tensors) - 1)
    if rows.numel() and source.maybe(0.1):
        rows.view(-1)[-1] = source.pick((0.0, -1.0, math.nan, math.inf, -0.0))
    if source.maybe(0.15):
        rows = rows.to(source.pick((torch.float64, torch.float16, torch.int64, torch.complex64)))
    chosen["temperature"] = rows
    return True


def token_log_probs(source: Source) -> Call:
    chosen, compared = options(source, (*_TOKEN, "ignore_index", "return_entropy", "return_top1", "consume_logits"))
    of_rows, classes, dtype = _rows_shape(source), source.classes(), source.pick(LOGITS)
    _temperature(source, chosen, of_rows, dtype)
    x = source.logits([*of_rows, classes], dtype, -1)
    if source.maybe(0.01):
        x = x.new_zeros(())
    arguments: dict[str, Any] = {
        "logits": x,
        "target": source.target(of_rows, classes, _plain_index(chosen.get("ignore_index", -100))),
    }
    spoil(source, arguments, ("logits", "target"))
    return Call(
        "npu_xent.token_log_probs",
        npu_xent.token_log_probs,
        arguments | chosen,
        ("logits",),
        token_rules,
        token_log_probs_truth,
        outputs=("log_probs", "entropy", "top1"),
        with_gradient=("log_probs", "entropy"),
        compared=compared,
    )


def logit_numbers(r: Rules) -> None:
    """The options of the logits without the temperature."""
    r.number("softcap", 1e-6, 1e6, optional=True)
    if isinstance(r.a.get("logit_scale"), Tensor):
        r.need(False, TypeError, "logit_scale")
    else:
        r.number("logit_scale", -1.7976931348623157e308, 1.7976931348623157e308)
    r.number("ignore_index", -(2**63), 2**63 - 1, whole=True)


def token_numbers(r: Rules, shape: Any, dtype: torch.dtype | None) -> None:
    """The options of the logits; `shape` and `dtype` of rows are None if they are not known."""
    logit_numbers(r)
    a = r.a
    t = a.get("temperature")
    if not isinstance(t, Tensor):
        r.number("temperature", 1e-6, 1e6)
        return
    if not r.dense("temperature"):
        return
    r.stored("temperature")
    if shape is not None:
        r.need(t.dim() == 0 or t.shape == shape, ValueError, "temperature")
    allowed = t.dtype is torch.float32 or (t.dtype is torch.float64 and dtype is torch.float64)
    good = r.need(allowed, TypeError, "temperature")
    if t.requires_grad:
        if r.grad_mode:
            r.need(False, (RuntimeError, TypeError), "temperature")
        else:
            r.open.add("temperature")
    elif good and not t.is_meta and not is_freed(t) and shape is not None and math.prod(shape):
        fits = ((t > 0) & t.isfinite()).cpu()
        y = a.get("target")
        known = isinstance(y, Tensor) and y.dtype in INTEGERS and not (is_freed(y) or y.is_meta)
        if known and y.shape == shape and t.shape in ((), shape):
            fits = fits | _ignored(a, _int64(y.cpu()))
        r.in_range(bool(fits.all()), t.device, ValueError, "temperature")


def token_rules(r: Rules) -> None:
    a = r.a
    r.flag("return_entropy", "return_top1", "consume_logits")
    if not r.dense("logits", "target"):
        token_numbers(r, None, None)
        return
    x, y = a["logits"], a["target"]
    token_numbers(r, y.shape, x.dtype)
    r.logits("logits")
    r.one_device("logits", "target", "temperature")
    r.stored("logits", "target")
    if not r.need(x.dim() > 0 and y.shape == x.shape[:-1], ValueError, "target"):
        return
    r.need(x.shape[-1] > 0, ValueError, "logits")
    if r.need(y.dtype in INTEGERS, TypeError, "target"):
        r.classes_in("target", x.shape[-1], _plain_index(a.get("ignore_index", -100)))
    r.consumable("logits", -1)


def _token_options(a: dict[str, Any]) -> dict[str, Any]:
    softcap, t = a.get("softcap"), a.get("temperature")
    return {
        "temperature": 1.0 if t is None else _values(a, "temperature").double() if isinstance(t, Tensor) else float(t),
        "softcap": None if softcap is None else float(softcap),
        "logit_scale": number(a.get("logit_scale"), 1.0),
    }


def token_log_probs_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, y = _values(a, "logits"), _int64(_values(a, "target"))
    return _token_outputs(a, x, y, upstream, "logits")


def _token_outputs(a: dict[str, Any], x: Tensor, y: Tensor, upstream: dict[str, Tensor], name: str) -> Truth:
    grads = {
        f"grad_{n}": upstream[n].detach().cpu().double().as_subclass(Tensor)
        for n in ("log_probs", "entropy")
        if n in upstream
    }
    t = token_truth(x, y, **_token_options(a), ignore_index=index_of(a.get("ignore_index")), **grads)
    dtype = stats_dtype(x.dtype)
    found = {"log_probs": near(t.log_probs, t.log_prob_terms, dtype)}
    if a.get("return_entropy"):
        found["entropy"] = near(t.entropy, t.entropy_terms, dtype)
    if a.get("return_top1"):
        found["top1"] = Near(t.top1.double(), torch.zeros_like(t.top1, dtype=torch.float64), torch.bool)
    found[name] = near(t.grad, t.grad_terms, x.dtype, roundings=2)
    return found


def selected_log_probs(source: Source) -> Call:
    chosen, compared = options(source, _TOKEN)
    of_rows, classes, dtype = _rows_shape(source), source.classes(), source.pick(LOGITS)
    _temperature(source, chosen, of_rows, dtype)
    arguments: dict[str, Any] = {
        "logits": source.logits([*of_rows, classes], dtype, -1),
        "index": source.target([*of_rows, source.pick((0, 1, 2, 3, 9))], classes, None),
    }
    spoil(source, arguments, ("logits", "index"))
    return Call(
        "npu_xent.selected_log_probs",
        npu_xent.selected_log_probs,
        arguments | chosen,
        ("logits",),
        selected_rules,
        selected_log_probs_truth,
        outputs=("log_probs",),
        with_gradient=("log_probs",),
        compared=compared,
    )


def selected_rules(r: Rules) -> None:
    a = r.a
    if not r.dense("logits", "index"):
        token_numbers(r, None, None)
        return
    x, y = a["logits"], a["index"]
    token_numbers(r, x.shape[:-1], x.dtype)
    r.logits("logits")
    r.one_device("logits", "index", "temperature")
    r.stored("logits", "index")
    if not r.need(x.dim() > 0 and y.dim() > 0 and y.shape[:-1] == x.shape[:-1], ValueError, "index"):
        return
    r.need(x.shape[-1] > 0, ValueError, "logits")
    if r.need(y.dtype in INTEGERS, TypeError, "index"):
        r.classes_in("index", x.shape[-1], None)


def selected_log_probs_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    x, index = _values(a, "logits"), _int64(_values(a, "index"))
    dtype = stats_dtype(x.dtype)
    if index.shape[-1] == 0:
        nothing = torch.zeros(index.shape, dtype=torch.float64)
        return {"log_probs": near(nothing, 0.0, dtype), "logits": near(torch.zeros_like(x).double(), 0.0, x.dtype)}
    grad = upstream.get("log_probs", torch.zeros(index.shape)).detach().cpu().double().as_subclass(Tensor)
    t = selected_truth(x, index, grad, **_token_options(a))
    return {
        "log_probs": near(t.log_probs, t.log_prob_terms, dtype),
        "logits": near(t.grad, t.grad_terms, x.dtype, roundings=2),
    }


# With a linear layer --------------------------------------------------------------------------------------------------


def _head(source: Source) -> tuple[dict[str, Any], list[int], int, torch.dtype]:
    of_rows, classes, features = _rows_shape(source), source.classes(), source.pick((0, 1, 2, 3, 8, 12, 17))
    dtype = source.pick((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    arguments: dict[str, Any] = {
        "input": source.normal([*of_rows, features], dtype),
        "linear_weight": source.normal([classes, features], dtype, 2 / max(features, 1) ** 0.5),
    }
    if source.maybe(0.5):
        arguments["linear_bias"] = source.normal([classes], dtype)
    return arguments, of_rows, classes, dtype


def linear_cross_entropy(source: Source) -> Call:
    chosen, compared = options(source, (*_LOSS, "loss_dtype", "chunk_rows", "return_lse", "return_z_loss"))
    arguments, of_rows, classes, dtype = _head(source)
    x = torch.empty([*of_rows, classes], dtype=dtype)
    arguments["target"] = _target_of(source, x, len(of_rows), chosen.get("ignore_index", -100), 0.06)
    if source.maybe(0.3):
        arguments["weight"] = source.weight(classes, dtype)
    spoil(source, arguments, ("input", "linear_weight", "linear_bias", "target", "weight"))
    return Call(
        "npu_xent.linear_cross_entropy",
        npu_xent.linear_cross_entropy,
        arguments | chosen,
        ("input", "linear_weight", "linear_bias"),
        linear_rules,
        linear_cross_entropy_truth,
        outputs=("loss", "lse", "z_loss"),
        with_gradient=("loss", "lse"),
        compared=compared,
    )


def _layer_rules(r: Rules) -> tuple[int, torch.dtype] | None:
    """Of input, linear_weight and linear_bias; C and the dtype that autocast makes, if they are known."""
    a = r.a
    x, w, b = a["input"], a["linear_weight"], a.get("linear_bias")
    r.stored("input", "linear_weight", "linear_bias", "target", "weight", "temperature")
    r.one_device("input", "linear_weight", "linear_bias", "target", "weight", "temperature")
    dtypes = {t.dtype for t in (x, w, b) if isinstance(t, Tensor)}
    casts = r.autocast and all(d.is_floating_point and d is not torch.float64 for d in dtypes)
    if r.autocast and not casts:
        r.open |= {"input", "linear_weight", "linear_bias"}  # torch's autocast decides
    if r.autocast and r.on_meta():
        r.open |= {"dtype", "device"}  # it casts the tensors of one device
    if not casts:
        r.need(x.dtype in LOGITS and not (x.dtype is torch.float64 and r.on_npu()), TypeError, "input")
        r.need(w.dtype == x.dtype, TypeError, "linear_weight", "input")
        r.need(b is None or b.dtype == x.dtype, TypeError, "linear_bias", "input")
    elif any(d not in LOGITS for d in dtypes):
        r.open |= {"input", "linear_weight", "linear_bias"}
    if not r.need(x.dim() > 0, ValueError, "input", "target"):
        return None
    if not r.need(w.dim() == 2 and w.shape[1] == x.shape[-1], ValueError, "linear_weight", "input"):
        return None
    r.need(w.shape[0] > 0, ValueError, "linear_weight", "input")
    r.need(b is None or b.shape == w.shape[:1], ValueError, "linear_bias")
    return w.shape[0], AUTOCAST if casts else x.dtype


def linear_rules(r: Rules) -> None:
    a = r.a
    r.flag("return_lse", "return_z_loss")
    r.reduction()
    loss_numbers(r) if a.get("ignore_index", 0) is not None else loss_numbers(_without(r, "ignore_index"))
    r.number("chunk_rows", 1, 2**63 - 1, optional=True, whole=True)
    if not (r.dense("input", "linear_weight", "target") & r.dense("linear_bias", "weight", optional=True)):
        return
    found = _layer_rules(r)
    x, y = a["input"], a["target"]
    classes, dtype = found if found is not None else (None, x.dtype)
    if found is not None:
        r.loss_dtype("input", cast=dtype)
    else:
        r.open.add("loss_dtype")
    r.class_weight(classes, dtype)
    if r.autocast and a.get("weight") is not None:
        r.open.add("weight")
    if x.dim() == 0:
        return
    ignore_index = -100 if a.get("ignore_index") is None else _plain_index(a["ignore_index"])
    if y.is_floating_point():
        if y.dtype not in LOGITS:
            r.open.add("target")
        r.need(classes is not None and y.shape == (*x.shape[:-1], classes), ValueError, "target")
        r.need(ignore_index < 0, RuntimeError, "ignore_index")
        return
    r.need(y.shape == x.shape[:-1], ValueError, "target")
    if r.need(y.dtype in INTEGERS, TypeError, "target") and y.shape == x.shape[:-1] and classes is not None:
        r.classes_in("target", classes, ignore_index)


def _without(r: Rules, name: str) -> Rules:
    """The same rules, of arguments without one."""
    r.a = {n: v for n, v in r.a.items() if n != name}
    return r


def linear_cross_entropy_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    y = _values(a, "target")
    layer = _Layer(a)
    w = None if a.get("weight") is None else _values(a, "weight")
    chosen, dtype = _loss_options(a), layer.x.dtype
    loss_dtype = a.get("loss_dtype") or (stats_dtype(dtype) if a["autocast"] else dtype)
    of_rows = y.shape
    if y.is_floating_point():
        return {}  # cross_entropy of F.linear
    y = _int64(y).reshape(-1)
    t = loss_truth(layer.logits, y, w, upstream, chosen)
    of_loss = of_rows if chosen["reduction"] == "none" else ()
    # An error of a logit moves its row's loss by twice as much at most, times the weights; z and lse as well.
    moved = layer.error * abs(chosen["logit_scale"])
    largest = 1.0 if w is None else float(w.double().max())
    by_row = moved * (2 * largest + 2 * chosen["lse_square_scale"] * t.lse.abs().nan_to_num(0, 0, 0))
    if chosen["reduction"] == "none":
        by_loss = by_row
    else:
        by_loss = by_row.sum() if chosen["reduction"] == "sum" else by_row.max() if len(by_row) else by_row.sum()
        if chosen["reduction"] == "mean" and w is not None:  # the mean of weights may be smaller than the largest
            by_loss = by_row.sum() / w.double()[w > 0].min() if bool((w > 0).any()) else by_loss
    terms = loss_terms(t, y, layer.logits.shape[1], w, chosen)
    found = {"loss": _moved(near(t.loss, terms, loss_dtype, shape=of_loss, of=dtype), by_loss)}
    if a.get("return_lse"):
        lse = near(t.lse, t.lse.abs().nan_to_num(0, 0, 0), stats_dtype(dtype), shape=of_rows)
        found["lse"] = _moved(lse, moved)
    if a.get("return_z_loss"):
        z = near(t.z_loss, 4 * t.z_loss.abs().nan_to_num(0, 0, 0), loss_dtype, shape=of_loss, of=dtype)
        found["z_loss"] = _moved(z, by_loss)
    return found | layer.gradients(t.grad, t.grad_terms, moved)


def _moved(n: Near, by: Any) -> Near:
    return n._replace(
        allowed=n.allowed + torch.as_tensor(by).reshape(n.allowed.shape) if n.value.numel() else n.allowed
    )


class _Layer:
    """F.linear of a call's arguments in float64, and how far from it logits in their dtype may be."""

    def __init__(self, a: dict[str, Any]) -> None:
        x, w = _values(a, "input"), _values(a, "linear_weight")
        b = None if a.get("linear_bias") is None else _values(a, "linear_bias")
        self.dtypes = {"input": x.dtype, "linear_weight": w.dtype, "linear_bias": x.dtype if b is None else b.dtype}
        if a["autocast"] and x.dtype is not torch.float64:
            x, w, b = x.to(AUTOCAST), w.to(AUTOCAST), b if b is None else b.to(AUTOCAST)
        self.x, self.shape = x, x.shape
        self.rows, self.weight, self.bias = (
            x.reshape(x.shape[:-1].numel(), x.shape[-1]).double().nan_to_num(0, 0, 0),  # in ignored rows
            w.double(),
            b if b is None else b.double(),
        )
        self.logits = F.linear(self.rows, self.weight, self.bias)
        self.eps = torch.finfo(x.dtype).eps
        # Sums of products are made in float32 (float64), and rounded.
        stats = torch.finfo(stats_dtype(x.dtype)).eps
        sizes = F.linear(self.rows.abs(), self.weight.abs(), None if self.bias is None else self.bias.abs())
        self.stats = stats
        self.error = (
            (self.eps * self.logits.abs() + (4 + x.shape[-1]) * stats * sizes).amax(1) if w.shape[0] else sizes.sum(1)
        )

    def gradients(self, grad: Tensor, terms: Tensor, moved: Tensor) -> Truth:
        """Of the layer's tensors, from that of the logits and the sizes of its terms."""
        off = (2 * self.eps + 8 * self.stats + 4 * moved[:, None]) * terms + 2 * self.eps * grad.abs().nan_to_num(
            0, 0, 0
        )
        size = grad.abs().nan_to_num(0, 0, 0) + off
        many = (8 + max(grad.shape, default=1)) * self.stats + (4 * self.eps if self.eps > 1e-4 else 0)
        tiny = float(torch.finfo(self.x.dtype).tiny)
        found = {
            "input": (grad @ self.weight, off @ self.weight.abs() + many * (size @ self.weight.abs()), self.shape),
            "linear_weight": (
                grad.t() @ self.rows,
                off.t() @ self.rows.abs() + many * (size.t() @ self.rows.abs()),
                None,
            ),
            "linear_bias": (grad.sum(0), off.sum(0) + many * size.sum(0), None),
        }
        results = {}
        for name, (value, allowed, shape) in found.items():
            dtype = self.dtypes[name]
            allowed = allowed + 2 * torch.finfo(dtype).eps * value.abs().nan_to_num(0, 0, 0) + len(grad) * tiny * 16
            results[name] = Near(value.reshape(shape or value.shape), allowed.reshape(shape or value.shape), dtype)
        return results


def linear_token_log_probs(source: Source) -> Call:
    names = (*_TOKEN, "ignore_index", "chunk_rows", "return_entropy")
    chosen, compared = options(source, names)
    arguments, of_rows, classes, dtype = _head(source)
    _temperature(source, chosen, of_rows, dtype)
    arguments["target"] = source.target(of_rows, classes, _plain_index(chosen.get("ignore_index", -100)))
    spoil(source, arguments, ("input", "linear_weight", "linear_bias", "target"))
    return Call(
        "npu_xent.linear_token_log_probs",
        npu_xent.linear_token_log_probs,
        arguments | chosen,
        ("input", "linear_weight", "linear_bias"),
        linear_token_rules,
        linear_token_log_probs_truth,
        outputs=("log_probs", "entropy", "top1"),
        with_gradient=("log_probs", "entropy"),
        compared=compared,
    )


def linear_token_rules(r: Rules) -> None:
    a = r.a
    r.flag("return_entropy", "return_top1")
    r.number("chunk_rows", 1, 2**63 - 1, optional=True, whole=True)
    if not (r.dense("input", "linear_weight", "target") & r.dense("linear_bias", optional=True)):
        token_numbers(r, None, None)
        return
    found = _layer_rules(r)
    x, y = a["input"], a["target"]
    token_numbers(r, y.shape, x.dtype)
    if r.autocast and isinstance(a.get("temperature"), Tensor):
        r.open.add("temperature")
    if x.dim() == 0 or not r.need(y.shape == x.shape[:-1], ValueError, "target"):
        return
    if r.need(y.dtype in INTEGERS, TypeError, "target") and found is not None:
        r.classes_in("target", found[0], _plain_index(a.get("ignore_index", -100)))


def linear_token_log_probs_truth(a: dict[str, Any], upstream: dict[str, Tensor]) -> Truth:
    layer, y = _Layer(a), _int64(_values(a, "target"))
    of_rows = layer.shape[:-1]
    logits = layer.logits.reshape(*of_rows, layer.logits.shape[1])
    upstream = {name: value.detach().cpu().as_subclass(Tensor) for name, value in upstream.items()}
    chosen = _token_options(a)
    found = _token_outputs(a, logits, y, upstream, "logits")
    dtype = stats_dtype(layer.x.dtype)
    temperature = torch.as_tensor(chosen["temperature"], dtype=torch.float64).expand(of_rows)
    temperature = temperature.masked_fill(y == index_of(a.get("ignore_index")), 1)  # it may be 0 or NaN there
    scale = abs(chosen["logit_scale"]) / temperature
    moved = layer.error * scale.reshape(-1)
    spread = 1 + 4 * float(layer.logits.abs().max() * scale.max()) if layer.logits.numel() else 1.0
    results = {"log_probs": _moved(_as(found["log_probs"], dtype), 2 * moved)}
    if "entropy" in found:
        results["entropy"] = _moved(_as(found["entropy"], dtype), 4 * spread * moved)
    grad = found["logits"]
    t = token_truth(
        logits, y, **chosen, ignore_index=index_of(a.get("ignore_index")),
        **{f"grad_{n}": g.double() for n, g in upstream.items()},
    )  # fmt: skip
    rows = grad.value.reshape(len(layer.rows), layer.logits.shape[1])
    terms = t.grad_terms.reshape(rows.shape) * spread
    return results | layer.gradients(rows, terms, moved)


def _as(n: Near, dtype: torch.dtype) -> Near:
    """A value whose tolerance was that of float64."""
    more = 4 * torch.finfo(dtype).eps * (1 + n.value.abs().nan_to_num(0, 0, 0))
    factor = torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    return Near(n.value, n.allowed * factor + more, dtype)
