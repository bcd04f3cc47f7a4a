"""Draws the timeline of a core: a lane per pipe, a bar per instruction, coloured by its name.

To draw fast, each pipe is one collection, and neighbouring bars that are too narrow to tell apart are merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

PIPES = ("S", "V", "MTE2", "MTE3")
PIPE_NAMES = {"S": "scalar", "V": "vector", "MTE2": "GM to UB", "MTE3": "UB to GM"}


class Event(NamedTuple):
    """The time during which a pipe of the traced core executed one instruction."""

    pipe: str
    name: str
    start_ns: float
    end_ns: float
    file: str
    line: int


# At most this many instructions of the trace or window are drawn: the first ones.
MAX_EVENTS = 4000
# The most frequent names get a colour of their own; the rest share the last.
COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f", "#ff9da7", "#86bcb6",
)  # fmt: skip
OTHER = "#bab0ac"


def window(events: Sequence[Event], start_ns: float | None, end_ns: float | None) -> tuple[list[Event], bool]:
    """The events that overlap the window, sorted by time, and whether they were cut to MAX_EVENTS."""
    chosen = sorted(
        (e for e in events if (start_ns is None or e.end_ns > start_ns) and (end_ns is None or e.start_ns < end_ns)),
        key=lambda event: event.start_ns,
    )
    return chosen[:MAX_EVENTS], len(chosen) > MAX_EVENTS


def draw(
    events: Sequence[Event], path: Any, title: str, start_ns: float | None = None, end_ns: float | None = None
) -> None:
    """Draws the events (of the window, if given) to `path`; the suffix determines the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no global state, no display
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown, cut = window(events, start_ns, end_ns)
    if not shown:
        raise ValueError(f"{title}: nothing happened in the window {start_ns}..{end_ns} ns")
    left = shown[0].start_ns if start_ns is None else start_ns
    right = max(event.end_ns for event in shown)
    if end_ns is not None:
        right = min(right, end_ns)
    names = [name for name, _ in Counter(event.name for event in shown).most_common()]
    colours = {name: COLOURS[i] if i < len(COLOURS) else OTHER for i, name in enumerate(names)}

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    least = (right - left) / 1200  # about a pixel
    for lane, pipe in enumerate(reversed(PIPES)):
        bars, fills = _merge([event for event in shown if event.pipe == pipe], colours, least)
        axes.broken_barh(bars, (lane - 0.38, 0.76), facecolors=fills or "none", linewidth=0)
    axes.set_yticks(range(len(PIPES)), [f"{pipe}\n{PIPE_NAMES[pipe]}" for pipe in reversed(PIPES)])
    axes.set_ylim(-0.6, len(PIPES) - 0.4)
    axes.set_xlim(left / 1e3, right / 1e3)
    axes.set_xlabel("simulated time, us")
    axes.set_title(f"{title} (first {len(shown)} instructions)" if cut else title, fontsize=11)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [Patch(color=colours[name], label=name) for name in names[: len(COLOURS)]]
    if len(names) > len(COLOURS):
        handles.append(Patch(color=OTHER, label="others"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def _merge(
    events: Sequence[Event], colours: dict[str, str], least: float
) -> tuple[list[tuple[float, float]], list[str]]:
    """Bars (start, width in us) and their colours; bars narrower than `least` merge with same-coloured neighbours."""
    bars: list[tuple[float, float]] = []
    fills: list[str] = []
    end = 0.0
    for event in events:
        colour, width = colours[event.name], event.end_ns - event.start_ns
        if fills and fills[-1] == colour and event.start_ns - end < least and width < 4 * least:
            end = max(end, event.end_ns)
            bars[-1] = (bars[-1][0], end / 1e3 - bars[-1][0])
            continue
        end = event.start_ns + max(width, least)
        gap = least if width > 4 * least else 0.0
        bars.append((event.start_ns / 1e3, (end - event.start_ns - gap) / 1e3))
        fills.append(colour)
    return bars, fills
