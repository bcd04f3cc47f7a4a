"""mindformers' CrossEntropyLoss: a loss weighted by an input mask, for torch tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._options import check_flags
from .._tensors import LOGITS, check_float64, check_tensors, require_storages, transformed
from ..functional import cross_entropy

IGNORE_INDEX = -100
EPSILON = 1e-8
# For each keyword that is accepted and ignored: the alternative that the warning names.
INSTEAD = {
    "reduction": "the loss is sum(l * input_mask) / (sum(input_mask) + 1e-8); calculate_per_token_loss=True returns "
    "numerator and denominator",
    "weight": "input_mask has a weight for each row",
    "ignore_index": "input_mask decides: a row is ignored where it is 0",
    "label_smoothing": "pass smoothed class probabilities as label",
    "seq_split_num": "calculate_per_token_loss=True returns the pair that later releases return for seq_split_num > 1",
}
READ = "only parallel_config, check_for_nan_in_loss_and_grad and calculate_per_token_loss are read"


class CrossEntropyLoss(nn.Module):
    """Cross entropy weighted by a mask, as mindformers.core.loss.CrossEntropyLoss computes it.

    Args:
        parallel_config: an object or mapping with data_parallel and model_parallel, or None. With a model_parallel
            above 1, the classes are sharded over so many ranks.
        check_for_nan_in_loss_and_grad: also print the local loss. Results do not change, as in the original.
        calculate_per_token_loss: return numerator and denominator instead of their quotient.
        group: the ranks that share the classes, in the order of the classes; MindSpore makes it itself, torch does not.
            Default: all ranks. It must have model_parallel ranks.
        **kwargs: ignored as in the original, but with a UserWarning.

    Called as module(logits, label, input_mask):

    - logits: [N, C], float32, bfloat16, float16 or float64; computed in float32 (float64).
    - label: class indices, [N] or any shape of N values, int32 or int64; or class probabilities, [N, C], floating
      point. Labels where input_mask is 0 are ignored, whatever their value.
    - input_mask: the weight of each row, fractions included, N values in any shape.

    The loss of a row is l_n = -log_softmax(logits)[n, label_n] for class indices and
    l_n = -sum_c label[n, c] * log_softmax(logits)[n, c] for class probabilities. With
    numerator = sum(l * input_mask) and denominator = sum(input_mask) + 1e-8, returns
    numerator / denominator, [1], float32 (float64 for a float64 mask or float64 logits); or with
    calculate_per_token_loss the pair (numerator [], denominator [1]). The gradient is computed in the same dtype and
    rounded once, to the dtype of logits. Masked rows contribute 0 to the loss and have gradient 0, even if their logits
    or probabilities are NaN. All rows masked: 0, with gradient 0.

    Class probabilities are computed by torch operations, not by the fused operator, and are differentiable too. They
    need not sum to 1. A class of probability 0 whose logit is -inf contributes 0.

    Sharded classes (model_parallel above 1): each rank passes the logits of its C / model_parallel classes, and the
    label, which counts the classes of all ranks, and the input_mask of all rows. All ranks get the same result, and the
    gradient of their logits, with one all_gather in the forward (npu_xent.distributed). data_parallel is not read: the
    loss is that of the rows that are passed.

    Warns:
        UserWarning: a keyword is ignored; one warning for each. The message names the alternative.

    Raises:
        NotImplementedError: class probabilities where model_parallel is above 1.
        TypeError: label is neither int32 nor int64 nor floating point, logits have another dtype, input_mask is
            complex, or logits or input_mask are float64 on an NPU.
        ValueError: logits are not [N, C] with C > 0; class indices or input_mask do not have N values; class
            probabilities do not have the shape of logits; the group does not have model_parallel ranks, or not this
            rank.
        RuntimeError: N = 0; input_mask requires a gradient; model_parallel is above 1 and there is no process group.
        IndexError: a class index outside [0, C) where input_mask is not 0, on the CPU; NaN on other devices.

    Differs from the original on purpose: class probabilities are supported; a label out of range where input_mask is
    not 0 raises instead of counting as 0; a bool mask counts its rows; NaN in a masked row does not propagate; a mask
    of length 1 is not broadcast; float64 logits give a float64 loss.

    Where the original's documentation page and its code differ:

    - The page describes class probabilities as labels. The code raises TypeError for them. Here they are supported, and
      divided by the same denominator as class indices; the page divides by N.
    - The page's formulas have weights, ignore_index and the reductions "none", "mean" and "sum", and no input_mask. The
      code and this class have none of these. Passed as keywords, they are ignored: input_mask weights the rows, and
      calculate_per_token_loss decides what is returned.

    Parameters and their order are those of mindformers 1.3.2. Later releases add, move and remove some: pass them by
    name. There, seq_split_num > 1 returns the same pair as calculate_per_token_loss=True; here it is ignored.
    """

    def __init__(
        self,
        parallel_config: object | Mapping[str, Any] | None = None,
        check_for_nan_in_loss_and_grad: bool = False,
        calculate_per_token_loss: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_flags(
            "compat.mindformers.CrossEntropyLoss",
            check_for_nan_in_loss_and_grad=check_for_nan_in_loss_and_grad,
            calculate_per_token_loss=calculate_per_token_loss,
        )
        for name in kwargs:
            warnings.warn(f"mindformers.CrossEntropyLoss: {name} is ignored; {INSTEAD.get(name, READ)}", stacklevel=2)
        model_parallel = _get(parallel_config, "model_parallel", 1)
        self.model_parallel: int = 1 if model_parallel is None else int(model_parallel)
        self.group: dist.ProcessGroup | None = group
        self.check_for_nan_in_loss_and_grad: bool = bool(check_for_nan_in_loss_and_grad)
        self.calculate_per_token_loss: bool = bool(calculate_per_token_loss)

    def forward(self, logits: Tensor, label: Tensor, input_mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The masked loss; see the class."""
        tensors = {"logits": logits, "label": label, "input_mask": input_mask}
        check_tensors("compat.mindformers.CrossEntropyLoss", **tensors)
        require_storages(**tensors)
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise ValueError(
                "mindformers.CrossEntropyLoss: logits must have shape [N, C] with C > 0, but have shape "
                f"{list(logits.shape)}; flatten the batch and the sequence"
            )
        if logits.dtype not in LOGITS:
            raise TypeError(
                "mindformers.CrossEntropyLoss: logits must be float32, bfloat16, float16 or float64, but are "
                f"{logits.dtype}"
            )
        check_float64("mindformers.CrossEntropyLoss", logits=logits, input_mask=input_mask)
        probabilities = label.is_floating_point()
        if not probabilities and label.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                "mindformers.CrossEntropyLoss: label must be int32 or int64 (class indices) or floating point (class "
                f"probabilities), but is {label.dtype}"
            )
        if probabilities and label.shape != logits.shape:
            raise ValueError(
                "mindformers.CrossEntropyLoss: floating point label holds class probabilities and must have the shape "
                f"of logits, {list(logits.shape)}, but has shape {list(label.shape)}; class indices are int32 or int64"
            )
        rows = logits.shape[0]
        one_a_row = {"input_mask": input_mask} if probabilities else {"label": label, "input_mask": input_mask}
        for name, value in one_a_row.items():
            if value.numel() != rows:
                raise ValueError(
                    f"mindformers.CrossEntropyLoss: {name} must have one value for each of the {rows} rows of logits, "
                    f"but has {value.numel()}"
                )
        if rows == 0:
            raise RuntimeError("mindformers.CrossEntropyLoss: logits have no rows, so there is nothing to average")
        if input_mask.is_complex():
            raise TypeError(f"mindformers.CrossEntropyLoss: input_mask must be real numbers, but is {input_mask.dtype}")
        if input_mask.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "mindformers.CrossEntropyLoss: input_mask requires a gradient, which is not computed; pass "
                "input_mask.detach()"
            )
        dtype = torch.float64 if torch.float64 in (logits.dtype, input_mask.dtype) else torch.float32
        mask = input_mask.reshape(-1).to(dtype)
        if probabilities:
            if self.model_parallel > 1:
                raise NotImplementedError(
                    "mindformers.CrossEntropyLoss: label holds class probabilities, which are not supported where "
                    f"model_parallel is {self.model_parallel}; pass class indices, or whole logits with "
                    "model_parallel=1"
                )
            loss = _losses_of_probabilities(logits, label, mask == 0, dtype)
        else:
            loss = _losses_of_indices(logits, label, mask == 0, dtype, self.model_parallel, self.group)
        numerator = (loss * mask).sum()
        denominator = mask.sum().reshape(1) + EPSILON
        if self.check_for_nan_in_loss_and_grad:
            print("local loss: ", numerator / denominator)
        if self.calculate_per_token_loss:
            return numerator, denominator
        return numerator / denominator


