"""patch_verl: verl's functions give the same results with npu_xent's functions, which are really called."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import TOLERANCE, Calls, compare, error, results
from processes import run_ranks
from torch import Tensor
from verl_import import import_verl

from npu_xent.integrations.verl import patch_verl

pytestmark = pytest.mark.cpu

try:
    HAS_MEGATRON = importlib.util.find_spec("megatron.core") is not None
except ModuleNotFoundError:
    HAS_MEGATRON = False

LOGITS, FUSED = import_verl("utils.torch_functional"), import_verl("utils.experimental.torch_functional")
TRITON = import_verl("utils.kernel.linear_cross_entropy")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
PATCHED = {
    "logprobs_from_logits": LOGITS,
    "entropy_from_logits": LOGITS,
    "entropy_from_logits_with_chunking": LOGITS,
    "FusedLinearForPPOFunction": FUSED,
    "linear_cross_entropy": TRITON,
}


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    made = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).requires_grad_()


def labels_of(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def true_log_probs(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def true_entropy(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


# Logits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("inplace", [True, False])
def test_log_probs(dtype: torch.dtype, shape: tuple[int, ...], inplace: bool) -> None:
    labels = labels_of(*shape, classes=101)
    compare(
        patch_verl,
        lambda x: LOGITS.logprobs_from_logits(x, labels, inplace_backward=inplace),
        true_log_probs(labels),
        *([draw(*shape, 101, dtype=dtype, scale=4, seed=i)] for i in range(4)),
        calls={"row_stats": 1},
        rounds=dtype in SIXTEEN_BITS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 5)], ids=str)
def test_entropy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(
        patch_verl,
        lambda x: LOGITS.entropy_from_logits(x),
        true_entropy,
        *([draw(*shape, 101, dtype=dtype, scale=2, seed=i)] for i in range(4)),
        calls={"row_stats": 1},
        rounds=dtype in SIXTEEN_BITS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entropy_in_chunks(dtype: torch.dtype) -> None:
    """verl's is float32 too."""
    compare(
        patch_verl,
        lambda x: LOGITS.entropy_from_logits_with_chunking(x, chunk_size=3),
        true_entropy,
        *([draw(7, 101, dtype=dtype, scale=2, seed=i)] for i in range(4)),
        calls={"row_stats": 1},
        rounds=dtype in SIXTEEN_BITS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_results_are_float32_also_of_16_bits(dtype: torch.dtype) -> None:
    logits, expected = draw(2, 5, 7, dtype=dtype), torch.float64 if dtype is torch.float64 else torch.float32
    with patch_verl():
        assert LOGITS.logprobs_from_logits(logits, labels_of(2, 5, classes=7)).dtype is expected
        assert LOGITS.entropy_from_logits(logits).dtype is expected
        assert LOGITS.entropy_from_logits_with_chunking(logits[0]).dtype is torch.float32


@pytest.mark.parametrize("inplace", [True, False])
def test_the_logits_are_not_overwritten(inplace: bool) -> None:
    leaf = draw(2, 5, 7)
    logits = leaf * 1
    with patch_verl():
        LOGITS.logprobs_from_logits(logits, labels_of(2, 5, classes=7), inplace).sum().backward()
    assert torch.equal(logits, leaf)


@pytest.mark.parametrize("label", [7, -1, -100])
def test_a_label_out_of_range_raises(label: int) -> None:
    logits, labels = draw(2, 5, 7), torch.full((2, 5), label)
    with pytest.raises(RuntimeError, match="out of bounds"):
        LOGITS.logprobs_from_logits(logits, labels)
    with patch_verl(), pytest.raises(IndexError):
        LOGITS.logprobs_from_logits(logits, labels)
    with patch_verl(), pytest.raises(IndexError):
        FUSED.FusedLinearForPPOFunction.apply(draw(10, 3), draw(7, 3), labels.reshape(-1))


@pytest.mark.parametrize("masked_class", [0, 3])
def test_masked_classes(masked_class: int) -> None:
    """The entropy of logits of -inf is that of the other classes, and its gradient is finite."""
    logits = draw(4, 7).detach()
    logits[:, masked_class] = -torch.inf
    kept = [c for c in range(7) if c != masked_class]
    with patch_verl():
        (found,), (gradient,) = results(LOGITS.entropy_from_logits, logits.requires_grad_())
    (expected,), (true_gradient,) = results(true_entropy, logits.detach()[:, kept].requires_grad_())
    assert error(found, expected) <= TOLERANCE
    assert error(gradient[:, kept], true_gradient) <= TOLERANCE
    assert torch.equal(gradient[:, masked_class], torch.zeros(4))


# A linear layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(19,), (2, 11)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2])
def test_the_fused_layer(dtype: torch.dtype, shape: tuple[int, ...], temperature: float) -> None:
    """As engines call it. verl's has an entropy in the dtype of the hidden states."""
    labels, layer = labels_of(*shape, classes=101), FUSED.FusedLinearForPPO(chunk_size=5)

    def truth(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        logits = hidden @ weight.T / temperature
        return [true_log_probs(labels)(logits), true_entropy(logits)]

    compare(
        patch_verl,
        lambda hidden, weight: layer(hidden, weight, labels.int(), temperature),
        truth,
        *(
            [draw(*shape, 24, dtype=dtype, seed=2 * i), draw(101, 24, dtype=dtype, scale=0.4, seed=2 * i + 1)]
            for i in range(6)
        ),
        calls={"linear_row_stats": 1},
        rounds=dtype is torch.bfloat16,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(11, 1), (2, 11), (22,)], ids=str)
def test_the_layer_of_the_triton_backend(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """verl's needs CUDA. Megatron passes hidden states [tokens, 1, H] and labels [1, tokens]."""
    labels = labels_of(*reversed(shape), classes=101)
    hidden, weight = draw(*shape, 24, dtype=dtype), draw(101, 24, dtype=dtype, scale=0.4, seed=1)

    def truth(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        logits = hidden.flatten(0, -2) @ weight.T / 0.7
        return [true_log_probs(labels.flatten())(logits), true_entropy(logits)]

    exact = results(truth, *(x.detach().double().requires_grad_() for x in (hidden, weight)))
    with patch_verl(), Calls() as calls:
        found = results(lambda h, w: TRITON.linear_cross_entropy(h, w, labels, 0.7, "none"), hidden, weight)
    assert calls.of == {"linear_row_stats": 1}
    assert [x.dtype for x in found[0] if x is not None] == [torch.float32] * 2
    for one, true in zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True):
        assert one is not None
        assert true is not None
        assert one.shape == true.shape
        assert error(one, true) <= (TOLERANCE if dtype is torch.float32 else 2e-2)


def test_the_layer_ignores_minus_100() -> None:
    labels = torch.tensor([1, -100, 4, 0])
    with patch_verl():
        log_probs, entropy = TRITON.linear_cross_entropy(draw(4, 3), draw(5, 3), labels, 1.0)
    assert (log_probs == 0).tolist() == (entropy == 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)], ids=str)
