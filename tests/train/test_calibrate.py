"""Before the first step a fresh connector measures its features and the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

import opticnerve
import tiny
from opticnerve.data.dataset.load import load_examples
from opticnerve.fusion.base import words_of
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.recipe import Recipe
from opticnerve.train.calibrate import calibrate
from opticnerve.train.sampler import StageSampler

pytestmark = pytest.mark.usefixtures("private_cache")


def make_sampler(recipe: Recipe, made: Any) -> StageSampler:
    return StageSampler(load_examples(recipe.stages[0].data), recipe.stages[0], made.processor, seed=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_soft_tokens_weigh_what_words_weigh(make_recipe: Callable[..., Recipe], precision: str) -> None:
    recipe = make_recipe(precision=precision)
    made = dock_recipe(recipe)
    before = made.model.image.connector.layers[0].weight.clone()
    calibrate(made.model, make_sampler(recipe, made))
    pixels = torch.cat([make_sampler(recipe, made)[i].media["pixel_values"] for i in range(4)])
    with torch.no_grad():
        soft = made.model.get_image_features(pixels).pooler_output.float()
        wanted = float(made.model.get_input_embeddings().weight.float().std())
    assert float(soft.std()) == pytest.approx(wanted, rel=0.05)
    assert torch.equal(before, made.model.image.connector.layers[0].weight)
    assert next(made.model.image.connector.parameters()).dtype == made.model.dtype


def test_a_second_time_changes_nothing(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    made = dock_recipe(recipe)
    calibrate(made.model, make_sampler(recipe, made))
    before = {n: t.clone() for n, t in made.model.image.connector.state_dict().items()}
    with torch.no_grad():
        made.model.get_input_embeddings().weight.mul_(3)
    calibrate(made.model, make_sampler(recipe, made))
    assert all(torch.equal(t, before[n]) for n, t in made.model.image.connector.state_dict().items())


def test_no_pictures_no_calibration(make_recipe: Callable[..., Recipe]) -> None:
    from opticnerve.types import ask

    recipe = make_recipe()
    made = dock_recipe(recipe)
    calibrate(made.model, StageSampler([([ask("q", answer="a")], None)], recipe.stages[0], made.processor, seed=0))
    assert not bool(made.model.image.connector.calibrated)


@pytest.mark.parametrize(
    "family", ["llama", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "bloom", "opt", "xglm"]
)
@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_soft_tokens_weigh_what_the_first_layer_gets_of_words(family: str, fusion: str, tmp_path: Path) -> None:
    """Gemma's embedding module multiplies by the root of its width, XGLM's, too; Bloom's norm comes behind both."""
    model, _ = opticnerve.dock(
        vision={"type": "hf_vision", "name": tiny.save_vision(tmp_path / "vision")},
        language={"name": language(tmp_path / "language", family), "chat_template": "chatml"},
        fusion={"type": fusion},
    )
    pixels = torch.randn(8, 3, 32, 32)
    calibrate(model, [SimpleNamespace(media={"pixel_values": pixels})])
    embeddings = model.get_input_embeddings()
    words = embeddings(torch.arange(embeddings.num_embeddings)).detach()
    assert (model.get_image_features(pixels).pooler_output.std() / words.std()).item() == pytest.approx(1, rel=1e-3)
    if fusion == "cross_attention":
        torch.testing.assert_close(model.image.fusion.marker.detach(), words.mean(0))


def language(folder: Path, family: str) -> str:
    if family != "xglm":
        return tiny.save_language(folder, family)
    words = tiny.tokenizer()
    config = tf.XGLMConfig(vocab_size=len(words), d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    tf.XGLMForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rows", [7, 10_000])
def test_words_are_counted_piece_by_piece(rows: int) -> None:
    embeddings = torch.nn.Embedding(100, 6)
    mean, deviation = words_of(embeddings, rows)
    torch.testing.assert_close(mean, embeddings.weight.detach().mean(0))
    assert deviation == pytest.approx(float(embeddings.weight.detach().std()))
