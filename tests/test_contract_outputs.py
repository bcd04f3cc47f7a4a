"""The four outputs of npu_cross_entropy_loss under every mix of options, and the examples of its documentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from option_values import factors
from reference import (
    DTYPES,
    REDUCTIONS,
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    make_weight,
    max_error,
    pairwise,
    truth,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import npu_xent
from npu_xent import npu_cross_entropy_loss

OUTPUTS = pairwise(
    factors(
        *("dtype", "reduction", "weighted", "label_smoothing", "lse_square_scale", "loss_dtype"),
        need_log_prob=(True, False),
        return_zloss=(False, True),
        requires_grad=(False, True),
        ignore_index=(-100, 2),
    )
)


def output_call(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a case, without strict."""
    logits = make_logits(9, 21, case["dtype"], device)
    return {
        "input": logits.requires_grad_(case["requires_grad"]),
        "target": make_target(9, 21, device, ignore_index=case["ignore_index"]),
        "weight": make_weight(21, torch.float32, device) if case["weighted"] else None,
        "reduction": case["reduction"],
        "ignore_index": case["ignore_index"],
        "label_smoothing": case["label_smoothing"],
        "lse_square_scale_for_zloss": case["lse_square_scale"],
        "return_zloss": case["return_zloss"],
        "loss_dtype": case["loss_dtype"],
        "need_log_prob": case["need_log_prob"],
        "strict": False,
    }


@pytest.mark.parametrize("case", OUTPUTS, ids=case_id)
def test_outputs(case: dict[str, Any], device: torch.device) -> None:
    """Shapes, dtypes, values, and what is differentiable."""
    call = output_call(case, device)
    outputs = npu_cross_entropy_loss(**call)
    loss, log_prob, zloss, lse = outputs
    expected = truth(
        call["input"],
        call["target"],
        call["weight"],
        reduction=case["reduction"],
        ignore_index=case["ignore_index"],
        label_smoothing=case["label_smoothing"],
        lse_square_scale=case["lse_square_scale"],
    )
    shape = (9,) if case["reduction"] == "none" else (1,)
    assert log_prob.dtype == case["dtype"]
    assert {t.dtype for t in (loss, zloss, lse)} == {case["loss_dtype"] or case["dtype"]}

    assert_near(loss, expected.loss.view(shape), expected.loss_terms, name="loss")
    # The statistics' rounding of x and of lse.
    terms = call["input"].detach().cpu().double().abs() + expected.lse.abs()[:, None]
    if case["need_log_prob"]:
        assert_near(log_prob, expected.log_prob, terms, name="log_prob, ignored rows included")
        assert log_prob.is_contiguous()
    else:
        assert log_prob.shape == (0,)
    if case["return_zloss"]:
        assert_near(zloss, expected.z_loss.view(shape), 4 * expected.z_loss.abs(), name="zloss")
    else:
        assert zloss.shape == (0,)
    if case["lse_square_scale"]:
        assert_near(lse, expected.lse, expected.lse.abs(), name="lse_for_zloss")
    else:
        assert lse.shape == (0,)

    differentiable = [
        case["requires_grad"],
        False,
        case["requires_grad"] and case["return_zloss"] and case["lse_square_scale"] > 0,
    ]
    assert [t.requires_grad for t in (loss, log_prob, zloss)] == differentiable
    assert not lse.requires_grad


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_of_log_prob_are_no_larger_than_torchs(dtype: torch.dtype, offset: float, device: torch.device) -> None:
    logits = (make_logits(8, 32000, torch.float32, device) + offset).to(dtype)
    target = make_target(8, 32000, device)
    expected = truth(logits, target).log_prob
    torchs = max_error(logits.log_softmax(1), expected)
    ours = max_error(npu_cross_entropy_loss(logits, target)[1], expected)
    assert ours <= torchs + torch.finfo(torch.float32).eps * float(expected.abs().max())


@pytest.mark.parametrize("case", OUTPUTS, ids=case_id)
def test_fake_tensors_have_the_eager_shapes(case: dict[str, Any], device: torch.device) -> None:
    """The vendor's do not."""
    call = output_call(case, device)
    eager = npu_cross_entropy_loss(**call)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in call.items()}
        fake = npu_cross_entropy_loss(**fakes)
    for actual, expected in zip(fake, eager, strict=True):
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert actual.requires_grad == expected.requires_grad


