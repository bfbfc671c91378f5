"""The nouns: conversations, their parts, and errors that survive a process border."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opticnerve.types import (
    AudioPart,
    Conversation,
    DataError,
    Features,
    ImagePart,
    Message,
    OpticNerveError,
    RecipeError,
    TextPart,
    ask,
)


def test_ask() -> None:
    chat_state = ask("what?", Path("a.png"), b"bytes", answer="a dog", kind="other")
    assert [i.source for i in chat_state.images] == [Path("a.png"), b"bytes"]
    assert chat_state.messages[0].text == "what?"
    assert chat_state.answer == "a dog"
    assert chat_state.meta == {"kind": "other"}
    assert chat_state.prompt().answer is None
    assert chat_state.prompt().images == chat_state.images
    assert ask("q").answer is None
    assert ask("q").prompt() == ask("q")


def test_chat_format() -> None:
    chat_state = Conversation(
        (
            Message("system", (TextPart("s"),)),
            Message("user", (TextPart("a"), ImagePart(Path("x.png")), TextPart("b"), AudioPart(b"wav"))),
        )
    )
    assert chat_state.to_chat() == [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"}, {"type": "image", "image": "x.png"},
                {"type": "text", "text": "b"}, {"type": "audio", "audio": b"wav"},
            ],
        },
    ]  # fmt: skip
    assert chat_state.messages[1].text == "ab"
    assert [a.source for a in chat_state.audios] == [b"wav"]


def test_prompt_of_nothing() -> None:
    assert Conversation(()).prompt() == Conversation(())
    assert Conversation(()).answer is None


def test_data_errors_cross_process_borders() -> None:
    error = DataError("is empty", where="a.jsonl:3", remedy="write something", kind="empty")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a.jsonl:3: is empty (write something)"
    assert (again.problem, again.where, again.remedy, again.kind) == (
        "is empty",
        "a.jsonl:3",
        "write something",
        "empty",
    )
    assert isinstance(again, OpticNerveError)
    assert str(DataError("x")) == "x"
    assert isinstance(RecipeError("x"), ValueError)


def test_features_are_checked() -> None:
    Features(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    for tokens, mask in ((torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(2, 3, 4), torch.ones(2, 4))):
        with pytest.raises(ValueError, match="Features want tokens"):
            Features(tokens, mask)


def test_asking_for_pip_leaves_setuptools_whole() -> None:
    """setuptools' hook takes a search for pip for pip at work: torch's compiler then cannot import it."""
    code = "from opticnerve.types import to_install; to_install('x'); import setuptools._distutils"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
