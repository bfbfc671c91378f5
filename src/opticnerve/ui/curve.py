"""A stage's loss over its steps: as small arrays, and as a drawing (SVG) that follows the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from opticnerve.common.drawing import smooth
from opticnerve.runs.folder import finite

WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 56
MOST_POINTS = 400
LAST = 50
"""Steps over which the present speed is taken."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Thinned to at most `MOST_POINTS` steps; a step without a number holds NaN. `smooth` is taken over all steps."""

    steps: list[int]
    loss: list[float]
    smooth: list[float]


def curve_of(metrics: Sequence[dict[str, Any]]) -> Curve:
    """The curve of the lines of metrics.jsonl."""
    loss = np.array([finite(m.get("loss")) for m in metrics])
    even = smooth(loss)
    # The last step is always among them: it is what the words beside the curve tell.
    count = min(len(metrics), MOST_POINTS)
    kept = [int(i) for i in np.linspace(0, len(metrics) - 1, count)] if metrics else []
    return Curve(
        [int(metrics[i]["step"]) for i in kept], [float(loss[i]) for i in kept], [float(even[i]) for i in kept]
    )


def pace(metrics: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Seconds a step and tokens a second, over the last steps; NaN where two steps with times are not there."""
    last = [m for m in metrics[-LAST:] if np.isfinite(finite(m.get("elapsed_s")))]
    if len(last) < 2:
        return np.nan, np.nan
    seconds = finite(last[-1]["elapsed_s"]) - finite(last[0]["elapsed_s"])
    if seconds <= 0:
        return np.nan, np.nan
    tokens = sum(t for m in last[1:] if np.isfinite(t := finite(m.get("tokens"))))
    return seconds / (int(last[-1]["step"]) - int(last[0]["step"])), tokens / seconds


def curve_svg(curve: Curve, *, title: str, x_label: str, planned: int | None = None) -> str:
    """The drawing; `title` is what a screen reader says of it. The axis runs to the `planned` steps, if they are known.

    Values far above the usual ones, as first steps have, leave the drawing at its top.
    """
    told = [v for v in (*curve.loss, *curve.smooth) if np.isfinite(v)]
    if not told:
        return ""
    top = max(float(np.percentile(told, 99)) * 1.08, 1e-9)
    end = max(planned or 0, curve.steps[-1], 2)

    def place(step: float, value: float) -> str:
        x = LEFT + (step - 1) / (end - 1) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - min(max(value / top, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for value in _ticks(0, top):
        x, y = place(1, value).split(",")
        lines.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in _ticks(1, end):
        if step >= 1 and step == round(step):
            x = place(step, 0).split(",")[0]
            lines.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 21}" text-anchor="middle">{step:,.0f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    for kind, values in (("raw", curve.loss), ("smooth", curve.smooth)):
        for piece in _pieces(curve.steps, values):
            lines.append(f'<polyline class="{kind}" points="{" ".join(place(*point) for point in piece)}"/>')
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(lines)}</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    return [float(v) for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]


def _pieces(steps: list[int], values: list[float]) -> list[list[tuple[float, float]]]:
    """Runs of steps that have a number: a line does not bridge those that have none."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if np.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [p for p in pieces if p]
