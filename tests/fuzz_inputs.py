"""Random arguments for tests/fuzz_calls.py: tensors of any kind and layout, and values of options, good and bad.

All of it comes from the seed and the number of the case, so a case can be made again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class Subclass(Tensor):
    """A subclass of torch.Tensor without any behaviour of its own."""


class Source(random.Random):
    """The random numbers of a case."""

    def __init__(self, seed: int, case: int, device: torch.device) -> None:
        super().__init__((seed << 40) + case)
        self.device, self.tensors = device, torch.Generator().manual_seed(self.getrandbits(60))

    def maybe(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, values: Sequence[Any]) -> Any:
        return values[self.randrange(len(values))]

    def normal(self, shape: Sequence[int], dtype: torch.dtype, spread: float = 1.0) -> Tensor:
        return (torch.randn(tuple(shape), generator=self.tensors) * spread).to(dtype)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(low, max(high, low + 1), tuple(shape), generator=self.tensors)

    # Sizes ------------------------------------------------------------------------------------------------------------

    def rows(self) -> int:
        return self.pick((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17))

    def classes(self) -> int:
        kind = self.random()
        if kind < 0.02:
            return 0
        if kind < 0.08:
            return self.pick((255, 256, 257, 300, 511, 1000))
        return self.pick((1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 40, 70))

    # Tensors ----------------------------------------------------------------------------------------------------------

    def logits(self, shape: Sequence[int], dtype: torch.dtype, class_dim: int, special: bool = True) -> Tensor:
        """Normally distributed; now and then with NaN, infinities, or values far from 0."""
        x = self.normal(shape, dtype, self.pick((1.0, 1.0, 3.0, 0.0, 10.0)))
        if special and x.numel() and self.maybe(0.25):
            flat = x.view(-1)
            for _ in range(self.randrange(1, 4)):
                flat[self.randrange(flat.numel())] = self.pick((NAN, INF, -INF, -INF, 100.0, -100.0, 1e-30))
            if self.maybe(0.2) and x.dim():
                x.select(class_dim, 0).fill_(-INF)
        return x

    def target(self, shape: Sequence[int], classes: int, ignore_index: Any) -> Tensor:
        """Classes and ignored rows in any integer dtype that holds them; now and then one out of range."""
        y = self.integers(0, classes, shape)
        dtype = torch.int64 if self.maybe(0.7) else self.pick(INTEGERS)
        limits = torch.iinfo(dtype)
        if y.numel():
            flat = y.view(-1)
            if isinstance(ignore_index, int) and limits.min <= ignore_index <= limits.max and self.maybe(0.6):
                flat[self.randrange(flat.numel()) :: self.randrange(1, 4)] = min(ignore_index, 2**63 - 1)
            if self.maybe(0.05):
                outside = self.pick((classes, -1, -101, 2**31, 2**63 - 1, -(2**63), 2**32))
                if limits.min <= outside <= limits.max:
                    flat[self.randrange(flat.numel())] = outside
        if classes - 1 > limits.max:
            return y
        return y.to(dtype)

    def weight(self, classes: int, dtype: torch.dtype) -> Tensor:
        w = 1 - 0.9 * torch.rand(classes, generator=self.tensors)
        if classes and self.maybe(0.15):
            w[self.randrange(classes)] = 0.0
        return w.to(self.pick((torch.float32, torch.float32, dtype)))

    def lay_out(self, values: Tensor, garbage: float = NAN) -> Tensor:
        """The same values (of one row, if expanded) in other memory, with garbage around them."""
        if self.maybe(0.4) or values.dtype in OTHER_FLOATS or values.numel() > 100_000:
            return values.to(self.device) if self.device.type != "cpu" else values
        values = values.to(self.device)
        kind = self.random()
        if kind < 0.08 and values.dim() and values.shape[0]:
            return values[:1].expand(values.shape)
        if kind < 0.14 and values.dtype in (torch.float32, torch.float64) and self.device.type == "cpu":
            return torch.complex(torch.zeros_like(values), -values).conj().imag  # torch's negative bit
        if kind < 0.2 and values.dim() == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if values.dtype is torch.bool:
            garbage = True
        elif not (values.is_floating_point() or values.is_complex()):
            garbage = 77
        order = list(range(values.dim()))
        if self.maybe(0.5):
            self.shuffle(order)
        steps = [self.pick((1, 1, 1, 2, 3)) for _ in order]
        begins = [self.pick((0, 0, 0, 1, 2)) for _ in order]
        ends = [self.pick((0, 0, 0, 1, 2)) for _ in order]
        sizes = [b + n * s + e for b, n, s, e in zip(begins, values.shape, steps, ends, strict=True)]
        offset = self.pick((0, 1, 3))
        count = 1
        for size in sizes:
            count *= size
        memory = torch.full((offset + count + 2,), garbage, dtype=values.dtype, device=self.device)
        block = memory[offset : offset + count].view([sizes[d] for d in order])
        block = block.permute([order.index(d) for d in range(len(order))])
        for d, (b, n, s) in enumerate(zip(begins, values.shape, steps, strict=True)):
            block = block.narrow(d, b, n * s).unflatten(d, (n, s)).select(d + 1, 0)
        block.copy_(values)
        return block

    def dressed(self, tensor: Tensor) -> Tensor:
        """Now and then a subclass, or a Parameter."""
        kind = self.random()
        if kind < 0.03:
            return tensor.as_subclass(Subclass)
        if kind < 0.06 and tensor.is_floating_point():
            return torch.nn.Parameter(tensor, requires_grad=False)
        return tensor

    def spoilt(self, tensor: Tensor) -> Any:
        """Something else than that tensor: another shape, dtype, layout or device, or no tensor."""
        kind = self.randrange(17)
        if kind == 0 and tensor.dim():
            return tensor.narrow(self.randrange(tensor.dim()), 0, 0)
        if kind == 1:
            return tensor.unsqueeze(self.randrange(tensor.dim() + 1))
        if kind == 2 and tensor.dim():
            return tensor.select(self.randrange(tensor.dim()), 0) if all(tensor.shape) else tensor.flatten()
        if kind == 3 and tensor.dim():
            dim = self.randrange(tensor.dim())
            return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)
        if kind == 4 and tensor.dim() > 1:
            return tensor.transpose(0, self.randrange(1, tensor.dim()))
        if kind == 5:
            return tensor.to(self.pick((*LOGITS, torch.complex64, torch.bool, torch.int64, torch.int32)))
        if kind == 6:
            return tensor.to(torch.float32).to(self.pick(OTHER_FLOATS))
        if kind == 7 and tensor.dim() and tensor.dtype not in OTHER_FLOATS:
            return tensor.to_sparse()
        if kind == 8 and tensor.dim() == 2 and tensor.dtype in LOGITS:
            return tensor.to_sparse_csr()
        if kind == 9 and tensor.dim() > 1 and len(tensor):
            return torch.nested.nested_tensor(
                list(tensor.unbind()), layout=self.pick((torch.strided, torch.jagged)), dtype=tensor.dtype
            )
        if kind == 10 and tensor.dtype == torch.float32:
            return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
        if kind == 11:
            return tensor.to("meta")
        if kind == 12:
            return tensor.tolist()
        if kind == 13 and tensor.dtype not in (torch.bfloat16, *OTHER_FLOATS):
            return tensor.numpy()
        if kind == 14 and tensor.numel():
            freed = tensor.clone(memory_format=torch.contiguous_format)
            freed.untyped_storage().resize_(self.pick((0, freed.nbytes - 1)))
            return freed
        return self.pick((None, "x", 1.5, 3, (), {}, object(), tensor.reshape(-1), Tensor))


# Values of options: documented ones with moderate results, documented ones that are not compared, and others ---------

NO_NUMBERS = ("0.1", None, [0.1], (), {}, 1j, b"1", 10**400, -(10**400), object(), float, np.array([0.1, 0.2]))
TENSORS_AS_NUMBERS = (
    torch.tensor(0.5),
    torch.tensor([1.0]),
    torch.tensor(1),
    torch.tensor([0.1, 0.2]),
    torch.tensor(1j),
    torch.tensor(0.5, device="meta"),
    torch.tensor(0.5, requires_grad=True),
    torch.tensor(NAN),
    np.array(0.5),
    np.array([0.5]),
)
ODD_NUMBERS = (1, True, np.float32(0.5), np.float64(0.25), np.float16(0.5), np.int64(1), Fraction(1, 2), Decimal("0.5"))
FLAGS = (True, False, True, False, 0, 1, None, np.True_, "yes", [], 2, 0.0)
GOOD: dict[str, tuple[Any, ...]] = {
    "reduction": ("mean", "sum", "none"),
    "label_smoothing": (0.0, 0.1, 1.0, 0.5, *ODD_NUMBERS),
    "lse_square_scale": (0.0, 0.1, 1e-4, *ODD_NUMBERS),
    "lse_square_scale_for_zloss": (0.0, 0.1, 1e-4, *ODD_NUMBERS),
    "logit_scale": (1.0, 0.7, -0.5, 2.0, 0.0, *ODD_NUMBERS),
    "mult": (1.0, 0.7, 2.0, -0.5, *ODD_NUMBERS),
    "softcap": (None, 2.0, 30.0, *ODD_NUMBERS),
    "temperature": (1.0, 0.7, 2.0, *ODD_NUMBERS),
    "ignore_index": (-100, -1, 0, 1, 4, 10**12, -(2**63), 2**63 - 1, True, np.int64(2), np.uint8(3), torch.tensor(1)),
    "chunk_rows": (None, 1, 2, 7, 1000, 2**31, 2**62, 2**63 - 1, np.int64(3), True),
    "loss_dtype": (None, torch.float32, torch.float64),
}
EXTREME: dict[str, tuple[Any, ...]] = {
    "lse_square_scale": (1e300, 1e30, 5e-324),
    "logit_scale": (1e300, -1e38, 1e-300, 5e-324, 2**70, -0.0),
    "mult": (1e300, 1e-300),
    "softcap": (1e-6, 1e6, 1e-3),
    "temperature": (1e-6, 1e6),
}
BAD: dict[str, tuple[Any, ...]] = {
    "reduction": ("MEAN", "", "mean ", "batchmean", None, 1, b"mean", ["mean"], 0.5, object(), "\0", "é" * 50),
    "label_smoothing": (-0.1, 1.0000001, NAN, INF, -INF, 2**70, -5e-324, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "lse_square_scale": (-1e-4, NAN, INF, -INF, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "lse_square_scale_for_zloss": (-1e-4, NAN, INF, 1e300, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "logit_scale": (NAN, INF, -INF, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "mult": (NAN, INF, -INF, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "softcap": (0, 0.0, -1.0, NAN, INF, 1e-7, 1e7, 2**70, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "temperature": (0, -1.0, NAN, INF, 1e-7, 1e7, 2**70, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "ignore_index": (
        *(1.5, NAN, 2**63, -(2**63) - 1, 2**70, np.float64(1), np.uint64(2**63)),
        *NO_NUMBERS,
        *TENSORS_AS_NUMBERS,
    ),
    "chunk_rows": (0, -1, 1.5, NAN, 2**63, *NO_NUMBERS, *TENSORS_AS_NUMBERS),
    "loss_dtype": (torch.int64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn, "float32", np.float32, float, 1),
}
