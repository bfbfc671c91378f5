"""Conversations as pairs: what is taken, what is told apart, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.data.collators.contrastive import PairCollator, caption_of
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.types import Conversation, DataError, Message, TextPart, ask


@pytest.fixture(scope="module")
def processor() -> DualEncoderProcessor:
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return DualEncoderProcessor(pictures, words, max_length=12)


def test_pictures_and_captions_without_the_users_words(processor: Any, tmp_path: Path) -> None:
    tiny.picture(2).save(tmp_path / "2.png")
    talks = [ask("Describe it.", tiny.picture(1), answer=" a red circle "), ask("", tmp_path / "2.png", answer="a dog")]
    batch = PairCollator(processor)([[talks[0]], [talks[1]]])
    assert batch.captions == ["a red circle", "a dog"]
    assert processor.batch_decode(batch.input_ids, skip_special_tokens=True) == batch.captions
    assert batch.pixel_values is not None
    wanted = processor.image_processor([tiny.picture(1), tiny.picture(2)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.pixel_values, wanted)
    assert batch.supervised == batch.samples == 2
    assert batch.tokens == int(batch.attention_mask.sum()) < batch.input_ids.numel()
    assert batch.to("cpu").ids == batch.ids


def test_all_conversations_of_a_row_become_pairs_and_share_their_pictures_key(processor: Any) -> None:
    talks = [ask("?", tiny.picture(1), answer=a) for a in ("a dog", "A  Dog", "a beach")]
    batch = PairCollator(processor)([talks, [ask("?", tiny.picture(2), answer="a dog")]])
    assert batch.image_keys.tolist() == [batch.image_keys[0]] * 3 + [batch.image_keys[3]]
    assert batch.image_keys[0] != batch.image_keys[3]
    same = (batch.caption_keys == batch.caption_keys[0]).tolist()
    assert same == [True, True, False, True]  # case and spaces do not make another caption


def test_equal_files_under_two_names_are_one_picture(processor: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.picture(1).save(tmp_path / f"{name}.png")
    talks = [[ask("?", tmp_path / f"{n}.png", answer=n)] for n in "ab"]
    assert len(set(PairCollator(processor)(talks).image_keys.tolist())) == 1


def test_long_captions_are_cut_where_the_processor_or_the_stage_says(processor: Any) -> None:
    conversation = ask("?", tiny.picture(1), answer="the quick brown fox " * 20)
    assert PairCollator(processor)([[conversation]]).input_ids.shape[1] == 12
    assert PairCollator(processor, max_length=5)([[conversation]]).input_ids.shape[1] == 5


@pytest.mark.parametrize(("conversation", "refusal"), [
    (ask("what?", answer="7"), ("no-pair", 0, 1)),
    (ask("what?", tiny.picture(1), tiny.picture(2), answer="7"), ("no-pair", 2, 1)),
    (ask("what?", tiny.picture(1)), ("no-pair", 1, 0)),
    (ask("what?", tiny.picture(1), answer=" "), ("no-pair", 1, 0)),
    (Conversation((*ask("what?", tiny.picture(1), answer="7").messages, Message("user", (TextPart("and?"),)),
                   Message("assistant", (TextPart("8"),)))), ("no-pair", 1, 2)),
])  # fmt: skip
def test_what_is_no_pair(conversation: Conversation, refusal: tuple[Any, ...]) -> None:
    with refused(*refusal, error=DataError):
        caption_of(conversation)