def _losses_of_indices(
    logits: Tensor, label: Tensor, masked: Tensor, dtype: torch.dtype, ranks: int, group: dist.ProcessGroup | None
) -> Tensor:
    """The loss of each row, [N], by the fused operators. Masked rows are 0, and their logits and label are not read."""
    target, classes = label.reshape(-1).to(torch.int64), logits.shape[1] * ranks
    # With more ranks, the sharded loss finds these labels, on all ranks.
    if ranks == 1 and target.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed()):
        bad = ((target < 0) | (target >= classes)) & masked.logical_not()
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"mindformers.CrossEntropyLoss: label[{row}] is {int(target[row])}, which is not a class in "
                f"[0, {classes}); set input_mask to 0 where there is nothing to predict"
            )
    # Only masked rows may be ignored. A label that happens to equal IGNORE_INDEX in another row becomes another value
    # out of range, so that the operator handles it like every label out of range.
    target = torch.where(target == IGNORE_INDEX, IGNORE_INDEX - 1, target).masked_fill(masked, IGNORE_INDEX)
    loss: Any
    if ranks > 1:
        from ..distributed import check_member, vocab_parallel_cross_entropy

        check_member("compat.mindformers.CrossEntropyLoss", "group", group)
        if dist.is_initialized() and dist.get_world_size(group) != ranks:
            raise ValueError(
                f"mindformers.CrossEntropyLoss: parallel_config.model_parallel is {ranks}, but the group has "
                f"{dist.get_world_size(group)} ranks; pass group, the ranks that share the classes"
            )
        loss = vocab_parallel_cross_entropy(logits, target, group=group, ignore_index=IGNORE_INDEX, loss_dtype=dtype)
    else:
        loss = cross_entropy(logits, target, reduction="none", ignore_index=IGNORE_INDEX, loss_dtype=dtype)
    return loss  # type: ignore[no-any-return]


def _losses_of_probabilities(logits: Tensor, label: Tensor, masked: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of each row, [N], by torch operations; 0 where masked."""
    masked = masked.unsqueeze(1)
    label = label.to(dtype).masked_fill(masked, 0.0)  # not a product with the mask: 0 * NaN is NaN
    log_prob = torch.log_softmax(logits.to(dtype).masked_fill(masked, 0.0), dim=1)
    log_prob = log_prob.masked_fill((label == 0) & (log_prob == -math.inf), 0.0)
    return -(label * log_prob).sum(1)


def _get(config: object | Mapping[str, Any] | None, name: str, default: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)
