"""patch_megatron: Megatron's models and callers of its losses get ours, on one and two ranks."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from originals import the_original
from processes import run_ranks
from torch import Tensor
from torch.nn import functional as F

import npu_xent.integrations.megatron as ours
from npu_xent.integrations import _patch
from npu_xent.integrations.megatron import patch_megatron, patch_mindspeed

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    core = the_original(lambda: importlib.import_module("megatron.core"))
    importlib.import_module("megatron.core.models.gpt")

import megatron_ranks  # noqa: E402  imports Megatron

PLAIN, FUSED = (f"megatron.core.{m}" for m in ("tensor_parallel.cross_entropy", "fusions.fused_cross_entropy"))
NAMES = {PLAIN: "vocab_parallel_cross_entropy", FUSED: "fused_vocab_parallel_cross_entropy"}
TAKEN = {  # the modules that hold the functions, of those imported here
    "vocab_parallel_cross_entropy": (PLAIN, "megatron.core.tensor_parallel"),
    "fused_vocab_parallel_cross_entropy": (FUSED, "megatron.core.models.common.language_module.language_module"),
}


def module(name: str) -> types.ModuleType:
    return importlib.import_module(name)


def functions() -> dict[tuple[str, str], object]:
    return {(where, name): getattr(module(where), name) for name, places in TAKEN.items() for where in places}


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids="{} ranks".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(megatron_ranks.__file__, request.param, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("case", megatron_ranks.CASES)
def test_on_ranks(case: str, found: list[dict[str, Any]]) -> None:
    """Right, and the same bits on all ranks and in a second run."""
    for rank, of_rank in enumerate(found):
        assert of_rank[case]["error"] == "", f"rank {rank}: {of_rank[case]['error'][-3000:]}"
    assert len({of_rank[case]["bits"] for of_rank in found}) == 1, "ranks differ"


# This process, without torch.distributed ------------------------------------------------------------------------------


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The calls that reach Megatron's functions."""
    calls = list[tuple[Any, ...]]()

    def plain(vocab_parallel_logits: Any, target: Any, label_smoothing: float = 0.0, tp_group: Any = None) -> str:
        calls.append((vocab_parallel_logits, target, label_smoothing, tp_group))
        return "Megatron's"

    def fused(vocab_parallel_logits: Any, target: Any, tp_group: Any) -> str:
        calls.append((vocab_parallel_logits, target, tp_group))
        return "Megatron's"

    for name, function in zip(TAKEN, (plain, fused), strict=True):
        for where in TAKEN[name]:
            monkeypatch.setattr(module(where), name, function)
    yield calls
    _patch._active.clear()  # of a test that failed half-way


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, 8, generator=generator).to(dtype), torch.randint(8, (5, 2), generator=generator)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_one_rank(dtype: torch.dtype, alpha: float, originals: list[Any]) -> None:
    """Also for logits that Megatron's view() refuses: [b, s, v] transposed."""
    logits, target = rows()
    leaf = logits.transpose(0, 1).contiguous().requires_grad_()
    x = logits.clone().requires_grad_()
    expected = F.cross_entropy(x.movedim(-1, 1), target, reduction="none", label_smoothing=alpha * 8 / 7)
    with patch_megatron():
        loss = module(PLAIN).vocab_parallel_cross_entropy(leaf.transpose(0, 1), target.to(dtype), alpha)
        fused = module(FUSED).fused_vocab_parallel_cross_entropy(leaf.transpose(0, 1), target.to(dtype), None)
    torch.testing.assert_close(loss, expected)
    if alpha == 0:
        torch.testing.assert_close(fused, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad.transpose(0, 1), x.grad)
    assert originals == []


class Subclass(Tensor):
    """Its functions are its own business."""


def with_rows(**changes: Any) -> dict[str, Any]:
    logits, target = rows()
    return {"logits": logits, "target": target, "smoothing": 0.0, "group": None} | changes


