"""Does a map of where a model looks fall on the object? On easy-VQA's test pictures, whose shape its colour tells.

    python benchmarks/look.py --model starter --pictures 60                   # writes docs/reports/look
    python benchmarks/look.py --model starter --model runs/flamingo           # a splice and a cross-attention model
    python benchmarks/look.py --model starter --pictures 6 --out /tmp/look    # to see that it runs

One question a picture, of colour or of shape in turn, as far as the data has one. The map explains the model's own
greedy answer, right or wrong; several words of an answer are averaged.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import localization
import numpy as np
import torch

from opticnerve.data.media.open import open_image
from opticnerve.inference.load import load_model
from opticnerve.interpret import attribution
from opticnerve.starter import easy_vqa
from opticnerve.types import OpticNerveError, ask

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("model", "image", "question", "answer", "said", "method", "mass", "area", "best", "pointing", "drop")
WEAK = 0.05  # nats: below it no covered square moves the answer, and an occlusion map shows next to nothing


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """One question for each of `count` test pictures: colour and shape by turns."""
    paths = easy_vqa.prepare()
    by_image: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in paths["test"].read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["type"] in ("shape", "colour"):
            by_image[row["image"]].setdefault(row["type"], row)
    images = sorted(by_image)
    random.Random(seed).shuffle(images)
    chosen = []
    for image in images:
        wanted = ("colour", "shape")[len(chosen) % 2]
        if wanted in by_image[image] and len(chosen) < count:
            chosen.append({**by_image[image][wanted], "path": paths["media"] / image})
    if len(chosen) < count:
        raise OpticNerveError(
            f"easy-VQA's test split has {len(chosen)} such pictures, not {count}", kind="out-of-range"
        )
    return chosen


def methods_of(model: Any) -> list[str]:
    """All methods that this model's parts allow."""
    found = []
    for method in attribution.METHODS:
        try:
            attribution.check_method(model, method)
        except OpticNerveError as e:
            print(f"  without {method}: {e}", file=sys.stderr)
        else:
            found.append(method)
    return found


def measure(name: str, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each picture and method."""
    model, processor = load_model(name, dtype=torch.float32)
    methods, rows = methods_of(model), []
    for number, question in enumerate(asked, 1):
        picture = open_image(question["path"])
        mask_HW = localization.object_mask(picture)
        looked = attribution.attribute(model, processor, ask(question["question"], picture), methods=methods)
        for found in looked.maps:
            known = {"model": name, **{k: question[k] for k in ("image", "question", "answer")}, "said": looked.answer}
            best = localization.best_mass(mask_HW, *found.grid_WHH.shape[1:])
            drop = float(found.grid_WHH.max()) if found.method == "occlusion" else None
            rows.append({**known, "method": found.method, **score(found.grid_WHH, mask_HW), "best": best, "drop": drop})
        print(f"  {name}: {number}/{len(asked)}", end="\r", file=sys.stderr)
    print(file=sys.stderr)
    return rows


def score(grid_WHH: Any, mask_HW: Any) -> dict[str, float]:
    """Mean over the words. A map with nothing above zero points nowhere: it scores what a flat one does."""
    maps = [g if (g > 0).any() else np.ones_like(g) for g in grid_WHH]
    mass = float(np.mean([localization.mass_on_object(g, mask_HW) for g in maps]))
    pointing = float(np.mean([localization.points_at_object(g, mask_HW) for g in maps]))
    return {"mass": mass, "area": float(mask_HW.mean()), "pointing": pointing}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model and method."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["method"]].append(row)
    table = []
    for (model, method), group in groups.items():
        means = {k: float(np.mean([r[k] for r in group])) for k in ("mass", "area", "best", "pointing")}
        low, high = localization.bootstrap_interval([r["mass"] for r in group])
        p_low, p_high = localization.bootstrap_interval([r["pointing"] for r in group])
        ends = {"low": low, "high": high, "pointing_low": p_low, "pointing_high": p_high}
        table.append({"model": model, "method": method, "n": len(group), **means, **ends})
    return table


def report(table: list[dict[str, Any]], rows: list[dict[str, Any]], command: str, seconds: float) -> str:
    """The page: what was measured, the table, and what it says."""
    area = table[0]["area"]
    lines = [
        "# Does the map fall on the object?",
        "",
        f"{table[0]['n']} test pictures of easy-VQA, one question of colour or shape each; the map explains the "
        "model's own greedy answer. *Mass*: mean share of the map, made non-negative and summing to 1, on the object's "
        f"pixels; chance is the object's share of the area, {area:.1%}. *Most*: what the best map on the same grid "
        "would reach. *Pointing*: how often the highest cell lies on the object. Intervals: 95 % bootstrap.",
        "",
        "| model | method | mass | 95 % | × chance | most | pointing | 95 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in table:
        lines.append(
            f"| {r['model']} | {r['method'].replace('_', '-')} | {r['mass']:.1%} | {r['low']:.1%} to {r['high']:.1%} | "
            f"{r['mass'] / r['area']:.1f} | {r['best']:.1%} | {r['pointing']:.1%} | "
            f"{r['pointing_low']:.1%} to {r['pointing_high']:.1%} |"
        )
    lines += ["", "![share of mass on the object](where.png)", ""]
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in table if r["model"] == model]
        occluded = [r for r in rows if r["model"] == model and r["method"] == "occlusion"]
        right = sum(r["said"].lower().strip(" .") == r["answer"] for r in occluded)
        flat = [r["method"] for r in mine if r["low"] <= r["area"] <= r["high"]]
        off = [r["method"] for r in mine if r["high"] < r["area"]]
        weak = sum(r["drop"] < WEAK for r in occluded)
        lines += [
            f"{model}: {right} of {len(occluded)} answers are right. "
            + (f"Not told from chance: {', '.join(flat)}. " if flat else "No method is at chance. ")
            + (f"Below chance: {', '.join(off)}. " if off else "")
            + f"On {weak} of {len(occluded)} pictures no covered square costs the answer more than {WEAK} nats: "
            "the model is that sure of it, and the occlusion map shows what is left of the differences.",
            "",
        ]
    lines += [
        "How to read the methods: [look.md](../../look.md). Every picture and method: [table.csv](table.csv).",
        "",
        "```text",
        command,
        "```",
        "",
        f"{seconds / 60:.1f} minutes on {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} "
        f"cores, Python {platform.python_version()}, torch {torch.__version__}; float32.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a run's folder or `starter` (default); may be given twice")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="which pictures")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reports" / "look")
    chosen = parser.parse_args()
    models = chosen.model or ["starter"]
    started = time.perf_counter()
    asked = questions(chosen.pictures, chosen.seed)
    rows = [row for model in models for row in measure(model, asked)]
    table = summary(rows)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    title, note = (
        "Does the map fall on the object?",
        f"{len(asked)} test pictures of easy-VQA; bars with 95 % intervals",
    )
    localization.shares_plot(table, chosen.out / "where.png", title=title, note=note)
    command = " ".join(["python benchmarks/look.py", *sys.argv[1:]])
    page = report(table, rows, command, time.perf_counter() - started)
    (chosen.out / "report.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
