"""What a stage tells of its speed, and to trackers: counted arithmetic against torch's own count, and no random number
moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opticnerve.models.family import build
from opticnerve.models.freeze import freeze
from opticnerve.models.vlm.build import Dock
from opticnerve.recipe import Recipe
from opticnerve.runs.card.card import write_card
from opticnerve.runs.folder import read_metrics
from opticnerve.train import throughput
from opticnerve.train.engine import make_accelerator
from opticnerve.train.loop import run_stage
from opticnerve.train.metrics import tracked

pytestmark = pytest.mark.usefixtures("private_cache")


def test_counted_arithmetic_is_torchs(docked: Callable[..., Dock]) -> None:
    """Of a language model that trains whole: attention's scores are what is left out."""
    model = docked().model
    language, encoder = model.language_model, model.image.encoder
    model.requires_grad_(True)
    head = language.get_output_embeddings().weight
    with FlopCounterMode(display=False) as counter:
        embeds = torch.randn(4, 8, language.config.hidden_size, requires_grad=True)
        language(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    counted = 32 * (throughput._matrix_flops(language, besides=head) + throughput._weight_flops(head.numel(), True))
    assert 0.85 * counter.get_total_flops() < counted <= counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.randn(1, *encoder.media_shape))
    assert throughput.encoder_flops(encoder) == 3 * counter.get_total_flops()
    encoder.requires_grad_(False)
    assert throughput.encoder_flops(encoder) == counter.get_total_flops()
    freeze(model, {"encoder.last(1)": 1e-3})
    training = [m.training for m in encoder.modules()]
    throughput.encoder_flops(encoder)
    assert [m.training for m in encoder.modules()] == training
    assert len(set(training)) == 2


def test_measuring_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    assert throughput.matmul_rate("cpu", torch.float32, seconds=0.01) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_lines_and_card_tell_the_speed(make_recipe: Callable[..., Recipe], train: Any, tmp_path: Path) -> None:
    train(make_recipe(steps=2))
    for line in read_metrics(tmp_path / "run/stages/0-align/metrics.jsonl"):
        assert line["samples_per_second"] > 0
        assert 0 <= line["waiting"] <= 1
        assert 0 < line["mfu"] < 1
        assert line["peak_memory_bytes"] > 1 << 20
    card = write_card(tmp_path / "run").read_text()
    assert "| stage | samples/s | tokens/s | waited for data | MFU | peak memory |" in card


def test_a_tracker_gets_every_number(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Two stages on one axis of steps, for wandb passes over a step that goes back."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(steps=2).model_copy(update={"trackers": ["tensorboard"]})
    recipe = recipe.model_copy(update={"stages": [recipe.stages[0], recipe.stages[0].model_copy(update={"name": "b"})]})
    accelerator, dock, trained = make_accelerator(recipe, tmp_path / "run"), build(recipe), set[str]()
    for number, stage in enumerate(recipe.stages):
        folder = tmp_path / "run/stages" / f"{number}-{stage.name}"
        run_stage(dock, recipe, stage, folder, trained_before=trained, accelerator=accelerator)
    accelerator.end_training()
    [folder] = {f.parent for f in (tmp_path / "run").rglob("events.out.*") if f.parent.name == "run"}
    found = EventAccumulator(str(folder)).Reload()
    for number, name in enumerate(("align", "b")):
        lines = read_metrics(tmp_path / f"run/stages/{number}-{name}/metrics.jsonl")
        events = found.Scalars(f"{name}/loss")
        assert [e.step for e in events] == [2 * number + 1, 2 * number + 2]
        assert [e.value for e in events] == pytest.approx([line["loss"] for line in lines])
        assert {f"{name}/{key}" for key in tracked(lines[0])} <= set(found.Tags()["scalars"])
    assert "align/learning_rate/image.connector" in found.Tags()["scalars"]
