"""How seconds per sample and memory grow with image tokens, sequence length, batch, language model and data set.

    python benchmarks/scaling.py                       # every axis; about ten minutes on 2 cores
    python benchmarks/scaling.py --only rows,batch     # these again; the others stay as they were
    python benchmarks/scaling.py --quick               # tiny models, to see that it runs; nothing in docs is touched

A step is the align stage's: everything in bf16, the connector trains, features of the frozen eye come from the cache
unless the series says otherwise. The eye is CLIP-ViT-B/16's shape, the language model SmolLM2-135M's unless that is
what grows, all with random weights. Each point is a process of its own, so that its peak memory is its own. Figures go
to benchmarks/scaling.json, plots to docs/images/scaling-*.png, the tables to docs/scaling-measured.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaling_points import TILES, TINY_TILES, measure
from side_by_side import Trial, finish, machine, run_side

ROOT = Path(__file__).resolve().parents[1]
CACHED, LIVE = "features cached", "eye live"
GIB = 2**30
LIMIT = 600
"""Seconds for one point."""


@dataclass(frozen=True)
class Axis:
    """What grows: its name on the plot, for each series the values that it takes, and whether a sample's time should
    grow with it."""

    label: str
    title: str
    note: str
    series: dict[str, list[int]]
    proportion: bool = True


AXES = {
    "image_tokens": Axis(
        "image tokens of a sample", "Image tokens", "batch 1, 24 tokens of text; from 1,152 on several tiles of 576",
        {CACHED: list(TILES), LIVE: [16, 196, 576, 2880]},
    ),
    "sequence": Axis(
        "tokens of a sample", "Sequence length", "batch 1, 64 image tokens, the rest text",
        {CACHED: [128, 256, 512, 1024, 2048]},
    ),
    "batch": Axis("samples of a step", "Batch", "220 tokens a sample", {CACHED: [1, 2, 4, 8, 16]}, False),
    "language": Axis(
        "parameters of the language model, millions", "Language model", "SmolLM2's sizes; batch 1, 220 tokens",
        {CACHED: [135, 360, 1700]},
    ),
    "rows": Axis(
        "rows of the JSON-lines file", "Data set", "captions of 20 pictures, a tiny model: the data's cost shows",
        {CACHED: [1_000, 10_000, 100_000, 1_000_000]},
    ),
}  # fmt: skip
TINY = {
    "image_tokens": {CACHED: list(TINY_TILES), LIVE: [16, 32]},
    "sequence": {CACHED: [96, 128]},
    "batch": {CACHED: [1, 2]},
    "language": {CACHED: [1]},
    "rows": {CACHED: [100, 1000]},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"axes, with commas between: {', '.join(AXES)}")
    parser.add_argument("--quick", action="store_true", help="tiny models and few points, under runs/scaling-quick")
    parser.add_argument("--root", type=Path, help="where benchmarks/ and docs/ are written")
    parser.add_argument("--redraw", action="store_true", help="measure nothing; plots and tables from the JSON file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.side:
        axis, series, value = args.side.split("/")
        finish(measure(axis, series, int(value), quick=args.quick))
        return 0
    axes = args.only.split(",") if args.only else list(AXES)
    if unknown := sorted(set(axes) - set(AXES)):
        parser.error(f"unknown axes {', '.join(unknown)}; known: {', '.join(AXES)}")
    root = args.root or (ROOT / "runs" / "scaling-quick" if args.quick else ROOT)
    file = root / "benchmarks" / "scaling.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for axis in [] if args.redraw else axes:
        results[axis] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "points": [], "failed": []}
        for point in measured(axis, TINY[axis] if args.quick else AXES[axis].series, quick=args.quick):
            results[axis]["failed" if "error" in point else "points"].append(point)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(results, root)
    return 0


def measured(axis: str, series: dict[str, list[int]], *, quick: bool) -> Iterator[dict[str, Any]]:
    """The points of an axis as they come; of one that fails, why."""
    for name, values in series.items():
        for value in values:
            point: dict[str, Any] = {"series": name, "value": value}
            told = f"{AXES[axis].label}: {value:,}{f' ({name})' if len(series) > 1 else ''}"
            try:
                done = run_side(__file__, f"{axis}/{name}/{value}", ["--quick"] if quick else [], timeout=LIMIT)
            except (RuntimeError, subprocess.TimeoutExpired) as e:  # the other points are worth their time
                point["error"] = f"not done after {LIMIT} s" if isinstance(e, subprocess.TimeoutExpired) else str(e)
                print(f"{told}: {point['error']}", file=sys.stderr, flush=True)
            else:
                point |= asdict(done)
                seconds = done.seconds / done.units
                print(f"{told}: {seconds:.3g} s a sample, {done.peak_bytes / GIB:.2f} GiB", flush=True)
            yield point


# -- what is shown ----------------------------------------------------------------------------------------------------


def series_of(found: dict[str, Any]) -> dict[str, list[tuple[int, Trial]]]:
    """Of one axis: each series with its values and trials."""
    made: dict[str, list[tuple[int, Trial]]] = {}
    for point in found["points"]:
        trial = Trial(**{k: v for k, v in point.items() if k not in ("series", "value")})
        made.setdefault(point["series"], []).append((point["value"], trial))
    return made


def exponent(values: Sequence[float], figures: Sequence[float]) -> float:
    """k of figure ∝ value^k between the last two points."""
    return math.log(figures[-1] / figures[-2]) / math.log(values[-1] / values[-2])


def write(results: dict[str, Any], root: Path) -> None:
    """Plots and `docs/scaling-measured.md`, of the axes that were measured so far."""
    from scaling_plots import draw, draw_rows

    lines = [
        "# How time and memory grow",
        "",
        "Written by `python benchmarks/scaling.py`, which says at its top what is measured. Broken lines in the plots",
        "grow in proportion. \"Of the floor\": the seconds that the floating-point operations a step needs at least",
        "would take at the rate of a bare bf16 matrix product, measured in the same process, over the seconds taken.",
        "\"Before\": the process with its libraries and weights, before the first step.",
    ]  # fmt: skip
    for axis, spec in AXES.items():
        if not results.get(axis, {}).get("points"):
            continue
        found = results[axis]
        image = root / "docs" / "images" / f"scaling-{axis.replace('_', '-')}.png"
        (draw_rows if axis == "rows" else draw)(spec, series_of(found), image)
        lines += ["", f"## {spec.title}", "", f"![{spec.title}](images/{image.name})", ""]
        lines += rows_table(found) if axis == "rows" else step_table(spec, found)
        lines += ["", f"{found['machine']}; {found['date']}."]
        lines += [f"Not measured: {p['value']:,}: {p['error'].splitlines()[-1]}." for p in found["failed"]]
    document = root / "docs" / "scaling-measured.md"
    document.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {document}")


def step_table(spec: Axis, found: dict[str, Any]) -> list[str]:
    several = len(series_of(found)) > 1
    lines = [
        f"| {spec.label} |{' series |' if several else ''} seconds a sample | of the floor | peak memory | before |",
        f"|---:|{'---|' if several else ''}---:|---:|---:|---:|",
    ]
    told = []
    for name, points in series_of(found).items():
        for value, t in points:
            lines.append(
                f"| {value:,} |{f' {name} |' if several else ''} {t.seconds / t.units:.3g} | "
                f"{t.notes['floor_seconds'] / t.seconds:.0%} | {t.peak_bytes / GIB:.2f} GiB | "
                f"{t.notes['before_bytes'] / GIB:.2f} GiB |"
            )
        if len(points) > 1:
            values = [v for v, _ in points]
            seconds = exponent(values, [t.seconds / t.units for _, t in points])
            more = exponent(values, [max(t.peak_bytes - t.notes["before_bytes"], 1) for _, t in points])
            told.append(
                f"{name.capitalize() if several else 'Here'}, from {values[-2]:,} to {values[-1]:,}, seconds a sample "
                f'grow with the power {seconds:.2f}, memory beyond "before" with the power {more:.2f}.'
            )
    return [*lines, "", *told]


def rows_table(found: dict[str, Any]) -> list[str]:
    [points] = series_of(found).values()
    lines = [
        "| rows | file | seconds to the first step | seconds a step | resident while training | peak |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for value, t in points:
        lines.append(
            f"| {value:,} | {t.notes['file_bytes'] / 2**20:,.1f} MiB | {t.notes['first_step_seconds']:.2f} | "
            f"{t.seconds:.3g} | {t.notes['resident_bytes'] / GIB:.2f} GiB | {t.peak_bytes / GIB:.2f} GiB |"
        )
    if len(points) < 2:
        return lines
    (few, first), (many, last) = points[0], points[-1]
    grown = last.notes["resident_bytes"] - first.notes["resident_bytes"]
    waited = last.notes["first_step_seconds"] - first.notes["first_step_seconds"]
    told = (
        f"From {few:,} to {many:,} rows, each row more costs {grown / (many - few):,.0f} bytes of resident memory and "
        f"{1e6 * waited / (many - few):,.1f} µs before the first step; a step takes {last.seconds / first.seconds:.2f} "
        f"times as long."
    )
    return [*lines, "", told]


if __name__ == "__main__":
    sys.exit(main())
