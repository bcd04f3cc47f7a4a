"""Replaces Megatron's losses of logits whose classes are sharded (tensor parallelism)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import ALONE, vocab_parallel_cross_entropy
from ._patch import FrameworkPatch, Replacement, _original
from ._serves import serves_rows

_TRIED = "0.12.1, 0.15.3, 0.16.1 and 0.19.2"
_IGNORED = -100


def patch_megatron() -> FrameworkPatch:
    """Replace Megatron's vocab_parallel_cross_entropy and fused_vocab_parallel_cross_entropy, for all its callers::

        from npu_xent.integrations.megatron import patch_megatron

        patch_megatron()                    # from here on

        with patch_megatron():              # for a while
            ...

    Both are computed by npu_xent.distributed.vocab_parallel_cross_entropy: one all_gather in the forward instead of two
    or three all-reduces, and no float32 copy of 16-bit logits. Megatron's models call the first, and with
    cross_entropy_loss_fusion and cross_entropy_fusion_impl="native" the second. "te" is TransformerEngine's loss, which
    is not replaced. The group is tp_group, which newer releases pass to both, or else Megatron's tensor-parallel group.
    A group of one rank gathers nothing. Without torch.distributed, this rank has all classes.

    npu_xent serves dense cpu and npu tensors: logits [..., C / ranks] in float32, bfloat16, float16 or float64 (not on
    an NPU), targets [...] in int64 or int32. Megatron's functions get all other calls with the arguments as given:
    other devices and dtypes; subclasses such as DTensor; transforms of torch.func; a label_smoothing of (K - 1) / K and
    more, where K is the number of classes.

    Results are the loss of each row, [...], float32, as Megatron's. All columns are classes, those of padding too. What
    differs:

    - The logits keep their values, which Megatron overwrites if they are float32. The backward reads them: where a
      program frees their storage before it, it raises RuntimeError.
    - A row whose target is no class, such as -100, has loss 0 and gradient 0, whatever its logits. Megatron's value is
      lse - max and its gradient the softmax, which the loss mask has to remove; NaN stays NaN there.
    - label_smoothing is over the whole vocabulary, as Megatron's formula says: alpha K / (K - 1) of the mean. Megatron
      takes K and the mean from the classes of its rank. So with more than one rank its loss differs, and its ranks
      disagree.
    - The gradient is rounded once, to the dtype of the logits. Megatron's fused loss rounds each gradient to bfloat16.
    - Second derivatives raise RuntimeError. Megatron's are wrong.
    - On the CPU, targets in which ranks differ raise ValueError, on every rank.

    Returns:
        A handle, also a context manager, whose remove() undoes the patch.

    Raises:
        RuntimeError: megatron-core is not installed, or its functions have another signature.
    """
    return FrameworkPatch("patch_megatron", "megatron", _TRIED, _replacements())


def patch_mindspeed() -> None:
    """Register the replacements of patch_megatron with MindSpeed's patch manager, and apply them::

        import mindspeed.megatron_adaptor
        from npu_xent.integrations.megatron import patch_mindspeed

        patch_mindspeed()

    They wrap what other features have registered for the two functions, and what is left to Megatron's functions in
    patch_megatron is left to those. MindSpeed's replacements of methods of VocabParallelCrossEntropy have no effect on
    calls that npu_xent serves. mindspeed.megatron_adaptor.repatch() removes all patches: call this function again.

    Written from the sources that MindSpeed published (branches core_r0.12.1 to core_r0.18.0). Not run with MindSpeed.

    Raises:
        RuntimeError: megatron-core or MindSpeed is not installed, or Megatron's functions have another signature.
    """
    try:
        manager: Any = importlib.import_module("mindspeed.patch_utils").MindSpeedPatchesManager
    except ModuleNotFoundError as error:
        if error.name not in ("mindspeed", "mindspeed.patch_utils"):
            raise
        raise RuntimeError(
            "npu_xent.patch_mindspeed: mindspeed.patch_utils is not installed; without MindSpeed call patch_megatron"
        ) from None
    for replacement in _replacements():
        _original("patch_mindspeed", "megatron", _TRIED, *replacement[:3])
    for module, name, _, wrapper in _replacements():
        manager.register_patch(f"{module}.{name}", wrapper)
    manager.apply_patches()


def _replacements() -> tuple[Replacement, Replacement]:
    names = ("vocab_parallel_logits", "target")
    return (
        Replacement(
            "megatron.core.tensor_parallel.cross_entropy",
            "vocab_parallel_cross_entropy",
            (*names, "label_smoothing"),
            cross_entropy_wrapper,
        ),
        Replacement(
            "megatron.core.fusions.fused_cross_entropy",
            "fused_vocab_parallel_cross_entropy",
            (*names, "tp_group"),
            fused_cross_entropy_wrapper,
        ),
    )


# MindSpeed's manager takes functions of such names for wrappers.
def cross_entropy_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of Megatron's vocab_parallel_cross_entropy."""

    @functools.wraps(original)
    def cross_entropy(
        vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0, *args: Any, **keywords: Any
    ) -> Any:
        found = _loss(vocab_parallel_logits, target, label_smoothing, *args, **keywords)
        return original(vocab_parallel_logits, target, label_smoothing, *args, **keywords) if found is None else found

    return cross_entropy


def fused_cross_entropy_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of Megatron's fused_vocab_parallel_cross_entropy."""

    @functools.wraps(original)
    def fused_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any, **keywords: Any) -> Any:
        found = None if keywords else _loss(vocab_parallel_logits, target, 0.0, tp_group)
        return original(vocab_parallel_logits, target, tp_group, **keywords) if found is None else found

    return fused_cross_entropy


def _loss(
    logits: Tensor, target: Tensor, label_smoothing: float, tp_group: Any = None, **others: object
) -> Tensor | None:
    """npu_xent's loss. None: a call that it does not serve."""
    if others or not serves_rows(logits, target):
        return None
    group = _group(tp_group)
    if not (group is ALONE or isinstance(group, dist.ProcessGroup)):
        return None
    classes = logits.shape[-1] * (1 if group is ALONE else group.size())
    smoothing = 0.0
    if label_smoothing > 0:
        smoothing = label_smoothing * classes / (classes - 1) if classes > 1 else 1.0
        if not (label_smoothing < 1 and smoothing < 1):
            return None
    no_class = (target < 0) | (target >= classes)
    loss: Any = vocab_parallel_cross_entropy(
        logits,
        target.masked_fill(no_class, _IGNORED),
        group=group,
        ignore_index=_IGNORED,
        label_smoothing=smoothing,
        loss_dtype=torch.float32,
    )
    return loss  # type: ignore[no-any-return]


def _group(tp_group: Any) -> Any:
    """The ranks that share the classes; ALONE if it is this one."""
    if tp_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        tp_group = importlib.import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()
    return ALONE if isinstance(tp_group, dist.ProcessGroup) and tp_group.size() == 1 else tp_group
