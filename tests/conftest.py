"""The device that the operators are tested on, and fixtures that several files use.

`--device npu` runs the same tests on an NPU, or on a simulated one. What a device lacks is left out here and nowhere
else: float64 where there is none, and what is about the implementation for another device.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reference import DTYPES, consuming
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES_WITHOUT_FLOAT64 = ("npu",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the operators' tensors live: cpu (the default), npu, ...")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu: about the CPU implementation; left out for another --device")
    config.addinivalue_line("markers", "npu: about NPUs; left out for another --device")
    config.addinivalue_line("markers", "simulated: needs the NPU to be one that cann_sim simulates")
    config.addinivalue_line("markers", "float64: needs float64 on the device (so does any test with that parameter)")
    config.addinivalue_line("markers", "isa: run again for each instruction set, see test_isa_and_threads.py")
    # Each parallel region waits for its last thread, which on a busy machine waits for a core: one thread is faster for
    # small tensors. More are asked for where they matter, in test_isa_and_threads.py.
    torch.set_num_threads(1)
    # Inductor's cache does not know operators' schemas: what another build has cached may not fit this one.
    built = Path(npu_xent_library()).stat().st_mtime_ns
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/npu_xent_inductor_{built}")
    if config.getoption("--device").startswith("npu"):  # torch knows this device once torch_npu is imported
        importlib.import_module("torch_npu")


def npu_xent_library() -> str:
    """The compiled operators that these tests load, without loading them."""
    package = importlib.util.find_spec("npu_xent")
    assert package is not None
    assert package.submodule_search_locations is not None
    found = importlib.machinery.PathFinder.find_spec("_C", list(package.submodule_search_locations))
    assert found is not None, "npu_xent has no compiled extension: make build"
    assert found.origin is not None
    return found.origin


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has = provided(device_of(config).type)
    left_out = [item for item in items if not needs(item) <= has]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if needs(item) <= has]


def device_of(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device"))


def provided(device: str) -> set[str]:
    """What a device has of the things that a test may need."""
    has = {device} & {"cpu", "npu"}
    if device not in DEVICES_WITHOUT_FLOAT64:
        has.add("float64")
    if device == "npu" and is_simulated():
        has.add("simulated")
    return has


def is_simulated() -> bool:
    """Whether this process runs under `python -m cann_sim`."""
    return hasattr(ctypes.CDLL(None), "cann_sim_acl_status")


def needs(item: pytest.Item) -> set[str]:
    """Markers, and float64 wherever it occurs in the parameters."""
    marked = {name for name in ("cpu", "npu", "simulated", "float64") if item.get_closest_marker(name)}
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    values = [v for p in parameters for v in (p.values() if isinstance(p, dict) else (p,))]
    return marked | ({"float64"} if any(v is torch.float64 for v in values) else set())


@pytest.fixture(params=["fresh", "consume"])
def function(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """cross_entropy with the gradient in fresh memory, and over the logits."""
    import npu_xent  # after torch_npu, which pytest_configure imports

    return npu_xent.cross_entropy if request.param == "fresh" else consuming(npu_xent.cross_entropy)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the operators' tensors live."""
    return device_of(pytestconfig)


@pytest.fixture(scope="session")
def simulated() -> bool:
    """Whether the device is one that cann_sim simulates."""
    return is_simulated()


@pytest.fixture(scope="session")
def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes of logits that the device has."""
    return tuple(d for d in DTYPES if d is not torch.float64 or "float64" in provided(device.type))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def allocations() -> Callable[[Callable[[], object]], list[int]]:
    """allocations(f): the sizes in bytes of what f, however deep inside, asked the CPU allocator for."""

    def measure(function: Callable[[], object]) -> list[int]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
        events = recorded.profiler.kineto_results.events()
        return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]

    return measure


class _Composite(TorchDispatchMode):
    """Calls the primitives' composite kernels, on whatever device the tensors are."""

    # A backend that npu_xent has no kernels for.
    KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "npu_xent" or func._schema.name.startswith("npu_xent::cross_entropy"):
            return func(*args, **(kwargs or {}))
        with self:  # the composites call one another
            return func.redispatch(self.KEYS, *args, **(kwargs or {}))


@pytest.fixture
def composite() -> type[TorchDispatchMode]:
    """`with composite():` computes by the kernels made of aten operations, as a device without its own does."""
    return _Composite
