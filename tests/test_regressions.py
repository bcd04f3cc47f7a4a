"""Mistakes that were made once: each test failed before its mend."""

from __future__ import annotations

import pickle
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from reference import INF, NAN, assert_same_bits, make_logits, make_target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import npu_xent
from npu_xent import compat, distributed
from npu_xent.compat import mindformers, unit_scaling


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that may be consumed, and targets."""
    return make_logits(9, 21, dtype, device).requires_grad_() * 1, make_target(9, 21, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_consumed_logits_must_not_be_written_before_the_backward(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = make(device, dtype)
    loss = npu_xent.cross_entropy(logits, target, consume_logits=True)
    with torch.no_grad():
        logits.mul_(100)
    with pytest.raises(RuntimeError, match=r"written since|modified by an inplace operation"):
        loss.backward()


def test_logits_can_be_consumed_once(device: torch.device) -> None:
    logits, target = make(device)
    losses = [npu_xent.cross_entropy(logits, target, consume_logits=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="written since"):
        losses[0].backward()


def test_a_shard_cannot_start_where_its_end_would_wrap_round(device: torch.device) -> None:
    weight = torch.ones(10, device=device)
    row, target = torch.zeros(1, 5, device=device), torch.zeros(1, dtype=torch.long, device=device)
    for num_classes in (10, None):
        with pytest.raises(ValueError, match="must lie within num_classes"):
            torch.ops.npu_xent.row_stats(
                row, target, weight, class_start=2**63 - 5 + (num_classes is None), num_classes=num_classes
            )


def test_broken_constraints_travel_between_processes(device: torch.device) -> None:
    with pytest.raises(npu_xent.ConstraintError) as caught:
        npu_xent.npu_cross_entropy_loss(torch.zeros(3, 0, device=device), torch.zeros(3, device=device).long())
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("value", [2**64 - 100, 2**63])
def test_unsigned_targets_do_not_wrap_round_to_ignore_index(value: int) -> None:
    target = torch.tensor([value], dtype=torch.uint64)
    with pytest.raises(IndexError):
        npu_xent.cross_entropy(torch.zeros(1, 5), target)
    assert npu_xent.cross_entropy(torch.zeros(1, 5), torch.tensor([3], dtype=torch.uint64)).isfinite()


def test_probabilities_take_the_same_dtypes_and_shapes(device: torch.device) -> None:
    logits, q = torch.zeros(3, 4, device=device), torch.full((3, 4), 0.25, device=device)
    with pytest.raises(TypeError, match="logits must be"):
        npu_xent.cross_entropy(logits.long(), q)
    with pytest.raises(TypeError, match="weight must be float32"):
        npu_xent.cross_entropy(logits, q, torch.ones(4, device=device).half())
    with pytest.raises(ValueError, match="weight must have one value"):
        npu_xent.cross_entropy(logits, q, torch.ones(3, device=device))
    with pytest.raises(RuntimeError, match="weight requires a gradient"):
        npu_xent.cross_entropy(logits, q, torch.ones(4, device=device).requires_grad_())
    for shape in ((3, 0), (0,), (3, 0, 2)):
        with pytest.raises(ValueError, match="at least one class"):
            npu_xent.cross_entropy(torch.zeros(shape, device=device), torch.zeros(shape, device=device))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_composite_tells_who_saved_the_logits(
    reduction: str, device: torch.device, composite: type[TorchDispatchMode]
) -> None:
    """tanh saved its output, which the loss overwrites: its own backward must see a new version."""
    leaf, target = make(device)
    logits = leaf.detach().requires_grad_().tanh()
    with composite():
        loss = npu_xent.cross_entropy(logits, target, reduction=reduction, consume_logits=True).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_is_no_tensor_is_named(device: torch.device) -> None:
    logits, target = torch.zeros(3, 4, device=device), torch.zeros(3, dtype=torch.long, device=device)
    for function in (npu_xent.cross_entropy, npu_xent.npu_cross_entropy_loss):
        for wrong in ({"input": [[0.0]]}, {"target": [0, 1, 2]}, {"weight": [1.0] * 4}, {"reduction": None}):
            with pytest.raises(TypeError, match=rf"{function.__name__}: {next(iter(wrong))} must be"):
                function(**{"input": logits, "target": target} | wrong)


def test_shapes_that_are_often_meant_get_a_hint(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"class indices are integers, and this target is torch\.float32"):
        npu_xent.cross_entropy(torch.zeros(4, 7, device=device), torch.zeros(4, device=device))
    with pytest.raises(ValueError, match=r"input\.flatten\(0, -2\), target\.flatten\(\)"):
        npu_xent.cross_entropy(torch.zeros(2, 5, 7, device=device), torch.zeros(2, 5, device=device).long())


def loss(device: torch.device, **options: Any) -> Tensor:
    logits, target = make(device)
    return npu_xent.cross_entropy(logits, target, **options)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"ignore_index": torch.tensor(0.9)}, TypeError, "ignore_index must be an integer, but is a Tensor of"),
        ({"ignore_index": np.array(1.5)}, TypeError, "ignore_index must be an integer, but is a ndarray"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must fit in a signed 64-bit integer, but has 64 bits"),
        ({"ignore_index": 10**5000}, ValueError, "ignore_index must fit in a signed 64-bit integer"),
        ({"label_smoothing": 10**400}, ValueError, "label_smoothing must be within the range of float64"),
        ({"softcap": np.array([1.0, 2.0])}, TypeError, "softcap must be a number, but is a ndarray"),
        ({"softcap": torch.tensor(1j)}, TypeError, r"softcap must be a number, but is a Tensor of torch\.complex64"),
        ({"lse_square_scale": torch.tensor(0.1, device="meta")}, TypeError, "lse_square_scale must be a number"),
    ],
)
def test_numbers_that_do_not_convert_are_named(
    options: dict[str, Any], error: type[Exception], words: str, device: torch.device
) -> None:
    """Tensors and arrays lost their fractions; the others raised torch's RuntimeError about the schema."""
    with pytest.raises(error, match=words):
        loss(device, **options)
    with pytest.raises(error, match=words):
        npu_xent.CrossEntropyLoss(**options)