@pytest.mark.parametrize("from_loss, from_zloss", [(1.0, 0.0), (0.0, 1.0), (2.0, -3.0), (None, 1.0), (1.0, None)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_loss_and_zloss_together(
    dtype: torch.dtype, reduction: str, from_loss: float | None, from_zloss: float | None, device: torch.device
) -> None:
    """The z-loss is part of the loss and an output besides: its gradient takes both ways. None: not used."""
    logits = make_logits(9, 21, dtype, device).requires_grad_()
    target = make_target(9, 21, device, ignore_index=-100)
    loss, _, zloss, _ = npu_cross_entropy_loss(
        logits, target, None, reduction, lse_square_scale_for_zloss=0.05, return_zloss=True, strict=False
    )
    used = [(output, up) for output, up in ((loss, from_loss), (zloss, from_zloss)) if up is not None]
    torch.autograd.backward([output for output, _ in used], [torch.full_like(output, up) for output, up in used])
    upstream = {"grad_loss": from_loss or 0.0, "grad_z_loss": from_zloss or 0.0}
    expected = truth(logits, target, reduction=reduction, lse_square_scale=0.05, **upstream)
    assert_near(logits.grad, expected.grad, expected.grad_terms)


@pytest.mark.float64
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_both_outputs(reduction: str, device: torch.device) -> None:
    logits = make_logits(4, 3, torch.float64, device, spread=1.0).requires_grad_()
    target, weight = torch.tensor([2, -100, 0, 1], device=device), make_weight(3, torch.float64, device)

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        return npu_cross_entropy_loss(x, target, weight, reduction, -100, 0.1, 0.2, True, strict=False)

    assert torch.autograd.gradcheck(outputs, logits)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_is_refused_in_words(reduction: str, device: torch.device) -> None:
    logits = make_logits(4, 3, torch.float32, device).requires_grad_()
    loss = npu_cross_entropy_loss(logits, make_target(4, 3, device), None, reduction)[0]
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtype_of_the_outputs_does_not_follow_autocast(dtype: torch.dtype, device: torch.device) -> None:
    call = {"input": make_logits(4, 6, dtype, device).requires_grad_(), "target": make_target(4, 6, device)}
    plain = npu_cross_entropy_loss(**call)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = npu_cross_entropy_loss(**call)
    for actual, expected in zip(outputs, plain, strict=True):
        assert_same_bits(actual, expected)
    outputs[0].backward()
    assert call["input"].grad.dtype == dtype


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_minus_100_is_ignored_although_it_is_negative(reduction: str, device: torch.device) -> None:
    """Any other negative target is out of range."""
    logits = make_logits(4, 6, torch.float32, device).requires_grad_()
    target = torch.tensor([1, -100, 2, -100], device=device)
    loss = npu_cross_entropy_loss(logits, target, None, reduction)[0]
    loss.sum().backward()
    expected = truth(logits, target, reduction=reduction)
    assert_near(loss.view(expected.loss.shape), expected.loss, expected.loss_terms)
    assert (logits.grad[1::2] == 0).all()
    if device.type == "cpu":
        with pytest.raises(IndexError):
            npu_cross_entropy_loss(logits, target.clamp(min=-99), None, reduction)


# Examples from documentation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "ignore_index": 100}], ids=["defaults", "sum"])
def test_documented_example(options: dict[str, Any], device: torch.device) -> None:
    """The two examples of the operator's page: 4096 rows of 8080 classes."""
    logits = torch.randn(4096, 8080, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    target = torch.arange(4096, device=device)
    loss, log_prob, zloss, lse = npu_cross_entropy_loss(logits, target, **options)
    loss.backward()
    theirs = logits.detach().cpu().requires_grad_()
    expected = F.cross_entropy(theirs, target.cpu(), **options)
    expected.backward()
    assert (loss.shape, log_prob.shape, zloss.shape, lse.shape) == ((1,), (4096, 8080), (0,), (0,))
    torch.testing.assert_close(loss.cpu(), expected.view(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.cpu(), theirs.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(log_prob[:50].cpu(), theirs[:50].detach().log_softmax(1), rtol=1e-6, atol=2e-6)


def test_padded_label_tutorial(device: torch.device) -> None:
    """[batch, time, classes] with -100 for padding: the mean over what is kept, no gradient at padding."""
    torch.manual_seed(42)
    logits = torch.randn(2, 4, 10).to(device).requires_grad_()
    labels = torch.tensor([[2, 3, 4, -100], [3, 2, 1, -100]], device=device)
    flat, flat_labels = logits.view(-1, 10), labels.view(-1)
    losses = [
        npu_xent.cross_entropy(flat, flat_labels),
        npu_xent.CrossEntropyLoss(ignore_index=-100)(flat, flat_labels),
        npu_cross_entropy_loss(flat, flat_labels)[0],
    ]
    for loss in losses:
        assert round(float(loss.detach()), 4) == 2.5207
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad[labels == -100] == 0).all()
        assert (grad[labels != -100] != 0).all()


def test_labels_as_ids_tutorial(device: torch.device) -> None:
    """The same tutorial's second example: three rows of five classes, labels 1, 2, 3."""
    logits = torch.tensor(
        [
            [0.9580, 1.3221, 0.8172, -0.7658, -0.7506],
            [1.3525, 0.6863, -0.3278, 0.7950, 0.2815],
            [0.0562, 0.5227, -0.2384, -0.0499, 0.5263],
        ],
        device=device,
    )
    labels = torch.tensor([1, 2, 3], device=device)
    loss, log_prob, _, _ = npu_cross_entropy_loss(logits, labels)
    assert round(float(loss), 4) == 1.8159
    assert round(float(npu_xent.cross_entropy(logits, labels)), 4) == 1.8159
    picked = log_prob.gather(1, labels.unsqueeze(1)).flatten().tolist()
    # It prints its logits, too, to four digits: either rounding may move the last one.
    assert picked == pytest.approx([-0.9353, -2.6417, -1.8706], abs=1.1e-4)