def test_the_fused_layer_under_autocast(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    hidden, weight, labels = draw(9, 24, dtype=dtypes[0]), draw(33, 24, dtype=dtypes[1]), labels_of(9, classes=33)
    with patch_verl(), Calls() as calls, torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = FUSED.FusedLinearForPPOFunction.apply(hidden, weight, labels)
    assert calls.of == {"linear_row_stats": 1}
    truth = true_log_probs(labels)(hidden.detach().double() @ weight.detach().double().T)
    assert error(log_probs, truth) <= 1e-2
    assert [g.dtype for g in torch.autograd.grad(log_probs.sum(), [hidden, weight])] == list(dtypes)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_with_fused_kernels(backend: str) -> None:
    """The forward that verl gives to a model with `use_fused_kernels`."""
    transformers = importlib.import_module("transformers")
    forward = getattr(import_verl("models.transformers.dense_common"), f"forward_with_{backend}_backend")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **size))
    tokens = labels_of(2, 9, classes=64)

    def step() -> list[Tensor]:
        model.zero_grad()
        out = forward(model, input_ids=tokens, temperature=0.8, return_dict=True)
        (out.log_probs.mean() + 0.3 * out.entropy.mean()).backward()
        return [out.log_probs.detach().view(2, 9), *(p.grad.clone() for p in model.parameters())]

    logits = model(tokens).logits / 0.8
    expected = true_log_probs(tokens.roll(-1, -1))(logits)
    (expected.mean() + 0.3 * true_entropy(logits).mean()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    with patch_verl(), Calls() as calls:
        found = step()
    assert calls.of == {"linear_row_stats": 1}
    for one, true in zip(found, [expected, *gradients], strict=True):
        assert error(one, true) <= TOLERANCE
    if backend == "torch":
        for one, true in zip(step(), [expected, *gradients], strict=True):
            assert error(one, true) <= TOLERANCE


# What is left to verl -------------------------------------------------------------------------------------------------

HIDDEN, WEIGHT, LABELS = draw(5, 3), draw(7, 3, seed=1), labels_of(5, classes=7)
LEFT_TO_VERL: dict[str, Callable[[], Any]] = {
    "logits [C]": lambda: LOGITS.logprobs_from_logits(draw(7), torch.tensor(3)),
    "labels of another shape": lambda: LOGITS.logprobs_from_logits(draw(2, 5, 7), labels_of(2, 4, classes=7)),
    "no rows": lambda: LOGITS.entropy_from_logits(draw(0, 7)),
    "float64 in chunks": lambda: LOGITS.entropy_from_logits_with_chunking(draw(5, 7).double()),
    "chunks of [2, 5, C]": lambda: LOGITS.entropy_from_logits_with_chunking(draw(2, 5, 7)),
    "meta": lambda: LOGITS.entropy_from_logits(torch.empty(2, 7, device="meta")),
    "torch.func": lambda: torch.func.grad(lambda x: LOGITS.entropy_from_logits(x).sum())(draw(2, 7)),
    "a layer of float64": lambda: FUSED.FusedLinearForPPOFunction.apply(HIDDEN.double(), WEIGHT.double(), LABELS),
    "a layer of two dtypes": lambda: FUSED.FusedLinearForPPOFunction.apply(HIDDEN, WEIGHT.bfloat16(), LABELS),
    "a layer of [a, b, c, H]": lambda: FUSED.FusedLinearForPPOFunction.apply(
        draw(1, 1, 5, 3), WEIGHT, labels_of(1, 1, 5, classes=7)
    ),
    "a temperature of each": lambda: FUSED.FusedLinearForPPOFunction.apply(HIDDEN, WEIGHT, LABELS, torch.ones(5, 1)),
    "a tiny temperature": lambda: FUSED.FusedLinearForPPOFunction.apply(HIDDEN, WEIGHT, LABELS, 1e-7),
    "an integer as temperature": lambda: TRITON.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, 1),
    "a reduction": lambda: TRITON.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, 1.0, "mean"),
}


