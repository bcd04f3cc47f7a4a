"""The cross entropy of padded sequences, step by step, printed and plotted.

Token sequences of unequal length are padded to a rectangular batch, with the label -100 for padding. This script
computes the loss of such a batch in steps (log-probabilities, rows that count, loss per token, mean) and by one call.
Then it computes the loss of three rows with labels as ids and with one-hot rows. docs/padded_labels.md explains the
steps and shows the plot, which needs matplotlib.

    python examples/padded_labels.py --out padded_labels.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import npu_xent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IGNORE = -100
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps a number legible on a line


def make_batch() -> tuple[Tensor, Tensor]:
    """Logits [batch, time, classes] and labels [batch, time]; the last token of each sequence is padding."""
    torch.manual_seed(42)
    logits = torch.randn(2, 4, 10)
    labels = torch.tensor([[2, 3, 4, IGNORE], [3, 2, 1, IGNORE]])
    return logits, labels


def explain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Print each step; return log-probabilities [rows, classes] and the loss of each row [rows]."""
    torch.set_printoptions(precision=4, sci_mode=False, linewidth=120)
    batch, time, classes = logits.shape
    rows, targets = logits.view(-1, classes), labels.view(-1)
    print(f"1. Flatten: logits [{batch}, {time}, {classes}] become {list(rows.shape)}: one row a token.")
    print(f"   labels: {targets.tolist()}")

    _, log_prob, _, _ = npu_xent.npu_cross_entropy_loss(rows, targets)
    print("2. log_softmax of each row, so that the exponentials of a row add up to 1:")
    print(log_prob)

    kept = (targets != IGNORE).nonzero().flatten().tolist()
    print(f"3. Rows that count (label is not {IGNORE}): {kept}, {len(kept)} of them.")

    losses = npu_xent.cross_entropy(rows, targets, reduction="none")
    print("4. The loss of a row is minus its log-probability at the label; 0 where the label is padding:")
    for row, (target, loss) in enumerate(zip(targets.tolist(), losses.tolist(), strict=True)):
        picked = "padding" if target == IGNORE else f"-log_prob[{row}, {target}]"
        print(f"   row {row}: {loss:.4f}   {picked}")

    total, count, loss = losses.sum(), len(kept), npu_xent.cross_entropy(rows, targets)
    print(f"5. The mean is over the {count} rows that count: {total:.4f} / {count} = {total / count:.4f}")
    print(f"   npu_xent.cross_entropy(logits.view(-1, {classes}), labels.view(-1)) = {loss:.4f}")
    print(f"   (A mean over all {len(targets)} rows would be {losses.mean():.4f}: padding would flatter the model.)")
    return log_prob, losses


def ids_and_one_hot() -> None:
    """Print the loss of three rows: by their labels, by one-hot rows, and by a call with each."""
    x = torch.tensor(
        [
            [0.9580, 1.3221, 0.8172, -0.7658, -0.7506],
            [1.3525, 0.6863, -0.3278, 0.7950, 0.2815],
            [0.0562, 0.5227, -0.2384, -0.0499, 0.5263],
        ]
    )
    ids = torch.tensor([1, 2, 3])
    one_hot = F.one_hot(ids, x.shape[1]).float()
    log_p = x.log_softmax(1)
    by_id = -log_p[range(len(ids)), ids]
    by_sum = -(one_hot * log_p).sum(1)
    print(f"\n6. Labels are ids. Logits {list(x.shape)}, labels {ids.tolist()}: row i loses -log_p[i, label[i]]:")
    print(f"   {by_id}, of which the mean is {by_id.mean():.4f}")
    print("7. With a one-hot row y for each label, -sum(y * log_p) picks the same values:")
    print(f"   {by_sum}, of which the mean is {by_sum.mean():.4f}")
    print(f"   npu_xent.cross_entropy(x, ids) = {npu_xent.cross_entropy(x, ids):.4f}")
    print(f"   npu_xent.cross_entropy(x, one_hot) = {npu_xent.cross_entropy(x, one_hot):.4f}   (probabilities)")


def draw(path: Path, log_prob: Tensor, losses: Tensor, labels: Tensor) -> None:
    """Plot the log-probabilities as a heat map with the labels marked, next to the loss of each row."""
    try:
        import matplotlib
    except ImportError:
        print("Not drawn: that needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 5), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    targets = labels.flatten().tolist()
    rows, classes = log_prob.shape
    draw_log_prob(left, log_prob, targets)
    left.set(xlabel="class", title="log_softmax; red: the label's class", xticks=range(classes))
    names = ["padding" if target == IGNORE else f"label {target}" for target in targets]
    left.set_yticks(range(rows), [f"{row}: {name}" for row, name in enumerate(names)])
    figure.colorbar(left.images[0], ax=left, label="log-probability")

    mean = draw_losses(right, losses.tolist(), [target != IGNORE for target in targets])
    right.set(xlabel="loss: minus the log-probability at the label", xlim=(0, float(losses.max()) * 1.25))
    right.set_title(f"dashed: the mean, {mean:.4f}")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f"Drawn into {path}")


def draw_log_prob(axes: Axes, log_prob: Tensor, targets: list[int]) -> None:
    """Draw a row of squares with values for each token, and a red frame around the label's square."""
    from matplotlib.patches import Rectangle

    axes.imshow(log_prob, cmap="viridis", aspect="auto")
    for row, values in enumerate(log_prob.tolist()):
        for column, value in enumerate(values):
            color = "black" if value > -2 else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
    frame = {"width": 1, "height": 1, "fill": False, "edgecolor": "red", "linewidth": 2.5}
    for row, target in enumerate(targets):
        if target != IGNORE:
            axes.add_patch(Rectangle((target - 0.5, row - 0.5), **frame))


def draw_losses(axes: Axes, losses: list[float], kept: list[bool]) -> float:
    """Draw a bar for each row, gray if it does not count, and the mean, which is returned."""
    mean = sum(losses) / sum(kept)  # the losses of the others are 0
    axes.barh(range(len(losses)), losses, color=["tab:red" if keep else "lightgray" for keep in kept])
    for row, (loss, keep) in enumerate(zip(losses, kept, strict=True)):
        text = f"{loss:.2f}" if keep else "does not count"
        axes.text(loss + 0.05, row, text, va="center", fontsize=9, bbox=BOX)
    axes.axvline(mean, color="black", linestyle="--", zorder=0)
    return mean


def main() -> None:
    """Print the steps, then plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("padded_labels.png"), help="the picture to write")
    arguments = parser.parse_args()
    logits, labels = make_batch()
    log_prob, losses = explain(logits, labels)
    ids_and_one_hot()
    draw(arguments.out, log_prob, losses, labels)


if __name__ == "__main__":
    main()
