"""Loading the NPU kernels at the right moment, and what is said, once, when they cannot be loaded.

What the kernels need is played by stand-ins: torch_npu, the module that registers them, and tensors that say they are
on an npu while their memory is the host's.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import npu_xent
from npu_xent import _build, _loading
from npu_xent.compat import mindformers, nnsight, unit_scaling

pytestmark = pytest.mark.cpu

INSTALL = "in a checkout of npu_xent, pip install --no-build-isolation --no-deps --force-reinstall ."
PREFIX = "npu_xent's NPU kernels are not in use: "
NOT_BUILT = (
    PREFIX + "it was built without its NPU part. With torch_npu installed, source CANN's set_env.sh, which sets "
    f"ASCEND_HOME_PATH, and rebuild it: {INSTALL.replace('pip', 'NPU_XENT_BUILD_NPU=1 pip')}"
)
REQUIRED = " NPU_XENT_REQUIRE_KERNELS is set, which makes this an error."
UNTIL_THEN = (
    " Until then npu tensors are served by PyTorch operations: the same results up to rounding, but more time and "
    "memory."
)


class OnNpu(torch.Tensor):
    """A tensor of the host that says it is on an npu."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cpu = False
    device = torch.device("privateuseone", 0)  # which an npu is called before torch_npu is imported


def on_npu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnNpu)


LOGITS = torch.randn(4, 7)
TARGET = torch.tensor([0, 3, 6, 1])
CALLS = {
    "cross_entropy": lambda x: npu_xent.cross_entropy(x, TARGET),
    "CrossEntropyLoss": lambda x: npu_xent.CrossEntropyLoss()(x, TARGET),
    "npu_cross_entropy_loss": lambda x: npu_xent.npu_cross_entropy_loss(x, TARGET),
    "unit_scaling": lambda x: unit_scaling.cross_entropy(x, TARGET),
    "mindformers": lambda x: mindformers.CrossEntropyLoss()(x, TARGET, torch.ones(4)),
}


class Npu:
    """torch_npu 2.13.0 with an Ascend910B3, and a module that records what it was told to load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.loaded: list[str] = []  # by the module, in order
        self.opened: list[str] = []  # by ctypes, for their symbols
        self.error: Exception | None = None  # what loading the kernels raises
        self.soc = "Ascend910B3"
        self.devices = 1
        self.initialised = False
        self.torch_npu = types.ModuleType("torch_npu")
        self.torch_npu.__version__ = "2.13.0+git1"
        self.capturing = False
        self.torch_npu.npu = types.SimpleNamespace(
            device_count=lambda: self.devices,
            get_device_name=lambda: self.soc,
            is_initialized=lambda: self.initialised,
            is_current_stream_capturing=lambda: self.capturing,
        )
        module = types.ModuleType("npu_xent._npu")
        module.load = self.load
        monkeypatch.setitem(sys.modules, "torch_npu", self.torch_npu)
        monkeypatch.setitem(sys.modules, "npu_xent._npu", module)
        self.open_really = ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", self.open)
        self.is_called("privateuseone")
        self.built(TORCH_NPU_VERSION="2.13.0", CANN_VERSION="8.5.0", SOC_VERSIONS=("Ascend910B3",))

    def is_called(self, device: str) -> None:
        self.monkeypatch.setattr(_loading, "_DEVICE", device)

    def open(self, path: str, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL | None:
        """One of the toolkit's own libraries: not all releases have all of them. Others are torch's."""
        if mode != ctypes.RTLD_GLOBAL:
            return self.open_really(path, mode)
        self.opened.append(path)
        if path != "libascendcl.so":
            raise OSError(f"{path}: cannot open shared object file")
        return None

    def load(self, path: str) -> None:
        assert "libascendcl.so" in self.opened
        if self.error is not None:
            raise self.error
        self.loaded.append(path)

    def built(self, **values: object) -> None:
        for name, value in values.items():
            self.monkeypatch.setattr(_build, name, value, raising=False)


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Npu:
    return Npu(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("NPU_XENT_REQUIRE_KERNELS", raising=False)
    monkeypatch.setattr(_loading, "_loaded", False)
    monkeypatch.setattr(_loading, "_settled", False)
    monkeypatch.setattr(_loading, "_warned_of_capture", False)
    yield
    torch._dynamo.reset()


def said(call, *arguments: object) -> list[str]:
    """What the call warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    return [str(warning.message) for warning in caught]


