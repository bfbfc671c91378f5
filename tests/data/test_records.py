"""What a record says is used or is an error that names it: media, tags, flags, choices; whatever the format."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opticnerve.data.dataset.read import read
from opticnerve.data.formats.names import Tag, kind_by_name, split
from opticnerve.types import AudioPart, Conversation, DataError, ImagePart, TextPart

SAID = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
FORMS: dict[str, dict[str, Any]] = {
    "chat": {"messages": SAID},
    "llava": {"conversations": TURNS},
    "vqa": {"question": "what?", "answer": "red"},
    "captions": {"caption": "red", "prompt": "what?"},
    "preference": {"prompt": "what?", "chosen": "red", "rejected": "blue"},
    "preference-messages": {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": "blue"},
    "completion": {"prompt": "what?", "completion": "red"},
    "completion-messages": {"prompt": SAID[:1], "completion": SAID[1:]},
}
TEXT_ALONE = [name for name in FORMS if name not in ("vqa", "captions")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for name in ("1.png", "2.png"):
        PIL.Image.new("RGB", (4, 4), "red").save(folder / name)
    for name in ("a.wav", "v.mp4"):
        (folder / name).write_bytes(b"not looked at")
    return folder


def tried(folder: Path, record: Any, **options: Any) -> tuple[list[Conversation], list[DataError]]:
    path = folder / "d.jsonl"
    path.write_text((record if isinstance(record, str) else json.dumps(record)) + "\n")
    bad: list[DataError] = []
    return list(read(path, on_error=bad.append, **options)), bad


def only(folder: Path, record: Any, **options: Any) -> Conversation:
    found, bad = tried(folder, record, **options)
    assert not bad, bad
    return found[0]


def refused(folder: Path, record: Any, **options: Any) -> DataError:
    """The one error, whether the record or the file is refused."""
    try:
        found, bad = tried(folder, record, **options)
    except DataError as e:
        return e
    assert not found and len(bad) == 1
    return bad[0]


def shown(conversation: Conversation, message: int = 0) -> list[str]:
    """The parts of a message, media as their files' names."""
    return [
        p.text if isinstance(p, TextPart) else Path(getattr(p.source, "source", p.source)).name  # type: ignore[arg-type]
        for p in conversation.messages[message].parts
    ]


