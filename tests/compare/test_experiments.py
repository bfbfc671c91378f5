"""The three experiments: their recipes, what they refuse, and their way from rows to a report."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretended import pretend

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.compare import base as bases
from opticnerve.compare import connectors, fusion, rows, stages
from opticnerve.compare.base import Base
from opticnerve.compare.experiment import choose, run, stretched
from opticnerve.starter.demo import recipe_path
from opticnerve.types import OpticNerveError

EXPERIMENTS = {
    n: importlib.import_module(f"opticnerve.compare.{n}").EXPERIMENT for n in ("fusion", "connectors", "stages")
}


@pytest.fixture
def raw(
    tmp_path: Path, language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Path
) -> dict[str, Any]:
    """A recipe of tiny parts with everything that an experiment wants."""
    captions, questions = tiny.save_captions(tmp_path / "data"), tiny.save_questions(tmp_path / "data")
    asked = {"path": str(questions)}
    return {
        "name": "tiny", "precision": "fp32",
        "model": {
            "language": {"name": language_folder()},
            "image": {"encoder": {"type": "hf_vision", "name": vision_folder()}},
        },
        "stages": [
            {"name": "align", "train": {"connector": 1e-3}, "data": [{"path": str(captions)}], "template": "caption", "steps": 1},
            {"name": "instruct", "train": {"connector": 1e-3, "language.lora": 1e-3}, "lora": {"rank": 2},
             "data": [asked | {"share_prefix": True, "per_image": 2}], "steps": 1},
        ],
        "evaluate": [{"data": asked}],
    }  # fmt: skip


@pytest.fixture
def base(raw: dict[str, Any]) -> Base:
    return Base(recipes.load(raw), name="tiny.yaml")


@pytest.fixture(scope="module")
def starter() -> Base:
    return Base(recipes.load(recipe_path("starter")), name="starter")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_of_the_starter_is_a_valid_recipe(name: str, starter: Base) -> None:
    experiment = EXPERIMENTS[name]
    for budget in (experiment.budget, experiment.quick):
        made = experiment.rows(starter, budget)
        assert len({r.name for r in made}) == len(made)
        systems = [s for r in made for s in r.systems]
        assert len(set(systems)) == len(systems)
        asked = set()
        for row in made:
            for ask in row.asks:
                asked.add(json.dumps(ask["questions"], sort_keys=True))
            if row.recipe is not None:
                read = recipes.load(row.recipe)
                asked |= {json.dumps(e.model_dump(mode="json"), sort_keys=True) for e in read.evaluate}
        assert len(asked) == 1, "all rows are asked the same questions"


def test_the_three_timings_differ_in_when_alone(starter: Base) -> None:
    made = {r.name: r.recipe for r in fusion.rows(starter, fusion.BUDGET)}
    early, middle, late = (made[t] for t in fusion.TIMINGS)
    assert early is not None
    assert middle is not None
    assert late is not None
    assert [r["model"]["timing"] for r in (early, middle, late)] == ["early", "intermediate", "late"]
    assert early["model"]["image"] is None
    assert middle["model"]["image"] == late["model"]["image"]
    assert [r["stages"][0]["cache_features"] for r in (early, middle, late)] == [False, True, True]
    splice, cross = made["vlm-splice"], made["vlm-cross-attention"]
    assert splice is not None
    assert cross is not None
    assert splice["model"]["image"]["fusion"]["type"] == "splice"
    assert cross["model"]["image"]["fusion"] == {"type": "cross_attention", "every": 5}
    assert all(s["train"]["fusion"] == 2.0e-3 for s in cross["stages"])


def test_classifiers_of_the_second_budget_see_as_many_questions(starter: Base) -> None:
    made = {r.name: r.recipe for r in fusion.rows(starter, fusion.BUDGET)}
    seen = starter.questions_in(fusion.BUDGET["instruct"]["steps"], fusion.BUDGET["instruct"]["batch"])
    assert 2.5 < seen / (fusion.BUDGET["instruct"]["steps"] * fusion.BUDGET["instruct"]["batch"]) <= 4
    for timing in fusion.TIMINGS:
        recipe = made["same-" + timing]
        assert recipe is not None
        stage = recipe["stages"][0]
        assert not any(d["share_prefix"] for d in stage["data"])
        assert 0 <= stage["steps"] * stage["batch_size"] - seen < stage["batch_size"]


def test_rows_without_a_first_stage_read_as_many_tokens(base: Base) -> None:
    from opticnerve.plan import data as plan_data
    from opticnerve.plan import model as plan_model

    budget = stages.BUDGET
    processor = plan_model.processor_for(base.recipe)
    read = {}
    for row in stages.rows(base, budget):
        assert row.recipe is not None
        recipe = recipes.load(row.recipe)
        read[row.name] = sum(
            plan_data.inspect_data(s, processor, seed=0).length * s.batch_size * (s.steps or 0) for s in recipe.stages
        )
    assert max(read.values()) / min(read.values()) < 1.02


def test_what_opens_in_each_way_of_staging(starter: Base) -> None:
    made = {r.name: r.recipe for r in stages.rows(starter, stages.BUDGET)}
    opens = {n: [set(s["train"]) for s in r["stages"]] for n, r in made.items() if r is not None}
    assert opens["align-instruct"] == [{"connector"}, {"connector", "language.lora"}]
    assert opens["instruct-only"] == [{"connector", "language.lora"}]
    assert opens["at-once"] == [{"encoder", "connector", "language"}]
    assert opens["connector-only"] == [{"connector"}, {"connector"}]
    assert opens["align-instruct-full"] == [{"connector"}, {"connector", "language"}]
    when = {n: r["stages"][-1]["lora"]["when"] for n, r in made.items() if r is not None and r["stages"][-1]["lora"]}
    assert when == {"align-instruct": "always", "align-instruct-aside": "media", "instruct-only": "always"}


def test_connectors_change_one_thing(starter: Base) -> None:
    made = {r.name: r.recipe for r in connectors.rows(starter, connectors.BUDGET)}
    assert list(made) == list(connectors.CONNECTORS)
    first = made["mlp"]
    assert first is not None
    for name, recipe in made.items():
        assert recipe is not None
        image = recipe["model"]["image"]
        changed = {k for k in image if image[k] != first["model"]["image"][k]}
        assert changed <= {"connector", "fusion", "encoder"}
        assert len(changed) == (name != "mlp")
        assert all(s["cache_features"] == (name != "patches") for s in recipe["stages"])


def test_tiles_are_not_cached(raw: dict[str, Any]) -> None:
    tiled = raw | {"model": raw["model"] | {"image": raw["model"]["image"] | {"tiling": {"type": "anyres"}}}}
    made = connectors.rows(Base(recipes.load(tiled)), connectors.BUDGET)
    assert not any(s["cache_features"] for r in made if r.recipe for s in r.recipe["stages"])


def change(raw: dict[str, Any], key: str) -> dict[str, Any]:
    if key == "stages":
        return raw | {"stages": raw["stages"][1:]}
    if key == "evaluate":
        return raw | {"evaluate": []}
    if key == "image":
        audio = {"encoder": {"type": "whisper", "name": "x"}}
        return raw | {"model": {"language": raw["model"]["language"], "audio": audio},
                      "stages": [s | {"train": {"connector": 1e-3}, "lora": None} for s in raw["stages"]]}  # fmt: skip
    dual = {"image": {"encoder": raw["model"]["image"]["encoder"]}, "text": {"encoder": {"name": "x"}}}
    stage = {"name": "s", "objective": "contrastive", "train": {"temperature": 1e-3}, "data": raw["stages"][0]["data"]}
    return raw | {"model": dual, "stages": [stage], "evaluate": []}


@pytest.mark.parametrize(
    ("key", "kind", "facts"),
    [
        ("stages", "out-of-range", ["1 stage(s)", "at least two"]),
        ("evaluate", "missing-field", ["evaluate:", "metric: vqa"]),
        ("image", "unsupported", ["audio", "model.image"]),
        ("dual", "unsupported", ["a dual encoder", "docked language model"]),
    ],
)
def test_what_a_base_lacks_is_said(raw: dict[str, Any], key: str, kind: str, facts: list[str]) -> None:
    with refused(kind, "mine.yaml", *facts):
        Base(recipes.load(change(raw, key)), name="mine.yaml")


def test_open_answers_are_no_closed_set(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base.answers == ["no", "red", "yes"]
    monkeypatch.setattr(bases, "MOST_ANSWERS", 2)
    with refused("unsupported", "tiny.yaml", "stage instruct", "3 different answers"):
        fusion.rows(Base(base.recipe, name="tiny.yaml"), fusion.QUICK)


def test_the_words_alone(base: Base) -> None:
    """Each of three questions has four pictures and answers in turn: the most frequent is right on two of four."""
    assert np.mean(base.question_alone(None)) == pytest.approx(0.5)


def test_scale_stretches_steps_and_nothing_else() -> None:
    assert stretched({"seeds": 2, "a": {"steps": 10, "batch": 4}}, 0.25) == {"seeds": 2, "a": {"steps": 2, "batch": 4}}
    assert stretched({"a": {"steps": 1}}, 0.01) == {"a": {"steps": 1}}
    with refused("out-of-range", "above 0"):
        stretched({}, 0)


def test_rows_bring_what_they_need(starter: Base) -> None:
    made = fusion.rows(starter, fusion.QUICK)
    assert [r.name for r in choose(made, ["ensemble"])] == ["vlm-splice", "intermediate", "ensemble"]
    assert choose(made, None) == made
    with refused("unknown-name", "medium", "vlm-splice"):
        choose(made, ["medium"])


# -- from rows to a report --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_ends_in_a_report(
    name: str, base: Base, performed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Base, "question_alone", lambda self, count: [float(i % 3 == 0) for i in range(40)])
    done = run(EXPERIMENTS[name], base, tmp_path / "out", seeds=2, quick=True, command=f"opticnerve compare {name}")
    assert done.failures == []
    assert done.report == tmp_path / "out" / "report" / "report.md"
    text = done.report.read_text()
    for heading in ("What this shows", "What it does not show", "How it was made", "**Budget.**"):
        assert heading in text
    assert f"`opticnerve compare {name}`" in text
    for link in {part.split(")")[0] for part in text.split("](")[1:]}:
        assert (done.report.parent / link).stat().st_size > 0
    lines = (done.report.parent / "results.csv").read_text().splitlines()
    systems = [s for r in EXPERIMENTS[name].rows(base, EXPERIMENTS[name].quick) for s in r.systems]
    groups = 3 + (2 if name == "fusion" else 0)  # all, yes/no, shape; needs both, words mislead
    assert len(lines) == 1 + len(systems) * 2 * groups

    again = run(EXPERIMENTS[name], base, tmp_path / "out", seeds=2, quick=True)
    assert all(o.kept for o in again.outcomes)


def test_rows_run_alone_are_reported_with_those_that_are_there(
    base: Base, performed: list[dict[str, Any]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quick": True}
    run(connectors.EXPERIMENT, base, tmp_path, only=["mlp"], **options)
    done = run(connectors.EXPERIMENT, base, tmp_path, only=["qformer"], **options)
    assert [o.row.name for o in done.outcomes] == ["mlp", "qformer"]
    assert done.report is not None
    assert "mlp, 2 layers" in done.report.read_text()


def test_a_failed_row_is_in_the_report(base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def perform(spec: dict[str, Any]) -> dict[str, Any]:
        if spec["systems"] == ["qformer"]:
            raise OpticNerveError("too many | queries")
        return pretend(spec)

    monkeypatch.setattr(rows, "_here", perform)
    done = run(connectors.EXPERIMENT, base, tmp_path, quick=True)
    assert [o.row.name for o in done.failures] == ["qformer"]
    assert done.report is not None
    assert "- `qformer`, seed 0: too many \\| queries" in done.report.read_text()


def test_nothing_finished_is_no_report(base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def perform(spec: dict[str, Any]) -> dict[str, Any]:
        raise OpticNerveError("no")

    monkeypatch.setattr(rows, "_here", perform)
    assert run(connectors.EXPERIMENT, base, tmp_path, quick=True).report is None


def test_intermediate_ahead_is_said_when_it_is(base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The words answer the first 20 of 40, the picture the 10th to the 30th; intermediate fusion alone the last ten."""

    def right(system: str, seed: int, question: int) -> float:
        known = {"intermediate": range(40), "question-alone": range(20), "picture-alone": range(10, 30)}
        return float(question in known.get(system.removeprefix("same-"), range(30)))

    monkeypatch.setattr(rows, "_here", lambda spec: pretend(spec, right))
    monkeypatch.setattr(Base, "question_alone", lambda self, count: [float(i < 30) for i in range(40)])
    done = run(fusion.EXPERIMENT, base, tmp_path, quick=True)
    assert done.report is not None
    text = done.report.read_text()
    assert "10 of 40 questions (25%) are answered by neither branch alone" in text
    assert "Intermediate fusion is ahead of early fusion, at about equal seconds, needs both: +100.0 points" in text
    assert "The VLM by splice is behind intermediate fusion, all questions" in text


