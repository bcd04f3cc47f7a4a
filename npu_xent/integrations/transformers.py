"""The losses of Hugging Face transformers: of logits, and without logits."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import functional
from .._options import check_flags
from . import _lm_head
from . import torch as _of_torch
from ._lm_head import FusedHead, base_model, loss_of, per_item, reduction_of, set_loss, targets_of
from ._patch import FrameworkPatch, Replacement, note_removed, restored

_CAUSAL, _MASKED = "ForCausalLMLoss", "ForMaskedLMLoss"


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss: the float32 loss of logits that predict the next label.

    The logits are neither converted to float32 nor copied for the shift: the labels are shifted.

    Args:
        logits: [..., vocab_size], in any dtype of `cross_entropy`. Their gradient has the same dtype.
        labels: class indices or ignore_index, [batch, time]. The loss of position t is that of label t + 1.
        vocab_size: the number of classes.
        num_items_in_batch: what the sum of the losses is divided by. None: the number of labels that are not ignored.
        ignore_index: labels that are ignored.
        shift_labels: labels that are shifted already, instead of `labels`.
        kwargs: are ignored, as by transformers.

    Returns:
        The loss, [], in float32. It is differentiable once.
    """
    return _loss_of_rows(
        logits, targets_of(labels, shift_labels, ignore_index), vocab_size, num_items_in_batch, ignore_index
    )


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForMaskedLMLoss: `causal_lm_loss` without the shift. Label t belongs to position t."""
    return _loss_of_rows(logits, labels, vocab_size, num_items_in_batch, ignore_index)


def compute_loss_func(label_smoothing: float = 0.0, *, shift: bool = True) -> Callable[..., Tensor]:
    """A `compute_loss_func` for Trainer: the loss of TrainingArguments(label_smoothing_factor=label_smoothing)::

        Trainer(model, args, compute_loss_func=compute_loss_func(label_smoothing=0.1), ...)

    and leave label_smoothing_factor at 0. The loss has no float32 copies of the logits. In evaluation it is smoothed as
    well, as Trainer's is.

    Args:
        label_smoothing: in [0, 1].
        shift: whether the label of position t is label t + 1, as for causal language models.

    Returns:
        A function of (outputs, labels, num_items_in_batch=None).
    """
    check_flags("compute_loss_func", shift=shift)

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        target = targets_of(labels, None, -100) if shift else labels
        return _loss_of_rows(logits, target, logits.shape[-1], num_items_in_batch, -100, label_smoothing)

    return loss


def _loss_of_rows(
    logits: Tensor,
    target: Tensor,
    vocab_size: int,
    num_items: Tensor | int | None,
    ignore_index: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    loss = functional.cross_entropy(
        logits.reshape(-1, vocab_size),
        target.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction=reduction_of(num_items),
        label_smoothing=label_smoothing,
        loss_dtype=torch.float32,
    )
    return per_item(loss, num_items)


# The patch ------------------------------------------------------------------------------------------------------------


def patch_transformers(model: nn.Module | None = None) -> TransformersPatch:
    """Replace the losses of language models of transformers, of one model or of all::

        patch_transformers()            # ForCausalLMLoss and ForMaskedLMLoss, wherever transformers uses them
        patch_transformers(model)       # the loss_function of this model alone

        with patch_transformers():      # for a while
            ...

    npu_xent serves dense cpu and npu tensors: logits in float32, bfloat16, float16 or float64 (not on an NPU), and
    int64 labels. transformers' function gets all other calls with the arguments as given: other devices and dtypes,
    subclasses such as DTensor, transforms of torch.func, forward-mode derivatives.

    The loss is float32, as transformers' is. What changes: there is no float32 copy of the logits and of their
    gradient, so the loss of 16-bit logits is closer to the exact one up to the rounding of the gradient; NaN in ignored
    rows does not propagate; a second derivative raises RuntimeError. Models that do not use `self.loss_function`, such
    as T5 and BERT, keep their F.cross_entropy, which npu_xent.patch_torch replaces.

    Args:
        model: a model of transformers, or of PEFT around one. None: all models.

    Returns:
        A handle, also a context manager, whose remove() undoes the patch.

    Raises:
        RuntimeError: transformers is not installed, or its losses have another signature.
        TypeError: the loss of `model` is not one of the two.
    """
    return TransformersPatch(model)


class TransformersPatch:
    """Undoes `patch_transformers`, by `remove()` or at the end of a `with` statement."""

    def __init__(self, model: nn.Module | None) -> None:
        """Patch one model, or all."""
        self._model, self._functions = model, None
        if model is not None:
            self._model = model = base_model(model)
            original, causal = loss_of(model, "patch_transformers")
            self._before = vars(model).get("_loss_function")
            self._loss = (_causal if causal else _masked)(original)
            set_loss(model, self._loss)
            return
        losses = importlib.import_module(_lm_head.LOSSES) if importlib.util.find_spec("transformers") else None
        before = {name: getattr(losses, name, None) for name in (_CAUSAL, _MASKED)}
        replacements = (
            Replacement(_lm_head.LOSSES, _CAUSAL, _lm_head.CAUSAL_PARAMETERS, _causal),
            Replacement(_lm_head.LOSSES, _MASKED, _lm_head.MASKED_PARAMETERS, _masked),
        )
        self._functions = FrameworkPatch("patch_transformers", "transformers", _lm_head.TRIED, replacements)
        self._names = {getattr(losses, name): name for name in before}
        self._update({function: name for name, function in before.items()})

    @staticmethod
    def _update(names: dict[Any, str]) -> None:
        """Let models use the functions that have these names now, instead of these functions."""
        losses = importlib.import_module(_lm_head.LOSSES)
        for key, function in losses.LOSS_MAPPING.items():
            if function in names:
                losses.LOSS_MAPPING[key] = getattr(losses, names[function])

    def remove(self) -> None:
        """Restore the losses. If other code has replaced them since, its replacement stays."""
        if self._functions is not None:
            self._functions.remove()
            self._update(self._names)
        elif self._model is not None:
            note_removed(self._loss, self._before)
            if vars(self._model).get("_loss_function") is self._loss:
                set_loss(self._model, restored(self._before))

    def __enter__(self) -> TransformersPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _causal(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def loss(
        logits: Any,
        labels: Any,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        target = labels if shift_labels is None else shift_labels
        function = causal_lm_loss if _serves(logits, target, vocab_size, ignore_index) else original
        return function(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)

    return loss


def _masked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def loss(
        logits: Any,
        labels: Any,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> Any:
        function = masked_lm_loss if _serves(logits, labels, vocab_size, ignore_index) else original
        return function(logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs)

    return loss


def _serves(logits: Any, labels: Any, vocab_size: int, ignore_index: int) -> bool:
    """Whether transformers takes these arguments, and npu_xent computes the same from them."""
    if not (_of_torch._is_dense(logits) and _of_torch._is_dense(labels)):
        return False
    if logits.dim() == 0 or logits.shape[-1] != vocab_size or labels.numel() * vocab_size != logits.numel():
        return False
    if labels.numel() == 0:
        return False
    # One row decides: all would be a copy where the logits are sliced.
    row, label = logits[(0,) * (logits.dim() - 1)].unsqueeze(0), labels[(0,) * labels.dim()].unsqueeze(0)
    return _of_torch._serves(row, label.to(logits.device), None, ignore_index, "mean", 0.0)


# The loss without logits ----------------------------------------------------------------------------------------------


def fuse_lm_head(model: nn.Module, *, when: Literal["training", "always"] = "training") -> FusedHead:
    """Let a language model of transformers compute its loss without logits, by `linear_cross_entropy`::

        model = AutoModelForCausalLM.from_pretrained(...)
        fuse_lm_head(model)             # before FSDP, DDP, torch.compile and Trainer

    `model(**inputs, labels=labels)` then runs the model's own forward. Its head returns a formula instead of logits.
    The formula records what the model applies to it: factors, divisors and tanh, which are the scales and softcaps of
    all models. The model's `loss_function` calls the head a second time, and it returns the loss. So the loss is
    computed in the head's own `__call__`, where hooks of FSDP and of offloading run. The shift of the labels,
    `shift_labels`, `num_items_in_batch`, the router's auxiliary loss and the class of the output are the model's own.

    Left to the model: calls without labels, such as those of generate(), and with when="training" all calls in
    evaluation, so that compute_metrics gets logits.

    What changes: the `logits` of the output are None. The loss is float32, as transformers' is; scale and softcap are
    applied in float32 also in 16 bits. NaN in ignored rows does not propagate. A second derivative raises RuntimeError.

    Trainer takes the labels away from the model with label_smoothing_factor or compute_loss_func. Then there are
    logits, and a warning says so once; `compute_loss_func` serves their smoothed loss.

    Run one forward of a model at a time: threads must not share it (so nn.DataParallel is not supported).

    Args:
        model: a model of transformers, or of PEFT around one.
        when: "training", or "always": also in evaluation.

    Returns:
        A handle, also a context manager, whose remove() undoes it.

    Raises:
        ValueError: another `when`; a head with hooks; a forward that other code has replaced.
        TypeError: no head, a head that is not an nn.Linear itself, such as an adapter on it, or with parametrizations;
            a loss that is neither ForCausalLMLoss nor ForMaskedLMLoss; a forward without labels.
        RuntimeError: transformers is not installed, or its losses have another signature.

        A call of the model raises RuntimeError if it uses its logits in another way (also return_dict=False), if a hook
        changes what the head returns, or if the model computes its loss elsewhere. Then `remove()`.
    """
    return FusedHead(model, when)
