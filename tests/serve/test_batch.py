"""Rows enter and leave a running batch, and each says what it would say alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from opticnerve.fusion.base import Fusion
from opticnerve.fusion.gated_cross_attention import GatedCrossAttention
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


def open_gates(made: Dock) -> None:
    """A fresh dock's cross-attention adds nothing: here it does."""
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "alpha_" in name:
            torch.nn.init.normal_(parameter)


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


@pytest.mark.parametrize(
    ("family", "fusion", "window"),
    [
        *((family, "splice", None) for family in ("llama", "qwen2", "gpt2", "bloom", "phi")),
        *((family, "splice", 8) for family in ("mistral", "gemma2", "gemma3_text")),
        ("llama", {"type": "cross_attention", "every": 1}, None),
    ],
)  # fmt: skip
def test_each_says_what_it_says_alone(
    family: str, fusion: Any, window: int | None, make_dock: Callable[..., Dock]
) -> None:
    made = make_dock(family, fusion=fusion)
    if window is not None:  # narrower than the prompts
        made.model.language_model.config.sliding_window = window
    open_gates(made)
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


def test_what_lies_beside_the_text_is_each_rows_own(make_dock: Callable[..., Dock]) -> None:
    """Several answers to a prompt, and rows that leave, among rows without a picture."""
    made = make_dock(fusion={"type": "cross_attention", "every": 1})
    open_gates(made)
    answerer = Answerer(made.model, made.processor)
    batch = RunningBatch(answerer)
    expected, said = [], []
    for conversation, rows in ((ASKED[2], 1), (ASKED[1], 3), (ASKED[0], 2)):
        logits_NV, read = batch.read(dict(answerer.inputs([conversation])), rows)
        batch.join(read, [*range(rows)])
        expected += [alone(answerer, conversation, 7)] * rows
        said += [[token] for token in logits_NV.argmax(-1).tolist()]
    left = [*range(6)]
    for keep in (None, [0, 2, 5], None, [0, 2], [2], None):
        if keep is not None:
            batch.keep([left.index(i) for i in keep])
            left = keep
        found = batch.step([said[i][-1] for i in left], [True] * len(left)).argmax(-1).tolist()
        for i, token in zip(left, found, strict=True):
            said[i].append(token)
    assert all(mine == theirs[: len(mine)] for mine, theirs in zip(said, expected, strict=True))
    assert len(said[2]) == 7
    assert expected[0] != expected[1] != expected[4]


def test_models_that_cannot_share_say_why(make_dock: Callable[..., Dock], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fusion of somebody's own, which does not say how what it sees lies side by side."""
    made = make_dock(fusion={"type": "cross_attention"})
    monkeypatch.setattr(GatedCrossAttention, "beside", Fusion.beside)
    assert "GatedCrossAttention" in str(why_alone(made.model))
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


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"attention_chunk_size": 8}, "chunks"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear attention"),
    ],
)
def test_language_models_that_are_answered_alone(
    change: dict[str, Any], why: str, make_dock: Callable[..., Dock]
) -> None:
    made = make_dock()
    for name, value in change.items():
        setattr(made.model.language_model.config, name, value)
    assert why in str(why_alone(made.model))
