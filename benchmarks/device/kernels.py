"""The device kernels as Python functions with the signatures of the primitives, launched on cann_sim.

They take CPU tensors, whose memory is the global memory of a launch, and make the plan, the workspace and all launches
of an operation in their order.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import subprocess
import sys
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

import cann_sim
import npu_xent._C as _C

ROOT = Path(__file__).resolve().parents[2]
SOC = "Ascend910B3"

# The extension exports the numbers and layouts of csrc/tiling, so they are not repeated here.
INTERFACE = _C.KERNEL_INTERFACE
Stage = IntEnum("Stage", INTERFACE["Stage"])
Reduction = IntEnum("Reduction", INTERFACE["Reduction"])
RowMode = IntEnum("RowMode", INTERFACE["RowMode"])
LogitsType = IntEnum("LogitsType", INTERFACE["LogitsType"])
REDUCE_ROWS, REDUCE_WEIGHTS, SCALE_CHUNK, BLOCK, TOTALS = (
    INTERFACE["constants"][name] for name in ("reduce_rows", "reduce_weights", "scale_chunk", "block", "totals")
)
DTYPES = {torch.float32: LogitsType.fp32, torch.float16: LogitsType.fp16, torch.bfloat16: LogitsType.bf16}

# The tensors of each kernel, in the order of its parameters; a plan and arguments follow.
STATS = ("lse", "lse_low", "picked", "wsum")
STATS_BY_ROW = ("entropy", "top1")
PART_STATS = ("part_lse", "part_lse_low", "part_picked", "part_wsum", "part_weight")
PART_STATS_BY_ROW = ("part_entropy", "part_top1")
TENSORS = {
    "row_stats": ("logits", "target", "weight", "row_scale", *STATS, "part_weight", *STATS_BY_ROW, "log_prob"),
    "row_grad": (
        *("logits", "target", "weight", "row_scale", *STATS[:2], "entropy", "totals"),
        *("grad_loss", "grad_z_loss", "grad_entropy", "grad"),
    ),
    "row_stats_grad": ("logits", "target", "weight", "totals", *STATS, "grad"),
    "reduce_rows": (
        *("target", "weight", *STATS, *PART_STATS, "totals", "loss", "z_loss", "sums"),
        *(*STATS_BY_ROW, *PART_STATS_BY_ROW),
    ),
    "scale": ("x", "factor"),
}


def structure(name: str, layout: dict[str, Any]) -> type[ctypes.Structure]:
    """A struct that kernels take by value, from its size and members; RuntimeError if ctypes lays it out otherwise."""
    types = {"int64": ctypes.c_int64, "float32": ctypes.c_float}
    fields = [(member, types[kind]) for member, _, kind in layout["members"]]
    result = type(name, (ctypes.Structure,), {"_fields_": fields})
    offsets = [(member, getattr(result, member).offset, kind) for member, _, kind in layout["members"]]
    if ctypes.sizeof(result) != layout["size"] or offsets != layout["members"]:
        raise RuntimeError(f"{name} is laid out as {layout} in C++, but takes {ctypes.sizeof(result)} bytes, {offsets}")
    return result


Plan = structure("Plan", INTERFACE["XentPlan"])
Args = structure("Args", INTERFACE["XentArgs"])


@functools.cache
def library() -> cann_sim.KernelLibrary:
    """The kernels, by the device build: CMake, with ASCEND_HOME_PATH at cann_sim's toolkit."""
    # The folder in which setup.py builds them too.
    folder = ROOT / "build" / f"kernels-{SOC}-{cann_sim.__version__}-simulated"
    environment = {**os.environ, "ASCEND_HOME_PATH": cann_sim.toolkit_path(), "SOC_VERSION": SOC}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        for command in (
            ["cmake", "-S", str(ROOT / "csrc" / "ascendc"), "-B", str(folder), "-G", "Unix Makefiles"],
            ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)],
        ):
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
        return cann_sim.KernelLibrary(folder / "libnpu_xent_kernels.so")


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """All that lies between a tensor's first and last element."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor if tensor.is_contiguous() else tensor.as_strided((last + 1,), (1,))


def row_scale(row_temperature: torch.Tensor | None) -> torch.Tensor | None:
    """What kernels multiply each row's logits by: NaN if a temperature is not positive and finite."""
    if row_temperature is None:
        return None
    scale = row_temperature.float().reciprocal()
    return scale.masked_fill(~((scale > 0) & (scale < float("inf"))), float("nan"))


