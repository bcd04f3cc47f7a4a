"""patch_torch_npu: who calls the vendor's function gets ours, until the patch is taken back."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from reference import make_logits, make_target

import npu_xent

NAME = "npu_cross_entropy_loss"
CPU = torch.device("cpu")


def is_ours(function: object) -> bool:
    return isinstance(function, functools.partial) and function.func is npu_xent.npu_cross_entropy_loss


def vendors(*arguments: object, **keywords: object) -> str:
    return "the vendor's"


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module of that name with the vendor's function."""
    module = types.ModuleType("torch_npu")
    module.__version__ = "2.13.0"
    setattr(module, NAME, vendors)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(npu_xent._constraints, "_warned", set())
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
        assert is_ours(torch_npu.npu_cross_entropy_loss)
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
    with npu_xent.patch_torch_npu(strict=True), pytest.raises(npu_xent.ConstraintError, match="must be 0"):
        torch_npu.npu_cross_entropy_loss(logits, target, **z_loss)
    with npu_xent.patch_torch_npu(strict=False):
        actual = torch_npu.npu_cross_entropy_loss(logits, target, **z_loss)
    expected = npu_xent.npu_cross_entropy_loss(logits, target, **z_loss, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def said(function: Callable[..., object], *arguments: object, **options: object) -> list[str]:
    """What the call warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **options)
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


LIFTED = {  # restrictions of the vendor's, by calls that break them
    "reduction 'mean', ignore_index must keep its default -100, but it is -1.": {"ignore_index": -1},
    "reduction 'mean', weight must keep its default None, but a tensor was given.": {"weight": torch.full((7,), 0.5)},
    "reduction 'mean', label_smoothing must keep its default 0.0, but it is 0.1.": {"label_smoothing": 0.1},
    "reduction 'sum', label_smoothing must keep its default 0.0": {"label_smoothing": 0.1, "reduction": "sum"},
    "the values of weight must lie in (0, 1], but weight[0] is 2.0.": {
        "weight": torch.full((7,), 2.0),
        "reduction": "sum",
    },
    "ignore_index must be less than C, but it is 9 and C is 7.": {"ignore_index": 9, "reduction": "sum"},
    "return_zloss is documented but not enabled": {"return_zloss": True},
}


@pytest.mark.cpu
@pytest.mark.parametrize("rule", LIFTED)
def test_by_default_a_lifted_restriction_is_said_once(rule: str, torch_npu: types.ModuleType) -> None:
    logits, target = make_logits(5, 7, torch.float32, CPU).requires_grad_(), make_target(5, 7, CPU)
    with npu_xent.patch_torch_npu():
        function = torch_npu.npu_cross_entropy_loss
        [message] = said(function, logits, target, **LIFTED[rule])
        assert rule in message
        assert message.startswith("npu_cross_entropy_loss: ")
        assert message.endswith("(arguments of this function and of npu_xent.patch_torch_npu).")
        assert said(function, logits, target, **LIFTED[rule]) == []
        for actual, expected in zip(
            function(logits, target, **LIFTED[rule]),
            npu_xent.npu_cross_entropy_loss(logits, target, **LIFTED[rule], strict=False),
            strict=True,
        ):
            assert torch.equal(actual, expected)
    with npu_xent.patch_torch_npu(strict=False):
        assert said(torch_npu.npu_cross_entropy_loss, logits, target, **LIFTED[rule]) == []
    with npu_xent.patch_torch_npu(strict=True), pytest.raises(npu_xent.ConstraintError):
        torch_npu.npu_cross_entropy_loss(logits, target, **LIFTED[rule])


@pytest.mark.cpu
def test_by_default_other_rules_still_raise(torch_npu: types.ModuleType) -> None:
    logits, target = make_logits(5, 7, torch.float32, CPU), make_target(5, 7, CPU)
    with npu_xent.patch_torch_npu():
        assert said(torch_npu.npu_cross_entropy_loss, logits, target, reduction="none") == []
        with pytest.raises(npu_xent.ConstraintError, match=r"input must have shape \[N, C\]"):
            torch_npu.npu_cross_entropy_loss(logits[0], target)


@pytest.mark.cpu
def test_each_restriction_is_said_for_itself(torch_npu: types.ModuleType) -> None:
    logits, target = make_logits(5, 7, torch.float32, CPU).requires_grad_(), make_target(5, 7, CPU)
    with npu_xent.patch_torch_npu():
        function = torch_npu.npu_cross_entropy_loss
        assert len(said(function, logits, target, ignore_index=-1)) == 1
        assert len(said(function, logits, target, ignore_index=-1, label_smoothing=0.1)) == 1


@pytest.mark.cpu
def test_a_compiled_call_warns_too(torch_npu: types.ModuleType) -> None:
    torch._dynamo.reset()
    logits, target = make_logits(5, 7, torch.float32, CPU).requires_grad_(), make_target(5, 7, CPU)
    with npu_xent.patch_torch_npu():
        compiled = torch.compile(
            lambda x, y: torch_npu.npu_cross_entropy_loss(x, y, ignore_index=-1)[0], backend="aot_eager", fullgraph=True
        )
        with pytest.warns(UserWarning, match="ignore_index must keep its default -100"):
            loss = compiled(logits, target)
    torch.testing.assert_close(loss, npu_xent.npu_cross_entropy_loss(logits, target, ignore_index=-1, strict=False)[0])


@pytest.mark.cpu
def test_callers_get_a_float32_loss_and_no_log_prob(torch_npu: types.ModuleType) -> None:
    """verl's call: bfloat16 logits, of which it takes differences of log-probabilities."""
    logits, target = make_logits(5, 7, torch.bfloat16, CPU), make_target(5, 7, CPU)
    with npu_xent.patch_torch_npu(loss_dtype=torch.float32, need_log_prob=False):
        loss, log_prob, _, _ = torch_npu.npu_cross_entropy_loss(logits, target, reduction="none")
        assert torch_npu.npu_cross_entropy_loss(logits, target, need_log_prob=True)[1].shape == (5, 7)
    assert loss.dtype == torch.float32
    assert log_prob.shape == (0,)
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    with npu_xent.patch_torch_npu():
        loss, log_prob, _, _ = torch_npu.npu_cross_entropy_loss(logits, target, reduction="none")
    assert loss.dtype == torch.bfloat16
    assert log_prob.shape == (5, 7)


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
        assert refuses_z_loss(torch_npu.npu_cross_entropy_loss) == bool(stricts[left[-1]])
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
        assert is_ours(torch_npu.npu_cross_entropy_loss)
    assert torch_npu.npu_cross_entropy_loss is print


@pytest.mark.cpu
@pytest.mark.parametrize("strict", [True, False, None])
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
        own = {"strict", "loss_dtype", "need_log_prob"}
        assert {n: p.default for n, p in ours.items() if n not in own} == theirs
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
