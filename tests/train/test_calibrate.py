"""Before the first step a fresh connector measures its features and the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opticnerve.build import dock_recipe
from opticnerve.data.source import load_units
from opticnerve.recipe import Recipe
from opticnerve.train.calibrate import calibrate
from opticnerve.train.visits import Visits

pytestmark = pytest.mark.usefixtures("private_cache")


def visits_of(recipe: Recipe, made: Any) -> Visits:
    return Visits(load_units(recipe.stages[0].data), recipe.stages[0], made.processor, seed=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_soft_tokens_weigh_what_words_weigh(make_recipe: Callable[..., Recipe], precision: str) -> None:
    recipe = make_recipe(precision=precision)
    made = dock_recipe(recipe)
    before = made.model.image.connector.layers[0].weight.clone()
    calibrate(made.model, visits_of(recipe, made))
    pixels = torch.cat([visits_of(recipe, made)[i].media["pixel_values"] for i in range(4)])
    with torch.no_grad():
        soft = made.model.get_image_features(pixels).float()
        wanted = float(made.model.get_input_embeddings().weight.float().std())
    assert float(soft.std()) == pytest.approx(wanted, rel=0.05)
    assert torch.equal(before, made.model.image.connector.layers[0].weight)
    assert next(made.model.image.connector.parameters()).dtype == made.model.dtype


def test_a_second_time_changes_nothing(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    made = dock_recipe(recipe)
    calibrate(made.model, visits_of(recipe, made))
    before = {n: t.clone() for n, t in made.model.image.connector.state_dict().items()}
    with torch.no_grad():
        made.model.get_input_embeddings().weight.mul_(3)
    calibrate(made.model, visits_of(recipe, made))
    assert all(torch.equal(t, before[n]) for n, t in made.model.image.connector.state_dict().items())


def test_no_pictures_no_calibration(make_recipe: Callable[..., Recipe]) -> None:
    from opticnerve.types import ask

    recipe = make_recipe()
    made = dock_recipe(recipe)
    calibrate(made.model, Visits([([ask("q", answer="a")], None)], recipe.stages[0], made.processor, seed=0))
    assert not bool(made.model.image.connector.calibrated)
