"""Every synchronisation of the device kernels taken away in turn, over launches that use all of them.

A site (a flag, a barrier, a queue's ordering, at one line) is needed if some launch is refused without it. What no
launch needs must be listed below with the reason why it is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import Device, RowMode

import cann_sim
from cann_sim.removal import removed_syncs

pytestmark = pytest.mark.cpu

BF16, FP32 = torch.bfloat16, torch.float32
FOUR = {"chunk_cols": 512, "chunks": 4, "chunks_per_part": 4, "parts": 1}
RESIDENT_PLAN = {"mode": RowMode.resident, "slots": 9, **FOUR}
STREAMING_PLAN = {"mode": RowMode.streaming, "slots": 6, **FOUR}
MANY_CHUNKS = {**STREAMING_PLAN, "chunks": 35, "chunks_per_part": 35}
TILES = {"rows_per_tile": 16}
ALL = {"weight": True, "label_smoothing": 0.1, "lse_square_scale": 1e-3}
ENTROPY = {"need_entropy": True, "need_top1": True}
SCALED = {"temperatures": True}
TILTED = {"reduction": "none", "entropy": True}

# name: (primitive, rows, cols, dtype, forced plan, options)
LAUNCHES: dict[str, tuple[str, int, int, torch.dtype, dict[str, int], dict[str, Any]]] = {
    "resident": ("row_stats_grad", 140, 2000, BF16, RESIDENT_PLAN, ALL),
    "resident, plain": ("row_stats_grad", 140, 2048, BF16, RESIDENT_PLAN, {}),
    "resident fp32": ("row_stats_grad", 140, 2000, FP32, RESIDENT_PLAN, {"label_smoothing": 0.1}),
    "resident fp32, scaled": ("row_stats_grad", 140, 2000, FP32, RESIDENT_PLAN, {"logit_scale": 0.5}),
    "resident log_prob": ("row_stats", 140, 2000, BF16, RESIDENT_PLAN, {"need_log_prob": True, "logit_scale": 2.0}),
    "streaming": ("row_stats_grad", 70, 2000, BF16, STREAMING_PLAN, ALL),
    "streaming, plain": ("row_stats_grad", 70, 2048, FP32, STREAMING_PLAN, {}),
    "streaming statistics": ("row_stats", 70, 2000, FP32, STREAMING_PLAN, {"need_wsum": True}),
    "streaming statistics bf16": ("row_stats", 70, 2000, BF16, STREAMING_PLAN, {"weight": True, "need_wsum": True}),
    "many chunks": ("row_stats", 6, 17_700, FP32, MANY_CHUNKS, {"need_wsum": True, "weight": True}),
    "gradient": ("row_grad", 140, 2000, BF16, STREAMING_PLAN, {"reduction": "none", **ALL}),
    "gradient fp32": ("row_grad", 140, 2000, FP32, STREAMING_PLAN, {"label_smoothing": 0.1}),
    "gradient over the logits": ("row_grad", 140, 2000, FP32, STREAMING_PLAN, {"in_place": True}),
    "one kept row": ("row_stats_grad", 3, 2000, BF16, RESIDENT_PLAN, {"undefined": True}),
    "short": ("row_stats_grad", 200, 100, BF16, TILES, ALL),
    "short, plain": ("row_stats_grad", 200, 192, FP32, TILES, {}),
    "short, scaled": ("row_stats_grad", 200, 300, BF16, TILES, {"logit_scale": 0.5, "label_smoothing": 0.1}),
    "short fp32, scaled": ("row_stats_grad", 200, 100, FP32, TILES, {"logit_scale": 0.5}),
    "short statistics": ("row_stats", 200, 130, FP32, TILES, {"need_wsum": True, "weight": True}),
    "short statistics, bad rows": ("row_stats", 200, 64, BF16, TILES, {"bad": True}),
    "short log_prob": ("row_stats", 200, 100, BF16, TILES, {"need_log_prob": True}),
    "short log_prob fp32": ("row_stats", 200, 100, FP32, TILES, {"need_log_prob": True}),
    "short gradient": ("row_grad", 200, 100, BF16, TILES, {"reduction": "none", "bad": True, **ALL}),
    "short gradient fp32": ("row_grad", 200, 130, FP32, TILES, {"in_place": True}),
    "resident, softcap": ("row_stats_grad", 140, 2000, BF16, RESIDENT_PLAN, {"softcap": 5.0, **ALL}),
    "streaming fp32, softcap": ("row_stats_grad", 70, 2000, FP32, STREAMING_PLAN, {"softcap": 5.0}),
    "gradient, softcap": ("row_grad", 140, 2000, FP32, STREAMING_PLAN, {"softcap": 5.0, **ALL}),
    "short, softcap": ("row_stats_grad", 200, 100, BF16, TILES, {"softcap": 5.0, **ALL}),
    "short fp32, softcap": ("row_grad", 200, 130, FP32, TILES, {"softcap": 5.0, "logit_scale": 0.5}),
    "short log_prob, softcap": ("row_stats", 200, 100, FP32, TILES, {"need_log_prob": True, "softcap": 5.0}),
    "statistics by row": ("row_stats", 70, 2000, BF16, STREAMING_PLAN, {**ENTROPY, **SCALED}),
    "statistics by row fp32": ("row_stats", 70, 2000, FP32, STREAMING_PLAN, ENTROPY),
    "statistics by row, many chunks": ("row_stats", 6, 17_700, FP32, MANY_CHUNKS, ENTROPY),
    "statistics by row, softcap": (
        *("row_stats", 70, 2000, BF16, STREAMING_PLAN),
        {"softcap": 5.0, "weight": True, "need_wsum": True, **ENTROPY, **SCALED},
    ),
    "gradient by row": ("row_grad", 140, 2000, BF16, STREAMING_PLAN, {**TILTED, **SCALED}),
    "gradient by row fp32": ("row_grad", 140, 2000, FP32, STREAMING_PLAN, {"label_smoothing": 0.1, **TILTED}),
    "gradient by row, softcap": (
        *("row_grad", 140, 2000, FP32, STREAMING_PLAN),
        {"softcap": 5.0, **ALL, **TILTED, **SCALED},
    ),
    "short by row": ("row_stats", 200, 130, BF16, TILES, {**ENTROPY, **SCALED}),
    "short by row fp32": ("row_stats", 200, 64, FP32, TILES, {"need_wsum": True, **ENTROPY}),
    "short entropy": ("row_stats", 200, 130, BF16, TILES, {"need_entropy": True, **SCALED}),
    "short top1": ("row_stats", 200, 130, BF16, TILES, {"need_top1": True}),
    "short log_prob by row": ("row_stats", 200, 100, BF16, TILES, {"need_log_prob": True, "need_entropy": True}),
    "short by row, softcap": ("row_stats", 200, 100, FP32, TILES, {"softcap": 5.0, **ENTROPY, **SCALED}),
    "short gradient by row": ("row_grad", 200, 130, BF16, TILES, {**ALL, **TILTED, **SCALED}),
    "short gradient by row fp32": ("row_grad", 200, 64, FP32, TILES, TILTED),
    "short gradient by row, softcap": ("row_grad", 200, 100, FP32, TILES, {"softcap": 5.0, **TILTED, **SCALED}),
    "totals": ("totals", 3000, 9000, FP32, {}, {"weight": True}),
    "loss": ("loss", 700, 50, FP32, {}, {"weight": True}),
    "losses": ("loss", 700, 50, FP32, {}, {"reduction": "none", "lse_square_scale": 0.1, "label_smoothing": 0.1}),
    "split": ("row_stats", 5, 9000, BF16, {}, {"need_wsum": True, "weight": True}),
    "split by row": ("row_stats", 5, 9000, BF16, {}, {**ENTROPY, **SCALED}),
    "scale": ("scale_", 16, 5000, BF16, {}, {}),
    "scale fp32": ("scale_", 16, 5000, FP32, {}, {}),
}

# Where: (file, function, line), and why it is there though no launch needs its ordering.
PAIRING = "takes a flag that was set for a successor which does not come: flags end in pairs"
REDUNDANT = {
    ("long_statistics.h", "End", "WaitFlag<HardEvent::S_V>(LongFlag::OfMax(0));"): PAIRING,
    ("long_statistics.h", "End", "WaitFlag<HardEvent::S_V>(LongFlag::OfMax(1));"): PAIRING,
    (
        "short_copies.h",
        "CopyTileIn",
        "LocalTensor<float> operands = operands_.AllocTensor<float>();",
    ): "the tile's queue orders the same",
}
KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "ascendc"
SITE = re.compile(r"WaitFlag<|PipeBarrier<|\.(template )?(AllocTensor|DeQue)<")
FUNCTION = re.compile(r"__aicore__ inline .*?(\w+)\(")


def place(file: str, line: int) -> tuple[str, str, str]:
    """Of a line: the file's name, the function it is in, its text."""
    lines = Path(file).read_text().splitlines()
    function = next(found[1] for text in reversed(lines[:line]) if (found := FUNCTION.search(text)))
    return Path(file).name, function, lines[line - 1].split("//")[0].strip()


