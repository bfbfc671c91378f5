"""Sources by weight and by temperature: their shares hold, whatever packs, stops or shares out the stage; and the loss
of each source is told from the same forward pass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.data.dataset.load import load_examples
from opticnerve.data.dataset.mixture import Mixture
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.plan import plan as planning
from opticnerve.recipe import DataSpec, Recipe, Stage
from opticnerve.runs.card.card import write_card
from opticnerve.runs.folder import read_metrics
from opticnerve.train.sampler import StageSampler

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of captions: 4, 8 and 16 of them, all different."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(16):
        tiny.picture(i).save(folder / f"{i}.png")
    for name, count in (("a", 4), ("b", 8), ("c", 16)):
        lines = [{"image": f"{i}.png", "caption": f"{name} {i} " + "fox " * (i % 5)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(folder / f"{name}.jsonl") for name in "abc"]


def stage(data: list[dict[str, Any]], **options: Any) -> Stage:
    specs = [DataSpec(**spec) for spec in data]
    return Stage(**{"name": "s", "train": {"connector": 1e-3}, "data": specs, "batch_size": 4, **options})


def drawn(mixed: Stage, samples: int, seed: int = 0) -> list[str]:
    sampler = StageSampler(load_examples(mixed.data), mixed, None, seed=seed, collate=lambda rows: None)
    return [c.answer or "" for index in range(samples) for c in sampler.drawn(index)]


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=12), block=st.integers(1, 16))
def test_each_source_has_its_share_to_less_than_one_sample(weights: list[float], block: int) -> None:
    shares = [w / sum(weights) for w in weights]
    mixture, seen = Mixture(shares, block=block, key="k"), Counter[int]()
    for index in range(20 * block):
        source, own = mixture[index]
        assert own == seen[source]
        seen[source] += 1
        if index % block == block - 1:
            assert all(abs(seen[s] - share * (index + 1)) < 1 for s, share in enumerate(shares))


def test_weights_say_the_shares_and_each_source_goes_through_its_own_epochs(sources: list[str]) -> None:
    mixed = stage([{"path": p, "weight": w} for p, w in zip(sources, (2, 1, 1), strict=True)], steps=8)
    seen = drawn(mixed, 32)
    assert Counter(s[0] for s in seen) == {"a": 16, "b": 8, "c": 8}
    assert set(Counter(s for s in seen if s[0] == "a").values()) == {4}  # four epochs of four
    assert set(Counter(s for s in seen if s[0] == "b").values()) == {1}
    assert seen == drawn(mixed, 32)
    assert seen != drawn(mixed, 32, seed=1)


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, (2, 4, 8)), (2.0, (3, 4, 6)), (1e6, (4, 4, 4))])
def test_temperature_makes_sizes_even(sources: list[str], temperature: float, shares: tuple[int, ...]) -> None:
    mixed = stage([{"path": p} for p in sources], mixing={"temperature": temperature}, steps=8)
    seen = Counter(s[0] for s in drawn(mixed, 28))
    wanted = [28 * s / sum(r) for s, r in ((share, shares) for share in shares)]
    assert all(abs(seen[name] - want) < 1.5 for name, want in zip("abc", wanted, strict=True))


@pytest.mark.parametrize(
    ("entries", "options", "words"),
    [
        ([{"weight": 1}, {}], {}, "has no weight"),
        ([{"weight": 1}], {}, "several entries"),
        ([{}], {"mixing": {"temperature": 2}}, "several entries"),
        ([{"weight": 1}, {"weight": 1}], {"mixing": {"temperature": 2}}, "leave one of the two out"),
        ([{"weight": 1, "repeat": 2}, {"weight": 1}], {}, "has a repeat"),
        ([{"repeat": 2}, {}], {"mixing": {"temperature": 2}}, "has a repeat"),
        ([{"streaming": True}, {"streaming": True}], {"mixing": {"temperature": 2}, "steps": 1}, "streamed"),
    ],
)
def test_contradictions_are_errors(entries: list[dict[str, Any]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stage([{"path": f"{i}.jsonl", **entry} for i, entry in enumerate(entries)], **options)


@pytest.mark.parametrize("pack", [None, {"tokens": 120, "window": 12}], ids=["apart", "packed"])
def test_a_mixture_shared_out_is_the_mixture(make_recipe: Make, sources: list[str], pack: Any) -> None:
    """The rows of two processes, in two micro-batches, are those of one; the loss of each source is over its own."""
    data = [{"path": p, "weight": w} for p, w in zip(sources, (3, 1, 1), strict=True)]
    recipe = make_recipe(data=data, pack=pack, accumulate=2)
    processor, mixed = dock_recipe(recipe).processor, recipe.stages[0]
    examples = load_examples(mixed.data)

    def rows(rank: int, world: int) -> list[Counter[str]]:
        sampler = StageSampler(examples, mixed, processor, seed=0, rank=rank, world=world)
        return [Counter(i for k in (0, 1) for i in sampler[2 * step + k].ids) for step in range(3)]

    assert [a + b for a, b in zip(rows(0, 2), rows(1, 2), strict=True)] == rows(0, 1)
    batch = StageSampler(examples, mixed, processor, seed=0)[0]
    assert batch.sources is not None
    assert ((batch.sources >= 0) == (batch.group >= 0)).all()


def test_a_stopped_mixture_goes_on_and_its_losses_add_up(
    make_recipe: Make, train: Callable[..., Any], sources: list[str], tmp_path: Path
) -> None:
    data = [{"path": p, "weight": w} for p, w in zip(sources, (2, 1, 1), strict=True)]
    recipe = make_recipe(data=data, pack={"tokens": 120, "window": 12}, steps=4, template="caption")
    train(recipe, "whole")
    train(recipe, "stopped", stop_at=2)
    train(recipe, "stopped", resume=True)
    whole, stopped = (
        read_metrics(tmp_path / name / "stages/0-align/metrics.jsonl") for name in ("whole", "stopped")
    )  # fmt: skip
    for a, b in zip(whole, stopped, strict=True):
        assert (a["loss"], a["grad_norm"], a["by_source"]) == (b["loss"], b["grad_norm"], b["by_source"])
        parts = a["by_source"].values()
        assert sum(p["tokens"] for p in parts) == a["supervised_tokens"]
        assert sum(p["loss"] * p["tokens"] for p in parts) == pytest.approx(a["loss"] * a["supervised_tokens"])
    assert {name for line in whole for name in line["by_source"]} == {"a.jsonl", "b.jsonl", "c.jsonl"}


def test_a_bad_sample_is_stood_in_for_by_one_of_its_source(sources: list[str], tmp_path: Path) -> None:
    mixed = stage([{"path": p, "weight": 1} for p in sources[:2]], steps=2, bad_samples="skip")
    sampler = StageSampler(load_examples(mixed.data), mixed, None, seed=0, collate=lambda rows: None)
    for index in range(4):
        nearby = list(sampler.nearby(index))
        assert len(nearby) == sampler.sizes[sampler.source_of(index)]
        assert {sampler.source_of(n) for n in nearby} == {sampler.source_of(index)}


def test_a_weight_without_a_use_is_refused() -> None:
    with refused("recipe", "weight"):
        recipes.load({"model": {"language": {"name": "x"}}, "evaluate": [{"data": {"path": "a", "weight": 1}}]})


def test_plan_tells_shares_and_epochs_by_source(make_recipe: Make, sources: list[str]) -> None:
    data = [{"path": p, "weight": w} for p, w in zip(sources, (2, 1, 1), strict=True)]
    [planned] = planning.make(make_recipe(data=data, steps=8)).to_dict()["stages"]
    assert planned["sources"] == [
        {"name": "a.jsonl", "examples": 4, "share": 0.5, "epochs": 4.0},
        {"name": "b.jsonl", "examples": 8, "share": 0.25, "epochs": 1.0},
        {"name": "c.jsonl", "examples": 16, "share": 0.25, "epochs": 0.5},
    ]


def test_the_card_tells_the_loss_of_each_source(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "stages" / "0-s"
    folder.mkdir(parents=True)
    lines = [
        {"step": n, "loss": 1.0, "by_source": {"a": {"loss": 4.0 / n, "tokens": 3}, "b": {"loss": 2.0, "tokens": 1}}}
        for n in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = write_card(tmp_path / "run").read_text()
    assert "| a | 75.0% | 4.000 | 2.000 |" in card
    assert "| b | 25.0% | 2.000 | 2.000 |" in card
