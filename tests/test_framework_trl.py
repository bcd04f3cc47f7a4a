"""patch_trl: TRL's functions and trainers give the same results with npu_xent's functions, which are really called."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks import TOLERANCE, Calls, compare, error, import_without_torch_npu, results
from torch import Tensor
from torch.autograd import forward_ad

from npu_xent.integrations.trl import patch_trl

for needed in ("trl", "accelerate", "datasets", "pandas"):  # trl's own dependencies
    pytest.importorskip(needed, reason=f"{needed} is not installed")

pytestmark = pytest.mark.cpu

PATCHED = (
    "_ChunkedLogProbFunction",
    "selective_log_softmax",
    "entropy_from_logits",
    "selective_log_softmax_and_entropy",
)
ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(scope="module")
def utils() -> types.ModuleType:
    return import_without_torch_npu("trl.trainer.utils")


@pytest.fixture
def patched() -> Iterator[Calls]:
    """The calls of our operators while TRL is patched."""
    with patch_trl(), Calls() as calls:
        yield calls


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    made = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).requires_grad_()


def indices(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


# The fused head -------------------------------------------------------------------------------------------------------


def head(
    utils: types.ModuleType, targets: Tensor, outputs: tuple[str, ...], temperature: Any = 1.0, *options: Any
) -> Callable[..., Any]:
    """TRL's head, in narrower chunks than there are classes. The options are softcap and scale."""
    softcap, scale = options or (None, 1.0)
    return lambda hidden, weight, bias=None: utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, 32, softcap, scale, outputs
    )


def true_head(
    targets: Tensor, outputs: tuple[str, ...], temperature: float, softcap: float | None, scale: float
) -> Callable[..., Any]:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor | None]:
        z = scale * torch.nn.functional.linear(hidden, weight, bias)
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        log_probs = z.log_softmax(-1)
        picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        of = {
            "entropy": -(log_probs.exp() * log_probs).sum(-1),
            "mean_logits": z.mean(-1).detach(),
            "is_top1": z.argmax(-1) == targets,
        }
        return [picked, *(of.get(name) if name in outputs else None for name in ALL_OUTPUTS)]

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("bias", "options"),
    [(False, (1.0, None, 1.0)), (True, (0.7, None, 0.5)), (True, (1.3, 5.0, 2.0)), (False, (2, 30.0, -1.0))],
)
@pytest.mark.parametrize(
    "outputs",
    [
        ("log_probs", "entropy"),
        ("log_probs", "entropy", "is_top1"),
        ("log_probs", "entropy", "mean_logits", "is_top1"),
        ("log_probs",),
        ("mean_logits",),
    ],
    ids=["GRPO", "SFT", "DPO", "reference", "mean"],
)
def test_the_fused_head(
    utils: types.ModuleType, dtype: torch.dtype, bias: bool, options: Any, outputs: tuple[str, ...]
) -> None:
    temperature, softcap, scale = options
    draws = [
        [draw(37, 24, dtype=dtype, seed=3 * i), draw(101, 24, dtype=dtype, scale=0.4, seed=3 * i + 1)] for i in range(6)
    ]
    if bias:
        draws = [[*inputs, draw(101, dtype=dtype, seed=3 * i + 2)] for i, inputs in enumerate(draws)]
    targets = indices(37, classes=101)
    targets[:9] = (scale * torch.nn.functional.linear(*draws[0])[:9]).argmax(-1)
    function = head(utils, targets, outputs, *options)
    calls = {"linear_row_stats": 2 if "mean_logits" in outputs and softcap is not None else 1}
    truth = true_head(targets, outputs, temperature, softcap, scale)
    compare(patch_trl, function, truth, *draws, calls=calls, rounds=dtype is torch.bfloat16)


