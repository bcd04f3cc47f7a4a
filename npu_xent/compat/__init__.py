"""Drop-in replacements for other packages' losses, computed by the fused operator::

    npu_xent.compat.nnsight.cross_entropy_loss          for nnsight.util.cross_entropy_loss
    npu_xent.compat.unit_scaling.cross_entropy          for unit_scaling.functional.cross_entropy
    npu_xent.compat.unit_scaling.CrossEntropyLoss       for unit_scaling.CrossEntropyLoss
    npu_xent.compat.mindformers.CrossEntropyLoss        for mindformers.core.CrossEntropyLoss, on torch tensors

No replacement needs the original package. Each docstring lists the intended differences from the original, and the
differences between the original's documentation and its code.
"""

from . import mindformers, nnsight, unit_scaling

__all__ = ["mindformers", "nnsight", "unit_scaling"]