@pytest.mark.parametrize("value", [np.float16(0.5), Fraction(1, 2), Decimal("0.5")], ids=str)
@pytest.mark.parametrize("name", ["label_smoothing", "lse_square_scale", "logit_scale", "softcap"])
def test_numbers_of_other_types_are_numbers(name: str, value: Any, device: torch.device) -> None:
    """Also where torch operations compute the loss, which took no Fraction and no Decimal."""
    logits, target = make_logits(5, 7, torch.float32, device), make_target(5, 7, device)
    q = logits.softmax(1).bfloat16()
    for second in (target, q):
        assert_same_bits(
            npu_xent.cross_entropy(logits, second, **{name: value}),
            npu_xent.cross_entropy(logits, second, **{name: 0.5}),
        )


@pytest.mark.parametrize(
    "logits, target, hint",
    [
        (torch.zeros(12, 5), torch.zeros(2, 6).long(), "[12, 5] and target [2, 6]; pass target.flatten()"),
        (torch.zeros(12, 5), torch.zeros(12, 1).long(), "[12, 5] and target [12, 1]; pass target.flatten()"),
        (torch.zeros(2, 6, 5), torch.zeros(12).long(), "for classes last, flatten input too: input.flatten(0, -2)"),
        (torch.zeros(12, 5), torch.zeros(3, 6).long(), "but input has [12, 5] and target [3, 6]"),
        (torch.zeros(3, 5), torch.zeros(3, 5).bool(), "probabilities are floating point: target.float()"),
        (torch.zeros(12).long(), torch.zeros(12, 5), "input is torch.int64 and target torch.float32, so they may be s"),
        (torch.zeros(2, 6).long(), torch.zeros(2, 6, 5), "so they may be swapped"),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_shapes_that_do_not_go_together_are_both_named(
    logits: torch.Tensor, target: torch.Tensor, hint: str, device: torch.device
) -> None:
    """With the way out of each usual mistake."""
    with pytest.raises(ValueError, match=r"npu_xent\.cross_entropy: target must have the shape of input .*") as caught:
        npu_xent.cross_entropy(logits.to(device), target.to(device))
    assert hint in str(caught.value)


@pytest.mark.parametrize("flag", [0, 1, np.True_, np.False_, torch.tensor(True)], ids=repr)
def test_flags_may_be_bools_of_other_types(flag: Any, device: torch.device) -> None:
    """Some raised torch's RuntimeError about the schema."""
    logits, target = make_logits(5, 7, torch.float32, device), make_target(5, 7, device)
    out = npu_xent.cross_entropy(logits, target, return_lse=flag, return_z_loss=True)
    assert (out.lse is not None) == bool(flag)
    out = npu_xent.token_log_probs(logits, target, return_entropy=flag, return_top1=True)
    assert (out.entropy is not None) == bool(flag)
    weight = torch.ones(3, 7, device=device)
    out = npu_xent.linear_cross_entropy(logits, weight, target % 3, return_lse=flag, return_z_loss=True)
    assert (out.lse is not None) == bool(flag)
    *_, zloss, _ = npu_xent.npu_cross_entropy_loss(logits, target, return_zloss=flag, strict=False)
    assert len(zloss) == bool(flag)


@pytest.mark.cpu
@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_temperatures_of_selected_classes_are_checked(bad: float) -> None:
    """They are those of rows that count as ignored to the sweeps."""
    logits, index = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"temperature\[1\] is .*, but must be positive and finite"):
        npu_xent.selected_log_probs(logits, index, temperature=torch.tensor([1.0, bad]))


@pytest.mark.cpu
def test_temperatures_with_the_negative_bit_are_read_as_they_are() -> None:
    temperature = torch.tensor([2 - 2j]).conj().imag
    assert temperature.is_neg()
    assert temperature.is_contiguous()
    logits, index = torch.randn(1, 3), torch.zeros(1, 1, dtype=torch.long)
    expected = npu_xent.selected_log_probs(logits, index, temperature=temperature.clone().resolve_neg())
    assert_same_bits(npu_xent.selected_log_probs(logits, index, temperature=temperature), expected)


@pytest.mark.cpu
@pytest.mark.parametrize("of", ["input", "target", "weight"])
def test_freed_storages_are_not_read_by_torch_operations(of: str) -> None:
    """Probabilities in another dtype, one sample, and a product under autocast: torch read beyond the end."""
    shapes = {"input": (2, 3), "target": (2, 3), "weight": (3,)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    tensors["target"] = tensors["target"].bfloat16()
    tensors[of].untyped_storage().resize_(1)
    with pytest.raises(RuntimeError, match=f"{of} with shape .* needs"):
        npu_xent.cross_entropy(**tensors)
    one = {"input": torch.ones(3), "target": torch.tensor(1)}
    if of in one:
        one[of].untyped_storage().resize_(1)
        with pytest.raises(RuntimeError, match=f"{of} with shape .* needs"):
            npu_xent.cross_entropy(**one)
    layer = {"input": torch.ones(2, 3), "linear_weight": torch.ones(4, 3), "target": torch.tensor([1, 2])}
    freed = "linear_weight" if of == "weight" else of
    layer[freed].untyped_storage().resize_(1)
    for function in (npu_xent.linear_cross_entropy, npu_xent.linear_token_log_probs):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=f"{freed} with shape .* needs"):
            function(**layer)


def test_the_contract_has_two_dimensions(device: torch.device) -> None:
    """The operator reads [B, R, C] as well."""
    words = r"logits must have shape \[N, C\], .*; flatten them, and target, .* or call npu_xent\.cross_entropy"
    with pytest.raises(ValueError, match=words):
        npu_xent.npu_cross_entropy_loss(
            torch.zeros(1, 3, 4, device=device), torch.zeros(3, device=device).long(), strict=False
        )


def test_probabilities_of_no_class_and_of_another_device() -> None:
    """F.linear takes tensors of two devices if they have no rows."""
    x, q = torch.zeros(0, 2), torch.zeros(0, 3)
    words = (
        "npu_xent: linear_weight must be on the device of input, cpu, but is on meta; move it with linear_weight.to("
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(words)}input\.device\)\.$"):
        npu_xent.linear_cross_entropy(x, torch.zeros(3, 2, device="meta"), q)
    with pytest.raises(ValueError, match="at least one class"):
        npu_xent.linear_cross_entropy(torch.zeros(2, 2), torch.zeros(0, 2), torch.zeros(2, 0))


