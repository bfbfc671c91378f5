"""Each objective's training step on a pretended CUDA device: no mixed devices, at most one wait for the host, and the
CPU's numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
from accelerate.state import AcceleratorState

import tiny
from opticnerve import recipe as recipes
from opticnerve.common.progress import Progress
from opticnerve.models.family import build
from opticnerve.recipe import Recipe
from opticnerve.train.loop import run_stage
from pretend_device import pretended

FIRST, LAST = 1, 3
"""What was counted between the ends of these two steps is what steps do."""
ALIGN = {"connector": 1e-2}
LORA = {"train": {"connector": 1e-2, "language.lora": 1e-2}, "lora": {"rank": 2, "dropout": 0.1}}
CROSS = {"type": "cross_attention", "every": 1, "heads": 2}
# Each: what the model has beside its defaults, the data, and the stage.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "padded": ({}, "captions", {"train": {"connector": 1e-2, "language": 1e-3}}),
    "packed": ({}, "captions", {"train": {"connector": 1e-2, "language": 1e-3}, "pack": 2, "batch_size": 4}),
    "packed ahead": ({}, "questions", {"pack": {"tokens": 128}, "batch_size": 2}),
    "shared prefix": ({}, "questions", {"share_prefix": True, "train": {"connector": 1e-2, "language": 1e-3}}),
    "frozen": ({}, "captions", {"accumulate": 2}),
    "workers": ({}, "captions", {"workers": 1, "train": {"connector": 1e-2, "encoder.last(1)": 1e-3}}),
    "cached": ({}, "captions", {"cache_features": True}),
    "LoRA": ({}, "questions", {**LORA, "gradient_checkpointing": True}),
    "DPO": ({}, "pairs", {**LORA, "objective": "dpo"}),
    "cross-attention": ({"fusion": CROSS}, "questions", {"train": {"connector": 1e-2, "fusion": 1e-2}, "pack": 2}),
    "tiling": ({"tiling": {"type": "anyres"}}, "captions", {}),
    "own shapes": ({"fit": "native"}, "shapes", {}),
    "own shapes, pooled": ({"fit": "native", "connector": {"type": "pixel_shuffle"}}, "shapes", {"cache_features": True}),
    "text spotting": (
        {"fit": "native", "connector": {"type": "text_spotter", "width": 8, "hidden": 16}}, "boxed",
        {"objective": "text_spotting", "accumulate": 2},
    ),
    "Q-Former pretraining": (
        {"connector": {"type": "qformer", "num_queries": 4, "text": True, "image_text_size": 8}}, "captions",
        {"objective": "qformer_pretraining"},
    ),
    "audio": ({}, "sounds", {"train": {"audio.connector": 1e-2}}),
    "words alone": ({}, "chats", {"train": {"connector": 1e-2, "language": 1e-3}}),
    "contrastive": (
        {}, "captions", {"objective": {"type": "contrastive"}, "batch_size": 3, "train": {"image.projection": 1e-2, "text.encoder": 1e-3}}
    ),
    "contrastive, cached embeddings": (
        {}, "captions",
        {"objective": {"type": "contrastive", "duplicates": "mask"}, "train": {"image.projection": 1e-2}, "accumulate": 2},
    ),
    "classification": ({"timing": "late"}, "questions", {"objective": "classification", "train": {"classifier": 1e-2}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`captions.jsonl`, `questions.jsonl`, `pairs.jsonl`, `sounds.jsonl`, `chats.jsonl`, `shapes.jsonl` and
    `boxed.jsonl`."""
    folder = tmp_path_factory.mktemp("data")
    tiny.save_captions(folder)
    tiny.save_questions(folder)
    lines: dict[str, list[Any]] = {"pairs": [], "sounds": [], "chats": [], "shapes": [], "boxed": []}
    for i in range(6):
        PIL.Image.new("RGB", (20 + 30 * i, 60), (40 * i, 9, 9)).save(folder / f"shape{i}.png")
        lines["shapes"].append({"image": f"shape{i}.png", "text": "a dog"})
        lines["boxed"].append({"image": f"shape{i}.png", "text": "dog [100, 50, 480, 200]\nhat [500, 60, 640, 900]"})
        lines["pairs"].append(
            {"image": f"{i}.png", "question": "what?", "chosen": "a dog " * i + "a", "rejected": "no"}
        )
        samples = np.random.default_rng(i).normal(0, 0.1, 8000 + 900 * i).astype(np.float32)
        soundfile.write(folder / f"{i}.wav", samples, 16_000)
        lines["sounds"].append({"audio": f"{i}.wav", "text": "a dog"})
        said = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": f"{i} dogs"}]
        lines["chats"].append({"messages": said})
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def make(
    data: Path, private_cache: Path, bert_folder: str, whisper_folder: str, language_folder: Callable[..., str],
    vision_folder: Callable[..., str],
) -> Callable[..., Recipe]:  # fmt: skip
    def made(case: str, precision: str) -> Recipe:
        model, file, stage = CASES[case]
        image = {"encoder": {"type": "hf_vision", "name": vision_folder("siglip_vision_model")}}
        image["encoder"] |= {k: v for k, v in model.items() if k == "fit"}
        parts: dict[str, Any] = {"image": image | {k: v for k, v in model.items() if k not in ("timing", "fit")}}
        if stage.get("objective") == "classification":
            small = {"width": 16, "depth": 1, "dropout": 0.1}
            parts |= {"text": {"encoder": {"name": bert_folder}}, "timing": model["timing"], "options": small}
        elif "contrastive" in case:
            parts |= {"text": {"encoder": {"name": bert_folder}}, "projection_dim": 8}
        else:
            parts |= {"language": {"name": language_folder("llama")}}
            if "text" in model.get("connector", {}):
                parts["image"]["connector"] = {**model["connector"], "bert": bert_folder}
            if file == "sounds":
                parts["audio"] = {"encoder": {"type": "whisper", "name": whisper_folder, "seconds": 1, "pool": 5}}
        shares = {k: v for k, v in stage.items() if k == "share_prefix"}
        chosen = {
            "name": "learn", "train": ALIGN, "data": [{"path": str(data / f"{file}.jsonl"), **shares}], "batch_size": 4,
            "schedule": "constant", **{k: v for k, v in stage.items() if k not in shares}, "steps": LAST,
        }  # fmt: skip
        return recipes.load({"precision": precision, "model": parts, "stages": [chosen]})

    return made


def losses(recipe: Recipe, folder: Path) -> list[float]:
    dock = build(recipe)
    run_stage(dock, recipe, recipe.stages[0], folder, trained_before=set())
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


ELSEWHERE = ("encoders/text.py",)
"""Where transformers looks whether a text encoder's mask hides anything."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_mixes_no_devices_and_waits_once(
    case: str, precision: str, make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[int, Counter[tuple[str, str]]] = {}
    with pretended() as device:
        monkeypatch.setattr(Progress, "update", lambda self, line: counted.update({line["step"]: device.waits.copy()}))
        there = losses(make(case, precision), tmp_path / "there")
    monkeypatch.undo()
    waits = {k: n for k, n in (counted[LAST] - counted[FIRST]).items() if not k[1].startswith(ELSEWHERE)}
    assert sum(waits.values()) == LAST - FIRST, waits
    if precision == "fp32":
        AcceleratorState._reset_state(reset_partial_state=True)
        assert there == pytest.approx(losses(make(case, precision), tmp_path / "here"), rel=1e-4)


@pytest.fixture(autouse=True)
def _its_own_accelerator() -> Iterator[None]:
    """accelerate remembers the device that it found first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
