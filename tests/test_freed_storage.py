"""A storage that was freed behind a tensor raises, instead of being read: programs free logits to save memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import assert_same_bits, make_logits, make_target, make_weight
from torch import Tensor

import npu_xent

WORDS = "needs [0-9]+ bytes of storage, but its storage has been resized to 0"


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", ["logits", "target", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_arguments_of_the_loss(reduction: str, name: str, device: torch.device) -> None:
    tensors = {
        "logits": make_logits(9, 21, torch.float32, device),
        "target": make_target(9, 21, device),
        "weight": make_weight(21, torch.float32, device),
    }
    freed(tensors[name])
    with pytest.raises(RuntimeError, match=f"npu_xent: {name} with shape .* {WORDS}"):
        npu_xent.cross_entropy(*tensors.values(), reduction=reduction)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["logits", "probabilities"])
def test_probabilities(name: str, create_graph: bool, device: torch.device) -> None:
    """In the forward, and in a backward whose gradient may be differentiated again."""
    if device.type != "cpu":
        pytest.skip("torch operations, which check nothing, serve other devices")
    for shape in ((9, 21), (3, 21, 3)):
        tensors = {"logits": torch.randn(shape), "probabilities": torch.rand(shape)}
        freed(tensors[name])
        with pytest.raises(RuntimeError, match=WORDS):
            npu_xent.cross_entropy(*tensors.values())
    tensors = {"logits": torch.randn(9, 21), "probabilities": torch.rand(9, 21)}
    leaf = tensors["logits"].requires_grad_()
    loss = npu_xent.cross_entropy(*tensors.values())
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"npu_xent: {name} with shape .* {WORDS}"):
        torch.autograd.grad(loss, leaf, create_graph=create_graph)


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "target", "weight"])
def test_arguments_of_the_linear_loss(name: str, device: torch.device) -> None:
    shapes = {"input": (9, 8), "linear_weight": (21, 8), "linear_bias": (21,), "weight": (21,)}
    tensors = {key: torch.ones(shape, device=device) for key, shape in shapes.items()}
    tensors["target"] = make_target(9, 21, device)
    freed(tensors[name])
    with pytest.raises(RuntimeError, match=f"npu_xent: {name} with shape .* {WORDS}"):
        npu_xent.linear_cross_entropy(**tensors)


def strided(*shape: int, device: torch.device) -> Tensor:
    return torch.ones(*shape[:-1], 2 * shape[-1], device=device)[..., ::2]


READ_BY_TORCH_FIRST: dict[str, Callable[[torch.device], object]] = {
    "int32 target": lambda d: npu_xent.cross_entropy(torch.ones(9, 21, device=d), freed(make_target(9, 21, d).int())),
    "uint64 target": lambda d: npu_xent.cross_entropy(
        torch.ones(9, 21, device=d), freed(make_target(9, 21, d).view(torch.uint64))
    ),
    "strict weight": lambda d: npu_xent.npu_cross_entropy_loss(
        torch.ones(9, 21, device=d), make_target(9, 21, d), freed(torch.ones(21, device=d))
    ),
    "weight under autocast": lambda d: under_autocast(d, freed(torch.ones(21, dtype=torch.bfloat16, device=d))),
    "logits of three dimensions": lambda d: npu_xent.cross_entropy(
        freed(strided(3, 21, 4, device=d)), torch.zeros(3, 4, dtype=torch.int64, device=d)
    ),
    "linear input of three dimensions": lambda d: npu_xent.linear_cross_entropy(
        freed(strided(3, 4, 8, device=d)), torch.ones(21, 8, device=d), torch.zeros(3, 4, dtype=torch.int64, device=d)
    ),
}


def under_autocast(device: torch.device, weight: Tensor) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        return npu_xent.cross_entropy(make_logits(9, 21, torch.float32, device), make_target(9, 21, device), weight)


@pytest.mark.parametrize("name", READ_BY_TORCH_FIRST)
def test_what_torch_would_read_first(name: str, device: torch.device) -> None:
    if device.type == "npu" and name == "strict weight":
        pytest.skip("its values are not looked at there")
    with pytest.raises(RuntimeError, match=f"npu_xent: .* with shape .* {WORDS}"):
        READ_BY_TORCH_FIRST[name](device)


@pytest.mark.cpu
def test_a_shrunk_storage(device: torch.device) -> None:
    """A view into the part that is left can be used; the rest cannot."""
    logits, target = make_logits(9, 21, torch.float32, device), make_target(9, 21, device)
    expected, views = npu_xent.cross_entropy(logits[:4], target[:4]), (logits, logits[1:5])
    logits.untyped_storage().resize_(4 * 21 * 4)
    assert_same_bits(npu_xent.cross_entropy(logits[:4], target[:4]), expected)
    for bad in views:
        with pytest.raises(RuntimeError, match=r"logits with shape .* but its storage has been resized to 336"):
            npu_xent.cross_entropy(bad, target[: len(bad)])


def test_upstream_gradient(device: torch.device) -> None:
    logits, target = make_logits(9, 21, torch.float32, device).requires_grad_(), make_target(9, 21, device)
    for reduction, name in (("mean", "the upstream gradient"), ("none", "grad_loss")):
        loss = npu_xent.cross_entropy(logits, target, reduction=reduction)
        with pytest.raises(RuntimeError, match=f"npu_xent: {name} with shape .* {WORDS}"):
            loss.backward(freed(torch.ones_like(loss)))


def contract(logits: Tensor, target: Tensor) -> Tensor:
    return npu_xent.npu_cross_entropy_loss(logits, target)[0]


@pytest.mark.parametrize("name", ["none", "float16", "consumed", "contract", "lse"])
def test_logits_freed_before_a_backward_that_needs_them(name: str, device: torch.device) -> None:
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "none": lambda x, y: npu_xent.cross_entropy(x, y, reduction="none"),
        "float16": npu_xent.cross_entropy,
        "consumed": lambda x, y: npu_xent.cross_entropy(x, y, consume_logits=True),
        "contract": contract,
        "lse": lambda x, y: npu_xent.cross_entropy(x, y, return_lse=True).lse,
    }
    dtype = torch.float16 if name == "float16" else torch.float32
    logits = make_logits(9, 21, dtype, device).requires_grad_() * 1
    loss = losses[name](logits, make_target(9, 21, device)).sum() * 2
    freed(logits)
    with pytest.raises(RuntimeError, match=f"npu_xent: .* with shape .* {WORDS}"):
        loss.backward()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_freed_after_the_loss(
    dtype: torch.dtype, reduction: str, return_lse: bool, device: torch.device
) -> None:
    """As MindSpeed-LLM does: the gradient of a mean or a sum is there already."""
    leaf, target = make_logits(9, 21, dtype, device).requires_grad_(), make_target(9, 21, device)
    npu_xent.cross_entropy(leaf, target, reduction=reduction).backward()
    expected, leaf.grad = leaf.grad, None
    logits = leaf * 1
    out = npu_xent.cross_entropy(logits, target, reduction=reduction, return_lse=return_lse)
    freed(logits)
    (out.loss if return_lse else out).backward()
    assert_same_bits(leaf.grad, expected)


@pytest.mark.cpu
def test_a_large_output_is_resized_like_any_storage(device: torch.device) -> None:
    """Its memory does not come from torch's allocator."""
    logits = torch.zeros(4096, 4096, device=device, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.int64, device=device)
    (grad,) = torch.autograd.grad(npu_xent.cross_entropy(logits, target), logits)
    storage = grad.untyped_storage()
    for size in (0, 100, 64 << 20, 96 << 20, 0):
        storage.resize_(size)
        assert storage.nbytes() == size
        if size:
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(1)
