"""The rules by which answers are scored, against figures worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny
from errors import refused
from opticnerve.cli.main import app
from opticnerve.data.dataset.read import read
from opticnerve.evaluation.choice import run_multiple_choice
from opticnerve.evaluation.evaluate import read_suite, run_suite
from opticnerve.evaluation.metrics import rouge_l
from opticnerve.evaluation.scorers import SCORERS, anls, levenshtein, says_yes, yes_no_report
from opticnerve.evaluation.tasks import run_vqa
from opticnerve.inference.likelihood import answer_scores
from opticnerve.models.vlm.build import Dock
from opticnerve.types import DataError, OpticNerveError, ask


def test_anls_is_the_papers() -> None:
    assert anls("Kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("abcd", ["abxy"]) == 0.0  # half of the letters are wrong
    assert anls(" STOP  sign", ["no", "stop sign"]) == 1.0
    assert anls("", [""]) == 1.0


@given(st.text(max_size=12), st.text(max_size=12))
def test_levenshtein_is_a_distance(a: str, b: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes", True), ("No, there is no dog.", False), ("There is not. Yes", False), ("a dog", True), ("nothing", True)],
)
def test_yes_and_no_by_popes_rule(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_who_always_says_yes_is_found_out() -> None:
    references = [["yes"], ["no"], ["no"], ["yes"]]
    always = yes_no_report(["yes"] * 4, references)
    assert always == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "yes_share": 1.0}
    assert yes_no_report(["no"] * 4, references) == {"precision": None, "recall": 0.0, "f1": 0.0, "yes_share": 0.0}
    asked = [ask("is it?", tiny.picture(0), answer=r[0]) for r in references]
    found = run_vqa(lambda prompts: ["yes"] * len(prompts), asked, name="pope", scorer=SCORERS["yes_no"])
    assert found["accuracy"] == 0.5
    assert found["recall"] == 1.0
    assert "POPE" in found["harness"]
    with refused("unknown-name", "yes_no", "'maybe'"):
        run_vqa(lambda p: ["yes"], [ask("?", tiny.picture(0), answer="maybe")], name="x", scorer=SCORERS["yes_no"])


def test_rouge_is_the_longest_common_subsequence() -> None:
    precision, recall = 2 / 3, 2 / 4  # "a … dog" of "a brown dog" and "a dog runs fast"
    beta = 1.2**2
    expected = (1 + beta) * precision * recall / (recall + beta * precision)
    assert rouge_l(["a brown dog"], [["A dog runs fast."]]) == pytest.approx(expected)
    assert rouge_l(["a dog"], [["a dog"]]) == pytest.approx(1.0)


def test_the_likeliest_choice_wins(docked: Callable[..., Dock], tmp_path: Path) -> None:
    dock = docked("llama")
    tiny.picture(0).save(tmp_path / "0.png")
    choices = ["a red circle", "yes", "the fox"]
    question = ask("what?", tmp_path / "0.png", answer="yes")
    scores = answer_scores(dock.model, dock.processor, question, choices)
    best = choices[scores.index(max(scores))]
    rows = [
        {"image": "0.png", "question": "what?", "choices": choices, "answer": best},
        {"image": "0.png", "question": "what?", "choices": choices, "answer": choices.index(best)},
        {"image": "0.png", "question": "what?", "choices": choices, "answer": next(c for c in choices if c != best)},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = list(read(tmp_path / "q.jsonl"))
    assert asked[0].answer == asked[1].answer == best
    found = run_multiple_choice(dock.model, dock.processor, asked, name="mc")
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["chance"] == pytest.approx(1 / 3)
    with refused("choices", "0 choices", error=DataError):
        run_multiple_choice(dock.model, dock.processor, [question], name="mc")


@pytest.mark.parametrize("answer", ["a whale", 3, True])
def test_an_answer_that_is_no_choice_is_refused(answer: Any, tmp_path: Path) -> None:
    tiny.picture(0).save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "what?", "choices": ["a", "b"], "answer": answer}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    with refused("choices", "2 choices", "q.jsonl:1", error=DataError):
        list(read(tmp_path / "q.jsonl"))


def suite_file(folder: Path, **more: Any) -> Path:
    tiny.picture(0).save(folder / "0.png")
    (folder / "q.jsonl").write_text(
        "".join(json.dumps({"image": "0.png", "question": "is it?", "answer": a}) + "\n" for a in ("yes", "no"))
    )
    data = {"path": str(folder / "q.jsonl")}
    tasks = [
        {"name": "exact", "data": data, "image_dependence": 0, "max_new_tokens": 2},
        {"name": "pope", "metric": "yes_no", "data": data, "max_new_tokens": 2},
        {"name": "choices", "metric": "multiple_choice", "data": data},
    ]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"evaluate": tasks, **more}))
    return folder / "suite.yaml"


def test_a_suite_makes_one_table_and_outlives_failures(docked: Callable[..., Dock], tmp_path: Path) -> None:
    dock = docked("llama")

    def load(name: str, **_: Any) -> tuple[Any, Any]:
        if name == "lost":
            raise OpticNerveError("there is no model folder 'lost'")
        return dock.model, dock.processor

    suite = read_suite(suite_file(tmp_path, models=["lost", "tiny"]))
    found = run_suite(suite, ["tiny"], tmp_path / "scores.json", load=load)
    assert list(found["models"]) == ["tiny", "lost"]
    assert found["failed"] == 4  # multiple choice has no choices; "lost" lacks all three
    table = (tmp_path / "scores.md").read_text()
    assert "| task | scored by | tiny | lost |" in table
    assert "by POPE's rule" in table
    assert "choices failed: " in table
    assert "lost failed: there is no model folder" in table
    assert json.loads((tmp_path / "scores.json").read_text())["models"]["tiny"]["tasks"][0]["n"] == 2


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("evaluate: []", "recipe", "evaluate: "),
        ("tasks: []", "recipe", "tasks: "),
        ("{", "damaged", "line 1"),
        ("evaluate: [{name: x}]", "recipe", "evaluate.0.data: "),
    ],
)
def test_a_bad_suite_is_refused(text: str, kind: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    with refused(kind, tmp_path / "suite.yaml", says):
        read_suite(tmp_path / "suite.yaml")


def test_the_command_wants_one_source_of_questions(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["eval", "--suite", str(suite_file(tmp_path)), "--data", "x"])
    assert found.exit_code == 1
    found = CliRunner().invoke(app, ["eval", "--suite", str(suite_file(tmp_path))])
    assert found.exit_code == 1
    assert "no model" in found.output
