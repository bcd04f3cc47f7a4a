"""fuse_lm_head: a model of transformers whose head computes the loss instead of the logits.

In a fused call the model runs its own forward. Its head is called twice. First it returns Logits, a formula that
records what the model does to it; then, called by the model's loss_function, the loss.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from .._linear import linear_cross_entropy
from ._patch import _original, restored

TRIED = "5.24.0"
LOSSES = "transformers.loss.loss_utils"
MASKED_PARAMETERS = ("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "kwargs")
CAUSAL_PARAMETERS = (*MASKED_PARAMETERS[:-1], "shift_labels", "kwargs")
_STATE = "_npu_xent_fused"  # the attribute of a model and its head
_FUNCTION = "npu_xent.fuse_lm_head"


# Losses of transformers -----------------------------------------------------------------------------------------------


def targets_of(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """The class that each position predicts: the next label."""
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise TypeError("npu_xent.causal_lm_loss: labels and shift_labels are both None; pass one")
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def reduction_of(num_items: Tensor | int | None) -> str:
    """Of the losses of the rows."""
    return "mean" if num_items is None else "sum"


def per_item(loss: Tensor, num_items: Tensor | int | None) -> Tensor:
    """The loss, if it is reduced as `reduction_of` says."""
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)


def base_model(model: nn.Module) -> nn.Module:
    """The model of transformers in a model of PEFT."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return base


def loss_of(model: nn.Module, function: str) -> tuple[Callable[..., Any], bool]:
    """The loss of a model, and whether it is that of a causal language model."""
    causal = _original(function, "transformers", TRIED, LOSSES, "ForCausalLMLoss", CAUSAL_PARAMETERS)
    masked = _original(function, "transformers", TRIED, LOSSES, "ForMaskedLMLoss", MASKED_PARAMETERS)
    found: Any = getattr(model, "loss_function", None)
    of_all = {inspect.unwrap(causal): True, inspect.unwrap(masked): False}
    original = inspect.unwrap(found) if callable(found) else found
    if original not in of_all:
        raise TypeError(
            f"npu_xent.{function}: the loss_function of {type(model).__name__} is {original!r}, but must be "
            "transformers' ForCausalLMLoss or ForMaskedLMLoss, which npu_xent computes"
        )
    return found, of_all[original]


def set_loss(model: nn.Module, function: Callable[..., Any] | None) -> None:
    """Set the loss function of one model; None: the one of its class."""
    if function is not None:
        model.loss_function = function  # type: ignore[assignment]
    elif "_loss_function" in vars(model):
        del model._loss_function


# The formula ----------------------------------------------------------------------------------------------------------


class Logits:
    """Logits that are not computed: `after * tanh(before * x)`, or `before * x`, of x = head(hidden).

    `before` and `after` are pairs (factor, divisor).
    """

    def __init__(
        self,
        hidden: Tensor,
        classes: int,
        model: str,
        before: tuple[float, float] = (1.0, 1.0),
        after: tuple[float, float] | None = None,
    ) -> None:
        self.hidden, self.classes, self.model, self.before, self.after = hidden, classes, model, before, after

    def options(self) -> dict[str, Any]:
        """The keywords of linear_cross_entropy that apply the formula."""
        factor, divisor = self.before
        if self.after is None:
            return {"logit_scale": factor / divisor}
        softcap = self.after[0] / self.after[1]
        return {"logit_scale": factor * softcap / divisor, "softcap": softcap}

    def _scaled(self, factor: float, divisor: float) -> Logits:
        before, after = self.before, self.after
        if after is None:
            before = (before[0] * factor, before[1] * divisor)
        else:
            after = (after[0] * factor, after[1] * divisor)
        return Logits(self.hidden, self.classes, self.model, before, after)

    def __mul__(self, factor: Any) -> Logits:
        return self._scaled(factor, 1.0) if isinstance(factor, (int, float)) else self._refuse("multiplies by a tensor")

    __rmul__ = __mul__

    def __neg__(self) -> Logits:
        return self * -1.0

    def __truediv__(self, divisor: Any) -> Logits:
        if not isinstance(divisor, (int, float)) or divisor == 0:
            self._refuse("divides by a tensor or by 0")
        return self._scaled(1.0, divisor)

    def tanh(self) -> Logits:
        if self.after is not None:
            self._refuse("takes tanh twice of")
        return Logits(self.hidden, self.classes, self.model, self.before, (1.0, 1.0))

    def float(self) -> Logits:  # all is computed in float32
        return self

    def contiguous(self) -> Logits:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Logits:
        wanted = [*args[:1], *(kwargs[name] for name in ("device", "dtype") if name in kwargs)]
        for to in wanted:
            if to not in (torch.float32, self.device, str(self.device)):
                self._refuse(f"converts to {to}")
        return self

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.classes))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        logits = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Logits))
        if function is torch.tanh and len(args) == 1 and not kwargs:
            return logits.tanh()
        logits._refuse(f"calls {resolve_name(function)} with")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(_uses(self.model, what))

    def __getattr__(self, name: str) -> NoReturn:
        # An AttributeError, so that hasattr works.
        raise AttributeError(_uses(vars(self).get("model", "a model"), f"uses .{name} of"))

    def __getitem__(self, _: Any) -> NoReturn:
        self._refuse("indexes")

    def __setitem__(self, *_: Any) -> NoReturn:
        self._refuse("writes into")

    def __add__(self, _: Any) -> NoReturn:
        self._refuse("adds to")

    __radd__ = __sub__ = __rsub__ = __add__

    def _compare(self, _: Any) -> NoReturn:
        self._refuse("compares")

    __lt__ = __le__ = __gt__ = __ge__ = _compare
    __eq__ = __ne__ = _compare
    __hash__ = object.__hash__


