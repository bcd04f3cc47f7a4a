"""The truth of token_cases.py, against torch's autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import INF, NAN, case_id, make_logits, make_target, pairwise
from token_cases import plain, selected_truth, temperatures, token_target, token_truth, upstreams, with_masks

CPU = torch.device("cpu")
CASES = pairwise(
    {
        "temperature": (1.0, 0.7, "one a row"),
        "softcap": (None, 2.0),
        "logit_scale": (1.0, 0.7, -0.5, 0.0),
        "ignore_index": (-100, 1),
        "masked": (False, True),
        "uses": ("both", "log_probs", "entropy"),
        "shape": ((9, 7), (5, 1), (4, 1000)),
    }
)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_truth_is_torch_in_float64(case: dict[str, Any]) -> None:
    (rows, classes), scale = case["shape"], case["logit_scale"]
    logits = make_logits(rows, classes, torch.float64, CPU)
    if case["masked"] and scale != 0:  # 0 * -inf is NaN
        logits = with_masks(logits, scale)
    target = token_target(logits, logit_scale=scale, ignore_index=case["ignore_index"])
    options = {name: case[name] for name in ("temperature", "softcap", "logit_scale", "ignore_index")}
    if options["temperature"] == "one a row":
        options["temperature"] = temperatures((rows,), CPU)
    grads = upstreams(target.shape, torch.float64, CPU, case["uses"])
    found = token_truth(logits, target, **options, grad_log_probs=grads[0], grad_entropy=grads[1])
    leaf = logits.clone().requires_grad_()
    outputs = plain(leaf, target, **options)
    for actual, expected in zip(found[:2], outputs, strict=True):
        close(actual, expected)
    wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    torch.autograd.backward(*map(list, zip(*wanted, strict=True)))
    close(found.grad, leaf.grad)
    assert torch.equal(found.top1, ((logits * scale).argmax(1) == target) & (target != options["ignore_index"]))


def test_truth_of_rows_without_a_distribution() -> None:
    logits = torch.tensor([[-INF] * 3, [0.0, INF, 1.0], [0.0, NAN, 1.0], [-INF] * 3, [0.0, 1.0, -INF]])
    target = torch.tensor([0, 1, 2, -100, 2])
    found = token_truth(logits, target, grad_log_probs=1.0, grad_entropy=1.0)
    assert found.log_probs.isnan().tolist() == found.entropy.isnan().tolist() == [True, True, True, False, False]
    assert found.log_probs[3:].tolist() == [0.0, -INF]
    assert not found.top1.any()
    assert found.grad.isnan().all(1).tolist() == [True, True, True, False, False]
    assert not found.grad[3].any()
    # The target's own gradient is that of log_softmax, and the entropy adds nothing to it.
    assert float(found.grad[4, 2]) == 1.0
    assert float(token_truth(logits, target, grad_entropy=1.0).grad[4, 2]) == 0.0


def test_selected_truth_is_torch_in_float64() -> None:
    logits, index = make_logits(5, 7, torch.float64, CPU), torch.randint(0, 7, (5, 3))
    index[0] = 2
    grad = torch.randn(5, 3, dtype=torch.float64)
    found = selected_truth(logits, index, grad, softcap=2.0, logit_scale=0.7, temperature=0.5)
    leaf = logits.clone().requires_grad_()
    z = (2.0 * (0.7 * leaf / 2.0).tanh() / 0.5).log_softmax(1)
    z.gather(1, index).backward(grad)
    close(found.log_probs, z.gather(1, index))
    close(found.grad, leaf.grad)


def test_masks_leave_a_class_and_reach_some_targets() -> None:
    logits = with_masks(make_logits(40, 5, torch.float32, CPU))
    masked = logits == -INF
    assert not masked.all(1).any()
    assert masked.any(0).all()
    assert masked[range(40), make_target(40, 5, CPU)].any()
