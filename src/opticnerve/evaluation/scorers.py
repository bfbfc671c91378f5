"""How one answer is scored, by the rules of the benchmarks that made the kind of question known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opticnerve.data.formats.boxes import Numbers, boxes_in
from opticnerve.evaluation.metrics import exact_match, vqa_soft_accuracy
from opticnerve.types import OpticNerveError

PEOPLE = 10  # VQAv2's number of answers to a question; from so many on, agreement is counted softly
_ANLS_LEAST = 0.5
_IOU_LEAST = 0.5
_NEAR = 50  # thousandths of a side


@dataclass(frozen=True)
class Scorer:
    """`score`: an answer's score in [0, 1], given the references. `harness`: what the rule is called, given all
    references. `report`: what is said of all answers together, beside their mean score."""

    score: Callable[[str, Sequence[str]], float]
    harness: Callable[[Sequence[Sequence[str]]], str]
    report: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, Any]] = lambda predictions, references: {}


def vqa(prediction: str, references: Sequence[str]) -> float:
    """VQAv2's soft accuracy where ten people or more have answered, else exact match; normalised as VQAv2 does."""
    if len(references) >= PEOPLE:
        return vqa_soft_accuracy(prediction, references)
    return float(exact_match(prediction, references))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity, for answers that are read off a picture (Biten et al. 2019, "Scene
    text visual question answering", equations 1 and 2): 0 where half of the letters or more are wrong."""
    mine, *others = (" ".join(text.lower().split()) for text in (prediction, *references))
    distance = min((levenshtein(mine, theirs) / max(len(mine), len(theirs), 1) for theirs in others), default=1.0)
    return 1 - distance if distance < _ANLS_LEAST else 0.0


def levenshtein(a: str, b: str) -> int:
    """The fewest letters to insert, delete or replace that make `b` of `a` (Wagner & Fischer 1974)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def says_yes(answer: str) -> bool:
    """What an answer to a yes/no question comes to, by POPE's rule (Li et al. 2023, "Evaluating object hallucination",
    `evaluate.py`): no where the first sentence holds the word no or not, yes otherwise."""
    words = answer.partition(".")[0].replace(",", "").lower().split()
    return not {"no", "not"} & set(words)


def yes_no(prediction: str, references: Sequence[str]) -> float:
    return float(says_yes(prediction) == _truth(references))


def yes_no_report(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall and F1 of yes, and the share of yes: who always says yes has recall 1 and half the precision.

    None where there is nothing to divide by.
    """
    said = [says_yes(p) for p in predictions]
    true = [_truth(r) for r in references]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    precision = hits / sum(said) if any(said) else None
    recall = hits / sum(true) if any(true) else None
    f1 = 2 * hits / (sum(said) + sum(true)) if any(said) or any(true) else None
    return {"precision": precision, "recall": recall, "f1": f1, "yes_share": sum(said) / len(said)}


def _truth(references: Sequence[str]) -> bool:
    answer = references[0].strip().lower().rstrip(".")
    if answer not in ("yes", "no"):
        raise OpticNerveError(
            f"metric yes_no: a reference is {references[0]!r}; give yes or no, or choose metric vqa",
            kind="unknown-name",
        )
    return answer == "yes"


def iou(one: Numbers, other: Numbers) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where one has no inside.

    >>> round(iou((0, 0, 2, 2), (1, 0, 3, 2)), 3)
    0.333
    """
    wide, high = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
    shared = max(0.0, wide) * max(0.0, high)
    areas = sum(max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


def overlaps(prediction: str, references: Sequence[str]) -> list[float]:
    """For each box of the reference the overlap with the box said for it, and 0 for each that was said beside: the
    pairs of largest overlap first, each box once."""
    said, true = (_numbers(text, 4) for text in (prediction, references[0]))
    if not true:
        raise OpticNerveError(f"metric boxes: a reference names no box: {references[0][:80]!r}", kind="missing-field")
    pairs = sorted(((iou(s, t), i, j) for i, s in enumerate(said) for j, t in enumerate(true)), reverse=True)
    found: dict[int, float] = {}
    taken: set[int] = set()
    for overlap, i, j in pairs:
        if i not in taken and j not in found:
            found[j] = overlap
            taken.add(i)
    return [found.get(j, 0.0) for j in range(len(true))] + [0.0] * max(0, len(said) - len(true))


def boxes(prediction: str, references: Sequence[str]) -> float:
    """The share of boxes that overlap by half or more (accuracy at IoU 0.5, as for referring expressions: Kazemzadeh et
    al. 2014; Yu et al. 2016, section 5.1)."""
    found = overlaps(prediction, references)
    return sum(o >= _IOU_LEAST for o in found) / len(found)


def boxes_report(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    each = [overlaps(p, r) for p, r in zip(predictions, references, strict=True)]
    return {"mean_iou": sum(sum(o) / len(o) for o in each) / len(each)}


def points(prediction: str, references: Sequence[str]) -> float:
    """Whether the first point said lies in the reference's box, or, where that is a point, within 50 thousandths."""
    said, box, point = _numbers(prediction, 2), _numbers(references[0], 4), _numbers(references[0], 2)
    if not box and not point:
        raise OpticNerveError(
            f"metric points: a reference names no point and no box: {references[0][:80]!r}", kind="missing-field"
        )
    if not said:
        return 0.0
    x, y = said[0]
    if box:
        return float(box[0][0] <= x <= box[0][2] and box[0][1] <= y <= box[0][3])
    return float(math.dist((x, y), point[0]) <= _NEAR)


def _numbers(words: str, count: int) -> list[Numbers]:
    return [n for n in boxes_in(words) if len(n) == count]


def _vqa_harness(references: Sequence[Sequence[str]]) -> str:
    return "VQA soft accuracy" if any(len(r) >= PEOPLE for r in references) else "exact match"


SCORERS = {
    "vqa": Scorer(vqa, _vqa_harness),
    "yes_no": Scorer(yes_no, lambda _: "yes or no by POPE's rule", yes_no_report),
    "ocr": Scorer(anls, lambda _: "ANLS"),
    "boxes": Scorer(boxes, lambda _: "accuracy at IoU 0.5", boxes_report),
    "points": Scorer(points, lambda _: "points in their boxes"),
}
