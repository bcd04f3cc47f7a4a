"""Other packages' losses, on the fused operator: change the import, keep the numbers::

    npu_xent.compat.nnsight.cross_entropy_loss          in the place of nnsight's toolbox function
    npu_xent.compat.unit_scaling.cross_entropy          in the place of unit_scaling.functional.cross_entropy
    npu_xent.compat.unit_scaling.CrossEntropyLoss       in the place of unit_scaling.CrossEntropyLoss
    npu_xent.compat.mindformers.CrossEntropyLoss        in the place of mindformers' loss, for torch tensors

None of them needs the package it stands in for. Each says where it differs on purpose.
"""

from . import mindformers, nnsight, unit_scaling

__all__ = ["mindformers", "nnsight", "unit_scaling"]
