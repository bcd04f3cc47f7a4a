"""Use npu_xent inside other packages without changing their callers.

`patch_torch` in npu_xent.integrations.torch replaces torch.nn.functional.cross_entropy, and `patch_torch_npu` in
npu_xent.integrations.torch_npu replaces the vendor's npu_cross_entropy_loss. Both return a PatchHandle. The modules
transformers, trl, verl, megatron and torchtitan have the patches of frameworks; import them by name.
"""

from . import torch, torch_npu
from ._patch import PatchHandle

__all__ = ["PatchHandle", "torch", "torch_npu"]
