"""The card's section on what a docked language model answers: accuracies, yes or no, captions."""

from __future__ import annotations

from typing import Any

from opticnerve.common.markdown import as_typed, percent, plain, table
from opticnerve.evaluation.metrics import wilson_interval
from opticnerve.runs.folder import RunFolder


def tasks(run: RunFolder) -> str:
    """A table for each kind of score that the run has, and the harnesses that made them."""
    found = run.results.get("tasks") or []
    if not found:
        return f"## Evaluation\n\nNot evaluated yet. Run `opticnerve eval {as_typed(run.path)}`."
    kinds = (_accuracies(found), _yes_no(found), _captions(found))
    harnesses = dict.fromkeys(str(t["harness"]) for t in found if t.get("harness"))
    parts = ["## Evaluation", *(text for text in kinds if text)]
    return "\n\n".join([*parts, f"Scored by {plain('; '.join(harnesses))}. Intervals are Wilson's."])


def _accuracies(found: list[dict[str, Any]]) -> str:
    rows = []
    for t in (t for t in found if "accuracy" in t):
        rows.append([f"**{plain(t['name'])}**", "all", *_score_cells(t)])
        kinds = t.get("by_type") or {}
        if guess := t.get("most_frequent_answer"):
            rows.append(["", f"always “{plain(guess['answer'])}”", *_score_cells(guess)])
        rows += [["", plain(kind), *_score_cells(k)] for kind, k in kinds.items() if len(kinds) > 1]
    return table(["data", "questions", "n", "accuracy", "95 % interval"], rows, right=(2, 3)) if rows else ""


def _yes_no(found: list[dict[str, Any]]) -> str:
    """What an accuracy hides where one answer is given too often."""
    rows = [
        [f"**{plain(t['name'])}**", f"{t['n']:,}", *(_share(t[k]) for k in ("precision", "recall", "f1", "yes_share"))]
        for t in found
        if "yes_share" in t
    ]
    head = ["yes or no", "n", "precision of yes", "recall of yes", "F1", "share of yes"]
    return table(head, rows, right=(1, 2, 3, 4, 5)) if rows else ""


def _captions(found: list[dict[str, Any]]) -> str:
    def score(task: dict[str, Any], key: str) -> str:
        return f"{task[key]:.3f}" if key in task else "–"

    rows = [
        [f"**{plain(t['name'])}**", f"{t['n']:,}", *(score(t, k) for k in ("cider", "bleu4", "rouge_l"))]
        for t in found
        if "cider" in t
    ]
    return table(["captions", "n", "CIDEr", "BLEU-4", "ROUGE-L"], rows, right=(1, 2, 3, 4)) if rows else ""


def _score_cells(entry: dict[str, Any]) -> list[str]:
    n, accuracy = int(entry["n"]), entry.get("accuracy")
    if accuracy is None:
        return [f"{n:,}", "–", "–"]
    low, high = entry.get("ci95") or wilson_interval(accuracy * n, n)
    return [f"{n:,}", percent(accuracy), f"{percent(low)} – {percent(high)}"]


def _share(value: float | None) -> str:
    """A share of nothing, such as the precision of yes where nobody said it, is none."""
    return "–" if value is None else percent(value)
