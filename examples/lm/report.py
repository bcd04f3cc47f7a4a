"""The report of a run: metrics.csv, summary.json and loss.png."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from lm.checkpoint import replacing
from lm.settings import SettingError

METRICS_HEADER = "step,loss,tokens_per_s,peak_mb"


def metric_lines(path: Path) -> list[str]:
    """The complete lines below the header."""
    lines = path.read_text(errors="replace").splitlines()[1:] if path.is_file() else []
    return [line for line in lines if line.count(",") == METRICS_HEADER.count(",")]


def numbers(path: Path, line: str) -> list[float]:
    """The numbers of a line: step, loss, tokens a second, peak memory in MB."""
    try:
        return [float(value) for value in line.split(",")]
    except ValueError:
        raise SettingError(
            f"{path} is damaged: {line[:60]!r} has no numbers; start a new run in another --out"
        ) from None


def read_metrics(path: Path) -> list[list[float]]:
    """A row of numbers for each step."""
    return [numbers(path, line) for line in metric_lines(path)]


def first_metrics(path: Path, steps: int) -> list[str]:
    """The lines of the first `steps` steps."""
    kept = [line for line in metric_lines(path) if numbers(path, line)[0] < steps]
    if len(kept) != steps:
        raise SettingError(
            f"--resume: {path} has {len(kept)} of the {steps} steps in checkpoint.pt, so they "
            "are not of one run; start a new one in another --out"
        )
    return kept


def truncate_metrics(path: Path, steps: int) -> None:
    """Leaves the header and the lines of the first `steps` steps."""
    kept = first_metrics(path, steps)
    with replacing(path) as temporary:
        temporary.write_text("\n".join([METRICS_HEADER, *kept]) + "\n")


def write_report(out: Path, summary: dict[str, Any]) -> str:
    """Adds the metrics to the summary, writes it and the plot, and returns a message."""
    metrics = read_metrics(out / "metrics.csv")
    from_metrics = {
        "first_loss": metrics[0][1],
        "last_loss": metrics[-1][1],
        "tokens_per_s": statistics.median(row[2] for row in metrics),
        "peak_mb": max(row[3] for row in metrics),
    }
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary | from_metrics, indent=2) + "\n")
    if draw(out / "loss.png", metrics, summary):
        return f"Wrote metrics.csv, summary.json, checkpoint.pt and loss.png in {out}"
    return (
        f"Wrote metrics.csv, summary.json and checkpoint.pt in {out}; "
        "loss.png needs matplotlib (pip install matplotlib)"
    )


def draw(path: Path, metrics: list[list[float]], summary: dict[str, Any]) -> bool:
    """The loss curve; False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [row[0] for row in metrics], [row[1] for row in metrics]
    validation, unigram = summary["validation_loss"], summary["unigram_loss"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss, each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="training loss, smoothed")
    axes.plot(steps[-1], validation, "o", color="tab:red", label=f"validation loss, {validation:.2f}")
    axes.axhline(unigram, color="tab:gray", linestyle="--", label=f"unigram baseline, {unigram:.2f}")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)")
    axes.set_title("--loss {loss} on {device} in {dtype}, vocabulary of {vocab_size}".format(**summary))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    return True


def smoothed(losses: list[float]) -> list[float]:
    """A centred moving average; a trailing one would lag."""
    means = []
    for i in range(len(losses)):
        reach = min(len(losses) // 40, i)
        means.append(statistics.fmean(losses[i - reach : i + reach + 1]))
    return means
