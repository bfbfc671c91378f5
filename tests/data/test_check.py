"""`check` goes through everything, raises for nothing, and counts right."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from errors import refused
from opticnerve.data.check.leakage import MOST_BITS, Side, dhash, leaks, near_pairs
from opticnerve.data.check.report import check
from opticnerve.data.dataset.read import DataSource
from opticnerve.data.encode.tokenize import Encoded
from opticnerve.data.media.open import open_image
from opticnerve.types import Conversation, DataError, ask


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
    real = open_image
    monkeypatch.setattr("opticnerve.data.check.report.open_image", lambda s, **k: (opened.append(s), real(s, **k))[1])
    check([write(folder, row("red.png"), row("red.png", "other"), row("blue.png"))])
    assert opened == [folder / "red.png", folder / "blue.png"]


def test_without_opening_media_broken_pictures_pass(folder: Path) -> None:
    assert check([write(folder, row("broken.png"))], open_media=False).ok


def test_too_long_samples_are_bad(folder: Path) -> None:
    source = write(folder, row("red.png", "one two three"), row("blue.png", "one"))

    def words(conversation: Conversation) -> Encoded:
        said = (conversation.answer or "").split()
        return Encoded([0] * len(said), [0] * len(said), [], control_words=[w for w in said if w == "two"])

    report = check([source], encode=words, max_length=2)
    assert (report.control_words.count, report.to_dict()["control_words"]["count"]) == (1, 1)
    assert report.kinds["too-long"].count == 1 and "3 tokens, 2 fit" in report.kinds["too-long"].examples[0][1]
    assert report.to_dict()["tokens"]["max"] == 3
    assert check([source], encode=words).ok
    with refused("missing-field", "encode", "max_length"):
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


def test_questions_that_come_again_with_their_answers(folder: Path) -> None:
    source = write(folder, *({"image": i, "question": q, "answer": a} for i, q, a in (
        ("red.png", "what?", "a square"), ("blue.png", "what?", "a square"), ("red.png", "what?", "a circle"),
    )))  # fmt: skip
    assert check([source]).repeated_answers.count == 0
    asked = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a square"}]
    again = [{"image": "red.png", "conversations": turns} for turns in (
        asked, [*asked, {"from": "human", "value": "more?"}, {"from": "gpt", "value": "no"}], asked
    )]  # fmt: skip
    report = check([write(folder, *again)], open_media=False)
    assert (report.repeated_answers.count, report.duplicates.count) == (1, 1)
    assert report.repeated_answers.examples[0][0].endswith(":2") and "d.jsonl:1" in rendered(report)


def photo(seed: int, size: tuple[int, int] = (90, 80)) -> PIL.Image.Image:
    """Soft random patches, as photographs are: every brightness, no fine noise."""
    patches = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(patches).resize(size, PIL.Image.Resampling.BICUBIC)


def test_pictures_that_look_the_same(folder: Path) -> None:
    """Scaled and compressed again they do; others do not, nor do plain ones."""
    photo(0).save(folder / "a.png")
    photo(0).save(folder / "b.jpg", quality=40)
    photo(0, (45, 40)).save(folder / "c.png")
    photo(1).save(folder / "d.png")
    names = ("a.png", "b.jpg", "c.png", "d.png", "red.png", "blue.png")
    report = check([write(folder, *(row(name) for name in names))])
    assert report.near_pictures.count == 2 and report.duplicates.count == 0 and report.ok
    assert [w.split(":")[-1] for w, _ in report.near_pictures.examples] == ["2", "3"]
    assert "look like another" in rendered(report)


@given(seed=st.integers(0, 1000), count=st.integers(0, 40))
def test_near_pairs_are_those_of_comparing_all(seed: int, count: int) -> None:
    rng = random.Random(seed)
    base = [rng.getrandbits(64) for _ in range(4)] + [0, 3]
    hashes = [rng.choice(base) ^ sum(1 << b for b in rng.sample(range(64), rng.randrange(8))) for _ in range(count)]
    array = np.array(hashes, np.uint64)

    def near(i: int, j: int) -> bool:
        plain = any(not 6 <= hashes[k].bit_count() <= 58 for k in (i, j))
        return not plain and (hashes[i] ^ hashes[j]).bit_count() <= MOST_BITS

    wanted = [(i, j) for j in range(count) for i in range(j) if near(i, j)]
    assert sorted(near_pairs(array)) == sorted(wanted)
    half = count // 2
    across = [(i, j) for i in range(half) for j in range(half, count) if near(i, j)]
    assert sorted((i, j + half) for i, j in near_pairs(array[:half], array[half:])) == sorted(across)


def test_what_of_the_test_is_trained_on(folder: Path) -> None:
    photo(0).save(folder / "a.png")
    photo(0).save(folder / "b.jpg", quality=40)
    photo(1).save(folder / "d.png")
    train, test = Side(), Side()
    check([write(folder, row("a.png", "x"), row("red.png", "y"))], side=train)
    test_file = folder / "t.jsonl"
    rows = (row("copy.png", "y"), row("copy.png", "z"), row("b.jpg", "x"), row("d.png", "x"))
    test_file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    check([DataSource(test_file)], side=test)
    found = leaks(train, test)
    assert [(w.split("/")[-1], m.split("/")[-1]) for w, m in found.pictures.examples] == [("t.jsonl:1", "d.jsonl:2")]
    assert [w.split("/")[-1] for w, _ in found.near.examples] == ["t.jsonl:3"]
    assert [w.split("/")[-1] for w, _ in found.answers.examples] == ["t.jsonl:1"]
    assert not found.ok and leaks(Side(), test).ok


def test_a_hash_of_looks_is_of_the_picture() -> None:
    assert dhash(photo(0)) != dhash(photo(1)) and 20 < dhash(photo(0)).bit_count() < 44
