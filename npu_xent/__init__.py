"""Fused cross entropy for Huawei Atlas NPUs and for CPUs::

    npu_xent.cross_entropy              drop-in replacement for torch.nn.functional.cross_entropy
    npu_xent.linear_cross_entropy       the loss of a linear layer's output, without materializing the logits
    npu_xent.token_log_probs            log-probabilities, entropy and accuracy of tokens, for RL; also linear_...
    npu_xent.selected_log_probs         log-probabilities of K classes of each row
    npu_xent.CrossEntropyLoss           drop-in replacement for torch.nn.CrossEntropyLoss
    npu_xent.npu_cross_entropy_loss     drop-in replacement for torch_npu.npu_cross_entropy_loss
    npu_xent.compat                     drop-in replacements for the losses of nnsight, unit_scaling and mindformers

For callers that cannot be changed, npu_xent.patch_torch replaces torch.nn.functional.cross_entropy, and
npu_xent.patch_torch_npu the vendor's function. npu_xent.load_npu loads the kernels before the first npu tensor is used.
Importing this package never imports torch_npu.

`python -m npu_xent.doctor` checks an installation.
"""

from __future__ import annotations

from . import _loading

_loading.load_operators()

from . import _flops, compat, integrations  # noqa: E402, F401
from ._build import VERSION  # noqa: E402
from ._constraints import ConstraintError  # noqa: E402
from ._linear import linear_cross_entropy  # noqa: E402
from ._loading import load_npu  # noqa: E402
from ._log_probs import TokenLogProbs, linear_token_log_probs, selected_log_probs, token_log_probs  # noqa: E402
from .functional import CrossEntropyOutput, cross_entropy, npu_cross_entropy_loss  # noqa: E402
from .integrations.torch import patch_torch  # noqa: E402
from .integrations.torch_npu import patch_torch_npu  # noqa: E402
from .modules import CrossEntropyLoss  # noqa: E402

__version__: str = VERSION

__all__ = [
    "ConstraintError",
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "TokenLogProbs",
    "compat",
    "cross_entropy",
    "integrations",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "load_npu",
    "npu_cross_entropy_loss",
    "patch_torch",
    "patch_torch_npu",
    "selected_log_probs",
    "token_log_probs",
]
