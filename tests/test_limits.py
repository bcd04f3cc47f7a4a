"""Every row of docs/limits.md with the status "refused" raises the error that it names, with the words it quotes.

Of the rows with "works", those that no other file tests and one process can.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn import functional as F

import npu_xent
from npu_xent import _loading
from npu_xent.compat import mindformers

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "limits.md").read_text()
ROW = re.compile(r'^\| (.+?) \| refused \| `(\w+)`(?:: "(.+?)")?', flags=re.MULTILINE)

N, C, H = 6, 13, 5
LOGITS, TARGET = torch.randn(N, C), torch.tensor([3, 0, 12, 7, 9, 1])
HIDDEN, WEIGHT = torch.randn(N, H), torch.randn(C, H)

cross_entropy, linear_cross_entropy = npu_xent.cross_entropy, npu_xent.linear_cross_entropy
contract = npu_xent.npu_cross_entropy_loss


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def twice(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = leaf(x)
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    gradient.square().sum().backward()


def forward_mode(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(x, torch.ones_like(x)))


def script() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return npu_xent.cross_entropy(x, y)

    torch.jit.script(loss)


def nested(layout: torch.layout) -> None:
    logits, target = (torch.nested.nested_tensor([t, t[:3]], layout=layout) for t in (LOGITS, TARGET))
    cross_entropy(logits, target)


def one_rank_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,))


def distributed(tensor: Tensor, *placements: Replicate | Shard) -> DTensor:
    return distribute_tensor(tensor, one_rank_mesh(), placements)


def sharded_head() -> None:
    head = nn.Linear(H, C, bias=False)
    fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
    linear_cross_entropy(HIDDEN, head.weight, TARGET)


def freed(x: Tensor, *, loss: Callable[..., Tensor] = cross_entropy, **options: Any) -> Tensor:
    """A loss whose logits' storage has been freed since, for their gradient. (* 2: an upstream gradient of 1 scales
    nothing.)"""
    logits = x * 1
    result = loss(logits, TARGET, **options) * 2
    logits.untyped_storage().resize_(0)
    return result / 2


def freed_input() -> None:
    hidden = leaf(HIDDEN) * 1
    loss = linear_cross_entropy(hidden, leaf(WEIGHT), TARGET, reduction="none")
    hidden.untyped_storage().resize_(0)
    loss.sum().backward()


def masked_logits() -> None:
    masked = torch.masked.masked_tensor(LOGITS, torch.ones(N, C, dtype=torch.bool))
    cross_entropy(masked, TARGET)


SHARDED_MODEL = types.SimpleNamespace(model_parallel=2, data_parallel=1)
SHARD = LOGITS[:, :7], TARGET  # of the classes

# Of each row of the page that is refused, by how it begins: what to call.
REFUSED: dict[str, list[Callable[[], object]]] = {
    "double backward of `cross_entropy` (class indices), `linear_cross_entropy`": [
        lambda: twice(lambda x: cross_entropy(x, TARGET), LOGITS),
        lambda: twice(lambda x: linear_cross_entropy(x, WEIGHT, TARGET), HIDDEN),
        lambda: torch.autograd.functional.hessian(lambda x: cross_entropy(x, TARGET), LOGITS),
    ],
    "double backward of `npu_cross_entropy_loss`": [lambda: twice(lambda x: contract(x, TARGET)[0].sum(), LOGITS)],
    "forward-mode AD": [
        lambda: forward_mode(lambda x: cross_entropy(x, TARGET), LOGITS),
        lambda: forward_mode(lambda x: linear_cross_entropy(x, WEIGHT, TARGET), HIDDEN),
        lambda: forward_mode(lambda x: contract(x, TARGET)[0], LOGITS),
        lambda: torch.func.linearize(lambda x: cross_entropy(x, TARGET), LOGITS),
    ],
    "`consume_logits` under": [
        lambda: torch.func.grad(lambda x: cross_entropy(x * 1, TARGET, consume_logits=True))(LOGITS)
    ],
    "`torch.jit.script` of a function of `npu_xent`": [script, lambda: torch.jit.script(npu_xent.CrossEntropyLoss())],
    "nested (jagged, strided), sparse": [
        lambda: nested(torch.jagged),
        lambda: nested(torch.strided),
        lambda: cross_entropy(LOGITS.to_sparse(), TARGET),
        lambda: cross_entropy(LOGITS.to_sparse_csr(), TARGET),
        lambda: cross_entropy(LOGITS.to_mkldnn(), TARGET),
        lambda: cross_entropy(torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.qint8), TARGET),
        lambda: cross_entropy(LOGITS, TARGET.to_sparse()),
        lambda: cross_entropy(LOGITS, TARGET, torch.ones(C).to_sparse()),
        lambda: linear_cross_entropy(HIDDEN, WEIGHT.to_sparse(), TARGET),
        lambda: linear_cross_entropy(HIDDEN, torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8), TARGET),
    ],
    "float8, integer or complex logits": [
        lambda dtype=dtype: cross_entropy(LOGITS.to(dtype), TARGET)
        for dtype in (torch.float8_e4m3fn, torch.int64, torch.complex64)
    ],
    "float8 or complex `input`": [
        *(
            lambda dtype=dtype: linear_cross_entropy(HIDDEN, WEIGHT.to(dtype), TARGET)
            for dtype in (torch.float8_e4m3fn, torch.complex64)
        ),
        lambda: linear_cross_entropy(HIDDEN.to(torch.complex64), WEIGHT.to(torch.complex64), TARGET),
    ],
    "`torch.masked.MaskedTensor`": [masked_logits],
    "`consume_logits` of a negated view": [
        lambda loss=loss: loss(torch._neg_view(leaf(LOGITS).neg()), TARGET, consume_logits=True)
        for loss in (cross_entropy, npu_xent.token_log_probs)
    ],
    "Partial logits": [lambda: cross_entropy(DTensor.from_local(LOGITS, one_rank_mesh(), [Partial()]), TARGET)],
    "logits with sharded rows": [lambda: cross_entropy(distributed(leaf(LOGITS), Shard(0)), TARGET)],
    "plain logits and": [lambda: cross_entropy(LOGITS, distributed(TARGET, Replicate()))],
    "DTensors with class probabilities": [lambda: cross_entropy(distributed(LOGITS, Shard(1)), LOGITS.softmax(1))],
    "a DTensor input": [lambda: linear_cross_entropy(distributed(HIDDEN, Replicate()), WEIGHT, TARGET)],
    "`return_lse` and `return_z_loss`": [
        lambda name=name: linear_cross_entropy(
            distributed(HIDDEN, Replicate()), distributed(WEIGHT, Shard(0)), TARGET, **{name: True}
        )
        for name in ("return_lse", "return_z_loss")
    ],
    "DTensors to `linear_token_log_probs`": [
        lambda: npu_xent.linear_token_log_probs(*(distributed(t, Replicate()) for t in (HIDDEN, WEIGHT, TARGET))),
        lambda: contract(*(distributed(t, Shard(0)) for t in (LOGITS, TARGET))),
    ],
    "DTensors to `selected_log_probs`": [
        lambda: npu_xent.selected_log_probs(*(distributed(t, Shard(0)) for t in (LOGITS, TARGET.unsqueeze(1))))
    ],
    "classes sharded, the shard": [lambda: cross_entropy(*SHARD)],
    "FSDP2, `linear_cross_entropy` with the weight of a module": [sharded_head],
    "the same with a shard of the classes": [lambda: cross_entropy(*SHARD, reduction="none")],
    "`npu_xent.compat.mindformers`": [
        lambda: mindformers.CrossEntropyLoss(parallel_config=SHARDED_MODEL)(LOGITS, LOGITS, torch.ones(N))
    ],
    'the same with "none", float16, `consume_logits`': [
        lambda: freed(leaf(LOGITS), reduction="none").sum().backward(),
        lambda: freed(leaf(LOGITS), reduction="mean", consume_logits=True).backward(),
        lambda: freed(leaf(LOGITS.half()), reduction="mean").backward(),
        lambda: freed(leaf(LOGITS), reduction="sum", loss=lambda *a, **k: contract(*a, **k)[0].sum()).backward(),
    ],
    "the same with `linear_cross_entropy`": [freed_input],
    "another release at run time": [lambda: _loading.check_torch("2.12.0+cpu", "2.13.0+cpu")],
}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_refused_row_is_tried() -> None:
    rows = [row for row, *_ in ROW.findall(PAGE)]
    assert len(rows) == PAGE.count("| refused |")
    assert [next((name for name in REFUSED if row.startswith(name)), row) for row in rows] == list(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_raises_what_the_page_says(name: str) -> None:
    error, words = next((error, words) for row, error, words in ROW.findall(PAGE) if row.startswith(name))
    for call in REFUSED[name]:
        with pytest.raises(Exception, match=re.escape(words)) as raised:
            call()
        assert error in [kind.__name__ for kind in type(raised.value).__mro__[:-3]]  # not Exception, which any is


def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = leaf(x)
    loss(x).sum().backward()
    return x.grad


def jagged_values(x: Tensor) -> Tensor:
    logits, target = (torch.nested.as_nested_tensor([t[:2], t[2:]], layout=torch.jagged) for t in (x, TARGET))
    return cross_entropy(logits.values(), target.values())


WORKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "storage freed, mean": (lambda x: freed(x, reduction="mean"), "mean"),
    "storage freed, sum": (lambda x: freed(x, reduction="sum"), "sum"),
    "jagged values": (jagged_values, "mean"),
    "jit.trace": (lambda x: torch.jit.trace(cross_entropy, (LOGITS[:2], TARGET[:2]))(x, TARGET), "mean"),
}


@pytest.mark.parametrize("name", WORKS)
def test_what_works_has_the_gradient_of_torch(name: str) -> None:
    loss, reduction = WORKS[name]
    expected = gradient(lambda x: F.cross_entropy(x, TARGET, reduction=reduction), LOGITS)
    torch.testing.assert_close(gradient(loss, LOGITS), expected)


@pytest.mark.parametrize("where, whole", [(Shard(0), DTensor.to_local), (Shard(1), DTensor.full_tensor)])
def test_the_local_part_of_a_dtensor_works(where: Shard, whole: Callable[[DTensor], Tensor]) -> None:
    logits = distributed(LOGITS, where).requires_grad_()
    cross_entropy(whole(logits), TARGET).backward()
    expected = gradient(lambda x: F.cross_entropy(x, TARGET), LOGITS)
    torch.testing.assert_close(logits.grad.full_tensor(), expected)


def test_a_head_that_computes_its_loss_works_in_fsdp2() -> None:
    class Head(nn.Linear):
        def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, self.weight, target)

    head = Head(H, C, bias=False)
    expected = gradient(lambda weight: F.cross_entropy(F.linear(HIDDEN, weight), TARGET), head.weight.detach())
    fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
    head(HIDDEN, TARGET).backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected)
