"""What a user writes, for a type checker. test_typing.py runs mypy on it: errors are expected where a comment says so.

It is read, never run.
"""

import torch
from torch import Tensor
from typing_extensions import assert_type

import npu_xent
from npu_xent import CrossEntropyLoss, CrossEntropyOutput, cross_entropy, linear_cross_entropy

x, w = torch.zeros(3, 5, requires_grad=True), torch.ones(5)
y = torch.zeros(3, dtype=torch.int64)
flag = bool(x.sum() > 0)

cross_entropy(x, y).backward()
cross_entropy(x, y, w, None, -100, None, "sum", 0.1).backward()
cross_entropy(x, y, return_lse=False, return_z_loss=False, softcap=30.0).backward()
assert_type(cross_entropy(x, y, return_lse=True), CrossEntropyOutput)
assert_type(cross_entropy(x, y, return_z_loss=True), CrossEntropyOutput)
assert_type(cross_entropy(x, y, return_lse=flag, return_z_loss=True), CrossEntropyOutput)
assert_type(cross_entropy(x, y, return_lse=flag), Tensor | CrossEntropyOutput)
cross_entropy(x, y, return_lse=True).loss.backward()
assert_type(cross_entropy(x, y, return_lse=True).lse, Tensor | None)
cross_entropy(x, y, return_lse=True).backward()  # error: attr-defined
cross_entropy(x, y, label_smothing=0.1)  # error: call-overload
cross_entropy(x, y, reduction=None)  # error: call-overload
cross_entropy(x, y, w, None, -100, None, "sum", 0.1, 1e-4)  # error: call-overload

linear_cross_entropy(x, x, y).backward()
linear_cross_entropy(x, x, y, ignore_index=None).backward()
cross_entropy(x, y, ignore_index=None)  # error: call-overload
assert_type(linear_cross_entropy(x, x, y, return_lse=True), CrossEntropyOutput)
assert_type(linear_cross_entropy(x, x, y, return_z_loss=True), CrossEntropyOutput)
assert_type(linear_cross_entropy(x, x, y, return_z_loss=flag), Tensor | CrossEntropyOutput)
linear_cross_entropy(x, x, y, consume_logits=True)  # error: call-overload

criterion = CrossEntropyLoss(w, reduction="sum")
torchs: torch.nn.CrossEntropyLoss = criterion
criterion(x, y).backward()
assert_type(criterion.forward(x, y), Tensor | CrossEntropyOutput)
assert_type(criterion.label_smoothing, float)
output: CrossEntropyOutput = CrossEntropyLoss(return_lse=True)(x, y)
output.loss.backward()
CrossEntropyLoss(label_smothing=0.1)  # error: call-arg

assert_type(npu_xent.npu_cross_entropy_loss(x, y), tuple[Tensor, Tensor, Tensor, Tensor])
assert_type(npu_xent.__version__, str)
