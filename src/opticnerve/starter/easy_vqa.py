"""easy-VQA (4,000 + 1,000 drawings with questions, PyPI `easy-vqa`) as captions, questions and conversations.

The package is located by its file list, or fetched, and never imported. Captions are derived from what the questions
and answers of the train split say about a train picture; no caption is made for a test picture, and no picture is
looked at.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
_MARKER = "prepared.json"

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
        return (
            len(self.shapes) > 1
            or len(self.colours) > 1
            or bool(self.shapes & self.not_shapes or self.colours & self.not_colours)
        )

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
            raise OpticNerveError(f"{PACKAGE}: the answers on image {image} contradict each other: {known}")
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
    media = locate()
    folder = folder or cache_dir() / PACKAGE
    paths = {
        "captions": folder / "train" / "captions.jsonl",
        "questions": folder / "train" / "questions.jsonl",
        "conversations": folder / "train" / "conversations.jsonl",
        "preferences": folder / "train" / "preferences.jsonl",
        "test": folder / "test" / "questions.jsonl",
    }
    marker = folder / _MARKER
    version = json.dumps({"layout": _LAYOUT, PACKAGE: QUESTIONS.found_version()})
    if not _written(marker, version) or not all(p.is_file() for p in paths.values()):
        train, test = _load(media, "train"), _load(media, "test")
        _write_lines(paths["captions"], _captions(train))
        _write_lines(paths["questions"], _questions(train, "train"))
        _write_lines(paths["conversations"], _conversations(train, "train"))
        _write_lines(paths["preferences"], _preferences(train, "train"))
        _write_lines(paths["test"], _questions(test, "test"))
        _write(marker, version)  # last: it vouches for the others
    return {**paths, "media": media}


def _captions(train: list[Question]) -> Iterable[dict[str, Any]]:
    for image, facts in sorted(gather(train).items()):
        if (caption := facts.caption) is not None:
            yield {"id": f"{PACKAGE}-train-{image}", "image": _image("train", image), "caption": caption}


def _questions(questions: list[Question], split: str) -> Iterable[dict[str, Any]]:
    for number, (question, answer, image) in enumerate(questions):
        yield {
            "id": f"{PACKAGE}-{split}-q{number}",
            "image": _image(split, image),
            "question": question,
            "answer": answer,
            "type": answer_type(answer),
        }


def _conversations(questions: list[Question], split: str) -> Iterable[dict[str, Any]]:
    by_image: dict[int, list[Question]] = defaultdict(list)
    for entry in questions:
        by_image[entry[2]].append(entry)
    for image, entries in sorted(by_image.items()):
        messages: list[dict[str, Any]] = []
        for question, answer, _ in entries:
            content: list[dict[str, str]] = [] if messages else [{"type": "image", "path": _image(split, image)}]
            messages += [
                {"role": "user", "content": [*content, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        yield {"id": f"{PACKAGE}-{split}-{image}", "messages": messages}


def _preferences(questions: list[Question], split: str) -> Iterable[dict[str, Any]]:
    """The right answer is chosen over another one of its kind: yes over no, circle over triangle."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for _, answer, _ in questions:
        kinds[answer_type(answer)].add(answer)
    for number, (question, answer, image) in enumerate(questions):
        others = sorted(kinds[answer_type(answer)] - {answer})
        yield {
            "id": f"{PACKAGE}-{split}-p{number}",
            "image": _image(split, image),
            "question": question,
            "chosen": answer,
            "rejected": random.Random(number).choice(others),
        }


def _image(split: str, number: int) -> str:
    return f"{split}/images/{number}.png"


def _load(media: Path, split: str) -> list[Question]:
    file = media / split / "questions.json"
    try:
        return [(str(q), str(a), int(i)) for q, a, i in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as e:
        raise OpticNerveError(f"{file} cannot be read: {e}; reinstall {PACKAGE}") from e


def _written(marker: Path, version: str) -> bool:
    return marker.is_file() and marker.read_text(encoding="utf-8") == version


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
