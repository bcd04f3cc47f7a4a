"""Use npu_xent inside other packages without changing their callers.

`patch_torch_npu` in npu_xent.integrations.torch_npu replaces the vendor's npu_cross_entropy_loss.
"""

from . import torch_npu

__all__ = ["torch_npu"]
