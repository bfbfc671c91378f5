"""Boxes and points: from a record's objects to words in a frame, drawn, and scored."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from errors import refused
from opticnerve.cli.main import app
from opticnerve.data.dataset.load import load_data
from opticnerve.data.formats.boxes import BoxOptions, Located, boxes_in
from opticnerve.data.media.marks import marked
from opticnerve.evaluation.scorers import SCORERS, iou
from opticnerve.recipe import DataSpec, Stage
from opticnerve.recipe.data import BoxSpec
from opticnerve.train.setup import check_boxes
from opticnerve.types import DataError
from opticnerve.ui.chat import ChatState

CUP: dict[str, Any] = {"box": [20, 10, 120, 60], "label": "cup"}
TIP: dict[str, Any] = {"point": [100, 50], "label": "tip"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (200, 100), "white").save(tmp_path / "wide.png")
    turned = Image.new("RGB", (100, 200), "white")  # stored upright-down: 200 x 100 once it is turned
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path


def words(folder: Path, record: dict[str, Any], **options: Any) -> list[str]:
    (folder / "data.jsonl").write_text(json.dumps(record) + "\n")
    options.setdefault("boxes", {})
    [sample] = load_data(DataSpec(path=str(folder / "data.jsonl"), **options))
    return [m.text for m in sample.messages]


def asked(answer: str, objects: Any, image: str = "wide.png", question: str = "where?") -> dict[str, Any]:
    return {"image": image, "question": question, "answer": answer, "objects": objects}


def test_a_question_is_scored_by_its_boxes(folder: Path) -> None:
    """The reference that an evaluation reads is the answer that training learns, not its tag."""
    (folder / "data.jsonl").write_text(json.dumps(asked("<bbox>", [CUP])) + "\n")
    [sample] = load_data(DataSpec(path=str(folder / "data.jsonl"), boxes=BoxSpec()))
    assert sample.meta["answers"] == [sample.answer] == ["[100, 100, 600, 600]"]
    assert SCORERS["boxes"].score("[100, 100, 600, 600]", sample.meta["answers"]) == 1


@pytest.mark.parametrize("image", ["wide.png", "turned.jpg"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "[100, 100, 600, 600]"),
        ({"frame": "pixels"}, "[20, 10, 120, 60]"),
        ({"style": "qwen"}, "<|box_start|>(100,100),(600,600)<|box_end|>"),
        ({"style": "internvl"}, "<box>[[100, 100, 600, 600]]</box>"),
    ],
)
def test_frames_and_styles(folder: Path, image: str, options: dict[str, Any], wanted: str) -> None:
    assert words(folder, asked("<bbox>", [CUP], image), boxes=options)[1] == wanted
    assert boxes_in(wanted) == [(20, 10, 120, 60) if "frame" in options else (100, 100, 600, 600)]


def test_tags_take_labels_and_boxes_in_order(folder: Path) -> None:
    record = asked("the <ref-object> is at <bbox>, the <ref-object> at <bbox>", [CUP, TIP])
    assert words(folder, record)[1] == "the cup is at [100, 100, 600, 600], the tip at [500, 500]"
    assert words(folder, asked("<objects>", [CUP, TIP]))[1] == "cup [100, 100, 600, 600]\ntip [500, 500]"
    # A label in the question, its box in the answer: ms-swift's grounding.
    assert words(folder, asked("<bbox>", [CUP], question="where is the <ref-object>?")) == [
        "where is the cup?", "[100, 100, 600, 600]",
    ]  # fmt: skip


def test_ms_swifts_lists(folder: Path) -> None:
    objects = {"ref": ["cup"], "bbox": [[20, 10, 120, 60], [100, 50]]}
    messages = [
        {"role": "user", "content": "<image>where is the <ref-object>?"}, {"role": "assistant", "content": "<bbox> <bbox>"},
    ]  # fmt: skip
    record = {"messages": messages, "images": ["wide.png"], "objects": objects}
    assert words(folder, record)[1] == "[100, 100, 600, 600] [500, 500]"


def test_a_picture_is_looked_at_once_for_all_its_boxes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []

    def size(source: Any) -> tuple[int, int]:
        looked.append(source)
        return 100, 200

    monkeypatch.setattr("opticnerve.data.formats.boxes.image_size", size)
    words(folder, asked("<objects>", [CUP] * 5))
    looked_once = len(looked)
    words(folder, asked("<objects>", [CUP] * 50))
    assert len(looked) == 2 * looked_once


def test_a_column_writes_all_objects(folder: Path) -> None:
    record = {"image": "wide.png", "objects": [CUP]}
    columns = {"question": "=find all things", "answer": "=<objects>"}
    assert words(folder, record, columns=columns) == ["find all things", "cup [100, 100, 600, 600]"]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (asked("somewhere", [CUP]), "unused-field"),
        (asked("<bbox> <bbox>", [CUP]), "box"),
        (asked("<bbox>", [{**CUP, "image": 1}]), "box"),
        (asked("<bbox>", [{"box": [20, 10, 220, 60]}]), "box"),
        (asked("<bbox>", [{"box": [120, 10, 20, 60]}]), "box"),
        (asked("<bbox>", [{"box": [1, 2, 3]}]), "box"),
        (asked("<bbox>", [{**CUP, **TIP}]), "box"),
        (asked("<bbox>", [{**CUP, "score": 0.5}]), "box"),
        (asked("<bbox>", [{"box": [1, 2, 3, True]}]), "box"),
        (asked("<bbox>", "20 10 120 60"), "box"),
        (asked("<bbox>", {"bbox": [[1, 2, 3, 4]], "bbox_type": "norm1"}), "box"),
        (asked("<bbox>", {"bbox": [[1, 2, 3, 4]], "ref": ["a", "b"]}), "box"),
        (asked("<bbox>", {"bbox": [[1, 2, 3, 4]] * 2, "image_id": [0]}), "box"),
        (asked("<bbox>", {"bbox": [[1, 2, 3, 4]], "image_id": 1}), "box"),
        (asked("<bbox>", {"bbox": [1, 2, 3, 4]}), "box"),
        (asked("<bbox>", [{"point": [10**400, 1]}]), "box"),
    ],
)
def test_what_is_refused(folder: Path, record: dict[str, Any], kind: str) -> None:
    with refused(kind, error=DataError):
        words(folder, record)


def test_without_the_option_they_are_refused_by_name(folder: Path) -> None:
    with refused("unused-field", "objects", "boxes", error=DataError):
        words(folder, asked("<bbox>", [CUP]), boxes=None)
    assert words(folder, asked("here", [CUP]), boxes=None, ignore=["objects"])[1] == "here"


def test_drawing_is_where_the_box_is() -> None:
    white = Image.new("RGB", (200, 100), "white")
    drawn = np.asarray(marked(white, [(100, 100, 600, 600), (900, 500)]))
    changed = np.argwhere((drawn != 255).any(-1))
    assert changed[changed[:, 1] < 150].min(0).tolist() == [10, 20]
    assert changed[changed[:, 1] < 150].max(0).tolist() == [60, 120]
    assert abs(changed[changed[:, 1] > 150].mean(0) - [50, 180]).max() < 1
    assert (np.asarray(white) == 255).all()


def test_overlap() -> None:
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1.0
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == iou((5, 5, 1, 1), (0, 0, 9, 9)) == 0.0


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("[0, 0, 10, 10] [50, 50, 60, 60]", 1.0),
        ("[50, 50, 60, 60] [0, 0, 10, 10]", 1.0),  # in whatever order
        ("[0, 0, 10, 10]", 0.5),
        ("[0, 0, 10, 10] [50, 50, 60, 60] [80, 80, 90, 90]", 2 / 3),  # one too many
        ("[0, 0, 10, 10] [0, 0, 10, 10]", 0.5),  # the same twice
        ("nowhere", 0.0),
    ],
)
def test_scores_of_boxes(said: str, score: float) -> None:
    truth = ["[0, 0, 10, 10] [50, 50, 60, 60]"]
    assert SCORERS["boxes"].score(said, truth) == pytest.approx(score)
    assert SCORERS["boxes"].report([said], [truth])["mean_iou"] == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "truth", "score"),
    [
        ("[5, 5]", "[0, 0, 10, 10]", 1.0),
        ("[15, 5]", "[0, 0, 10, 10]", 0.0),
        ("[500, 500]", "[530, 540]", 1.0),
        ("[500, 500]", "[540, 540]", 0.0),
        ("there", "[0, 0]", 0.0),
    ],
)
def test_scores_of_points(said: str, truth: str, score: float) -> None:
    assert SCORERS["points"].score(said, [truth]) == score


def test_a_reference_without_a_box_is_refused() -> None:
    for name in ("boxes", "points"):
        with refused("missing-field", "a cup"):
            SCORERS[name].score("[1, 2, 3, 4]", ["a cup"])


def test_a_box_at_the_edge_is_whole() -> None:
    assert BoxOptions().written(Located((0, 0, 200, 100)), 100, 200) == "[0, 0, 1000, 1000]"


def test_data_check_draws_what_the_words_say(folder: Path) -> None:
    record = asked("<bbox>", [CUP])
    (folder / "data.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    command = ["data", "check", str(folder / "data.jsonl"), "boxes.style=qwen", "--draw", str(folder / "drawn")]
    result = CliRunner().invoke(app, [*command, "--max-listed", "2"])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (folder / "drawn").iterdir()) == ["0000.png", "0001.png"]
    with Image.open(folder / "drawn" / "0000.png") as drawn:
        assert drawn.size == (200, 100) and drawn.getpixel((20, 30)) != (255, 255, 255)


def test_the_page_shows_the_boxes_of_an_answer(folder: Path) -> None:
    state = ChatState().asked("where?", str(folder / "wide.png"))
    for said, shown in (("over there", 0), ("[100, 100, 600, 600]", 1), ("1, 2", 0)):
        assert len(state.answered(said).bubbles("a picture")) == 3 + shown


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "native"])
def test_a_stage_whose_encoder_is_shown_the_middle_alone_is_refused(fit: str) -> None:
    stage = Stage(name="find", train={"connector": 1e-3}, data=[DataSpec(path="scenes.jsonl", boxes=BoxSpec())])
    model: Any = SimpleNamespace(image=SimpleNamespace(encoder=SimpleNamespace(fit=fit)))
    with refused("conflict", "scenes.jsonl", "crop") if fit == "crop" else nullcontext():
        check_boxes(stage, model)
    check_boxes(stage.model_copy(update={"data": [DataSpec(path="scenes.jsonl")]}), model)
