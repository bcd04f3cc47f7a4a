"""The CPU kernels on every instruction set and with any number of threads, and what an import costs.

The vectorised loops are compiled once for each instruction set; ATEN_CPU_CAPABILITY chooses among them. Tests marked
`isa`, here and in other files, run a second time in a process of their own for each set that this machine has besides
the one in use. What is bitwise the same must be so on each of them, not across them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import releases
import torch
from option_values import factors, keywords
from reference import (
    DTYPES,
    assert_same_bits,
    case_id,
    consuming,
    known,
    loss_and_grad,
    make_logits,
    make_target,
    make_weight,
    named,
    pairwise,
)
from torch import Tensor

import npu_xent
from npu_xent._loading import check_torch

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = npu_xent._C.compiled_cpu_capabilities().split()
REPORT = "import npu_xent; print(npu_xent._C.cpu_capability())"


def python(*arguments: str, capability: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python, for an instruction set or the machine's best, on the npu_xent that these tests import."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    path = [str(Path(npu_xent.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability.lower()
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )


# Instruction sets -----------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("classes", [1, 2, 10, 33, 256, 257, 5000])
def test_a_row_has_the_same_results_in_any_batch(classes: int, device: torch.device) -> None:
    """Bit for bit: nothing depends on how many rows there are, or where among them a row is."""
    logits, target = make_logits(37, classes, torch.float32, device), make_target(37, classes, device)
    options = {"reduction": "none", "label_smoothing": 0.1, "softcap": 30.0}
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, **options)
    for rows in (slice(0, 1), slice(5, 6), slice(30, 37), slice(3, 25)):
        few, few_grad = loss_and_grad(npu_xent.cross_entropy, logits[rows], target[rows], **options)
        assert_same_bits(few, loss[rows])
        assert_same_bits(few_grad, grad[rows])


@pytest.mark.isa
def test_the_instruction_set_is_the_one_asked_for() -> None:
    in_use = npu_xent._C.cpu_capability()
    assert in_use in CAPABILITIES
    assert in_use == os.environ.get("ATEN_CPU_CAPABILITY", in_use).upper()
    assert in_use == releases.cpu_capability()


@pytest.fixture(scope="module")
def best_capability() -> str:
    """What torch chooses on this machine. It takes ATEN_CPU_CAPABILITY at its word, beyond what the machine has."""
    return python("-c", REPORT).stdout.strip()


@pytest.mark.parametrize("capability", [name for name in CAPABILITIES if name != npu_xent._C.cpu_capability()])
def test_every_instruction_set_passes_the_same_tests(capability: str, best_capability: str) -> None:
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best_capability):  # they are in ascending order
        pytest.skip(f"this machine has {best_capability}, but not {capability}")
    assert python("-c", REPORT, capability=capability).stdout.strip() == capability
    child = python("-m", "pytest", "-m", "isa", "-p", "no:cacheprovider", "--tb=short", "tests", capability=capability)
    summary = re.search(r"(\d+) passed", child.stdout)
    assert child.returncode == 0, child.stdout[-5000:]
    assert summary is not None
    assert int(summary[1]) > 400, "the marked tests were not found"


# Threads --------------------------------------------------------------------------------------------------------------

# Rows that keep every thread busy; few rows of many chunks, which are shared out instead; more classes than the 1 MiB
# of exponentials that are kept; so many rows that their sums are shared out; nothing.
SHAPES = [(97, 8080), (1, 128256), (2, 128256), (3, 128256), (1, 300000), (70000, 3), (0, 5)]
THREADS = (1, 2, 5)
CASES = pairwise(
    factors(
        *("dtype", "reduction", "label_smoothing", "lse_square_scale", "softcap", "weighted", "ignore_index"),
        shape=SHAPES,
    )
)
# Sums over rows, where no rounding to float32 hides the order of additions.
CASES.append(CASES[0] | {"shape": (70000, 3), "dtype": torch.float64, "reduction": "mean", "weighted": True})


def everything(case: dict[str, Any]) -> dict[str, Tensor]:
    """All that the operators compute for a case, by name."""
    rows, classes = case["shape"]
    device = torch.device("cpu")
    logits = make_logits(rows, classes, case["dtype"], device, spread=1.0)
    target = make_target(rows, classes, device, ignore_index=case["ignore_index"])
    weight = make_weight(classes, torch.float32, device) if case["weighted"] else None
    options = keywords(case)
    ignored = options.get("ignore_index", -100)
    shape = (rows,) if case["reduction"] == "none" else ()
    upstream = torch.full(shape, 0.3, dtype=case["dtype"])

    found: dict[str, Tensor] = {}
    for path, function in (("fresh", npu_xent.cross_entropy), ("consumed", consuming(npu_xent.cross_entropy))):
        found[f"{path} loss"], found[f"{path} grad"] = loss_and_grad(
            function, logits, target, weight, **options, upstream=upstream
        )
    ops = torch.ops.npu_xent
    mapped = {"ignore_index": ignored, "softcap": case["softcap"]}
    stats = named("row_stats", logits, target, weight, **mapped, need_wsum=True, need_log_prob=True)
    arguments = {"logits": logits, "target": target, "weight": weight, "grad_loss": upstream, **options, **stats}
    reduced = {"ignore_index": ignored, "num_classes": classes, "loss_dtype": stats["lse"].dtype}
    arguments["totals"] = ops.reduce_rows(target, weight, **reduced)[2]
    found |= stats | {"totals": arguments["totals"], "row_grad": ops.row_grad(**known("row_grad", arguments))}
    if case["reduction"] != "none":
        one_sweep = named("row_stats_grad", **known("row_stats_grad", arguments), read_ignored=True)
        found |= {f"{name} of one sweep": value for name, value in one_sweep.items()}
    q = make_logits(rows, classes, torch.float32, device, spread=1.0).softmax(1).to(case["dtype"])
    shared = {name: options[name] for name in ("reduction", "label_smoothing", "lse_square_scale", "softcap")}
    x, q = logits.clone().requires_grad_(), q.requires_grad_()
    found["loss of probabilities"] = npu_xent.cross_entropy(x, q, weight, **shared)
    grads = torch.autograd.grad(found["loss of probabilities"], (x, q), upstream)
    found |= dict(zip(("grad with probabilities", "grad of probabilities"), grads, strict=True))
    found["scaled"] = logits.detach().clone()
    ops.scale_(found["scaled"], torch.tensor(0.3))
    return found


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_results_do_not_depend_on_the_number_of_threads(case: dict[str, Any], threads: Callable[[int], None]) -> None:
    """To the bit; and the same bits whether the gradient goes to fresh memory or over the logits."""
    threads(THREADS[0])
    expected = everything(case)
    assert_same_bits(expected["consumed loss"], expected["fresh loss"])
    assert_same_bits(expected["consumed grad"], expected["fresh grad"])
    if "lse of one sweep" in expected:
        assert_same_bits(expected["lse of one sweep"], expected["lse"])
    for count in THREADS[1:]:
        threads(count)
        for name, actual in everything(case).items():
            assert_same_bits(actual, expected[name], f"{name} with {count} threads")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """A row gives the same bits alone and among others, where it is shared out differently."""
    device = torch.device("cpu")
    logits, target = make_logits(40, 9001, dtype, device), make_target(40, 9001, device)
    loss, grad = loss_and_grad(npu_xent.cross_entropy, logits, target, reduction="none")
    for rows in (slice(0, 1), slice(7, 9), slice(20, 40)):
        some_loss, some_grad = loss_and_grad(npu_xent.cross_entropy, logits[rows], target[rows], reduction="none")
        assert_same_bits(some_loss, loss[rows])
        assert_same_bits(some_grad, grad[rows])


def test_inside_a_parallel_region(threads: Callable[[int], None]) -> None:
    """Called by a worker thread of Python's, at once with others: no shared scratch."""
    from concurrent.futures import ThreadPoolExecutor

    threads(2)
    device = torch.device("cpu")
    problems = [(make_logits(3, 4000 + i, torch.float32, device), make_target(3, 4000 + i, device)) for i in range(8)]
    alone = [loss_and_grad(npu_xent.cross_entropy, *problem, label_smoothing=0.1) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda problem: loss_and_grad(npu_xent.cross_entropy, *problem, label_smoothing=0.1), problems * 4)
        )
    for found, expected in zip(together, alone * 4, strict=True):
        for actual, want in zip(found, expected, strict=True):
            assert_same_bits(actual, want)


