"""What the tabs do without a browser: models on offer, pictures looked at, questions asked, two models compared."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

import tiny
from errors import refused
from opticnerve.data.media.video import in_order
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.types import Frame, ImagePart, ask
from opticnerve.ui.chat import Asker, ChatState, Refused, alert, check_picture, check_video, stream
from opticnerve.ui.compare import compare
from opticnerve.ui.i18n import Translations
from opticnerve.ui.look import AUTO, see
from opticnerve.ui.models import Models, PageLimits

EN, JA = Translations("en"), Translations("ja")
LIMITS = PageLimits(upload_bytes=22_000, pixels=10_000, question_characters=50, answer_tokens=16)


@pytest.fixture
def asker(two_models: list[str]) -> Asker:
    return Asker(Models(two_models), EN, LIMITS)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    tiny.picture(0, 80).save(path)
    return str(path)


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_wrong_name_is_found_before_the_page_opens(tmp_path: Path) -> None:
    with refused("missing-file", tmp_path):
        Models([str(tmp_path)])


def test_a_run_is_offered_with_its_stages_once_they_have_ended(two_models: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "begun" / "stages").mkdir(parents=True)
    models = Models(two_models[:1], runs=runs)
    assert models.choices() == two_models[:1]
    for number, stage in enumerate(("0-align", "1-instruct")):
        folder = runs / "ended" / "stages" / stage
        shutil.copytree(two_models[number], folder)
        (folder / "dock.json").write_text("{}")
    ended = runs / "ended"
    assert models.choices() == [
        two_models[0], str(ended), str(ended / "stages/0-align"), str(ended / "stages/1-instruct")
    ]  # fmt: skip
    (ended / "stages/1-instruct/config.json").write_text("{")  # damaged: not on offer
    assert str(ended / "stages/1-instruct") not in models.choices()


def test_what_is_not_offered_is_not_loaded(two_models: list[str]) -> None:
    models = Models(two_models[:1])
    with refused("unknown-name", two_models[1]), models.turn(two_models[1]):
        pass
    with models.turn(two_models[0]):  # and the turn is free again
        pass


def test_no_more_models_than_asked_for_stay_in_memory(two_models: list[str]) -> None:
    models = Models(two_models, keep=1)
    for name in two_models:
        with models.turn(name):
            assert models.is_loaded(name)
    assert not models.is_loaded(two_models[0])


def test_a_float32_model_serves_for_looking_too(two_models: list[str]) -> None:
    models = Models(two_models)
    with models.turn(two_models[0]) as answerer:
        assert models.is_loaded(two_models[0])
    with models.turn(two_models[0], exact=True) as again:
        assert again is answerer


def test_one_model_works_at_a_time(asker: Asker, two_models: list[str]) -> None:
    states = asker.emit(two_models[0], ChatState(), "yes?", None, 16, 0.0)
    next(states)  # what was asked
    next(states)  # the first piece: the turn is taken
    entered = threading.Event()

    def other() -> None:
        with asker.models.turn(two_models[1]):
            entered.set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert not entered.wait(0.3)
    states.close()  # type: ignore[attr-defined]  # as when the visitor leaves or presses Stop
    assert entered.wait(60)
    thread.join()


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [(EN, "cannot be read"), (JA, "読めません")], ids=["en", "ja"])
@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\nnothing more", b"<svg/>"])
def test_what_is_no_picture_is_refused_in_the_pages_language(
    tmp_path: Path, words: Translations, said: str, content: bytes
) -> None:
    path = tmp_path / "secret-name.png"
    path.write_bytes(content)
    with refused("damaged", said, error=Refused) as raised:
        check_picture(str(path), words, LIMITS)
    assert "secret-name" not in str(raised.value)  # where it lies on the server is nobody's business


def test_a_picture_that_is_cut_off_is_refused(picture: str) -> None:
    path = Path(picture)
    path.write_bytes(path.read_bytes()[:-600])
    with refused("damaged", "PNG", error=Refused):
        check_picture(picture, EN, LIMITS)


def test_too_many_pixels_or_bytes_are_refused_with_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    PIL.Image.new("RGB", (200, 100)).save(path)
    with refused("too-large", "200 × 100", "10,000", error=Refused):
        check_picture(str(path), EN, LIMITS)
    tiny.picture(0, 90).save(path)
    with refused("too-large", "22,000", error=Refused):
        check_picture(str(path), EN, LIMITS)


def test_a_good_picture_and_none_are_fine(picture: str) -> None:
    check_picture(picture, EN, LIMITS)
    check_picture(None, EN, LIMITS)


def test_messages_cannot_bring_html_along() -> None:
    assert "<script>" not in alert("<script>alert(1)</script>")


# -- conversations ----------------------------------------------------------------------------------------------------


def test_the_answer_is_the_packages_own_and_grows(asker: Asker, two_models: list[str], picture: str) -> None:
    states = [
        chat_state
        for chat_state, _ in asker.emit(two_models[0], ChatState(), " is there a blue square? ", picture, 16, 0.0)
    ]
    asked, answers = states[0], [t.messages[-1].text for t in states[1:]]
    assert asked.messages[-1].text == "is there a blue square?"
    assert len(answers) > 1
    assert all(b.startswith(a) for a, b in zip(answers, answers[1:], strict=False))
    answerer = Answerer(*load_model(two_models[0]))
    assert [answers[-1]] == answerer.answer([ask("is there a blue square?", Path(picture))], max_new_tokens=16)


def test_a_picture_comes_with_one_question_and_is_remembered(picture: str) -> None:
    chat_state = ChatState().asked("is there a blue square?", picture).answered("a dog").asked("sure?", picture)
    assert [len([p for p in m.parts if isinstance(p, ImagePart)]) for m in chat_state.messages] == [1, 0, 0]
    assert [b["role"] for b in chat_state.bubbles("a picture")] == ["user", "user", "assistant", "user"]
    assert chat_state.bubbles("a picture")[0]["content"] == {"path": picture, "alt_text": "a picture"}


def test_look_explains_what_was_said_since_the_last_picture(picture: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.png")
    chat_state = (
        ChatState().asked("one?", picture).answered("1").asked("two?", other).answered("2").asked("three?", None)
    )
    found = chat_state.answered("3").about_last_picture()
    assert found is not None
    assert [m.text for m in found.messages] == ["two?", "2", "three?"]
    assert [str(i.source) for i in found.images] == [other]
    assert ChatState().asked("no picture?", None).about_last_picture() is None


@pytest.mark.parametrize(
    ("question", "kind", "said"), [("  ", "empty", "Write a question"), ("x" * 51, "too-long", "51 characters")]
)
def test_no_question_and_one_that_is_too_long_are_refused(
    asker: Asker, two_models: list[str], question: str, kind: str, said: str
) -> None:
    with refused(kind, said, error=Refused):
        list(asker.emit(two_models[0], ChatState(), question, None, 16, 0.0))


def test_closing_the_stream_stops_the_model() -> None:
    class Endless:
        closed = False

        def stream(self, *args: Any, **options: Any) -> Any:
            try:
                while True:
                    yield "word "
            finally:
                self.closed = True

    answerer = Endless()
    pieces = stream(answerer, ChatState().asked("?", None), tokens=5)
    assert [next(pieces), next(pieces)] == ["word", "word word"]
    pieces.close()  # type: ignore[attr-defined]
    assert answerer.closed


# -- videos -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """Twelve frames, of which a model is shown eight."""
    first, *rest = (tiny.picture(i, 20) for i in range(12))
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=100)
    return str(tmp_path / "clip.gif")


def test_a_video_is_answered_as_on_the_command_line_and_shown_once(
    asker: Asker, two_models: list[str], clip: str
) -> None:
    *_, (chat_state, _) = asker.emit(two_models[0], ChatState(), "what moves?", None, 16, 0.0, clip)
    answerer = Answerer(*load_model(two_models[0]))
    frames = in_order(Path(clip), answerer.processor.frames)
    assert [chat_state.messages[-1].text] == answerer.answer([ask("what moves?").shown(frames)], max_new_tokens=16)
    bubbles = chat_state.bubbles("a picture")
    assert [b["content"] for b in bubbles[:2]] == [{"path": clip, "alt_text": "a picture"}, "what moves?"]
    assert chat_state.about_last_picture() is None  # maps are of pictures
    *_, (again, _) = asker.emit(two_models[0], chat_state, "sure?", None, 16, 0.0, clip)
    shown = [sum(isinstance(p, ImagePart) for p in m.parts) for m in again.messages]
    assert shown == [8, 0, 0, 0]  # it came with one question and is remembered


def test_a_model_is_shown_the_frames_that_its_training_took(asker: Asker, two_models: list[str], clip: str) -> None:
    with asker.models.turn(two_models[0]) as answerer:
        answerer.processor.frames = {"fps": 5, "max": 4}
    *_, (chat_state, _) = asker.emit(two_models[0], ChatState(), "what moves?", None, 16, 0.0, clip)
    frames = [p for p in chat_state.messages[0].parts if isinstance(p, ImagePart)]
    assert [p.source.timed for p in frames if isinstance(p.source, Frame)] == [True] * 4
    assert frames[1].timestamp


@pytest.mark.parametrize(("words", "said"), [(EN, "cannot be read"), (JA, "読めません")], ids=["en", "ja"])
def test_what_is_no_video_is_refused_in_the_pages_language(tmp_path: Path, words: Translations, said: str) -> None:
    for name, content in {"secret-name.gif": b"GIF89a", "secret-name.mp4": b"no video"}.items():
        (tmp_path / name).write_bytes(content)
        with refused("damaged", said, error=Refused) as raised:
            check_video(str(tmp_path / name), words, LIMITS)
        assert "secret-name" not in str(raised.value)


def test_a_video_of_too_many_pixels_or_bytes_is_refused_with_both_numbers(clip: str) -> None:
    check_video(clip, EN, LIMITS)
    check_video(None, EN, LIMITS)
    with refused("too-large", "4,800", "4,000", error=Refused):
        check_video(clip, EN, PageLimits(video_pixels=4_000))
    with refused("too-large", f"{Path(clip).stat().st_size:,}", "1,000", error=Refused):
        check_video(clip, EN, PageLimits(upload_bytes=1000))


# -- looking ----------------------------------------------------------------------------------------------------------


def test_maps_of_a_word_stand_beside_an_occlusion_map(asker: Asker, two_models: list[str], picture: str) -> None:
    conversation = ChatState().asked("is there a blue square?", picture).about_last_picture()
    assert conversation is not None
    seen = see(asker.models, two_models[0], conversation, AUTO)
    assert len(seen.looked.words) > 1
    first, second = (seen.drawings(number) for number in (0, 1))
    assert len(first) == 2
    assert first[0].tobytes() != second[0].tobytes()
    assert seen.looked.words[0].text in seen.described(0, EN)
    assert "occlusion" in seen.described(0, JA)
    assert len(see(asker.models, two_models[0], conversation, "occlusion").drawings(0)) == 1


def test_a_method_that_the_model_has_no_part_for_is_an_error(asker: Asker, two_models: list[str], picture: str) -> None:
    conversation = ChatState().asked("is it?", picture).about_last_picture()
    assert conversation is not None
    with refused("unsupported", "cross-attention"):
        see(asker.models, two_models[0], conversation, "cross_attention")


# -- comparing --------------------------------------------------------------------------------------------------------


def test_both_models_answer_as_they_do_alone(asker: Asker, two_models: list[str], picture: str) -> None:
    states = list(compare(asker, (two_models[0], two_models[1]), "is there a blue square?", picture, 16))
    for side, name in enumerate(two_models):
        said, doing = states[-1][side]
        assert "took" not in doing
        assert doing
        answerer = Answerer(*load_model(name))
        assert [said] == answerer.answer([ask("is there a blue square?", Path(picture))], max_new_tokens=16)
    assert states[0][1][0] == ""  # the second waits for the first


def test_what_goes_wrong_with_one_model_stands_on_its_side(asker: Asker, two_models: list[str]) -> None:
    states = list(compare(asker, ("nowhere", two_models[1]), "yes?", None, 16))
    (said_a, doing_a), (said_b, doing_b) = states[-1]
    assert (said_a, "alert" in doing_a) == ("", True)
    assert said_b
    assert "alert" not in doing_b
