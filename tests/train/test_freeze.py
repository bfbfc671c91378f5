"""What a stage names is open, in train mode, at its rate; all else is frozen and in eval mode. The table adds up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch
from rich.console import Console

from errors import refused
from opticnerve.language.lora import add_lora, is_lora
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import Dock

pytestmark = pytest.mark.usefixtures("private_cache")
CHOICES: list[dict[str, float]] = [
    {"connector": 1e-3},
    {"encoder": 1e-5},
    {"image.encoder.last(1)": 1e-5, "connector": 1e-3},
    {"language": 1e-5},
    {"language.last(1)": 1e-5, "language.embeddings": 1e-6},
    {"connector": 1e-3, "language.lora": 1e-4},
    {"language.lora": 1e-4, "language.embeddings": 1e-6},
    {"connector": 1e-3, "encoder": 1e-5, "language": 1e-5},
]


@pytest.mark.parametrize("vision_encoder", ["clip_vision_model", "test_efficientnet"])
@pytest.mark.parametrize("train", CHOICES, ids=lambda t: "+".join(t))
def test_open_and_frozen(
    docked: Callable[..., Dock], timm_folder: Callable[..., str], vision_encoder: str, train: dict[str, float]
) -> None:
    vision = (
        vision_encoder
        if vision_encoder == "clip_vision_model"
        else {"type": "timm", "name": timm_folder(vision_encoder), "image_size": 64}
    )
    model = docked("llama tied", vision).model
    add_lora(model.language_model, {"rank": 2, "dropout": 0.1})
    model.train()
    frozen = freeze(model, train)
    wanted = {n for part in train for n in model.part_parameters(part)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted

    assert frozen.total == sum(p.numel() for p in model.parameters())
    assert frozen.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert frozen.to_dict()["total"] == sum(r["parameters"] for r in frozen.to_dict()["rows"])
    for row in frozen.rows:
        assert row.trained == (row.learning_rate is not None)
    assert {r.part: r.learning_rate for r in frozen.rows if r.trained} == {
        (p if p.startswith(("language", "image.")) else f"image.{p}"): rate for p, rate in train.items()
    }

    for name, module in model.named_modules():
        own = [p.requires_grad for p in module.parameters()]
        if own and not any(own):
            assert not any(m.training for m in module.modules()), f"{name} is frozen, but not in eval()"
        if own and all(own):
            assert all(m.training for m in module.modules()), f"{name} trains, but is in eval()"
    dropouts = [m for n, m in model.named_modules() if n.endswith("lora_dropout")]
    assert {m.training for m in dropouts} == {"language.lora" in train}


def test_the_table_is_readable(docked: Callable[..., Dock]) -> None:
    console = Console(width=120)
    with console.capture() as seen:
        console.print(freeze(docked().model, {"connector": 1e-3, "language.last(1)": 2e-5}).table())
    text = seen.get()
    for word in (
        "image.connector",
        "language.last(1)",
        "language (rest)",
        "image.encoder",
        "0.001",
        "2e-05",
        "frozen",
        "float32",
    ):
        assert word in text


def test_overlapping_parts(docked: Callable[..., Dock]) -> None:
    model = docked().model
    frozen = freeze(model, {"language.last(1)": 1e-3, "language.last(2)": 1e-5})
    assert all(".layers.1." in n for n in frozen.groups["language.last(1)"])
    assert all(".layers.0." in n for n in frozen.groups["language.last(2)"])
    with refused("conflict", "language.last(1)"):
        freeze(model, {"language.last(2)": 1e-5, "language.last(1)": 1e-3})


def test_a_second_stage_freezes_what_the_first_opened(docked: Callable[..., Dock]) -> None:
    model: Any = docked().model
    freeze(model, {"connector": 1e-3, "language": 1e-5})
    freeze(model, {"encoder.last(1)": 1e-5})
    assert all("image.encoder" in n for n, p in model.named_parameters() if p.requires_grad)
    assert not model.image.connector.training
    assert not any(is_lora(n) for n, _ in model.named_parameters())
    assert isinstance(model, torch.nn.Module)


def test_a_lone_small_picture_goes_through_the_batch_norms_of_a_trained_encoder(
    docked: Callable[..., Dock], timm_folder: Callable[..., str]
) -> None:
    """Its map is one place: there is nothing to take a deviation of, which torch's batch norms refuse in `train()`."""
    made = docked("llama", {"type": "timm", "name": timm_folder(), "fit": "native", "layer": "last", "image_size": 64})
    freeze(made.model, {"encoder": 1e-3, "connector": 1e-3})
    norms = [m for m in made.model.image.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    kept = [m.running_mean.clone() for m in norms if m.running_mean is not None]
    inputs = made.processor.image_processor([PIL.Image.new("RGB", (20, 20), "red")], return_tensors="pt")
    soft = made.model.image(inputs["pixel_values"], inputs["image_sizes"])
    assert soft.tokens_BND.shape[1] == 1
    soft.tokens_BND.sum().backward()
    assert norms and all(m.weight.grad is not None for m in norms)
    assert all(torch.equal(a, m.running_mean) for a, m in zip(kept, norms, strict=True) if m.running_mean is not None)


@pytest.mark.parametrize("train", [{"connector": 1e-3}, {"encoder.last(1)": 1e-3}], ids=lambda t: "+".join(t))
def test_frozen_statistics_stay_where_a_trainer_calls_train(
    docked: Callable[..., Dock], timm_folder: Callable[..., str], train: dict[str, float]
) -> None:
    """transformers' Trainer, and TRL's, put the whole model into train mode before each step."""
    vision = {"type": "timm", "name": timm_folder("test_efficientnet"), "image_size": 64}
    model = docked("llama", vision).model
    freeze(model, train)
    norms = [m for m in model.image.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms if m.running_mean is not None]
    model.train()
    model.image.encode(torch.randn(3, 3, 64, 64))
    moved = [not torch.equal(a, m.running_mean) for a, m in zip(before, norms, strict=True)]
    assert moved == [m.weight.requires_grad for m in norms]
    assert any(moved) == ("encoder.last(1)" in train)
