"""`where`: which records are wanted, by a condition on their fields; the same through every reader, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import CASES, png, put
from typer.testing import CliRunner

from errors import refused
from opticnerve.cli.main import app
from opticnerve.data.dataset.dataset import Samples
from opticnerve.data.dataset.load import load_data, load_streams
from opticnerve.data.dataset.read import read
from opticnerve.data.formats.where import Where
from opticnerve.recipe import Stage
from opticnerve.recipe.loading import data_entry
from opticnerve.types import DataError

ROW: dict[str, Any] = {
    "relevance": 4, "lang": "en", "score": "3.5", "meta": {"votes": 2}, "ratings": [5, 3, None], "none": None,
    "good": True, "tags": ["cat", "dog"], "image quality": 0.5, "nan": float("nan"), "holes": [float("nan"), 4],
    "url": "https://x.org/a", "cell": "10", "cells": ["9", "10"], "mixed": ["9", "ten"],
}  # fmt: skip


def keeps(text: str, row: dict[str, Any] = ROW) -> bool:
    return Where(text).keeps(row, dict)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("relevance > 3", True), ("relevance >= 5 or lang == 'en'", True), ("relevance > 3 and lang == 'ja'", False),
        ("not (relevance > 3)", False), ("not relevance > 3 and lang == 'ja'", False), ("2 < relevance <= 4", True),
        ("lang in ['en', 'ja']", True), ('lang not in ("de", "fr")', True), ("'x.org' in url", True),
        ("'cat' in tags", True), ("'cow' in tags", False), ("score > 3", True), ("score == 3.5", True),
        ("meta.votes == 2", True), ("ratings[0] == 5", True), ("min(ratings) >= 3", True), ("len(tags) > 2", False), ("max(holes) == 4", True),
        ("max(none) > 1", False), ("good", True), ("not good", False), ("good == true", True), ("-1 < relevance", True),
        ("`image quality` >= 0.5", True), ("`image quality` == '`'", False), ("meta['votes'] > 1", True),
        # texts of numbers, as tables have them, are more and less as numbers, and the same as texts
        ("max(cells) == 10", True), ("max(cells) > 9.5", True), ("min(cells) < cell", True), ("cells[0] < cell", True),
        ("cells[0] < '10'", True), ("cell == '10.0'", False), ("max(tags) == 'dog'", True), ("len(mixed) == 2", True),
        # what is not there, null and NaN are one: neither less nor more than anything
        ("none > 3", False), ("none <= 3", False), ("none == null", True), ("none is not null", False),
        ("absent == null", True), ("nan == null", True), ("nan < 1", False), ("none != 3", True), ("none in [3]", False),
    ],
)  # fmt: skip
def test_what_is_kept(text: str, kept: bool) -> None:
    assert keeps(text) is kept


@pytest.mark.parametrize(
    "text",
    [
        "", "relevance >", "relevance = 3", "relevance > 3 &", "__import__('os').system('true')", "relevance + 1 > 3",
        "open('x')", "[x for x in tags]", "lambda: 1", "relevance if good else 1", "tags[1:]", "len(tags, tags) > 1",
        "f'{relevance}'", "relevance > 3; good", "(relevance := 3)", "*tags", "relevance > 3 " + "and good " * 999,
        "(" * 300 + "good" + ")" * 300, "not " * 1000 + "good", "meta" + ".x" * 900, "x.__class__.__mro__ == 1 + 1", "tags[relevance] == 1", "b'x' == url",
    ],
)  # fmt: skip
def test_what_is_no_condition(text: str) -> None:
    with refused("where", error=DataError):
        Where(text)


@pytest.mark.parametrize(
    "text",
    [
        "lang > 3",
        "relevance",
        "lang",
        "min(lang) > 3 and len(relevance) > 1",
        "3 in relevance",
        "max(score) > 3",
        "max(mixed) > 3",
    ],
)
def test_what_cannot_be_compared_is_a_bad_sample(text: str) -> None:
    with refused("where", error=DataError):
        keeps(text)


ROWS = [
    {"image": "1.png", "query": f"q{n}", "label": "red", "relevance_min": n, "lang": "en" if n % 2 else "ja"}
    for n in range(8)
]
WHERE = "relevance_min >= 3 and lang == 'en'"


@pytest.fixture(params=["d.jsonl", "d.json", "d.csv", "d.parquet"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / str(request.param)
    (tmp_path / "1.png").write_bytes(png())
    if path.suffix == ".csv":
        put(path, "\n".join([",".join(ROWS[0]), *(",".join(map(str, row.values())) for row in ROWS)]))
    else:
        put(path, ROWS)
    return path


def asked(found: Any) -> list[str]:
    return [c.messages[0].text for c in found]


@pytest.mark.parametrize("columns", [{}, {"question": "query", "answer": "label"}])
def test_every_reader_leaves_out_the_same(written: Path, columns: dict[str, str]) -> None:
    kept = ["q3", "q5", "q7"]
    options = {"path": str(written), "where": WHERE, "columns": columns}
    assert asked(read(written, where=WHERE, columns=columns)) == kept
    samples = load_data(data_entry(options))
    assert asked(samples) == kept
    assert isinstance(samples, Samples) and samples.found.left_out == 5
    assert asked(load_data(data_entry({**options, "limit": 2}))) == kept[:2]
    stage = Stage(
        name="s",
        train={"connector": 1e-3},
        steps=9,
        data=[data_entry({**options, "streaming": True, "shuffle_window": 2})],
    )
    streams = load_streams(stage, seed=0)
    drawn = [streams.example(n)[0][0].messages[0].text for n in range(6)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == kept
    again = load_streams(stage, seed=0)  # from the checkpoint's marks on
    again.load_state_dict(json.loads(json.dumps(streams.state_dict())))
    assert [again.example(n)[0][0].messages[0].text for n in range(6)] == drawn


def test_names_of_the_map_are_known_too(written: Path) -> None:
    assert asked(read(written, where="question == 'q3' or answer == 'blue'")) == ["q3"]


def test_a_name_that_no_record_has_is_told_with_those_there_are(written: Path) -> None:
    with refused("missing-field", "relevance_mim", "relevance_min", "lang", error=DataError):
        next(read(written, where="relevance_mim > 3"))
    with refused("where", error=DataError):
        next(read(written, where="relevance_min = 3"))


def test_ratings_as_the_mixtures_have_them(tmp_path: Path) -> None:
    """FineVision rates every turn and keeps the least of each row; what is without a picture has no such rating."""
    case = next(c for c in CASES if c.name == "FineVision")
    given = case.entry(tmp_path)
    for text, count in (
        ("relevance_min >= 5", 2), ("min(image_correspondence_ratings) > 4", 0), ("len(images) == 0", 1),
        ("relevance_min > 4 and (len(images) == 0 or min(image_correspondence_ratings) >= 4)", 2),
        ("min(image_correspondence_ratings) >= 4", 1), ("source != 'x'", 0),
    ):  # fmt: skip
        assert len(load_data(data_entry({**given, "where": text}))) == count, text


def test_a_field_that_the_first_records_lack(tmp_path: Path) -> None:
    put(
        tmp_path / "d.jsonl",
        [{"question": f"q{n}", "answer": "a", "image": None, **({"r": 5} if n == 9 else {})} for n in range(12)],
    )
    assert asked(read(tmp_path / "d.jsonl", where="r > 3")) == ["q9"]


def test_none_is_left(written: Path) -> None:
    stage = Stage(
        name="s", train={"connector": 1e-3}, steps=9,
        data=[data_entry({"path": str(written), "where": "relevance_min > 99", "streaming": True})],
    )  # fmt: skip
    with refused("empty-file", "relevance_min > 99", error=DataError):
        load_streams(stage, seed=0).example(0)
    checked = CliRunner().invoke(app, ["data", "check", str(written), "where=relevance_min > 99"])
    assert checked.exit_code == 3


def test_a_large_file_remembers_how_many(written: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("opticnerve.data.dataset.index.KEPT", 0)
    monkeypatch.setenv("OPTICNERVE_CACHE", str(tmp_path / "cache"))
    counts = []
    for text in (WHERE, WHERE, "lang == 'en'"):
        samples = load_data(data_entry({"path": str(written), "where": text}))
        assert isinstance(samples, Samples)
        counts.append((len(samples), samples.found.left_out))
    assert counts == [(3, 5), (3, 5), (4, 4)]


def test_it_is_counted_where_people_look(written: Path, tmp_path: Path, language_folder: Any) -> None:
    checked = CliRunner().invoke(app, ["data", "check", str(written), f"where={WHERE}", "--json"])
    report = json.loads(checked.stdout)
    assert (report["good"], report["bad"], report["left_out"]) == (3, 0, {WHERE: 5})
    assert f"5 by where: {WHERE}" in " ".join(
        CliRunner()
        .invoke(app, ["data", "check", str(written), f"where={WHERE}"], env={"COLUMNS": "200"})
        .stdout.split()
    )
    put(tmp_path / "recipe.yaml", json.dumps({
        "name": "r", "model": {"language": {"name": language_folder()}, "image": {"encoder": {"type": "timm", "name": "test_efficientnet"}, "connector": {"type": "mlp"}}},
        "stages": [{"name": "s", "train": {"connector": 1e-3}, "data": [{"path": str(written), "where": WHERE}], "steps": 1, "batch_size": 1}],
    }))  # fmt: skip
    shown = CliRunner().invoke(app, ["data", "show", str(tmp_path / "recipe.yaml")], env={"COLUMNS": "200"})
    assert f"5 records left out by where: {WHERE}" in shown.stdout, shown.output
    out = CliRunner().invoke(
        app, ["data", "convert", str(written), str(tmp_path / "o.jsonl"), f"where={WHERE}", "--json"]
    )
    assert json.loads(out.stdout)["by_where"] == 5
