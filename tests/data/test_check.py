"""`check` goes through everything, raises for nothing, and counts right."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from rich.console import Console

from opticnerve.data.check import check
from opticnerve.data.readers import DataSource
from opticnerve.types import Conversation, DataError, OpticNerveError, ask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "copy.png")
    PIL.Image.new("RGB", (4, 4), "blue").save(tmp_path / "blue.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:50])
    return tmp_path


def write(folder: Path, *rows: dict[str, Any] | str) -> DataSource:
    path = folder / "d.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return DataSource(path)


def rendered(report: Any, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    report.render(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(image: str, caption: str = "a red square") -> dict[str, Any]:
    return {"image": image, "caption": caption}


def test_everything_is_counted_and_nothing_raises(folder: Path) -> None:
    source = write(
        folder, row("red.png"), "{", row("broken.png"), row("no.png"), row("broken.png", "x"), row("blue.png")
    )
    seen: list[int] = []
    report = check([source, DataSource(folder / "missing.jsonl")], on_progress=seen.append)
    assert (report.samples, report.good, report.bad, report.ok) == (7, 2, 5, False)
    counts = {kind: listed.count for kind, listed in report.kinds.items()}
    assert counts == {"json": 1, "unreadable-image": 2, "missing-image": 1, "missing-file": 1}
    assert [w.split(":")[-1] for w, _ in report.kinds["unreadable-image"].examples] == ["3", "5"]
    assert (report.turns, report.images, report.distinct_images) == (2, 2, 2)
    assert seen == list(range(1, 8))
    text = rendered(report)
    assert "d.jsonl:3: " in text and "broken.png" in text and "5 of 7 samples" in text


def test_a_clean_set_is_ok(folder: Path) -> None:
    report = check([write(folder, row("red.png"), row("blue.png", "blue"))])
    assert report.ok and "Ready to train" in rendered(report)
    assert report.to_dict()["answer_words"] == {"min": 1, "median": 1, "mean": 2.0, "p95": 3, "max": 3}


def test_duplicates_are_found_by_content_and_do_not_block(folder: Path) -> None:
    source = write(folder, row("red.png"), row("copy.png"), row("red.png", "other"), row("blue.png"))
    report = check([source])
    assert report.ok and report.duplicates.count == 1
    assert report.duplicates.examples[0][0].endswith(":2") and ":1" in report.duplicates.examples[0][1]
    assert report.distinct_images == 2
    unopened = check([source], open_media=False)
    assert unopened.duplicates.count == 0 and unopened.distinct_images == 3
    twice = write(folder, {"image": "red.png", "captions": ["a", "a"]})
    assert check([twice]).duplicates.count == 1


def test_each_file_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("opticnerve.data.check.open_image", lambda source, **_: opened.append(source))
    check([write(folder, row("red.png"), row("red.png", "other"), row("blue.png"))])
    assert opened == [folder / "red.png", folder / "blue.png"]


def test_without_opening_media_broken_pictures_pass(folder: Path) -> None:
    assert check([write(folder, row("broken.png"))], open_media=False).ok


def test_too_long_samples_are_bad(folder: Path) -> None:
    source = write(folder, row("red.png", "one two three"), row("blue.png", "one"))

    def words(conversation: Conversation) -> int:
        return len((conversation.answer or "").split())

    report = check([source], count_tokens=words, max_length=2)
    assert report.kinds["too-long"].count == 1 and "3 tokens, 2 fit" in report.kinds["too-long"].examples[0][1]
    assert report.to_dict()["tokens"]["max"] == 3
    assert check([source], count_tokens=words).ok
    with pytest.raises(OpticNerveError, match="count_tokens"):
        check([source], max_length=2)


def test_conversations_errors_and_nothing_at_all(folder: Path) -> None:
    mixed: list[Conversation | DataError] = [
        ask("Hi", answer="Hello there"),
        ask("Two?", folder / "red.png", folder / "blue.png", answer="yes"),
        DataError("found by another", kind="other"),
    ]
    report = check(mixed)
    assert (report.good, report.bad, dict(report.images_per_sample)) == (2, 1, {0: 1, 2: 1})
    nothing = check([])
    assert not nothing.ok and "no sample" in rendered(nothing)


def test_examples_are_limited_and_the_report_is_json(folder: Path) -> None:
    report = check([write(folder, *["{ [red]"] * 5, row("red.png"))], max_listed=2)
    assert (report.kinds["json"].count, len(report.kinds["json"].examples)) == (5, 2)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["kinds"]["json"]["count"] == 5 and again["ok"] is False
    assert "and 3 more" in rendered(report)


def test_places_are_not_wrapped(folder: Path) -> None:
    report = check([write(folder, "{", row("red.png"))])
    assert f"{folder / 'd.jsonl'}:1" in rendered(report, width=20)
