"""Operators of npu tensors give what the CPU gives. Run by test_torch_programs.py, inside `python -m cann_sim`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

torch.manual_seed(0)
A, B = torch.randn(6, 5), torch.randn(6, 5)
INTEGERS = torch.randint(0, 9, (6, 5))
ROWS = torch.tensor([0, 3, 3])

# Each takes tensors of one device; what it makes of them has to be alike on both.
OPERATORS = {
    "add": lambda a, b, i: a + b,
    "alpha": lambda a, b, i: torch.add(a, b, alpha=3),
    "scalar": lambda a, b, i: 2 - a / 3,
    "promotion": lambda a, b, i: a.half() + i,
    "wrapped number": lambda a, b, i: i * 2.5,
    "comparison": lambda a, b, i: (a > b) & (i != 2),
    "matmul": lambda a, b, i: a @ b.t(),
    "addmm": lambda a, b, i: torch.addmm(a[:, 0], a, b.t()),
    "bmm": lambda a, b, i: torch.bmm(a.view(2, 3, 5), b.view(2, 5, 3)),
    "einsum": lambda a, b, i: torch.einsum("ij,kj->ik", a, b),
    "sum": lambda a, b, i: (a.sum(), a.sum(0), a.mean(1, keepdim=True), a.var(1), a.norm()),
    "max": lambda a, b, i: (a.max(), *a.max(1), a.argmin(0), a.amax(1)),
    "softmax": lambda a, b, i: (a.softmax(1), a.log_softmax(0), torch.logsumexp(a, 1)),
    "sort": lambda a, b, i: (*a.sort(1, descending=True), *a.topk(2), a.argsort(0)),
    "unique": lambda a, b, i: torch.unique(i, return_inverse=True, return_counts=True),
    "nonzero": lambda a, b, i: ((a > 0).nonzero(), *torch.where(i > 4)),
    "masks": lambda a, b, i: (a[a > 0], a.masked_fill(b > 0, 7.0), torch.where(a > b, a, b)),
    "indexing": lambda a, b, i: (a[ROWS.to(a.device)], a[1:, ::2], a[..., None, -1], a[i[:, 0] > 3]),
    "index on the CPU": lambda a, b, i: a[ROWS],
    "gather": lambda a, b, i: (a.gather(1, i % 5), a.index_select(0, ROWS.to(a.device)), a.take(i)),
    "scatter": lambda a, b, i: (a.scatter(1, i % 5, b), a.scatter_add(1, i % 5, b)),
    "cat": lambda a, b, i: (torch.cat([a, b], 1), torch.stack([a, b, a]), torch.cat([a, i])),
    "split": lambda a, b, i: (*a.split(4), *a.chunk(2, 1), *a.unbind(1)),
    "views": lambda a, b, i: (a.t(), a.view(5, 6), a.permute(1, 0)[None], a.expand(2, 6, 5), a.unfold(1, 2, 1)),
    "reshape": lambda a, b, i: (a.t().reshape(3, 10), a.t().contiguous(), a.flatten(), a.t().clone()),
    "types": lambda a, b, i: (a.int(), a.bool(), a.bfloat16(), i.float(), i.to(torch.uint8), a.half().float()),
    "cumulative": lambda a, b, i: (a.cumsum(1), *a.cummax(0), i.cumprod(1)),
    "clamp": lambda a, b, i: (a.clamp(-0.5, 0.5), a.clamp_min(0.0), torch.maximum(a, b), a.sign(), a.abs()),
    "pointwise": lambda a, b, i: (a.exp(), a.sigmoid(), a.tanh(), F.gelu(a), F.silu(a), a.erf(), a.isnan()),
    "lerp": lambda a, b, i: (torch.lerp(a, b, 0.3), torch.addcmul(a, a, b), torch.addcdiv(a, b, b + 9)),
    "linalg": lambda a, b, i: (torch.linalg.inv(a[:5] + 9 * torch.eye(5, device=a.device)), torch.linalg.norm(a, 2, 1)),
    "tril": lambda a, b, i: (a.tril(), a.triu(1), torch.diag(a[0]), a.roll(1, 0), a.flip(0)),
    "repeat": lambda a, b, i: (a.repeat(2, 1), a.repeat_interleave(2, 0), torch.tile(a, (1, 2))),
    "factories": lambda a, b, i: (
        torch.zeros_like(a),
        torch.full((3,), 2.5, device=a.device),
        torch.arange(1, 9, 2, device=a.device),
        torch.linspace(0, 1, 5, device=a.device),
        torch.eye(3, device=a.device),
        torch.tensor([[1.5, 2.0]], device=a.device),
    ),
    "normalisation": lambda a, b, i: (F.layer_norm(a, (5,)), F.normalize(a), F.rms_norm(a, (5,))),
    "losses": lambda a, b, i: (
        F.cross_entropy(a, i[:, 0] % 5),
        F.mse_loss(a, b),
        F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean"),
        F.binary_cross_entropy_with_logits(a, (b > 0).float()),
        F.l1_loss(a, b),
        F.smooth_l1_loss(a, b),
    ),
    "embedding": lambda a, b, i: (F.embedding(i % 6, a), F.one_hot(i, 9)),
    "convolution": lambda a, b, i: (
        F.conv2d(a.view(1, 2, 3, 5), b[:4, :4].reshape(1, 2, 2, 4).contiguous()),
        F.conv1d(a[None], b.view(1, 6, 5)[:, :, :3]),
        F.max_pool2d(a[None, None], 2),
        F.avg_pool2d(a[None, None], 2),
        F.interpolate(a[None, None], scale_factor=2),
    ),
    "attention": lambda a, b, i: F.scaled_dot_product_attention(
        a.view(1, 2, 3, 5), b.view(1, 2, 3, 5), a.view(1, 2, 3, 5), is_causal=True
    ),
    "complex": lambda a, b, i: torch.view_as_real(torch.complex(a, b) * 2),
    "vmap": lambda a, b, i: torch.vmap(torch.dot)(a, b),
    "no elements": lambda a, b, i: (a[:0].sum(), torch.cat([a[:0], b]), a[:0] @ b.t()),
    "0 dimensions": lambda a, b, i: (a[0, 0] + b, a * b[1, 1], a.sum() * torch.tensor(2.0)),
}


def flat(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.device.type == "npu"
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name):
    run = OPERATORS[name]
    ours, theirs = flat(run(A.npu(), B.npu(), INTEGERS.npu())), flat(run(A, B, INTEGERS))
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        alike(our, their)


IN_PLACE = {
    "add_": lambda x, b: x.add_(b),
    "view": lambda x, b: x.t()[1].mul_(3),
    "strided": lambda x, b: x[:, ::2].copy_(b[:, :3]),
    "fill": lambda x, b: x[1:3, 2:4].fill_(9),
    "index_put": lambda x, b: x.__setitem__((ROWS.to(x.device), 1), 5.0),
    "accumulate": lambda x, b: x.index_put_((ROWS.to(x.device),), b[:3], accumulate=True),
    "mask": lambda x, b: x.__setitem__(b > 0, 0.0),
    "masked_scatter": lambda x, b: x.masked_scatter_(b > 0, b),
    "index_add": lambda x, b: x.index_add_(0, ROWS.to(x.device), b[:3]),
    "zero": lambda x, b: x[0].zero_(),
    "relu": lambda x, b: F.relu(x, inplace=True),
    "converting copy": lambda x, b: x.copy_(b.half().t().contiguous().t()),
    "broadcast copy": lambda x, b: x.copy_(b[0]),
    "foreach": lambda x, b: torch._foreach_add_([x[0], x[2:4]], [b[0], b[2:4]], alpha=2),
    "from the CPU": lambda x, b: x.t().copy_(B.t()),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    ours, theirs = A.npu(), A.clone()
    address, version = ours.data_ptr(), ours._version
    IN_PLACE[name](ours, B.npu())
    IN_PLACE[name](theirs, B)
    alike(ours, theirs)
    assert ours.data_ptr() == address
    assert ours._version > version or name == "foreach"  # which torch_npu counts no version for


def test_out():
    out = torch.empty(6, 5, device="npu")
    address = out.data_ptr()
    assert torch.add(A.npu(), B.npu(), out=out) is out
    alike(out, A + B)
    assert out.data_ptr() == address
    torch.mul(A.npu(), 2, out=out[:, :].t().t())
    alike(out, A * 2)
    grown = torch.ones(2, device="npu")
    with pytest.warns(UserWarning, match="resized"):
        torch.matmul(A.npu(), B.npu().t(), out=grown)
    alike(grown, A @ B.t())
    alike(torch.cat([A.npu(), B.npu()], out=torch.empty(0, device="npu")), torch.cat([A, B]))
    value, index = torch.empty(0, device="npu"), torch.empty(0, device="npu", dtype=torch.long)
    torch.max(A.npu(), 1, out=(value, index))
    alike(value, A.max(1)[0])
    alike(index, A.max(1)[1])


def test_copies():
    x = A.npu()
    assert torch.equal(x.t().cpu(), A.t())
    assert torch.equal(x.to("cpu", torch.float16), A.half())
    assert torch.equal(A.t().npu().cpu(), A.t())
    host = torch.zeros(5, 6)
    host.copy_(x.t())
    assert torch.equal(host, A.t())
    pinned = torch.empty(6, 5, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    torch.npu.current_stream().synchronize()
    assert torch.equal(pinned, A)
    assert x[1, 2].item() == A[1, 2].item()
    assert x.tolist() == A.tolist()


def test_devices_must_agree():
    for run in (
        lambda: A.npu() + B,
        lambda: A.clone().add_(B.npu()),
        lambda: torch.cat([A.npu(), B]),
        lambda: A.npu() @ B.t(),
        lambda: A.to("npu:0") + B.to("npu:1"),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            run()


def test_second_device():
    x = torch.randn(4, 5, device="npu:1")
    assert torch.npu.current_device() == 0
    y = x.t().to("npu:0") + 1
    assert (x.device.index, y.device.index) == (1, 0)
    assert torch.equal(y.cpu(), x.cpu().t() + 1)
    weight = torch.randn(5, 2, device="npu:1", requires_grad=True)
    (x @ weight).sum().backward()
    assert weight.grad.device.index == 1


def test_errors_are_torchs():
    x = A.npu()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        x @ x
    with pytest.raises(IndexError, match="out of bounds"):
        x[torch.tensor([99], device="npu")]
    with pytest.raises(RuntimeError, match="single memory location"):
        x.view(-1)[1:].add_(x.view(-1)[:-1])
    assert torch.equal(x.cpu(), A)


def test_operators_of_cann_raise_in_words():
    x = A.npu()
    with pytest.raises(NotImplementedError, match=r"aten::bmm.dtype is not simulated"):
        torch.ops.aten.bmm.dtype(x[None].half(), x.t()[None].half(), torch.float32)
    with pytest.raises(NotImplementedError, match=r"npu::npu_rms_norm is not simulated"):
        torch.ops.npu.npu_rms_norm(x, x[0])


def test_random_numbers():
    def drawn():
        x = torch.ones(500, device="npu")
        generator = torch.Generator(device="npu").manual_seed(5)
        return [
            torch.randn(9, device="npu"),
            F.dropout(x, 0.3),
            torch.native_dropout(x, 0.5, True)[0],
            torch.rand_like(x),
            torch.randperm(9, device="npu"),
            torch.randint(0, 9, (9,), device="npu"),
            x.clone().uniform_(1, 2),
            torch.multinomial(x, 3),
            torch.bernoulli(x / 2),
            torch.rand(3, device="npu", generator=generator),
        ]

    torch.manual_seed(3)
    first = drawn()
    other = drawn()
    torch.manual_seed(3)
    again = drawn()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[:4], other[:4], strict=True))
    assert 0.2 < (first[1] == 0).float().mean().item() < 0.4
    state = torch.npu.get_rng_state()
    numbers = torch.rand(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(numbers, torch.rand(4, device="npu"))
    torch.manual_seed(1)
    on_cpu = torch.rand(3)
    torch.manual_seed(1)
    drawn()
    assert torch.equal(on_cpu, torch.rand(3))
    with pytest.raises(RuntimeError, match="'npu' device type for generator"):
        torch.rand(3, device="npu", generator=torch.Generator())
