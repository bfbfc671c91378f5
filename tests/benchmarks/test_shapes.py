"""benchmarks/shapes.py: both sides hold the same weights, and what a step needs is what torch counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import made_data
import shapes

import tiny
from opticnerve.models.freeze import freeze

TINY = ["tiny", "tiny-siglip"]


def sample(shape: Any) -> tuple[dict[str, torch.Tensor], Any]:
    [encoded] = made_data.samples(shape, 1, question=(4, 6), answer=(5, 7))
    inputs = {
        "input_ids": torch.tensor([encoded.input_ids]),
        "labels": torch.tensor([encoded.labels]),
        "pixel_values": made_data.pixels(shape, 1, torch.float32),
    }
    return inputs, encoded


@pytest.mark.parametrize("name", TINY)
def test_both_sides_compute_the_same(name: str) -> None:
    shape = shapes.SHAPES[name]
    inputs, _ = sample(shape)
    one, other = shapes.ours(shape, torch.float32)(**inputs), shapes.llava(shape, torch.float32)(**inputs)
    torch.testing.assert_close(one.loss, other.loss)
    ours, theirs = tiny.words_of(one.logits, other.logits)
    torch.testing.assert_close(ours, theirs)
    assert ours.std() > 0.05, "the answer depends on nothing"


@pytest.mark.parametrize("name", TINY)
def test_both_sides_train_the_same_parameters(name: str) -> None:
    for trains in ("connector", "lora", "full"):
        mine, theirs = shapes.ours(shapes.SHAPES[name]), shapes.llava(shapes.SHAPES[name])
        if trains == "lora":
            mine.give_lora(shapes.LORA)
        freeze(mine, shapes.stage(trains))
        opened = shapes.open_llava(theirs, trains)
        count = {s: sum(p.numel() for p in m.parameters() if p.requires_grad) for s, m in [("a", mine), ("b", opened)]}
        assert count["a"] == count["b"] > 0


@pytest.mark.parametrize("trains", ["connector", "lora", "full"])
@pytest.mark.parametrize("name", TINY)
def test_flops_are_those_that_torch_counts(name: str, trains: Any) -> None:
    shape, rank = shapes.SHAPES[name], 4
    model = shapes.ours(shape, torch.float32)
    if trains == "lora":
        model.give_lora({"rank": rank})
    freeze(model, shapes.stage(trains))
    model.set_attn_implementation("eager")  # whose products are counted one by one
    inputs, encoded = sample(shape)
    keep = torch.tensor([i for i, label in enumerate(encoded.labels[1:]) if label != -100])
    with FlopCounterMode(display=False) as counter:
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=keep).logits
        torch.nn.functional.cross_entropy(logits[0], inputs["labels"][0, keep + 1]).backward()
    needed = shapes.flops(
        shape, lengths=[len(encoded.input_ids)], supervised=encoded.supervised, images=1, trains=trains, rank=rank,
        causal=False,
    )  # fmt: skip
    # transformers' vision encoder computes the layers behind the one that is used, too.
    whole = shapes.encoder_flops(replace(shape.vision_encoder, layer=-1), 1) - shapes.encoder_flops(
        shape.vision_encoder, 1
    )
    assert counter.get_total_flops() == needed + whole


def test_causal_attention_and_a_cached_eye_need_less() -> None:
    shape = shapes.SHAPES["smollm2-135m"]
    given: dict[str, Any] = {"lengths": [300], "supervised": 40, "images": 1}
    whole = shapes.flops(shape, **given, causal=False)
    assert shapes.flops(shape, **given) < whole
    assert whole - shapes.flops(shape, **given, causal=False, live_encoder=False) == shapes.encoder_flops(
        shape.vision_encoder, 1
    )
