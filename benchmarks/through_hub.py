"""A ready recipe through a hub on the loopback: full-size random weights, served, planned, trained a step, and asked.

    python benchmarks/through_hub.py             # siglip-so400m-qwen2.5-0.5b: 3 GB on disk, 12 GB of memory, minutes
    python benchmarks/through_hub.py --quick     # the same with tiny shapes, to see that it runs

What is downloaded, and how long each command takes. Weights are random: what the model says means nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402
from hub import CommandLine, serving  # noqa: E402
from opticnerve import recipe as recipes  # noqa: E402
from opticnerve.language.chat_template import CHATML  # noqa: E402
from opticnerve.starter.demo import recipe_path  # noqa: E402
from ready_data import data_folders  # noqa: E402

RECIPE = "siglip-so400m-qwen2.5-0.5b"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
ONE_STEP = ("steps=1", "batch_size=2", "workers=0")


def publish(name: str, folder: Path, *, quick: bool) -> int:
    """Write the model that the hub has under this name, with random weights in bf16; returns its bytes."""
    files: dict[str, Any] = json.loads((ROOT / "tests/hub_configs" / f"{name.replace('/', '--')}.json").read_text())
    described = dict(files.pop("config.json"))
    if quick:
        described |= {"num_key_value_heads": 2, **SMALL} if "vision_config" not in described else {}
        for part in ("vision_config", "text_config"):
            if part in described:
                described[part] = {**described[part], **SMALL}
        if "vision_config" in described:
            described["vision_config"]["image_size"] = 56
            files["preprocessor_config.json"]["size"] = {"height": 56, "width": 56}
    config = tf.AutoConfig.for_model(**described)
    kind = tf.AutoModel if "vision_config" in described else tf.AutoModelForCausalLM
    torch.manual_seed(0)
    kind.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = tiny.tokenizer(eos="<|im_end|>", chat_template=CHATML)
    words.save_pretrained(folder)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return sum(f.stat().st_size for f in folder.iterdir())


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--folder", type=Path, help="where weights and cache lie; by default a temporary folder")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hub-", dir=args.folder) as made, serving() as hub:
        folder = Path(made)
        variables = data_folders(folder / "data")
        picture = Path(variables["LLAVA_PRETRAIN"]) / "images/1.png"
        spec = recipes.load(recipe_path(RECIPE), without_data=True).docked
        for name in (spec.language.name, spec.towers["image"].encoder.options["name"]):
            size = publish(name, folder / "served" / name, quick=args.quick)
            print(f"{name}: {size / 1e6:,.0f} MB", flush=True)
            hub.add(name, folder / "served" / name)
        steps = [f"stages.{stage}.{change}" for stage in (0, 1) for change in ONE_STEP]
        line = CommandLine(hub, folder / "home", folder, OPTICNERVE_CACHE=str(folder / "own"), **variables)
        for words in (
            ("plan", RECIPE),
            ("train", RECIPE, *steps, "forgetting=false", "evaluate.0.max_new_tokens=2", "--out", "run"),
            ("ask", "run", "What is in the picture?", "--image", str(picture), "--max-new-tokens", "2"),
        ):
            hub.asked.clear()
            started = time.perf_counter()
            done = line(*words)
            seconds = time.perf_counter() - started
            weights = sum(asked.startswith("GET") and asked.endswith(".safetensors") for asked in hub.asked)
            if done.code:
                raise SystemExit(f"opticnerve {' '.join(words)} ended with {done.code}:\n{done.out}{done.err}")
            rows.append({"command": words[0], "seconds": seconds, "requests": len(hub.asked), "weights": weights})
            print(
                f"opticnerve {words[0]}: {seconds:.0f} s, {len(hub.asked)} requests, {weights} files of weights",
                flush=True,
            )
        line.close()
        for stage in sorted((folder / "run/stages").iterdir()):
            last = json.loads((stage / "metrics.jsonl").read_text().splitlines()[-1])
            print(f"{stage.name}: a step of 2 samples, loss {last['loss']:.2f}, {last['elapsed_s']:.0f} s")
    return rows


if __name__ == "__main__":
    main()