class TestFields:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "key",
        ["image", "images", "img", "image_path", "imagePath", "image_url", "picture", "photo", "file_name", "Image"],
    )
    @pytest.mark.parametrize("many", [False, True])
    def test_a_picture_stands_before_the_first_question(self, folder: Path, form: str, key: str, many: bool) -> None:
        found = only(folder, {key: ["1.png", "2.png"] if many and key != "file_name" else "1.png", **FORMS[form]})
        pictures = ["1.png", "2.png"] if many and key != "file_name" else ["1.png"]
        assert (shown(found), found.messages[1].text) == ([*pictures, "what?"], "red")

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("key", "file", "kind"), [("video", "v.mp4", ImagePart), ("videos", "v.mp4", ImagePart),
                                                       ("audio", "a.wav", AudioPart), ("sound", "a.wav", AudioPart)])  # fmt: skip
    def test_videos_and_sounds_are_no_less(self, folder: Path, form: str, key: str, file: str, kind: type) -> None:
        found = only(folder, {key: file, **FORMS[form]}, frames=2)
        assert [type(p) for p in found.messages[0].parts] == [kind] * (2 if kind is ImagePart else 1) + [TextPart]

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "extra",
        [{"thumb": "2.png"}, {"url": ["2.png"]}, {"meta": {"image": "2.png"}}, {"mask": {"bytes": None, "path": "2.png"}},
         {"clip": "v.mp4"}, {"narration": "a.wav"}, {"scan": "data:image/png;base64,AA=="}, {"picture": "2.png"}],
    )  # fmt: skip
    def test_what_is_not_used_is_named(self, folder: Path, form: str, extra: dict[str, Any]) -> None:
        record = {"image": "1.png", **FORMS[form], **extra}
        error = refused(folder, record)
        assert error.kind == "unused-field" and next(iter(extra)) in error.problem
        assert shown(only(folder, record, ignore=list(extra))) == ["1.png", "what?"]

    @pytest.mark.parametrize("form", TEXT_ALONE)
    @pytest.mark.parametrize("extra", [{"image_id": 7}, {"url": "https://x.org/1.jpg"}])
    def test_what_points_at_a_picture_that_is_not_there(self, folder: Path, form: str, extra: dict[str, Any]) -> None:
        assert refused(folder, {**FORMS[form], **extra}).kind == "unused-field"
        assert only(folder, {**FORMS[form], **extra, "image": "1.png"}).images  # it says where that came from

    @pytest.mark.parametrize("form", TEXT_ALONE)
    @pytest.mark.parametrize(
        "value", [None, "", [], [None], {}, {"bytes": None, "path": None}, [{"bytes": None, "path": None}]]
    )
    def test_nothing_names_nothing(self, folder: Path, form: str, value: Any) -> None:
        assert not only(folder, {**FORMS[form], "image": value, "videos": value, "img_path": value}).pieces

    def test_the_same_file_may_be_named_again(self, folder: Path) -> None:
        record = {"image": {"bytes": None, "path": "1.png"}, "file_name": "/there/1.png", "url": "http://x.org/z/1.png"}
        assert shown(only(folder, {**FORMS["vqa"], **record})) == ["1.png", "what?"]

    def test_numbered_fields_are_a_list(self, folder: Path) -> None:
        record = {"image_2": "2.png", "image_1": "1.png", "question": "<image 1> or <image 2>?", "answer": "red"}
        assert shown(only(folder, record)) == ["1.png", " or ", "2.png", "?"]

    def test_within_a_message_or_a_part(self, folder: Path) -> None:
        for message in ({**SAID[0], "images": ["1.png"]}, {"role": "user", "content": [{"type": "text", "text": "?", "image": "1.png"}]}):  # fmt: skip
            assert "image" in refused(folder, {"messages": [message, SAID[1]]}).problem

    @pytest.mark.parametrize("before", ["", "data:image/png;base64,"])
    @pytest.mark.parametrize("form", ["plain", "lines", "unpadded", "url-safe"])
    def test_base64_as_people_write_it(self, folder: Path, form: str, before: str) -> None:
        out = io.BytesIO()
        PIL.Image.effect_noise((30, 30), 90).save(out, "PNG")
        data = out.getvalue() + b"x" * (2 - len(out.getvalue()) % 3)  # so that there is padding
        written = {
            "plain": base64.b64encode, "lines": base64.encodebytes, "url-safe": base64.urlsafe_b64encode,
            "unpadded": lambda d: base64.b64encode(d).rstrip(b"="),
        }[form](data).decode()  # fmt: skip
        assert only(folder, {**FORMS["vqa"], "image": before + written}).images[0].source == data
        error = refused(folder, {**FORMS["vqa"], "image": before + "".join(written.split())[:81]})
        assert error.kind == "unreadable-image" and "replace the picture" in error.remedy and len(str(error)) < 400

    @given(st.text(max_size=30), st.sampled_from(["image", "photo_path", "VideoURL", "audio-file"]))
    def test_names_with_other_words_say_nothing_by_themselves(self, more: str, key: str) -> None:
        assert kind_by_name(key) and kind_by_name(f"{key}_caption{more}") is None