# The object files -----------------------------------------------------------------------------------------------------


HARMLESS = (
    "std::exp(float)",  # on Arm: nothing but a jump to libm's expf, whatever it is compiled for
    "DW.ref.__gxx_personality_v0",  # no code: the address of the C++ runtime's function
)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_variants_share_no_symbols(capability: str) -> None:
    """A function that two variants define alike is merged by the linker, which may keep the AVX512 one for everybody.

    So each object file defines nothing outside the namespace that is named after its instruction set.
    """
    nm = shutil.which("nm")
    pattern = f"build/torch*/CMakeFiles/npu_xent_cpu_kernels_{capability}.dir/**/*.o"
    objects = sorted(ROOT.glob(pattern))
    if nm is None or not objects:
        pytest.skip("needs nm, and the build tree of this checkout")
    for path in objects:
        listed = subprocess.run(
            [nm, "--demangle", "--defined-only", "--extern-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split(maxsplit=2) for line in listed.splitlines()]
        foreign = [
            (kind, name) for _, kind, name in symbols if f"::{capability}::" not in name and name not in HARMLESS
        ]
        assert symbols, f"{path} defines nothing"
        assert foreign == [], f"{path} exports symbols that variants share"


# Import ---------------------------------------------------------------------------------------------------------------


def test_another_release_of_torch_is_refused_in_words() -> None:
    check_torch("2.13.0+cpu", "2.13.0+cu130")  # the same release
    check_torch(torch.__version__, torch.__version__)
    with pytest.raises(ImportError) as raised:
        check_torch("2.13.0+cpu", "2.12.1+cu126")
    text = str(raised.value)
    assert text.startswith("npu_xent was built against torch 2.13.0+cpu, but torch 2.12.1+cu126 is installed.")
    assert "in a checkout of npu_xent, pip install --no-build-isolation --no-deps --force-reinstall ." in text
    assert text.endswith("(or install torch==2.13.0).")


def test_a_checkout_that_was_never_built_says_how_to_build_it(tmp_path: Path) -> None:
    package = tmp_path / "npu_xent"
    package.mkdir()
    for source in Path(npu_xent.__file__).parent.glob("*.py"):
        if source.name != "_build.py":
            shutil.copy(source, package)
    # An editable install would come to the rescue with the library of its own folder.
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; import npu_xent"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert f"npu_xent has no compiled extension in {package}. If it is installed already" in found.stderr
    assert "pip install --no-build-isolation -e ." in found.stderr


def test_import_brings_in_torch_alone_and_quickly() -> None:
    """Neither torch_npu nor what only a part of npu_xent needs; and less than a second on top of torch itself."""
    code = (
        "import sys, time, torch\n"
        "before, start = set(sys.modules), time.perf_counter()\n"
        "import npu_xent\n"
        "print(time.perf_counter() - start)\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    started = time.perf_counter()
    child = python("-c", code)
    whole = time.perf_counter() - started
    assert child.returncode == 0, child.stderr
    seconds, modules = child.stdout.splitlines()
    assert "torch_npu" not in modules.split()
    assert set(modules.split()) <= {"npu_xent", "torch"} | set(sys.stdlib_module_names), modules
    assert float(seconds) < max(0.5, 0.2 * whole)