LEFT: dict[str, Callable[[], dict[str, Any]]] = {
    "a device": lambda: with_rows(logits=rows()[0].to("meta"), target=rows()[1].to("meta")),
    "two devices": lambda: with_rows(target=rows()[1].to("meta")),
    "integer logits": lambda: with_rows(logits=rows()[0].int()),
    "float8": lambda: with_rows(logits=rows()[0].to(torch.float8_e4m3fn)),
    "a mask as target": lambda: with_rows(target=rows()[1].byte()),
    "floating-point target": lambda: with_rows(target=rows()[1].float()),
    "another shape": lambda: with_rows(target=rows()[1].T),
    "no classes": lambda: with_rows(logits=rows()[0][..., :0]),
    "a subclass": lambda: with_rows(logits=rows()[0].as_subclass(Subclass)),
    "a subclass as target": lambda: with_rows(target=rows()[1].as_subclass(Subclass)),
    "sparse": lambda: with_rows(logits=rows()[0].to_sparse()),
    "no group": lambda: with_rows(group=object()),
    "smoothing of 1": lambda: with_rows(smoothing=1.0),
    "smoothing of all": lambda: with_rows(smoothing=7 / 8),
    "one class": lambda: with_rows(logits=rows()[0][..., :1], smoothing=0.1),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_megatron(name: str, originals: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same arguments, and without any of our work."""
    monkeypatch.setattr(ours, "vocab_parallel_cross_entropy", None)
    case = LEFT[name]()
    logits, target, smoothing, group = case.values()
    with patch_megatron():
        given = {} if group is None else {"tp_group": group}
        assert module(PLAIN).vocab_parallel_cross_entropy(logits, target, smoothing, **given) == "Megatron's"
        assert originals[0][0] is logits
        assert originals[0][1] is target
        assert originals[0][2:] == (smoothing, group)
        if smoothing == 0:
            fused = module(FUSED).fused_vocab_parallel_cross_entropy(logits, target, tp_group=group)
            assert fused == "Megatron's"
            assert originals[1][0] is logits
            assert originals[1][2] is group


def test_transforms_are_left_to_megatron(originals: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "vocab_parallel_cross_entropy", None)
    logits, target = rows()

    def loss(x: Tensor) -> Tensor:
        assert module(PLAIN).vocab_parallel_cross_entropy(x, target) == "Megatron's"
        return x.sum()

    with patch_megatron():
        torch.func.grad(loss)(logits)
        with torch.autograd.forward_ad.dual_level():
            loss(logits)
    assert len(originals) == 2


def test_keywords_of_later_releases_are_left_to_megatron(originals: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def later(vocab_parallel_logits: Any, target: Any, label_smoothing: float = 0.0, later: int = 0) -> int:
        return later

    monkeypatch.setattr(module(PLAIN), NAMES[PLAIN], later)
    with patch_megatron():
        assert module(PLAIN).vocab_parallel_cross_entropy(*rows(), later=3) == 3
        assert isinstance(module(PLAIN).vocab_parallel_cross_entropy(*rows()), Tensor)


# The patch ------------------------------------------------------------------------------------------------------------


def test_remove_restores_every_name() -> None:
    before = functions()
    handle = patch_megatron()
    assert all(now is not then for now, then in zip(functions().values(), before.values(), strict=True))
    handle.remove()
    assert functions() == before


@pytest.mark.parametrize("where", [PLAIN, FUSED])
def test_another_signature_raises(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(vocab_parallel_logits: Any, labels: Any, tp_group: Any) -> None: ...

    before = functions()
    with monkeypatch.context() as patch:
        patch.setattr(module(where), NAMES[where], changed)
        name = rf"megatron {core.__version__} has {where}\.{NAMES[where]}\(vocab_parallel_logits, labels, tp_group\)"
        with pytest.raises(RuntimeError, match=rf"patch_megatron: {name}, but .* tried with megatron 0\.12\.1"):
            patch_megatron()
    assert functions() == before


def test_without_megatron_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(RuntimeError, match="patch_megatron: megatron is not installed"):
        patch_megatron()


# MindSpeed ------------------------------------------------------------------------------------------------------------


class Manager:
    """Registers wrappers and applies them, as MindSpeed's manager does."""

    registered: dict[str, Callable[..., Any]]

    @classmethod
    def register_patch(
        cls, orig_func_name: str, new_func: Any = None, force_patch: bool = False, create_dummy: bool = False
    ) -> None:
        assert new_func.__name__.endswith("wrapper"), "it would replace the function, not wrap it"
        cls.registered[orig_func_name] = new_func

    @classmethod
    def apply_patches(cls) -> None:
        for path, wrapper in cls.registered.items():
            where, _, name = path.rpartition(".")
            original = getattr(module(where), name)
            final = wrapper(original)
            for holder in list(sys.modules.values()):
                if getattr(holder, name, None) is original:
                    setattr(holder, name, final)


def test_mindspeed(originals: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stub of its patch manager."""
    monkeypatch.setattr(Manager, "registered", {}, raising=False)
    for name, holds in {"mindspeed": {}, "mindspeed.patch_utils": {"MindSpeedPatchesManager": Manager}}.items():
        stub = types.ModuleType(name)
        stub.__dict__.update(holds)
        monkeypatch.setitem(sys.modules, name, stub)
    served = list[Any]()
    loss = ours.vocab_parallel_cross_entropy
    counted = functools.wraps(loss)(lambda *args, **keywords: served.append(args) or loss(*args, **keywords))
    monkeypatch.setattr(ours, "vocab_parallel_cross_entropy", counted)
    patch_mindspeed()
    logits, target = rows()
    expected = F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")
    for number, function in enumerate(functions().values(), 1):
        group = (None,) if "fused" in function.__name__ else ()
        torch.testing.assert_close(function(logits, target, *group), expected)
        assert (len(served), originals) == (number, [])
        assert function(logits.int(), target, *group) == "Megatron's"
        originals.clear()


def test_without_mindspeed_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mindspeed", None)
    with pytest.raises(RuntimeError, match=r"patch_mindspeed: mindspeed\.patch_utils is not installed"):
        patch_mindspeed()
