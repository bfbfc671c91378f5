"""Questions about one picture, its prefix read once: the same answers, fewer tokens read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from opticnerve.build import Dock
from opticnerve.inference.generate import Answerer
from opticnerve.inference.shared_prefix import answer_about
from opticnerve.types import Conversation, Message, OpticNerveError, TextPart, ask

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
        assert answer_about(answerer, questions, max_new_tokens=12, batch_size=batch_size) == alone
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
    assert answer_about(answerer, questions, max_new_tokens=12) == alone


def test_what_cannot_be_shared(docked: Callable[..., Dock]) -> None:
    dock = docked()
    answerer = Answerer(dock.model, dock.processor)
    with pytest.raises(OpticNerveError, match="different pictures"):
        answer_about(answerer, [ask("a?", tiny.picture(0)), ask("b?", tiny.picture(1))])
    picture = ask("", tiny.picture(0)).images[0]
    late = [Conversation((Message("user", (TextPart(words), picture)),)) for words in ("one", "another")]
    with pytest.raises(OpticNerveError, match="before the end of their pictures"):
        answer_about(answerer, late)
    assert answer_about(answerer, []) == []
    beside = docked(fusion="cross_attention")
    with pytest.raises(OpticNerveError, match="beside the text; use Answerer.answer"):
        answer_about(Answerer(beside.model, beside.processor), asked(tiny.picture(0)))


def test_a_connector_that_reads_the_question_sees_each_picture_anew(
    docked: Callable[..., Dock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its soft tokens differ with the question: there is no prefix to share."""
    dock = docked()
    monkeypatch.setattr(type(dock.processor), "reads_questions", True)
    with pytest.raises(OpticNerveError, match="reads the question with the picture"):
        answer_about(Answerer(dock.model, dock.processor), asked(tiny.picture(0)))
