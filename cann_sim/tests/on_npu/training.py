"""Models train on the npu as on the CPU. Run by test_torch_programs.py, inside `python -m cann_sim`."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


class Transformer(nn.Module):
    """Attention in its three forms."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        h = self.embedding(x)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        q = h.view(*h.shape[:2], 4, 4).transpose(1, 2)
        h = h + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(h.shape)
        return self.head(self.block(h).mean(1))


class Recurrent(nn.Module):
    """All recurrent layers and cells."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)
        self.cell, self.gru_cell, self.head = nn.LSTMCell(16, 16), nn.GRUCell(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = self.gru(self.lstm(x)[0])[0][:, -1]
        h = self.cell(h, (h, h))[0]
        return self.head(self.gru_cell(h, h))


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4)
    )


MODELS = {
    "mlp": (mlp, lambda: torch.randn(6, 8)),
    "convolutional": (convolutional, lambda: torch.randn(6, 3, 8, 8)),
    "transformer": (Transformer, lambda: torch.randint(0, 20, (6, 5))),
    "recurrent": (Recurrent, lambda: torch.randn(6, 5, 8)),
}
SGD = lambda parameters, **options: torch.optim.SGD(parameters, 0.1, momentum=0.9, **options)  # noqa: E731


def train(make, batch, device, optimizer=SGD, steps=4, **options):
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = optimizer(model.parameters(), **options)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = F.cross_entropy(model(batch().to(device)), torch.randint(0, 4, (6,)).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach().cpu() for parameter in model.parameters()]


def same_training(*arguments, **options):
    ours, theirs = (train(*arguments[:2], device, *arguments[2:], **options) for device in ("npu", "cpu"))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert ours[0][0] != ours[0][-1]
    for our, their in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    same_training(*MODELS[name])


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
@pytest.mark.parametrize("optimizer", [SGD, torch.optim.Adam, torch.optim.AdamW], ids=["SGD", "Adam", "AdamW"])
def test_optimizer(optimizer, options):
    same_training(*MODELS["mlp"], optimizer, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler(dtype):
    torch.manual_seed(0)
    model = mlp().npu()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("npu", enabled=dtype == torch.float16)
    x, target, losses = torch.randn(6, 8, device="npu"), torch.arange(6, device="npu") % 4, []
    for _ in range(12):
        with torch.autocast("npu", dtype):
            logits = model(x)
            assert logits.dtype == dtype
            loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_scaler_skips_infinite_gradients():
    model = nn.Linear(2, 2).npu()
    before = model.weight.detach().clone()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("npu")
    scaler.scale(model(torch.full((1, 2), float("inf"), device="npu")).sum()).backward()
    scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    assert torch.equal(before, model.weight)
    assert scaler.get_scale() == scale / 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_dropout(reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8)).npu()
    x = torch.randn(4, 8).npu().requires_grad_()
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        x.grad = None
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_gradcheck():
    x = torch.randn(3, 4, device="npu", requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (x.tanh() @ x.t()).logsumexp(0), x, eps=1e-2, atol=1e-2, rtol=1e-2)


def test_threads():
    results = {}

    def work(number):
        x = torch.full((100, 100), float(number), device="npu")
        with torch.npu.stream(torch.npu.Stream()) as _:
            torch.npu.current_stream().wait_stream(torch.npu.default_stream())
            for _ in range(20):
                y = x @ x
            results[number] = y.sum().item()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number * number * 1e6 for number in range(1, 5)}


def test_data_loader():
    data = TensorDataset(torch.arange(32.0).view(16, 2), torch.arange(16))
    total = 0.0
    for x, _ in DataLoader(data, batch_size=4, num_workers=2, pin_memory=True):
        assert x.is_pinned()
        total += x.to("npu", non_blocking=True).sum().item()
    assert total == sum(range(32))


def test_state_dict_goes_through_a_file(tmp_path):
    model = mlp().npu()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    on_cpu = torch.load(tmp_path / "model.pt", map_location="cpu", weights_only=True)
    on_npu = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert on_npu[name].device.type == "npu"
        assert torch.equal(on_cpu[name], value.cpu())