@pytest.mark.cpu
def test_bool_options_are_left_to_torch() -> None:
    """F.cross_entropy takes no bool for a number, under patch_torch either."""
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with npu_xent.patch_torch(), pytest.raises(TypeError, match="must be int, not bool"):
        torch.nn.functional.cross_entropy(logits, target, ignore_index=True)


@pytest.mark.parametrize("wrong", [None, 3, [0.0], "x"], ids=str)
def test_what_is_no_tensor_is_named_in_compat(wrong: Any, device: torch.device) -> None:
    """It raised AttributeError."""
    logits, target = torch.zeros(3, 4, device=device), torch.zeros(3, dtype=torch.long, device=device)
    mask, mindformers = torch.ones(3, device=device), compat.mindformers.CrossEntropyLoss()
    for function, names, tensors in (
        (compat.nnsight.cross_entropy_loss, ("logits", "target_ids"), (logits, target)),
        (compat.unit_scaling.cross_entropy, ("input", "target"), (logits, target)),
        (mindformers, ("logits", "label", "input_mask"), (logits, target, mask)),
    ):
        for i, name in enumerate(names):
            arguments = [*tensors[:i], wrong, *tensors[i + 1 :]]
            with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor"):
                function(*arguments)


def test_compat_refuses_in_its_own_words(device: torch.device) -> None:
    logits, target = torch.zeros(3, 4, device=device), torch.zeros(3, dtype=torch.long, device=device)
    scaling = compat.unit_scaling.cross_entropy
    with pytest.raises(ValueError, match="label_smoothing is not supported"):
        scaling(logits, target, label_smoothing=torch.tensor([0.0, 0.1]))
    with pytest.raises(TypeError, match="mult must be a number"):
        scaling(logits, target, mult="2")
    with pytest.raises(ValueError, match="target holds class probabilities and must have the shape of input"):
        scaling(logits, target.float())
    with pytest.raises(ValueError, match="input must have at least one class"):
        scaling(logits[:, :0], target)
    with pytest.raises(TypeError, match="input must be float32"):
        scaling(logits.to(torch.float8_e5m2), logits)
    with pytest.raises(TypeError, match="input_mask must be real numbers"):
        compat.mindformers.CrossEntropyLoss()(logits, target, torch.ones(3, dtype=torch.complex64, device=device))
    with pytest.raises(ValueError, match="at least one class"):
        compat.nnsight.cross_entropy_loss(logits[:, :0], target)


