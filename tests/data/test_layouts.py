"""Every layout in which this field ships its data: read as it is, checked, shown and encoded; by format and by map alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import CASES, PICTURES, Case, put
from typer.testing import CliRunner

import tiny
from errors import refused
from opticnerve.cli import tokens
from opticnerve.cli.main import app
from opticnerve.data.dataset.convert import convert
from opticnerve.data.dataset.load import load_data, stream_data
from opticnerve.data.encode.tokenize import encode
from opticnerve.encoders.base import make_image_processor
from opticnerve.language.chat_template import CHATML
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.recipe.loading import data_entry
from opticnerve.types import AudioPart, Conversation, DataError, Frame, TextPart

EACH = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def entry(case: Case, folder: Path, **more: Any) -> dict[str, Any]:
    """The data entry of a case, its pictures beside it."""
    made = case.entry(folder)
    if made["path"].endswith("/set") or case.options.get("path") is None:
        for name, content in PICTURES.items():
            (folder / name).write_bytes(content)
    if (own := case.options.get("path")) is not None:
        made |= {"path": str(folder / own)}
        del made["media"]
    return made | more


def shown(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """Roles and parts, media as their files' names."""

    def part(p: Any) -> str:
        if isinstance(p, TextPart):
            return p.text
        source = p.source.source if isinstance(p.source, Frame) else p.source
        if isinstance(source, Path) and source.is_dir():
            return sorted(source.iterdir())[0].name
        return source.name if isinstance(source, Path) else "[bytes]"

    return [(m.role, [part(p) for p in m.parts]) for m in conversation.messages]


def found(given: dict[str, Any]) -> list[Conversation]:
    bad: list[DataError] = []
    samples = list(stream_data(data_entry(given), on_error=bad.append))
    assert not bad, bad
    return samples


@EACH
def test_is_read_as_it_is(case: Case, folder: Path) -> None:
    samples = found(entry(case, folder))
    assert shown(samples[0]) == case.shown
    assert len(samples) == case.count
    indexed = load_data(data_entry(entry(case, folder)))
    assert [shown(c) for c in indexed] == [shown(c) for c in samples]


