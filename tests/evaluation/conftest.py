"""A run folder such as training leaves behind, with pictures like easy-VQA's."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import pytest

COLOURS = {"red": "#c03020", "blue": "#2040b0", "green": "#209040", "teal": "#108080"}


def shape_picture(colour: str, shape: str, seed: int = 0) -> PIL.Image.Image:
    rng = random.Random(seed)
    picture = PIL.Image.new("RGB", (64, 64), (232, 236, 240))
    x, y, r = rng.randint(18, 46), rng.randint(18, 46), rng.randint(9, 16)
    draw = PIL.ImageDraw.Draw(picture)
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=COLOURS[colour])
    elif shape == "rectangle":
        draw.rectangle(box, fill=COLOURS[colour])
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLOURS[colour])
    return picture


def metrics_line(step: int) -> dict[str, Any]:
    noise = random.Random(step).gauss(0, 0.12)
    rate = 2e-3 * min(1.0, step / 12) * (0.5 + 0.5 * math.cos(math.pi * step / 125))
    return {
        "step": step,
        "loss": 0.25 + 2.4 * math.exp(-step / 22) + abs(noise),
        "tokens": 1800,
        "tokens_per_second": 640 + 30 * noise,
        "learning_rate": {"image.connector": rate, "language.lora": rate / 5},
    }


def sample(folder: Path, i: int) -> dict[str, Any]:
    colour, shape = list(COLOURS)[i % 4], ["circle", "rectangle", "triangle"][i % 3]
    path = folder / f"{i}.png"
    shape_picture(colour, shape, i).save(path)
    question = [
        f"what color is the {shape}?",
        f"is there a {colour} shape in the image, worth $5 or $10, next to nothing else?",
    ]
    right = i % 3 != 0
    return {
        "id": str(i),
        "image": str(path),
        "question": question[i % 2],
        "answer": colour,
        "prediction": colour if right else "a long | answer that goes on for quite a while and then some more",
        "right": right,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    pictures = run / "pictures"
    pictures.mkdir(parents=True)
    (run / "recipe.yaml").write_text("model:\n  language: {name: smollm2}\n")
    for i, name in enumerate(["align", "instruct"]):
        folder = run / "stages" / f"{i}-{name}"
        folder.mkdir(parents=True)
        rows = [
            {
                "part": "image.encoder",
                "parameters": 3_000_000,
                "trained": False,
                "learning_rate": None,
                "dtype": "bfloat16",
            },
            {
                "part": "image.connector",
                "parameters": 517_248,
                "trained": True,
                "learning_rate": 2e-3,
                "dtype": "float32",
            },
        ]
        (folder / "freeze.json").write_text(json.dumps({"rows": rows, "trained": 517_248, "total": 138_000_000}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics_line(s)) + "\n" for s in range(1, 126)))
    answers = [{"question": "What is the capital of France?", "answer": "Paris | *of course*", "holds": True}]
    results = {
        "model": {"encoder": "tf_efficientnet_lite0", "connector": "mlp", "fusion": "splice",
                  "language": "SmolLM2-135M-Instruct",
                  "visual_tokens": 16, "image_size": 128, "encoder_tokens": 16, "encoder_width": 320, "width": 576},
        "tasks": [{"name": "easy-vqa test", "harness": "opticnerve exact match 0.1.0", "n": 2000, "accuracy": 0.951,
                   "ci95": [0.941, 0.96], "most_frequent_answer": {"answer": "no", "n": 2000, "accuracy": 0.371},
                   "by_type": {"yes/no": {"n": 1500, "accuracy": 0.97}, "color": {"n": 500, "accuracy": 0.9}},
                   "samples": [sample(pictures, i) for i in range(24)]}],
        "image_dependence": {"n": 500, "real": 0.95, "blank": 0.51, "shuffled": 0.48},
        "forgetting": [
            {"after": "untouched", "perplexity": 21.3, "tokens": 20480, "answers": answers, "logits_identical": None},
            {"after": "align", "perplexity": 21.3, "tokens": 20480, "answers": answers, "logits_identical": True},
            {"after": "instruct", "perplexity": 21.726, "tokens": 20480, "answers": answers, "logits_identical": False},
        ],
        "stages": [{"name": n, "seconds": 80.1, "steps": 125, "samples": 4000, "tokens": 90000, "final_loss": 0.26}
                   for n in ("align", "instruct")],
        "seconds": {"total": 431.0, "align": 80.1, "evaluate": 33.0},
        "peak_memory_bytes": 3_200_000_000,
        "machine": {"cpu": "x86", "cores": 2, "memory_bytes": 24 * 2**30, "torch": "2.15",
                    "transformers": "5.23", "device": "cpu"},
        "command": "opticnerve demo", "opticnerve": "0.1.0", "seed": 0,
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))
    return run