@pytest.mark.cpu
@pytest.mark.parametrize("of", ["logits", "label", "input_mask"])
def test_freed_storages_are_not_read_by_compat(of: str) -> None:
    """torch reads them, and the process may end."""
    tensors = {"logits": torch.zeros(3, 4), "label": torch.zeros(3, dtype=torch.long), "input_mask": torch.ones(3)}
    tensors[of].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{of} with shape .* needs"):
        compat.mindformers.CrossEntropyLoss()(**tensors)
    if of != "input_mask":
        named = "target_ids" if of == "label" else of
        with pytest.raises(RuntimeError, match=f"{named} with shape .* needs"):
            compat.nnsight.cross_entropy_loss(tensors["logits"], tensors["label"])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5, 3), (1, 5, 1, 1)], ids=str)
def test_a_leaf_that_is_a_view_is_not_consumed(shape: tuple[int, ...], device: torch.device) -> None:
    """The operators saw views of it, whose base requires no gradient, and the leaf was overwritten."""
    classes_last = torch.zeros(*shape[:1], *shape[2:], *shape[1:2], device=device)
    leaf = classes_last.movedim(-1, min(len(shape) - 1, 1)).requires_grad_()
    target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="would overwrite a leaf"):
        npu_xent.cross_entropy(leaf, target, consume_logits=True)
    leaf = torch.zeros(2, 3, 5, device=device).view(3, 2, 5).requires_grad_()
    with pytest.raises(ValueError, match="would overwrite a leaf"):
        npu_xent.token_log_probs(leaf, torch.zeros(3, 2, device=device).long(), consume_logits=True)
    assert not leaf.any()


