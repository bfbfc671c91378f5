"""Column maps, templates, roles, repairs, second files, pictures on the web: what a data entry may say of its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import png, put
from typer.testing import CliRunner

from errors import refused
from opticnerve.cli.main import app
from opticnerve.data.dataset.load import load_data, stream_data
from opticnerve.data.formats.columns import Columns, filled, paths_of
from opticnerve.recipe.loading import data_entry
from opticnerve.types import Conversation, DataError, RecipeError, TextPart


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(png("red" if name == "1.png" else "blue"))
    return tmp_path


def tried(path: Path, **options: Any) -> tuple[list[Conversation], list[DataError]]:
    bad: list[DataError] = []
    return list(stream_data(data_entry({"path": str(path), **options}), on_error=bad.append)), bad


def only(folder: Path, row: Any, name: str = "d.json", **options: Any) -> Conversation:
    put(folder / name, [row] if isinstance(row, dict) else row)
    found, bad = tried(folder / name, **options)
    assert not bad, bad
    (again,) = load_data(data_entry({"path": str(folder / name), **options}))
    assert again == found[0]
    return found[0]


def said(conversation: Conversation) -> list[list[str]]:
    return [
        [p.text if isinstance(p, TextPart) else Path(str(p.source)).name for p in m.parts]
        for m in conversation.messages
    ]  # type: ignore[union-attr]


class TestMap:
    def test_paths_constants_lists_and_texts(self, folder: Path) -> None:
        row = {
            "meta": {"file": "1.png", "tags": ["x"]},
            "dialog": [{"q": "what?"}],
            "note": json.dumps({"a": {"b": "red"}}),
        }
        columns = {"image": "meta.file", "question": "dialog.0.q", "answer": "note.a.b", "type": "=colour"}
        found = only(folder, row, columns=columns)
        assert (said(found), found.meta["type"]) == ([["1.png", "what?"], ["red"]], "colour")
        both = only(folder, {"a": "1.png", "b": "2.png", "q": "same?", "r": "no"},
                    columns={"images": ["a", "b"], "question": "q", "answer": "r"})  # fmt: skip
        assert said(both) == [["1.png", "2.png", "same?"], ["no"]]

    def test_what_is_not_mapped_is_used_or_refused_as_ever(self, folder: Path) -> None:
        row = {"meta": {"file": "1.png", "other": "2.png"}, "q": "what?", "a": "red", "weight": 0}
        put(folder / "d.json", [row])
        columns = {"image": "meta.file", "question": "q", "answer": "a"}
        _, bad = tried(folder / "d.json", columns=columns)
        assert [e.kind for e in bad] == ["unused-field"] and "meta.other" in bad[0].problem
        _, bad = tried(folder / "d.json", columns=columns, ignore=["other"])
        assert [e.kind for e in bad] == ["no-assistant-turn"]

    def test_a_field_in_whose_place_another_is_put_is_named(self, folder: Path) -> None:
        row = {"image": "1.png", "question": "what?", "long": "what is it?", "answer": "red"}
        put(folder / "d.json", [row])
        _, bad = tried(folder / "d.json", columns={"question": "long"})
        assert [e.kind for e in bad] == ["unused-field"] and "ignore: [question]" in bad[0].remedy
        found = only(folder, row, columns={"question": "long"}, ignore=["question"])
        assert said(found)[0] == ["1.png", "what is it?"]
        assert said(only(folder, row, columns={"question": "{question} {long}"}))[0] == ["1.png", "what? what is it?"]

    def test_a_path_that_no_record_has(self, folder: Path) -> None:
        put(folder / "d.json", [{"image": "1.png", "query": "what?", "answer": "red"}])
        with refused("missing-field", "columns.question", "qery", "query", error=DataError):
            tried(folder / "d.json", columns={"question": "qery"})

    def test_turns_and_speakers(self, folder: Path) -> None:
        row = {"image": "1.png", "dialog": [{"speaker": "USER", "text": "what?"}, {"speaker": "bot", "text": "red"}]}
        columns = {"messages": "dialog", "messages.role": "speaker", "messages.content": "text"}
        found = only(folder, row, columns=columns, roles={"USER": "user", "bot": "assistant"})
        assert said(found) == [["1.png", "what?"], ["red"]]
        put(folder / "d.json", [row])
        _, bad = tried(folder / "d.json", columns=columns)
        assert [e.kind for e in bad] == ["unknown-role"] and "roles" in bad[0].remedy

    def test_the_error_prints_the_map_that_fits(self, folder: Path) -> None:
        put(folder / "d.json", [{"imageId": "1", "Problem": "what?", "Response": "red"}])
        with refused(
            "format", 'columns: {image: "{imageId}.png", question: Problem, answer: Response}', error=DataError
        ):
            tried(folder / "d.json")
        found = only(folder, {"imageId": "1", "Problem": "what?", "Response": "red"},
                     columns={"image": "{imageId}.png", "question": "Problem", "answer": "Response"})  # fmt: skip
        assert said(found) == [["1.png", "what?"], ["red"]]
        put(folder / "d.json", [{"turns": [{"speaker": "user", "text": "what?"}]}])
        with refused("format", "messages: turns, messages.role: speaker, messages.content: text", error=DataError):
            tried(folder / "d.json")
        put(folder / "d.json", [{"image_id": 1, "question": "what?", "answer": "red"}])
        _, bad = tried(folder / "d.json")
        assert 'columns: {image: "{image_id}.png"}' in bad[0].remedy

    def test_on_the_command_line(self, folder: Path) -> None:
        put(folder / "d.json", [{"file": "1", "hint": "Look.", "query": "what?", "answer": "red"}])
        options = ["columns.image={file}.png", r"columns.question={hint}\n{query}", "ignore=[hint]"]
        done = CliRunner().invoke(app, ["data", "check", str(folder / "d.json"), *options, "--json"])
        assert (done.exit_code, json.loads(done.stdout)["good"]) == (0, 1), done.output
        with pytest.raises(RecipeError) as caught:
            data_entry({"path": "x"}, ["format=vqaa"])
        assert "vqa" in str(caught.value)

    @pytest.mark.parametrize("source", ["{open", "close}", "{a:b}", "{a:2x}", "", "{}"])
    def test_what_is_no_template(self, source: str) -> None:
        with refused("columns", "columns.question", error=DataError):
            Columns({"question": source})

    @given(
        st.text(max_size=20),
        st.dictionaries(st.sampled_from("abc"), st.none() | st.text(max_size=3) | st.integers(), max_size=3),
    )
    def test_a_template_is_filled_or_refused(self, template: str, record: dict[str, Any]) -> None:
        try:
            Columns({"question": template})
            paths_of(template)
            filled(template, record)
        except DataError:
            pass


class TestTemplates:
    ROW = {"image": "1.png", "question": "which?", "choices": ["cat", "dog"], "answer": 1, "hint": ""}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("question", "words"),
        [
            ("{hint}\n{question}\n{choices}", "which?\nA. cat\nB. dog"),
            (r"{question}\n{choices:letters}\nAnswer with the letter.", "which?\nA. cat\nB. dog\nAnswer with the letter."),
            ("{question} ({choices:words})", "which? (cat, dog)"), ("{{{question}}}", "{which?}"), ("{hint}{question}", "which?"),
        ],
    )  # fmt: skip
    def test_words(self, folder: Path, question: str, words: str) -> None:
        found = only(folder, self.ROW, columns={"question": question})
        assert (found.messages[0].text, found.answer, found.meta["choices"]) == (words, "dog", ["cat", "dog"])

    @pytest.mark.parametrize("answer", [1, "B", "dog"])
    def test_the_letter_is_learned(self, folder: Path, answer: Any) -> None:
        columns = {"question": "{question}\n{choices}", "answer": "{answer:letter}"}
        found = only(folder, {**self.ROW, "answer": answer}, columns=columns)
        assert (found.answer, found.meta["choices"]) == ("B", ["A", "B"])
        assert found.messages[0].text == "which?\nA. cat\nB. dog"

    def test_a_text_as_a_place(self, folder: Path) -> None:
        put(folder / "d.json", [{**self.ROW, "answer": "1"}])
        _, bad = tried(folder / "d.json")
        assert [e.kind for e in bad] == ["choices"] and "{answer:place}" in bad[0].remedy
        assert only(folder, {**self.ROW, "answer": "1"}, columns={"answer": "{answer:place}"}).answer == "dog"

    def test_numbers_with_zeros_and_pictures_that_are_not_there(self, folder: Path) -> None:
        put(
            folder / "d.json",
            [{"n": 1, "question": "what?", "answer": "red"}, {"n": None, "question": "why?", "answer": "so"}],
        )
        (folder / "0001.png").write_bytes(png())
        found, bad = tried(folder / "d.json", columns={"image": "{n:04d}.png"})
        assert [said(c)[0] for c in found] == [["0001.png", "what?"], ["why?"]] and not bad
        put(folder / "d.json", [{"n": "one", "question": "what?", "answer": "red"}])
        _, bad = tried(folder / "d.json", columns={"image": "{n:04d}.png"})
        assert [e.kind for e in bad] == ["columns"]


class TestRows:
    def test_text_alone_among_questions(self, folder: Path) -> None:
        rows = [
            {"image": "1.png", "question": "what?", "answer": "red"},
            {"image": None, "question": "2?", "answer": "b"},
        ]
        put(folder / "d.jsonl", [*rows, {"question": "3?", "answer": "c"}])
        found, bad = tried(folder / "d.jsonl")
        assert [len(c.images) for c in found] == [1, 0] and [e.kind for e in bad] == ["missing-field"]
        put(folder / "d.csv", "image,question,answer\n1.png,what?,red\n,why?,so\n")
        assert [len(c.images) for c in tried(folder / "d.csv")[0]] == [1, 0]

    def test_a_list_that_is_called_jsonl(self, folder: Path) -> None:
        row = {"image": "1.png", "caption": "red"}
        for text in (json.dumps([row, row]), json.dumps([row, row], indent=1)):
            (folder / "d.jsonl").write_text(text)
            assert len(tried(folder / "d.jsonl")[0]) == 2

    def test_a_cell_of_any_length(self, folder: Path) -> None:
        import base64

        data = png() + b"x" * 600_000
        for written in (base64.b64encode(data).decode(), f'"{base64.encodebytes(data).decode()}"'):
            (folder / "d.tsv").write_text(f"image\tcaption\n{written}\tred\n1.png\tred\n")
            assert [c.images[0].source for c in tried(folder / "d.tsv")[0]] == [data, folder / "1.png"]

    def test_quotes_that_do_not_close(self, folder: Path) -> None:
        text = 'image\tcaption\n1.png\t"open\n1.png\tred\n2.png\tblue\n'
        (folder / "d.tsv").write_text(text)
        found, bad = tried(folder / "d.tsv")
        assert len(found) == 2 and [e.kind for e in bad] == ["csv"] and "close-quotes" in bad[0].remedy
        found, bad = tried(folder / "d.tsv", repair=["close-quotes"])
        assert [c.answer for c in found] == ["open", "red", "blue"] and not bad
        assert [c.meta.get("repaired") for c in found] == [["close-quotes"], None, None]

    def test_splits_side_by_side_in_one_file(self, folder: Path) -> None:
        rows = [{"image": "1.png", "caption": s, "split": s} for s in ("train", "restval", "test")]
        put(folder / "d.json", rows)
        with refused("format", "train", "restval", "hub_split", error=DataError):
            tried(folder / "d.json")
        assert [c.answer for c in tried(folder / "d.json", hub_split="test")[0]] == ["test"]
        assert [c.answer for c in tried(folder / "d.json", hub_split="train+restval")[0]] == ["train", "restval"]
        assert len(tried(folder / "d.json", ignore=["split"])[0]) == 3

    def test_a_layout_puts_nothing_in_the_place_of_what_is_there(self, folder: Path) -> None:
        for words in ({"text": "red"}, {"caption": "red"}):
            found = only(folder, {"picture": "1.png", "url": "https://x.org/2.png", **words})
            assert said(found) == [["1.png"], ["red"]]

    def test_boxes_are_refused_by_name(self, folder: Path) -> None:
        row = {"messages": [{"role": "user", "content": "find <bbox>"}, {"role": "assistant", "content": "x"}],
               "objects": {"bbox": [[1, 2, 3, 4]]}}  # fmt: skip
        put(folder / "d.json", [row])
        _, bad = tried(folder / "d.json")
        assert [e.kind for e in bad] == ["unused-field"] and "objects" in bad[0].problem


class TestRepairs:
    def test_each_is_counted(self, folder: Path) -> None:
        say = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "see <image>"},
               {"role": "assistant", "content": "red"}]  # fmt: skip
        put(folder / "d.jsonl", [{"messages": say, "images": ["1.png"]}, {"messages": say[2:], "images": ["1.png"]}])
        repair = ["drop-leading-assistant", "fold-system", "picture-first"]
        found, bad = tried(folder / "d.jsonl", repair=repair)
        assert not bad and said(found[0]) == [["1.png", "S\n\n", "see "], ["red"]]
        assert [c.meta["repaired"] for c in found] == [repair, ["picture-first"]]
        done = CliRunner().invoke(
            app, ["data", "check", str(folder / "d.jsonl"), f"repair={json.dumps(repair)}", "--json"]
        )
        assert json.loads(done.stdout)["repaired"] == {
            "drop-leading-assistant": 1,
            "fold-system": 1,
            "picture-first": 2,
        }
        assert [e.kind for e in tried(folder / "d.jsonl")[1]] == ["assistant-first"]


class TestSecondFile:
    QUESTIONS = {"questions": [{"question_id": n, "image": "1.png", "question": f"{n}?"} for n in range(3)]}  # noqa: RUF012

    def test_in_any_order_and_what_is_missing(self, folder: Path) -> None:
        put(folder / "q.json", self.QUESTIONS)
        with refused("format", "annotations", error=DataError):
            tried(folder / "q.json")
        put(folder / "a.jsonl", [{"question_id": n, "answer": f"a{n}"} for n in (2, 0)])
        options = {"annotations": str(folder / "a.jsonl")}
        found, bad = tried(folder / "q.json", **options)
        assert [c.answer for c in found] == ["a0", "a2"] and [e.kind for e in bad] == ["missing-field"]
        samples = load_data(data_entry({"path": str(folder / "q.json"), **options}), on_error=bad.append)
        assert [c.answer for c in samples] == ["a0", "a2"]

    def test_what_does_not_belong_together(self, folder: Path) -> None:
        put(folder / "q.json", self.QUESTIONS)
        options = {"annotations": str(folder / "a.jsonl")}
        put(folder / "a.jsonl", [{"question_id": 0, "answer": "a"}] * 2)
        with refused("format", "question_id 0", error=DataError):
            tried(folder / "q.json", **options)
        put(folder / "a.jsonl", [{"number": 0, "answer": "a"}])
        with refused("format", "question_id", error=DataError):
            tried(folder / "q.json", **options)
        put(folder / "a.jsonl", [{"question_id": n, "image": f"{1 + n // 2}.png", "answer": "a"} for n in range(3)])
        _, bad = tried(folder / "q.json", **options)
        assert [e.kind for e in bad] == ["conflict"]