def test_a_training_that_diverged_counts_as_a_failure_to_converge(
    base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def perform(spec: dict[str, Any]) -> dict[str, Any]:
        found = pretend(spec)
        if spec["systems"] == ["at-once"] and spec["recipe"]["seed"] == 1:
            return {"systems": {}, "facts": {"machine": {}}, "diverged": "step 3: the loss is nan"}
        return found

    monkeypatch.setattr(rows, "in_process", perform)
    done = run(stages.EXPERIMENT, base, tmp_path, quick=True, seeds=2)
    assert done.failures == []
    assert done.report is not None
    text = done.report.read_text()
    assert "1 of 2: step 3: the loss is nan" in text
    assert "Failed trainings: “everything at once, all weights” 1, of 12 in all" in text


def test_where_nothing_is_forgotten_no_saying_is_proved(
    base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def perform(spec: dict[str, Any], after: float) -> dict[str, Any]:
        found = pretend(spec)
        first = spec["systems"] == ["align-instruct"]
        found["facts"]["forgetting"][-1]["perplexity"] = after * (0.9 if first else 1.0)
        return found

    for after, words in (
        (30.0, "cannot be seen, for neither forgets, here"),
        (40.0, "holds in all 1 × 1 pairs of trainings"),
    ):
        monkeypatch.setattr(rows, "in_process", lambda spec, after=after: perform(spec, after))
        done = run(stages.EXPERIMENT, base, tmp_path / str(after), quick=True)
        assert done.report is not None
        assert f"That aligning the connector first protects the language model {words}" in done.report.read_text()


def test_a_saying_holds_only_where_all_seeds_agree() -> None:
    assert stages.holds([1.0] * 4, [1.2] * 4) == "holds"
    assert stages.holds([1.2] * 4, [1.0] * 4) == "does not hold"
    assert stages.holds([1.0, 1.25], [1.2, 1.3]) == "is not decided"
    assert stages.holds([1.0, 1.1], [1.2, 1.3]).startswith("holds in all 2 × 2 pairs of trainings, too few")


def test_a_row_that_asks_others_is_void_with_their_recipes(starter: Base) -> None:
    def ensemble(scale: float) -> str:
        [row] = [r for r in fusion.rows(starter, stretched(fusion.BUDGET, scale)) if r.name == "ensemble"]
        return rows.identity(row, 0)

    assert ensemble(1) == ensemble(1)
    assert ensemble(1) != ensemble(3)


def test_one_diverged_training_is_one_failure(base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Its loss rises before it is no number: counted once, and no curve of the plot or the table.

    def perform(spec: dict[str, Any]) -> dict[str, Any]:
        found = pretend(spec)
        if spec["systems"] != ["align-instruct"] or spec["recipe"]["seed"] != 1:
            return found
        folder = Path(spec["folder"]) / "stages"
        shutil.rmtree(folder / "1-instruct")
        lines = [{"step": s, "loss": 0.001 * s, "tokens": 50} for s in range(1, 9)]
        (folder / "0-align" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"systems": {}, "facts": {"machine": {}}, "diverged": "step 9: the loss is nan"}

    monkeypatch.setattr(rows, "in_process", perform)
    done = run(stages.EXPERIMENT, base, tmp_path, quick=True, seeds=2)
    assert done.report is not None
    text = done.report.read_text()
    assert "Failed trainings: “align → instruct, LoRA” 1, of 12 in all" in text
    assert "1 of 2: step 9: the loss is nan" in text
    assert "steps to 0.0" not in text  # the captions' loss sets no mark for questions


@pytest.mark.slow
def test_one_row_for_real(base: Base, tmp_path: Path) -> None:
    """Tiny parts, one step: the way through the pipeline, in this process."""
    done = run(connectors.EXPERIMENT, base, tmp_path, only=["linear"], quick=True)
    assert done.failures == []
    [outcome] = done.outcomes
    assert outcome.record is not None
    facts = outcome.record["facts"]
    assert facts["visual_tokens"] == 16
    assert facts["between_parameters"] == 24 * 32 + 32
    assert facts["optimizer_bytes"] == 8 * facts["trained"]  # float32 weights are their own masters
    assert len((outcome.folder / "answers" / "questions.jsonl").read_text().splitlines()) == 12
