"""Rows enter and leave a running batch, and each says what it would say alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from opticnerve.inference.decoding import decode
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.serve.batch import RunningBatch, why_alone
from opticnerve.types import Conversation, ask

ASKED = [
    ask("a rather long question about the picture, is it not?", tiny.picture(1)),
    ask("q", tiny.picture(2), tiny.picture(3)),
    ask("text alone"),
    ask("what colour is the circle in the picture", tiny.picture(5)),
    ask("how many?", tiny.picture(1)),
]


def alone(answerer: Answerer, conversation: Conversation, new: int) -> list[int]:
    inputs = dict(answerer.inputs([conversation]))
    return torch.cat(
        list(decode(answerer.model, inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None))
    ).tolist()


def together(answerer: Answerer, lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Greedy tokens of all questions, which come in and go at any step."""
    batch = RunningBatch(answerer)
    said: list[list[int]] = [[] for _ in ASKED]
    rows: list[int] = []
    coming = list(range(len(ASKED)))
    while coming or any(len(said[r]) < lengths[r] for r in rows):
        if coming and (not rows or rng.random() < 0.4):
            number = coming.pop(0)
            logits_1V, read = batch.read(dict(answerer.inputs([ASKED[number]])), 1)
            said[number].append(int(logits_1V[0].argmax()))
            if rng.random() < 0.5:
                keep = [i for i, r in enumerate(rows) if len(said[r]) < lengths[r]]
                batch.keep(keep)
                rows = [rows[i] for i in keep]
            batch.join(read, [0])
            rows.append(number)
        live = [len(said[r]) < lengths[r] for r in rows]
        logits_BV = batch.step([said[r][-1] for r in rows], live)
        for r, alive, logits_V in zip(rows, live, logits_BV, strict=True):
            if alive:
                said[r].append(int(logits_V.argmax()))
    return said


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bloom", "phi"])
def test_each_says_what_it_says_alone(family: str, make_dock: Callable[..., Dock]) -> None:
    made = make_dock(family)
    answerer = Answerer(made.model, made.processor)
    assert why_alone(made.model) is None
    rng = random.Random(0)
    for _ in range(3):
        lengths = [rng.randint(3, 25) for _ in ASKED]
        expected = [alone(answerer, c, n) for c, n in zip(ASKED, lengths, strict=True)]
        assert together(answerer, lengths, rng) == expected


def test_an_adapter_for_pictures_alone_stays_off_the_others(make_dock: Callable[..., Dock]) -> None:
    made = make_dock()
    made.model.give_lora({"rank": 4, "when": "media"})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    made.model.eval()
    answerer = Answerer(made.model, made.processor)
    lengths = [12] * len(ASKED)
    assert together(answerer, lengths, random.Random(1)) == [alone(answerer, c, 12) for c in ASKED]


def test_several_choices_are_one_reading(make_dock: Callable[..., Dock]) -> None:
    made = make_dock()
    answerer = Answerer(made.model, made.processor)
    batch = RunningBatch(answerer)
    logits_NV, read = batch.read(dict(answerer.inputs([ASKED[0]])), 3)
    assert logits_NV.shape[0] == 3
    batch.join(read, [0, 2])
    expected = alone(answerer, ASKED[0], 4)
    tokens = [expected[0]] * 2
    for token in expected[1:]:
        tokens = batch.step(tokens, [True, True]).argmax(-1).tolist()
        assert tokens == [token] * 2


def test_padding_that_nobody_needs_is_cut_away(make_dock: Callable[..., Dock]) -> None:
    made = make_dock()
    answerer = Answerer(made.model, made.processor)
    batch = RunningBatch(answerer)
    widths = []
    for conversation in (ASKED[0], ASKED[2]):
        _, read = batch.read(dict(answerer.inputs([conversation])), 1)
        widths.append(read.length)
        batch.join(read, [0])
    assert batch.mask_BT.shape == (2, widths[0])
    batch.keep([1])
    assert batch.mask_BT.shape == (1, widths[1])
    assert batch.cache.layers[0].keys.shape[2] == widths[1]


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [("llama", {"fusion": "cross_attention"}, "cross-attention"), ("gemma2", {}, "sliding windows")],
)
def test_models_that_cannot_share_say_why(
    family: str, options: dict[str, Any], why: str, make_dock: Callable[..., Dock]
) -> None:
    made = make_dock(family, **options)
    assert why in str(why_alone(made.model))
    answerer = Answerer(made.model, made.processor)
    for conversation in ASKED[:3]:
        batch = RunningBatch(answerer)
        expected = alone(answerer, conversation, 8)
        logits_NV, read = batch.read(dict(answerer.inputs([conversation])), 2)
        said = [logits_NV.argmax(-1).tolist()]
        batch.join(read, [0, 1])
        for _ in range(7):
            said.append(batch.step(said[-1], [True, True]).argmax(-1).tolist())
        assert said == [[token] * 2 for token in expected]
