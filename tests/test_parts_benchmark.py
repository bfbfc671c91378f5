"""benchmarks/parts.py: every row is a valid change of the starter recipe, and the table goes between its markers alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from opticnerve import recipe as recipes
from opticnerve import registry

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("parts_benchmark", ROOT / "benchmarks" / "parts.py")
assert _spec is not None and _spec.loader is not None
parts: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = parts
_spec.loader.exec_module(parts)


@pytest.mark.parametrize("row", parts.ROWS, ids=lambda r: r.name)
def test_each_row_is_a_recipe(row: Any) -> None:
    recipe = recipes.load(ROOT / "recipes" / f"{row.base}.yaml", row.overrides(parts.BUDGET))
    assert [s.steps for s in recipe.stages] == [parts.BUDGET["align"][0], parts.BUDGET["instruct"][0]]
    assert len(row.change) <= 1, "a row is a change of one line"


def own(known: Any) -> set[str]:
    """The registered names that are opticnerve's, not an installed package's."""
    return {n for n in known.names() if known.get(n).__module__.startswith("opticnerve.")}


def test_every_part_has_a_row() -> None:
    made: list[Any] = []
    for row in parts.ROWS:
        recipe = recipes.load(ROOT / "recipes" / f"{row.base}.yaml", row.overrides(parts.BUDGET))
        made += recipe.model.towers.values()
    # (The vision encoder of a dual encoder is another encoder of these, trained once more. Qwen-VL's towers show pictures
    # in their own shape, and the rows' are all of one shape.)
    assert {m.encoder.type for m in made} | {"dual_encoder", "qwen_vl"} >= own(registry.encoders)
    # (The rows' pictures hold no print.)
    assert {m.connector.type for m in made} | {"text_spotter"} >= own(registry.connectors)
    assert {m.fusion.type for m in made} >= own(registry.fusions)
    assert len({r.name for r in parts.ROWS}) == len(parts.ROWS)


def result(accuracy: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.05], "n": 300, "tokens": 16, "in_text": 16,
        "connector": 1000, "trained": 2000, "seconds": 80.0, "budget": parts.BUDGET, "torch": "2", "transformers": "5",
        "question_alone": {"accuracy": 0.695, "ci95": [0.63, 0.755], "n": 200},
        "most_frequent_answer": {"answer": "yes", "accuracy": 0.38, "ci95": [0.33, 0.44], "n": 300},
        "machine": {"cores": 2, "cpu": "a CPU"}, "threads": 1,
    }  # fmt: skip


def test_the_table_is_written_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "models.md"
    document.write_text(f"before\n{parts.BEGIN}\nold\n{parts.END}\nafter\n")
    for _ in range(2):
        parts.write_table(document, {"whisper": result(0.6), "mlp": result(0.79), "clip": result(0.4)})
        text = document.read_text()
        assert text.startswith(f"before\n{parts.BEGIN}\n") and text.endswith(f"{parts.END}\nafter\n")
        assert "old" not in text
        assert "| always “yes”, the most frequent answer | | 38.0% (33%–44%) |" in text
        assert "no look at the picture | | 69.5% (63%–76%) |" in text
        assert "79.0% (74%–84%) | 16 |" in text
        assert "40.0% (35%–45%) † | 16 |" in text, "a row that the question alone would explain is marked"
        assert "60.0% (55%–65%) †; always “yes” 38.0% (33%–44%), the question alone 69.5% (63%–76%) | 16 |" in text
        assert "*(encoder from scratch)*" in text
    (tmp_path / "none.md").write_text("no markers")
    with pytest.raises(SystemExit, match="wants one"):
        parts.write_table(tmp_path / "none.md", {})


def test_the_document_has_its_place() -> None:
    text = parts.DOCUMENT.read_text(encoding="utf-8")
    assert text.count(parts.BEGIN) == text.count(parts.END) == 1


def test_a_row_that_fails_is_named_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(row: Any, budget: Any) -> dict[str, Any]:
        if row.name == "linear":
            raise ValueError("no such thing")
        return result(0.5)

    monkeypatch.setattr(parts, "run", run)
    monkeypatch.setattr(parts, "WORK", tmp_path)
    kept: list[set[str]] = []
    results: dict[str, Any] = {}
    rows = [r for r in parts.ROWS if r.name in ("linear", "mlp")]
    failed = parts.run_all(rows, parts.BUDGET, results, lambda found: kept.append(set(found)))
    assert failed == ["linear: ValueError: no such thing"]
    assert kept[-1] == {"mlp"}


def test_what_the_questions_alone_give_away() -> None:
    """easy-VQA's questions do: more than two thirds of the test questions are answered without any picture."""
    pytest.importorskip("torch")
    row = next(r for r in parts.ROWS if r.name == "mlp")
    score = parts.question_alone(row, {**parts.BUDGET, "questions": 1000})
    assert score["n"] == 1000
    assert 0.6 < score["accuracy"] < 0.72
    assert parts.blind({"ci95": [0.63, 0.76], "question_alone": score})
    assert not parts.blind({"ci95": [0.75, 0.86], "question_alone": score})
