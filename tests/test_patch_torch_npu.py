"""patch_torch_npu: who calls the vendor's function gets ours, until the patch is taken back."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from reference import make_logits, make_target

import npu_xent

NAME = "npu_cross_entropy_loss"
CPU = torch.device("cpu")


def vendors(*arguments: object, **keywords: object) -> str:
    return "the vendor's"


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module of that name with the vendor's function."""
    module = types.ModuleType("torch_npu")
    module.__version__ = "2.13.0"
    setattr(module, NAME, vendors)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    yield module
    npu_xent.integrations._patch._active.clear()  # of a test that failed half-way


@pytest.mark.cpu
def test_callers_get_ours_until_it_is_removed(torch_npu: types.ModuleType) -> None:
    logits, target = make_logits(5, 7, torch.float32, CPU), make_target(5, 7, CPU)
    handle = npu_xent.patch_torch_npu()
    for actual, expected in zip(
        torch_npu.npu_cross_entropy_loss(logits, target),
        npu_xent.npu_cross_entropy_loss(logits, target),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    handle.remove()
    assert torch_npu.npu_cross_entropy_loss is vendors
    handle.remove()
    assert torch_npu.npu_cross_entropy_loss is vendors


@pytest.mark.cpu
def test_as_a_context_manager(torch_npu: types.ModuleType) -> None:
    with npu_xent.patch_torch_npu() as handle:
        assert torch_npu.npu_cross_entropy_loss is npu_xent.npu_cross_entropy_loss
    assert torch_npu.npu_cross_entropy_loss is vendors
    with pytest.raises(KeyError), npu_xent.patch_torch_npu():
        raise KeyError
    assert torch_npu.npu_cross_entropy_loss is vendors
    with handle:  # removed already: nothing comes back
        assert torch_npu.npu_cross_entropy_loss is vendors


@pytest.mark.cpu
def test_strict_is_a_choice(torch_npu: types.ModuleType) -> None:
    logits, target = make_logits(5, 7, torch.float32, CPU), make_target(5, 7, CPU)
    z_loss = {"lse_square_scale_for_zloss": 0.1, "return_zloss": True}
    with npu_xent.patch_torch_npu(), pytest.raises(npu_xent.ConstraintError, match="must be 0"):
        torch_npu.npu_cross_entropy_loss(logits, target, **z_loss)
    with npu_xent.patch_torch_npu(strict=False):
        actual = torch_npu.npu_cross_entropy_loss(logits, target, **z_loss)
    expected = npu_xent.npu_cross_entropy_loss(logits, target, **z_loss, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def refuses_z_loss(function: Callable[..., object]) -> bool:
    """Which of the two replacements it is."""
    try:
        function(make_logits(5, 7, torch.float32, CPU), make_target(5, 7, CPU), return_zloss=True)
    except npu_xent.ConstraintError:
        return True
    return False


@pytest.mark.cpu
@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2), (1, 2, 0), (0, 2, 1)])
def test_the_latest_that_is_not_removed_decides(order: tuple[int, ...], torch_npu: types.ModuleType) -> None:
    stricts = [True, False, True]
    handles = [npu_xent.patch_torch_npu(strict=strict) for strict in stricts]
    left = [0, 1, 2]
    for index in order:
        assert refuses_z_loss(torch_npu.npu_cross_entropy_loss) == stricts[left[-1]]
        handles[index].remove()
        left.remove(index)
    assert torch_npu.npu_cross_entropy_loss is vendors


@pytest.mark.cpu
def test_anothers_function_stays(torch_npu: types.ModuleType) -> None:
    handle = npu_xent.patch_torch_npu()
    torch_npu.npu_cross_entropy_loss = print
    handle.remove()
    assert torch_npu.npu_cross_entropy_loss is print
    with npu_xent.patch_torch_npu():
        assert torch_npu.npu_cross_entropy_loss is npu_xent.npu_cross_entropy_loss
    assert torch_npu.npu_cross_entropy_loss is print


@pytest.mark.cpu
@pytest.mark.parametrize("strict", [True, False])
def test_compiles_in_one_graph(strict: bool, torch_npu: types.ModuleType) -> None:
    torch._dynamo.reset()
    logits, target = make_logits(5, 7, torch.float32, CPU), make_target(5, 7, CPU)
    with npu_xent.patch_torch_npu(strict=strict):
        compiled = torch.compile(
            lambda x, y: torch_npu.npu_cross_entropy_loss(x, y)[0], backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(compiled(logits, target), npu_xent.npu_cross_entropy_loss(logits, target)[0])


@pytest.mark.cpu
def test_errors_say_what_is_missing(torch_npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    delattr(torch_npu, NAME)
    with pytest.raises(RuntimeError, match=r"torch_npu 2\.13\.0 has no npu_cross_entropy_loss to replace; call"):
        npu_xent.patch_torch_npu()
    monkeypatch.delitem(sys.modules, "torch_npu")
    for spec, message in ((None, "torch_npu is not installed"), (object(), "not imported yet; import torch_npu first")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(RuntimeError, match=message):
            npu_xent.patch_torch_npu()


@pytest.mark.npu
class TestTheRealOne:
    """The module that the vendor ships."""

    @pytest.fixture
    def real(self) -> types.ModuleType:
        return importlib.import_module("torch_npu")

    def test_the_signature_is_the_vendors(self, real: types.ModuleType) -> None:
        schema = getattr(real, NAME).default._schema
        ours = inspect.signature(npu_xent.npu_cross_entropy_loss).parameters
        theirs = {
            a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty for a in schema.arguments
        }
        assert {n: p.default for n, p in ours.items() if n != "strict"} == theirs
        assert list(ours)[: len(theirs)] == list(theirs)
        assert len(schema.returns) == 4

    def test_its_function_is_replaced_and_comes_back(self, real: types.ModuleType, device: torch.device) -> None:
        before = real.npu_cross_entropy_loss
        logits, target = make_logits(5, 7, torch.float32, device), make_target(5, 7, device)
        with npu_xent.patch_torch_npu():
            actual = real.npu_cross_entropy_loss(logits, target)
        expected = npu_xent.npu_cross_entropy_loss(logits.cpu(), target.cpu())
        for ours, cpus in zip(actual, expected, strict=True):
            assert ours.device.type == "npu"
            torch.testing.assert_close(ours.cpu(), cpus)
        assert real.npu_cross_entropy_loss is before
        assert torch.ops.npu.npu_cross_entropy_loss is before


UNIMPORTED = """
import npu_xent
try:
    npu_xent.patch_torch_npu()
except RuntimeError:
    import sys
    assert "torch_npu" not in sys.modules
else:
    raise SystemExit("nothing to patch, but no error")
"""


@pytest.mark.cpu
def test_does_not_import_torch_npu() -> None:
    subprocess.run([sys.executable, "-c", UNIMPORTED], check=True)
