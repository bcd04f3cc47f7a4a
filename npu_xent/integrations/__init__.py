"""npu_xent inside other packages, whose callers stay as they are.

npu_xent.integrations.torch_npu.patch_torch_npu     puts npu_cross_entropy_loss in the place of the vendor's
"""

from . import torch_npu

__all__ = ["torch_npu"]