def _uses(model: str, what: str) -> str:
    return (
        f"{_FUNCTION}: {model} {what} its logits, which the fused call does not compute; it knows factors, divisors, "
        "tanh and the loss. Use patch_transformers for this model"
    )


# The call -------------------------------------------------------------------------------------------------------------


class _State:
    """What a fused model and its head share. Copies of the model have copies."""

    def __init__(self, when: str, previous: Any, causal: bool, labels: int, head: nn.Module) -> None:
        self.when: str | None = when  # None: not at all
        self.head = head
        self.previous = previous  # the loss function of the model alone, or None
        self.causal = causal
        self.labels = labels  # the position of this parameter
        self.running: str | None = None  # the name of the model in a fused call
        self.request: dict[str, Any] | None = None  # what the head is to return: the loss of these targets and options
        self.answer: Tensor | None = None  # the head's latest loss
        self.warned = False


class FusedHead:
    """Undoes `fuse_lm_head`, by `remove()` or at the end of a `with` statement."""

    def __init__(self, model: nn.Module, when: str) -> None:
        """Check, then replace the forwards of model and head."""
        if when not in ("training", "always"):
            raise ValueError(f'{_FUNCTION}: when must be "training" or "always", but is {when!r}')
        self._model = model = base_model(model)
        _remove(model, getattr(model, _STATE, None))  # fuses again, for instance after the head was replaced
        head = _checked_head(model)
        for name, module in (("model", model), ("head", head)):
            forward = vars(module).get("forward")
            if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
                raise ValueError(
                    f"{_FUNCTION}: the forward of the {name} has been replaced already, for instance by hooks of "
                    "accelerate; fuse before other changes"
                )
        _, causal = loss_of(model, "fuse_lm_head")
        signature = inspect.signature(type(model).forward)
        if "labels" not in signature.parameters:
            raise TypeError(f"{_FUNCTION}: {type(model).__name__}.forward has no parameter labels")
        labels = [*signature.parameters].index("labels") - 1
        self._state = _State(when, vars(model).get("_loss_function"), causal, labels, head)
        setattr(model, _STATE, self._state)
        setattr(head, _STATE, self._state)
        # Methods, which a copy of the model binds to itself.
        model.forward = MethodType(_model_forward(type(model)), model)
        head.forward = MethodType(_head_forward, head)  # type: ignore[method-assign]
        set_loss(model, MethodType(_loss_function, model))

    def remove(self) -> None:
        """Restore the model. If other code has replaced a forward since, it stays, and calls the model's own."""
        _remove(self._model, self._state)

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _remove(model: nn.Module, state: _State | None) -> None:
    if state is None or state.when is None:
        return
    state.when = None
    for module in (model, state.head):
        forward = vars(module).get("forward")
        function = getattr(forward, "__func__", None)
        if function is _head_forward or getattr(function, _STATE, False):
            del module.forward
    loss = vars(model).get("_loss_function")
    if getattr(loss, "__func__", None) is _loss_function:
        set_loss(model, restored(state.previous))


def _checked_head(model: nn.Module) -> nn.Linear:
    """The head of a model, if it can be fused."""
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if type(head) is not nn.Linear:
        raise TypeError(
            f"{_FUNCTION}: the head of {type(model).__name__}, get_output_embeddings(), must be an nn.Linear itself, "
            f"but is {type(head).__module__}.{type(head).__name__}; an adapter, a quantization or a parametrization of "
            "the head is not supported. Use patch_transformers for this model"
        )
    _check_hooks(head)
    return head


