"""A chat keeps its history, survives wrong paths and Ctrl-C, and saves what `data check` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from opticnerve.cli.ask import Session
from opticnerve.cli.main import app
from opticnerve.data.dataset.read import read
from opticnerve.types import Conversation, ImagePart


class Echo:
    """Answers in two pieces, and remembers what it was asked."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[Conversation] = []
        self.interrupt_after, self.closed = fail_after, False

    def stream(self, conversation: Conversation, **_: Any) -> Iterator[str]:
        self.asked.append(conversation)
        try:
            for k, piece in enumerate(["answer ", str(len(self.asked))]):
                if self.interrupt_after == k:
                    raise KeyboardInterrupt
                yield piece
        finally:
            self.closed = True


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    PIL.Image.new("RGB", (8, 8), "red").save(path)
    return path


def chat_state(session: Session, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    said = iter(lines)

    def read_line(_: str = "") -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(session.console, "input", read_line)
    session.run()


def test_the_history_goes_along_and_the_picture_once(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    echo = Echo()
    session = Session(answerer=echo)
    session.show_image(picture)
    chat_state(session, monkeypatch, "one?", "two?")
    assert [len(c.messages) for c in echo.asked] == [1, 3]
    assert [i.source for i in echo.asked[1].images] == [picture]
    assert echo.asked[1].messages[1].text == "answer 1"


def test_another_picture_comes_with_the_next_question(
    monkeypatch: pytest.MonkeyPatch, picture: Path, tmp_path: Path
) -> None:
    other = tmp_path / "with a space.png"
    PIL.Image.new("RGB", (8, 8), "blue").save(other)
    echo = Echo()
    session = Session(answerer=echo)
    session.show_image(picture)
    chat_state(session, monkeypatch, "one?", f"/image {other}", "two?")
    assert [i.source for i in echo.asked[1].images] == [picture, other]
    assert isinstance(echo.asked[1].messages[-1].parts[0], ImagePart)


def test_wrong_paths_and_commands_leave_the_session_alive(
    monkeypatch: pytest.MonkeyPatch, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    session = Session(answerer=echo)
    session.show_image(picture)
    chat_state(
        session, monkeypatch, "/image nowhere.png", "/nonsense", "/save", "/save /nowhere/at/all", "/help", "", "still?"
    )
    assert session.picture == picture
    assert len(echo.asked) == 1
    assert capsys.readouterr().err.count("error:") == 4


def test_reset_forgets_the_words_and_keeps_the_picture(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    echo = Echo()
    session = Session(answerer=echo)
    session.show_image(picture)
    chat_state(session, monkeypatch, "one?", "/reset", "two?", "/quit", "three?")
    assert len(echo.asked) == 2
    assert len(echo.asked[1].messages) == 1
    assert len(echo.asked[1].images) == 1


@pytest.mark.parametrize(("after", "kept"), [(0, 0), (1, 2)])
def test_ctrl_c_stops_the_answer_and_keeps_the_session(
    monkeypatch: pytest.MonkeyPatch, picture: Path, after: int, kept: int
) -> None:
    echo = Echo(fail_after=after)
    session = Session(answerer=echo)
    session.show_image(picture)
    chat_state(session, monkeypatch, "one?")
    assert echo.closed
    assert len(session.messages) == kept
    echo.interrupt_after = None
    chat_state(session, monkeypatch, "two?")
    # The picture was shown if anything was said about it, and is shown again if nothing was.
    assert len(echo.asked[1].images) == 1
    assert len(session.messages) == kept + 2


def test_a_saved_chat_is_data(monkeypatch: pytest.MonkeyPatch, picture: Path, tmp_path: Path) -> None:
    session = Session(answerer=Echo())
    session.show_image(picture)
    file = tmp_path / "elsewhere" / "chat.jsonl"
    file.parent.mkdir()
    chat_state(session, monkeypatch, "what is it?", f"/save {file}", "and now?", f"/save {file}")
    assert [len(json.loads(line)["messages"]) for line in file.read_text(encoding="utf-8").splitlines()] == [2, 4]
    first, second = read(file, allow_outside_media=True)
    assert first.answer == "answer 1"
    assert [i.source for i in second.images] == [picture]


def test_ask_shows_a_video_by_the_frames_that_training_took(
    monkeypatch: pytest.MonkeyPatch, picture: Path, tmp_path: Path
) -> None:
    first, *rest = [PIL.Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(4)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=500)
    asked: list[Conversation] = []

    def answer(conversations: list[Conversation], **_: Any) -> list[str]:
        asked.extend(conversations)
        return ["now"]

    answerer = SimpleNamespace(processor=SimpleNamespace(frames={"fps": 1, "max": 8}), answer=answer)
    monkeypatch.setattr("opticnerve.cli.ask.load_answerer", lambda *_: answerer)
    given = ["ask", "run", "when?", "--video", str(tmp_path / "a.gif"), "--image", str(picture)]
    assert CliRunner().invoke(app, given).stdout.strip() == "now"
    assert [i.timestamp for i in asked[0].images] == ["<0.0 seconds>", "<1.0 seconds>", ""]
    assert CliRunner().invoke(app, ["ask", "run", "when?", "--video", str(picture)]).exit_code != 0
