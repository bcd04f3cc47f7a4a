"""Calls every public function with random arguments, good and bad, and judges each call.

    python tests/fuzz_calls.py [--seconds 60 | --calls 100000] [--seed 1] [--device cpu]
    python -m cann_sim tests/fuzz_calls.py --device npu ...
    python tests/fuzz_calls.py --seed 1 --case 123        # one call again, with its arguments

A call is right if its results and gradients are those of the references in float64 within the tests' tolerances, or if
it raises the error that is documented for what is wrong, with the argument's name in the message. It must leave the
caller's tensors and torch's settings as they were. The calls are made in a child process: if it dies or hangs, that is
a failure of the case that it was at, and another child goes on after it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import mmap
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz_functions as functions
import fuzz_others as others
import torch
from fuzz_functions import Call, Near, Rules
from fuzz_inputs import LOGITS, Source
from torch import Tensor
from torch.nn import functional as F

HANGS_AFTER = 60  # seconds for one call
FUNCTIONS: tuple[tuple[Callable[[Source], Call], float], ...] = (
    (functions.cross_entropy, 0.3),
    (functions.contract, 0.1),
    (functions.token_log_probs, 0.1),
    (functions.selected_log_probs, 0.06),
    (functions.linear_cross_entropy, 0.1),
    (functions.linear_token_log_probs, 0.06),
    (others.nnsight, 0.04),
    (others.unit_scaling, 0.05),
    (others.mindformers, 0.05),
    (others.parallel_cross_entropy, 0.04),
    (others.parallel_token_log_probs, 0.02),
    (others.parallel_linear, 0.03),
    (others.operators, 0.049),
    (others.load_npu, 0.001),
)
# What a warning may be about: see the docstrings.
WARNINGS = r"size_average|npu_cross_entropy_loss: |mindformers\.CrossEntropyLoss: \w+ is ignored"


class Failure(Exception):
    """A call that is not right; the message says why."""


class Seen(NamedTuple):
    """A tensor of the caller's, as it was."""

    tensor: Tensor
    memory: Tensor | None
    facts: tuple[Any, ...]


def memory_of(t: Tensor) -> Tensor | None:
    """The bytes of its storage."""
    if t.layout is not torch.strided or t.is_meta or t.is_nested or t.is_quantized:
        return None
    t = t.detach()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def facts_of(t: Tensor) -> tuple[Any, ...]:
    strided = t.layout is torch.strided and not t.is_nested
    place = (t.stride(), t.storage_offset(), t.is_neg()) if strided else ()
    version = None if t.is_inference() else t._version
    return (type(t), t.shape if not t.is_nested else None, t.dtype, t.device, t.requires_grad, version, *place)


def seen(value: Any) -> list[Seen]:
    if not isinstance(value, Tensor):
        return []
    memory = memory_of(value)
    return [Seen(value, None if memory is None else memory.clone(), facts_of(value))]


