"""selected_log_probs: the log-probabilities of K classes a row, equal ones among them, and their gradient.

Compared with the float64 truth: K times that of token_log_probs, whose gradients add up.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import ops, to_meta
from option_values import factors
from reference import (
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    assert_near,
    assert_same_bits,
    case_id,
    make_logits,
    make_target,
    max_error,
    pairwise,
    stats_dtype,
)
from token_cases import selected_truth, temperatures, with_masks
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent


def make_index(rows: int, classes: int, k: int, device: torch.device) -> Tensor:
    """Classes of which some are equal, from K = 2 on in the first row all."""
    index = torch.randint(0, classes, (rows, k), generator=torch.Generator().manual_seed(rows + classes + k))
    index[:1] = classes - 1
    index[1::3, -1:] = index[1::3, :1]
    return index.to(device)


def make_grad(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device, stats_dtype(dtype))


def values_and_grad(logits: Tensor, index: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The leaf shares the memory and the strides of `logits`."""
    leaf = logits.detach().requires_grad_()
    log_probs = npu_xent.selected_log_probs(leaf, index, **options)
    log_probs.backward(grad)
    return log_probs.detach(), leaf.grad


def plain(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """By torch's functions."""
    z = logit_scale * logits
    z = z if softcap is None else softcap * (z / softcap).tanh()
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    return z.log_softmax(-1).gather(-1, index)


CASES = pairwise(
    factors(
        "dtype",
        shape=[(0, 7), (3, 1), (97, 3), (97, 17), (9, 1000), (5, 1025), (5, 4096), (3, 32000)],
        k=(1, 2, 5, 64),
        layout=LAYOUTS,
        masked=(False, True),
        temperature=(1.0, 0.7, "one a row"),
        softcap=(None, 2.0),
        logit_scale=(1.0, 0.7, -0.5),
    )
)


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradient(case: dict[str, Any], device: torch.device) -> None:
    (rows, classes), dtype = case["shape"], case["dtype"]
    logits = make_logits(rows, classes, dtype, device, layout=case["layout"])
    if case["masked"]:
        logits = with_masks(logits, case["logit_scale"])
    index = make_index(rows, classes, case["k"], device)
    options = {name: case[name] for name in ("temperature", "softcap", "logit_scale")}
    if options["temperature"] == "one a row":
        options["temperature"] = temperatures((rows,), device)
    grad = make_grad(index.shape, dtype, device)
    expected = selected_truth(logits, index, grad, **options)
    log_probs, logits_grad = values_and_grad(logits, index, grad, **options)
    assert log_probs.dtype == stats_dtype(dtype)
    assert logits_grad.dtype == dtype
    assert_near(log_probs, expected.log_probs, expected.log_prob_terms, name="log_probs")
    assert_near(logits_grad, expected.grad, expected.grad_terms, name="gradient")


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("spread, shift", [(1e-3, 0.0), (3.0, 0.0), (40.0, 0.0), (3.0, 1e4), (1.0, -1e4)])
def test_errors_are_no_larger_than_torchs(spread: float, shift: float, k: int, device: torch.device) -> None:
    """In float32, plus one unit in the last place of the terms, which keeps chance out."""
    logits = make_logits(6, 5000, torch.float32, device, spread=spread) + shift
    index = make_index(6, 5000, k, device)
    grad = make_grad(index.shape, torch.float32, device)
    expected = selected_truth(logits, index, grad)
    ours = values_and_grad(logits, index, grad)
    leaf = logits.cpu().requires_grad_()
    theirs = plain(leaf, index.cpu())
    theirs.backward(grad.cpu())
    for our, their, true, terms in zip(
        ours,
        (theirs, leaf.grad),
        (expected.log_probs, expected.grad),
        (expected.log_prob_terms, expected.grad_terms),
        strict=True,
    ):
        floor = torch.finfo(torch.float32).eps * float(terms.max())
        assert max_error(our, true) <= max_error(their, true) + floor


def test_k_of_1_is_token_log_probs(device: torch.device) -> None:
    logits, target = make_logits(33, 70, torch.float32, device), make_target(33, 70, device)
    options = {"temperature": temperatures((33,), device), "softcap": 2.0, "logit_scale": 0.7}
    grad = make_grad(target.shape, torch.float32, device)
    ours, others = values_and_grad(logits, target[:, None], grad[:, None], **options), logits.clone().requires_grad_()
    log_probs = npu_xent.token_log_probs(others, target, **options)
    log_probs.backward(grad)
    torch.testing.assert_close(ours[0][:, 0], log_probs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours[1], others.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k_of_0(dtype: torch.dtype, device: torch.device) -> None:
    logits, index = make_logits(3, 5, dtype, device), torch.zeros(3, 0, dtype=torch.int64, device=device)
    log_probs, grad = values_and_grad(logits, index, torch.zeros(3, 0, dtype=stats_dtype(dtype), device=device))
    assert log_probs.shape == (3, 0)
    assert grad.shape == (3, 5)
    assert not grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_equal_indices_add_up(dtype: torch.dtype, device: torch.device) -> None:
    """In the dtype of the statistics: 64 small ones would be lost one by one in 16 bits."""
    logits = torch.zeros(2, 4, dtype=dtype, device=device)
    index = torch.tensor([[1] * 64 + [2], [3] * 65], device=device)
    grad = torch.full((2, 65), 1 / 512, dtype=stats_dtype(dtype), device=device)
    grad[0, -1] = -64 / 512
    _, found = values_and_grad(logits, index, grad)
    expected = [[0.0, 0.125, -0.125, 0.0], [-65 / 2048, -65 / 2048, -65 / 2048, 195 / 2048]]
    for row, wanted in zip(found.double().cpu().tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, rel=torch.finfo(dtype).eps * 2, abs=1e-7)


# -inf, +inf and NaN ---------------------------------------------------------------------------------------------------


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_special_rows(dtype: torch.dtype, device: torch.device) -> None:
    rows = [
        [0.0, -INF, 1.0],
        [-INF, 0.0, 1.0],
        [0.5, -INF, -INF],
        [-INF, -INF, -INF],
        [0.0, INF, 1.0],
        [0.0, NAN, 1.0],
        [0.0, 1.0, 2.0],
    ]
    logits = torch.tensor(rows, dtype=dtype, device=device)
    index = torch.tensor([[0, 1, 0]] * len(rows), device=device)
    grad = make_grad(index.shape, dtype, device)
    expected = selected_truth(logits, index, grad)
    log_probs, found = values_and_grad(logits, index, grad)
    assert_near(log_probs, expected.log_probs, expected.log_prob_terms, name="log_probs")
    assert_near(found, expected.grad, expected.grad_terms, name="gradient")
    assert log_probs[3:6].isnan().all()
    assert found[3:6].isnan().all()
    assert log_probs[[0, 1, 2, 6]].isnan().sum() == found[[0, 1, 2, 6]].isnan().sum() == 0
    assert float(log_probs[0, 1]) == float(log_probs[1, 0]) == -INF
    assert float(found[0, 2]) != 0
    assert float(found[2, 2]) == 0


# Shapes, layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (2, 0), (0,)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], device: torch.device) -> None:
    rows = torch.Size(shape).numel()
    logits, index = make_logits(rows, 13, torch.float32, device), make_index(rows, 13, 4, device)
    temperature, grad = temperatures((rows,), device), make_grad(index.shape, torch.float32, device)
    flat = values_and_grad(logits, index, grad, temperature=temperature)
    shaped = values_and_grad(
        logits.view(*shape, 13), index.view(*shape, 4), grad.view(*shape, 4), temperature=temperature.view(shape)
    )
    for actual, expected, last in zip(shaped, flat, (4, 13), strict=True):
        assert actual.shape == (*shape, last)
        assert_same_bits(actual.reshape(expected.shape), expected)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_change_no_bit(layout: str, device: torch.device) -> None:
    """index may be expanded over the rows, or have columns of a wider one."""
    logits, index = make_logits(33, 70, torch.float32, device, layout=layout), make_index(33, 70, 4, device)
    grad = make_grad(index.shape, torch.float32, device)
    for strided in (index.repeat(1, 2)[:, :4], index[:1].expand(33, 4)):
        actual = values_and_grad(logits, strided, grad.repeat(1, 2)[:, :4])
        expected = values_and_grad(logits.contiguous(), strided.contiguous(), grad)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64], ids=str)
