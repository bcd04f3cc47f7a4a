"""FrameworkPatch: a framework's function is replaced wherever the framework has a name for it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_xent.integrations._patch import FrameworkPatch, Replacement

pytestmark = pytest.mark.cpu
VERSION = "1.2.3"


def theirs(a: int, b: int = 0, *, c: int = 0) -> str:
    return "theirs"


def module(name: str, **names: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(names)
    sys.modules[name] = made
    return made


@pytest.fixture
def package() -> Iterator[types.SimpleNamespace]:
    """A package of a function, a module that imported it, and another package that did."""
    made = types.SimpleNamespace(
        root=module("toy_framework", __version__=VERSION),
        utils=module("toy_framework.utils", loss=theirs),
        trainer=module("toy_framework.trainer", loss=theirs, other=theirs),
        outside=module("toy_frameworks_user", loss=theirs),
    )
    yield made
    for name in [n for n in sys.modules if n.startswith("toy_framework")]:
        del sys.modules[name]


def ours(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def loss(*args: Any, **kw: Any) -> str:
        return "ours, of " + original(*args, **kw)

    return loss


def patch(*parameters: str, name: str = "loss", module: str = "toy_framework.utils") -> FrameworkPatch:
    replacement = Replacement(module, name, parameters, ours)
    return FrameworkPatch("patch_toy", "toy_framework", "1.2", [replacement])


def test_names_in_the_packages_modules_are_replaced_and_restored(package: types.SimpleNamespace) -> None:
    handle = patch("a", "b", "c")
    assert package.utils.loss(1) == package.trainer.loss(1) == "ours, of theirs"
    assert package.trainer.other(1) == package.outside.loss(1) == "theirs"
    late = module("toy_framework.late", loss=package.utils.loss)
    handle.remove()
    handle.remove()
    assert package.utils.loss is package.trainer.loss is late.loss is theirs


def test_patches_nest(package: types.SimpleNamespace) -> None:
    first = patch("a", "b", "c")
    with patch("a", "b", "c"):
        assert package.trainer.loss(1) == "ours, of ours, of theirs"
    assert package.trainer.loss(1) == "ours, of theirs"
    first.remove()
    assert package.trainer.loss is theirs


@pytest.mark.parametrize("late_before_second", [False, True])
def test_modules_imported_between_patches_are_restored(
    package: types.SimpleNamespace, late_before_second: bool
) -> None:
    """In whatever order the patches are removed."""
    first = patch("a", "b", "c")
    late = module("toy_framework.late", loss=package.utils.loss) if late_before_second else None
    second = patch("a", "b", "c")
    late = late or module("toy_framework.late", loss=package.utils.loss)
    first.remove()
    second.remove()
    assert package.utils.loss is package.trainer.loss is late.loss is theirs


def test_more_parameters_with_defaults_are_accepted(package: types.SimpleNamespace) -> None:
    with patch("a"):
        assert package.utils.loss(1) == "ours, of theirs"


@pytest.mark.parametrize(
    ("parameters", "name", "where", "message"),
    [
        (("a", "x"), "loss", "toy_framework.utils", r"1\.2\.3 has toy_framework\.utils\.loss\(a, b, c\), but .*1\.2\."),
        ((), "loss", "toy_framework.utils", r"has toy_framework\.utils\.loss\(a, b, c\)"),
        (("a",), "gone", "toy_framework.utils", r"has no toy_framework\.utils\.gone"),
        (("a",), "loss", "toy_framework.gone", r"has no toy_framework\.gone\.loss"),
    ],
)
def test_another_signature_raises_before_anything_is_replaced(
    package: types.SimpleNamespace, parameters: tuple[str, ...], name: str, where: str, message: str
) -> None:
    good = Replacement("toy_framework.trainer", "other", ("a", "b", "c"), ours)
    bad = Replacement(where, name, parameters, ours)
    with pytest.raises(RuntimeError, match=message):
        FrameworkPatch("patch_toy", "toy_framework", "1.2", [good, bad])
    assert package.trainer.other is theirs


class Function(torch.autograd.Function):
    """A function of a framework."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: int = 0) -> Tensor:
        return a


@pytest.mark.parametrize("found", [Function, Function.apply], ids=["class", "apply"])
def test_an_autograd_function_has_the_parameters_of_its_forward(package: types.SimpleNamespace, found: object) -> None:
    package.utils.loss = found
    with patch("ctx", "a", "b"), patch("ctx", "a", "b"):
        assert package.utils.loss is not found
    assert package.utils.loss is found
    with pytest.raises(RuntimeError, match=r"has toy_framework\.utils\.loss\(ctx, a, b\)"):
        patch("a", "b")


def test_a_package_that_is_not_installed_raises() -> None:
    with pytest.raises(RuntimeError, match="toy_framework is not installed"):
        patch("a")