def library(soc: str) -> str:
    return str(_loading._FOLDER / "kernels" / soc / "libnpu_xent_kernels.so")


@pytest.mark.parametrize("name", CALLS)
def test_the_first_npu_tensor_loads_the_kernels(name: str, npu: Npu) -> None:
    CALLS[name](LOGITS)
    assert npu.opened == []  # none yet
    assert said(CALLS[name], on_npu(LOGITS)) == []
    assert said(CALLS[name], on_npu(LOGITS)) == []
    assert npu.loaded == [library("Ascend910B3")]


def test_nnsights_loss_loads_the_kernels(npu: Npu) -> None:
    """Whose target follows the logits to their device: a true one, which here is meta."""
    npu.is_called("meta")
    with pytest.raises(RuntimeError):  # later on: nothing comes back from there
        nnsight.cross_entropy_loss(LOGITS.to("meta"), TARGET)
    assert npu.loaded == [library("Ascend910B3")]


def test_importing_loads_the_kernels_of_a_device_at_work(npu: Npu) -> None:
    _loading.load_operators()
    assert npu.loaded == []  # the device is not initialised for that: which one is the program's choice
    npu.initialised = True
    _loading.load_operators()
    assert npu.loaded == [library("Ascend910B3")]


def test_importing_says_nothing_of_what_is_missing(npu: Npu) -> None:
    npu.initialised, npu.soc = True, "Ascend310P3"
    assert said(_loading.load_operators) == []
    assert len(said(CALLS["cross_entropy"], on_npu(LOGITS))) == 1


def test_a_torch_npu_that_is_being_imported_is_left_alone(npu: Npu) -> None:
    del npu.torch_npu.npu
    _loading.load_operators()
    assert npu.loaded == []


def missing_torch_npu(npu: Npu) -> None:
    npu.monkeypatch.delitem(sys.modules, "torch_npu")


def old_build_record(npu: Npu) -> None:
    for name in ("TORCH_NPU_VERSION", "CANN_VERSION", "SOC_VERSIONS"):
        npu.monkeypatch.delattr(_build, name)