@pytest.mark.parametrize("case", [c for c in CASES if c.map], ids=lambda c: c.name)
def test_by_map_and_by_layout_alike(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = entry(case, folder)
    by_layout = found(given)
    monkeypatch.setattr("opticnerve.data.formats.layouts.LAYOUTS", ())
    by_map = found({**given, "columns": case.map, "ignore": ["image_name", "image_path"]})
    assert [(shown(c), c.meta) for c in by_map] == [(shown(c), c.meta) for c in by_layout]


@pytest.fixture(scope="module")
def processor() -> Any:
    pictures = make_image_processor(size=32, mean=[0.5] * 3, std=[0.5] * 3)
    return OpticNerveProcessor(pictures, tiny.tokenizer(chat_template=CHATML), num_image_tokens=3)


@EACH
def test_is_checked_and_encoded(case: Case, folder: Path, processor: Any) -> None:
    given = entry(case, folder)
    options = [f"{k}={json.dumps(v)}" for k, v in given.items() if k not in ("path", "media")]
    media = ["--media", given["media"]] if "media" in given else []
    blind = any(p.is_file() and p.read_bytes() == b"RIFF" for p in folder.rglob("*.wav"))
    checked = CliRunner().invoke(app, ["data", "check", given["path"], *options, *media, "--json"])
    report = json.loads(checked.stdout)
    assert (checked.exit_code, report["good"], report["bad"]) == (0, case.count, 0), checked.output
    for conversation in [] if blind else found(given)[:2]:
        if any(isinstance(p, AudioPart) for p in conversation.pieces):
            continue
        encoded = encode(conversation, processor)
        learned = [label for label in encoded.labels if label != -100]
        pieces = tokens.to_dict(encoded, tokens.pieces(encoded, processor))  # what `data show` prints
        assert json.dumps(pieces)
        assert learned and len(encoded.images) == len(conversation.images)


def told(conversation: Conversation) -> Any:
    """All that a conversation says, media by their bytes."""

    def part(p: Any) -> Any:
        if isinstance(p, TextPart):
            return p.text
        source, more = (
            (p.source.source, (p.source.index, p.source.of)) if isinstance(p.source, Frame) else (p.source, ())
        )
        if isinstance(source, Path) and source.is_dir():
            source = b"".join(f.read_bytes() for f in sorted(source.iterdir()))
        return (type(p).__name__, source.read_bytes() if isinstance(source, Path) else source, more)

    meta = {k: v for k, v in conversation.meta.items() if v is not None}
    return [(m.role, [part(p) for p in m.parts], m.learn) for m in conversation.messages], meta


@EACH
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tar"])
def test_what_is_converted_reads_the_same(case: Case, suffix: str, folder: Path) -> None:
    given = entry(case, folder)
    before = found(given)
    film = case.options.get("frames") is not None
    if film and suffix != "jsonl":
        with refused("unsupported"):
            convert(before, folder / f"out.{suffix}")
        return
    out = (folder if film else folder / "out") / f"out.{suffix}"
    assert convert(before, out) == case.count
    after = found({"path": str(out), "frames": case.options.get("frames", 8)})
    assert [told(c) for c in after] == [told(c) for c in before]
    assert [c.id for c in after] == [c.id for c in before]


def test_convert_on_the_command_line(folder: Path) -> None:
    put(folder / "d.csv", "img,q,a\n1.png,what?,red\nno.png,what?,red\n")
    (folder / "1.png").write_bytes(PICTURES["1.png"])
    out = str(folder / "out.jsonl")
    words = ["data", "convert", str(folder / "d.csv"), out, "columns.question=q", "columns.answer=a"]
    assert CliRunner().invoke(app, words).exit_code == 1 and not Path(out).exists()
    done = CliRunner().invoke(app, [*words, "--skip-bad", "--json"])
    assert json.loads(done.stdout) == {"out": out, "samples": 1, "left_out": 1, "by_where": 0}
    assert CliRunner().invoke(app, words).exit_code == 1  # it is there already
    (sample,) = found({"path": out})
    assert (shown(sample), sample.meta) == (
        [("user", ["1.png", "what?"]), ("assistant", ["red"])],
        {"answers": ["red"], "type": None},
    )


def captioned(folder: Path, rows: int) -> dict[str, Any]:
    (folder / "1.png").write_bytes(PICTURES["1.png"])
    put(folder / "in/d.jsonl", [{"id": f"s{n}", "image": "1.png", "caption": f"caption {n}"} for n in range(rows)])
    return {"path": str(folder / "in/d.jsonl"), "media": str(folder)}


@pytest.mark.parametrize(("bound", "files"), [(("--shard-rows", "4"), 3), (("--shard-size", "1"), 10), ((), 1)])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tar"])
def test_large_data_are_converted_to_numbered_files(folder: Path, suffix: str, bound: Any, files: int) -> None:
    given = captioned(folder, 10)
    before = found(given)
    out = folder / "out" / f"rows-%05d.{suffix}"
    words = ["data", "convert", given["path"], str(out), "--media", given["media"], *bound, "--json"]
    assert json.loads(CliRunner().invoke(app, words).stdout)["samples"] == 10
    assert len(list(out.parent.glob(f"rows-*.{suffix}"))) == files
    for name in (f"rows-{{00000..{files - 1:05d}}}.{suffix}", f"rows-*.{suffix}", ""):  # braces, a glob, the folder
        for options in ({}, {"streaming": True}):
            if options and not name:  # of a folder, datasets reads the stream
                continue
            if options and suffix == "jsonl":
                options = {"streaming": True, "media": str(out.parent)}
            after = found({"path": str(out.parent / name), **options})
            assert [told(c) for c in after] == [told(c) for c in before]
            assert [c.id for c in after] == [c.id for c in before]
        assert [c.id for c in load_data(data_entry({"path": str(out.parent / name)}))] == [c.id for c in before]
    assert CliRunner().invoke(app, words).exit_code == 1  # they are there already


def test_nothing_is_left_of_a_conversion_that_breaks(folder: Path) -> None:
    given = captioned(folder, 3)
    put(folder / "in/d.jsonl", [{"image": "1.png", "caption": "a"}] * 3 + [{"image": "none.png", "caption": "b"}])
    with refused("missing-image", error=DataError):
        convert(stream_data(data_entry(given)), folder / "out/%05d.tar", shard_rows=1)
    assert not list((folder / "out").iterdir())
    with refused("conflict", "%05d"):
        convert(found(captioned(folder, 3)), folder / "out/one.tar", shard_rows=1)
    with refused("empty"):
        convert([], folder / "out/one.jsonl")
    wrong = ["data", "convert", given["path"], str(folder / "o-%05d.tar"), "--shard-size", "much"]
    assert CliRunner().invoke(app, wrong).exit_code == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "tar"])
def test_what_is_not_learned_stays_so(folder: Path, suffix: str) -> None:
    turns = [
        {"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    put(folder / "d.jsonl", [{"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]}])
    before = found({"path": str(folder / "d.jsonl")})
    convert(before, folder / f"out.{suffix}")
    after = found({"path": str(folder / f"out.{suffix}")})
    assert [m.learn for m in after[0].messages] == [m.learn for m in before[0].messages] == [True, False, True, True]
