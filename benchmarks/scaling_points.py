"""What one process of `scaling.py` measures: a training step of some size, or a stage over some number of rows."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_data
import shapes
from shapes import Shape
from side_by_side import Trial

CAPTION = 24
"""Tokens beside the pictures, where text is not what grows: 4 asked, 20 learned."""
# Image tokens → side of a picture in pixels, pictures of a sample (from 1,152 on: tiles, as in LLaVA-NeXT).
TILES = {16: (64, 1), 64: (128, 1), 196: (224, 1), 576: (384, 1), 1152: (384, 2), 2880: (384, 5)}
TINY_TILES = {16: (32, 1), 32: (32, 2), 64: (32, 4)}


def measure(axis: str, series: str, value: int, *, quick: bool) -> Trial:
    """One point."""
    base = shapes.SHAPES["tiny" if quick else "smollm2-135m"]
    if axis == "rows":
        return _stage(value, steps=4 if quick else 12)
    if axis == "image_tokens":
        side, pictures = (TINY_TILES if quick else TILES)[value]
        shape = replace(base, vision_encoder=replace(base.vision_encoder, image=side))
        return _steps(shape, pictures=pictures, text=CAPTION, batch=1, live=series == "eye live")
    if axis == "sequence":
        shape = replace(
            base, vision_encoder=replace(base.vision_encoder, image=8 * base.vision_encoder.patch)
        )  # 64 image tokens
        return _steps(shape, pictures=1, text=value - shape.vision_encoder.tokens, batch=1)
    if axis == "batch":
        return _steps(base, pictures=1, text=CAPTION, batch=value)
    assert axis == "language"
    name = "tiny" if quick else {135: "smollm2-135m", 360: "smollm2-360m", 1700: "smollm2-1.7b"}[value]
    return _steps(shapes.SHAPES[name], pictures=1, text=CAPTION, batch=1)


# -- a step -----------------------------------------------------------------------------------------------------------


def _steps(shape: Shape, *, pictures: int, text: int, batch: int, live: bool = False) -> Trial:
    """The align stage's step: everything in bf16, the connector trains over float32 masters. Without `live`, features
    come from the cache, as they do from the second visit of a picture on."""
    import torch

    from opticnerve.data.collators.next_token import Collator
    from opticnerve.data.encode.packing import pack
    from opticnerve.models.freeze import freeze
    from opticnerve.objectives.next_token import NextToken
    from opticnerve.ops.fused_layers import fuse_layers
    from opticnerve.train.optim import MasterAdamW
    from opticnerve.types import Features

    model = shapes.ours(shape)
    objective = NextToken(model)
    optimizer = MasterAdamW(freeze(model, shapes.stage("connector")), betas=(0.9, 0.95), weight_decay=0.0)
    asked = max(2, text // 6)
    samples = made_data.samples(
        shape, batch, question=(asked, asked), answer=(text - asked, text - asked), images=pictures
    )
    collator = Collator(SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), reads_questions=False))
    given = collator([pack([[s]]) for s in samples])
    count = batch * pictures
    if live:
        given.media["pixel_values"] = made_data.pixels(shape, count, torch.bfloat16)
    else:
        tokens_BND = torch.randn(count, shape.vision_encoder.tokens, shape.vision_encoder.width).bfloat16()
        given.media["image_features"] = Features(
            tokens_BND, torch.ones(count, shape.vision_encoder.tokens, dtype=torch.bool)
        )

    def step() -> None:
        loss, supervised = objective(given)
        (loss / supervised).backward()
        optimizer.clip(1.0)
        optimizer.step(1.0)

    sizes = [(1600, i, o) for i, o in set(shape.language_part.matrices)]
    rate = shapes.matmul_rate(sizes, seconds=0.2)
    before = _resident()
    with fuse_layers(model.language_model):
        seconds = _repeat(step)
    rate = max(rate, shapes.matmul_rate(sizes, seconds=0.2))  # what else the machine does comes and goes
    needed = shapes.flops(
        shape, lengths=[len(s.input_ids) for s in samples], supervised=sum(s.supervised for s in samples),
        images=count, live_encoder=live,
    )  # fmt: skip
    return Trial(seconds, batch, notes={"floor_seconds": needed / rate, "before_bytes": before})


def _repeat(step: Callable[[], None], *, least: int = 3, enough: float = 10.0) -> float:
    """The median of at least three steps, or of as many as ten seconds hold; a first one warms up."""
    step()
    found: list[float] = []
    while len(found) < least and sum(found) < enough:
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


# -- a stage over many rows -------------------------------------------------------------------------------------------


def _stage(rows: int, *, steps: int, batch: int = 8, files: int = 20) -> Trial:
    """A stage as `opticnerve train` runs it, on JSON-lines of so many captions of a few picture files.

    The model is tiny, so that what is left is the cost of the data: from the call to the first step, then per step.
    """
    import torch

    import opticnerve
    from opticnerve.objectives.next_token import NextToken
    from opticnerve.recipe import Recipe
    from opticnerve.train.loop import run_stage
    from opticnerve.train.setup import give_memory_back

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.environ["OPTICNERVE_CACHE"] = str(folder / "cache")
        _save_model(folder)
        data = _save_rows(folder / "data", rows, files)
        language, vision_encoder = str(folder / "language"), {"type": "hf_vision", "name": str(folder / "eye")}
        dock = opticnerve.dock(vision_encoder, "mlp", language, seed=0)
        stage = {"name": "align", "train": {"connector": 1e-3}, "data": [{"path": str(data)}], "steps": steps}
        recipe = Recipe(
            name="rows", precision="fp32",
            model={"language": {"name": language}, "image": {"encoder": vision_encoder, "connector": {"type": "mlp"}}},
            stages=[{**stage, "batch_size": batch}], forgetting=False,
        )  # fmt: skip
        times, held = [], []
        forward = NextToken.forward

        def noted(self: Any, given: Any) -> Any:
            if torch.is_grad_enabled():  # a step, and no look at what the stage came to
                times.append(time.perf_counter())
                held.append(_resident())
            return forward(self, given)

        NextToken.forward = noted  # type: ignore[method-assign]
        give_memory_back()  # as the stage itself does: what others have freed is not this stage's
        before = _resident()
        started = time.perf_counter()
        try:
            run_stage(dock, recipe, recipe.stages[0], folder / "run" / "stages" / "0-align", trained_before=set())
        finally:
            NextToken.forward = forward  # type: ignore[method-assign]
        assert len(times) == steps, f"{len(times)} forward passes in {steps} steps"
        between = [b - a for a, b in zip(times[1:], times[2:], strict=False)]
        notes = {
            "first_step_seconds": times[0] - started, "resident_bytes": max(held), "before_bytes": before,
            "file_bytes": data.stat().st_size,
        }  # fmt: skip
        return Trial(statistics.median(between), batch, notes=notes)


def _save_model(folder: Path) -> None:
    import torch
    import transformers as tf

    shape = shapes.SHAPES["tiny"]
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(shape.language_part.config()).save_pretrained(folder / "language")
    made_data.tokenizer(shape.language_part.vocabulary).save_pretrained(folder / "language")
    tf.AutoModel.from_config(shape.vision_encoder.config()).save_pretrained(folder / "eye")
    made_data.processor(shape).image_processor.save_pretrained(folder / "eye")


def _save_rows(folder: Path, rows: int, files: int) -> Path:
    folder.mkdir()
    for i, picture in enumerate(made_data.pictures(shapes.SHAPES["tiny"], files)):
        picture.save(folder / f"{i}.png")
    with (folder / "captions.jsonl").open("w") as out:
        for row in range(rows):
            words = " ".join(f"w{8 + (row * k) % 300}" for k in (1, 7, 11, 13, 17, 19, 23, 29))
            out.write(json.dumps({"image": f"{row % files}.png", "caption": words}) + "\n")
    return folder / "captions.jsonl"


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
