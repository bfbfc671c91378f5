"""From each format to the same conversations; each kind of bad record by its name and place."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import refused
from opticnerve.data.dataset.read import read
from opticnerve.data.formats.names import split
from opticnerve.data.media.open import open_image
from opticnerve.registry import data_formats
from opticnerve.types import AudioPart, Conversation, DataError, ImagePart, TextPart


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        PIL.Image.new("RGB", (4, 4), "red").save(folder / name)
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "1.wav").write_bytes(b"RIFF")
    return folder


def jsonl(folder: Path, *rows: Any, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def outline(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """Roles and parts, pictures as the names of their files."""

    def shown(part: object) -> str:
        match part:
            case TextPart(text):
                return text
            case ImagePart(Path() as source) | AudioPart(Path() as source):
                return f"[{source.name}]"
            case _:
                return "[bytes]"

    return [(m.role, [shown(p) for p in m.parts]) for m in conversation.messages]


def only(path: Path, **options: Any) -> Conversation:
    (conversation,) = read(path, **options)
    return conversation


def error(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read(path, **options))
    return caught.value


def conversation(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in turns], **more}


def llava(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": f, "value": v} for f, v in turns], **more}


# --- captions


@pytest.mark.parametrize("image", ["image", "image_path", "file_name", "filepath"])
@pytest.mark.parametrize("caption", ["caption", "captions", "text"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_captions_under_every_name_in_every_file(folder: Path, image: str, caption: str, suffix: str) -> None:
    path = folder / f"d.{suffix}"
    row = {image: "1.png", caption: "a red square"}
    tab = "\t" if suffix == "tsv" else ","
    path.write_text(
        {"json": json.dumps([row]), "jsonl": json.dumps(row)}.get(suffix, f"{tab.join(row)}\n{tab.join(row.values())}")
    )
    sample = only(path)
    assert outline(sample) == [("user", ["[1.png]"]), ("assistant", ["a red square"])]
    place = {"json": (f"{path}[0]", "d-0"), "jsonl": (f"{path}:1", "d-1")}.get(suffix, (f"{path}:2", "d-2"))
    assert (sample.where, sample.id) == place


def test_several_captions_are_several_samples_with_prompts_fixed_by_id(folder: Path) -> None:
    path = jsonl(folder, {"id": "x", "image": "1.png", "captions": ["one", "", "two"]}, {"image": "2.png", "text": "y"})
    bad: list[DataError] = []
    found = list(read(path, prompt=["Say.", "Tell."], on_error=bad.append))
    assert [(c.id, c.answer) for c in found] == [("x#0", "one"), ("x#2", "two"), ("d-2", "y")]
    assert [e.kind for e in bad] == ["empty-answer"]
    assert all(c.messages[0].text in ("Say.", "Tell.") for c in found)
    again = list(read(path, prompt=["Say.", "Tell."], on_error=bad.append))
    assert [outline(c) for c in again] == [outline(c) for c in found]
    assert next(read(path, prompt="Describe.")).messages[0].text == "Describe."


# --- questions


def test_questions_with_types_and_answers(folder: Path) -> None:
    path = jsonl(
        folder,
        {"image": "1.png", "question": "what?", "answer": "red", "type": "colour", "id": 7},
        {"image": "1.png", "question": "how many?", "answer": 3, "question_type": "count"},
        {"image": "2.png", "question": "w?", "answers": [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}]},
    )
    first, second, third = read(path)
    assert outline(first) == [("user", ["[1.png]", "what?"]), ("assistant", ["red"])]
    assert (first.id, first.meta) == ("7", {"answers": ["red"], "type": "colour"})
    assert (second.answer, second.meta["type"]) == ("3", "count")
    assert (third.answer, third.meta["answers"]) == ("b", ["a", "b", "b"])


def test_questions_on_one_picture_become_one_conversation(folder: Path) -> None:
    rows = [{"image": i, "question": q, "answer": a} for i, q, a in [("1.png", "a?", "A"), ("2.png", "b?", "B")]]
    path = jsonl(folder, *rows, {"image": "1.png", "question": "c?", "answer": "C"})
    first, second = read(path, group_by_image=True)
    said = [("user", ["[1.png]", "a?"]), ("assistant", ["A"]), ("user", ["c?"]), ("assistant", ["C"])]
    assert outline(first) == said and (first.id, first.where) == ("d-1", f"{path}:1")
    assert [t["answers"] for t in first.meta["turns"]] == [["A"], ["C"]]
    assert outline(second)[0] == ("user", ["[2.png]", "b?"])


# --- LLaVA


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("<image>\nWhat?", ["[1.png]", "What?"]),
        ("What?\n<image>", ["What?\n", "[1.png]"]),
        ("<image>\n\nWhat?", ["[1.png]", "\nWhat?"]),
        ("Look:\n<image>\nWhat?", ["Look:\n", "[1.png]", "What?"]),
        ("Look <image> here", ["Look ", "[1.png]", " here"]),
        ("<image>", ["[1.png]"]),
    ],
)
def test_llava_markers_become_pictures_at_their_place(folder: Path, words: str, parts: list[str]) -> None:
    path = jsonl(folder, llava(("human", words), ("gpt", "Red."), image="1.png", id="a"))
    assert outline(only(path)) == [("user", parts), ("assistant", ["Red."])]


def test_llava_with_several_pictures_a_system_message_and_without_pictures(folder: Path) -> None:
    two = llava(("human", "<image>\n<image>\nSame?"), ("gpt", "Yes"), image=["1.png", "2.png"], system="Be brief.")
    path = jsonl(folder, two, llava(("system", "S"), ("human", "Hi"), ("gpt", "Hello")))
    first, second = read(path)
    assert outline(first)[:2] == [("system", ["Be brief."]), ("user", ["[1.png]", "[2.png]", "Same?"])]
    assert outline(second) == [("system", ["S"]), ("user", ["Hi"]), ("assistant", ["Hello"])]


@given(st.lists(st.text("ab\n", max_size=4), min_size=1, max_size=5))
def test_a_tag_takes_the_line_break_behind_it_and_nothing_else(pieces: list[str]) -> None:
    """The template writes one behind each picture."""
    first, *others = split("<image>".join(pieces)) or [""]
    again = "".join([first if isinstance(first, str) else "", *(p for p in others if isinstance(p, str))])
    assert again == pieces[0] + "".join(p.removeprefix("\n") for p in pieces[1:])


# --- chat


def test_chat_messages_with_every_kind_of_part(folder: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (2, 2), "blue").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [
        {"type": "image", "image": "1.png"},
        {"type": "image", "path": "2.png"},
        {"type": "image", "url": url},
        {"type": "audio", "path": "1.wav"},
        {"type": "text", "text": "What?"},
    ]
    sample = only(jsonl(folder, conversation(("system", "S"), ("user", content), ("assistant", "Blue"), id="c")))
    said = ("user", ["[1.png]", "[2.png]", "[bytes]", "[1.wav]", "What?"])
    assert outline(sample) == [("system", ["S"]), said, ("assistant", ["Blue"])]
    assert open_image(sample.images[2].source).getpixel((0, 0)) == (0, 0, 255)


def test_bare_image_parts_take_the_listed_images_in_order(folder: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    path = jsonl(folder, conversation(("user", parts), ("assistant", "ok"), images=["2.png", "1.png"]))
    assert outline(only(path))[0] == ("user", ["[2.png]", "and", "[1.png]"])


# --- datasets


@pytest.fixture
def table(folder: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = {"image": [str(folder / "1.png"), str(folder / "2.png")], "question": ["a?", "b?"], "answer": ["A", "B"]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_dataset_and_parquet_read_the_same(folder: Path, table: Any, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "pq").mkdir()
    saved = list(read(tmp_path / "saved"))
    assert [(c.messages[0].text, c.answer) for c in saved] == [("a?", "A"), ("b?", "B")]
    assert saved[1].where == f"{tmp_path / 'saved'}[1]" and saved[1].id == "saved-1"
    assert isinstance(saved[0].images[0].source, bytes)
    assert open_image(saved[0].images[0].source).size == (4, 4)
    datasets = pytest.importorskip("datasets")
    embedded = datasets.table.embed_table_storage(table.data.table)
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    pq.write_table(embedded, tmp_path / "pq" / "part-0.parquet")
    assert [c.messages for c in read(tmp_path / "pq", format="hf")] == [c.messages for c in saved]


def test_splits_must_be_named(table: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    both = error(tmp_path / "both")
    assert both.kind == "format" and "train, test" in both.problem and str(tmp_path / "both" / "train") in both.remedy
    assert len(list(read(tmp_path / "both" / "train"))) == 2


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ['{"', "[]"])
def test_a_saved_dataset_whose_notes_are_damaged(table: Any, tmp_path: Path, name: str, content: str) -> None:
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(content)
    assert error(tmp_path / "saved").kind == "table"


def test_messages_in_a_table(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    user = [{"type": "image", "text": None, "image": "1.png"}, {"type": "text", "text": "What?", "image": None}]
    answer = [{"type": "text", "text": "Red", "image": None}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    datasets.Dataset.from_list([{"messages": messages}]).save_to_disk(tmp_path / "chat")
    assert outline(only(tmp_path / "chat", media=folder)) == [("user", ["[1.png]", "What?"]), ("assistant", ["Red"])]


@pytest.mark.parametrize("name", ["broken.parquet", "state.json"])
def test_damaged_and_empty_folders(tmp_path: Path, name: str) -> None:
    assert error(tmp_path).kind == "format"
    (tmp_path / name).write_bytes(b"{}PAR1")
    assert error(tmp_path).kind == "table"


# --- bad records

GOOD = conversation(("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        ("{broken", "json", "not valid JSON"),
        ("[1]", "json", "list"),
        ("[" * 100_000, "json", "not valid JSON"),
        (conversation(("user", "Hi")), "no-assistant-turn", "nothing to learn"),
        (conversation(), "no-assistant-turn", "nothing to learn"),
        (conversation(("user", "a"), ("assistant", "b"), ("assistant", "c")), "two-assistant-turns", "turns 2 and 3"),
        (conversation(("user", "a"), ("user", "b"), ("assistant", "c")), "two-user-turns", "turns 1 and 2"),
        (conversation(("assistant", "a"), ("user", "b")), "assistant-first", "speaks first"),
        (conversation(("user", "a"), ("assistant", " \n")), "empty-answer", "turn 2"),
        (conversation(("user", ""), ("assistant", "a")), "empty-question", "turn 1"),
        (conversation(("user", "a"), ("assistant", "b"), ("user", "c")), "unanswered-question", "no answer"),
        (conversation(("user", "a"), ("system", "s"), ("assistant", "b")), "misplaced-system", "system"),
        (conversation(("user", "a"), ("robot", "b")), "unknown-role", "'robot'"),
        (conversation(("user", "<image>\na"), ("assistant", "b")), "placeholder-without-image", "<image>"),
        (
            conversation(("user", "a"), ("assistant", [{"type": "image", "image": "1.png"}])),
            "image-in-answer",
            "turn 2",
        ),
        (conversation(("user", [{"type": "image"}]), ("assistant", "b")), "placeholder-without-image", "but 1 place"),
        (
            conversation(("user", [{"type": "image"}]), ("assistant", "b"), images=["1.png", "2.png"]),
            "image-without-placeholder",
            "2 image(s)",
        ),
        (conversation(("user", [{"type": "scent"}]), ("assistant", "b")), "unknown-part", "'scent'"),
        (conversation(("user", [{"type": "text"}]), ("assistant", "b")), "missing-field", "text"),
        (conversation(("user", [{"type": "image", "image": 5}]), ("assistant", "b")), "wrong-type", "int 5"),
        (conversation(("user", [{"type": "image", "image": "no.png"}]), ("assistant", "b")), "missing-image", "no.png"),
        (conversation(("user", [{"type": "image", "image": "a\0b"}]), ("assistant", "b")), "missing-image", "usable"),
        (
            conversation(("user", [{"type": "image", "image": "x" * 5000}]), ("assistant", "b")),
            "missing-image",
            "usable",
        ),
        (conversation(("user", [{"type": "audio", "audio": "no.wav"}]), ("assistant", "b")), "missing-audio", "no.wav"),
        (
            conversation(("user", [{"type": "image", "url": "http://x.org/1.png"}]), ("assistant", "b")),
            "url",
            "fetches nothing",
        ),
        (
            conversation(("user", [{"type": "image", "image": "../secret.png"}]), ("assistant", "b")),
            "outside-media",
            "outside",
        ),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant"}]}', "missing-field", "role"),
        (conversation(("user", "\ud800"), ("assistant", "b")), "encoding", "\\ud800"),
        ({"messages": "Hi"}, "wrong-type", "str 'Hi'"),
        ({"dialogue": []}, "missing-field", "dialogue"),
    ],
)
def test_each_bad_chat_record_has_its_kind_and_place(folder: Path, row: Any, kind: str, says: str) -> None:
    path = jsonl(folder, GOOD, row, "", GOOD)
    bad: list[DataError] = []
    good = list(read(path, on_error=bad.append))
    assert [c.where for c in good] == [f"{path}:1", f"{path}:4"]
    assert [e.kind for e in bad] == [kind]
    assert says in bad[0].problem and bad[0].where.startswith(f"{path}:2")
    assert error(path).kind == kind


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        (
            llava(("human", "<image>a"), ("gpt", "b"), image=["1.png", "2.png"]),
            "image-without-placeholder",
            "2 image(s) in the record, but 1",
        ),
        (
            llava(("human", "<image><image>a"), ("gpt", "b"), image="1.png"),
            "placeholder-without-image",
            "1 image(s) in the record, but 2",
        ),
        (llava(("human", "<image>a"), ("gpt", "b")), "placeholder-without-image", "0 image(s)"),
        (llava(("human", "a"), ("bot", "b")), "unknown-role", "'bot'"),
        ({"conversations": [{"speaker": "user", "words": "a"}]}, "missing-field", "speaker, words"),
        (llava(("human", "a"), ("gpt", "<image>"), image="1.png"), "image-in-answer", "picture"),
    ],
)
def test_each_bad_llava_record_has_its_kind(folder: Path, row: Any, kind: str, says: str) -> None:
    path = folder / "d.json"
    path.write_text(json.dumps([llava(("human", "a"), ("gpt", "b")), row]))
    bad: list[DataError] = []
    assert len(list(read(path, on_error=bad.append))) == 1
    assert (bad[0].kind, bad[0].where) == (kind, f"{path}[1]") and says in bad[0].problem


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"image": "1.png", "caption": "see <image>"}, "placeholder-without-image"),
        ({"image": "1.png", "caption": " "}, "empty-answer"),
        ({"image": "1.png", "caption": True}, "wrong-type"),
        ({"caption": "a"}, "missing-field"),
        ({"image": "1.png"}, "missing-field"),
        ({"image": "no.png", "caption": "a"}, "missing-image"),
    ],
)
def test_each_bad_caption_has_its_kind(folder: Path, row: dict[str, Any], kind: str) -> None:
    found = error(jsonl(folder, row), format="captions")
    assert found.kind == kind
    if kind == "missing-field":
        assert next(iter(row)) in found.problem and "wanted" in found.remedy


def test_json_error_names_line_and_column(folder: Path) -> None:
    path = folder / "d.json"
    path.write_text('[\n {"image": "1.png",\n  "caption" "a"}\n]')
    assert error(path).where == f"{path}:3:13"
    lines = jsonl(folder, GOOD, '{"messages" []}')
    assert error(lines).where == f"{lines}:2:13"


def test_not_utf8_names_line_and_byte_and_the_rest_is_read(folder: Path) -> None:
    path = folder / "d.jsonl"
    good = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(good + b'{"x": "caf\xe9"}\n' + good)
    bad: list[DataError] = []
    assert len(list(read(path, on_error=bad.append))) == 2
    assert (bad[0].kind, bad[0].where) == ("encoding", f"{path}:2")
    assert f"byte {len(good) + 10:,}" in bad[0].problem and "0xe9" in bad[0].problem

    table = folder / "d.csv"
    table.write_bytes(b"image,caption\n1.png,caf\xe9\n1.png,good\n")
    bad.clear()
    assert [c.answer for c in read(table, on_error=bad.append)] == ["good"]
    assert (bad[0].kind, bad[0].where) == ("encoding", f"{table}:2")

    whole = folder / "d.json"
    whole.write_bytes(b'[\n{"x": "caf\xe9"}]')
    assert (error(whole).kind, error(whole).where) == ("encoding", f"{whole}:2")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_accepted(folder: Path, suffix: str) -> None:
    row = {"image": "1.png", "caption": "à"}
    body = {"jsonl": json.dumps(row), "json": json.dumps([row]), "csv": "image,caption\n1.png,à\n"}[suffix]
    (folder / f"d.{suffix}").write_text(body, encoding="utf-8-sig")
    assert only(folder / f"d.{suffix}").answer == "à"


def test_csv_rows_of_the_wrong_length_and_cells_of_several_lines(folder: Path) -> None:
    path = folder / "d.csv"
    path.write_text('image,caption\n1.png,a, b\n1.png,"two\nlines"\n\n1.png,last\n')
    bad: list[DataError] = []
    found = list(read(path, on_error=bad.append))
    assert [(c.answer, c.where) for c in found] == [("two\nlines", f"{path}:3"), ("last", f"{path}:6")]
    assert [(e.kind, e.where) for e in bad] == [("csv", f"{path}:2")]


def test_a_broken_csv_row_is_one_bad_sample_and_a_broken_header_the_whole_file(folder: Path) -> None:
    path = folder / "d.csv"
    path.write_text('image,caption\n1.png,"a"b\n1.png,good\n')
    bad: list[DataError] = []
    assert [c.answer for c in read(path, on_error=bad.append)] == ["good"]
    assert [(e.kind, e.where) for e in bad] == [("csv", f"{path}:2")]
    path.write_text('"image"x,caption\n1.png,good\n')
    assert error(path, on_error=bad.append).kind == "csv"


# --- the media folder


def test_paths_start_from_the_media_folder_and_stay_in_it(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "lists"
    other.mkdir()
    path = jsonl(other, {"image": "1.png", "caption": "a"})
    assert error(path).kind == "missing-image"
    assert only(path, media=folder).images[0].source == folder / "1.png"
    absolute = jsonl(other, {"image": str(folder / "1.png"), "caption": "a"})
    assert error(absolute).kind == "outside-media"
    assert only(absolute, allow_outside_media=True) and only(absolute, media=folder)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    linked = jsonl(folder, {"image": "link.png", "caption": "a"})
    assert error(linked).kind == "outside-media"
    assert only(linked, allow_outside_media=True)


# --- the reader itself


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_files_raise_whatever_on_error_says(folder: Path, content: str) -> None:
    path = folder / ("d.json" if content != "\n\n" else "d.jsonl")
    path.write_text(content)
    assert error(path, on_error=lambda e: None).kind == "empty-file"
    assert error(path, format="captions", on_error=lambda e: None).kind == "empty-file"


def test_files_that_cannot_be_read_at_all_raise(folder: Path) -> None:
    ignore: dict[str, Any] = {"on_error": lambda e: None}
    assert error(folder / "no.jsonl", **ignore).kind == "missing-file"
    (folder / "d.doc").write_text("x")
    assert error(folder / "d.doc", **ignore).kind == "format"
    (folder / "d.json").write_text('{"a": 1}')
    assert "keys a" in error(folder / "d.json", **ignore).problem


def test_ambiguous_and_unknown_formats_list_the_names(folder: Path) -> None:
    both = jsonl(folder, {"image": "1.png", "caption": "c", "question": "q?", "answer": "a"})
    assert "captions, vqa" in error(both).problem
    assert only(both, format="vqa").answer == "a" and only(both, format="captions").answer == "c"
    neither = error(jsonl(folder, {"picture": "1.png"}))
    assert "picture" in neither.problem and all(f"{name}: " in neither.problem for name in data_formats)
    assert "captions, chat" in error(both, format="coco").remedy
    assert error(both, format="hf").kind == "format"


def test_a_bad_first_record_does_not_hide_the_format(folder: Path) -> None:
    path = jsonl(folder, "{", {"image": "1.png"}, {"image": "1.png", "caption": "a"})
    bad: list[DataError] = []
    assert [c.answer for c in read(path, on_error=bad.append)] == ["a"]
    assert [e.kind for e in bad] == ["json", "missing-field"]


def test_options_that_do_not_fit_the_format_are_refused(folder: Path) -> None:
    path = jsonl(folder, GOOD)
    assert "prompt" in error(path, prompt="Say.").problem
    assert "group_by_image" in error(path, group_by_image=True).problem
    assert "media folder" in error(path, media=folder / "nowhere").problem


def test_limit_counts_good_samples_and_stops_reading(folder: Path) -> None:
    path = jsonl(folder, GOOD, "{", GOOD, GOOD, "{")
    bad: list[DataError] = []
    assert len(list(read(path, limit=2, on_error=bad.append))) == 2
    assert len(bad) == 1
    assert list(read(path, limit=0)) == []


def test_jsonl_is_streamed(folder: Path) -> None:
    path = jsonl(folder, *[GOOD] * 50, "{")
    stream: Iterator[Conversation] = read(path)
    assert next(stream).where.endswith(":1")  # the broken line 51 has not been reached


def test_an_error_of_the_caller_is_not_taken_for_a_bad_sample(folder: Path) -> None:
    stream = read(jsonl(folder, GOOD, GOOD), on_error=lambda e: None)
    next(stream)
    with refused("sample", "mine", error=DataError):
        for _ in stream:
            raise DataError("mine")