class TestTags:
    @pytest.mark.parametrize(
        "tag",
        ["<image>", "<img>", "<Image>", "<|image|>", "<|image_1|>", "<image_1>", "<image 1>", "<image_00>", "<ImageHere>",
         "[IMG]", "[IMAGE]", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<image_placeholder>",
         "<start_of_image>", "<image_soft_token>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<Img><ImageHere></Img>",
         "<image>./</image>", "<picture>", "<|begin_of_image|><|image|><|end_of_image|>", "<im_start><image><im_end>"],
    )  # fmt: skip
    @pytest.mark.parametrize("form", FORMS)
    def test_a_place_for_the_picture(self, folder: Path, form: str, tag: str) -> None:
        record = json.loads(json.dumps(FORMS[form]).replace("what?", f"See {tag}: what?"))
        assert shown(only(folder, {**record, "image": "1.png"})) == ["See ", "1.png", ": what?"]
        if form in TEXT_ALONE:
            assert refused(folder, record).kind == "placeholder-without-image"
        two = refused(folder, {**record, "images": ["1.png", "2.png"]})
        assert two.kind == "image-without-placeholder"

    @pytest.mark.parametrize(
        ("words", "kinds"),
        [("<video>", ["video"]), ("<|vision_start|><|video_pad|><|vision_end|>", ["video"]), ("<audio>", ["audio"]),
         ("<|audio_bos|><|AUDIO|><|audio_eos|>", ["audio"]), ("<sound><image>", ["audio", "image"])],
    )  # fmt: skip
    def test_other_media(self, words: str, kinds: list[str]) -> None:
        assert [p.kind for p in split(words) if isinstance(p, Tag)] == kinds

    @pytest.mark.parametrize("words", ["a < image > b", "<imagery>", "<|im_start|>user", "if x<img and y>2", "[image]"])
    def test_what_is_none(self, words: str) -> None:
        assert split(words) == [words]

    @pytest.mark.parametrize("form", TEXT_ALONE)
    def test_a_path_in_the_words(self, folder: Path, form: str) -> None:
        for tag in ("<img>1.png</img>", '<img src="1.png" width=3>'):
            words = json.dumps(f"Picture 1: {tag}\nwhat?")[1:-1]
            record = json.loads(json.dumps(FORMS[form]).replace("what?", words))
            assert shown(only(folder, record)) == ["Picture 1: ", "1.png", "what?"]
        gone = json.loads(json.dumps(FORMS[form]).replace("what?", "<video>no.mp4</video>"))
        assert refused(folder, gone).kind == "missing-video"

    def test_in_turns_each_at_its_place(self, folder: Path) -> None:
        turns = ["<image>one?", "red", "two?<image>", "blue"]
        said = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, turns, strict=True)]
        found = only(folder, {"messages": said, "images": ["2.png", "1.png"]})
        assert [shown(found, 0), shown(found, 2)] == [["2.png", "one?"], ["two?", "1.png"]]

    @pytest.mark.parametrize("words", ["<image 1> <image 1>", "<image 2> <image 3>", "<image 1> <image>"])
    def test_numbers_that_do_not_fit(self, folder: Path, words: str) -> None:
        assert refused(folder, {"images": ["1.png", "2.png"], "question": words, "answer": "x"}).kind in (
            "placeholder-without-image", "image-without-placeholder")  # fmt: skip

    @given(st.text("<>/|[]IMGimagevdo_1 srcpt=\"'\n.", max_size=40))
    def test_all_words_are_kept(self, words: str) -> None:
        pieces = split(words)
        kept = "".join(p if isinstance(p, str) else p.text for p in pieces)
        assert kept.replace("\n", "") == words.replace("\n", "")


