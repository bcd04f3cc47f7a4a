"""patch_transformers and fuse_lm_head: models of transformers have the losses and gradients that they have without."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from originals import the_original
from processes import run_ranks
from releases import FSDP2_AVERAGES_ON_GLOO
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from npu_xent.integrations import transformers as ours
from npu_xent.integrations._lm_head import Logits

pytestmark = pytest.mark.cpu

CLASSES = 96
SIZE = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
DECODER = {**SIZE, **TOKENS, "num_key_value_heads": 2, "head_dim": 16, "use_cache": False}
EXPERTS = {**DECODER, "output_router_logits": True, "router_aux_loss_coef": 0.5}
GPT = {**TOKENS, "use_cache": False, "vocab_size": CLASSES, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SCALED = 20.0  # of the parameters, so that softcaps matter

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", DECODER),
    "Qwen3ForCausalLM": ("Qwen3Config", DECODER),
    "MistralForCausalLM": ("MistralConfig", DECODER),
    "Gemma2ForCausalLM": ("Gemma2Config", {**DECODER, "final_logit_softcapping": 3.0}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**DECODER, "final_logit_softcapping": 3.0}),
    "GPT2LMHeadModel": ("GPT2Config", {**GPT, **NO_DROPOUT}),
    "GPTJForCausalLM": ("GPTJConfig", {**GPT, **NO_DROPOUT, "rotary_dim": 4}),  # with a bias
    "CohereForCausalLM": ("CohereConfig", {**DECODER, "logit_scale": 3.0}),
    "GraniteForCausalLM": ("GraniteConfig", {**DECODER, "logits_scaling": 3.0}),
    "HyperCLOVAXForCausalLM": ("HyperCLOVAXConfig", {**DECODER, "logits_scaling": 3.0}),  # which multiplies
    "MixtralForCausalLM": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "EuroBertForMaskedLM": ("EuroBertConfig", DECODER),
}
LLAMA = "LlamaForCausalLM"


def original(name: str) -> ModuleType:
    return the_original(lambda: importlib.import_module(name))


@pytest.fixture(scope="module", autouse=True)
def without_torch_npu() -> Iterator[None]:
    """transformers and accelerate would import an installed torch_npu, which CANN may be missing for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_npu", None)
        yield


@pytest.fixture(scope="module")
def transformers(without_torch_npu: None) -> ModuleType:
    return original("transformers")


