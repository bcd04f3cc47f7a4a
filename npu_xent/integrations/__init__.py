"""npu_xent inside other packages, whose callers stay as they are.

`patch_torch_npu` in npu_xent.integrations.torch_npu puts npu_cross_entropy_loss in the place of the vendor's.
"""

from . import torch_npu

__all__ = ["torch_npu"]
