"""Rows packed ahead: all samples of an epoch, the loss of the samples apart, the same for any number of processes."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.encode.packing import Row, pack
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.recipe import DataSpec, Recipe, Stage
from opticnerve.train import sampler as visits_module
from opticnerve.train.sampler import StageSampler
from opticnerve.types import Conversation, DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
WORDS = ("yes", "a red circle", "the quick brown fox jumps over the lazy dog", "no triangle is green")


def packed(tokens: int, window: int = 8, **options: Any) -> Stage:
    given = {"name": "s", "train": {"connector": 1e-3}, "data": [DataSpec(path="x")], "batch_size": 4, **options}
    return Stage(**given).model_copy(update={"pack": SimpleNamespace(tokens=tokens, window=window)})


def samples(count: int) -> list[Any]:
    made = [ask(f"question {i}", tiny.picture(i), answer=WORDS[i % 4] * (1 + i % 3)) for i in range(count)]
    return [([Conversation(c.messages, id=str(i))], None) for i, c in enumerate(made)]


class Rows:
    """In the place of a collator: the rows themselves."""

    features = None

    def __call__(self, rows: list[Row]) -> list[Row]:
        return rows


@pytest.fixture
def processor(docked: Callable[..., Dock]) -> Any:
    return docked().processor


def test_every_sample_once_an_epoch_in_rows_within_the_budget(processor: Any) -> None:
    sampler = StageSampler(samples(21), packed(150, epochs=2), processor, seed=0)
    assert sampler.plan is not None
    sampler.collate = Rows()
    steps: list[Any] = [sampler[i] for i in range(len(sampler))]
    assert sampler.steps < 2 * 21 / 4 / 1.5  # fewer steps than rows of one sample would take
    assert all(len(rows) == 4 and max(map(len, rows)) <= 150 for rows in steps)
    # Two epochs, and of a third what fills the last step.
    before = Counter(i for rows in steps[:-1] for r in rows for i in r.ids)
    seen = before + Counter(i for r in steps[-1] for i in r.ids)
    assert set(before.values()) <= {1, 2}
    assert set(seen.values()) <= {2, 3}
    assert seen.keys() == {str(i) for i in range(21)}


def test_lengths_are_known_without_opening_a_picture(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(visits_module, "open_for", refuse)
    assert len(StageSampler(samples(9), packed(150, steps=2), processor, seed=0)) == 2


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (4, 1), (2, 2)])
def test_processes_share_each_step_out_evenly(processor: Any, world: int, accumulate: int) -> None:
    some = samples(40)

    def step(number: int, world: int, accumulate: int) -> list[list[list[Row]]]:
        stage = packed(200, steps=3, accumulate=accumulate)
        all_of = [StageSampler(some, stage, processor, seed=0, rank=r, world=world) for r in range(world)]
        for sampler in all_of:
            sampler.collate = Rows()
        return [[sampler[number * accumulate + k] for k in range(accumulate)] for sampler in all_of]  # type: ignore[misc]

    for number in range(3):
        [[one]] = step(number, 1, 1)
        dealt = step(number, world, accumulate)
        assert Counter(i for mine in dealt for rows in mine for r in rows for i in r.ids) == Counter(
            i for r in one for i in r.ids
        )
        assert {len(rows) for mine in dealt for rows in mine} == {4 // world // accumulate}
        tokens = [sum(len(r) for rows in mine for r in rows) for mine in dealt]
        assert sum(tokens) == sum(map(len, one))
        assert max(tokens) - min(tokens) <= 200


def test_loss_and_gradients_are_those_of_the_samples_apart(docked: Callable[..., Dock]) -> None:
    dock = docked()
    some = samples(12)
    sampler = StageSampler(some, packed(250, steps=1), dock.processor, seed=0)
    batch = sampler[0]
    assert len(batch.ids) > 4
    by_id = {c.id: c for [c], _ in some}
    apart = Collator(dock.processor)([pack([sampler._encode([by_id[i]])]) for i in batch.ids])
    assert apart.supervised == batch.supervised

    def gradients(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        dock.model.zero_grad(set_to_none=True)
        loss, _ = NextToken(dock.model)(batch)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in dock.model.named_parameters() if p.grad is not None}

    for parameter in dock.model.parameters():
        parameter.requires_grad_(True)
    loss, found = gradients(batch)
    wanted_loss, wanted = gradients(apart)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6)


def test_a_sample_longer_than_the_budget_stands_alone(processor: Any) -> None:
    sampler = StageSampler(samples(8), packed(5, steps=2), processor, seed=0)
    assert [len(sampler[i].ids) for i in range(2)] == [4, 4]
    with refused("too-long", "max_length 5", error=DataError):
        StageSampler(samples(8), packed(5, steps=2, max_length=5), processor, seed=0)


def test_bad_samples_are_left_out(processor: Any, tmp_path: Path) -> None:
    some = samples(12)
    some[3] = ([Conversation(ask("no answer").messages, id="unanswered")], None)
    gone = ask("where?", tmp_path / "gone.png", answer="here")
    some[5] = ([Conversation(gone.messages, id="gone")], None)
    sampler = StageSampler(some, packed(150, epochs=1, batch_size=1, bad_samples="skip"), processor, seed=0)
    seen = Counter(i for k in range(len(sampler)) for i in sampler[k].ids)
    assert set(seen) == {str(i) for i in range(12)} - {"3", "5"}
    with refused("no-assistant-turn", "unanswered", error=DataError):
        StageSampler(some, packed(150, epochs=1), processor, seed=0)


def test_questions_drawn_anew_are_measured_anew(processor: Any) -> None:
    """A sample's length is that of the questions it draws, shared words counted once."""
    group = [ask(f"question {k}", tiny.picture(1), answer=WORDS[k % 4] * (1 + k)) for k in range(6)]
    same = [Conversation((*c.messages[:1], *c.messages[1:]), id=str(k)) for k, c in enumerate(group)]
    pictured = [Conversation(((same[0].messages[0]), c.messages[1]), id=c.id) for c in same]
    sampler = StageSampler([(pictured, 2)], packed(400, window=4, steps=4, batch_size=2), processor, seed=0)
    assert sampler.plan is not None
    for number in range(8):
        assert len(sampler.planned_row(number)) == sampler.plan.lengths[number]


def test_visits_travel_to_workers(processor: Any) -> None:
    sampler = StageSampler(samples(9), packed(150, steps=2), processor, seed=0)
    there = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(there[1].input_ids, sampler[1].input_ids)


def test_resumed_in_the_middle_is_unbroken(
    make_recipe: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe(epochs=4, steps=None, batch_size=2, accumulate=2)
    stage = recipe.stages[0].model_copy(update={"pack": SimpleNamespace(tokens=120, window=4)})
    recipe = recipe.model_copy(update={"stages": [stage]})

    def lines(run: str) -> list[dict[str, Any]]:
        text = (tmp_path / run / "stages" / "0-align" / "metrics.jsonl").read_text()
        told = [json.loads(line) for line in text.splitlines()]
        return [
            {k: v for k, v in line.items() if k not in ("elapsed_s", "waited_s", "tokens_per_second")} for line in told
        ]

    whole, result = train(recipe, "whole")
    assert result.steps == len(lines("whole")) < 12  # what one sample a row would take
    train(recipe, "broken", stop_at=2)
    again, _ = train(recipe, "broken", resume=True)
    assert [line["loss"] for line in lines("broken")] == [line["loss"] for line in lines("whole")]
    state = again.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in whole.model.state_dict().items())
