"""Invariant 4, whole models: what `opticnerve import` takes says the same as its class of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import checkpoints
import tiny
from opticnerve.models.import_hf.run import import_checkpoint

SOURCES: dict[str, Callable[[Path], Path]] = {
    "llava": checkpoints.save_llava,
    "llava, tied": lambda folder: checkpoints.save_llava(folder, text="llama tied"),
    "llava on gpt2": lambda folder: checkpoints.save_llava(folder, text="gpt2 untied"),
    "llava on siglip": lambda folder: checkpoints.save_llava(folder, vision="siglip_vision_model"),
    "llava on siglip without its first token": lambda folder: checkpoints.save_llava(
        folder, vision="siglip_vision_model", vision_feature_select_strategy="default"
    ),
    "llava on dinov2, class token kept": lambda folder: checkpoints.save_llava(
        folder, vision="dinov2", vision_feature_select_strategy="full", vision_feature_layer=[1, -1]
    ),
    "llava-next": checkpoints.save_llava_next,
    "llava-next on siglip": lambda folder: checkpoints.save_llava_next(folder, vision="siglip_vision_model"),
    "llava-onevision": checkpoints.save_llava_onevision,
    "llava's own format": checkpoints.save_llava_original,
    "llava-1.6's own format": lambda folder: checkpoints.save_llava_original(folder, anyres=True),
    "tinyllava": checkpoints.save_tinyllava,
    "internvl": checkpoints.save_internvl,
    "internvl, layer -2": lambda folder: checkpoints.save_internvl(
        folder, layer=-2, use_qk_norm=True, norm_type="rms_norm"
    ),
    "idefics3": checkpoints.save_idefics3,
    "smolvlm": lambda folder: checkpoints.save_idefics3(folder, kind="SmolVLM"),
    "smolvlm, pictures whole": lambda folder: checkpoints.save_idefics3(folder, kind="SmolVLM", split=False),
    "blip-2": checkpoints.save_blip2,
    "instructblip": checkpoints.save_instructblip,
}
BLIP = ("blip-2", "instructblip")


@dataclass
class Pair:
    """The same weights in their classes and in ours, both loaded from disk by the Auto classes."""

    kind: str
    theirs: Any
    their_processor: Any
    ours: Any
    our_processor: Any

    def texts(self, words: str, pictures: int) -> tuple[str, str]:
        """One prompt in their form and in ours. BLIP-2's processor puts picture and begin token first by itself."""
        token = self.our_processor.image_token * pictures
        if self.kind in BLIP:
            return words, f"{token}{self.our_processor.tokenizer.bos_token}{words}"
        return (f"USER: {token}\n{words} ASSISTANT:",) * 2

    def inputs(self, words: str, *pictures: Any) -> tuple[Any, Any]:
        """One prompt, as each processor writes it."""
        theirs, ours = self.texts(words, len(pictures))
        images = list(pictures) or None
        return (
            self.their_processor(images=images, text=theirs, return_tensors="pt"),
            self.our_processor(images=images, text=ours, return_tensors="pt"),
        )

    def batch(self) -> tuple[Any, list[Any]]:
        """Two prompts of different lengths: padded in one batch of ours, one by one in theirs."""
        shown = pictures(self.kind)[:2]
        texts = [self.texts(w, len(s))[1] for w, s in zip(WORDS, shown, strict=False)]
        ours = self.our_processor(images=[p for s in shown for p in s], text=texts, return_tensors="pt", padding=True)
        assert int((ours["attention_mask"] == 0).sum()) > 0
        return ours, [self.inputs(w, *s)[0] for w, s in zip(WORDS, shown, strict=False)]


@pytest.fixture(scope="module", params=list(SOURCES))
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("import")
    source = SOURCES[request.param](folder / "source")
    made = import_checkpoint(source, folder / "imported")
    assert made.difference < 1e-5
    stock = folder / "stock"  # of formats that transformers does not read
    loaded = [
        f.from_pretrained(where)
        for where in (stock if stock.exists() else source, made.folder)
        for f in (tf.AutoModelForImageTextToText, tf.AutoProcessor)
    ]
    return Pair(request.param, loaded[0].eval(), loaded[1], loaded[2].eval(), loaded[3])


def pictures(kind: str) -> list[tuple[Any, ...]]:
    """Pictures of the prompts: one; two of other shapes; none. BLIP-2 always sees one."""
    one, wide, tall = tiny.picture(1, 40), tiny.picture(2, 90).resize((90, 30)), tiny.picture(3, 70).resize((25, 70))
    return [(one,), (wide,), (tall,)] if kind in BLIP else [(one,), (wide, tall), ()]


WORDS = ("what colour is the circle in the picture?", "a photo of", "is there a dog?")


def test_logits_are_theirs(pair: Pair) -> None:
    for words, shown in zip(WORDS, pictures(pair.kind), strict=True):
        theirs, ours = pair.inputs(words, *shown)
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        with torch.no_grad():
            expected, logits = pair.theirs(**theirs).logits, pair.ours(**ours).logits
        torch.testing.assert_close(*tiny.words_of(logits, expected), rtol=0, atol=1e-5)


def test_logits_depend_on_the_picture(pair: Pair) -> None:
    """Otherwise all of this would show nothing."""
    (first, *_), (second, *_) = pictures(pair.kind)[:2]
    one, other = pair.inputs(WORDS[0], first)[1], pair.inputs(WORDS[0], second)[1]
    with torch.no_grad():
        last = [pair.ours(**i).logits[0, -1] for i in (one, other)]
    assert float((last[0] - last[1]).abs().max()) > 1e-3


def test_a_padded_batch_gives_the_same_logits(pair: Pair) -> None:
    ours, alone = pair.batch()
    # GPT-2 counts padding as words unless it is told where each word stands; `generate` tells it.
    places = (ours["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        rows = pair.ours(**ours, position_ids=places).logits
        for row, mask, theirs in zip(rows, ours["attention_mask"].bool(), alone, strict=True):
            words = tiny.words_of(row[mask], pair.theirs(**theirs).logits[0])
            torch.testing.assert_close(*words, rtol=0, atol=1e-5)


HOW: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def test_greedy_words_are_theirs(pair: Pair) -> None:
    for words, shown in zip(WORDS, pictures(pair.kind), strict=True):
        theirs, ours = pair.inputs(words, *shown)
        expected = pair.theirs.generate(**theirs, **HOW)
        assert pair.ours.generate(**ours, **HOW).tolist() == expected.tolist()
        assert expected.shape[1] > theirs["input_ids"].shape[1]


def test_greedy_words_of_a_padded_batch_are_theirs(pair: Pair) -> None:
    ours, alone = pair.batch()
    rows = pair.ours.generate(**ours, **HOW)[:, ours["input_ids"].shape[1] :].tolist()
    for row, theirs in zip(rows, alone, strict=True):
        expected = pair.theirs.generate(**theirs, **HOW)[0, theirs["input_ids"].shape[1] :].tolist()
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {HOW["pad_token_id"]}