def settings() -> tuple[Any, ...]:
    """Torch's settings that a call must leave alone."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        F.cross_entropy,
    )


class Case:
    """One call, made of the seed and its number."""

    def __init__(self, seed: int, number: int, device: str) -> None:
        self.source = source = Source(seed, number, torch.device(device))
        # gloo moves no npu tensors, and the simulator has no HCCL.
        among = [f for f in FUNCTIONS if source.device.type == "cpu" or f[0] not in others.DISTRIBUTED]
        kind = source.random() * sum(share for _, share in among)
        for make, share in among:  # noqa: B007
            kind -= share
            if kind < 0:
                break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.call = make(source)
            self.mode = source.pick(("grad",) * 12 + ("no_grad", "no_grad", "inference", "autocast"))
            if self.call.torchs is not None and self.mode == "inference":
                self.mode = "no_grad"
            self.leaves: dict[str, Tensor] = {}
            self._place()
            if "npu_xent.linear" in self.call.name or "parallel_linear" in self.call.name:
                with contextlib.suppress(RuntimeError):  # tensors of kinds that have no sizes, and the like
                    self._spoil_ignored()

    def _place(self) -> None:
        """Put the tensors into their memory, and let some of them require a gradient."""
        call, source = self.call, self.source
        consumes = bool(call.arguments.get("consume_logits")) and source.maybe(0.85)
        for name, value in list(call.arguments.items()):
            plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.requires_grad
            if not plain or value.is_meta or value.is_nested or value.is_quantized:
                if isinstance(value, Tensor) and value.is_meta and name in call.differentiable and source.maybe(0.5):
                    with contextlib.suppress(RuntimeError):
                        call.arguments[name] = value.detach().requires_grad_()
                continue
            if value.numel() and value.untyped_storage().nbytes() < value.numel() * value.element_size():
                continue  # freed
            if consumes and name in ("input", "logits"):
                value = value.contiguous()
            else:
                # torch's products in bfloat16 read, and multiply by 0, what lies behind rows of odd length.
                by_torch = "linear" in call.name and value.element_size() == 2
                value = source.lay_out(value, 1.0 if by_torch else float("nan"))
            value = source.dressed(value)
            # Of bare operators no derivative is asked for.
            wants = name in call.differentiable and value.dtype.is_floating_point and source.maybe(0.75)
            if name == "weight" and source.maybe(0.01) and value.is_floating_point():
                value = value.detach().requires_grad_()
            if wants:
                with contextlib.suppress(RuntimeError):
                    leaf = value.detach().requires_grad_()
                    self.leaves[name] = leaf
                    value = leaf
                    if consumes or source.maybe(0.15):
                        value = leaf.clone(memory_format=torch.preserve_format)
                    if consumes and source.maybe(0.03):
                        value = torch._neg_view(leaf.neg())  # contiguous, and with torch's negative bit
            call.arguments[name] = value

    def _spoil_ignored(self) -> None:
        """Put NaN or an infinity into the ignored rows of the input of a layer, where these change no result."""
        arguments = self.call.arguments
        x, y, index = arguments.get("input"), arguments.get("target"), arguments.get("ignore_index")
        index = -100 if index is None else index
        tensors = all(type(t) is Tensor and t.layout is torch.strided and t.is_contiguous() for t in (x, y))
        if not tensors or not (isinstance(index, int) and abs(index) < 1 << 62) or arguments.get("return_lse"):
            return
        if x.is_meta or x.is_neg() or x.dtype not in LOGITS or functions.is_freed(x) or functions.is_freed(y):
            return
        if y.is_floating_point() or y.shape != x.shape[:-1]:
            return
        ignored = y.to(x.device).long() == index
        if self.source.maybe(0.5):
            with torch.no_grad():
                x.masked_fill_(ignored.unsqueeze(-1), self.source.pick((float("nan"), float("inf"), -float("inf"))))

    def __str__(self) -> str:
        lines = [f"{self.call.name} ({self.mode}) with"]
        for name, value in (self.call.arguments | self.call.notes.get("built", {})).items():
            lines.append(f"    {name} = {describe(value)}")
        return "\n".join(lines)

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        if self.mode == "no_grad":
            with torch.no_grad():
                yield
        elif self.mode == "inference":
            with torch.inference_mode():
                yield
        elif self.mode == "autocast":
            with torch.autocast(self.source.device.type, functions.AUTOCAST):
                yield
        else:
            yield

    def run(self) -> str:
        """The verdict: "right", "returned" where nothing is compared, or the error; raises Failure."""
        call = self.call
        rules = Rules(call, self.mode not in ("no_grad", "inference"), self.mode == "autocast")
        call.rules(rules)
        freed = call.torchs is not None and any(map(functions.is_freed, call.arguments.values()))
        if freed and not functions.is_served(**call.arguments):
            # torch reads freed memory, and what lies behind memory that shrank: the process may end.
            return "not called: torch would read freed memory"
        before = [s for value in (*call.arguments.values(), *self.leaves.values()) for s in seen(value)]
        was, error, out = settings(), None, None
        original = {n: call.arguments[n].detach().clone() for n in ("input", "logits") if self._consumes(n)}
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                with self._modes():
                    out = call.function(**call.arguments)
            except Exception as raised:
                error = raised
        if settings() != was:
            raise Failure(f"torch's settings were {was} and are {settings()}")
        if call.torchs is not None:
            return self._same_as_torch(out, error, before)
        for warning in warned:
            complex_ids = call.name.startswith("npu_xent.compat.nnsight") and "Casting complex" in str(warning.message)
            if not (complex_ids or re.search(WARNINGS, str(warning.message))):
                raise Failure(f"warned: {warning.category.__name__}: {warning.message}")
        self._check_unchanged(before, () if error else call.notes.get("written", ()), error is None)
        if error is not None:
            return self._judge_error(error, rules)
        if rules.broken:
            raise Failure(f"returned, although the call breaks {rules.broken}")
        return self._judge_results(out, before, rules, original)

    def _check_unchanged(self, before: list[Seen], written: tuple[str, ...], returned: bool) -> None:
        may_change = [self.call.arguments.get(name) for name in written]
        if returned:
            may_change += [self.call.arguments.get(name) for name in ("input", "logits") if self._consumes(name)]
        for tensor, memory, facts in before:
            if any(tensor is t for t in may_change):
                continue
            name = next((n for n, v in self.call.arguments.items() if v is tensor), "a leaf")
            if facts_of(tensor) != facts:
                raise Failure(f"{name} was {facts} and is {facts_of(tensor)}")
            now = memory_of(tensor)
            if memory is not None and now is not None and not torch.equal(memory, now):
                raise Failure(f"the memory of {name} was changed")
            if tensor.is_leaf and tensor.grad is not None:
                raise Failure(f"{name} got a gradient")

    def _consumes(self, name: str) -> bool:
        """Whether the call may overwrite this argument."""
        flag, value = self.call.arguments.get("consume_logits"), self.call.arguments.get(name)
        if not flag or self.mode in ("no_grad", "inference") or functions.is_freed(value):
            return False
        return isinstance(value, Tensor) and value.layout is torch.strided and value.requires_grad

    def _judge_error(self, error: Exception, rules: Rules) -> str:
        message = str(error)
        if "no implementation found" in message and any(isinstance(v, type) for v in self.call.arguments.values()):
            return "TypeError: a class"  # torch's, of its protocol __torch_function__
        for errors, names in rules.broken:
            if isinstance(error, errors) and any(re.search(rf"\b{re.escape(n)}", message) for n in names):
                self._check_message(message)
                return f"{type(error).__name__}: {names[0]}"
        if any(n in message for n in rules.open) and type(error).__name__ in DOCUMENTED:
            if "" not in rules.open:
                self._check_message(message)
            return f"{type(error).__name__}: open"
        if (
            isinstance(error, NotImplementedError)
            and "meta tensor" in message
            and self.call.name.startswith("npu_xent.compat.nnsight")
        ):
            return "NotImplementedError: meta"  # torch's: the loss cannot be moved to the CPU
        trace = "".join(traceback.format_exception(error)[-3:])
        broken = f"; the call breaks {rules.broken}, open {rules.open}" if rules.broken or rules.open else ""
        raise Failure(f"raised {type(error).__name__}: {message[:500]}{broken}\n{trace[-1500:]}")

    def _check_message(self, message: str) -> None:
        """Ours, and short enough to read."""
        if len(message) > 1500:
            raise Failure(f"a message of {len(message)} characters: {message[:300]}")
        if "Declaration:" in message or "INTERNAL ASSERT" in message or "Expected a value of type" in message:
            raise Failure(f"a message of torch's dispatcher: {message[:500]}")

    def _outputs(self, out: Any) -> dict[str, Tensor]:
        values = (out,) if isinstance(out, Tensor) else tuple(out or ())
        return {n: v for n, v in zip(self.call.outputs, values, strict=False) if v is not None}

    def _judge_results(self, out: Any, before: list[Seen], rules: Rules, original: dict[str, Tensor]) -> str:
        call, a = self.call, self.call.arguments
        if not call.outputs:
            return "returned"
        outputs = self._outputs(out)
        upstream = self._upstream(outputs)
        grads = self._gradients(outputs, upstream)
        self._check_unchanged(before, (), True)
        if call.truth is None or not call.compared or rules.open:
            return "returned"
        if any(isinstance(v, Tensor) and v.is_meta for v in a.values()):
            upstream = {n: torch.zeros(u.shape, dtype=u.dtype) for n, u in upstream.items()}
        expected = call.truth(a | original | {"autocast": self.mode == "autocast", "notes": call.notes}, upstream)
        if not expected:
            return "returned"
        for name, value in outputs.items():
            if name in expected:
                compare(name, value, expected[name])
            elif name in call.outputs:
                raise Failure(f"returned {name}, which was not asked for")
        if missing := [n for n in call.outputs if n in expected and n not in outputs]:
            raise Failure(f"{missing} were asked for and not returned")
        for name, grad in grads.items():
            if name in expected:
                like = expected[name]
                if grad is None:
                    raise Failure(f"{name} has no gradient")
                leaf = self.leaves[name]
                if grad.dtype != leaf.dtype or grad.shape != leaf.shape:
                    raise Failure(f"the gradient of {name} is {describe(grad)}, and {name} {describe(leaf)}")
                compare(f"gradient of {name}", grad, like)
        return "right" if grads else "right, no gradient"

    def _upstream(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the outputs, or of some of them."""
        source = self.source
        wanted = [n for n in self.call.with_gradient if n in outputs and outputs[n].requires_grad]
        if len(wanted) > 1 and source.maybe(0.5):
            wanted = [source.pick(wanted)]
        grads = {}
        for name in wanted:
            like = outputs[name]
            if source.maybe(0.3):
                grad = torch.ones(like.shape, dtype=like.dtype)
            elif source.maybe(0.2):
                grad = torch.full(
                    (), source.pick((0.5, -3.0) if "selected" in self.call.name else (0.5, -3.0, 0.0)), dtype=like.dtype
                ).expand(like.shape)
            else:
                grad = source.normal(like.shape, like.dtype)
            grads[name] = grad.to(like.device)
        return grads

    def _gradients(self, outputs: dict[str, Tensor], upstream: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Of the leaves. At times twice, which must give the same."""
        leaves = list(self.leaves.values())
        if not upstream or not leaves:
            return {}
        of, grads = [outputs[n] for n in upstream], list(upstream.values())
        if any(o.is_meta for o in of):
            return {}
        twice = self.source.maybe(0.1) and not any(map(self._consumes, ("input", "logits")))
        try:
            found = torch.autograd.grad(of, leaves, grads, retain_graph=twice, allow_unused=True)
            if twice:
                again = torch.autograd.grad(of, leaves, grads, allow_unused=True)
                for first, second in zip(found, again, strict=True):
                    same = first is None or torch.equal(first.double().nan_to_num(7), second.double().nan_to_num(7))
                    if not same:
                        raise Failure("the second backward gives another gradient than the first")
        except (RuntimeError, ValueError, TypeError) as error:
            raise Failure(f"the backward raised {type(error).__name__}: {str(error)[:600]}") from error
        return dict(zip(self.leaves, found, strict=True))

    def _same_as_torch(self, out: Any, error: Exception | None, before: list[Seen]) -> str:
        """patch_torch: what torch's function does with these arguments."""
        self._check_unchanged(before, (), error is None)
        if any(map(functions.is_freed, self.call.arguments.values())):
            if isinstance(error, (RuntimeError, IndexError)):
                return f"{type(error).__name__}: freed"
            raise Failure(f"{error!r:.600}, of freed memory")
        theirs, their_error = None, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with self._modes():
                    assert self.call.torchs is not None
                    theirs = self.call.torchs(**self.call.arguments)
            except Exception as raised:
                their_error = raised
        if error is None and isinstance(their_error, IndexError) and self.source.device.type != "cpu":
            return "returned"  # no device checks targets, but torch_npu may leave the call to the CPU
        if (error is None) != (their_error is None) or type(error) is not type(their_error):
            raise Failure(f"{error!r:.600}, and torch {their_error!r:.600}")
        if error is not None:
            return f"{type(error).__name__}: as torch's"
        if out.shape != theirs.shape or out.dtype != theirs.dtype or out.device != theirs.device:
            raise Failure(f"returned {describe(out)}, and torch {describe(theirs)}")
        if out.requires_grad != theirs.requires_grad:
            raise Failure(f"requires_grad is {out.requires_grad}, and torch's {theirs.requires_grad}")
        upstream = self._upstream({"loss": out})
        of_torch: dict[str, Tensor | None] | Failure
        try:
            of_torch = self._gradients({"loss": theirs}, upstream)
        except Failure as failure:  # torch takes some targets in the forward alone
            of_torch = failure
        try:
            mine = self._gradients({"loss": out}, upstream)
        except Failure as failure:
            if str(failure) == str(of_torch):  # a call that is left to torch
                return "raised in the backward: as torch's"
            raise
        if isinstance(of_torch, Failure):
            return "returned"
        if out.is_meta or out.layout is not torch.strided:
            return "returned"
        x = self.call.arguments["input"]
        if not bool(x.double().isfinite().all()):  # float8 has no isfinite
            return "returned"  # NaN in ignored rows
        largest = x.detach().double().abs().max().item() if x.numel() else 0.0
        wide: dict[str, Tensor] = {}
        for name, a, b in [("loss", out, theirs), *((n, mine[n], of_torch[n]) for n in mine)]:
            if (a is None) != (b is None):
                raise Failure(f"{name}: {a}, and torch {b}")
            if a is None:
                continue
            eps = max(torch.finfo(a.dtype).eps, torch.finfo(out.dtype).eps)
            # There torch's autocast leaves log_softmax in the dtype of the logits.
            if out.device.type != "cpu" and self.mode == "autocast":
                eps = max(eps, torch.finfo(x.dtype).eps)
            a, b = (t.detach().double().as_subclass(Tensor) for t in (a, b))
            size = b.abs().nan_to_num(0, 0, 0).amax() if b.numel() else 1.0
            if eps < 1e-4 or (out.device.type != "cpu" and self.mode == "autocast"):
                close = ((a - b).abs() <= 64 * eps * (size + largest + 1)) | (a == b)
            else:  # torch rounds in between: what is not torch's own result must be better
                wide = wide or self._of_torch_in_float64(upstream)
                true = wide[name].to(b.device)
                of_sums = 64 * torch.finfo(torch.float32).eps * (size + largest + 1)
                close = ((a - true).abs() <= 2 * eps * true.abs() + of_sums) | (a == b)
            if not bool((close | (a.isnan() & b.isnan())).all()):
                raise Failure(f"{name}: {a.flatten()[:8].tolist()}, and torch {b.flatten()[:8].tolist()}")
        return "right"

    def _of_torch_in_float64(self, upstream: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and the gradients of torch's function, of the same arguments in float64."""
        call = self.call
        assert call.torchs is not None
        wide = dict(call.arguments)
        for name, value in wide.items():
            if isinstance(value, Tensor):
                value = value.detach().cpu()
                value = value.as_subclass(Tensor) if value.layout is torch.strided else value.to_dense()
                wide[name] = value.double() if value.is_floating_point() else value
        leaves = {name: wide[name].requires_grad_() for name in self.leaves}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = call.torchs(**wide)
        found = {"loss": loss.detach()}
        if upstream and leaves:
            grads = torch.autograd.grad(loss, list(leaves.values()), upstream["loss"].cpu().double(), allow_unused=True)
            found |= dict(zip(leaves, grads, strict=True))
        return found


DOCUMENTED = {
    *("ValueError", "TypeError", "IndexError", "RuntimeError", "ConstraintError", "TargetConstraintError"),
    *("AssertionError", "NotImplementedError", "ZeroDivisionError", "OutOfMemoryError"),
}


def compare(name: str, actual: Tensor, expected: Near) -> None:
    if actual.dtype != expected.dtype:
        raise Failure(f"{name} has dtype {actual.dtype} instead of {expected.dtype}")
    if actual.shape != expected.value.shape:
        raise Failure(f"{name} has shape {list(actual.shape)} instead of {list(expected.value.shape)}")
    if actual.is_meta:
        return
    values = actual.detach().cpu().as_subclass(Tensor).double()
    wanted = expected.value
    fits = ((values - wanted).abs() <= expected.allowed) | (values == wanted) | (values.isnan() & wanted.isnan())
    if actual.dtype.is_floating_point:  # what is finite, but beyond the dtype, is infinite or the largest number
        largest = torch.finfo(actual.dtype).max
        beyond = wanted.isfinite() & (wanted.abs() > largest * 0.99)
        fits |= beyond & (values * wanted.sign() >= largest * 0.98)
    if not bool(fits.all()):
        i = int(fits.logical_not().flatten().nonzero()[0])
        seen, true, off = (t.flatten()[i].item() for t in (values, wanted, expected.allowed.expand(wanted.shape)))
        raise Failure(f"{name}, element {i} of {list(actual.shape)}, is {seen!r}, expected {true!r} +- {off:.2e}")


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r:.200}"
    if value.layout is not torch.strided or value.is_nested:
        return f"{value.dtype}, {value.layout}, nested {value.is_nested}"
    kind = f"{type(value).__name__} {list(value.shape)} {value.dtype} on {value.device}, strides {value.stride()}"
    kind += " requires_grad" * value.requires_grad + " no leaf" * (not value.is_leaf) + " negative" * value.is_neg()
    with contextlib.suppress(Exception):
        if value.numel() <= 24 and not value.is_meta:
            kind += f" = {value.detach().tolist()}"
    return kind


# The loop -------------------------------------------------------------------------------------------------------------


class Counts:
    """How many calls of each function had which verdict."""

    def __init__(self) -> None:
        self.of: Counter[tuple[str, str]] = Counter()
        self.failures: list[tuple[int, str]] = []

    def lines(self) -> list[str]:
        by_function: dict[str, Counter[str]] = {}
        for (name, verdict), n in self.of.items():
            kind = verdict.partition(": ")[0]
            by_function.setdefault(name, Counter())[kind] += n
        lines = []
        for name, verdicts in sorted(by_function.items()):
            parts = ", ".join(f"{verdict} {n}" for verdict, n in verdicts.most_common())
            lines.append(f"  {name:<58}{sum(verdicts.values()):>8}  {parts}")
        return lines


def run_case(seed: int, number: int, device: str) -> tuple[str, str, str | None]:
    """The function's name, the verdict, and the failure."""
    case = None
    try:
        case = Case(seed, number, device)
        return case.call.name, case.run(), None
    except Failure as failure:
        assert case is not None
        return case.call.name, "FAILED", f"{failure}\n{case}"
    except Exception:  # of the fuzzer itself
        return case.call.name if case else "?", "FAILED", f"the fuzzer raised\n{traceback.format_exc()}\n{case or ''}"


def child(seed: int, first: int, step: int, device: str, board: str, seconds: float, calls: int) -> None:
    """Run cases, and write the number of each on the board before it starts."""
    faulthandler.enable()
    prepare(device)
    file = os.open(board, os.O_RDWR)
    place = mmap.mmap(file, 16)
    end, number, done = time.monotonic() + seconds, first, 0
    batch: Counter[tuple[str, str]] = Counter()
    while time.monotonic() < end and done < calls:
        place[:16] = struct.pack("qd", number, time.monotonic())
        name, verdict, failure = run_case(seed, number, device)
        batch[name, verdict] += 1
        if failure is not None:
            print(repr(("failure", number, name, failure)), flush=True)
        number, done = number + step, done + 1
        if done % 100 == 0:
            print(repr(("counts", dict(batch))), flush=True)
            batch.clear()
    print(repr(("counts", dict(batch))), flush=True)
    print(repr(("end",)), flush=True)


def prepare(device: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(Sparse|prototype|nested).*")
    if device.startswith("npu"):
        import importlib

        importlib.import_module("torch_npu")


def reproducer(seed: int, number: int, device: str) -> str:
    by = "python -m cann_sim" if device.startswith("npu") else "python"
    return f"{by} tests/fuzz_calls.py --seed {seed} --case {number}" + f" --device {device}" * (device != "cpu")


def fuzz(seed: int, seconds: float, calls: int, device: str, at_most: int) -> Counts:
    """Children, one after another, until the time or the calls are over."""
    counts, first, start = Counts(), 0, time.monotonic()
    with tempfile.NamedTemporaryFile() as board:
        board.write(bytes(16))
        board.flush()
        while (left := seconds - (time.monotonic() - start)) > 0 and first < calls:
            command = [sys.executable, *(["-m", "cann_sim"] if device.startswith("npu") else []), __file__]
            command += ["--child", board.name, "--seed", str(seed), "--first", str(first), "--device", device]
            command += ["--seconds", str(left), "--calls", str(calls - first)]
            with tempfile.TemporaryFile("w+") as log:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
                ended = _follow(process, board.name, counts, seed, device)
                if ended:
                    break
                number = struct.unpack("qd", Path(board.name).read_bytes())[0]
                log.seek(0)
                why = f"the process ended with {process.returncode} (a signal, if negative; -9: it hung)"
                counts.of["a call that ended the process", "FAILED"] += 1
                _report(counts, seed, number, device, f"{why}\n{log.read()[-3000:]}")
                first = number + 1
            if len(counts.failures) >= at_most:
                break
    return counts


def _follow(process: subprocess.Popen[str], board: str, counts: Counts, seed: int, device: str) -> bool:
    """Read what a child says, and kill it if it hangs. Whether it came to its end."""
    import ast
    import threading

    def watch() -> None:
        while process.poll() is None:
            time.sleep(1)
            _, began = struct.unpack("qd", Path(board).read_bytes())
            if began and time.monotonic() - began > HANGS_AFTER:
                process.kill()

    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None
    ended = False
    for line in process.stdout:
        try:
            kind, *values = ast.literal_eval(line)
        except (ValueError, SyntaxError):
            continue  # printed by a call
        if kind == "counts":
            counts.of.update(values[0])
        elif kind == "failure":
            _report(counts, seed, values[0], device, f"{values[1]}: {values[2]}")
        ended |= kind == "end"
    process.wait()
    return ended


def _report(counts: Counts, seed: int, number: int, device: str, what: str) -> None:
    counts.failures.append((number, what))
    if len(counts.failures) <= 40:
        print(f"\nFAILED, case {number}: {what}\n  again: {reproducer(seed, number, device)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--calls", type=int, default=10**12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--at-most", type=int, default=1000, metavar="N", help="stop after N failures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    if options.child:
        child(
            options.seed, options.first, 1, options.device, options.child, options.seconds, options.calls
        )  # fmt: skip
        return 0
    if options.case is not None:
        prepare(options.device)
        case = Case(options.seed, options.case, options.device)
        print(case, flush=True)
        name, verdict, failure = run_case(options.seed, options.case, options.device)
        print(f"{name}: {verdict}", failure or "", sep="\n")
        return int(failure is not None)
    start = time.monotonic()
    counts = fuzz(options.seed, options.seconds, options.calls, options.device, options.at_most)
    seconds, calls = time.monotonic() - start, sum(counts.of.values())
    print(*counts.lines(), sep="\n")
    print(f"{calls} calls on {options.device} in {seconds:.0f} s, seed {options.seed}: {len(counts.failures)} failed")
    return int(bool(counts.failures) or not calls)


if __name__ == "__main__":
    sys.exit(main())