class TestParts:
    @pytest.mark.parametrize(
        "part",
        [{"type": "image_url", "image_url": {"url": "1.png", "detail": "low"}}, {"type": "image_url", "image_url": "1.png"},
         {"type": "input_image", "image_url": "1.png"}, {"image": "1.png"}, {"type": "image", "path": "1.png"}],
    )  # fmt: skip
    def test_the_ways_to_name_a_picture(self, folder: Path, part: Any) -> None:
        said = {"role": "user", "content": [part, {"type": "input_text", "text": "what?"}]}
        assert shown(only(folder, {"messages": [{"role": "developer", "content": "be brief"}, said, SAID[1]]}), 1) == [
            "1.png", "what?"]  # fmt: skip

    def test_anthropic_and_openai_sound(self, folder: Path) -> None:
        data = base64.b64encode((folder / "1.png").read_bytes()).decode()
        parts = [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
            {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        ]
        found = only(folder, {"messages": [{"role": "user", "content": parts}, SAID[1]]})
        assert [p.source for p in found.pieces] == [(folder / "1.png").read_bytes()] * 2

    def test_a_web_address(self, folder: Path) -> None:
        part = {"type": "image_url", "image_url": {"url": "https://x.org/" + "a" * 5_000}}
        error = refused(folder, {"messages": [{"role": "user", "content": [part]}, SAID[1]]})
        assert error.kind == "url" and len(str(error)) < 700


class TestWhatIsLearned:
    FLAGS = ({"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss_mask": 0}, {"training": "false"},
             {"masked": True})  # fmt: skip

    @pytest.mark.parametrize("flag", FLAGS)
    @pytest.mark.parametrize("form", ["chat", "llava"])
    def test_a_turn_that_is_not(self, folder: Path, form: str, flag: dict[str, Any]) -> None:
        [turns] = json.loads(json.dumps([*FORMS[form].values()]))
        turns += json.loads(json.dumps(turns))
        turns[1] |= flag
        [key] = FORMS[form]
        assert [m.learn for m in only(folder, {key: turns}).messages if m.role == "assistant"] == [False, True]
        turns[3] |= flag
        assert refused(folder, {key: turns}).kind == "no-assistant-turn"

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("flag", FLAGS)
    def test_a_record_that_is_not(self, folder: Path, form: str, flag: dict[str, Any]) -> None:
        assert refused(folder, {"image": "1.png", **FORMS[form], **flag}).kind == "no-assistant-turn"

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("value", [0.5, 2, "half", [1, 2, 3, 4, 5], {"a": 1}])
    def test_what_cannot_be_honoured_is_named(self, folder: Path, form: str, value: Any) -> None:
        record = {"image": "1.png", **FORMS[form], "weight": value}
        error = refused(folder, record)
        assert error.kind == "weight" and "weight" in error.problem
        assert only(folder, record, ignore=["weight"])

    @pytest.mark.parametrize("extra", [{"train_detail": [{"begin": 0}]}, {"weight": 0.3},
                                       {"reasoning_content": "so"}])  # fmt: skip
    def test_of_a_turn(self, folder: Path, extra: dict[str, Any]) -> None:
        error = refused(folder, {"messages": [SAID[0], {**SAID[1], **extra}]})
        assert error.kind == "weight" and next(iter(extra)) in error.problem

    def test_a_list_for_all_turns(self, folder: Path) -> None:
        for mask in ([0, 0, 0, 1], [0, 1]):
            found = only(folder, {"messages": SAID * 2, "loss_mask": mask})
            assert [m.learn for m in found.messages if m.role == "assistant"] == [False, True]
        assert refused(folder, {"messages": SAID, "loss_mask": [1, 1]}).kind == "weight"
        assert refused(folder, {"messages": [{**SAID[0], "train": True}, SAID[1]]}).kind == "weight"

    def test_of_a_prompt_nothing(self, folder: Path) -> None:
        found = only(folder, {"prompt": [*SAID, SAID[0]], "completion": "blue"})
        assert [m.learn for m in found.messages if m.role == "assistant"] == [False, True]


class TestChoices:
    @pytest.mark.parametrize(
        ("choices", "answer", "words"),
        [
            (["1", "2", "3", "4"], 1, "2"), (["1", "2", "3"], "1", "1"), (["1", "2"], 1.0, "2"), (["cat", "dog"], "B", "dog"),
            (["cat", "dog"], "(a)", "cat"), (["cat", "dog"], "b.", "dog"), (["cat", "dog"], " dog ", "dog"),
            ([10, 20, 30], 20, "20"), ([0, 1], 1, "1"), (["A", "B"], "B", "B"),
            (["cat", "dog"], "1", None), (["cat", "dog"], 2, None), (["cat", "dog"], True, None), (["cat", "dog"], 0.5, None),
            ([1, 2, 3], 1, None), (["B", "A"], "B", None), (["cat", "dog"], "C", None), (["cat", "dog"], -1, None),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["choices", "options", "letters"])
    def test_words_places_and_letters(self, folder: Path, name: str, choices: Any, answer: Any, words: Any) -> None:
        given_as = dict(zip("ABCD", choices, strict=False)) if name == "letters" else {name: choices}
        record = {"image": "1.png", "question": "which?", "answer": answer, **given_as}
        if words is None:
            assert refused(folder, record).kind == "choices"
        else:
            found = only(folder, record)
            assert (found.answer, found.meta["choices"]) == (words, [str(c) for c in choices])

    def test_options_are_part_of_the_question(self, folder: Path) -> None:
        record = {"image": "1.png", "question": "which?", "answer": "A"}
        for given_as in ({"options": ["cat", "dog"]}, {"A": "cat", "B": "dog"}, {"options": {"A": "cat", "B": "dog"}}):
            assert shown(only(folder, {**record, **given_as})) == ["1.png", "which?\nA. cat\nB. dog"]
        assert shown(only(folder, {**record, "question": "cat or dog?", "options": ["cat", "dog"]}))[1] == "cat or dog?"
        assert refused(folder, {**record, "options": ["cat", "dog"], "choices": ["cat", "cow"]}).kind == "choices"


class TestWords:
    @pytest.mark.parametrize("beside", ["answer", "label", "options", "instruction", "response"])
    def test_text_beside_a_question_is_no_caption(self, folder: Path, beside: str) -> None:
        record = {"image": "1.png", "text": "what?", beside: "red"}
        assert beside in refused(folder, record).problem
        assert refused(folder, record, format="captions").kind == "unused-field"
        assert only(folder, record, format="captions", ignore=[beside]).answer == "what?"

    def test_a_record_s_own_prompt_is_asked(self, folder: Path) -> None:
        record = {"image": "1.png", "caption": "red", "prompt": "say"}
        assert shown(only(folder, record, prompt="describe")) == ["1.png", "say"]

    @pytest.mark.parametrize("beside", ["question", "hint", "context"])
    def test_words_of_the_question_are_not_dropped(self, folder: Path, beside: str) -> None:
        record = {"image": "1.png", "caption": "red", beside: "so?"}
        assert beside in refused(folder, record).problem
        assert only(folder, record, format="captions").answer == "red"  # who names the format knows it

    @pytest.mark.parametrize("form", FORMS)
    def test_system(self, folder: Path, form: str) -> None:
        found = only(folder, {"image": "1.png", **FORMS[form], "system": "be brief"})
        assert (found.messages[0].role, found.messages[0].text) == ("system", "be brief")

    def test_whole_numbers_have_no_point_and_nan_is_missing(self, folder: Path) -> None:
        record = {"image": "1.png", "question": "how many?"}
        assert [only(folder, {**record, "answer": a}).answer for a in (1.0, 2, 2.5)] == ["1", "2", "2.5"]
        assert refused(folder, {**record, "answer": float("nan")}).kind == "missing-field"
        assert only(folder, {**record, "answer": float("nan"), "answers": ["x"]}).answer == "x"


class TestPictures:
    def test_a_png_with_long_notes(self, folder: Path) -> None:
        from PIL.PngImagePlugin import PngInfo

        from opticnerve.data.media.open import image_size, open_image

        for packed in (True, False):
            info = PngInfo()
            for number in range(3):
                info.add_text(f"note {number}", "x" * 2_000_000, zip=packed)
                info.add_itxt(f"other {number}", "x" * 2_000_000, zip=packed)
            PIL.Image.new("RGB", (5, 4), "red").save(folder / "notes.png", pnginfo=info)
            assert open_image(folder / "notes.png").getpixel((0, 0)) == (255, 0, 0)
            assert image_size((folder / "notes.png").read_bytes()) == (4, 5)

    @pytest.mark.parametrize("brightest", [255, 1023, 4095])
    def test_twelve_bits_in_sixteen_are_told(self, folder: Path, brightest: int) -> None:
        from opticnerve.data.media.open import open_image

        PIL.Image.fromarray(np.array([[0, brightest]], dtype=np.uint16)).save(folder / "dark.png")
        with pytest.raises(DataError) as caught:
            open_image(folder / "dark.png")
        assert caught.value.kind == "unreadable-image"
        PIL.Image.fromarray(np.zeros((2, 2), dtype=np.uint16)).save(folder / "dark.png")
        assert open_image(folder / "dark.png").getpixel((0, 0)) == (0, 0, 0)