def launcher(name: str) -> Callable[..., list[cann_sim.Report]]:
    """A function that makes the launches of one primitive anew and returns their reports; `config` is for one."""
    primitive, rows, cols, dtype, forced, options = LAUNCHES[name]
    options = dict(options)
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(rows, cols, generator=generator) * 3).to(dtype)
    y = torch.randint(0, cols, (rows,), generator=generator)
    y[1::3] = -100
    if options.pop("bad", False):
        y[5] = cols
    if options.pop("undefined", False):
        x[0, 7] = float("nan")
    w = torch.rand(cols, generator=generator) + 0.5 if options.pop("weight", False) else None
    t = torch.rand(rows, generator=generator) + 0.5 if options.pop("temperatures", False) else None
    totals = torch.tensor([rows, rows, cols], dtype=FP32)
    lse, picked = torch.full((rows,), 9.0), torch.ones(rows)
    upstream = torch.ones(rows if options.get("reduction") == "none" else ())
    of_entropy = (t, lse, upstream) if options.pop("entropy", False) else (t,)

    def run(config: cann_sim.Config | None = None, number: int | None = None) -> list[cann_sim.Report]:
        device = Device(2, config, forced=forced, config_of=number)
        if primitive == "row_stats":
            device.row_stats(x, y, w, t, **options)
        elif primitive == "row_stats_grad":
            device.row_stats_grad(x, y, w, totals, **options)
        elif primitive == "row_grad":
            device.row_grad(x.clone(), y, w, lse, lse * 1e-8, totals, upstream, upstream, *of_entropy, **options)
        elif primitive == "scale_":
            device.scale_(x.clone(), torch.tensor(3.0))
        elif primitive == "totals":
            device.reduce_rows(y, w, num_classes=cols)
        else:
            device.reduce_rows(y, w, lse, lse * 1e-8, picked, lse, totals, num_classes=cols, **options)
        return device.reports

    return run


def test_every_synchronisation_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    needed: dict[tuple[str, int, str], bool] = {}
    for name in LAUNCHES:
        run = launcher(name)
        for number in range(len(run())):

            def one(config: cann_sim.Config, number: int = number, run: Any = run) -> cann_sim.Report:
                return run(config, number)[number]

            for removal in removed_syncs(one):
                site = (removal.file, removal.line, removal.kind)
                needed[site] = needed.get(site, False) or removal.caught
    redundant = sorted(place(file, line) for (file, line, _), caught in needed.items() if not caught)
    with capsys.disabled():
        print(
            f"\n{len(needed)} synchronisations removed, {len(needed) - len(redundant)} caught, "
            f"{len(redundant)} redundant"
        )
    assert redundant == sorted(REDUNDANT)
    # A line that no launch comes to would be no site: all there are have been tried.
    tried = {(Path(file).name, line) for file, line, _ in needed}
    missed = [
        f"{path.name}:{number}"
        for path in sorted(KERNELS.glob("*.[hc]*"))
        for number, text in enumerate(path.read_text().splitlines(), 1)
        if SITE.search(text.split("//")[0]) and (path.name, number) not in tried
    ]
    assert not missed
