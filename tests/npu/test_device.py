"""What an NPU has of its own: dtypes, formats, memory, targets that are looked at on demand."""

from __future__ import annotations

import re

import pytest
import torch
from reference import make_logits, make_target, make_weight
from torch import Tensor

import npu_xent
from npu_xent.doctor.timing import peak_memory

pytestmark = pytest.mark.npu

N, C = 512, 2000
LOGIT_BYTES = N * C * 4


def problem(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return make_logits(N, C, dtype, device), make_target(N, C, device, ignore_index=-100)


def test_float64_is_refused(device: torch.device) -> None:
    """With the same message by the operators and by torch operations."""
    y = make_target(4, 5, device)
    x = torch.empty(4, 5, dtype=torch.float64, device=device)

    def words(argument: str) -> str:
        return (
            re.escape(
                f"npu_xent: {argument} must be float32, bfloat16 or float16 on {x.device}, which has no float64 "
                f"arithmetic, but is @; convert it with {argument}.float(), or compute on the CPU."
            ).replace("@", r"(Double|torch\.float64)")
            + "$"
        )

    for function in (npu_xent.cross_entropy, npu_xent.CrossEntropyLoss(), torch.ops.npu_xent.row_stats):
        with pytest.raises(TypeError, match=words("logits")):
            function(x, y)
    with pytest.raises(TypeError, match=words("logits")):  # by torch operations, as the transforms are
        npu_xent.cross_entropy(x, torch.rand(4, 5, device=device))
    of_rows = {npu_xent.cross_entropy: y, npu_xent.token_log_probs: y, npu_xent.selected_log_probs: y[:, None]}
    for function, target in of_rows.items():
        with pytest.raises(TypeError, match=words("logits")):
            torch.func.jvp(lambda x, f=function, t=target: f(x, t), (x,), (x,))
    for function in (npu_xent.linear_cross_entropy, npu_xent.linear_token_log_probs):
        with pytest.raises(TypeError, match=words("input")):
            function(x, x, y)
        with pytest.raises(TypeError, match=words("input")):
            torch.func.jvp(lambda x, f=function: f(x, x, y), (x,), (x,))
    with pytest.raises(TypeError, match=words("input")):
        npu_xent.linear_cross_entropy(x, x, torch.rand(4, 4, device=device))


@pytest.mark.parametrize("name", ["row_grad_", "scale_"])
def test_formats_of_the_device_are_not_overwritten(name: str, device: torch.device) -> None:
    """Fractal NZ keeps 16 x 16 blocks together."""
    import torch_npu

    x = torch_npu.empty_with_format((32, 32), dtype=torch.float32, device=device, acl_format=29)
    if torch_npu.get_npu_format(x) == 2:
        pytest.skip("torch_npu gives no tensor in this format here")
    ops = torch.ops.npu_xent
    y, stats, one = make_target(32, 32, device), torch.zeros(32, device=device), torch.ones((), device=device)
    arguments = (y, None, stats, None, torch.ones(3, device=device), one) if name == "row_grad_" else (one,)
    with pytest.raises(ValueError, match="must not be in one of the device's own formats"):
        getattr(ops, name)(x, *arguments)


@pytest.mark.parametrize("where", ["cross_entropy", "npu_cross_entropy_loss"])
def test_targets_are_looked_at_on_demand(where: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(device)
    y[[7, 9]] = C
    function = getattr(npu_xent, where)
    loss = function(x, y)
    assert bool((loss if isinstance(loss, Tensor) else loss[0]).isnan().all())
    monkeypatch.setenv("NPU_XENT_DEBUG", "1")
    with pytest.raises(
        IndexError, match=rf"target\[7\] is {C}, which is neither a class in \[0, {C}\) nor ignore_index"
    ):
        function(x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_training_step_allocates_the_gradient_alone(reduction: str, device: torch.device) -> None:
    x, y = problem(device)
    x.requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(npu_xent.cross_entropy(x, y, reduction=reduction), x)[0]

    step()
    assert LOGIT_BYTES <= peak_memory(step, device) <= 1.02 * LOGIT_BYTES


def test_the_loss_alone_allocates_nothing_of_the_logits_size(device: torch.device) -> None:
    x, y = problem(device)
    assert peak_memory(lambda: npu_xent.cross_entropy(x, y), device) <= 0.02 * LOGIT_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_consumed_logits_need_no_gradient_memory(dtype: torch.dtype, device: torch.device) -> None:
    leaf, y = problem(device, dtype)
    leaf.requires_grad_()
    x = leaf + 0

    def step() -> Tensor:
        loss = npu_xent.cross_entropy(x, y, consume_logits=True)
        return torch.autograd.grad(loss, x)[0]

    assert peak_memory(step, device) <= 0.02 * LOGIT_BYTES


def test_a_weight_of_another_dtype_is_converted(device: torch.device) -> None:
    x, y = problem(device, torch.bfloat16)
    w = make_weight(C, torch.bfloat16, device)
    assert torch.equal(npu_xent.cross_entropy(x, y, w), npu_xent.cross_entropy(x, y, w.float()))
