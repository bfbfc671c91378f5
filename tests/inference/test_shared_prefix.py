"""Questions about one picture, its prefix read once: the same answers, fewer tokens read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from opticnerve.inference.generate import Answerer
from opticnerve.inference.shared_prefix import share
from opticnerve.models.vlm.build import Dock
from opticnerve.types import Conversation, Message, TextPart, ask

pytestmark = pytest.mark.usefixtures("private_cache")
QUESTIONS = ["is it red?", "what is the colour of the big circle on the left?", "how many?", "why?"]


def asked(picture: Any) -> list[Conversation]:
    return [ask(q, picture) for q in QUESTIONS]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("batch_size", [16, 3])
def test_the_answers_are_those_of_each_by_itself(
    family: str, batch_size: int, docked: Callable[..., Dock], monkeypatch: pytest.MonkeyPatch
) -> None:
    dock = docked(family)
    answerer, questions = Answerer(dock.model, dock.processor), asked(tiny.picture(3))
    alone = [answerer.answer([q], max_new_tokens=12)[0] for q in questions]
    seen: list[int] = []
    handle = dock.model.image.encoder.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    try:
        assert answerer.answer(questions, max_new_tokens=12, batch_size=batch_size) == alone
    finally:
        handle.remove()
    assert sum(seen) == -(-len(questions) // batch_size), "the picture is seen once for each batch"


def test_an_adapter_that_steps_aside_on_text_still_works_on_the_picture(docked: Callable[..., Dock]) -> None:
    dock = docked()
    dock.model.give_lora({"rank": 4, "when": "media"})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in dock.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    answerer, questions = Answerer(dock.model, dock.processor), asked(tiny.picture(3))
    alone = [answerer.answer([q], max_new_tokens=12)[0] for q in questions]
    assert answerer.answer(questions, max_new_tokens=12) == alone


class TestAnswerShares:
    """`Answerer.answer` does so by itself, wherever it can."""

    @pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
    def test_several_pictures_with_several_questions(self, family: str, docked: Callable[..., Dock]) -> None:
        dock = docked(family)
        with torch.no_grad():
            for parameter in dock.model.image.connector.parameters():
                parameter.mul_(5)
        answerer = Answerer(dock.model, dock.processor)
        pictures = [tiny.picture(i) for i in range(3)]
        mixed = [ask(q, p) for q in QUESTIONS for p in pictures[:2]]
        mixed[3:3] = [ask("no picture"), ask("one question about it", pictures[2])]
        apart = answerer.answer(mixed, max_new_tokens=10, share_prefix=False)
        assert len(set(apart)) > 5
        seen: list[int] = []
        handle = dock.model.image.encoder.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
        for batch_size, views in ((16, 2 + 1), (4, 2 + 1), (3, 4 + 1)):  # a group cut in two is seen twice
            done: list[int] = []
            seen.clear()
            said = answerer.answer(mixed, max_new_tokens=10, batch_size=batch_size, progress=done.append)
            assert said == apart
            assert sum(seen) == views
            assert done[-1] == len(mixed)
            assert max(b - a for a, b in zip([0, *done], done, strict=False)) <= batch_size
        handle.remove()

    def test_who_shares(self, docked: Callable[..., Dock], tmp_path: Any) -> None:
        dock = docked("mistral")
        answerer = Answerer(dock.model, dock.processor)
        tiny.picture(0).save(tmp_path / "a.png")
        path, data = tmp_path / "a.png", (tmp_path / "a.png").read_bytes()

        def groups(*asked: Conversation) -> list[list[int]]:
            found: dict[int, list[int]] = {}
            for row in share(answerer.model, answerer.processor, asked, 8):
                found.setdefault(row.group, []).append(row.number)
            return sorted(sorted(numbers) for numbers in found.values())

        same = [ask("a?", path), ask("b?", path), ask("a?", data), ask("b?", bytes(bytearray(data)))]
        assert groups(*same) == [[0, 1], [2, 3]], "a file, and equal bytes"
        assert groups(ask("a?", tiny.picture(0)), ask("a?", tiny.picture(0))) == [], "two objects"
        assert groups(ask("a?"), ask("b?")) == [], "no picture"
        late = [Conversation((Message("user", (TextPart(w), *ask("", path).images)),)) for w in ("one", "another")]
        assert groups(*late) == [], "words that differ stand before the picture"
        dock.model.language_model.config.sliding_window = 8
        assert groups(*same) == [], "the window would count the padding"

    @pytest.mark.parametrize("what", ["cross_attention", "reads_questions"])
    def test_the_others_are_answered_as_before(
        self, what: str, docked: Callable[..., Dock], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dock = docked(fusion="cross_attention") if what == "cross_attention" else docked()
        answerer, questions = Answerer(dock.model, dock.processor), asked(tiny.picture(3))
        if what == "reads_questions":
            monkeypatch.setattr(type(dock.processor), "reads_questions", True)
            monkeypatch.setattr(Answerer, "inputs", lambda self, asked: {"asked": asked})
            monkeypatch.setattr(Answerer, "answer_batch", lambda self, inputs, cache, **_: ["x"] * len(inputs["asked"]))
            assert answerer.answer(questions) == ["x"] * len(questions)
        else:
            apart = answerer.answer(questions, max_new_tokens=6, share_prefix=False)
            assert answerer.answer(questions, max_new_tokens=6) == apart
        assert share(answerer.model, answerer.processor, questions, 6) == []
