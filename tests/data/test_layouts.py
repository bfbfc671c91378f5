"""Every layout in which this field ships its data: read as it is, checked, shown and encoded; by format and by map alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import CASES, PICTURES, Case, put
from typer.testing import CliRunner

from errors import refused
from opticnerve.cli.main import app
from opticnerve.data.dataset.convert import convert
from opticnerve.data.dataset.load import load_data, load_examples, stream_data
from opticnerve.models.vlm.build import Dock, dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.recipe import Stage
from opticnerve.recipe.loading import data_entry
from opticnerve.train.sampler import StageSampler
from opticnerve.types import Conversation, DataError, Frame, TextPart

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


def renamed(case: Case) -> tuple[Case, dict[str, Any]] | None:
    """The same rows under names that nobody knows, and the map that says which is which; None where there are no
    columns to be named (an object that holds records, pictures in folders, a table without a header)."""
    table = case.rows.split("\n") if isinstance(case.rows, str) and Path(case.file).suffix in (".csv", ".tsv") else None
    if table is not None and "://" in table[0]:
        return None
    if table is not None:
        mark = max("\t,|", key=table[0].count)
        names = [n.strip() for n in table[0].split(mark)]
    elif isinstance(case.rows, list) and all(isinstance(row, dict) for row in case.rows):
        names = list(dict.fromkeys(k for row in case.rows for k in row))
    else:
        return None
    given = case.map or case.options.get("columns") or {n: n for n in names}
    kept = {"split", *"ABCDEFGH", *case.options.get("ignore", ())} | (
        {"choices"} if "{choices}" in str(given) else set()
    )
    new = {n: f"their_{k}" for k, n in enumerate(names) if n not in kept and re.search(rf"\b{n}\b", str(given))}

    def source(text: str) -> str:
        if "{" in text:
            return re.sub(r"\{(\w+)", lambda m: "{" + new.get(m[1], m[1]), text)
        first, dot, rest = text.partition(".")
        return new.get(first, first) + dot + rest

    rows: Any = [{new.get(k, k): v for k, v in row.items()} for row in case.rows] if table is None else "\n".join(
        [mark.join(new.get(n, n) for n in names), *table[1:]]
    )  # fmt: skip
    columns = {k: source(v) if isinstance(v, str) else [source(one) for one in v] for k, v in given.items()}
    columns |= {n: t for n, t in new.items() if n not in columns and not case.map and not case.options.get("columns")}
    return replace(case, rows=rows), {k: v for k, v in columns.items() if k != v}


MAPPED = [(case, *other) for case in CASES if (other := renamed(case))]


@pytest.mark.parametrize(("case", "other", "columns"), MAPPED, ids=[case.name for case, *_ in MAPPED])
def test_by_map_and_by_layout_alike(
    case: Case, other: Case, columns: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = entry(case, folder)
    by_layout = found(given)
    monkeypatch.setattr("opticnerve.data.formats.layouts.LAYOUTS", ())
    ignore = [*given.get("ignore", ()), *(("image_name", "image_path") if case.name == "TextCaps" else ())]
    by_map = found({**entry(other, folder), "columns": columns, "ignore": ignore})
    assert [(shown(c), c.meta) for c in by_map] == [(shown(c), c.meta) for c in by_layout]


def test_most_layouts_can_be_said_by_a_map() -> None:
    assert len(MAPPED) >= 60, sorted({c.name for c in CASES} - {c.name for c, *_ in MAPPED})


@pytest.fixture(scope="module")
def both(language_folder: Callable[..., str], vision_folder: Callable[..., str], whisper_folder: str) -> Dock:
    """One tiny model that sees and hears, for all layouts."""
    heard = {"encoder": {"type": "whisper", "name": whisper_folder, "seconds": 1, "pool": 25}}
    seen = {"type": "hf_vision", "name": vision_folder()}
    return dock(seen, "mlp", language_folder(), audio=heard)


@EACH
def test_is_checked_shown_and_trained_on(
    case: Case, folder: Path, both: Dock, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """`data check`, `data show` and two training steps."""
    given = entry(case, folder)
    options = [f"{k}={json.dumps(v)}" for k, v in given.items() if k not in ("path", "media")]
    media = ["--media", given["media"]] if "media" in given else []
    checked = CliRunner().invoke(app, ["data", "check", given["path"], *options, *media, "--json"])
    report = json.loads(checked.stdout)
    assert (checked.exit_code, report["good"], report["bad"]) == (0, case.count, 0), checked.output
    monkeypatch.setattr("opticnerve.cli.data._processor_of", lambda name, overrides=None: both.processor)
    shown = CliRunner().invoke(app, ["data", "show", given["path"], *options, *media, "--model", "both", "--json"])
    assert json.loads(shown.stdout)["pieces"], shown.output

    examples = load_examples([data_entry(given)])
    stage = Stage(name="s", train={"connector": 1e-2}, data=[data_entry(given)], batch_size=2, steps=2)
    sampler, objective = StageSampler(examples, stage, both.processor, seed=0), NextToken(both.model)
    connectors = [tower.connector for tower in both.model.towers.values()]
    optimizer = torch.optim.SGD([p for c in connectors for p in c.parameters()], lr=1e-2)
    moved = 0.0
    for step in range(stage.steps or 0):
        loss, count = objective(sampler[step])
        (loss / count).backward()
        assert count > 0 and torch.isfinite(loss)
        moved += sum(float(p.grad.abs().sum()) for c in connectors for p in c.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    assert moved > 0


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


DOCS = Path(__file__).parents[2] / "docs"


def table_of(page: str) -> list[tuple[str, list[str]]]:
    """The table of layouts: what each row names, and what is to be written beside `path`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.*?) ?\|$", text[text.index("LLaVA-Pretrain") - 2 :].partition("\n\n")[0], re.M)
    return [(name, re.findall(r"`[^`]+`", beside)) for name, beside in rows]


def test_the_documents_tables_are_the_layouts_in_both_languages() -> None:
    english, japanese = table_of("data.md"), table_of("data.ja.md")
    assert [beside for _, beside in japanese] == [beside for _, beside in english]
    assert [re.findall(r"`[^`]+`", name) for name, _ in japanese] == [
        re.findall(r"`[^`]+`", name) for name, _ in english
    ]
    for case in CASES:
        word = re.split(r",|'s| on the hub| captions|-178K| fine-tuning", case.name)[0]
        known = {"Qwen2.5-VL": "Qwen2.5-VL", "Florence-2": "Florence", "pictures with texts": "pictures"}.get(
            word, word
        )
        for page, table in (("data.md", english), ("data.ja.md", japanese)):
            assert any(known in name for name, _ in table), f"{page} does not name {case.name}"
