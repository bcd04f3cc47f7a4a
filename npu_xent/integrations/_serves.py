"""Which tensors npu_xent serves instead of a framework's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._tensors import LOGITS
from .torch import _is_dense


def serves_rows(logits: Tensor, target: Tensor) -> bool:
    """Whether npu_xent takes logits [..., C] and class indices [...], dense tensors of the cpu or an npu."""
    if not (_is_dense(logits) and _is_dense(target)) or target.shape != logits.shape[:-1] or 0 in logits.shape[-1:]:
        return False
    device, dtype = logits.device, logits.dtype
    if device.type not in ("cpu", "npu") or target.device != device or target.dtype not in (torch.int64, torch.int32):
        return False
    if logits.dim() == 0 or dtype not in LOGITS or (dtype is torch.float64 and device.type == "npu"):
        return False
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
