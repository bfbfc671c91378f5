"""The nouns: conversations, their parts, and errors that survive a process border."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opticnerve.common.atomic import DiskFull
from opticnerve.common.hub import HubError
from opticnerve.data.sources.base import DamagedShard
from opticnerve.distributed.heartbeat import LostProcess
from opticnerve.serve.errors import ApiError
from opticnerve.train.divergence import Diverged
from opticnerve.types import (
    KINDS,
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


@pytest.mark.parametrize(
    "error",
    [
        OpticNerveError("no such thing", kind="unknown-name"),
        OpticNerveError(),
        RecipeError("stages[0]: no data"),
        DataError("is empty", where="a.jsonl:3", kind="empty"),
        DamagedShard("ends early", where="a.tar", kind="shard"),
        HubError("no such repository", "check its name", kind="repository"),
        DiskFull("4 MB are needed"),
        ApiError(413, "too large", param="messages", code="too_large", retry_after=3),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_cross_process_borders_as_they_are(error: OpticNerveError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.kind) == (type(error), str(error), error.kind)
    assert again.__dict__ == error.__dict__


def test_each_class_of_errors_has_a_kind() -> None:
    """Its own or that of its class; `DataError` and `HubError` name theirs themselves."""
    assert OpticNerveError("x").kind == "refused" and OpticNerveError("x", kind="empty").kind == "empty"
    found = {cls.kind for cls in (RecipeError, DiskFull, Diverged, LostProcess, ApiError)}
    assert found == {"recipe", "disk-full", "diverged", "lost-process", "request"} <= {*KINDS}
    assert all(f"{kind}" in (OpticNerveError.__doc__ or "") for kind in KINDS)


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