@pytest.mark.parametrize("case", LEFT_TO_VERL)
def test_what_is_left_to_verl(case: str) -> None:
    """The same bits, or the same error, and none of our operators."""

    def run() -> list[Any]:
        try:
            returned = LEFT_TO_VERL[case]()
        except Exception as raised:
            return [type(raised), str(raised)]
        return list(returned) if isinstance(returned, tuple) else [returned]

    theirs = run()
    with patch_verl(), Calls() as calls:
        ours = run()
    assert not calls.of
    for original, found in zip(theirs, ours, strict=True):
        if isinstance(original, Tensor):
            assert original.dtype is found.dtype
            assert original.is_meta or torch.equal(original, found)
        else:
            assert original == found


def test_another_default_dtype_is_left_to_verl() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with patch_verl(), Calls() as calls:
            entropy = LOGITS.entropy_from_logits_with_chunking(draw(5, 7, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert entropy.dtype is torch.float64
    assert not calls.of


# The patch ------------------------------------------------------------------------------------------------------------


def test_names_are_replaced_and_restored() -> None:
    user = LOGITS
    if importlib.util.find_spec("peft"):  # which verl's engines import
        user = import_verl("workers.engine.fsdp.transformer_impl")
    originals = {name: getattr(module, name) for name, module in PATCHED.items()}
    handle = patch_verl()
    assert all(getattr(PATCHED[name], name) is not original for name, original in originals.items())
    assert user.logprobs_from_logits is LOGITS.logprobs_from_logits
    patch_verl().remove()  # patches nest: the replacements have the signatures of what they replace
    handle.remove()
    assert {name: getattr(module, name) for name, module in PATCHED.items()} == originals
    assert user.logprobs_from_logits is LOGITS.logprobs_from_logits


@pytest.mark.skipif(not HAS_MEGATRON, reason="megatron.core is not installed")
def test_names_of_megatron_are_replaced_and_restored() -> None:
    module, user = import_verl("utils.megatron.tensor_parallel"), import_verl("models.mcore.model_forward_fused")
    names = [name for name in vars(module) if name.startswith("vocab_parallel") and "sum_pi" not in name][:3]
    originals = [getattr(module, name) for name in names]
    with patch_verl():
        assert all(getattr(module, name) is not original for name, original in zip(names, originals, strict=True))
        assert user.linear_cross_entropy is TRITON.linear_cross_entropy
    assert [getattr(module, name) for name in names] == originals
    assert user.linear_cross_entropy is TRITON.linear_cross_entropy


@pytest.mark.parametrize("name", PATCHED)
def test_another_signature_raises(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor) -> Tensor:
            return hidden

    def changed(logits: Tensor, other: int) -> None: ...

    replaced = {"FusedLinearForPPOFunction": Changed, "linear_cross_entropy": Changed.apply}.get(name, changed)
    monkeypatch.setattr(PATCHED[name], name, replaced)
    with pytest.raises(RuntimeError, match=rf"patch_verl: verl .* has verl\..*\.{name}\(.*tried with verl 0\.9\.1\."):
        patch_verl()


@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_compilers_find_the_replacement(name: str) -> None:
    """An engine compiles the function that it finds."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with patch_verl():
        compiled = torch.compile(getattr(LOGITS, name), dynamic=True, fullgraph=True, backend=backend)
        found = [results(compiled, draw(rows, 33)) for rows in (5, 8)]
    torch._dynamo.reset()
    assert len([target for target in graphs if "npu_xent" in target]) == 1
    for rows, ((entropy,), (gradient,)) in zip((5, 8), found, strict=True):
        (expected,), (true_gradient,) = results(true_entropy, draw(rows, 33))
        assert error(entropy, expected) <= TOLERANCE
        assert error(gradient, true_gradient) <= TOLERANCE


def test_verl_patches_itself_by_an_external_module(tmp_path: Path) -> None:
    """As in its workers. verl imports the module while it is imported itself."""
    (tmp_path / "my_patch.py").write_text("from npu_xent.integrations.verl import patch_verl\npatch_verl()\n")
    program = (
        "import verl_import\n"
        "module = verl_import.import_verl('utils.torch_functional')\n"
        "print(module.logprobs_from_logits.__globals__['__name__'])\n"
    )
    here = Path(__file__).parent
    path = [str(tmp_path), str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "my_patch", "PYTHONPATH": os.pathsep.join(path)}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.strip().endswith("npu_xent.integrations.verl"), ran.stderr


# Classes over ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_MEGATRON, reason="megatron.core is not installed")
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_classes_over_ranks(tmp_path: Path) -> None:
    """Right in each of two ranks, and the same bits on both."""
    found = run_ranks(str(Path(__file__).with_name("verl_ranks.py")), 2, tmp_path)
    assert len(found[0]) == 11
    for rank, of_rank in enumerate(found):
        for case, result in of_rank.items():
            assert result["error"] == "", f"rank {rank}, {case}: {result['error'][-3000:]}"
    for case in found[0]:
        assert len({of_rank[case]["bits"] for of_rank in found}) == 1, case
