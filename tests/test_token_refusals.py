"""What token_log_probs refuses. On an NPU values are not checked, since that would synchronize: such rows are NaN."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from reference import assert_same_bits, make_logits, make_target
from token_cases import loss_of, outputs_and_grad, problem, temperatures, upstreams
from torch import Tensor

import npu_xent


def call(device: torch.device, **changed: Any) -> Any:
    """token_log_probs of [4, 5] logits with some arguments changed; a callable is called with the device."""
    good = {"logits": make_logits(4, 5, torch.float32, device), "target": make_target(4, 5, device)}
    changed = {name: value(device) if callable(value) else value for name, value in changed.items()}
    return npu_xent.token_log_probs(**good | changed)


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "logits no tensor": (
        {"logits": [[0.0]]},
        TypeError,
        "token_log_probs: logits must be a torch.Tensor, but is a list",
    ),
    "target no tensor": (
        {"target": [0, 1]},
        TypeError,
        "token_log_probs: target must be a torch.Tensor, but is a list",
    ),
    "logits of no dimensions": ({"logits": lambda d: torch.tensor(1.0, device=d)}, ValueError, "logits"),
    "logits of integers": (
        {"logits": lambda d: torch.zeros(4, 5, dtype=torch.int64, device=d)},
        TypeError,
        "logits must be float32, bfloat16, float16 or float64",
    ),
    "no classes": (
        {"logits": lambda d: torch.zeros(4, 0, device=d)},
        ValueError,
        "logits must have at least one class",
    ),
    "fewer targets": (
        {"target": lambda d: torch.zeros(3, dtype=torch.int64, device=d)},
        ValueError,
        "target must have",
    ),
    "targets of another shape": (
        {"target": lambda d: torch.zeros(2, 2, dtype=torch.int64, device=d)},
        ValueError,
        "target must have",
    ),
    "class probabilities": ({"target": lambda d: torch.full((4, 5), 0.2, device=d)}, ValueError, "target must have"),
    "targets of floating point": (
        {"target": lambda d: torch.zeros(4, device=d)},
        TypeError,
        "target must be int64 or another integer dtype, but is",
    ),
    "targets of bool": (
        {"target": lambda d: torch.zeros(4, dtype=torch.bool, device=d)},
        TypeError,
        "target must be int64 or another integer dtype, but is",
    ),
    "target elsewhere": (
        {"target": lambda d: torch.zeros(4, dtype=torch.int64, device="meta")},
        ValueError,
        "target must be on the logits' device",
    ),
    "temperature of 0": ({"temperature": 0.0}, ValueError, "temperature must lie in [1e-6, 1e6], but is 0"),
    "temperature below 0": ({"temperature": -1.0}, ValueError, "temperature must lie in [1e-6, 1e6], but is -1"),
    "temperature of infinity": (
        {"temperature": torch.inf},
        ValueError,
        "temperature must lie in [1e-6, 1e6], but is inf",
    ),
    "temperature of NaN": ({"temperature": torch.nan}, ValueError, "temperature must lie in [1e-6, 1e6], but is nan"),
    "temperature as text": ({"temperature": "1"}, TypeError, "temperature must be a number"),
    "no temperature": ({"temperature": None}, TypeError, "temperature must be a number"),
    "temperature that learns": (
        {"temperature": lambda d: torch.ones(4, device=d, requires_grad=True)},
        RuntimeError,
        "temperature requires a gradient",
    ),
    "temperature in float16": (
        {"temperature": lambda d: torch.ones(4, device=d).half()},
        TypeError,
        "temperature must be a number or float32, but is",
    ),
    "temperature of integers": (
        {"temperature": lambda d: torch.ones(4, device=d).int()},
        TypeError,
        "temperature must be a number or float32, but is",
    ),
    "fewer temperatures": ({"temperature": lambda d: torch.ones(3, device=d)}, ValueError, "temperature must"),
    "temperatures of another shape": ({"temperature": lambda d: torch.ones(4, 1, device=d)}, ValueError, "temperature"),
    "temperatures elsewhere": (
        {"temperature": lambda d: torch.ones(4, device="meta")},
        ValueError,
        "token_log_probs: temperature must be on the device of logits,",
    ),
    "temperatures in a list": (
        {"temperature": [0.7] * 4},
        TypeError,
        "temperature must be a number, but is a list; for one of each row pass a float32 tensor",
    ),
    "temperatures of numpy": (
        {"temperature": np.full(4, 0.7)},
        TypeError,
        "temperature must be a number, but is a ndarray; for one of each row pass a float32 tensor",
    ),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap must lie in [1e-6, 1e6], but is 0"),
    "softcap as text": ({"softcap": "30"}, TypeError, "token_log_probs: softcap must be a number, but is a str"),
    "logit_scale of infinity": ({"logit_scale": torch.inf}, ValueError, "logit_scale must be finite, but is inf"),
    "logit_scale as a tensor": (
        {"logit_scale": torch.tensor(0.5)},
        TypeError,
        "token_log_probs: logit_scale must be a number, but is a Tensor",
    ),
    "ignore_index as text": ({"ignore_index": "1"}, TypeError, "token_log_probs: ignore_index must be an integer"),
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, requires_grad: bool, device: torch.device) -> None:
    changed, error, words = REFUSALS[name]
    if requires_grad and "logits" not in changed:
        changed = {"logits": lambda d: make_logits(4, 5, torch.float32, d).requires_grad_(), **changed}
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(device, **changed)
    assert "npu_xent" in str(caught.value)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:.*(prototype|beta|quantize|deprecated)")
@pytest.mark.parametrize("name", ["logits", "target", "temperature"])
def test_tensors_that_are_not_dense(name: str, device: torch.device) -> None:
    for make in (Tensor.to_sparse, lambda t: torch.nested.nested_tensor([t, t])):
        with pytest.raises(TypeError, match=f"token_log_probs: {name} must be a dense tensor, but is "):
            call(device, **{name: make(torch.ones(4, 5) if name == "logits" else torch.ones(4))})


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan])
def test_a_temperature_that_is_not_positive_and_finite(bad: float, device: torch.device) -> None:
    """The CPU raises and names the row. Elsewhere that would mean waiting for the device: what is not > 0 is NaN."""
    logits, target = make_logits(4, 5, torch.float32, device), make_target(4, 5, device)
    temperature = torch.tensor([1.0, bad, 2.0, 0.5], device=device)
    grads = upstreams(target.shape, torch.float32, device, "both")
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"temperature\[1\] is .*, but must be positive and finite"):
            outputs_and_grad(logits, target, grads, temperature=temperature)
        return
    if bad == torch.inf:
        return
    out, grad = outputs_and_grad(logits, target, grads, temperature=temperature)
    expected = outputs_and_grad(logits, target, grads, temperature=temperature.nan_to_num(1, 1, 1).abs().clamp(min=0.1))
    for actual, wanted in zip((*out[:2], grad), (*expected[0][:2], expected[1]), strict=True):
        assert actual[1].isnan().all()
        assert_same_bits(actual[[0, 2, 3]], wanted[[0, 2, 3]])
    assert not out.top1[1]


def test_temperatures_of_ignored_rows_are_no_matter(device: torch.device) -> None:
    """As long as they are positive: neither the logits nor their gradient are touched."""
    logits, target = problem(device)
    logits[target == -100] = torch.nan
    temperature = temperatures(target.shape, device)
    grads = upstreams(target.shape, torch.float32, device, "both")
    out, grad = outputs_and_grad(logits, target, grads, temperature=temperature.masked_fill(target == -100, 1e-30))
    expected = outputs_and_grad(logits, target, grads, temperature=temperature)
    for actual, wanted in zip((*out, grad), (*expected[0], expected[1]), strict=True):
        assert_same_bits(actual, wanted)
    assert grad.isfinite().all()


@pytest.mark.parametrize("bad", [5, 10**12, -1, -101])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_target_out_of_range(bad: int, requires_grad: bool, device: torch.device) -> None:
    logits = make_logits(3, 5, torch.float32, device).requires_grad_(requires_grad)
    target = torch.tensor([0, bad, 4], device=device)
    if device.type == "cpu":
        words = rf"target\[1\] is {bad}, which is neither a class in \[0, 5\) nor ignore_index \(-100\)"
        with pytest.raises(IndexError, match=words):
            npu_xent.token_log_probs(logits, target, return_entropy=True)
        return
    out = npu_xent.token_log_probs(logits, target, return_entropy=True, return_top1=True)
    assert out.log_probs.isnan().tolist() == [False, True, False]
    assert not out.top1[1]
    if requires_grad:
        out.log_probs.sum().backward()
        assert logits.grad.isnan().all(1).tolist() == [False, True, False]


def test_target_out_of_range_in_debug_mode(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_XENT_DEBUG", "1")
    with pytest.raises(IndexError, match=r"target\[0\] is 5"):
        call(device, target=lambda d: make_target(4, 5, d) + 1)


FREED = "with shape .* needs [0-9]+ bytes of storage, but its storage has been resized to 0"


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", ["logits", "target", "int32 target", "temperature", "logits of three dimensions"])
def test_freed_storage_of_arguments(name: str, device: torch.device) -> None:
    logits, target = make_logits(4, 5, torch.float32, device), make_target(4, 5, device)
    arguments: dict[str, Any] = {"logits": logits, "target": target, "temperature": torch.ones(4, device=device)}
    if name == "int32 target":
        arguments["target"] = target.int()
    if name == "logits of three dimensions":  # torch would copy them to make rows of them
        whole = torch.ones(2, 2, 10, device=device)
        arguments |= {"logits": whole[..., ::2], "target": target.view(2, 2), "temperature": 1.0}
    argument = {"int32 target": "target", "logits of three dimensions": "logits"}.get(name, name)
    freed(arguments[argument])
    with pytest.raises(RuntimeError, match=f"npu_xent: {argument} {FREED}"):
        npu_xent.token_log_probs(**arguments)


@pytest.mark.parametrize("consume", [False, True])
def test_freed_storage_before_the_backward(consume: bool, device: torch.device) -> None:
    leaf, target = problem(device)
    logits = leaf.requires_grad_() * 1
    loss = loss_of(logits, target, consume_logits=consume)
    freed(logits)
    with pytest.raises(RuntimeError, match=f"npu_xent: .* {FREED}"):
        loss.backward()


@pytest.mark.parametrize("output", [0, 1], ids=["log_probs", "entropy"])
def test_freed_upstream_gradient(output: int, device: torch.device) -> None:
    leaf, target = problem(device)
    out = npu_xent.token_log_probs(leaf.requires_grad_(), target, return_entropy=True)
    with pytest.raises(RuntimeError, match=f"npu_xent: .* {FREED}"):
        out[output].backward(freed(torch.ones_like(out[output])))
