"""The right answer among a closed set: what becomes a batch, what the loss is a sum of, and who learns from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from errors import refused
from opticnerve.data.collators.classification import AnswerCollator
from opticnerve.models.classifier.build import ClassifierDock, classifier
from opticnerve.objectives.next_token import Classification
from opticnerve.types import Conversation, DataError, Features, ImagePart, Message, TextPart, ask

pytestmark = pytest.mark.usefixtures("private_cache")
ANSWERS = ["no", "red", "yes"]


@pytest.fixture
def made(bert_folder: str, vision_folder: Callable[..., str]) -> Callable[..., ClassifierDock]:
    def make(timing: Any = "intermediate", **options: Any) -> ClassifierDock:
        vision_encoder = (
            None if timing == "early" else {"type": "hf_vision", "name": vision_folder("siglip_vision_model")}
        )
        more = {"intermediate": {"heads": 2, "depth": 1}, "early": {"pixels": 8}, "late": {}}[timing]
        return classifier(vision_encoder, bert_folder, timing=timing, answers=ANSWERS, width=16, **{**more, **options})

    return make


def questions(*answers: str | None, first: int = 0) -> list[Conversation]:
    words = ["is it red?", "what colour is the circle?", "how many are there?", "is a dog in the picture?"]
    return [ask(words[i % 4], tiny.picture(first + i), answer=a) for i, a in enumerate(answers)]


@dataclass
class Saw:
    """A feature store that gives ones, and remembers whom it was asked for."""

    shape: tuple[int, int]
    asked: list[str] = field(default_factory=list)

    def rows(self, sources: Any, where: Any) -> Features:
        self.asked += list(where)
        return Features(torch.ones(len(sources), *self.shape), torch.ones(len(sources), self.shape[0]).bool())


def test_the_loss_is_a_sum_over_questions_and_adds_up_over_any_split(made: Callable[..., ClassifierDock]) -> None:
    dock = made()
    objective, collate = Classification(dock.model), Classification.collator(dock.processor, None, 0)
    asked = questions("yes", "red", "no", "no")
    batch = collate([asked])
    loss, count = objective(batch)
    logits = dock.model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    by_hand = sum(
        -torch.log_softmax(row, 0)[ANSWERS.index(str(c.answer))] for row, c in zip(logits, asked, strict=True)
    )
    torch.testing.assert_close(loss, by_hand)
    assert (int(count), batch.supervised, batch.samples) == (4, 4, 4)
    apart = [objective(collate([part])) for part in (asked[:1], asked[1:])]
    torch.testing.assert_close(sum(x for x, _ in apart), loss, rtol=1e-4, atol=1e-5)
    assert sum(int(n) for _, n in apart) == 4


def test_accuracy_is_the_share_of_right_answers(made: Callable[..., ClassifierDock]) -> None:
    dock = made("late", combine="text")
    objective = Classification(dock.model)
    batch = AnswerCollator(dock.processor)([questions("yes", "yes", "yes", "yes")])
    said = dock.model(batch.input_ids, batch.attention_mask, batch.pixel_values).logits.argmax(1)
    batch.targets = torch.where(torch.tensor([True, False, True, True]), said, (said + 1) % 3)
    objective(batch)
    assert objective.metrics == {"accuracy": 0.75}


def test_late_predictors_learn_side_by_side_and_each_for_itself(made: Callable[..., ClassifierDock]) -> None:
    dock = made("late")
    batch = AnswerCollator(dock.processor)([questions("yes", "red", "no")])
    scores = dock.model.score(batch.input_ids, batch.attention_mask, batch.pixel_values)
    parts = [F.cross_entropy(logits, batch.targets, reduction="sum") for logits in scores.parts]
    loss, _ = Classification(dock.model)(batch)
    torch.testing.assert_close(loss, torch.stack(parts).sum())
    owners = []
    for part in parts:
        dock.model.zero_grad()
        part.backward(retain_graph=True)
        named = dock.model.classifier.named_parameters()
        owners.append({n.split(".")[0] for n, p in named if p.grad is not None and bool(p.grad.any())})
    assert owners == [{"see", "image"}, {"text"}, {"weights_2"}]


def test_what_is_trained_does_not_hang_on_the_rule_of_late_fusion(made: Callable[..., ClassifierDock]) -> None:
    dock = made("late")
    batch = AnswerCollator(dock.processor)([questions("yes", "red", "no")])
    losses = set()
    for rule in ("mean", "vote", "product", "learned", "image", "text"):
        dock.model.combine = rule
        losses.add(Classification(dock.model)(batch)[0].item())
    assert len(losses) == 1


def test_every_conversation_of_a_row_is_asked(made: Callable[..., ClassifierDock]) -> None:
    asked = questions("yes", "red", "no")
    batch = AnswerCollator(made().processor)([asked[:2], asked[2:]])
    assert batch.targets.tolist() == [2, 1, 0]
    assert batch.pixel_values is not None
    assert len(batch.input_ids) == len(batch.pixel_values) == 3
    assert batch.tokens == int(batch.attention_mask.sum())


@pytest.mark.parametrize(("written", "place"), [("Yes", 2), (" RED\n", 1), ("no", 0)])
def test_case_and_spaces_around_an_answer_do_not_matter(
    written: str, place: int, made: Callable[..., ClassifierDock]
) -> None:
    assert AnswerCollator(made("early").processor)([questions(written)]).targets.tolist() == [place]


def test_features_of_a_cache_stand_in_for_pictures(made: Callable[..., ClassifierDock]) -> None:
    dock = made()
    vision_encoder = dock.model.image.encoder
    collate = AnswerCollator(dock.processor)
    collate.features = store = Saw((vision_encoder.num_tokens, vision_encoder.hidden_size))
    nowhere = Conversation(
        (Message("user", (ImagePart(Path("gone.png")), TextPart("what?"))), Message("assistant", (TextPart("red"),))),
        where="a.jsonl:1",
    )
    batch = collate([[nowhere]])  # a picture that is seen already is not opened
    assert store.asked == ["a.jsonl:1"]
    assert batch.pixel_values is None
    loss, _ = Classification(dock.model)(batch.to("cpu"))
    assert torch.isfinite(loss)


def dialogue(*turns: tuple[Any, str], pictures: int = 1) -> Conversation:
    media = tuple(ImagePart(tiny.picture(i)) for i in range(pictures))
    said = [Message(role, (TextPart(text),)) for role, text in turns]
    return Conversation((Message("user", (*media, *said[0].parts)), *said[1:]), where="talk.jsonl:7")


@pytest.mark.parametrize(
    ("conversation", "refusal"),
    [
        (
            dialogue(("user", "what?"), ("assistant", "yess")),
            ("answer", "talk.jsonl:7", "'yess'", 3, "'yes'"),
        ),
        (dialogue(("user", "what?"), ("assistant", "blue")), ("answer", "'blue'", 3, "'no'", "'red'", "'yes'")),
        (dialogue(("user", "what?")), ("no-answer", "talk.jsonl:7")),
        (dialogue(("user", "what?"), ("assistant", "yes"), pictures=0), ("no-question", 0, 1)),
        (dialogue(("user", "what?"), ("assistant", "yes"), pictures=2), ("no-question", 2, 1)),
        (dialogue(("user", " "), ("assistant", "yes")), ("no-question", 1, 0)),
        (
            dialogue(("user", "what?"), ("assistant", "no"), ("user", "and now?"), ("assistant", "yes")),
            ("no-question", 1, 2),
        ),
    ],
)
def test_bad_input(conversation: Conversation, refusal: tuple[Any, ...], made: Callable[..., ClassifierDock]) -> None:
    collate = AnswerCollator(made("early").processor)
    for act in (lambda: collate([[conversation]]), lambda: collate.check(conversation)):
        with refused(*refusal, error=DataError):
            act()
