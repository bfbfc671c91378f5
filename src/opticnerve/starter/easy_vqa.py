"""easy-VQA (4,000 + 1,000 drawings with questions, PyPI `easy-vqa`) as captions, questions and conversations.

The package is located by its file list, or fetched, and never imported. Captions are derived from what the questions
and answers of the train split say about a train picture; no caption is made for a test picture, and no picture is
looked at.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opticnerve.common import atomic
from opticnerve.common.cache import cache_dir
from opticnerve.starter.weights import PackagedFile
from opticnerve.types import OpticNerveError

PACKAGE = "easy-vqa"
QUESTIONS = PackagedFile(
    PACKAGE, "1.0", "train/questions.json", "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5"
)
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_LAYOUT = 2  # raise when the files written below change

_SHAPE = re.compile(rf"\b({'|'.join(SHAPES)})\b")
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)})\b")
_NEGATION = re.compile(r"\b(not|no)\b")

Question = tuple[str, str, int]  # question, answer, image number


@dataclass
class Facts:
    """What the questions and answers on one picture say: what it shows, and what it does not."""

    shapes: set[str] = field(default_factory=set)
    colours: set[str] = field(default_factory=set)
    not_shapes: set[str] = field(default_factory=set)
    not_colours: set[str] = field(default_factory=set)

    @property
    def contradictory(self) -> bool:
        more = len(self.shapes) > 1 or len(self.colours) > 1
        return more or bool(self.shapes & self.not_shapes or self.colours & self.not_colours)

    @property
    def caption(self) -> str | None:
        """`a red circle`, if both the colour and the shape are known."""
        if not self.shapes or not self.colours:
            return None
        return f"a {next(iter(self.colours))} {next(iter(self.shapes))}"


def locate() -> Path:
    """The data folder of the package: `{train,test}/images/N.png` and `{train,test}/questions.json`; fetched once if it
    is not installed.

    Raises:
        OpticNerveError: it cannot be fetched, or holds other questions than the known ones.
    """
    return QUESTIONS.locate().parent.parent


def learn(facts: Facts, question: str, answer: str) -> None:
    """Add to `facts` what one question and its answer say."""
    shape, colour = _SHAPE.search(question), _COLOUR.search(question)
    if answer not in ("yes", "no"):
        # A question such as "what is the blue shape?" affirms the blue.
        facts.shapes.update(s[0] for s in (shape,) if s)
        facts.colours.update(c[0] for c in (colour,) if c)
        (facts.shapes if answer in SHAPES else facts.colours).add(answer)
        return
    there = (answer == "yes") != bool(_NEGATION.search(question))
    if shape:
        (facts.shapes if there else facts.not_shapes).add(shape[0])
    if colour:
        (facts.colours if there else facts.not_colours).add(colour[0])


def gather(questions: Iterable[Question]) -> dict[int, Facts]:
    """The facts on each picture.

    Raises:
        OpticNerveError: answers on one picture contradict each other.
    """
    facts: dict[int, Facts] = defaultdict(Facts)
    for question, answer, image in questions:
        learn(facts[image], question, answer)
    for image, known in facts.items():
        if known.contradictory:
            raise OpticNerveError(
                f"{PACKAGE}: the answers on image {image} contradict each other: {known}", kind="damaged"
            )
    return dict(facts)


def answer_type(answer: str) -> str:
    """`yes/no`, `shape` or `colour`."""
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"


def prepare(folder: Path | None = None) -> dict[str, Path]:
    """Write the data files into `folder` (default: in the cache), unless they are there already.

    Returns:
        `captions` (train/captions.jsonl), `questions` (train/questions.jsonl), `conversations`
        (train/conversations.jsonl: one for each train picture, with all its questions), `preferences`
        (train/preferences.jsonl: each train question with its answer and a wrong one), `test` (test/questions.jsonl),
        and `media`: the package's data folder, from which the pictures' paths start.
    """
    media, folder = locate(), folder or cache_dir() / PACKAGE
    paths = {
        name: folder / "train" / f"{name}.jsonl" for name in ("captions", "questions", "conversations", "preferences")
    }
    paths["test"] = folder / "test" / "questions.jsonl"
    marker, version = folder / "prepared.json", json.dumps({"layout": _LAYOUT, PACKAGE: QUESTIONS.found_version()})
    written = marker.is_file() and marker.read_text(encoding="utf-8") == version
    if not written or not all(p.is_file() for p in paths.values()):
        train, test = _load(media, "train"), _load(media, "test")
        made = (_captions(train), _questions(train, "train"), _conversations(train), _preferences(train))
        for path, rows in zip(paths.values(), (*made, _questions(test, "test")), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_lines(path, rows)
        atomic.write(marker, version)  # last: it vouches for the others
    return {**paths, "media": media}


def _row(kind: str, number: int, image: int, split: str = "train", **keys: Any) -> dict[str, Any]:
    return {"id": f"{PACKAGE}-{split}-{kind}{number}", "image": f"{split}/images/{image}.png", **keys}


def _captions(train: list[Question]) -> Iterable[dict[str, Any]]:
    for image, facts in sorted(gather(train).items()):
        if (caption := facts.caption) is not None:
            yield _row("", image, image, caption=caption)


def _questions(questions: list[Question], split: str) -> Iterable[dict[str, Any]]:
    for number, (question, answer, image) in enumerate(questions):
        yield _row("q", number, image, split, question=question, answer=answer, type=answer_type(answer))


def _conversations(train: list[Question]) -> Iterable[dict[str, Any]]:
    by_image: dict[int, list[Question]] = defaultdict(list)
    for entry in train:
        by_image[entry[2]].append(entry)
    for image, entries in sorted(by_image.items()):
        row = _row("", image, image)
        turns = [turn for question, answer, _ in entries for turn in (("user", question), ("assistant", answer))]
        contents = [[{"type": "text", "text": text}] for _, text in turns]
        contents[0].insert(0, {"type": "image", "path": row["image"]})
        messages = [{"role": role, "content": parts} for (role, _), parts in zip(turns, contents, strict=True)]
        yield {"id": row["id"], "messages": messages}


def _preferences(train: list[Question]) -> Iterable[dict[str, Any]]:
    """The right answer is chosen over another one of its kind: yes over no, circle over triangle."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for _, answer, _ in train:
        kinds[answer_type(answer)].add(answer)
    for number, (question, answer, image) in enumerate(train):
        others = sorted(kinds[answer_type(answer)] - {answer})
        rejected = random.Random(number).choice(others)
        yield _row("p", number, image, question=question, chosen=answer, rejected=rejected)


def _load(media: Path, split: str) -> list[Question]:
    file = media / split / "questions.json"
    try:
        return [(str(q), str(a), int(i)) for q, a, i in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as e:
        raise OpticNerveError(f"{file} cannot be read: {e}; reinstall {PACKAGE}", kind="damaged") from e