MISSING = {
    "not built": (lambda npu: npu.built(TORCH_NPU_VERSION=None, CANN_VERSION=None, SOC_VERSIONS=()), NOT_BUILT),
    "an old build": (old_build_record, NOT_BUILT),
    "no torch_npu": (
        missing_torch_npu,
        PREFIX + "torch_npu, whose device they run on, is not imported. Import torch_npu first.",
    ),
    "another torch_npu": (
        lambda npu: npu.built(TORCH_NPU_VERSION="2.12.0.post1"),
        PREFIX + "it was built against torch_npu 2.12.0.post1, but torch_npu 2.13.0+git1 is running. Rebuild it: "
        f"{INSTALL} (or install torch_npu==2.12.0.post1).",
    ),
    "no device": (
        lambda npu: setattr(npu, "devices", 0),
        PREFIX + "torch_npu sees no NPU. Look at what npu-smi info and ASCEND_RT_VISIBLE_DEVICES say.",
    ),
    "another SoC": (
        lambda npu: setattr(npu, "soc", "Ascend310P3") or npu.built(SOC_VERSIONS=("Ascend910B1", "Ascend910_9391")),
        PREFIX + "they were built for Ascend910B1, Ascend910_9391, but this device is Ascend310P3. They are "
        "written for Atlas A2 and A3 alone: Ascend910B1, Ascend910B2, Ascend910B2C, Ascend910B3, Ascend910B4, "
        "Ascend910B4-1, Ascend910_9362, Ascend910_9372, Ascend910_9381, Ascend910_9382, Ascend910_9391, "
        "Ascend910_9392.",
    ),
    "a library": (
        lambda npu: setattr(npu, "error", OSError("libascendcl.so: cannot open shared object file")),
        PREFIX + "a library of theirs cannot be loaded (libascendcl.so: cannot open shared object file). Source CANN's "
        f"set_env.sh before starting Python; they were built with CANN 8.5.0, and {INSTALL} builds them for another.",
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_once(name: str, npu: Npu) -> None:
    break_it, message = MISSING[name]
    break_it(npu)
    expected = npu_xent.cross_entropy(LOGITS, TARGET)
    assert said(CALLS["cross_entropy"], on_npu(LOGITS)) == [message + UNTIL_THEN]
    assert said(CALLS["cross_entropy"], on_npu(LOGITS)) == []
    assert said(CALLS["unit_scaling"], on_npu(LOGITS)) == []
    torch.testing.assert_close(npu_xent.cross_entropy(on_npu(LOGITS), TARGET).as_subclass(torch.Tensor), expected)
    assert npu.loaded == []  # otherwise kernels that cannot run would stand in the composite's place


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_raises_at_every_call_if_the_kernels_are_required(name: str, npu: Npu) -> None:
    break_it, message = MISSING[name]
    break_it(npu)
    npu.monkeypatch.setenv("NPU_XENT_REQUIRE_KERNELS", "1")
    for call in ("cross_entropy", "cross_entropy", "CrossEntropyLoss", "npu_cross_entropy_loss", "unit_scaling"):
        with pytest.raises(RuntimeError) as raised:
            CALLS[call](on_npu(LOGITS))
        assert str(raised.value) == message + REQUIRED
    CALLS["cross_entropy"](LOGITS)  # of the CPU, as ever


def test_requiring_the_kernels_later_is_not_too_late(npu: Npu) -> None:
    npu.devices = 0
    assert len(said(CALLS["cross_entropy"], on_npu(LOGITS))) == 1
    npu.monkeypatch.setenv("NPU_XENT_REQUIRE_KERNELS", "1")
    with pytest.raises(RuntimeError, match="sees no NPU"):
        CALLS["cross_entropy"](on_npu(LOGITS))
    npu.devices = 1
    assert said(CALLS["cross_entropy"], on_npu(LOGITS)) == []
    assert npu.loaded == [library("Ascend910B3")]


@pytest.mark.parametrize("value", ["", "0"])
def test_kernels_are_not_required(value: str, npu: Npu) -> None:
    npu.devices = 0
    npu.monkeypatch.setenv("NPU_XENT_REQUIRE_KERNELS", value)
    assert len(said(CALLS["cross_entropy"], on_npu(LOGITS))) == 1


@pytest.mark.parametrize("name", MISSING)
def test_load_npu_raises_for_what_is_missing(name: str, npu: Npu) -> None:
    break_it, message = MISSING[name]
    break_it(npu)
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            npu_xent.load_npu()
        assert str(raised.value) == message


def test_load_npu_loads_once(npu: Npu) -> None:
    npu_xent.load_npu()
    npu_xent.load_npu()
    CALLS["cross_entropy"](on_npu(LOGITS))
    assert npu.loaded == [library("Ascend910B3")]


def test_load_npu_serves_when_what_was_missing_is_there(npu: Npu) -> None:
    npu.error = OSError("gone")
    assert len(said(CALLS["cross_entropy"], on_npu(LOGITS))) == 1
    npu.error = None
    npu_xent.load_npu()
    assert npu.loaded == [library("Ascend910B3")]


@pytest.mark.parametrize(
    "built, running",
    [
        ("2.10.0.post2", "2.10.0.post4"),
        ("2.10.0", "2.10.0.post4"),
        ("2.10.0.post2+gitabc", "2.10.0"),
        ("2.10.0.post4", "2.10.0.post4+git1"),
    ],
)
def test_post_releases_of_torch_npu_are_one_release(built: str, running: str, npu: Npu) -> None:
    npu.built(TORCH_NPU_VERSION=built)
    npu.torch_npu.__version__ = running
    npu_xent.load_npu()
    assert npu.loaded == [library("Ascend910B3")]


@pytest.mark.parametrize("built, running", [("2.10.0.post2", "2.10.1.post2"), ("2.10.0rc1", "2.10.0")])
def test_other_releases_of_torch_npu_are_refused(built: str, running: str, npu: Npu) -> None:
    npu.built(TORCH_NPU_VERSION=built)
    npu.torch_npu.__version__ = running
    with pytest.raises(RuntimeError, match=rf"built against torch_npu {built}, but torch_npu {running} is running\."):
        npu_xent.load_npu()


CAPTURE = (
    PREFIX + "the first npu tensor came while a graph was being captured, when they cannot be loaded. Call "
    "npu_xent.load_npu() before the capture."
)


@pytest.mark.parametrize("name", CALLS)
def test_a_first_tensor_in_a_capture_is_said_once_and_settles_nothing(name: str, npu: Npu) -> None:
    npu.capturing = True
    expected = CAPTURE + (
        " PyTorch operations are captured instead: the same results up to rounding, but more time and memory at every "
        "replay. Calls after the capture use the kernels."
    )
    assert said(CALLS[name], on_npu(LOGITS)) == [expected]
    assert said(CALLS[name], on_npu(LOGITS)) == []
    assert npu.loaded == []
    npu.capturing = False
    assert said(CALLS[name], on_npu(LOGITS)) == []
    assert npu.loaded == [library("Ascend910B3")]
    npu.capturing = True  # the next capture has them
    assert said(CALLS[name], on_npu(LOGITS)) == []


def test_after_a_capture_what_is_missing_is_still_said(npu: Npu) -> None:
    npu.capturing = True
    assert len(said(CALLS["cross_entropy"], on_npu(LOGITS))) == 1
    npu.capturing, npu.devices = False, 0
    assert "sees no NPU" in said(CALLS["cross_entropy"], on_npu(LOGITS))[0]


def test_a_first_tensor_in_a_capture_raises_if_the_kernels_are_required(npu: Npu) -> None:
    npu.capturing = True
    npu.monkeypatch.setenv("NPU_XENT_REQUIRE_KERNELS", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            CALLS["cross_entropy"](on_npu(LOGITS))
        assert str(raised.value) == CAPTURE + REQUIRED


def test_loading_before_a_capture_serves_it(npu: Npu) -> None:
    npu_xent.load_npu()
    npu.capturing = True
    assert said(CALLS["cross_entropy"], on_npu(LOGITS)) == []
    assert npu.loaded == [library("Ascend910B3")]


def test_a_torch_npu_without_graphs_loads_as_ever(npu: Npu) -> None:
    del npu.torch_npu.npu.is_current_stream_capturing
    assert said(CALLS["cross_entropy"], on_npu(LOGITS)) == []
    assert npu.loaded == [library("Ascend910B3")]


@pytest.mark.parametrize("message", ["sees no NPU", "a graph was being captured"])
def test_the_warning_is_at_the_line_of_the_caller(message: str, npu: Npu) -> None:
    npu.devices, npu.capturing = 0, "captured" in message
    with pytest.warns(UserWarning, match=message) as caught:
        npu_xent.cross_entropy(on_npu(LOGITS), TARGET)
    assert caught[0].filename == __file__


def test_threads_load_once_and_wait_for_it(npu: Npu) -> None:
    started, done = threading.Barrier(8), []

    def slow(path: str) -> None:
        threading.Event().wait(0.1)
        npu.loaded.append(path)

    npu.monkeypatch.setattr(sys.modules["npu_xent._npu"], "load", slow)

    def run() -> None:
        started.wait()
        _loading.prepare(on_npu(LOGITS))
        done.append(len(npu.loaded))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert npu.loaded == [library("Ascend910B3")]
    assert done == [1] * 8  # nobody went on before


def test_threads_warn_once(npu: Npu) -> None:
    started, messages = threading.Barrier(8), []

    def slow() -> int:  # so that all are on their way before the first has warned
        threading.Event().wait(0.02)
        return 0

    npu.torch_npu.npu.device_count = slow
    npu.monkeypatch.setattr(warnings, "warn", lambda message, **_: messages.append(message))

    def run() -> None:
        started.wait()
        _loading.prepare(on_npu(LOGITS))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages) == 1


@pytest.mark.parametrize(
    "running, built, chosen",
    [
        ("Ascend910B3", ("Ascend910B1", "Ascend910B3"), "Ascend910B3"),
        ("ascend910b3", ("Ascend910B1", "Ascend910B3"), "Ascend910B3"),
        ("Ascend910B2C", ("Ascend910B1", "Ascend910_9391"), "Ascend910B1"),
        ("Ascend910_9382", ("Ascend910B4",), "Ascend910B4"),
    ],
)
def test_kernels_of_this_soc_or_of_its_architecture(
    running: str, built: tuple[str, ...], chosen: str, npu: Npu
) -> None:
    npu.soc = running
    npu.built(SOC_VERSIONS=built)
    npu_xent.load_npu()
    assert npu.loaded == [library(chosen)]


@pytest.mark.parametrize("running", ["Ascend310P3", "Ascend910A", "Ascend910ProB", "Ascend910_9599", "Ascend950PR"])
def test_no_kernels_of_another_architecture(running: str, npu: Npu) -> None:
    npu.soc = running
    npu.built(SOC_VERSIONS=("Ascend910B1", "Ascend910_9391"))
    with pytest.raises(RuntimeError, match=f"built for Ascend910B1, Ascend910_9391, but this device is {running}"):
        npu_xent.load_npu()


@pytest.mark.parametrize("name", ["cross_entropy", "npu_cross_entropy_loss", "CrossEntropyLoss"])
def test_compiling_loads_the_kernels_beforehand(name: str, npu: Npu) -> None:
    """In one graph, which does not check again. The device is meta, for dynamo wants a true one."""
    npu.is_called("meta")
    npu.monkeypatch.setattr(sys.modules[__name__], "TARGET", TARGET.to("meta"))
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], backend=frames, fullgraph=True)
    logits = LOGITS.to("meta")
    compiled(logits)
    assert npu.loaded == [library("Ascend910B3")]
    compiled(logits)
    compiled(logits + 1)
    assert frames.frame_count == 1


