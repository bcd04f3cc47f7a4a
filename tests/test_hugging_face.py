"""Models of Hugging Face under patch_torch, with tiny random weights: losses and gradients are torch's."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from originals import the_original
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import npu_xent

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
# Without a cache, which torch 2.7 cannot trace.
DECODER = {**SIZE, "num_key_value_heads": 2, "head_dim": 16, "use_cache": False}
GPT2 = {"use_cache": False, "vocab_size": CLASSES, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
T5 = {"use_cache": False, "vocab_size": CLASSES, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


class Model(NamedTuple):
    """A class, its configuration, the targets that it takes, and how many losses it adds."""

    config: str
    options: dict[str, Any]
    targets: str = "labels"
    losses: int = 1


MODELS = {
    "LlamaForCausalLM": Model("LlamaConfig", {**DECODER, **TOKENS}),
    "Qwen3ForCausalLM": Model("Qwen3Config", {**DECODER, **TOKENS}),
    "Gemma2ForCausalLM": Model("Gemma2Config", {**DECODER, **TOKENS}),
    "GPT2LMHeadModel": Model("GPT2Config", {**GPT2, **TOKENS}),
    "BertForMaskedLM": Model("BertConfig", SIZE),
    "BertForQuestionAnswering": Model("BertConfig", SIZE, "positions", losses=2),
    "BertForTokenClassification": Model("BertConfig", {**SIZE, "num_labels": 7}, "classes"),
    "T5ForConditionalGeneration": Model("T5Config", {**T5, **TOKENS, "decoder_start_token_id": 0}),
}


def load_transformers() -> ModuleType:
    """The library, which would import an installed torch_npu, without which these tests run and CANN may be missing."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name == "torch_npu" else find_spec(name, package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find)
        module = importlib.import_module("transformers")
        for name in MODELS:  # their modules are imported when they are first asked for
            getattr(module, name)
    return module


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return the_original(load_transformers)


@pytest.fixture(autouse=True)
def no_compiled_code_is_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Step(NamedTuple):
    """A training step: its loss, the gradients of all parameters, and how often it called our operator."""

    loss: Tensor
    gradients: dict[str, Tensor]
    calls: int


def model_of(transformers: ModuleType, name: str, **options: Any) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model with random weights, and its inputs."""
    torch.manual_seed(0)
    config = getattr(transformers, MODELS[name].config)(**{**MODELS[name].options, **options})
    model = getattr(transformers, name)(config).eval()
    tokens = torch.randint(1, CLASSES, (2, 12))
    labels = tokens.clone()
    labels[0, :4] = -100
    targets = {
        "labels": {"labels": labels},
        "classes": {"labels": labels % 7},
        "positions": {"start_positions": torch.tensor([1, 5]), "end_positions": torch.tensor([2, 40])},  # 40: ignored
    }
    return model, {"input_ids": tokens, **targets[MODELS[name].targets]}


def step(model: torch.nn.Module, inputs: dict[str, Tensor], run: Callable[..., Any]) -> Step:
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        loss = run(**inputs).loss
        loss.backward()
    calls = sum(event.name == "npu_xent::row_stats_grad" for event in recorded.events())
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), gradients, calls)


def assert_torchs(actual: Step, expected: Step, model: Model) -> None:
    assert expected.calls == 0
    assert actual.calls == model.losses
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.gradients.values())
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual.gradients, expected.gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_torchs(name: str, transformers: ModuleType) -> None:
    model, inputs = model_of(transformers, name)
    expected = step(model, inputs, model)
    with npu_xent.patch_torch():
        actual = step(model, inputs, model)
    assert_torchs(actual, expected, MODELS[name])
    assert step(model, inputs, model).calls == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, backend", [*((name, "aot_eager") for name in MODELS), ("BertForMaskedLM", "inductor")])
def test_compiled_models(name: str, backend: str, transformers: ModuleType) -> None:
    options = {"num_hidden_layers": 0} if backend == "inductor" else {}  # it compiles each of their kernels by g++
    model, inputs = model_of(transformers, name, **options)
    expected = step(model, inputs, model)
    whole = name != "GPT2LMHeadModel"  # which logs a warning, and so breaks its graph
    with npu_xent.patch_torch():
        compiled = torch.compile(model, backend=backend, fullgraph=whole)
        compiled(**inputs).loss.backward()
        actual = step(model, inputs, compiled)
    assert_torchs(actual, expected, MODELS[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForQuestionAnswering"])
def test_models_that_make_their_criterion_in_the_forward_export(name: str, transformers: ModuleType) -> None:
    model, inputs = model_of(transformers, name)
    with npu_xent.patch_torch():
        exported = torch.export.export(model, (), inputs, strict=True)
    assert exported.graph_module.code.count("npu_xent.cross_entropy.default") == MODELS[name].losses
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**inputs).loss, model(**inputs).loss, rtol=1e-6, atol=1e-6)


def test_the_patch_is_gone() -> None:
    assert F.cross_entropy.__module__ == "torch.nn.functional"
