"""Which samples a step sees depends on seed, stage and step alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from errors import refused
from opticnerve.data.dataset.bad_samples import BadSampleCounter
from opticnerve.data.encode.loader import TimedBatches, loader
from opticnerve.models.vlm.build import Dock
from opticnerve.recipe import DataSpec, Stage
from opticnerve.recipe.data import BadSamples
from opticnerve.train.precheck import precheck, samples_to_check
from opticnerve.train.sampler import StageSampler
from opticnerve.types import Conversation, DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")


class FakeTokenizer:
    pad_token_id = 0


class FakeProcessor:
    tokenizer, image_processor, feature_extractor = FakeTokenizer(), None, None


def stage(**options: Any) -> Stage:
    given = {"name": "s", "train": {"connector": 1e-3}, "data": [DataSpec(path="x")], "batch_size": 4, **options}
    return Stage(**given)


def examples(count: int, each: int = 1, per_image: int | None = None) -> list[tuple[list[Conversation], int | None]]:
    return [([ask(f"{i}/{k}", answer="a") for k in range(each)], per_image) for i in range(count)]


def seen(sampler: StageSampler, first: int, count: int) -> list[str]:
    return [c.messages[0].text for v in range(first, first + count) for c in sampler.drawn(v)]


@given(count=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_unit_once_an_epoch_in_another_order(count: int, seed: int) -> None:
    sampler = StageSampler(examples(count), stage(steps=9), FakeProcessor(), seed=seed)
    epochs = [seen(sampler, e * count, count) for e in range(3)]
    assert all(Counter(e) == Counter(epochs[0]) for e in epochs)
    assert len(set(epochs[0])) == count
    assert epochs[1] == seen(sampler, count, count)
    other = StageSampler(examples(count), stage(steps=9), FakeProcessor(), seed=seed)
    assert seen(other, count, count) == epochs[1]


def test_orders_differ_by_epoch_seed_and_stage() -> None:
    made = [
        StageSampler(examples(20), stage(steps=9, name=n), FakeProcessor(), seed=s)
        for s, n in ((0, "s"), (1, "s"), (0, "t"))
    ]
    orders = [tuple(seen(v, 0, 20)) for v in made] + [tuple(seen(made[0], 20, 20))]
    assert len(set(orders)) == 4


def test_questions_are_drawn_anew_and_never_twice_at_once() -> None:
    sampler = StageSampler(examples(1, each=8, per_image=3), stage(steps=9), FakeProcessor(), seed=0)
    draws = [tuple(sorted(seen(sampler, v, 1))) for v in range(10)]
    assert all(len(set(d)) == 3 for d in draws)
    assert len(set(draws)) > 1


def test_steps() -> None:
    assert StageSampler(examples(10), stage(), FakeProcessor(), seed=0).steps == 3
    assert StageSampler(examples(10), stage(epochs=2), FakeProcessor(), seed=0).steps == 5
    assert StageSampler(examples(10), stage(epochs=0.1), FakeProcessor(), seed=0).steps == 1
    assert len(StageSampler(examples(10), stage(steps=7, accumulate=2), FakeProcessor(), seed=0)) == 14


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_micro_batches_and_processes_share_a_step_out(docked: Callable[..., Dock], accumulate: int, world: int) -> None:
    """Together they see the samples that one process sees in one batch."""
    processor = docked().processor
    some = [([ask(f"question {i}", tiny.picture(i), answer="yes")], None) for i in range(8)]
    some = [([Conversation(c.messages, id=str(i)) for c in u[0]], None) for i, u in enumerate(some)]
    one = StageSampler(some, stage(steps=2), processor, seed=0)[1]
    parts = [
        StageSampler(some, stage(steps=2, accumulate=accumulate), processor, seed=0, rank=r, world=world)[accumulate + k]
        for k in range(accumulate) for r in range(world)
    ]  # fmt: skip
    assert Counter(i for p in parts for i in p.ids) == Counter(one.ids)
    assert sum(p.supervised for p in parts) == one.supervised


def test_an_uneven_split_is_refused() -> None:
    with refused("mismatch", "batch_size 4", "1 micro-batches", "3 processes"):
        StageSampler(examples(4), stage(), FakeProcessor(), seed=0, world=3)


def test_a_micro_batch_is_the_same_whenever_it_is_made(docked: Callable[..., Dock]) -> None:
    processor = docked().processor
    some: Any = [([ask(f"question {i}", tiny.picture(i), answer="yes")], None) for i in range(5)]
    sampler = StageSampler(some, stage(steps=6), processor, seed=0)
    later = [sampler[i] for i in (5, 0, 3)][2]
    again = StageSampler(some, stage(steps=6), processor, seed=0)[3]
    assert later.ids == again.ids
    assert torch.equal(later.input_ids, again.input_ids)
    assert torch.equal(later.media["pixel_values"], again.media["pixel_values"])


class TestUsableUnits:
    @pytest.fixture
    def processor(self, docked: Callable[..., Dock]) -> Any:
        return docked().processor

    def some(self) -> list[Any]:
        good, bad = ask("q", answer="a"), Conversation(ask("no answer").messages, where="file.jsonl:2")
        return [([good], None), ([bad, good], 1), ([bad], None)]

    def test_refuse(self, processor: Any) -> None:
        with refused("no-assistant-turn", "file.jsonl:2", error=DataError):
            precheck(self.some(), processor, stage())

    def test_skip(self, processor: Any) -> None:
        told: list[DataError] = []
        kept = precheck(self.some(), processor, stage(), on_error=told.append)
        assert [len(u[0]) for u in kept] == [1, 1]
        assert len(told) == 2

    def test_nothing_left(self, processor: Any) -> None:
        with refused("empty", "stage s"):
            precheck(self.some()[2:], processor, stage(), on_error=lambda e: None)

    def test_too_long(self, processor: Any) -> None:
        with refused("too-long", "max_length 5", error=DataError):
            precheck(self.some()[:1], processor, stage(max_length=5))

    def test_a_picture_behind_the_question_cannot_be_shared(self, processor: Any) -> None:
        """Found before the first step, not when the group is drawn."""
        from opticnerve.types import ImagePart, Message, TextPart

        picture = ImagePart(tiny.picture())
        group = [
            Conversation((Message("user", (TextPart(f"{q}?"), picture)), Message("assistant", (TextPart("a"),))), id=q)
            for q in ("this", "that")
        ]
        with refused("conflict", "this, that", error=DataError):
            precheck([(group, None)], processor, stage())


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [({"steps": 20}, 1_000), ({"steps": 1_000}, 8_000), ({"epochs": 1}, 10_000), ({"steps": 9_999}, 10_000)],
)
def test_how_many_samples_are_looked_at_first(stage: dict[str, Any], wanted: int) -> None:
    made = Stage(name="s", train={"connector": 1e-3}, data=[DataSpec(path="a.jsonl")], batch_size=4, **stage)
    assert samples_to_check(made) == wanted


def test_a_short_stage_shows_only_some_of_the_pictures(docked: Callable[..., Dock]) -> None:
    processor = docked().processor
    some: Any = [([ask(f"question {i}", tiny.picture(i), answer="yes")], None) for i in range(9)]
    brief = StageSampler(some, stage(steps=1), processor, seed=0)
    shown = {id(c.images[0].source) for v in range(4) for c in brief.drawn(v)}
    assert {id(source) for source, _ in brief.pictures()} == shown
    assert len(StageSampler(some, stage(epochs=1), processor, seed=0).pictures()) == 9
    # Where another may stand in for a bad one, all may be shown.
    assert len(StageSampler(some, stage(steps=1, bad_samples="skip"), processor, seed=0).pictures()) == 9


class TestBadSamplesRule:
    """`bad_samples`: left out and counted once each, up to what the stage allows, wherever they are met."""

    def errors(self, count: int) -> list[DataError]:
        return [DataError("it is bad", where=f"d.jsonl:{n}") for n in range(count)]

    def test_a_limit(self) -> None:
        tally = BadSampleCounter(BadSamples(limit=6), "align")
        for error in self.errors(6) * 2:
            tally(error)
        assert len(tally) == 6 and tally[0].startswith("d.jsonl:0: it is bad")
        with refused("bad-samples", "stage align", "7 samples", "bad_samples", 6, "d.jsonl:4"):
            tally(DataError("it is bad", where="d.jsonl:6"))

    def test_a_share_is_judged_when_the_whole_is_known(self) -> None:
        tally = BadSampleCounter(BadSamples(share=0.1), "align")
        for error in self.errors(3):
            tally(error)
        tally.of(30)
        with refused("bad-samples", "4 samples of 30", "bad_samples", 3, "share 0.1"):
            tally(DataError("one more"))
        early = BadSampleCounter(BadSamples(share=0.1), "align")
        early(DataError("one"))
        with refused("bad-samples", "1 samples of 9"):
            early.of(9)

    def test_skip_counts_all_and_names_some(self) -> None:
        tally = BadSampleCounter("skip")
        for error in self.errors(1000):
            tally(error)
        assert len(tally) == 1000 and len(tally.named) == 100

    def test_the_rule_takes_one_of_the_two(self) -> None:
        for wrong in ({}, {"limit": 1, "share": 0.1}, {"share": 1.5}, {"limit": -1}):
            with pytest.raises(ValueError, match="bad_samples"):
                stage(bad_samples=wrong)

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("pack", [None, {"tokens": 60, "window": 4}])
    def test_met_on_the_way(self, docked: Callable[..., Dock], tmp_path: Path, workers: int, pack: Any) -> None:
        """A picture that is lost after the start: another stands in, it is counted once, and after a resume, too."""
        processor = docked().processor
        files = [tmp_path / f"{n}.png" for n in range(6)]
        for n, file in enumerate(files):
            tiny.picture(n).save(file)
        some: Any = [([ask(f"question {n}", file, answer="yes")], None) for n, file in enumerate(files)]
        tally = BadSampleCounter(BadSamples(limit=1), "s")
        given = stage(epochs=3, batch_size=1, bad_samples={"limit": 1}, pack=pack)
        sampler = StageSampler(some, given, processor, seed=0, on_error=tally)
        files[2].unlink()
        batches = list(zip(range(sampler.steps), TimedBatches(loader(sampler, 0, workers, "cpu"), "cpu"), strict=False))
        assert len(batches) == sampler.steps and len(tally) == 1 and "2.png" in tally[0]
        again = BadSampleCounter(BadSamples(limit=1), "s")
        resumed = StageSampler(some, given, processor, seed=0, on_error=again)
        resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        assert list(again) == list(tally)
        files[4].unlink()
        with refused("bad-samples", "2 samples", "bad_samples", 1):
            list(zip(range(sampler.steps), TimedBatches(loader(resumed, 0, workers, "cpu"), "cpu"), strict=False))