def test_any_integer_index(dtype: torch.dtype, device: torch.device) -> None:
    logits, index = make_logits(6, 9, torch.float32, device), make_index(6, 9, 3, device)
    assert_same_bits(npu_xent.selected_log_probs(logits, index.to(dtype)), npu_xent.selected_log_probs(logits, index))


def test_callers_tensors_are_left_alone(device: torch.device) -> None:
    logits, index = make_logits(6, 9, torch.float32, device), make_index(6, 9, 3, device)
    grad = make_grad(index.shape, torch.float32, device)
    before = [(t.clone(), t._version) for t in (logits, index, grad)]
    values_and_grad(logits, index, grad)
    for tensor, (values, version) in zip((logits, index, grad), before, strict=True):
        assert_same_bits(tensor, values)
        assert tensor._version == version


# Autograd, compilers and transforms -----------------------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap: float | None, device: torch.device) -> None:
    logits = make_logits(4, 5, torch.float64, device, spread=1.0).requires_grad_()
    index = torch.tensor([[2, 1], [0, 0], [4, 3], [1, 2]], device=device)
    options = {"temperature": temperatures((4,), device), "logit_scale": -0.8, "softcap": softcap}
    assert torch.autograd.gradcheck(lambda x: npu_xent.selected_log_probs(x, index, **options), (logits,))


