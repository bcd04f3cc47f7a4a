"""Every synchronisation of good kernels removed in turn: by the runtime, and by deleting its lines from the source."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_file import FOLDER, kernel_file

import cann_sim
from cann_sim.removal import removed_syncs, summary

SOURCE = (FOLDER / "synchronised.cpp").read_text()
KERNELS = ("by_queues", "by_flags")
TILE, TILES = 64, 6


def body(kernel: str) -> str:
    return re.search(rf'^extern "C" [^\n]*\b{kernel}\(.*?^}}$', SOURCE, re.M | re.S)[0]


def names(kernel: str) -> list[str]:
    return sorted(set(re.findall(r"// sync (.+)$", body(kernel), re.M)))


def variant(kernel: str, removed: tuple[str, ...]) -> str:
    return "_without_".join([kernel, *(name.replace(" ", "_") for name in removed)])


# What is removed, and where the intact kernel stays right without it although it was written for a reason.
VARIANTS = [(kernel, (name,)) for kernel in KERNELS for name in names(kernel)] + [("by_queues", ("x", "y"))]
REDUNDANT = {("by_queues", ("x",)): "y's flag is set after both copies, and DeQue of y waits for it before the Add"}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> cann_sim.KernelLibrary:
    """All of them in one library."""
    text = SOURCE.replace('"scratch.h"', f'"{FOLDER / "scratch.h"}"')
    for kernel, removed in VARIANTS:
        lines = body(kernel).replace(f" {kernel}(", f" {variant(kernel, removed)}(").splitlines()
        ends = tuple(f"// sync {name}" for name in removed)
        text += "\n".join(["", *(line for line in lines if not line.endswith(ends)), ""])
    path = tmp_path_factory.mktemp("variants") / "variants.cpp"
    path.write_text(text)
    return cann_sim.compile(path)


def launch(library: cann_sim.KernelLibrary, kernel: str, config: cann_sim.Config | None = None) -> object:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, TILE * TILES), np.float32)
    z = np.zeros_like(x)
    report = library.launch(kernel, 1, x, y, cann_sim.Uninit(z), TILES, config=config or cann_sim.Config())
    np.testing.assert_array_equal(z, x + y if kernel.startswith("by_queues") else x + 1)
    return report


@pytest.mark.parametrize("kernel", KERNELS)
def test_intact(variants: cann_sim.KernelLibrary, kernel: str) -> None:
    launch(variants, kernel)


@pytest.mark.parametrize(
    "kernel, removed", VARIANTS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_lines_deleted(variants: cann_sim.KernelLibrary, kernel: str, removed: tuple[str, ...]) -> None:
    name = variant(kernel, removed)
    if (kernel, removed) in REDUNDANT:
        launch(variants, name)
        return
    with pytest.raises(cann_sim.KernelError) as caught:
        launch(variants, name)
    assert caught.value.kind == "race"
    assert caught.value.kernel == name


def by_source(library: cann_sim.KernelLibrary, kernel: str) -> Callable[[cann_sim.Config], object]:
    return lambda config: launch(library, kernel, config)


def double_buffered_add(config: cann_sim.Config) -> object:
    """Several tiles on each of two cores, with a tail."""
    total, tile = 1500, 128
    x, y = np.random.default_rng(1).standard_normal((2, total), np.float32)
    z = np.zeros_like(x)
    return kernel_file("good").library.launch("add_float", 2, x, y, cann_sim.Uninit(z), total, tile, config=config)


def test_double_buffered_add() -> None:
    """What is not caught is one of two sites that each order both inputs, and is caught when both go."""
    removals = removed_syncs(double_buffered_add)
    text = summary(removals)
    source = kernel_file("good").lines
    caught = " ".join(source[removal.line - 1] for removal in removals if removal.caught)
    redundant = [removal for removal in removals if not removal.caught]
    for removal in removals:
        if removal.caught:
            assert removal.error.kind == "race", text
            assert Path(removal.error.file).name == "good.cpp", text
    assert all(removal.partners for removal in redundant), text
    # The output has one queue: all of its synchronisation is needed.
    assert "out_z_.template AllocTensor" in caught, text
    assert "out_z_.template DeQue" in caught, text
    # The inputs have two: each site of one does the work of the other's.
    assert len(redundant) == 4, text


def test_flags_and_barrier(variants: cann_sim.KernelLibrary) -> None:
    """Five synchronisations, none of them redundant."""
    removals = removed_syncs(by_source(variants, "by_flags"))
    text = summary(removals)
    assert len(removals) == 5, text
    assert all(removal.caught and removal.error.kind == "race" for removal in removals), text
    assert sorted(removal.count for removal in removals) == [TILES - 2, TILES - 2, TILES, TILES, TILES], text


def test_scalar_unit_between_vector_instructions() -> None:
    """The flags to and from the scalar unit are needed, and both queues' ways in and out."""

    def run(config: cann_sim.Config) -> object:
        x, y = np.ones((2, 4 * 8 * 64), np.float32)
        return kernel_file("good").library.launch("scale_rows", 1, x, cann_sim.Uninit(y), 4, config=config)

    removals = removed_syncs(run)
    text = summary(removals)
    assert len(removals) == 6, text
    assert all(removal.caught and removal.error.kind == "race" for removal in removals), text


@pytest.mark.parametrize("rows, needed", [(1, 4), (5, 6)])
def test_softmax(rows: int, needed: int) -> None:
    """One row needs less than several, which use the buffers again.

    Four flags are redundant: ReduceMax and ReduceSum write their result by the scalar unit, which waits for V inside.
    """

    def run(config: cann_sim.Config) -> object:
        x = np.random.default_rng(2).standard_normal((rows, 200), np.float32)
        y = np.zeros_like(x)
        shape = np.array([rows, 200, 200], np.uint32).tobytes()
        return kernel_file("good").library.launch("softmax", 1, x, cann_sim.Uninit(y), shape, config=config)

    removals = removed_syncs(run)
    text = summary(removals)
    assert sum(removal.caught for removal in removals) == needed, text
    assert all(removal.error.kind == "race" for removal in removals if removal.caught), text
    redundant = sorted(removal.kind for removal in removals if not removal.caught)
    assert redundant == ["SetFlag/WaitFlag<S_V>"] * 2 + ["SetFlag/WaitFlag<V_S>"] * 2, text


def test_nothing_to_remove() -> None:
    """A kernel without synchronisation has no sites; the harness says so instead of passing something off."""

    def run(config: cann_sim.Config) -> object:
        y = np.zeros(64, np.float32)
        return kernel_file("good").library.launch("line_per_core", 4, y, config=config)

    removals = removed_syncs(run)
    assert removals == [], summary(removals)
    assert summary(removals) == "0 removed, 0 caught, 0 redundant"
