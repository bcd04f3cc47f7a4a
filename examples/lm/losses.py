"""The losses that --loss names: npu_xent's two functions, and PyTorch's for comparison."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from lm.settings import importing

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(name: str) -> Loss:
    """A function of logits [N, C] and targets [N]: their mean cross entropy, a scalar."""
    if name == "torch":
        return F.cross_entropy
    with importing(f"--loss {name}", "pip install . in npu_xent's repository, or use --loss torch"):
        import npu_xent

    def strict(logits: Tensor, targets: Tensor) -> Tensor:
        loss, _log_prob, _zloss, _lse = npu_xent.npu_cross_entropy_loss(logits, targets)
        return loss.squeeze(0)  # documented shape: [1]

    return strict if name == "npu_xent_strict" else npu_xent.cross_entropy