def test_autograd(device: torch.device) -> None:
    """A second backward gives the same; a second derivative raises; without a gradient there is no graph."""
    leaf, index = make_logits(6, 9, torch.float32, device).requires_grad_(), make_index(6, 9, 3, device)
    log_probs = npu_xent.selected_log_probs(leaf, index)
    first, second = (torch.autograd.grad(log_probs.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, second)
    (grad,) = torch.autograd.grad(log_probs.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()
    log_probs.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        log_probs.sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            without = npu_xent.selected_log_probs(leaf, index)
        assert not without.requires_grad
        assert_same_bits(without, log_probs)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(npu_xent.selected_log_probs(leaf, index), log_probs)


def test_changed_logits_are_noticed(device: torch.device) -> None:
    logits, index = make_logits(6, 9, torch.float32, device).requires_grad_() * 1, make_index(6, 9, 3, device)
    log_probs = npu_xent.selected_log_probs(logits, index)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


def distillation(logits: Tensor, index: Tensor) -> Tensor:
    """Of a teacher's K most probable classes."""
    log_probs = npu_xent.selected_log_probs(logits, index, temperature=2.0)
    return -(log_probs * torch.linspace(1, 0.5, index.shape[-1], device=logits.device)).sum(-1).mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.cpu)])
def test_compiles_in_one_graph(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(distillation, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 9):
        logits, index = make_logits(rows, 13, torch.float32, device), make_index(rows, 13, 3, device)
        results = []
        for function in (compiled, distillation):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, index)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class Exported(nn.Module):
    """The function as a module, for torch.export."""

    def forward(self, logits: Tensor, index: Tensor) -> Tensor:
        return npu_xent.selected_log_probs(logits, index, softcap=2.0)


@pytest.mark.filterwarnings("ignore")
def test_export_saved_and_loaded(device: torch.device) -> None:
    rows = torch.export.Dim("rows", min=2, max=1024)
    example = (make_logits(6, 13, torch.float32, device), make_index(6, 13, 3, device))
    exported = torch.export.export(Exported(), example, dynamic_shapes=({0: rows}, {0: rows}))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (6, 11):
        arguments = make_logits(n, 13, torch.float32, device), make_index(n, 13, 3, device)
        assert_same_bits(loaded(*arguments), Exported()(*arguments))