class Calls(TorchDispatchMode):
    """Counts the forward operators of npu_xent: those without logits, and those of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.of_logits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.linear += name.startswith("npu_xent::linear_row_stats")
        self.of_logits += name.startswith("npu_xent::row_stats")
        return func(*args, **(kwargs or {}))

    def __eq__(self, other: object) -> bool:
        return (self.linear, self.of_logits) == other

    def __repr__(self) -> str:
        return f"(linear={self.linear}, of_logits={self.of_logits})"


def build(transformers: ModuleType, name: str = LLAMA, **options: Any) -> Any:
    torch.manual_seed(0)
    config, usual = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**{**usual, **options})).train()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight *= SCALED
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, CLASSES, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


class Step(NamedTuple):
    """A forward and a backward: the output, the gradients of all parameters, and the calls of npu_xent."""

    output: Any
    gradients: dict[str, Tensor]
    calls: Calls


def step(model: nn.Module, call: Callable[..., Any] | None = None, **inputs: Any) -> Step:
    model.zero_grad()
    calls = Calls()
    with calls if call is None else contextlib.nullcontext():  # torch.compile leaves all code under a mode alone
        output = (model if call is None else call)(**{**batch(), **inputs})
        output.loss.backward()
    return Step(output, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}, calls)


def assert_equal(actual: Step, expected: Step) -> None:
    loss, true = actual.output.loss, expected.output.loss
    assert (loss.dtype, loss.shape, loss.device) == (true.dtype, true.shape, true.device)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.gradients.values())
    torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=1e-5, atol=1e-5)
    assert {k: p.dtype for k, p in actual.gradients.items()} == {k: p.dtype for k, p in expected.gradients.items()}


# Losses and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 19, torch.tensor(19)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_transformers(name: str, items: Any, transformers: ModuleType) -> None:
    model = build(transformers, name)
    inputs = {} if items is None else {"num_items_in_batch": items}
    expected = step(model, **inputs)
    assert expected.calls == (0, 0)
    with ours.patch_transformers():
        patched = step(model, **inputs)
    assert patched.calls == (0, 1)
    assert_equal(patched, expected)
    assert torch.equal(patched.output.logits, expected.output.logits)
    with ours.fuse_lm_head(model):
        fused = step(model, **inputs)
    assert fused.calls == (1, 0)
    assert_equal(fused, expected)
    assert fused.output.logits is None
    assert type(fused.output) is type(expected.output)
    assert [*fused.output] == [k for k in expected.output if k != "logits"]
    assert step(model, **inputs).calls == (0, 0)


def test_softcaps_scales_and_biases_of_these_models_matter(transformers: ModuleType) -> None:
    """Otherwise the test above would not see that one is left out."""
    usual = {"Gemma2ForCausalLM": "final_logit_softcapping", "Gemma3ForCausalLM": "final_logit_softcapping"}
    usual |= {"CohereForCausalLM": "logit_scale", "GraniteForCausalLM": "logits_scaling"}
    for name, option in usual.items():
        without = None if "softcap" in option else 1.0
        found = [step(build(transformers, name, **kw)).output.loss for kw in ({}, {option: without})]
        assert abs(found[0] - found[1]) > 1e-2, name
    model = build(transformers, "GPTJForCausalLM")
    with_bias = step(model).output.loss
    model.lm_head.bias.data.zero_()
    assert abs(step(model).output.loss - with_bias) > 1e-2


def test_other_arguments_of_the_loss(transformers: ModuleType) -> None:
    model = build(transformers)
    ids, labels = batch().values()
    for inputs in (
        {"shift_labels": labels.flip(1)},
        {"shift_labels": labels.flip(1), "num_items_in_batch": 7},
        {"labels": ids, "ignore_index": int(ids[0, 3])},
        {"labels": torch.full_like(ids, -100), "num_items_in_batch": 3},
        {"attention_mask": torch.ones_like(ids).tril()},
    ):
        expected = step(model, **inputs)
        with ours.patch_transformers():
            patched = step(model, **inputs)
        with ours.fuse_lm_head(model):
            fused = step(model, **inputs)
        assert (patched.calls, fused.calls) == ((0, 1), (1, 0))
        for found in (patched, fused):
            torch.testing.assert_close(found.output.loss, expected.output.loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-5, atol=1e-5)


def test_positional_labels(transformers: ModuleType) -> None:
    model = build(transformers)
    ids, labels = batch().values()
    position = [*inspect.signature(model.forward).parameters].index("labels")
    arguments = (ids, *[None] * (position - 1), labels)
    expected = model(*arguments).loss
    with ours.fuse_lm_head(model), Calls() as calls:
        torch.testing.assert_close(model(*arguments).loss, expected, rtol=1e-5, atol=1e-5)
    assert calls == (1, 0)


@pytest.mark.parametrize("name", [LLAMA, "Gemma2ForCausalLM", "GraniteForCausalLM"])
def test_bfloat16_is_not_farther_from_float64(name: str, transformers: ModuleType) -> None:
    """Of several batches: the root mean square error of the losses, and of the gradients of each parameter."""
    model = build(transformers, name, num_hidden_layers=0, vocab_size=1024).bfloat16()
    batches = [torch.randint(1, 1024, (4, 31), generator=torch.Generator().manual_seed(seed)) for seed in range(16)]

    def run(model: nn.Module) -> list[Tensor]:
        steps = [step(model, input_ids=ids, labels=ids) for ids in batches]
        assert all(s.output.loss.dtype == torch.float32 for s in steps)
        losses = torch.stack([s.output.loss.detach() for s in steps])
        gradients = [torch.stack([s.gradients[k] for s in steps]) for k in steps[0].gradients]
        return [x.double() for x in (losses, *gradients)]

    truth = run(copy.deepcopy(model).double())  # whose loss is float32

    def off(found: list[Tensor]) -> list[float]:
        return [float((x - true).norm() / true.norm()) for x, true in zip(found, truth, strict=True)]

    own = off(run(model))
    with ours.patch_transformers():
        patched = off(run(model))
    with ours.fuse_lm_head(model):
        fused = off(run(model))
    assert all(mine <= 1.02 * theirs for mine, theirs in zip(patched, own, strict=True)), (patched, own)
    assert all(mine <= 1.02 * theirs for mine, theirs in zip(fused, own, strict=True)), (fused, own)


def test_memory(transformers: ModuleType, allocations: Callable[[Callable[[], object]], list[int]]) -> None:
    classes, rows = 32000, 1024
    model = build(transformers, num_hidden_layers=0, vocab_size=classes).bfloat16()
    ids = torch.randint(1, classes, (2, rows // 2))

    def largest() -> int:
        return max(allocations(lambda: model(input_ids=ids, labels=ids).loss.backward()))

    logits = 2 * rows * classes
    assert largest() == 2 * logits  # float32 copies
    with ours.patch_transformers():
        assert largest() == logits
    with ours.fuse_lm_head(model):
        assert largest() < 0.6 * logits


def test_autocast(transformers: ModuleType) -> None:
    model = build(transformers, "Gemma2ForCausalLM")
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)
        with ours.fuse_lm_head(model):
            fused = step(model)
    assert fused.calls == (1, 0)
    assert fused.output.loss.dtype == expected.output.loss.dtype == torch.float32
    torch.testing.assert_close(fused.output.loss, expected.output.loss, rtol=2e-2, atol=0)
    for name, gradient in expected.gradients.items():
        assert (fused.gradients[name] - gradient).norm() <= 2e-2 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("name", [LLAMA, "Gemma2ForCausalLM"])
def test_compiled_in_one_graph(name: str, transformers: ModuleType) -> None:
    model = build(transformers, name)
    expected = step(model)
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.code)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    handle = ours.fuse_lm_head(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        fused = step(model, compiled)
        assert_equal(fused, expected)
        assert fused.output.logits is None
        assert len(graphs) == 1
    assert graphs[0].count("npu_xent.linear_cross_entropy") == 1
    handle.remove()
    assert step(model, compiled).output.logits is not None
    torch._dynamo.reset()


# patch_transformers ---------------------------------------------------------------------------------------------------


def losses(transformers: ModuleType) -> list[Any]:
    """All that transformers has for the two losses."""
    from transformers import trainer
    from transformers.loss import loss_utils

    mapping = loss_utils.LOSS_MAPPING
    return [loss_utils.ForCausalLMLoss, loss_utils.ForMaskedLMLoss, trainer.ForCausalLMLoss, *mapping.values()]


def test_names_are_replaced_and_restored(transformers: ModuleType) -> None:
    original("accelerate")
    before = losses(transformers)
    first = ours.patch_transformers()
    patched = losses(transformers)
    causal = [a is before[0] for a in before]
    masked = [a is before[1] for a in before]
    assert (sum(causal), sum(masked)) == (5, 2)
    assert [a is patched[0] for a in patched] == causal
    assert [a is patched[1] for a in patched] == masked
    assert not {*before[:2]} & {*patched}
    with ours.patch_transformers():
        assert losses(transformers)[0] not in (before[0], patched[0])
    assert losses(transformers) == patched
    second = ours.patch_transformers()
    first.remove()
    assert losses(transformers)[0] not in (before[0], patched[0])
    second.remove()
    second.remove()
    assert losses(transformers) == before


def test_one_model(transformers: ModuleType) -> None:
    model, other = build(transformers), build(transformers)
    before = model.loss_function
    with ours.patch_transformers(model):
        assert step(model).calls == (0, 1)
        assert step(other).calls == (0, 0)
    assert step(model).calls == (0, 0)
    assert model.loss_function is before
    handle = ours.patch_transformers(model)
    model.loss_function = len
    handle.remove()
    assert model.loss_function is len
    masked = build(transformers, "EuroBertForMaskedLM")
    expected = step(masked)
    with ours.patch_transformers(masked):
        assert_equal(patched := step(masked), expected)
    assert patched.calls == (0, 1)
    with pytest.raises(TypeError, match="the loss_function of LlamaForSequenceClassification is"):
        ours.patch_transformers(transformers.LlamaForSequenceClassification(model.config))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_calls_that_are_not_served_reach_transformers(masked: bool, transformers: ModuleType) -> None:
    from transformers.loss import loss_utils

    name = "ForMaskedLMLoss" if masked else "ForCausalLMLoss"
    original = getattr(loss_utils, name)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))

    class Special(Tensor):
        pass

    def outcome(loss: Callable[..., Any], *arguments: Any) -> Any:
        try:
            found = loss(*arguments, 7)
        except Exception as error:
            return type(error), str(error)
        return found.dtype, found.shape, found.device, found if found.device.type == "cpu" else None

    def derivative(loss: Callable[..., Any], x: Tensor, y: Tensor, classes: int) -> Any:
        return torch.func.jvp(lambda x: loss(x, y, classes), (x,), (torch.ones_like(x),))[1]

    def gradient(loss: Callable[..., Any], x: Tensor, y: Tensor, classes: int) -> Any:
        return torch.func.grad(lambda x: loss(x, y, classes))(x)

    with ours.patch_transformers():
        patched = getattr(loss_utils, name)
        with Calls() as calls:
            patched(logits, labels, 7)
            if not masked:
                patched(logits, None, 7, shift_labels=labels)
        assert calls == (0, 1 if masked else 2)
        for arguments in (
            (logits.to("meta"), labels.to("meta")),
            (logits.as_subclass(Special), labels),
            (logits, labels.int()),
            (logits, labels.float()),
            (logits, labels.tolist()),
            (logits.to_sparse(), labels),
            (logits[:, :3], labels),
            (logits[..., :6], labels),
            (logits.half().to(torch.float8_e5m2), labels),
        ):
            with Calls() as calls:
                assert repr(outcome(patched, *arguments)) == repr(outcome(original, *arguments))
            assert calls == (0, 0)
        for transform in (derivative, gradient):
            with Calls() as calls:
                found = transform(patched, logits, labels, 7)
            assert calls == (0, 0)
            assert torch.equal(found, transform(original, logits, labels, 7))


def test_logits_that_are_not_contiguous(transformers: ModuleType) -> None:
    logits, labels = torch.randn(5, 2, 7), torch.randint(7, (2, 5))
    from transformers.loss import loss_utils

    for x in (logits.transpose(0, 1), torch.randn(2, 5, 9)[..., :7]):
        found = ours.causal_lm_loss(x, labels, 7)
        torch.testing.assert_close(found, loss_utils.ForCausalLMLoss(x.contiguous(), labels, 7))
    with pytest.raises(TypeError, match="labels and shift_labels are both None"):
        ours.causal_lm_loss(logits, None, 7)


@pytest.mark.parametrize("name", ["ForCausalLMLoss", "ForMaskedLMLoss"])
def test_another_signature_raises(name: str, transformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.loss import loss_utils

    model = build(transformers)
    monkeypatch.setattr(loss_utils, name, lambda logits, labels, classes: None)
    message = (
        rf"transformers .* has transformers\.loss\.loss_utils\.{name}\(logits, labels, classes\), .*tried with .*5\.24"
    )
    with pytest.raises(RuntimeError, match=r"npu_xent\.patch_transformers: " + message):
        ours.patch_transformers()
    with pytest.raises(RuntimeError, match=r"npu_xent\.patch_transformers: " + message):
        ours.patch_transformers(model)
    with pytest.raises(RuntimeError, match=r"npu_xent\.fuse_lm_head: " + message):
        ours.fuse_lm_head(model)
    assert "forward" not in vars(model)


# fuse_lm_head: when it computes, and what it leaves alone -------------------------------------------------------------


def test_in_evaluation_and_without_labels_the_model_has_logits(transformers: ModuleType) -> None:
    model = build(transformers, use_cache=True)
    signature, ids = inspect.signature(model.forward), batch()["input_ids"]
    expected = model.eval()(**batch())
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
    with ours.fuse_lm_head(model), Calls() as calls:
        assert inspect.signature(model.forward) == signature
        found = model(**batch())
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)
        model.train()
        assert torch.equal(model(input_ids=ids).logits, expected.logits)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)
        assert torch.equal(model.lm_head(torch.ones(32)), nn.functional.linear(torch.ones(32), model.lm_head.weight))
    assert calls == (0, 0)
    with ours.fuse_lm_head(model.eval(), when="always"):
        assert step(model).calls == (1, 0)
    with ours.fuse_lm_head(model), ours.patch_transformers():
        assert step(model).calls == (0, 1)


def test_copies_are_models_of_their_own(transformers: ModuleType) -> None:
    model = build(transformers)
    handle = ours.fuse_lm_head(model)
    expected = step(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(step(other), expected)
    handle.remove()
    assert step(other).calls == (1, 0)
    assert step(model).calls == (0, 0)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_with_labels_is_the_models(name: str, transformers: ModuleType) -> None:
    """Also of models without a type of loss of their own, such as GPT-2."""
    model = build(transformers, name).eval()
    expected = model(**batch()).loss
    with ours.fuse_lm_head(model), Calls() as calls:
        assert torch.equal(model(**batch()).loss, expected)
    assert calls == (0, 0)


def test_fuse_again_after_the_head_was_replaced(transformers: ModuleType) -> None:
    model = build(transformers)
    first = ours.fuse_lm_head(model)
    model.resize_token_embeddings(CLASSES + 8)
    second = ours.fuse_lm_head(model)
    assert step(model).calls == (1, 0)
    first.remove()  # which was removed by the second
    assert step(model).calls == (1, 0)
    second.remove()
    assert step(model).calls == (0, 0)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.get_output_embeddings())


def test_losses_of_one_model_are_restored_in_any_order(transformers: ModuleType) -> None:
    model = build(transformers)
    before = model.loss_function
    for later in (ours.patch_transformers, ours.fuse_lm_head):
        first, second = ours.patch_transformers(model), later(model)
        first.remove()
        second.remove()
        assert model.loss_function == before


def test_a_loss_of_this_model_alone_stays_in_evaluation(transformers: ModuleType) -> None:
    model = build(transformers)
    ours.patch_transformers(model)
    handle = ours.fuse_lm_head(model)
    assert step(model).calls == (1, 0)
    assert step(model.eval()).calls == (0, 1)
    handle.remove()
    assert step(model.train()).calls == (0, 1)


def test_labels_on_another_device(transformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a model whose layers are on several devices."""
    model, labels = build(transformers).to("meta"), batch()["labels"]

    def forward(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.lm_head(torch.ones(*input_ids.shape, 32, device="meta"))
        return {"loss": self.loss_function(logits, labels, CLASSES, torch.tensor(7, device="meta"))}

    monkeypatch.setattr(type(model), "forward", forward)
    assert model(labels, labels)["loss"].is_meta
    ours.fuse_lm_head(model)
    assert model(labels, labels)["loss"].is_meta


def test_a_loaded_model_is_not_fused_until_asked(transformers: ModuleType, tmp_path: Path) -> None:
    model = build(transformers)
    expected = step(model)
    ours.fuse_lm_head(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    found = step(loaded)
    assert found.calls == (0, 0)
    assert_equal(found, expected)
    ours.fuse_lm_head(loaded)
    assert step(loaded).calls == (1, 0)
    assert step(model).calls == (1, 0)


def test_remove_restores_the_model(transformers: ModuleType) -> None:
    model = build(transformers)
    before = [{*vars(m)} for m in (model, model.lm_head)]
    handle = ours.fuse_lm_head(model)
    handle.remove()
    handle.remove()
    assert [{*vars(m)} - {"_npu_xent_fused"} for m in (model, model.lm_head)] == before
    handle = ours.fuse_lm_head(model)
    fused = model.forward

    @functools.wraps(fused)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return fused(*args, **kwargs)

    model.forward = forward
    assert step(model).calls == (1, 0)
    handle.remove()
    assert model.forward is forward
    assert step(model).calls == (0, 0)


def test_an_error_in_the_forward_leaves_the_model_usable(transformers: ModuleType) -> None:
    model = build(transformers)
    expected = step(model)
    ours.fuse_lm_head(model)
    for wrong in (
        {"labels": torch.full((2, 12), CLASSES)},
        {"labels": torch.zeros(2, 11, dtype=torch.int64)},
        {"input_ids": torch.full((2, 12), -1)},
    ):
        with pytest.raises((IndexError, ValueError)):
            model(**{**batch(), **wrong})
    assert_equal(step(model), expected)
    assert model(input_ids=batch()["input_ids"]).logits.shape == (2, 12, CLASSES)


# fuse_lm_head: what it refuses ----------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def without_labels(self: Any, input_ids: Tensor) -> None: ...


def test_models_that_cannot_be_fused(transformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(transformers)
    with pytest.raises(ValueError, match='when must be "training" or "always"'):
        ours.fuse_lm_head(model, when="evaluation")  # type: ignore[arg-type]
    model.loss_function = lambda logits, labels, **kw: logits.sum()
    with pytest.raises(TypeError, match="must be transformers' ForCausalLMLoss or ForMaskedLMLoss"):
        ours.fuse_lm_head(model)

    model = build(transformers)
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    with pytest.raises(TypeError, match=r"must be an nn\.Linear itself, but is .*ParametrizedLinear"):
        ours.fuse_lm_head(model)

    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        model = build(transformers)
        hook = getattr(model.lm_head, register)(lambda *_: None)
        with pytest.raises(ValueError, match="the head has a hook"):
            ours.fuse_lm_head(model)
        hook.remove()
        ours.fuse_lm_head(model)
        getattr(model.lm_head, register)(lambda *_: None)
        with pytest.raises(ValueError, match="the head has a hook"):
            model(**batch())

    model = build(transformers)
    model.forward = lambda **_: None
    with pytest.raises(ValueError, match="the forward of the model has been replaced already"):
        ours.fuse_lm_head(model)
    model = build(transformers)
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="the forward of the head has been replaced already"):
        ours.fuse_lm_head(model)
    model = build(transformers)
    monkeypatch.setattr(type(model), "forward", without_labels)
    with pytest.raises(TypeError, match="forward has no parameter labels"):
        ours.fuse_lm_head(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda x: x.view(-1, CLASSES), r"uses \.view of its logits"),
        (lambda x: x[..., :50], "indexes its logits"),
        (lambda x: x + 1, "adds to its logits"),
        (lambda x: 1 - x, "adds to its logits"),
        (lambda x: x * torch.tensor(2.0), "multiplies by a tensor its logits"),
        (lambda x: x / torch.tensor(2.0), "divides by a tensor or by 0 its logits"),
        (lambda x: torch.tensor(2.0) * x, "calls torch.Tensor.* with its logits"),
        (lambda x: x.tanh().tanh(), "takes tanh twice of its logits"),
        (lambda x: torch.softmax(x, -1), "calls torch.softmax with its logits"),
        (lambda x: x.to(torch.bfloat16), "converts to torch.bfloat16 its logits"),
        (lambda x: x.__setitem__(0, 0), "writes into its logits"),
    ],
)
def test_other_uses_of_the_logits_raise(
    use: Callable[[Any], Any], message: str, transformers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(transformers)
    original = type(model).forward

    def forward(self: Any, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return use(logits)

    monkeypatch.setattr(type(model), "forward", forward)
    ours.fuse_lm_head(model)
    with pytest.raises((RuntimeError, AttributeError), match=r"npu_xent\.fuse_lm_head: LlamaForCausalLM " + message):
        model(**batch())
    monkeypatch.setattr(type(model), "forward", original)


def test_operations_that_the_formula_knows() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    x = hidden @ weight.T
    for formula in (
        lambda x: x * 2 / 3,
        lambda x: 0.5 * x.float().contiguous(),
        lambda x: torch.tanh(x / 3) * 3,
        lambda x: 3 * nn.functional.tanh(x.to(torch.float32) * 2 / 3) / 2,
    ):
        options = formula(Logits(hidden, 5, "a model")).options()
        scaled = options["logit_scale"] * x
        cap = options.get("softcap")
        found = scaled if cap is None else cap * torch.tanh(scaled / cap)
        torch.testing.assert_close(found, formula(x))
    logits = Logits(hidden, 5, "a model")
    assert logits.shape == (3, 5)
    assert logits.to(logits.device, non_blocking=True) is logits
    assert not hasattr(logits, "logsumexp")


def test_calls_that_cannot_be_fused(transformers: ModuleType) -> None:
    model = build(transformers)
    ours.fuse_lm_head(model)
    with pytest.raises(RuntimeError, match="returns a tuple"):
        model(**batch(), return_dict=False)
    model.config.vocab_size = 95
    with pytest.raises(ValueError, match="the head has 96 classes, but vocab_size is 95"):
        model(**batch())
    model = build(transformers)
    ours.fuse_lm_head(model)
    model.lm_head = copy.deepcopy(model.lm_head)
    with pytest.raises(RuntimeError, match="has not computed a loss by its loss_function and the head that was fused"):
        model(**batch())
    model = build(transformers)
    ours.fuse_lm_head(model)
    fused = model.lm_head.forward
    model.lm_head.forward = lambda x: fused(x) * 1.0
    with pytest.raises(RuntimeError, match="a hook on the head changes the loss that it returns"):
        model(**batch())


# Trainer, PEFT, accelerate, DDP, FSDP ---------------------------------------------------------------------------------


def train(transformers: ModuleType, model: Any, folder: Path, **options: Any) -> tuple[list[float], Calls, Any]:
    """Three steps of two accumulated batches; the losses that Trainer logs, and the calls of npu_xent."""
    original("accelerate")
    names = ("compute_loss_func", "compute_metrics")
    of_trainer = {name: options.pop(name) for name in names if name in options}
    ids = torch.randint(1, CLASSES, (12, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": x, "labels": x.masked_fill(torch.arange(12) < n % 5, -100)} for n, x in enumerate(ids)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], **of_trainer)
    with Calls() as calls:
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], calls, trainer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_trainer(options: dict[str, Any], transformers: ModuleType, tmp_path: Path) -> None:
    model = build(transformers)
    expected, own, _ = train(transformers, model, tmp_path, **options)
    fused = build(transformers)
    ours.fuse_lm_head(fused)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    losses, calls, trainer = train(transformers, fused, tmp_path, **options, compute_metrics=metrics)
    assert (own, calls) == ((0, 0), (6, 0))
    tolerance = 2e-2 if "bf16" in options else 1e-5
    assert len(expected) == 3
    assert losses == pytest.approx(expected, rel=tolerance)
    before = dict(build(transformers).named_parameters())
    for (name, mine), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        moved = (theirs - before[name]).norm()
        assert moved > 0
        assert (mine - theirs).norm() <= (0.3 if "bf16" in options else 1e-3) * moved, name
    trainer.evaluate()
    assert seen == [(4, 12, CLASSES)]


def test_trainer_with_label_smoothing(transformers: ModuleType, tmp_path: Path) -> None:
    expected, _, _ = train(transformers, build(transformers), tmp_path, label_smoothing_factor=0.1)
    model = build(transformers)
    ours.fuse_lm_head(model)
    with pytest.warns(UserWarning, match=r"label_smoothing_factor at 0 and pass .*\.compute_loss_func") as said:
        losses, calls, _ = train(transformers, model, tmp_path, label_smoothing_factor=0.1)
    assert sum("fuse_lm_head" in str(w.message) for w in said) == 1
    assert calls == (0, 0)
    assert losses == pytest.approx(expected, rel=1e-6)
    served = ours.compute_loss_func(0.1)
    losses, calls, _ = train(transformers, build(transformers), tmp_path, compute_loss_func=served)
    assert calls == (0, 6)
    assert losses == pytest.approx(expected, rel=1e-5)
    masked = ours.compute_loss_func(shift=False)(([x := torch.randn(2, 3, 7)]), y := torch.tensor([[1, 2, -100]] * 2))
    torch.testing.assert_close(masked, nn.functional.cross_entropy(x.flatten(0, 1), y.flatten()))


def lora(model: Any, **options: Any) -> Any:
    peft = original("peft")
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_on_the_backbone(transformers: ModuleType) -> None:
    expected = step(lora(build(transformers)))
    before, after = build(transformers), lora(build(transformers))
    ours.fuse_lm_head(before)
    ours.fuse_lm_head(after)
    for model in (lora(before), after):
        fused = step(model)
        assert fused.calls == (1, 0)
        assert_equal(fused, expected)
        assert len(fused.gradients) == 4
    patched = lora(build(transformers))
    with ours.patch_transformers(patched):
        assert step(patched).calls == (0, 1)
    assert step(patched).calls == (0, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_peft_on_the_head_raises(options: dict[str, Any], transformers: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Linear itself, but is peft\."):
        ours.fuse_lm_head(lora(build(transformers), **options))
    model = build(transformers)
    ours.fuse_lm_head(model)
    with pytest.raises((RuntimeError, AttributeError), match=r"npu_xent\.fuse_lm_head: LlamaForCausalLM "):
        lora(model, **options)(**batch())


def test_offloaded_weights(transformers: ModuleType) -> None:
    accelerate = original("accelerate")
    model = build(transformers)
    expected = model(**batch()).loss.detach()
    ours.fuse_lm_head(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad(), Calls() as calls:
        torch.testing.assert_close(model(**batch()).loss, expected, rtol=1e-5, atol=1e-5)
    assert calls == (1, 0)


def test_accelerate_unwraps_to_the_fused_model(transformers: ModuleType) -> None:
    accelerate = original("accelerate")
    model = build(transformers)
    ours.fuse_lm_head(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # Trainer's, of other tests
    try:
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare(model)
        assert step(prepared).calls == (1, 0)
        assert step(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)).calls == (1, 0)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_ddp_and_fsdp_on_two_ranks(transformers: ModuleType, tmp_path: Path) -> None:
    ranks = run_ranks(str(Path(__file__).with_name("transformers_ranks.py")), 2, tmp_path)
    for found in ranks:
        assert "the output_dtype of an FSDP policy" in found.pop("fsdp output dtype")["error"]
        assert len(found) == 6
        for case, of in found.items():
            bf16 = "bf16" in case
            assert of["calls"] == [0, 0, 2, 0], case
            assert of["found"] == pytest.approx(of["losses"], rel=1e-3 if bf16 else 1e-5), case
            assert of["largest"] > 1e-2
            assert of["off"] <= (2**-6 * of["largest"] if bf16 else 1e-5), case
            assert of["parameters"] == (20 if "tied" in case else 21)
    assert ranks[0]["fsdp"]["losses"] != ranks[1]["fsdp"]["losses"]
    if FSDP2_AVERAGES_ON_GLOO:
        assert ranks[0]["fsdp"]["losses"] == pytest.approx(ranks[0]["ddp"]["losses"], rel=1e-5)


def test_there_are_no_warnings(transformers: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(transformers)
        with ours.fuse_lm_head(model), ours.patch_transformers():
            step(model)
            step(model, num_items_in_batch=3)
            model(input_ids=batch()["input_ids"])
