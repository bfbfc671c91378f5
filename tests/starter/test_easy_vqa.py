"""Captions say what the train answers say, and the test split gives none."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import zipfile
from pathlib import Path

import pytest

from errors import refused
from opticnerve.starter import easy_vqa, weights
from opticnerve.starter.easy_vqa import Facts, gather, learn, prepare
from opticnerve.types import OpticNerveError


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what shape is in the image?", "circle", Facts(shapes={"circle"})),
        ("what is the blue shape?", "circle", Facts(shapes={"circle"}, colours={"blue"})),
        ("what color is the triangle?", "teal", Facts(shapes={"triangle"}, colours={"teal"})),
        ("what is the color of the shape?", "red", Facts(colours={"red"})),
        ("is there a red shape?", "yes", Facts(colours={"red"})),
        ("is there a red shape?", "no", Facts(not_colours={"red"})),
        ("is there not a circle?", "no", Facts(shapes={"circle"})),
        ("is there not a circle?", "yes", Facts(not_shapes={"circle"})),
        ("is no teal shape present?", "no", Facts(colours={"teal"})),
        ("is no rectangle present?", "yes", Facts(not_shapes={"rectangle"})),
        ("does the image not contain a gray shape?", "no", Facts(colours={"gray"})),
    ],
)
def test_what_an_answer_says(question: str, answer: str, expected: Facts) -> None:
    facts = Facts()
    learn(facts, question, answer)
    assert facts == expected


def test_a_caption_needs_both_and_denials_do_not_make_one() -> None:
    assert Facts(shapes={"circle"}).caption is None
    assert Facts(colours={"red"}, not_shapes={"circle", "triangle"}).caption is None
    assert Facts(shapes={"circle"}, colours={"red"}).caption == "a red circle"


@pytest.mark.parametrize(
    "answers",
    [
        [("is there a circle?", "yes"), ("what shape is present?", "triangle")],
        [("is there a circle?", "yes"), ("is there not a circle?", "yes")],
        [("is there a red shape?", "yes"), ("is there a red shape in the image?", "no")],
        [("what color is the shape?", "red"), ("is no red shape present?", "yes")],
    ],
)
def test_contradictions_are_refused(answers: list[tuple[str, str]]) -> None:
    with refused("damaged", "image 5"):
        gather([(q, a, 5) for q, a in answers])


def test_an_absent_package_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    def download(requirement: str, into: Path) -> None:
        assert requirement == "easy-vqa==1.0"
        with zipfile.ZipFile(into / "easy_vqa-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("easy_vqa/data/test/questions.json", "[]")
            wheel.writestr("easy_vqa/data/train/questions.json", json.dumps("known"))

    monkeypatch.setattr(importlib.metadata, "files", absent)
    monkeypatch.setattr(weights, "_download", download)
    monkeypatch.setenv("OPTICNERVE_CACHE", str(tmp_path))
    with refused("mismatch", "SHA-256"):
        easy_vqa.locate()
    known = hashlib.sha256(json.dumps("known").encode()).hexdigest()
    monkeypatch.setattr(easy_vqa, "QUESTIONS", dataclasses.replace(easy_vqa.QUESTIONS, sha256=known))
    assert (easy_vqa.locate() / "test" / "questions.json").is_file()
    assert easy_vqa.QUESTIONS.found_version() == "1.0"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        easy_vqa.locate()
    except OpticNerveError as e:
        pytest.skip(str(e))
    return prepare(tmp_path_factory.mktemp("easy-vqa"))


def test_the_package_is_not_imported(prepared: dict[str, Path]) -> None:
    import sys

    assert "easy_vqa" not in sys.modules


def test_counts_and_types(prepared: dict[str, Path]) -> None:
    train, test = rows(prepared["questions"]), rows(prepared["test"])
    assert (len(train), len(test)) == (38_575, 9_673)
    assert {r["type"] for r in train} == {"shape", "colour", "yes/no"}
    assert sum(r["type"] == "yes/no" for r in test) == 7_136  # the package's own count
    assert all((prepared["media"] / str(r["image"])).is_file() for r in test[::50])
    assert len({r["id"] for r in train}) == len(train)


def test_captions_are_of_train_pictures_and_agree_with_every_direct_answer(prepared: dict[str, Path]) -> None:
    captions = {str(r["image"]): str(r["caption"]) for r in rows(prepared["captions"])}
    assert len(captions) == 3_542
    assert all(image.startswith("train/") for image in captions)
    for question in rows(prepared["questions"]):
        caption = captions.get(str(question["image"]))
        if caption is not None and question["type"] != "yes/no":
            assert str(question["answer"]) in caption.split()


def test_captions_show_in_the_pictures(prepared: dict[str, Path]) -> None:
    """The pixels, which the captions were not made from, bear them out: the colour that differs from the ground."""
    import numpy as np
    import PIL.Image

    for entry in rows(prepared["captions"])[::300]:
        pixels = np.asarray(PIL.Image.open(prepared["media"] / str(entry["image"])).convert("RGB")).reshape(-1, 3)
        darkest = pixels[pixels.astype(int).min(axis=1) < 200].astype(int)
        r, g, b = np.median(darkest, axis=0)
        ratio = {
            "red": r > 150 and g < 60 and b < 60,
            "green": g > 150 and r < 60,
            "blue": b > 150 and r < 60,
            "black": r < 40 and g < 40 and b < 40,
            "gray": abs(r - g) < 10 and abs(g - b) < 10 and 90 < r < 170,
            "teal": r < 40 and 90 < g < 170 and 90 < b < 170,
            "brown": 130 < r < 190 and g < 90 and b < 90,
            "yellow": r > 200 and g > 200 and b < 60,
        }
        assert ratio[str(entry["caption"]).split()[1]], entry


def test_conversations_hold_every_question_once_and_one_picture(prepared: dict[str, Path]) -> None:
    talks = rows(prepared["conversations"])
    assert len(talks) == 4_000
    assert sum(len(t["messages"]) for t in talks) == 2 * 38_575  # type: ignore[misc]
    first = talks[0]["messages"]
    assert [p["type"] for p in first[0]["content"]] == ["image", "text"]  # type: ignore[index]
    assert all(len(m["content"]) == 1 for m in first[1:])  # type: ignore[index]


def test_a_second_call_writes_nothing_and_a_stale_marker_everything(prepared: dict[str, Path]) -> None:
    folder = prepared["captions"].parent.parent
    prepared["captions"].write_text("mine")
    assert prepare(folder) == prepared
    assert prepared["captions"].read_text() == "mine"
    (folder / "prepared.json").write_text("{}")
    prepare(folder)
    assert len(rows(prepared["captions"])) == 3_542
    assert not list(folder.rglob(".*"))
