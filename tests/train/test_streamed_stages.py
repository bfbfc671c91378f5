"""Training on streamed data: refused where it cannot work, and exact where it does, however a run was cut and spread."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from PIL import Image
from typer.testing import CliRunner

import tiny
from errors import refused
from opticnerve.cli.main import app
from opticnerve.data.dataset.load import load_streams
from opticnerve.data.encode.loader import TimedBatches, loader
from opticnerve.data.sources import streaming as hub
from opticnerve.plan import plan
from opticnerve.recipe import DataSpec, Recipe, Stage
from opticnerve.recipe.schema import EvaluateSpec
from opticnerve.train import precheck
from opticnerve.train import sampler as sampler_module
from opticnerve.train.sampler import StreamingSampler
from opticnerve.types import DataError

pytestmark = pytest.mark.usefixtures("private_cache")
Train = Callable[..., Any]
Make = Callable[..., Recipe]


def repository(folder: Path, sizes: tuple[int, ...] = (7, 6, 8)) -> Path:
    """A folder laid out as a data set on the hub: Parquet shards of captions and pictures as bytes."""
    import datasets

    (folder / "data").mkdir(parents=True)
    for shard, size in enumerate(sizes):
        rows = [(10 * shard + k, tiny.picture(10 * shard + k)) for k in range(size)]
        table = datasets.Dataset.from_dict({"image": [p for _, p in rows], "caption": [f"no. {n}" for n, _ in rows]})
        table.cast_column("image", datasets.Image()).to_parquet(
            str(folder / "data" / f"train-{shard:05d}-of-{len(sizes):05d}.parquet"), batch_size=2
        )
    return folder


def text_lines(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    said = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(count)
    ]
    lines = ["{oops" if n in bad else json.dumps(s) for n, s in enumerate(said)]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "lines.jsonl"


def curve(folder: Path) -> list[tuple[float, int]]:
    lines = (folder / "stages" / "0-align" / "metrics.jsonl").read_text().splitlines()
    return [(line["loss"], line["tokens"]) for line in map(json.loads, lines)]


def entry(path: Path, **options: Any) -> dict[str, Any]:
    return {"path": str(path), "streaming": True, "shuffle_window": 5, **options}


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "stage", "message"),
        [
            ({"share_prefix": True}, {}, "share_prefix brings together what may lie anywhere"),
            ({"group_by_image": True}, {}, "group_by_image brings together"),
            ({"split": "train"}, {}, "choose one of the data set's own splits with hub_split"),
            ({}, {"steps": None, "epochs": 2}, "do not say how long they are; give steps, or one entry with a limit"),
            ({}, {"steps": None}, "give steps, or one entry with a limit"),
            ({}, {"cache_features": True}, "a stream's pictures are not known beforehand"),
            ({}, {"pack": {"tokens": 64}}, "write pack: N, which packs the samples of a micro-batch"),
            ({}, {"bad_samples": {"share": 0.1}}, "a share of a stream is not known; give a limit"),
            ({"streaming": False}, {}, "shuffle_window: for streams; set streaming: true"),
        ],
    )
    def test_with_a_remedy(self, data: Any, stage: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            made(Path("some/set"), data, **{"steps": 3, **stage})

    def test_beside_data_that_are_not_streamed(self) -> None:
        with pytest.raises(
            ValueError, match=r"some entries are streamed, b\.jsonl is not; write streaming: true for it"
        ):
            Stage(
                name="s", train={"connector": 1e-3}, steps=3,
                data=[DataSpec(path="a/b", streaming=True), DataSpec(path="b.jsonl")],
            )  # fmt: skip

    def test_an_evaluation_without_a_limit(self) -> None:
        with pytest.raises(ValueError, match="a stream is asked its first so many questions; give it a limit"):
            EvaluateSpec.model_validate({"data": {"path": "a/b", "streaming": True}})
        EvaluateSpec.model_validate({"data": {"path": "a/b", "streaming": True, "limit": 5}})

    def test_epochs_with_a_limit(self, tmp_path: Path) -> None:
        stage = made(text_lines(tmp_path, 10), {"limit": 6}, epochs=2, batch_size=4)
        assert sampler(stage).steps == 3


def made(path: Path, data: dict[str, Any], **stage: Any) -> Stage:
    spec = DataSpec.model_validate(entry(path, **data))
    return Stage(**{"name": "align", "train": {"connector": 1e-3}, "data": [spec], **stage})


class FakeTokenizer:
    pad_token_id = 0


class FakeProcessor:
    tokenizer, image_processor, feature_extractor = FakeTokenizer(), None, None


def sampler(stage: Stage, **options: Any) -> StreamingSampler:
    return StreamingSampler(load_streams(stage, seed=0), stage, FakeProcessor(), seed=0, **options)


def what_is_said(rows: Any) -> list[str]:
    return [c.messages[0].text for row in rows for c in row]


class TestVisits:
    def test_the_next_good_row_stands_in_for_a_bad_one(self, tmp_path: Path) -> None:
        path = text_lines(tmp_path, 12, bad=(2, 3, 9))
        told: list[DataError] = []
        stage = made(path, {"shuffle_window": 1}, steps=3, batch_size=4, bad_samples="skip")
        made_visits = sampler(stage, collate=what_is_said, on_error=told.append)
        assert [made_visits[i] for i in range(3)] == [
            ["0", "1", "4", "4"],
            ["4", "5", "6", "7"],
            ["8", "10", "10", "11"],
        ]
        made_visits.leave_out(made_visits.take_left_out())
        assert [Path(e.where.split(":")[0]).name + ":" + e.where.split(":")[1] for e in told] == [
            f"lines.jsonl:{n}" for n in (3, 4, 10)
        ]
        with refused("json", "lines.jsonl:3", error=DataError):
            sampler(made(path, {"shuffle_window": 1}, steps=3, batch_size=4), collate=what_is_said)[0]

    def test_nothing_but_bad_rows(self, tmp_path: Path) -> None:
        path = text_lines(tmp_path, 40, bad=tuple(range(1, 40)))
        path.write_text(path.read_text().replace('"yes"', '""'))
        stage = made(path, {}, steps=3, bad_samples="skip")
        with refused("bad-samples", "1,000"):
            sampler(stage).drawn(0)

    def test_captions_of_one_picture_are_drawn(self, tmp_path: Path) -> None:
        Image.new("L", (2, 2)).save(tmp_path / "1.png")
        (tmp_path / "c.jsonl").write_text(json.dumps({"image": "1.png", "captions": ["a", "b", "c"]}) + "\n")
        seen = sampler(made(tmp_path / "c.jsonl", {}, steps=9))
        drawn = [[c.answer for c in seen.drawn(v)] for v in range(30)]
        assert {len(d) for d in drawn} == {1}
        assert {d[0] for d in drawn} == {"a", "b", "c"}
        assert drawn == [[c.answer for c in seen.drawn(v)] for v in range(30)]

    @pytest.mark.parametrize("workers", [0, 1, 2])
    @pytest.mark.parametrize("source", ["files", "set"])
    def test_batches_from_workers_and_where_they_left_off(self, tmp_path: Path, workers: int, source: str) -> None:
        path = text_lines(tmp_path, 25) if source == "files" else repository(tmp_path / "set")
        stage = made(path, {}, steps=12, batch_size=4, accumulate=2)

        def words(rows: Any) -> list[str | None]:
            return [c.messages[0].text + str(c.answer) for row in rows for c in row]

        wanted = [sampler(stage, collate=words)[i] for i in range(24)]
        first = sampler(stage, collate=words)
        first.drawn(0)  # a reader is open when the workers are forked
        batches = TimedBatches(loader(first, 0, workers, "cpu"), "cpu")
        assert [next(batches) for _ in range(15)] == wanted[:15]
        then = sampler(stage, collate=words)
        then.load_state_dict(first.state_dict())
        assert max(then.examples.streams[0].marks) >= (1, 1)
        assert list(TimedBatches(loader(then, 15, workers, "cpu"), "cpu")) == wanted[15:]


class TestRuns:
    def test_stopped_and_killed_anywhere_it_is_the_same_run(
        self, make_recipe: Make, train: Train, tmp_path: Path
    ) -> None:
        """Stopped after step 2, then killed between two checkpoints, in the second epoch of the stream."""
        data = [entry(repository(tmp_path / "set"))]
        recipe = make_recipe(data=data, steps=9, save_every=3)
        whole, result = train(recipe, "whole")
        assert result.samples == 36
        train(recipe, "cut", stop_at=2)
        train(recipe, "cut", resume=True, stop_at=7)
        checkpoints = sorted((tmp_path / "cut" / "stages" / "0-align").glob("checkpoint-*"))
        assert [c.name[-1] for c in checkpoints] == ["6", "7"]
        for file in checkpoints[-1].iterdir():  # as if the process had been killed before it was written
            file.unlink()
        checkpoints[-1].rmdir()
        again, _ = train(recipe, "cut", resume=True)
        assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor)

    def test_with_workers_packs_and_another_number_of_them(
        self, make_recipe: Make, train: Train, tmp_path: Path
    ) -> None:
        data = [entry(repository(tmp_path / "set"))]
        options: dict[str, Any] = {"data": data, "steps": 6, "pack": 200, "save_every": 2}
        train(make_recipe(**options), "whole")
        train(make_recipe(**options, workers=2), "cut", stop_at=3)
        train(make_recipe(**options, workers=1), "cut", resume=True)
        assert curve(tmp_path / "cut") == curve(tmp_path / "whole")

    def test_a_damaged_shard_is_left_out_counted_and_named(
        self, make_recipe: Make, train: Train, tmp_path: Path
    ) -> None:
        folder = repository(tmp_path / "set")
        shard = folder / "data" / "train-00001-of-00003.parquet"
        shard.write_bytes(shard.read_bytes()[:-20])
        options = {"data": [entry(folder)], "steps": 6}
        _, result = train(make_recipe(**options, bad_samples={"limit": 1}), "one")
        assert [s.partition("train-")[2].partition(":")[0] for s in result.skipped] == ["00001-of-00003.parquet[0]"]
        with refused("shard", "00001-of-00003.parquet[0]", error=DataError):
            train(make_recipe(**options), "none")
        with refused("bad-samples", "1 samples", "bad_samples", "limit 0"):
            train(make_recipe(**options, bad_samples={"limit": 0}), "too-many")

    def test_the_network_fails_for_good_and_the_run_goes_on_later(
        self, make_recipe: Make, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sampler_module, "CHECKED", 8)  # what is read before the first step
        monkeypatch.setattr(precheck, "FIRST", 8)
        recipe = make_recipe(data=[entry(repository(tmp_path / "set", (150, 150)))], steps=40, save_every=50)
        train(recipe, "whole")
        with monkeypatch.context() as patch:
            whole = hub.batches

            def batches(name: str, start: int) -> Any:
                for first, table in whole(name, start):
                    if first >= 100:
                        raise ConnectionResetError("reset by peer")
                    yield first, table

            patch.setattr(hub, "batches", batches)
            patch.setattr(hub.time, "sleep", lambda _: None)
            with refused("network", "parquet[100]"):
                train(recipe, "cut")
        saved = [c.name for c in (tmp_path / "cut" / "stages" / "0-align").glob("checkpoint-*")]
        assert saved == ["checkpoint-00000025"]
        train(recipe, "cut", resume=True)
        assert curve(tmp_path / "cut") == curve(tmp_path / "whole")

    @pytest.mark.parametrize("change", ["a row", "a shard", "the window"])
    def test_other_data_are_refused(self, make_recipe: Make, train: Train, tmp_path: Path, change: str) -> None:
        folder = repository(tmp_path / "set")
        train(make_recipe(data=[entry(folder)], steps=4), stop_at=2)
        window = 5
        if change == "a shard":
            (folder / "data" / "train-00002-of-00003.parquet").unlink()
        elif change == "a row":
            for file in folder.rglob("*.parquet"):
                file.unlink()
            (folder / "data").rmdir()
            repository(folder, (7, 6, 9))
        else:
            window = 6
        with refused("mismatch", "sha256 was ", " and is "):
            train(make_recipe(data=[entry(folder, shuffle_window=window)], steps=4), resume=True)

    @pytest.mark.slow
    def test_two_processes_are_one(
        self, language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path
    ) -> None:
        recipe = {
            "precision": "fp32",
            "model": {
                "language": {"name": language_folder("llama")},
                "image": {"encoder": {"type": "hf_vision", "name": vision_folder("clip_vision_model")}},
            },
            "stages": [
                {
                    "name": "align", "train": {"connector": 1e-2}, "batch_size": 4, "steps": 8, "save_every": 3,
                    "data": [entry(repository(tmp_path / "set"))],
                }
            ],
        }  # fmt: skip
        curves = []
        for name, processes, hurt in (("one", 1, ""), ("two", 2, ""), ("cut", 2, "0 5 SIGTERM")):
            (tmp_path / name).mkdir()
            for resume in (False, True) if hurt else (False,):
                for ended in worlds.world(
                    processes, worlds.train, recipe, tmp_path / name / "run", resume, "" if resume else hurt,
                    folder=tmp_path / name,
                ):  # fmt: skip
                    assert ended.code == 0, ended.printed[-3000:]
            curves.append(worlds.curve(tmp_path / name / "run"))
        one, two, cut = curves
        assert len(one) == 8
        assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
        for a, b in zip(one, two, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert [line["loss"] for line in cut] == [line["loss"] for line in two]


class TestLookedAt:
    """Without training: what is said of a stream, and what wants more of it than is known."""

    def test_the_plan_looks_at_the_first_rows(self, make_recipe: Make, tmp_path: Path) -> None:
        path = text_lines(tmp_path, 200, bad=(3, 150))
        found = plan.make(make_recipe(data=[entry(path, shuffle_window=1)], steps=6))
        [stage] = found.stages
        assert (stage.data.steps, stage.data.samples, stage.data.bad, stage.epochs) == (6, 0, 1, None)
        assert stage.data.length > 0
        assert "stage align is streamed: only the first rows were looked at" in " ".join(r.text for r in found.remarks)
        [stage] = plan.make(make_recipe(data=[entry(path, limit=90)], steps=None, epochs=2)).stages
        assert stage.data.steps == 45
        [stage] = plan.make(make_recipe(data=[entry(tmp_path / "none.jsonl")])).stages
        assert "no such data file" in stage.data.problem

    def test_data_check_goes_through_all(self, make_recipe: Make, tmp_path: Path) -> None:
        recipe = make_recipe(data=[entry(text_lines(tmp_path, 50, bad=(3, 44)))])
        (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
        done = CliRunner().invoke(app, ["data", "check", str(tmp_path / "recipe.yaml"), "--quick"])
        assert done.exit_code == 3
        assert "50, 48 good and 2 bad" in done.output
        shown = CliRunner().invoke(app, ["data", "show", str(tmp_path / "recipe.yaml")])
        assert shown.exit_code
        assert "give a limit" in str(shown.exception) + shown.output
