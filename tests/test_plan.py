"""A plan says what training then does, and reads no weight for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from errors import refused
from opticnerve import recipe as recipes
from opticnerve.common.hub import HubError
from opticnerve.data.collators.next_token import Collator
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.objectives.next_token import NextToken
from opticnerve.ops import enabled
from opticnerve.plan import cost as plan_cost
from opticnerve.plan import plan


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    lines = []
    for i in range(10):
        PIL.Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"id": f"s{i}", "image": f"{i}.png", "caption": "a picture of something red"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "captions.jsonl"


@pytest.fixture
def make_recipe(
    captions: Path, language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Path
) -> Callable[..., Any]:
    """A recipe of tiny parts; each stage given as its own keys."""

    def make(*stages: dict[str, Any], language: str | None = None, vision: Any = None, **extra: Any) -> Any:
        common = {"data": [{"path": str(captions)}], "steps": 2, "batch_size": 4}
        vision_encoder = vision or {"type": "hf_vision", "name": vision_folder()}
        return recipes.load({
            "precision": "fp32",
            "model": {"language": {"name": language or language_folder()}, "image": {"encoder": vision_encoder}},
            "stages": [{"name": f"s{i}", **common, **stage} for i, stage in enumerate(stages)],
            **extra,
        })  # fmt: skip

    return make


STAGES = [
    {"train": {"connector": 1e-3}},
    {"train": {"connector": 1e-4, "language.lora": 1e-4, "encoder.last(1)": 1e-5}},
]


def test_no_weight_is_read(
    make_recipe: Callable[..., Any],
    language_folder: Callable[..., str],
    vision_folder: Callable[..., str],
    tmp_path: Path,
) -> None:
    bare = []
    for name, folder in (("language", language_folder()), ("eye", vision_folder())):
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        bare.append(str(tmp_path / name))
    made = plan.make(make_recipe(*STAGES, language=bare[0], vision={"type": "hf_vision", "name": bare[1]}))
    assert made.stages[0].seconds is not None
    assert made.sample is not None


def test_what_trains_is_what_training_opens(make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(*STAGES)
    made = plan.make(recipe)
    docked = dock_recipe(recipe)
    for stage, planned in zip(recipe.stages, made.stages, strict=True):
        plan._open_parts(docked, stage, "cpu")
        frozen = freeze(docked.model, stage.train)
        rows = {(r.part, r.parameters, r.trained, r.learning_rate) for r in frozen.rows if r.parameters}
        assert {(s.part, s.parameters, s.trained, s.learning_rate) for s in planned.shares} == rows
        assert planned.trained == frozen.trained
        assert planned.total == sum(p.numel() for p in docked.model.parameters())


def test_shapes_and_visual_tokens_are_the_model_s(make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(*STAGES)
    made, docked = plan.make(recipe), dock_recipe(recipe)
    tower = docked.model.image
    size = tower.encoder.image_size
    features = tower.encode(torch.zeros(1, 3, size, size)).tokens_BND
    given = {s.part: s.output for s in made.shapes}
    assert given["picture"] == f"3 × {size} × {size}"
    assert given["image.encoder"] == f"{features.shape[1]} × {features.shape[2]}"
    assert made.visual_tokens == docked.processor.num_image_tokens
    assert made.processor.image_token_id == docked.processor.image_token_id


def test_a_timm_encoder_is_foreseen_too(make_recipe: Callable[..., Any]) -> None:
    made = plan.make(make_recipe(vision={"type": "timm", "name": "test_efficientnet", "image_size": 96}))
    assert next(s.output for s in made.shapes if s.part == "picture") == "3 × 96 × 96"
    assert any("pretrained with" in r.text for r in made.remarks if r.level == "note")


def test_bytes_kept_for_the_backward_pass_are_the_real_ones(make_recipe: Callable[..., Any]) -> None:
    recipe = make_recipe(STAGES[1])
    made, docked = plan.make(recipe), dock_recipe(recipe)
    stage, planned = recipe.stages[0], made.stages[0]
    plan._open_parts(docked, stage, "cpu")
    freeze(docked.model, stage.train)
    batch = Collator(docked.processor)(planned.data.rows[: stage.batch_size])
    own = {t.untyped_storage().data_ptr() for t in [*docked.model.parameters(), *docked.model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        NextToken(docked.model)(batch)
    real = sum(s.nbytes() for s in kept.values())
    # The estimate is on the safe side: see `trace_step`.
    assert 0.9 * real < planned.memory.activations < 1.4 * real
    assert planned.memory.activations_checkpointed < planned.memory.activations


@pytest.mark.parametrize(("precision", "weight", "state"), [("fp32", 4, 8), ("bf16", 2, 12)])
def test_bytes_of_weights_gradients_and_optimizer(
    make_recipe: Callable[..., Any], precision: str, weight: int, state: int
) -> None:
    [planned] = plan.make(make_recipe(STAGES[0], precision=precision)).stages
    memory = planned.memory
    assert memory.weights == weight * planned.total
    assert (memory.gradients, memory.optimizer) == (weight * planned.trained, state * planned.trained)
    parts = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.process
    assert memory.total == parts


def test_arithmetic_grows_with_the_batch(make_recipe: Callable[..., Any]) -> None:
    small, large = (plan.make(make_recipe({**STAGES[0], "batch_size": n})).stages[0] for n in (2, 8))
    assert large.flops == pytest.approx(4 * small.flops, rel=0.1)
    split = plan.make(make_recipe({**STAGES[0], "batch_size": 8, "accumulate": 4})).stages[0]
    assert split.flops == pytest.approx(large.flops, rel=0.1)
    # The pictures of all micro-batches lie there together.
    assert small.memory.activations <= split.memory.activations < large.memory.activations


def test_steps_and_epochs(make_recipe: Callable[..., Any]) -> None:
    made = plan.make(make_recipe({"train": {"connector": 1e-3}, "steps": None, "epochs": 2}, STAGES[0]))
    assert [s.data.steps for s in made.stages] == [5, 2]
    assert [s.epochs for s in made.stages] == [2.0, 0.8]
    assert made.stages[0].data.samples == 10


def test_calibration_times_each_stage(make_recipe: Callable[..., Any]) -> None:
    made = plan.make(make_recipe(*STAGES), dock=dock_recipe)
    assert all("timed" in s.timing and s.seconds is not None and s.seconds > 0 for s in made.stages)


def test_weights_at_hand(make_recipe: Callable[..., Any]) -> None:
    assert plan.weights_at_hand(make_recipe())
    assert not plan.weights_at_hand(make_recipe(language="somebody/something"))


@pytest.mark.parametrize(
    ("stages", "extra", "words"),
    [
        ([{"train": {"connector": 1e-3, "language": 1e-3}}], {}, "unusually high"),
        ([{"train": {"language.lora": 1e-4}}], {}, "no stage trains image.connector"),
        ([STAGES[0]], {}, "no `evaluate:`"),
        ([{**STAGES[0], "batch_size": 64}], {}, "larger than the data"),
        ([{**STAGES[0], "data": [{"path": "nowhere.jsonl"}]}], {}, "cannot be read"),
    ],
)
def test_warnings(make_recipe: Callable[..., Any], stages: list[Any], extra: dict[str, Any], words: str) -> None:
    made = plan.make(make_recipe(*stages, **extra))
    assert any(words in r.text for r in made.remarks if r.level == "warning"), made.remarks


def test_evaluating_on_training_data_is_a_warning(make_recipe: Callable[..., Any], captions: Path) -> None:
    made = plan.make(make_recipe(STAGES[0], evaluate=[{"data": {"path": str(captions)}}]))
    assert any("trains on" in r.text for r in made.remarks)
    # Two sides of one split are no overlap.
    split = {"path": str(captions), "split": "train"}
    made = plan.make(
        make_recipe({**STAGES[0], "data": [split]}, evaluate=[{"data": {"path": str(captions), "split": "held_out"}}])
    )
    assert not any("trains on" in r.text for r in made.remarks)


def test_too_little_memory_is_a_warning_with_remedies(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        plan_cost, "device", lambda: {"type": "cpu", "name": "", "cores": 1, "memory": 1000, "free": 1000}
    )
    made = plan.make(make_recipe({"train": {"connector": 1e-4, "language": 1e-5}}))
    [text] = [r.text for r in made.remarks if "kB are free" in r.text]
    assert "language.lora" in text
    assert "gradient_checkpointing" in text
    assert "accumulate" in text


def test_bad_samples_are_counted_not_raised(make_recipe: Callable[..., Any], captions: Path) -> None:
    with captions.open("a", encoding="utf-8") as file:
        file.write('\n{"image": "none.png", "caption": "gone"}\n')
    made = plan.make(make_recipe(STAGES[0]))
    assert made.stages[0].data.bad == 1
    assert any("data check" in r.text and ":11" in r.text for r in made.remarks)


def test_an_unreachable_model_is_named(make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with refused("name", nowhere, error=HubError):
        plan.make(make_recipe(language=nowhere))


def test_the_plan_is_json(make_recipe: Callable[..., Any]) -> None:
    found = json.loads(json.dumps(plan.make(make_recipe(*STAGES)).to_dict()))
    assert found["stages"][1]["memory_bytes"]["total"] > 0


@pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")
def test_who_computes_the_attention_of_packed_rows_is_told(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"train": {"connector": 1e-3}}
    recipe = make_recipe(train, train | {"pack": 256}, train | {"pack": 256, "attention": "flash"})
    made = plan.make(recipe)
    assert [stage.attention for stage in made.stages] == [None, "buckets", None]
    assert [r.text for r in made.remarks if "attention: flash is for CUDA" in r.text]
    device = plan_cost.device() | {"type": "cuda"}
    monkeypatch.setattr(plan_cost, "device", lambda: device)
    monkeypatch.setattr(plan, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    there = plan.make(make_recipe(train | {"pack": 256}, precision="bf16", language=None))
    assert there.stages[0].attention == "varlen"
    assert there.to_dict()["stages"][0]["attention"] == "varlen"