@pytest.mark.cpu
@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"num_classes": "5"}, TypeError, "num_classes must be an integer"),
        ({"num_classes": 2.5}, TypeError, "num_classes must be an integer"),
        ({"num_classes": -1}, ValueError, "num_classes must not be negative"),
        ({"num_classes": 5, "class_range": "ab"}, TypeError, "class_range must be two integers"),
        ({"num_classes": 5, "class_range": (0,)}, TypeError, "class_range must be two integers"),
        ({"loss_dtype": None}, TypeError, "loss_dtype must be a torch.dtype"),
        ({"weight": torch.ones(5).to(torch.float8_e5m2)}, TypeError, "weight must be float32"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        (
            {"linear_weight": torch.ones(5, 0, device="meta")},
            ValueError,
            r"linear_weight must be on the device of input, .*; move it with linear_weight\.to\(input\.device\)$",
        ),
    ],
)
def test_sharded_losses_name_what_is_wrong(
    changed: dict[str, Any], error: type[Exception], words: str, alone: None
) -> None:
    """Some were taken, and others raised an error of something else."""
    layer = {"input": torch.zeros(0, 0), "linear_weight": torch.ones(5, 0), "target": torch.zeros(0).long()}
    with pytest.raises(error, match=words):
        distributed.vocab_parallel_linear_cross_entropy(**layer | changed)
    if not {"chunk_rows", "linear_weight"} & set(changed):
        with pytest.raises(error, match=words):
            distributed.vocab_parallel_cross_entropy(torch.zeros(0, 5), torch.zeros(0).long(), **changed)


@pytest.mark.cpu
def test_sharded_losses_of_no_features_and_of_freed_storages(alone: None) -> None:
    layer = {"input": torch.zeros(2, 0), "linear_weight": torch.ones(5, 0), "target": torch.tensor([1, 2])}
    loss = distributed.vocab_parallel_linear_cross_entropy(**layer)
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
    layer = {"input": torch.zeros(2, 3), "linear_weight": torch.ones(5, 3), "target": torch.tensor([1, 2])}
    layer["linear_weight"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"linear_weight with shape .* needs"):
        distributed.vocab_parallel_linear_cross_entropy(**layer)
    logits = torch.zeros(2, 5)
    out = distributed.vocab_parallel_token_log_probs(logits, layer["target"], return_entropy=1, return_top1=np.False_)
    assert out.entropy is not None
    assert out.top1 is None


def test_the_functions_take_meta_tensors() -> None:
    """Which torch knows no autocast for."""
    x, layer = torch.randn(4, 3, device="meta"), torch.randn(5, 3, device="meta")
    y, q = torch.zeros(4, dtype=torch.int64, device="meta"), torch.rand(4, 5, device="meta")
    for target in (y, q):
        for loss in (npu_xent.linear_cross_entropy(x, layer, target), npu_xent.cross_entropy(x @ layer.T, target)):
            assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (), torch.float32)
    assert npu_xent.linear_cross_entropy(x[None], layer, y[None], reduction="none").shape == (1, 4)
    assert npu_xent.linear_token_log_probs(x, layer, y).shape == (4,)


