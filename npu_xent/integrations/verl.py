"""Replaces the log-probabilities and entropies of verl."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._log_probs import TokenLogProbs, linear_token_log_probs, token_log_probs
from ..distributed import vocab_parallel_token_log_probs
from ._patch import FrameworkPatch, Replacement
from ._serves import NO_CLASS, function_class, serves, serves_options, serves_rows

_LOGITS, _MEGATRON = "verl.utils.torch_functional", "verl.utils.megatron.tensor_parallel"
_FUSED, _TRITON = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"


def patch_verl() -> FrameworkPatch:
    """Replace the functions by which verl computes log-probabilities and entropies with npu_xent's::

        from npu_xent.integrations.verl import patch_verl

        patch_verl()                        # from here on; in each process, before verl builds its engines

    They are, under all names that verl's modules have for them:

    - verl.utils.torch_functional: `logprobs_from_logits`, `entropy_from_logits`, `entropy_from_logits_with_chunking`,
      by npu_xent.token_log_probs
    - with `use_fused_kernels`, of which both backends then run on the CPU and on NPUs: `FusedLinearForPPOFunction` of
      verl.utils.experimental.torch_functional ("torch") and `linear_cross_entropy` of
      verl.utils.kernel.linear_cross_entropy ("triton"), by npu_xent.linear_token_log_probs
    - where Megatron is installed, verl.utils.megatron.tensor_parallel: `vocab_parallel_log_probs_from_logits`,
      `vocab_parallel_entropy`, `vocab_parallel_entropy_with_chunking`, by
      npu_xent.distributed.vocab_parallel_token_log_probs

    An engine keeps the entropy function that it finds when it is built (and may compile it), so patch before. The
    engines' workers are processes of their own: name a module that patches in VERL_USE_EXTERNAL_MODULES, which verl
    imports in each of them.

    npu_xent serves dense cpu and npu tensors: float32, bfloat16, float16, and float64 on the CPU where the result is
    float64 too. verl's own functions get all other calls: other devices and dtypes; DTensors; labels in another shape;
    a temperature outside of [1e-6, 1e6] or in a tensor; `linear_cross_entropy` with a reduction, or with classes
    that are sharded over several ranks; transforms of torch.func and forward-mode derivatives.

    What changes:

    - Log-probabilities and entropies of 16-bit logits are float32, as verl's kernels for CUDA return them.
    - The logits are never overwritten: `inplace_backward` has no effect, and Megatron's loss no longer overwrites
      float32 logits.
    - A logit of -inf adds nothing to the entropy, which in verl becomes NaN. A row with +inf is NaN.
    - A label out of range raises IndexError on the CPU, and makes its row NaN on an NPU. -100 is ignored where verl
      ignores it: by logprobs_from_logits on an NPU; and by linear_cross_entropy. An ignored row has log-probability and
      entropy 0.
    - A second derivative raises RuntimeError.

    The chunk sizes of verl are not used; npu_xent chooses its own.

    Returns:
        A handle, also a context manager, whose remove() undoes the patch. Patches nest.

    Raises:
        RuntimeError: verl is not installed, or one of its functions has another signature.
    """
    fused = ("ctx", "hidden_states", "vocab_weights", "input_ids", "temperature", "chunk_size")
    triton = ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")
    chunked = "chunk_size"
    replacements = [
        Replacement(_LOGITS, "logprobs_from_logits", ("logits", "labels", "inplace_backward"), _log_probs),
        Replacement(_LOGITS, "entropy_from_logits", ("logits",), _entropy),
        Replacement(_LOGITS, "entropy_from_logits_with_chunking", ("logits", chunked), _chunked_entropy),
        Replacement(_FUSED, "FusedLinearForPPOFunction", fused, _fused_function),
        Replacement(_TRITON, "linear_cross_entropy", triton, _linear_cross_entropy),
    ]
    if _has_megatron():
        logits = "vocab_parallel_logits"
        replacements += [
            Replacement(_MEGATRON, "vocab_parallel_log_probs_from_logits", ("logits", "labels"), _parallel_log_probs),
            Replacement(_MEGATRON, "vocab_parallel_entropy", (logits,), _parallel_entropy),
            Replacement(
                _MEGATRON, "vocab_parallel_entropy_with_chunking", (logits, chunked), _chunked_parallel_entropy
            ),
        ]
    return FrameworkPatch("patch_verl", "verl", "0.9.1", replacements)


def _has_megatron() -> bool:
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


def _serves_rows(logits: Any, labels: Any) -> bool:
    """Whether there is a label for each row, and logits [C] are left to verl."""
    return serves_rows(logits, labels) and logits.dim() > 1


def _is_chunked(logits: Any, dim: int) -> bool:
    """Whether entropies in chunks are of float32: verl fills a tensor of the default dtype."""
    served = serves(logits) and logits.dim() == dim and logits.dtype is not torch.float64
    return served and torch.get_default_dtype() is torch.float32


def _class_0(logits: Tensor) -> Tensor:
    """A target of each row, where only the entropy counts."""
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def _log_probs(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        if not _serves_rows(logits, labels):
            return original(logits, labels, inplace_backward)
        ignore_index = -100 if logits.device.type == "npu" else NO_CLASS
        return token_log_probs(logits, labels, ignore_index=ignore_index)

    return logprobs_from_logits


def _entropy_of(logits: Tensor) -> Tensor:
    entropy = token_log_probs(logits, _class_0(logits), return_entropy=True).entropy
    assert entropy is not None
    return entropy


def _entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def entropy_from_logits(logits: Tensor) -> Tensor:
        return _entropy_of(logits) if serves(logits) and logits.dim() > 0 else original(logits)

    return entropy_from_logits


def _chunked_entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        return _entropy_of(logits) if _is_chunked(logits, 2) else original(logits, chunk_size)

    return entropy_from_logits_with_chunking


# A linear layer -------------------------------------------------------------------------------------------------------


def _serves_layer(hidden: Any, weight: Any, labels: Any, temperature: Any) -> bool:
    """Whether npu_xent computes the logits as verl does, from tensors of one dtype or under autocast."""
    return (
        _serves_rows(hidden, labels)
        and serves(weight)
        and weight.device == hidden.device
        and (weight.dtype is hidden.dtype or torch.is_autocast_enabled(hidden.device.type))
        and torch.float64 not in (hidden.dtype, weight.dtype)
        and weight.dim() == 2
        and serves_options(temperature=temperature)
    )


def _layer(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, ignore_index: int) -> TokenLogProbs:
    return linear_token_log_probs(
        hidden, weight, labels, temperature=float(temperature), ignore_index=ignore_index, return_entropy=True
    )


def _fused_function(original: Any) -> Any:
    return function_class(original, _fused)


def _fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, chunk_size: int = 512
) -> tuple[Tensor, Tensor] | None:
    """The outputs of the fused layer, or None for what is left to verl."""
    if not (_serves_layer(hidden, weight, labels, temperature) and hidden.dim() <= 3):
        return None
    out = _layer(hidden, weight, labels, temperature, NO_CLASS)
    assert out.entropy is not None
    return out.log_probs, out.entropy


def _linear_cross_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> Any:
        rows, flat = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden, labels.flatten()
        if (
            _serves_layer(rows, weight, flat, temperature)
            and isinstance(temperature, float)
            and reduction.lower() == "none"
            and (dist_process_group is None or dist.get_world_size(dist_process_group) == 1)
        ):
            out = _layer(rows, weight, flat, temperature, -100)
            return out.log_probs, out.entropy
        return original(hidden, weight, labels, temperature, reduction, dist_process_group)

    return linear_cross_entropy


# Classes over ranks ---------------------------------------------------------------------------------------------------


def _parallel(logits: Tensor, labels: Tensor, return_entropy: bool = False) -> Any:
    group = importlib.import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()
    return vocab_parallel_token_log_probs(
        logits, labels, group=group, ignore_index=NO_CLASS, return_entropy=return_entropy
    )


def _parallel_log_probs(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
        if not _serves_rows(logits, labels) or logits.dtype is torch.float64:
            return original(logits, labels)
        log_probs: Tensor = _parallel(logits, labels)
        return log_probs

    return vocab_parallel_log_probs_from_logits


def _parallel_entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
        if not (serves(vocab_parallel_logits) and vocab_parallel_logits.dim() > 1):
            return original(vocab_parallel_logits)
        return _parallel_entropy_of(vocab_parallel_logits)

    return vocab_parallel_entropy


def _chunked_parallel_entropy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
        if not _is_chunked(vocab_parallel_logits, 3):
            return original(vocab_parallel_logits, chunk_size)
        return _parallel_entropy_of(vocab_parallel_logits)

    return vocab_parallel_entropy_with_chunking


def _parallel_entropy_of(logits: Tensor) -> Tensor:
    entropy: Tensor = _parallel(logits, _class_0(logits), return_entropy=True).entropy
    return entropy
