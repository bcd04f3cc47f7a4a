"""Launches stand in the queue and on the stream that they belong to, and nothing waits.

The simulated device is held, slowed down and asked what it saw, so that the order in which things happen is certain. A
program that leaves out an event, a wait or record_stream is refused there, which the same tests show.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from reference import assert_same_bits, make_logits, make_target
from torch import Tensor

import npu_xent

acl = pytest.importorskip("cann_sim.acl")

pytestmark = [pytest.mark.npu, pytest.mark.simulated]

N, C = 64, 1000
SYNCHRONISING = (
    "aclrtMemcpy",
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSynchronizeEvent",
    "aclrtSynchronizeEventWithTimeout",
    "aclrtSynchronizeStream",
    "aclrtSynchronizeStreamWithTimeout",
)


@pytest.fixture(autouse=True)
def no_errors() -> Iterator[None]:
    """What a test provokes it clears; anything else that the device saw is a failure."""
    npu_xent.load_npu()  # which waits for the device, once
    torch.npu.synchronize()
    yield
    torch.npu.synchronize()
    errors = acl.status().errors
    acl.clear_errors()
    assert not errors


@contextlib.contextmanager
def held(stream: torch.npu.Stream | None = None) -> Iterator[None]:
    """The stream (None: all) stands still. What waits for it in here fails instead of waiting forever."""
    waited = threading.Event()

    def give_up() -> None:
        waited.set()
        acl.release_streams(stream)

    timer = threading.Timer(20, give_up)
    timer.start()
    with acl.hold(stream):
        yield
    timer.cancel()
    assert not waited.is_set(), "something waited for a stream that stood still"


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return make_logits(N, C, dtype, torch.device("cpu"))


def target() -> Tensor:
    return make_target(N, C, torch.device("cpu"), ignore_index=-100)


def loss_and_grad(x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = npu_xent.cross_entropy(x, y, **options)
    return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]


def assert_as_alone(found: tuple[Tensor, Tensor], device: torch.device, **options) -> None:
    """The bits that the same call has with nothing else going on."""
    for got, expected in zip(found, loss_and_grad(logits().to(device), target().to(device), **options), strict=True):
        assert_same_bits(got.cpu(), expected.cpu())


def test_a_launch_keeps_its_place_in_the_queue(device: torch.device) -> None:
    """torch_npu submits from a thread of its own: a launch past its queue would overtake the copy of the logits."""
    x, y = torch.full((N, C), float("nan"), device=device), target().to(device)
    source = logits().pin_memory()
    torch.npu.synchronize()
    with acl.delay("aclrtMemcpyAsync", 100):
        x.copy_(source, non_blocking=True)
        found = loss_and_grad(x, y)
    assert_as_alone(found, device)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_launches_go_to_the_current_stream(device: torch.device, reduction: str) -> None:
    """Work on a side stream comes to its end while the default stream stands still."""
    side = torch.npu.Stream()
    with torch.npu.stream(side):
        x, y = logits().to(device), target().to(device)
    torch.npu.synchronize()
    with held(torch.npu.default_stream()), torch.npu.stream(side):
        loss, grad = (t.cpu() for t in loss_and_grad(x, y, reduction=reduction))
    assert_as_alone((loss, grad), device, reduction=reduction)


def test_nothing_is_waited_for(device: torch.device) -> None:
    """Forward and backward return while the device does nothing at all."""
    x, y = logits().to(device).requires_grad_(), target().to(device)
    one, ones = torch.ones((), device=device), torch.ones(N, device=device)
    weight = torch.ones(C, device=device)
    torch.npu.synchronize()
    before = {name: acl.calls(name) for name in SYNCHRONISING}
    with held():
        mean = npu_xent.cross_entropy(x, y, weight, label_smoothing=0.1, lse_square_scale=1e-4)
        (grad,) = torch.autograd.grad(mean, x, one)
        none = npu_xent.cross_entropy(x, y, reduction="none")
        (grad_none,) = torch.autograd.grad(none, x, ones)
        assert {name: acl.calls(name) for name in SYNCHRONISING} == before
    assert bool(grad.isfinite().all())
    assert_as_alone((none.detach(), grad_none), device, reduction="none")


def on_a_side_stream(device: torch.device, *, wait: bool) -> tuple[Tensor, Tensor]:
    """The loss on a side stream, of logits that the default stream makes."""
    y, half = target().to(device), logits().to(device) / 2
    side = torch.npu.Stream()
    torch.npu.synchronize()
    x = half + half
    if wait:
        side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        found = loss_and_grad(x, y)
    torch.npu.synchronize()
    return found


def test_a_side_stream_waits_for_the_logits(device: torch.device) -> None:
    assert_as_alone(on_a_side_stream(device, wait=True), device)


def test_a_side_stream_that_does_not_wait_is_seen(device: torch.device) -> None:
    with pytest.raises(RuntimeError):
        on_a_side_stream(device, wait=False)
    assert acl.status().of_kind("stream-race")
    acl.clear_errors()


def logits_given_back_early(device: torch.device, *, record: bool) -> Tensor:
    """The loss on a held side stream; meanwhile the logits' memory goes back and is taken again."""
    x, y = logits().to(device), target().to(device)
    side = torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    torch.npu.synchronize()
    with held(side):
        with torch.npu.stream(side):
            loss = npu_xent.cross_entropy(x, y)
        if record:
            x.record_stream(side)
            y.record_stream(side)
        place = x.data_ptr()
        del x, y
        other = torch.zeros(N, C, device=device)
        assert (other.data_ptr() == place) == (not record)
    torch.npu.current_stream().wait_stream(side)
    return loss.cpu()