def test_torch_func(device: torch.device) -> None:
    logits, index = make_logits(6, 9, torch.float32, device), make_index(6, 9, 3, device)
    batch, indices = torch.stack([logits, -logits]), torch.stack([index, 8 - index])

    def by(function: Callable[..., Tensor]) -> list[Any]:
        def of(x: Tensor, y: Tensor) -> Tensor:
            return (function(x, y, softcap=2.0, temperature=0.7) * torch.arange(3.0, device=device)).sum()

        return [
            torch.func.grad(of)(logits, index),
            torch.vmap(of)(batch, indices),
            torch.vmap(torch.func.grad(of))(batch, indices),
            torch.func.jvp(lambda x: of(x, index), (logits,), (batch[1],)),
        ]

    for actual, expected in zip(by(npu_xent.selected_log_probs), by(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_profiles_show_the_fused_operators(device: torch.device) -> None:
    logits, index = make_logits(6, 9, torch.float32, device), make_index(6, 9, 3, device)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        values_and_grad(logits, index, torch.ones(6, 3, device=device))
    names = [event.name for event in recorded.events()]
    assert names.count("npu_xent::row_stats") == names.count("npu_xent::row_grad") == 1


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_allocates_the_gradient_alone(
    dtype: torch.dtype, device: torch.device, allocations: Callable[[Callable[[], object]], list[int]]
) -> None:
    rows, classes = 32, 4096
    leaf, index = make_logits(rows, classes, dtype, device).requires_grad_(), make_index(rows, classes, 4, device)

    def big(function: Callable[[], object]) -> list[int]:
        return [size for size in allocations(function) if size >= rows * classes]

    def infer() -> None:
        with torch.no_grad():
            npu_xent.selected_log_probs(leaf, index)

    assert big(infer) == []
    assert big(lambda: npu_xent.selected_log_probs(leaf, index).sum().backward()) == [rows * classes * dtype.itemsize]


@pytest.mark.cpu
@pytest.mark.isa
@pytest.mark.parametrize("shape", [(97, 8080), (1, 128256), (3, 300000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, shape: tuple[int, int], threads: Callable[[int], None]
) -> None:
    device = torch.device("cpu")
    logits, index = make_logits(*shape, dtype, device, spread=1.0), make_index(*shape, 5, device)
    grad = make_grad(index.shape, dtype, device)
    threads(1)
    expected = values_and_grad(logits, index, grad)
    for count in (2, 5):
        threads(count)
        for actual, wanted in zip(values_and_grad(logits, index, grad), expected, strict=True):
            assert_same_bits(actual, wanted, f"{count} threads")


def test_composite(device: torch.device, composite: type[TorchDispatchMode]) -> None:
    """The kernels made of aten operations, for devices without their own."""
    logits, index = with_masks(make_logits(9, 21, torch.float32, device)), make_index(9, 21, 4, device)
    options = {"temperature": temperatures((9,), device), "logit_scale": 0.7}
    grad = make_grad(index.shape, torch.float32, device)
    expected = selected_truth(logits, index, grad, **options)
    with composite():
        log_probs, found = values_and_grad(logits, index, grad, **options)
    assert_near(log_probs, expected.log_probs, expected.log_prob_terms, name="log_probs")
    assert_near(found, expected.grad, expected.grad_terms, name="gradient")


# The operator ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.7, "temperature": 2.0}], ids=str)
def test_opcheck(options: dict[str, Any], device: torch.device) -> None:
    logits, index = make_logits(6, 9, torch.float32, device).requires_grad_(), make_index(6, 9, 3, device)
    arguments = (logits, index, temperatures((6,), device)) if options else (logits, index)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_autograd_registration"] if device.type in ("cpu", "cuda", "xpu") else []
    torch.library.opcheck(ops.selected_log_probs.default, arguments, options, test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 3])
def test_meta_says_what_eager_gives(k: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, index = make_logits(6, 9, dtype, device), make_index(6, 9, k, device)
    eager, meta = ops.selected_log_probs(logits, index), ops.selected_log_probs(to_meta(logits), to_meta(index))
    assert meta.device.type == "meta"
    assert (meta.shape, meta.dtype, meta.stride()) == (eager.shape, eager.dtype, eager.stride())


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, 10**12, -1, -100])
def test_index_out_of_range(bad: int, device: torch.device) -> None:
    """There is no ignore_index: -100 is out of range too."""
    logits = make_logits(3, 5, torch.float32, device).requires_grad_()
    index = torch.tensor([[0, 1], [2, bad], [4, 4]], device=device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"index\[1, 1\] is {bad}, which is not a class in \[0, 5\)"):
            npu_xent.selected_log_probs(logits, index)
        return
    log_probs = npu_xent.selected_log_probs(logits, index)
    log_probs.sum().backward()
    assert log_probs.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert logits.grad.isnan().all(1).tolist() == [False, True, False]


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "logits no tensor": ({"logits": [[0.0]]}, TypeError, "selected_log_probs: logits must be a torch.Tensor"),
    "index no tensor": ({"index": [[0]]}, TypeError, "selected_log_probs: index must be a torch.Tensor"),
    "logits of integers": (
        {"logits": lambda d: torch.zeros(4, 5, dtype=torch.int64, device=d)},
        TypeError,
        "logits must be float32, bfloat16, float16 or float64",
    ),
    "no classes": (
        {"logits": lambda d: torch.zeros(4, 0, device=d)},
        ValueError,
        "logits must have at least one class",
    ),
    "index of fewer rows": (
        {"index": lambda d: torch.zeros(3, 2, dtype=torch.int64, device=d)},
        ValueError,
        "index must",
    ),
    "index of fewer dimensions": (
        {"index": lambda d: torch.zeros(4, dtype=torch.int64, device=d)},
        ValueError,
        "index must have",
    ),
    "index of more dimensions": (
        {"index": lambda d: torch.zeros(4, 2, 1, dtype=torch.int64, device=d)},
        ValueError,
        "index must have",
    ),
    "index of floating point": (
        {"index": lambda d: torch.zeros(4, 2, device=d)},
        TypeError,
        "index must be int64 or another integer dtype, but is torch.float32; convert it with index.long().",
    ),
    "index elsewhere": (
        {"index": lambda d: torch.zeros(4, 2, dtype=torch.int64, device="meta")},
        ValueError,
        "index must",
    ),
    "temperature of 0": ({"temperature": 0.0}, ValueError, "temperature must lie in [1e-6, 1e6], but is 0"),
    "temperature that learns": (
        {"temperature": lambda d: torch.ones(4, device=d, requires_grad=True)},
        RuntimeError,
        "temperature requires a gradient",
    ),
    "temperature in float16": (
        {"temperature": lambda d: torch.ones(4, device=d).half()},
        TypeError,
        "temperature must be a number or float32, but is",
    ),
    "one temperature for each index": (
        {"temperature": lambda d: torch.ones(4, 2, device=d)},
        ValueError,
        "temperature",
    ),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap must lie in [1e-6, 1e6], but is 0"),
    "logit_scale of NaN": ({"logit_scale": NAN}, ValueError, "logit_scale must be finite, but is nan"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, device: torch.device) -> None:
    changed, error, words = REFUSALS[name]
    good = {"logits": make_logits(4, 5, torch.float32, device), "index": make_index(4, 5, 2, device)}
    changed = {key: value(device) if callable(value) else value for key, value in changed.items()}
    with pytest.raises(error, match=re.escape(words)) as caught:
        npu_xent.selected_log_probs(**good | changed)
    assert "npu_xent" in str(caught.value)


@pytest.mark.parametrize("name", ["logits", "index", "temperature"])
def test_freed_storage(name: str, device: torch.device) -> None:
    arguments = {
        "logits": make_logits(4, 5, torch.float32, device),
        "index": make_index(4, 5, 2, device),
        "temperature": torch.ones(4, device=device),
    }
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"npu_xent: {name} with shape .* its storage has been resized to 0"):
        npu_xent.selected_log_probs(**arguments)
