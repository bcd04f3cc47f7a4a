"""What a user writes, for a type checker. test_typing.py runs mypy on it: errors are expected where a comment says so.

It is read, never run.
"""

import torch
from torch import Tensor
from typing_extensions import assert_type

import npu_xent
from npu_xent import (
    CrossEntropyLoss,
    CrossEntropyOutput,
    TokenLogProbs,
    cross_entropy,
    linear_cross_entropy,
    linear_token_log_probs,
    selected_log_probs,
    token_log_probs,
)

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

assert_type(token_log_probs(x, y), Tensor)
assert_type(token_log_probs(x, y, temperature=torch.ones(3), return_entropy=False), Tensor)
assert_type(token_log_probs(x, y, return_entropy=True), TokenLogProbs)
assert_type(token_log_probs(x, y, return_entropy=flag, return_top1=True), TokenLogProbs)
assert_type(token_log_probs(x, y, return_entropy=flag), Tensor | TokenLogProbs)
assert_type(token_log_probs(x, y, return_top1=True).entropy, Tensor | None)
token_log_probs(x, y, 0.7)  # error: call-overload
assert_type(linear_token_log_probs(x, x, y, temperature=0.7), Tensor)
assert_type(linear_token_log_probs(x, x, y, return_entropy=True, chunk_rows=2), TokenLogProbs)
linear_token_log_probs(x, x, y, consume_logits=True)  # error: call-overload
assert_type(selected_log_probs(x, y[:, None], temperature=torch.ones(3)), Tensor)
selected_log_probs(x, y[:, None], ignore_index=-1)  # error: call-arg

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