@pytest.mark.parametrize("mult", [INF, -INF, NAN], ids=str)
def test_an_infinite_mult_is_refused_for_probabilities_too(mult: float, device: torch.device) -> None:
    """Only the operator checked it, which class probabilities and torch.func do not use."""
    logits, q = torch.zeros(2, 4, device=device), torch.full((2, 4), 0.25, device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    for loss in (compat.unit_scaling.cross_entropy, lambda *a, mult: compat.unit_scaling.CrossEntropyLoss(mult)(*a)):
        for y in (q, target):
            with pytest.raises(ValueError, match="mult must be finite"):
                loss(logits, y, mult=mult)
    with pytest.raises(ValueError, match="mult must be finite"):
        torch.func.grad(lambda x: compat.unit_scaling.cross_entropy(x, target, mult=mult))(logits)


@pytest.mark.cpu
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sharded_losses_of_no_rows_compare_the_classes(reduction: str, alone: None) -> None:
    """Without rows, the linear loss gathered nothing, and took classes that do not make up a vocabulary."""
    x, layer, bias, y = torch.zeros(0, 3), torch.ones(5, 3), torch.ones(5), torch.zeros(0, dtype=torch.int64)
    for class_range in ((1, 5), (0, 4)):
        shard: dict[str, Any] = {"num_classes": 5, "class_range": class_range, "reduction": reduction}
        with pytest.raises(ValueError, match="classes must make up one vocabulary"):
            distributed.vocab_parallel_linear_cross_entropy(x, layer, y, **shard)
        with pytest.raises(ValueError, match="classes must make up one vocabulary"):
            distributed.vocab_parallel_cross_entropy(x @ layer.T, y, **shard)
    leaves = [t.requires_grad_() for t in (x, layer, bias)]
    loss = distributed.vocab_parallel_linear_cross_entropy(
        x, layer, y, linear_bias=bias, reduction=reduction, label_smoothing=0.1
    )
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert not any(grad.any() for grad in grads)


@pytest.mark.cpu
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sharded_losses_of_no_rows_send_nothing_off_the_cpu(
    reduction: str, sequence_parallel: bool, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks do not compare their classes either."""
    for module, collective in (
        (distributed, "_all_gather"),
        (distributed, "_reduce_scatter"),
        (distributed.dist, "all_reduce"),
    ):
        monkeypatch.setattr(module, collective, lambda *_, **__: pytest.fail("sends nothing to all ranks"))
    x, layer = torch.zeros(0, 3, device="meta"), torch.ones(5, 3, device="meta")
    y = torch.zeros(0, dtype=torch.int64, device="meta")
    leaves = [t.requires_grad_() for t in (x, layer)]
    loss = distributed.vocab_parallel_linear_cross_entropy(
        *leaves, y, reduction=reduction, sequence_parallel=sequence_parallel
    )
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert distributed.vocab_parallel_cross_entropy(x @ layer.T, y).shape == (0,)


@pytest.mark.cpu
def test_autocast_leaves_float64_alone_in_sharded_losses(alone: None) -> None:
    """As F.linear and linear_cross_entropy do. It was rounded to bfloat16."""
    x, layer, y = torch.zeros(2, 3), torch.ones(5, 3), torch.tensor([1, 2])
    losses = (distributed.vocab_parallel_linear_cross_entropy, npu_xent.linear_cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        for loss in losses:
            with pytest.raises(TypeError, match=r"(?=.*input)(?=.*linear_weight)"):
                loss(x, layer.double(), y)
            with pytest.raises(TypeError, match=r"(?=.*input)(?=.*linear_weight)"):
                loss(x.double(), layer, y)
            with pytest.raises((TypeError, ValueError), match="linear_bias"):
                loss(x, layer, y, linear_bias=torch.ones(5).double())
            assert loss(x, layer.to(torch.float8_e4m3fn), y).isfinite()


@pytest.mark.cpu
def test_sharded_losses_name_themselves(alone: None) -> None:
    """Messages about options named the function without shards."""
    x, layer, y = torch.zeros(2, 5), torch.ones(5, 5), torch.tensor([1, 2])
    for name, arguments in {
        "vocab_parallel_cross_entropy": (x, y),
        "vocab_parallel_token_log_probs": (x, y),
        "vocab_parallel_linear_cross_entropy": (x, layer, y),
    }.items():
        for option, value in {"ignore_index": 1.5, "softcap": "2", "logit_scale": torch.ones(())}.items():
            with pytest.raises(TypeError, match=rf"npu_xent\.{name}: {option} must be"):
                getattr(distributed, name)(*arguments, **{option: value})
        with pytest.raises(ValueError, match=rf"npu_xent\.{name}: ignore_index must fit"):
            getattr(distributed, name)(*arguments, ignore_index=2**63)


def negative(values: Tensor) -> Tensor:
    """A contiguous view with torch's negative bit that shows `values`."""
    return torch._neg_view(values.neg())


def test_negative_views_are_not_overwritten(device: torch.device) -> None:
    """torch's fallback for the negative bit corrupted memory: it took a result that these operators do not return."""
    x, target = make_logits(4, 5, torch.float32, device), torch.arange(4, device=device)
    lse, totals = x.logsumexp(1), torch.tensor([4.0, 4.0, 5.0], device=device)
    factor = torch.tensor(2.0, device=device)
    ops = torch.ops.npu_xent
    calls = {
        "row_grad_": lambda x: ops.row_grad_(x, target, None, lse, None, totals, factor),
        "row_stats_grad_": lambda x: ops.row_stats_grad_(x, target, None, totals),
        "scale_": lambda x: ops.scale_(x, factor),
        "cross_entropy_": lambda x: ops.cross_entropy_(x, target),
        "cross_entropy_ in two sweeps": lambda x: ops.cross_entropy_(x, target, reduction="none"),
        "token_log_probs_": lambda x: ops.token_log_probs_(x, target),
    }
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("npu_xent::")]
    writing = {name.removeprefix("npu_xent::") for name in ours if name.endswith("_")}
    assert writing == {name.split()[0] for name in calls}
    for name, call in calls.items():
        view = negative(x.detach().requires_grad_(name.startswith(("cross_entropy_", "token_log_probs_"))))
        with pytest.raises(ValueError, match="is overwritten, and must not be a view with torch's negative bit"):
            call(view)
        assert torch.equal(view, x), name
    doubled = x.clone()
    ops.scale_(doubled, negative(factor))
    assert torch.equal(doubled, 2 * x)
    grad = x.clone()
    ops.row_grad_(grad, target, None, negative(lse), None, negative(totals), factor)
    torch.testing.assert_close(grad, ops.row_grad(x, target, None, lse, None, totals, factor))


@pytest.mark.cpu
def test_sharded_losses_do_not_consume_negative_views(alone: None) -> None:
    leaf, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    for loss in (distributed.vocab_parallel_cross_entropy, distributed.vocab_parallel_token_log_probs):
        with pytest.raises(ValueError, match="consume_logits cannot write over a view with torch's negative bit"):
            loss(negative(leaf), target, consume_logits=True)
        loss(negative(leaf), target).sum().backward()


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_a_reduction_that_is_replaced_is_not_checked(device: torch.device) -> None:
    """The module checked it, the function did not."""
    logits, target = make(device)
    reduction: Any = ["mean"]
    expected = npu_xent.cross_entropy(logits, target, reduction="sum")
    found = npu_xent.cross_entropy(logits, target, size_average=False, reduction=reduction)
    module = npu_xent.CrossEntropyLoss(size_average=False, reduction=reduction)
    assert_same_bits(found, expected)
    assert_same_bits(module(logits, target), expected)
    with pytest.raises(TypeError, match="reduction must be"):
        npu_xent.CrossEntropyLoss(reduction=reduction)


@pytest.mark.cpu
def test_sharded_top1_of_a_row_of_only_minus_infinity(alone: None) -> None:
    """A softcap makes them equal, and the first class is the largest. No class was."""
    logits = torch.full((3, 4), -INF)
    options: dict[str, Any] = {"softcap": 2.0, "return_top1": True}
    for target in (torch.tensor([0, 1, 3]), torch.tensor([1, 0, 0])):
        whole = npu_xent.token_log_probs(logits, target, **options).top1
        assert torch.equal(distributed.vocab_parallel_token_log_probs(logits, target, **options).top1, whole)
        assert torch.equal(whole, target == 0)
    # Three shards, of which the first has no class; the target is in the second or in the third.
    for of_second, of_third, expected in ((1, 0, True), (0, 1, False)):
        shards = {
            "lse": torch.tensor([[-INF], [0.0], [0.0]]),
            "lse_low": torch.zeros(3, 1),
            "picked": torch.zeros(3, 1),
            "top1": torch.tensor([[-1.0], [of_second], [of_third]]),
            "largest": torch.full((3, 1), -INF),
            "start": torch.tensor([[0.0], [0.0], [2.0]]),
        }
        assert bool(distributed._merged(shards).top1) is expected


@pytest.mark.parametrize("name", ["softcap", "label_smoothing", "lse_square_scale", "ignore_index"])
def test_constant_parameters_are_numbers_for_the_module(name: str, device: torch.device) -> None:
    """torch registers parameters among the attributes, where one of that name was, and raised KeyError."""
    logits, target = make(device)
    value = torch.nn.Parameter(torch.tensor(1), requires_grad=False)
    module = npu_xent.CrossEntropyLoss(**{name: value})
    assert not list(module.parameters())
    assert f"{name}=1" in repr(module)
    assert_same_bits(module(logits, target), npu_xent.cross_entropy(logits, target, **{name: 1}))


def constant(value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(value), requires_grad=False)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("name", ["return_lse", "return_z_loss", "consume_logits"])
def test_constant_parameters_are_flags_for_the_module(name: str, value: bool, device: torch.device) -> None:
    """As for numbers. Other types that hold a bool are flags too."""
    for given in (constant(value), np.bool_(value), int(value)):
        module = npu_xent.CrossEntropyLoss(**{name: given})
        assert not list(module.parameters())
        assert getattr(module, name) is value
        assert repr(module) == (f"CrossEntropyLoss({name}=True)" if value else "CrossEntropyLoss()")
    criterion = mindformers.CrossEntropyLoss(
        calculate_per_token_loss=constant(value), check_for_nan_in_loss_and_grad=constant(value)
    )
    assert not list(criterion.parameters())


def test_the_module_of_unit_scaling_keeps_numbers(device: torch.device) -> None:
    """Constant parameters were registered, and what is no number raised an error at the first call."""
    logits, target = make(device)
    module = unit_scaling.CrossEntropyLoss(constant(0.5), ignore_index=constant(2))
    assert not list(module.parameters())
    assert (module.mult, module.ignore_index) == (0.5, 2)
    expected = unit_scaling.cross_entropy(logits, target, mult=0.5, ignore_index=2)
    assert_same_bits(module(logits, target), expected)
    name = r"unit_scaling\.CrossEntropyLoss: "
    for mult in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{name}mult must be finite, but is {mult}"):
            unit_scaling.CrossEntropyLoss(mult)
    for changed in ({"mult": "2"}, {"mult": torch.nn.Parameter(torch.ones(()))}, {"ignore_index": 1.5}):
        with pytest.raises(TypeError, match=f"{name}{next(iter(changed))} must be a"):
            unit_scaling.CrossEntropyLoss(**changed)