def test_memory_on_a_side_stream_is_kept_by_record_stream(device: torch.device) -> None:
    loss = logits_given_back_early(device, record=True)
    assert_same_bits(loss, npu_xent.cross_entropy(logits().to(device), target().to(device)).cpu())


def test_memory_on_a_side_stream_without_record_stream_is_seen(device: torch.device) -> None:
    with pytest.raises(RuntimeError):
        logits_given_back_early(device, record=False)
    assert acl.status().of_kind("stream-race")
    acl.clear_errors()


def test_own_memory_may_go_before_the_launch(device: torch.device) -> None:
    """Copies and workspace of a call have gone back before the launch; what comes next must not spoil them."""
    wide = torch.zeros(N, 2 * C, device=device, dtype=torch.bfloat16)
    wide[:, ::2] = logits(torch.bfloat16).to(device)
    y, weight = target().to(device), torch.ones(C, device=device, dtype=torch.bfloat16)
    torch.npu.synchronize()
    with acl.delay("launch:npu_xent_row_stats", 50), acl.delay("launch:npu_xent_reduce_rows", 50):
        losses = [npu_xent.cross_entropy(wide[:, ::2], y, weight) for _ in range(3)]
    expected = npu_xent.cross_entropy(logits(torch.bfloat16).to(device), y, weight)
    for loss in losses:
        assert_same_bits(loss.cpu(), expected.cpu())


def test_threads_on_streams_of_their_own(device: torch.device) -> None:
    expected = loss_and_grad(logits().to(device), target().to(device))
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def work(number: int) -> None:
        torch.npu.set_device(device)
        with torch.npu.stream(torch.npu.Stream()):
            x, y = logits().to(device), target().to(device)
            for _ in range(5):
                loss, grad = loss_and_grad(x, y)
            results[number] = loss.cpu(), grad.cpu()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for found in results.values():
        for got, want in zip(found, expected, strict=True):
            assert_same_bits(got, want.cpu())


@pytest.mark.parametrize("consume", [False, True])
def test_another_device_than_the_current_one(consume: bool) -> None:
    """Memory, stream and launch are those of the tensors' device."""
    other = torch.device("npu", 1)
    expected = loss_and_grad(logits().to("npu:0"), target().to("npu:0"))
    assert torch.npu.current_device() == 0
    leaf = logits().to(other).requires_grad_()
    x = leaf * 1
    loss = npu_xent.cross_entropy(x, target().to(other), consume_logits=consume)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.npu.current_device() == 0
    assert loss.device == grad.device == other
    for got, want in zip((loss.detach(), grad), expected, strict=True):
        assert_same_bits(got.cpu(), want.cpu())


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="target must be on the logits' device npu:1, but is on npu:0"):
        npu_xent.cross_entropy(logits().to("npu:1"), target().to("npu:0"))
