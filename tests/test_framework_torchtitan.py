"""patch_torchtitan: torchtitan's losses compute their cross entropy with ours, on one and two ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from npu_xent.integrations import _patch
from npu_xent.integrations.torchtitan import patch_torchtitan

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]
titan = pytest.importorskip("torchtitan.components.loss")

import torchtitan_ranks  # noqa: E402  imports torchtitan
from torchtitan_ranks import patched, problem  # noqa: E402

NAME = "cross_entropy_loss"


@pytest.fixture(scope="module", params=[1, 2], ids="{} ranks".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(torchtitan_ranks.__file__, request.param, tmp_path_factory.mktemp("torchtitan"))


@pytest.mark.parametrize("case", torchtitan_ranks.CASES)
def test_on_ranks(case: str, found: list[dict[str, Any]]) -> None:
    """Right, and the same bits on all ranks and in a second run."""
    for rank, of_rank in enumerate(found):
        assert of_rank[case]["error"] == "", f"rank {rank}: {of_rank[case]['error'][-3000:]}"
    assert len({of_rank[case]["bits"] for of_rank in found}) == 1, "ranks differ"


# torchtitan's classes -------------------------------------------------------------------------------------------------


def plain(pred: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    loss, _ = titan.CrossEntropyLoss(titan.CrossEntropyLoss.Config())(pred, labels, valid)
    return loss


def chunked(pred: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The head is the identity, so that pred are the logits."""
    wrapper = titan.ChunkedLossWrapper(titan.ChunkedLossWrapper.Config(num_chunks=2))
    wrapper.set_lm_head(nn.Identity())
    loss, _ = wrapper(pred, labels, valid)
    return loss


def compiled(pred: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    torch._dynamo.reset()
    loss: Tensor = torch.compile(titan.cross_entropy_loss, backend="aot_eager", fullgraph=True)(pred, labels)
    return loss / valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("loss", "calls"), [(plain, 1), (chunked, 2), (compiled, 1)])
def test_losses(loss: Callable[..., Tensor], calls: int, dtype: torch.dtype) -> None:
    logits, labels = problem(dtype)
    valid = (labels >= 0).sum()

    def step() -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        found = loss(leaf, labels, valid)
        found.backward()
        assert leaf.grad is not None
        return found.detach(), leaf.grad

    theirs = step()
    with patched() as served:
        mine = step()
    assert served == ["whole"] * calls
    expected = tuple(x / valid for x in torchtitan_ranks.truth(logits, labels))
    torchtitan_ranks.compare(theirs, mine, expected, dtype)


def test_float64_logits() -> None:
    """The loss is float32, as torchtitan's; the gradient is float64."""
    logits, labels = problem(torch.float64)
    leaf = logits.requires_grad_()
    with patched() as served:
        loss = titan.cross_entropy_loss(leaf, labels)
    loss.backward()
    expected, gradient = torchtitan_ranks.truth(logits.detach(), labels)
    assert (served, loss.dtype) == (["whole"], torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-12)


def test_differences() -> None:
    """Those of the docstring: NaN in ignored rows, labels out of range."""
    logits, labels = problem()
    expected = titan.cross_entropy_loss(logits, labels)
    logits[labels == -100] = float("nan")
    with patch_torchtitan():
        torch.testing.assert_close(titan.cross_entropy_loss(logits, labels), expected)
        labels[1, 1] = 25
        with pytest.raises(IndexError):
            titan.cross_entropy_loss(logits, labels)


# What is left to torchtitan -------------------------------------------------------------------------------------------


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The calls that reach torchtitan's function."""
    calls = list[tuple[Any, ...]]()

    def theirs(pred: Any, labels: Any, *, global_vocab_size: Any = None) -> str:
        calls.append((pred, labels, global_vocab_size))
        return "torchtitan's"

    monkeypatch.setattr(titan, NAME, theirs)
    yield calls
    _patch._active.clear()  # of a test that failed half-way


LEFT: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "a device": lambda x, y: (x.to("meta"), y.to("meta")),
    "integer logits": lambda x, y: (x.int(), y),
    "int32 labels": lambda x, y: (x, y.int()),
    "class probabilities": lambda x, y: (x, x),
    "rows": lambda x, y: (x[0], y[0]),
    "another shape": lambda x, y: (x, y.T),
    "four dimensions": lambda x, y: (x.unsqueeze(0), y.unsqueeze(0)),
    "a subclass": lambda x, y: (x.as_subclass(type("Subclass", (Tensor,), {})), y),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torchtitan(name: str, originals: list[Any]) -> None:
    pred, labels = LEFT[name](*problem())
    with patched() as served:
        assert titan.cross_entropy_loss(pred, labels, global_vocab_size=9) == "torchtitan's"
    assert served == []
    assert originals[0][0] is pred
    assert originals[0][1] is labels
    assert originals[0][2] == 9


def test_checks_of_types_and_transforms_are_left_to_torchtitan(
    originals: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = problem()
    with patched() as served:
        torch.func.grad(lambda x: x.sum() if titan.cross_entropy_loss(x, labels) else None)(logits)
        monkeypatch.setattr(sys.modules["spmd_types"], "is_type_checking", lambda: True)
        assert titan.cross_entropy_loss(logits, labels) == "torchtitan's"
    assert (served, len(originals)) == ([], 2)


# The patch ------------------------------------------------------------------------------------------------------------


def test_remove_restores_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    user = type(titan)("torchtitan.user")  # as torchtitan.models.deepseek_v3.mtp, which imports the function
    user.cross_entropy_loss = before = titan.cross_entropy_loss
    monkeypatch.setitem(sys.modules, "torchtitan.user", user)
    handle = patch_torchtitan()
    assert titan.cross_entropy_loss is user.cross_entropy_loss is not before
    assert titan.CrossEntropyLoss(titan.CrossEntropyLoss.Config()).fn is titan.cross_entropy_loss
    handle.remove()
    assert titan.cross_entropy_loss is user.cross_entropy_loss is before


def test_another_signature_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torchtitan 0.2."""

    def older(pred: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(pred, labels)

    monkeypatch.setattr(titan, NAME, older)
    words = (
        r"patch_torchtitan: torchtitan \S+ has torchtitan\.components\.loss\.cross_entropy_loss\(pred, labels\), but"
    )
    with pytest.raises(RuntimeError, match=words + r" .* tried with torchtitan 0\.3\.0"):
        patch_torchtitan()
    assert titan.cross_entropy_loss is older


def test_without_torchtitan_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(RuntimeError, match="patch_torchtitan: torchtitan is not installed"):
        patch_torchtitan()
