"""Rows to tensors: padding, masks, pictures, counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.types import Conversation, DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def processor(docked: Callable[..., Any]) -> Any:
    return docked().processor


def rows_of(processor: Any, *groups: list[Conversation]) -> Any:
    return pack([[encode(c, processor) for c in g] for g in groups])


def test_counts_padding_and_pictures(processor: Any) -> None:
    short = rows_of(processor, [ask("q", answer="a")])
    long = rows_of(processor, [ask("a longer question", tiny.picture(1), tiny.picture(2), answer="and its answer")])
    batch = Collator(processor)([short, long])
    assert batch.input_ids.shape == (2, len(long))
    assert batch.tokens == len(short) + len(long)
    assert batch.samples == 2
    assert batch.supervised == sum(t != -100 for t in short.targets + long.targets)
    pixels = batch.media["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert batch.plain
    assert batch.attention_mask(torch.float32) is None
    pad = slice(len(short), None)
    assert set(batch.input_ids[0, pad].tolist()) == {processor.tokenizer.pad_token_id}
    assert set(batch.targets[0, pad].tolist()) == {-100}


def test_pictures_stand_in_the_order_of_their_placeholders(processor: Any) -> None:
    first, second = tiny.picture(1), tiny.picture(2)
    row = rows_of(processor, [ask("q", second, answer="a")], [ask("q", first, answer="a")])
    batch = Collator(processor)([row])
    alone = processor.image_processor([second, first], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.media["pixel_values"], alone)


def test_the_mask_lets_nobody_look_across(processor: Any) -> None:
    picture = tiny.picture(1)
    row = rows_of(
        processor, [ask("q one", picture, answer="a"), ask("q two", picture, answer="b")], [ask("text", answer="c")]
    )
    short = rows_of(processor, [ask("q", answer="a")])
    batch = Collator(processor)([row, short])
    assert not batch.plain
    mask = batch.attention_mask(torch.float32)
    assert mask is not None
    assert mask.shape == (2, 1, len(row), len(row))
    for i in range(len(row)):
        for j in range(len(row)):
            lawful = j <= i and row.group[i] == row.group[j] and row.branch[j] in (0, row.branch[i])
            assert (mask[0, 0, i, j] == 0) == lawful
    # Padding may see something, or softmax would give no number; nothing real sees padding.
    assert (mask[1, 0] == 0).any(-1).all()
    assert not (mask[1, 0, : len(short), len(short) :] == 0).any()


def test_moving_keeps_everything(processor: Any) -> None:
    batch = Collator(processor)([rows_of(processor, [ask("q", tiny.picture(), answer="a")])])
    moved = batch.to("cpu")
    assert isinstance(moved, Batch)
    assert vars(moved).keys() == vars(batch).keys()
    assert torch.equal(moved.input_ids, batch.input_ids)


def test_a_picture_that_went_missing_names_its_sample(processor: Any, tmp_path: Path) -> None:
    tiny.picture().save(tmp_path / "gone.png")
    conversation = ask("q", tmp_path / "gone.png", answer="a")
    row = rows_of(processor, [Conversation(conversation.messages, id="sample 3")])
    (tmp_path / "gone.png").unlink()
    with refused("missing-image", "sample 3", error=DataError):
        Collator(processor)([row])