def test_compiling_warns_of_what_is_missing(npu: Npu) -> None:
    npu.is_called("meta")
    npu.devices = 0
    compiled = torch.compile(lambda x: npu_xent.cross_entropy(x, TARGET.to("meta")), backend="eager", fullgraph=True)
    assert sum("sees no NPU" in message for message in said(compiled, LOGITS.to("meta"))) == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiling_raises_for_what_is_missing_if_the_kernels_are_required(fullgraph: bool, npu: Npu) -> None:
    """At every call, and the function compiles once nothing is missing any more."""
    npu.is_called("meta")
    npu.devices = 0
    npu.monkeypatch.setenv("NPU_XENT_REQUIRE_KERNELS", "1")
    frames = CompileCounterWithBackend("eager")
    target = TARGET.to("meta")
    compiled = torch.compile(lambda x: npu_xent.cross_entropy(x, target), backend=frames, fullgraph=fullgraph)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"sees no NPU.*NPU_XENT_REQUIRE_KERNELS"):
            compiled(LOGITS.to("meta"))
    assert frames.frame_count == 0
    npu.devices = 1
    compiled(LOGITS.to("meta"))
    assert npu.loaded == [library("Ascend910B3")]


def test_export_loads_the_kernels_beforehand(npu: Npu) -> None:
    npu.is_called("meta")

    class Loss(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return npu_xent.cross_entropy(x, y)

    exported = torch.export.export(Loss(), (LOGITS.to("meta"), TARGET.to("meta")), strict=True)
    assert npu.loaded == [library("Ascend910B3")]
    assert "prepare" not in exported.graph_module.code


FAKE_TENSORS = """
import sys, warnings
warnings.simplefilter("error")
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
import npu_xent

torch.utils.rename_privateuse1_backend("npu")
device = torch.device("npu", 0)
logits, target = torch.empty(4, 7, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
with FakeTensorMode(allow_non_fake_inputs=True) as mode:
    x, y = FakeTensor(mode, logits, device), FakeTensor(mode, target, device)
    loss = npu_xent.cross_entropy(x, y)
    assert loss.device == device and loss.shape == ()
assert "torch_npu" not in sys.modules
"""


def test_fake_tensors_of_an_npu_need_nothing() -> None:
    subprocess.run([sys.executable, "-c", FAKE_TENSORS], check=True)


def test_fake_tensors_load_the_kernels_of_a_device_at_work(npu: Npu) -> None:
    npu.is_called("meta")
    with FakeTensorMode():
        fake = torch.empty(4, 7, device="meta")
        _loading.prepare(fake)
        assert npu.loaded == []
        npu.initialised = npu.capturing = True
        _loading.prepare(fake)
        assert npu.loaded == []
        npu.capturing = False
        _loading.prepare(fake)
        assert npu.loaded == [library("Ascend910B3")]


IMPORT = """
import sys
import npu_xent
assert "torch_npu" not in sys.modules
assert "torch._dynamo" not in sys.modules
assert "torch.distributed.tensor" not in sys.modules
"""


def test_importing_imports_neither_torch_npu_nor_the_compiler_nor_dtensor() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