@dataclass
class Device:
    """A number of cores, and the reports of what was launched on them."""

    cores: int = 48
    config: cann_sim.Config | None = None
    reports: list[cann_sim.Report] = field(default_factory=list)
    forced: dict[str, int] = field(default_factory=dict)  # fields of the plan to set
    config_of: int | None = None  # the one launch, counted from 0, that `config` is for; None: all

    def plan(self, logits: torch.Tensor, softcap: float | None = None, by_row: bool = False) -> Plan:
        """The planner's plan for these logits, with what the test forces."""
        plan = _C.plan_rows(*logits.shape, DTYPES[logits.dtype], softcap=softcap is not None, by_row=by_row)
        return Plan(**{name: self.forced.get(name, plan[name]) for name, _ in Plan._fields_})

    def launch(self, kernel: str, work: int, plan: Plan | None, args: Args, **tensors: object) -> None:
        """Launch on as many cores as have work. Tensors by name; those left out are null."""
        assert tensors.keys() <= set(TENSORS[kernel]), f"{kernel} has no {tensors.keys() - set(TENSORS[kernel])}"
        values = [tensors.get(name) for name in TENSORS[kernel]]
        memory = [_memory(value) if isinstance(value, torch.Tensor) else value for value in values]
        cores = max(1, min(self.cores, work))
        structs = (args,) if plan is None else (plan, args)
        config = self.config if self.config_of in (None, len(self.reports)) else None
        self.reports.append(library().launch(f"npu_xent_{kernel}", cores, *memory, *structs, config=config))

    @staticmethod
    def _outputs(**tensors: torch.Tensor | None) -> dict[str, object]:
        """Tensors that a launch is to write; None for those that it is not asked for."""
        return {name: None if tensor is None else cann_sim.Uninit(tensor) for name, tensor in tensors.items()}

    def _args(self, logits, **fields) -> Args:
        n, c = logits.shape
        values = {
            "dtype": DTYPES[logits.dtype],
            "rows": n,
            "cols": c,
            "logits_stride": logits.stride(0),
            "output_stride": c,
            "num_classes": c,
            "ignore_index": -100,
            "logit_scale": 1.0,
            "grad_scale": 1.0,
            "target_share": 1.0,
        }
        return Args(**(values | fields))

    def row_stats(
        self,
        logits,
        target,
        weight=None,
        row_temperature=None,
        *,
        ignore_index=-100,
        logit_scale=1.0,
        softcap=None,
        class_start=0,
        num_classes=None,
        need_wsum=False,
        need_log_prob=False,
        need_entropy=False,
        need_top1=False,
        read_ignored=False,
    ):
        """(lse, lse_low, picked, wsum, log_prob, entropy, top1); top1 is 1.0 or 0.0"""
        n, c = logits.shape
        scale = row_scale(row_temperature)
        by_row = scale is not None or need_entropy or need_top1
        plan = self.plan(logits, softcap, by_row)
        args = self._args(
            logits,
            class_start=class_start,
            num_classes=num_classes or class_start + c,
            ignore_index=ignore_index,
            read_ignored=read_ignored or need_log_prob,
            logit_scale=logit_scale,
            softcap=softcap or 0.0,
            grad_scale=logit_scale,
            row_scaled=scale is not None,
            by_row=by_row,
        )
        rows = {"logits": logits, "target": target, "weight": weight, "row_scale": scale}
        stats = self._new_stats(n, wsum=need_wsum, entropy=need_entropy, top1=need_top1)
        log_prob = torch.empty(n, c, dtype=logits.dtype) if need_log_prob else None
        apart = plan.mode == RowMode.split or need_entropy or need_top1
        if plan.mode == RowMode.split:
            self._split_stats(plan, args, rows, stats)
        else:
            outputs = self._outputs(**stats, log_prob=None if apart else log_prob)
            self.launch("row_stats", self._items(plan, n), plan, args, **rows, **outputs)
        if need_log_prob and apart:
            args.stage = Stage.log_prob_only
            outputs = self._outputs(log_prob=log_prob)
            known = {name: stats[name] for name in ("lse", "lse_low")}
            items = self._items(plan, n) if plan.mode == RowMode.short else n * plan.chunks
            self.launch("row_stats", items, plan, args, **rows, **known, **outputs)
        *of_loss, entropy, top1 = stats.values()
        return (*of_loss, log_prob, entropy, top1)

    @staticmethod
    def _new_stats(n: int, **wanted: bool) -> dict[str, torch.Tensor | None]:
        return {name: torch.empty(n) if wanted.get(name, True) else None for name in (*STATS, *STATS_BY_ROW)}

    @staticmethod
    def _items(plan: Plan, n: int) -> int:
        return -(-n // plan.rows_per_tile) if plan.mode == RowMode.short else n * plan.parts

    def _split_stats(self, plan, args, rows, stats) -> None:
        """Statistics of parts of rows, and then of rows."""
        n = rows["target"].numel()
        wanted = {f"part_{name}": value is not None for name, value in stats.items()}
        wanted["part_weight"] = wanted["part_wsum"]
        parts = {
            name: torch.empty(n, plan.parts) if wanted[name] else None for name in (*PART_STATS, *PART_STATS_BY_ROW)
        }
        args.stage = Stage.partial_stats
        of_parts = {name.removeprefix("part_") if name != "part_weight" else name: part for name, part in parts.items()}
        self.launch("row_stats", n * plan.parts, plan, args, **rows, **self._outputs(**of_parts))
        args.stage = Stage.join_parts
        operands = {name: rows[name] for name in ("target", "weight")}
        self.launch("reduce_rows", n, plan, args, **operands, **parts, **self._outputs(**stats))

    def _grad_args(
        self, logits, grad, reduction, label_smoothing, lse_square_scale, logit_scale, softcap, grad_scale, **fields
    ):
        classes = fields["num_classes"]
        return self._args(
            logits,
            output_stride=grad.stride(0),
            reduction=Reduction[reduction],
            logit_scale=logit_scale,
            softcap=softcap or 0.0,
            grad_scale=logit_scale if grad_scale is None else grad_scale,
            target_share=1 - label_smoothing,
            class_share=label_smoothing / classes,
            lse_square_scale=lse_square_scale,
            **fields,
        )

    def row_grad(
        self,
        logits,
        target,
        weight,
        lse,
        lse_low,
        totals,
        grad_loss,
        grad_z_loss=None,
        row_temperature=None,
        entropy=None,
        grad_entropy=None,
        *,
        reduction="mean",
        ignore_index=-100,
        label_smoothing=0.0,
        lse_square_scale=0.0,
        logit_scale=1.0,
        softcap=None,
        grad_scale=None,
        class_start=0,
        num_classes=None,
        in_place=False,
        unit_upstream=False,
    ):
        """The gradient; over the logits if in_place."""
        n, c = logits.shape
        scale = row_scale(row_temperature)
        by_row = scale is not None or grad_entropy is not None
        plan = self.plan(logits, softcap, by_row)
        grad = logits if in_place else torch.empty(n, c, dtype=logits.dtype)
        args = self._grad_args(
            logits,
            grad,
            reduction,
            label_smoothing,
            lse_square_scale,
            logit_scale,
            softcap,
            grad_scale,
            class_start=class_start,
            num_classes=num_classes or class_start + c,
            ignore_index=ignore_index,
            unit_upstream=unit_upstream,
            row_scaled=scale is not None,
            by_row=by_row,
        )
        items = self._items(plan, n) if plan.mode == RowMode.short else n * plan.chunks
        self.launch(
            "row_grad", items, plan, args, logits=logits, target=target, weight=weight, row_scale=scale, lse=lse,
            lse_low=lse_low, entropy=None if grad_entropy is None else entropy, totals=totals, grad_loss=grad_loss,
            grad_z_loss=grad_z_loss, grad_entropy=grad_entropy,
            grad=grad if in_place else cann_sim.Uninit(grad),
        )  # fmt: skip
        return grad

    def row_stats_grad(
        self,
        logits,
        target,
        weight,
        totals,
        *,
        reduction="mean",
        ignore_index=-100,
        label_smoothing=0.0,
        lse_square_scale=0.0,
        logit_scale=1.0,
        softcap=None,
        grad_scale=None,
        read_ignored=False,
        in_place=False,
    ):
        """(lse, lse_low, picked, wsum, grad)"""
        n, c = logits.shape
        plan = self.plan(logits, softcap)
        grad = logits if in_place else torch.empty(n, c, dtype=logits.dtype)
        rows = {"logits": logits, "target": target, "weight": weight}
        stats = self._new_stats(n, wsum=label_smoothing != 0, entropy=False, top1=False)
        args = self._grad_args(
            logits,
            grad,
            reduction,
            label_smoothing,
            lse_square_scale,
            logit_scale,
            softcap,
            grad_scale,
            num_classes=c,
            ignore_index=ignore_index,
            read_ignored=read_ignored,
            unit_upstream=1,
        )
        if plan.mode == RowMode.split:
            self._split_stats(plan, args, rows, stats)
            grad = self.row_grad(
                logits, target, weight, stats["lse"], stats["lse_low"], totals, None, reduction=reduction,
                ignore_index=ignore_index, label_smoothing=label_smoothing, lse_square_scale=lse_square_scale,
                logit_scale=logit_scale, softcap=softcap, grad_scale=grad_scale, in_place=in_place, unit_upstream=True,
            )  # fmt: skip
        else:
            self.launch(
                "row_stats_grad", self._items(plan, n), plan, args, **rows, totals=totals,
                **self._outputs(**{name: stats[name] for name in STATS}),
                grad=grad if in_place else cann_sim.Uninit(grad),
            )  # fmt: skip
        return (*(stats[name] for name in STATS), grad)

    def reduce_rows(
        self,
        target,
        weight=None,
        lse=None,
        lse_low=None,
        picked=None,
        wsum=None,
        totals=None,
        *,
        reduction="mean",
        ignore_index=-100,
        label_smoothing=0.0,
        lse_square_scale=0.0,
        num_classes,
    ):
        """totals [3] without lse, else (loss, z_loss or None)."""
        n = target.numel()
        args = Args(
            rows=n,
            cols=num_classes,
            num_classes=num_classes,
            ignore_index=ignore_index,
            reduction=Reduction[reduction],
            target_share=1 - label_smoothing,
            class_share=label_smoothing / num_classes,
            lse_square_scale=lse_square_scale,
        )
        rows = {"target": target, "weight": weight}
        blocks = -(-n // REDUCE_ROWS)

        def run(stage: int, tasks: int, **tensors: object) -> None:
            args.stage = stage
            self.launch("reduce_rows", tasks, Plan(), args, **rows, **tensors)

        if lse is None:
            tasks = blocks + (-(-num_classes // REDUCE_WEIGHTS) if weight is not None else 0)
            sums, totals = torch.empty(tasks, BLOCK), torch.empty(TOTALS)
            run(Stage.block_totals, tasks, **self._outputs(sums=sums))
            run(Stage.join_totals, 1, sums=sums, **self._outputs(totals=totals))
            return totals
        stats = {"lse": lse, "lse_low": lse_low, "picked": picked, "wsum": wsum, "totals": totals}
        shape = n if reduction == "none" else ()
        loss, z_loss = torch.empty(shape), torch.empty(shape) if lse_square_scale else None
        if reduction == "none":
            run(Stage.block_loss, blocks, **stats, **self._outputs(loss=loss, z_loss=z_loss))
        else:
            sums = torch.empty(blocks, BLOCK)
            run(Stage.block_loss, blocks, **stats, **self._outputs(sums=sums))
            run(Stage.join_loss, 1, totals=totals, sums=sums, **self._outputs(loss=loss, z_loss=z_loss))
        return loss, z_loss

    def scale_(self, x: torch.Tensor, factor: torch.Tensor) -> None:
        """Multiply x, in place."""
        args = Args(dtype=DTYPES[x.dtype], cols=x.numel(), factor_dtype=DTYPES[factor.dtype])
        self.launch("scale", -(-x.numel() // SCALE_CHUNK), None, args, x=x, factor=factor)
