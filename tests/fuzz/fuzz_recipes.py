"""Hostile recipes: YAML text, and overrides from the command line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import fuzz_mutate as hurt
import yaml
from fuzz_target import Target

from opticnerve import recipe

# Behind this line of a case stand overrides, one to a line.
OVERRIDES = "\n# overrides\n"
GOOD: tuple[dict[str, Any], ...] = (
    {
        "name": "docked", "seed": 0, "precision": "bf16",
        "model": {
            "language": {"name": "starter/smollm2-135m-instruct"},
            "image": {
                "encoder": {"type": "timm", "name": "starter/efficientnet-lite0", "layer": -2},
                "connector": {"type": "mlp"}, "fusion": {"type": "splice"},
                "tiling": {"type": "anyres", "pinpoints": [[224, 448], [448, 224]]},
            },
        },
        "stages": [
            {"name": "align", "train": {"connector": 1e-3}, "data": [{"path": "captions.jsonl"}], "steps": 5,
             "batch_size": 8, "accumulate": 2, "pack": {"tokens": 512}, "cache_features": False},
            {"name": "instruct", "train": {"connector": 2e-5, "language.lora": 2e-4}, "epochs": 2,
             "data": [{"path": "c.json", "format": "llava", "share_prefix": True, "per_image": 4}],
             "lora": {"rank": 8, "targets": ["q_proj"]}},
        ],
        "evaluate": [{"data": {"path": "q.jsonl", "format": "vqa"}, "sample": 10}], "trackers": ["tensorboard"],
    },
    {
        "model": {
            "image": {"encoder": {"type": "hf_vision", "name": "eye"}, "pooling": "mean", "projection": {"hidden": 8}},
            "text": {"encoder": {"name": "starter/minilm"}}, "projection_dim": 64, "loss": "siglip",
        },
        "stages": [{"name": "s", "objective": "contrastive", "train": {"temperature": 0.1, "text.encoder.last(2)": 1e-4},
                    "data": [{"path": "c.jsonl"}]}],
        "evaluate": [{"metric": "zero_shot", "data": {"path": "c.jsonl"}, "classes": ["a", "b"]}],
    },
    {
        "model": {"timing": "early", "text": {"encoder": {"name": "t"}}, "answers": ["yes", "no"], "options": {"width": 8}},
        "stages": [{"name": "s", "objective": {"type": "classification"}, "train": {"classifier": 1e-3},
                    "data": [{"path": "q.jsonl"}], "epochs": 1}],
    },
)  # fmt: skip
# Text that only YAML can say.
TEXTS = (
    "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
    ),
    "model: &m {image: *m}", "&a [*a]", "model: &a\n  image: *a\n  text: *a\nstages: *a", "stages: &s [*s, *s]",
    "<<: {a: 1}\nmodel: {<<: [{language: {name: x}}]}", "a: !!python/object/apply:os.system ['true']",
    "!!python/name:os.system", "model: !!python/object:x.Y {}", "a: 2026-99-99", "a: 2026-02-30 99:99:99",
    "a: !!int x", "a: !!float x", "a: !!float ''", "a: !!timestamp x", "a: !!binary '!!'", "a: !!bool maybe", "a: !!set {a: 1}",
    "a: !!omap [1]", "a: !!pairs [1]", "? [a, b]\n: c", "? {a: b}\n: c", "1: 2\nnull: 3\ntrue: 4", "a: 1\na: 2", "---\na: 1\n---\nb: 2",
    "a: " + "9" * 5_000, "a: 0x" + "f" * 5_000, "a: 1" + ":59" * 50, "a: .nan", "a: -.inf", "%YAML 9.9\n---\na: 1", "%TAG ! !\n---\n",
    "[" * 5_000, "{a: " * 5_000, "- " * 5_000 + "x", "a" * 100_000 + ": 1", "\t", "@", "`", "\0", "\ufeffmodel: {}", "...", "# nothing",
    "model: {language: {name: x}, image: {encoder: {type: 'os:system', name: x}}}", "model: [1, 2]\nstages: {}", "just words",
    "*a", "a: *b", "!<tag:yaml.org,2002:python/none> x", "a: |\n" + "  x\n" * 2_000, "'" + "\\" * 500, '"\\ud800"', '"\\U0010ffff"',
)  # fmt: skip
KEYS = (
    "stages.0.steps", "stages.0.train.language.lora", "stages.9.steps", "stages.-1.steps", "stages.x", "model.image.encoder",
    "model", "stages", "", ".", "..", "a.b.c.d", "stages.0.train.encoder.last(2)", "x.last(1)", "stages.0.data.0.path",
    "evaluate.0.sample", "stages.0.train", "name.x", "stages.٣.steps", "model.image.encoder.last(", "stages.0." * 50,
)  # fmt: skip


def make(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.55:
        tree = hurt.json_hurt(rng, rng.choice(GOOD), most=4)
        try:
            text = yaml.safe_dump(tree, allow_unicode=True, default_flow_style=rng.choice((None, True, False)))
        except RecursionError:
            text = "[" * 2_000
    elif kind < 0.75:
        text = rng.choice(TEXTS)
    else:
        good = yaml.safe_dump(rng.choice(GOOD), sort_keys=False)
        at = rng.randrange(len(good))
        text = (
            good[:at]
            + rng.choice((*TEXTS, *hurt.STRINGS, "&a ", "*a ", "!!int ", "? ", ": ", "- ", "}", "]", "|\n", "<<: "))
            + good[at:]
        )
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        data = hurt.bytes_hurt(rng, data)
    if rng.random() < 0.3:
        data = yaml.safe_dump(rng.choice(GOOD)).encode()
        given = (
            f"{rng.choice(KEYS)}{rng.choice(('=', '=', '=', '', '=='))}{rng.choice((*TEXTS, *hurt.STRINGS, '1e3', '5'))}"
            for _ in range(3)
        )
        data += (OVERRIDES + "\n".join(line.replace("\n", " ") for line in given)).encode("utf-8", "surrogatepass")
    return data


def run(data: bytes, folder: Path) -> None:
    text, _, overrides = data.partition(OVERRIDES.encode())
    file = folder / "recipe.yaml"
    file.write_bytes(text)
    read = recipe.load(file, overrides.decode("utf-8", "replace").splitlines())
    again = recipe.load(yaml.safe_load(recipe.dump(read)))
    assert recipe.dump(again) == recipe.dump(read), "what was accepted does not come back as it was"


TARGETS = (Target("recipes", make, run),)