def _check_hooks(head: nn.Module) -> None:
    hooks = (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
    for hook in (hook for kind in hooks for hook in kind.values()):
        module = getattr(hook, "__module__", None) or type(hook).__module__
        if not module.startswith("torch.distributed."):  # which run the head, and change no values
            raise ValueError(
                f"{_FUNCTION}: the head has a hook, {hook!r}, which would see no logits. Remove it, or use "
                "patch_transformers for this model"
            )


def _model_forward(of: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a fused model of this class."""
    original = of.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: _State = getattr(self, _STATE)
        if state.when is None or not (self.training or state.when == "always"):
            return original(self, *args, **kwargs)
        labels = args[state.labels] if len(args) > state.labels else kwargs.get("labels")
        if labels is None:
            if kwargs.get("num_items_in_batch") is not None and not state.warned:
                state.warned = True
                warnings.warn(_BYPASSED, stacklevel=2)
            return original(self, *args, **kwargs)
        state.running, state.answer = of.__name__, None
        try:
            output = original(self, *args, **kwargs)
        finally:
            answer = state.answer
            state.running = state.answer = None
        return _without_logits(output, of.__name__, answer)

    # As functools.wraps does, but accelerate would look for the function in __wrapped__, and take it.
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    setattr(forward, _STATE, True)
    return forward


_BYPASSED = (
    f"{_FUNCTION}: a training step has num_items_in_batch but no labels, so the model computes all logits. Trainer "
    "takes the labels for label_smoothing_factor and compute_loss_func, with which the head cannot be fused. For label "
    "smoothing leave label_smoothing_factor at 0 and pass compute_loss_func=npu_xent.integrations.transformers."
    "compute_loss_func(...), whose loss needs no float32 copy of the logits, and leave fuse_lm_head out"
)


def _without_logits(output: Any, model: str, answer: Tensor | None) -> Any:
    """The output of a fused call: None for the logits."""
    if answer is None:
        raise RuntimeError(
            f"{_FUNCTION}: {model} has not computed a loss by its loss_function and the head that was fused, so "
            "nothing was saved. Call fuse_lm_head after the head is replaced, or use patch_transformers"
        )
    if not isinstance(output, dict):
        raise RuntimeError(
            f"{_FUNCTION}: {model} returns a tuple, whose logits cannot be left out; use return_dict=True"
        )
    return type(output)(**{k: v for k, v in output.items() if not isinstance(v, Logits)})


def _head_forward(self: nn.Linear, input: Tensor) -> Any:
    """The forward of a fused head: logits, a formula or the loss."""
    state: _State = getattr(self, _STATE)
    if state.running is None:
        return nn.Linear.forward(self, input)
    _check_hooks(self)
    if state.request is None:
        return Logits(input, self.out_features, state.running)
    target, options = state.request["target"], state.request["options"]
    state.answer = linear_cross_entropy(
        input.reshape(-1, input.shape[-1]), self.weight, target, linear_bias=self.bias, **options
    )
    return state.answer


def _loss_function(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The loss_function of a fused model."""
    state: _State = getattr(self, _STATE)
    logits = args[0] if args else kwargs.get("logits")
    if isinstance(logits, Logits):
        return _fused_loss(self, state, *args, **kwargs)
    if state.previous is not None:
        return state.previous(*args, **kwargs)
    mapping = importlib.import_module(LOSSES).LOSS_MAPPING
    # transformers takes ForCausalLM where the type is None or unknown, as GPT-2's.
    return mapping.get(getattr(self, "loss_type", None), mapping["ForCausalLM"])(*args, **kwargs)


# A saved method becomes that of its name when a model is loaded: the class's own.
_head_forward.__name__, _loss_function.__name__ = "forward", "loss_function"


def _fused_loss(
    model: nn.Module,
    state: _State,
    logits: Logits,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    if vocab_size != logits.classes:
        raise ValueError(f"{_FUNCTION}: the head has {logits.classes} classes, but vocab_size is {vocab_size}")
    target = targets_of(labels, shift_labels, ignore_index) if state.causal else labels
    assert target is not None
    options = {
        "reduction": reduction_of(num_items_in_batch),
        "ignore_index": ignore_index,
        "loss_dtype": torch.float32,
        **logits.options(),
    }
    state.request = {"target": target.reshape(-1).to(logits.device), "options": options}
    try:
        loss: Tensor = model.get_output_embeddings()(logits.hidden)  # type: ignore[operator]
    finally:
        state.request = None
    if loss is not state.answer:
        raise RuntimeError(
            f"{_FUNCTION}: a hook on the head changes the loss that it returns, for instance to the output_dtype of an "
            "FSDP policy; leave the head's output alone"
        )
    return per_item(loss, num_items_in_batch)