def test_the_fused_head_marks_what_is_differentiable(utils: types.ModuleType, patched: Calls) -> None:
    outputs = head(utils, indices(5, classes=7), ("entropy", "mean_logits", "is_top1"))(draw(5, 3), draw(7, 3))
    assert [x if x is None else (x.dtype, x.requires_grad) for x in outputs] == [
        (torch.float32, True),
        (torch.float32, True),
        None,
        (torch.float32, False),
        (torch.bool, False),
    ]
    with torch.inference_mode():
        assert not any(x.requires_grad for x in head(utils, indices(5, classes=7), ())(draw(5, 3), draw(7, 3))[:1])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_head_converts_as_trl_does(utils: types.ModuleType, dtypes: Any, autocast: bool) -> None:
    """Without autocast the dtype of the hidden states counts. Gradients have the dtypes of the tensors."""
    hidden, weight = draw(9, 24, dtype=dtypes[0]), draw(33, 24, dtype=dtypes[1], seed=1)
    targets, outputs = indices(9, classes=33), ("entropy", "mean_logits")

    def function(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return head(utils, targets, outputs)(*inputs)

    theirs = results(function, hidden, weight)
    with patch_trl(), Calls() as calls:
        ours = results(function, hidden, weight)
    assert calls.of == {"linear_row_stats": 1}
    if autocast:  # but the mean of the logits is computed in float32
        mean = true_head(targets, outputs, 1.0, None, 1.0)(hidden.detach().double(), weight.detach().double())[3]
        assert mean is not None
        assert ours[0][3] is not None
        assert error(ours[0][3], mean) <= TOLERANCE
    exact = dtypes[0] is torch.float32 and not autocast
    for original, found in zip([*theirs[0], *theirs[1]], [*ours[0], *ours[1]], strict=True):
        if original is not None:
            assert found.dtype is original.dtype
            assert error(found, original) <= (1e-2 if found.dtype is torch.bfloat16 or not exact else TOLERANCE)


def test_the_fused_head_ignores_minus_100(utils: types.ModuleType, patched: Calls) -> None:
    hidden, weight, targets = draw(4, 3), draw(5, 3, seed=1), torch.tensor([1, -100, 4, 0])
    log_probs, entropy, *_ = head(utils, targets, ("entropy",))(hidden, weight)
    assert (log_probs == 0).tolist() == (entropy == 0).tolist() == [False, True, False, False]
    with pytest.raises(IndexError):
        head(utils, torch.tensor([1, 5, 4, 0]), ())(hidden, weight)


LEFT_TO_TRL: dict[str, Callable[[types.ModuleType], Any]] = {
    "log_sum_sq_probs": lambda u: head(u, indices(5, classes=7), ("log_sum_sq_probs",))(draw(5, 3), draw(7, 3)),
    "all outputs": lambda u: u._ChunkedLogProbFunction.apply(
        draw(5, 3), draw(7, 3), None, indices(5, classes=7), 1.0, 32
    ),
    "float64": lambda u: head(u, indices(5, classes=7), ())(draw(5, 3).double(), draw(7, 3).double()),
    "no rows": lambda u: head(u, indices(0, classes=7), ())(draw(0, 3), draw(7, 3)),
    "temperature": lambda u: head(u, indices(5, classes=7), (), -1.0)(draw(5, 3), draw(7, 3)),
    "a tensor as temperature": lambda u: head(u, indices(5, classes=7), (), torch.tensor(2.0))(draw(5, 3), draw(7, 3)),
    "softcap 0": lambda u: head(u, indices(5, classes=7), (), 1.0, 0.0, 1.0)(draw(5, 3), draw(7, 3)),
    "logits [C]": lambda u: u.selective_log_softmax(draw(7), torch.tensor([3])),
    "a broadcast index": lambda u: u.selective_log_softmax(draw(2, 5, 7), indices(2, 1, 3, classes=7)),
    "a broadcast mask": lambda u: u.selective_log_softmax(
        draw(2, 5, 7), indices(2, 5, classes=7), row_mask=torch.tensor([[1], [0]])
    ),
    "a mask of several": lambda u: u.selective_log_softmax(
        draw(2, 5, 7), indices(2, 5, 3, classes=7), row_mask=torch.ones(2, 5, 3)
    ),
    "a tiny temperature": lambda u: u.selective_log_softmax(draw(2, 7), indices(2, classes=7), 1e-7),
    "several and entropy": lambda u: u.selective_log_softmax_and_entropy(draw(2, 0, 7), indices(2, 0, classes=7)),
    "no classes": lambda u: u.entropy_from_logits(draw(2, 0)),
    "torch.func": lambda u: torch.func.grad(lambda x: u.entropy_from_logits(x).sum())(draw(2, 7)),
    "meta": lambda u: u.entropy_from_logits(torch.empty(2, 7, device="meta")),
}


@pytest.mark.parametrize("case", LEFT_TO_TRL)
def test_what_is_left_to_trl(utils: types.ModuleType, case: str) -> None:
    """The same bits, or the same error, and none of our operators."""

    def run() -> list[Any]:
        try:
            returned = LEFT_TO_TRL[case](utils)
        except Exception as raised:
            return [type(raised), str(raised)]
        return list(returned) if isinstance(returned, tuple) else [returned]

    theirs = run()
    with patch_trl(), Calls() as calls:
        ours = run()
    assert not calls.of
    for original, found in zip(theirs, ours, strict=True):
        if isinstance(original, Tensor):
            assert original.dtype is found.dtype
            assert original.is_meta or torch.equal(original, found)
        else:
            assert original == found


def test_a_partitioned_head_is_left_to_trl(utils: types.ModuleType, patched: Calls) -> None:
    """DeepSpeed's parameters are whole only during the forward; TRL gathers them again in the backward."""
    weight = torch.nn.Parameter(draw(7, 3).detach())
    weight.ds_id = 0  # type: ignore[attr-defined]
    head(utils, indices(5, classes=7), ())(draw(5, 3), weight)
    assert not patched.of


def test_forward_mode_is_left_to_trl(utils: types.ModuleType, patched: Calls) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(draw(2, 7).detach(), torch.ones(2, 7))
        assert forward_ad.unpack_dual(utils.entropy_from_logits(dual)).tangent is not None
    assert not patched.of


# Logits ---------------------------------------------------------------------------------------------------------------


def true_selective(index: Tensor, temperature: float, mask: Tensor | None) -> Callable[[Tensor], list[Tensor]]:
    def function(logits: Tensor) -> list[Tensor]:
        log_probs = (logits / temperature).log_softmax(-1)
        one = index.dim() < logits.dim()
        picked = log_probs.gather(-1, index.unsqueeze(-1) if one else index)
        picked = picked.squeeze(-1) if one else picked
        return [picked if mask is None else picked.masked_fill(mask == 0, 0.0)]

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3])
@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 5, 3), (2, 5, 1)], ids=str)
def test_selective_log_softmax(
    utils: types.ModuleType, dtype: torch.dtype, temperature: float, shape: tuple[int, ...]
) -> None:
    several = len(shape) == 3
    rows, index = shape[:2] if several else shape, indices(*shape, classes=101)
    compare(
        patch_trl,
        lambda x: utils.selective_log_softmax(x, index, temperature),
        true_selective(index, temperature, None),
        *([draw(*rows, 101, dtype=dtype, scale=4, seed=i)] for i in range(4)),
        calls={"row_stats": 1},
        rounds=dtype in (torch.bfloat16, torch.float16),
    )


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_selective_log_softmax_with_a_mask(utils: types.ModuleType, mask_dtype: torch.dtype) -> None:
    index, mask = indices(2, 5, classes=101), torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).to(mask_dtype)
    logits, calls = draw(2, 5, 101), {"row_stats": 1}
    compare(
        patch_trl,
        lambda x: utils.selective_log_softmax(x, index, 0.9, mask),
        true_selective(index, 0.9, mask),
        [logits],
        calls=calls,
        rounds=False,
    )

    def true_both(x: Tensor) -> list[Tensor]:
        log_probs = (x / 0.9).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).masked_fill(mask == 0, 0.0)
        return [*true_selective(index, 0.9, mask)(x), entropy]

    compare(
        patch_trl,
        lambda x: utils.selective_log_softmax_and_entropy(x, index, True, 0.9, mask),
        true_both,
        [logits],
        calls=calls,
        rounds=False,
    )


