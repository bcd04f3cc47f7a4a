"""The device kernels as Python functions with the signatures of the primitives, launched on cann_sim.

With CPU tensors in the place of a device's: plan, workspace, the launches of an operation in their order. Tensors of
the caller are the global memory of a launch, to the byte.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

import cann_sim
import npu_xent._C as _C

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
WHOLE, PARTIAL_STATS, LOG_PROB_ONLY, JOIN_PARTS, BLOCK_TOTALS, JOIN_TOTALS, BLOCK_LOSS, JOIN_LOSS = range(8)
SHORT, RESIDENT, STREAMING, SPLIT = range(4)
REDUCE_ROWS, REDUCE_WEIGHTS = 256, 4096  # kReduceRows and kReduceWeights


class Plan(ctypes.Structure):
    """XentPlan of csrc/tiling/row_plan.h."""

    _fields_: ClassVar = [
        (name, ctypes.c_int64)
        for name in ("mode", "rows_per_tile", "chunk_cols", "chunks", "parts", "chunks_per_part", "slots")
    ]


class Args(ctypes.Structure):
    """XentArgs of csrc/tiling/row_args.h."""

    _fields_: ClassVar = [
        (name, ctypes.c_int64)
        for name in (
            *("stage", "dtype", "rows", "cols", "logits_stride", "output_stride", "class_start", "num_classes"),
            *("ignore_index", "reduction", "read_ignored", "unit_upstream"),
        )
    ] + [
        (name, ctypes.c_float)
        for name in ("logit_scale", "grad_scale", "target_share", "class_share", "lse_square_scale", "reserved")
    ]


@functools.cache
def library() -> cann_sim.KernelLibrary:
    """The kernels, by the device build: CMake, with ASCEND_HOME_PATH at cann_sim's toolkit."""
    folder = ROOT / "build" / "kernels_on_cann_sim"
    environment = {**os.environ, "ASCEND_HOME_PATH": cann_sim.toolkit_path(), "SOC_VERSION": "Ascend910B3"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for command in (
        ["cmake", "-S", str(ROOT / "csrc" / "ascendc"), "-B", str(folder), "-G", "Ninja"],
        ["cmake", "--build", str(folder)],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return cann_sim.KernelLibrary(folder / "libnpu_xent_kernels.so")


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """All that lies between a tensor's first and last element."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor if tensor.is_contiguous() else tensor.as_strided((last + 1,), (1,))


@dataclass
class Device:
    """A number of cores, and the reports of what was launched on them."""

    cores: int = 48
    config: cann_sim.Config = field(default_factory=cann_sim.Config)
    reports: list[cann_sim.Report] = field(default_factory=list)
    forced: dict[str, int] = field(default_factory=dict)  # fields of the plan to set

    def plan(self, logits: torch.Tensor) -> Plan:
        """The planner's plan for these logits, with what the test forces."""
        plan = _C.plan_rows(*logits.shape, DTYPES[logits.dtype])
        return Plan(**{name: self.forced.get(name, plan[name]) for name, _ in Plan._fields_})

    def launch(self, kernel: str, work: int, *args: object) -> None:
        """Launch on as many cores as have work."""
        memory = [_memory(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        report = library().launch(f"npu_xent_{kernel}", max(1, min(self.cores, work)), *memory, config=self.config)
        self.reports.append(report)

    @staticmethod
    def _out(tensor: torch.Tensor | None) -> object:
        return None if tensor is None else cann_sim.Uninit(tensor)

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
        *,
        ignore_index=-100,
        logit_scale=1.0,
        class_start=0,
        num_classes=None,
        need_wsum=False,
        need_log_prob=False,
        read_ignored=False,
    ):
        """(lse, lse_low, picked, wsum, log_prob)"""
        n, c = logits.shape
        plan = self.plan(logits)
        args = self._args(
            logits,
            class_start=class_start,
            num_classes=num_classes or class_start + c,
            ignore_index=ignore_index,
            read_ignored=read_ignored or need_log_prob,
            logit_scale=logit_scale,
            grad_scale=logit_scale,
        )
        stats = [torch.empty(n) for _ in range(3)]
        wsum = torch.empty(n) if need_wsum else None
        log_prob = torch.empty(n, c, dtype=logits.dtype) if need_log_prob else None
        if plan.mode == SPLIT:
            self._split_stats(plan, args, logits, target, weight, stats, wsum)
            if need_log_prob:
                args.stage = LOG_PROB_ONLY
                self.launch(
                    "row_stats",
                    n * plan.chunks,
                    logits,
                    target,
                    weight,
                    stats[0],
                    stats[1],
                    None,
                    None,
                    None,
                    cann_sim.Uninit(log_prob),
                    plan,
                    args,
                )
        else:
            self.launch(
                "row_stats",
                self._items(plan, n),
                logits,
                target,
                weight,
                *map(cann_sim.Uninit, stats),
                self._out(wsum),
                None,
                self._out(log_prob),
                plan,
                args,
            )
        return (*stats, wsum, log_prob)

    @staticmethod
    def _items(plan: Plan, n: int) -> int:
        return -(-n // plan.rows_per_tile) if plan.mode == SHORT else n * plan.parts

    def _split_stats(self, plan, args, logits, target, weight, stats, wsum) -> None:
        n = logits.shape[0]
        args.stage = PARTIAL_STATS
        parts = [torch.empty(n, plan.parts) for _ in range(5)]
        need_wsum = wsum is not None
        self.launch(
            "row_stats",
            n * plan.parts,
            logits,
            target,
            weight,
            *map(cann_sim.Uninit, parts[:3]),
            *((self._out(p) if need_wsum else None) for p in parts[3:]),
            None,
            plan,
            args,
        )
        args.stage = JOIN_PARTS
        self.launch(
            "reduce_rows",
            n,
            target,
            weight,
            *map(cann_sim.Uninit, stats),
            self._out(wsum),
            *parts[:3],
            *((p if need_wsum else None) for p in parts[3:]),
            None,
            None,
            None,
            None,
            plan,
            args,
        )

    def _grad_args(self, logits, grad, reduction, label_smoothing, lse_square_scale, logit_scale, grad_scale, **fields):
        classes = fields["num_classes"]
        return self._args(
            logits,
            output_stride=grad.stride(0),
            reduction=REDUCTIONS[reduction],
            logit_scale=logit_scale,
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
        *,
        reduction="mean",
        ignore_index=-100,
        label_smoothing=0.0,
        lse_square_scale=0.0,
        logit_scale=1.0,
        grad_scale=None,
        class_start=0,
        num_classes=None,
        in_place=False,
        unit_upstream=False,
    ):
        """The gradient; over the logits if in_place."""
        n, c = logits.shape
        plan = self.plan(logits)
        grad = logits if in_place else torch.empty(n, c, dtype=logits.dtype)
        args = self._grad_args(
            logits,
            grad,
            reduction,
            label_smoothing,
            lse_square_scale,
            logit_scale,
            grad_scale,
            class_start=class_start,
            num_classes=num_classes or class_start + c,
            ignore_index=ignore_index,
            unit_upstream=unit_upstream,
        )
        items = self._items(plan, n) if plan.mode == SHORT else n * plan.chunks
        self.launch(
            "row_grad",
            items,
            logits,
            target,
            weight,
            lse,
            lse_low,
            totals,
            grad_loss,
            grad_z_loss,
            grad if in_place else cann_sim.Uninit(grad),
            plan,
            args,
        )
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
        grad_scale=None,
        read_ignored=False,
        in_place=False,
    ):
        """(lse, lse_low, picked, wsum, grad)"""
        n, c = logits.shape
        plan = self.plan(logits)
        grad = logits if in_place else torch.empty(n, c, dtype=logits.dtype)
        stats = [torch.empty(n) for _ in range(3)]
        wsum = torch.empty(n) if label_smoothing else None
        args = self._grad_args(
            logits,
            grad,
            reduction,
            label_smoothing,
            lse_square_scale,
            logit_scale,
            grad_scale,
            num_classes=c,
            ignore_index=ignore_index,
            read_ignored=read_ignored,
            unit_upstream=1,
        )
        if plan.mode == SPLIT:
            self._split_stats(plan, args, logits, target, weight, stats, wsum)
            grad = self.row_grad(
                logits, target, weight, *stats[:2], totals, None, reduction=reduction, ignore_index=ignore_index,
                label_smoothing=label_smoothing, lse_square_scale=lse_square_scale, logit_scale=logit_scale,
                grad_scale=grad_scale, in_place=in_place, unit_upstream=True,
            )  # fmt: skip
        else:
            self.launch(
                "row_stats_grad",
                self._items(plan, n),
                logits,
                target,
                weight,
                totals,
                *map(cann_sim.Uninit, stats),
                self._out(wsum),
                grad if in_place else cann_sim.Uninit(grad),
                plan,
                args,
            )
        return (*stats, wsum, grad)

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
            reduction=REDUCTIONS[reduction],
            target_share=1 - label_smoothing,
            class_share=label_smoothing / num_classes,
            lse_square_scale=lse_square_scale,
        )
        blocks = -(-n // REDUCE_ROWS)
        none = [None] * 5
        if lse is None:
            tasks = blocks + (-(-num_classes // REDUCE_WEIGHTS) if weight is not None else 0)
            sums, totals = torch.empty(tasks, 8), torch.empty(3)
            args.stage = BLOCK_TOTALS
            self.launch(
                "reduce_rows",
                tasks,
                target,
                weight,
                *none[:4],
                *none,
                None,
                None,
                None,
                cann_sim.Uninit(sums),
                Plan(),
                args,
            )
            args.stage = JOIN_TOTALS
            self.launch(
                "reduce_rows",
                1,
                target,
                weight,
                *none[:4],
                *none,
                cann_sim.Uninit(totals),
                None,
                None,
                sums,
                Plan(),
                args,
            )
            return totals
        shape = n if reduction == "none" else 1
        loss = torch.empty(shape)
        z_loss = torch.empty(shape) if lse_square_scale else None
        sums = torch.empty(blocks, 8)
        args.stage = BLOCK_LOSS
        none_out = reduction == "none"
        self.launch(
            "reduce_rows",
            blocks,
            target,
            weight,
            lse,
            lse_low,
            picked,
            wsum,
            *none,
            totals,
            cann_sim.Uninit(loss) if none_out else None,
            self._out(z_loss) if none_out else None,
            None if none_out else cann_sim.Uninit(sums),
            Plan(),
            args,
        )
        if reduction != "none":
            args.stage = JOIN_LOSS
            self.launch(
                "reduce_rows",
                1,
                target,
                weight,
                *none[:4],
                *none,
                totals,
                cann_sim.Uninit(loss),
                self._out(z_loss),
                sums,
                Plan(),
                args,
            )
            loss = loss[0]
            z_loss = None if z_loss is None else z_loss[0]
        return loss, z_loss