def test_the_entropy_may_be_without_gradient(utils: types.ModuleType, patched: Calls) -> None:
    logits, index = draw(2, 5, 101), indices(2, 5, classes=101)
    log_probs, entropy = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
    assert log_probs.requires_grad
    assert not entropy.requires_grad
    assert utils.selective_log_softmax_and_entropy(logits, index)[1].requires_grad
    assert patched.of == {"row_stats": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (300,), (2, 5), (1, 2, 3)], ids=str)
def test_entropy_from_logits(utils: types.ModuleType, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def truth(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    compare(
        patch_trl,
        lambda x: utils.entropy_from_logits(x),
        truth,
        *([draw(*shape, 101, dtype=dtype, scale=2, seed=i)] for i in range(4)),
        calls={"row_stats": 1},
        rounds=dtype in (torch.bfloat16, torch.float16),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_results_are_float32_also_of_16_bits(utils: types.ModuleType, patched: Calls, dtype: torch.dtype) -> None:
    logits, index = draw(2, 5, 101, dtype=dtype), indices(2, 5, classes=101)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert utils.selective_log_softmax(logits, index).dtype is expected
    assert utils.selective_log_softmax(logits, index.unsqueeze(-1)).dtype is expected
    assert utils.entropy_from_logits(logits).dtype is expected
    assert {x.dtype for x in utils.selective_log_softmax_and_entropy(logits, index)} == {expected}
    assert patched.of == {"row_stats": 4}


@pytest.mark.parametrize("masked_class", [0, 3])
def test_masked_classes(utils: types.ModuleType, patched: Calls, masked_class: int) -> None:
    """Logits of -inf: the entropy is that of the other classes, and gradients are finite."""
    logits = draw(4, 7).detach()
    logits[:, masked_class] = -torch.inf
    logits.requires_grad_()
    entropy = utils.entropy_from_logits(logits)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    kept = [c for c in range(7) if c != masked_class]
    others = logits.detach()[:, kept].requires_grad_()
    expected = torch.distributions.Categorical(logits=others).entropy()
    assert error(entropy, expected) <= TOLERANCE
    assert error(gradient[:, kept], *torch.autograd.grad(expected.sum(), others)) <= TOLERANCE
    assert torch.equal(gradient[:, masked_class], torch.zeros(4))
    index = torch.full((4,), masked_class)
    assert torch.equal(utils.selective_log_softmax(logits, index), torch.full((4,), -torch.inf))


@pytest.mark.parametrize("label", [7, -1, -100])
def test_an_index_out_of_range_raises(utils: types.ModuleType, label: int) -> None:
    """Also -100, which neither function ignores."""
    logits, index = draw(2, 5, 7), torch.full((2, 5), label)
    with pytest.raises(RuntimeError, match="out of bounds"):
        utils.selective_log_softmax(logits, index)
    with patch_trl():
        for wrong in (index, index.unsqueeze(-1)):
            with pytest.raises(IndexError):
                utils.selective_log_softmax(logits, wrong)
        with pytest.raises(IndexError):
            utils.selective_log_softmax_and_entropy(logits, index)
    with pytest.raises(ValueError, match="temperature must be positive"), patch_trl():
        utils.selective_log_softmax(logits, index, 0.0)


def test_the_logits_are_not_overwritten(utils: types.ModuleType, patched: Calls) -> None:
    logits, index = draw(2, 5, 7), indices(2, 5, classes=7)
    before = logits.detach().clone()
    (utils.selective_log_softmax(logits, index, 0.5).sum() + utils.entropy_from_logits(logits).sum()).backward()
    assert torch.equal(logits.detach(), before)


# The patch ------------------------------------------------------------------------------------------------------------


def test_names_are_replaced_and_restored(utils: types.ModuleType) -> None:
    """Also those that trainers imported, before the patch and under it."""
    before = importlib.import_module("trl.experimental.sdft.loss_utils")
    originals = {name: getattr(utils, name) for name in PATCHED}
    handle = patch_trl()
    late = importlib.import_module("trl.experimental.sdpo.loss_utils")
    assert all(getattr(utils, name) is not original for name, original in originals.items())
    assert before.selective_log_softmax is late.selective_log_softmax is utils.selective_log_softmax
    patch_trl().remove()  # patches nest: the replacements have the signatures of what they replace
    handle.remove()
    assert {name: getattr(utils, name) for name in PATCHED} == originals
    assert before.selective_log_softmax is late.selective_log_softmax is utils.selective_log_softmax


@pytest.mark.parametrize("name", PATCHED)
def test_another_signature_raises(utils: types.ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor) -> Tensor:
            return hidden

    def changed(logits: Tensor, other: int) -> None: ...

    monkeypatch.setattr(utils, name, Changed if name.startswith("_") else changed)
    with pytest.raises(RuntimeError, match=rf"patch_trl: trl .* has trl\.trainer\.utils\.{name}\(.*tried with trl 1\."):
        patch_trl()
    assert not any("npu_xent" in getattr(utils, other).__module__ for other in PATCHED)


@pytest.mark.parametrize("which", ["head", "selective", "entropy"])
def test_compilers_find_the_replacement(utils: types.ModuleType, which: str) -> None:
    """In whole graphs, with the same results as without a compiler."""
    targets = indices(6, classes=33)
    functions = {
        "head": head(utils, targets, ("entropy", "is_top1"), 0.7),
        "selective": lambda x, w: utils.selective_log_softmax(x @ w.T, targets, 0.7),
        "entropy": lambda x, w: utils.entropy_from_logits(x @ w.T),
    }
    function, hidden, weight = functions[which], draw(6, 8), draw(33, 8, seed=1)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with patch_trl():
        eager = results(function, hidden, weight)
        found = results(torch.compile(function, backend=backend, fullgraph=True), hidden, weight)
    torch._dynamo.reset()
    assert len([name for name in graphs if "npu_xent" in name]) == 1
    for one, other in zip([*eager[0], *eager[1]], [*found[0], *found[1]], strict=True):
        assert one is other is None or (one is not None and other is not None and error(one, other) <= TOLERANCE)


# Trainers -------------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]


def sentences(step: int, length: int) -> list[str]:
    return [" ".join(WORDS[3 + (step * i + j) % 61] for j in range(length)) for i in range(8)]


PROMPT, CHOSEN = sentences(7, 5), sentences(5, 4)
TRAINERS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # The rows of the data set, more of the configuration, and the calls of two steps: for DPO and KTO also of the
    # reference, and because of the softcap of the mean of the logits; KTO's divergence takes two more.
    "SFT": ({"text": CHOSEN}, {}, 2),
    "DPO": ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": sentences(11, 6)}, {}, 6),
    "KTO": ({"prompt": PROMPT, "completion": CHOSEN, "label": [i % 2 == 0 for i in range(8)]}, {}, 12),
    "GRPO": ({"prompt": PROMPT}, {"num_generations": 4, "max_completion_length": 5}, 2),
    "RLOO": ({"prompt": PROMPT}, {"num_generations": 4, "max_completion_length": 5, "beta": 0.0}, 4),
}


def small_model() -> Any:
    """A model with a softcap."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
            final_logit_softcapping=5.0,
            attn_implementation="eager",
        )
    )


def tokenizer() -> Any:
    tokenizers = importlib.import_module("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def different_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def train(name: str, folder: Path) -> tuple[list[dict[str, float]], list[Tensor]]:
    """What two steps of the trainer log, and the parameters after them."""
    rows, options, _ = TRAINERS[name]
    module = import_without_torch_npu(f"trl.trainer.{name.lower()}_trainer", f"trl.trainer.{name.lower()}_config")
    trl = importlib.import_module("trl")
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=0.5,
        optim="sgd",  # Adam would make large differences of small gradients
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    more: dict[str, Any] = {"ref_model": small_model()} if name in ("DPO", "KTO") else {}
    if "num_generations" in options:
        more["reward_funcs"] = different_words
    data = importlib.import_module("datasets").Dataset.from_dict(rows)
    trainer = getattr(module, f"{name}Trainer")(
        model=small_model(), args=arguments, train_dataset=data, processing_class=tokenizer(), **more
    )
    trainer.train()
    kept = [
        {key: value for key, value in log.items() if not any(word in key for word in ("time", "per_second", "runtime"))}
        for log in trainer.state.log_history
    ]
    return kept, [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, utils: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, entropies and all else that is logged, and the parameters after two steps."""
    fingerprint = importlib.import_module("datasets.fingerprint")
    # datasets cannot always hash a table, and nothing is cached here.
    random = lambda _: fingerprint.generate_random_fingerprint()  # noqa: E731
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", random)
    with torch.random.fork_rng():
        logs, parameters = train(name, tmp_path / "theirs")
        with patch_trl(), Calls() as calls:
            our_logs, our_parameters = train(name, tmp_path / "ours")
    assert calls.of == {"linear_row_stats": TRAINERS[name][2]}
    assert len(logs) == 3
    assert "entropy" in logs[0]
    for log, ours in zip(logs, our_logs, strict=True):
        assert ours == pytest.approx(log, rel=1e-4, abs=1e-5)
    for one, other in zip(parameters, our_parameters, strict=True):
        assert error(other, one) <= TOLERANCE
