"""A vision encoder and an audio encoder on one language model: each sample may hold both, either or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.generate import Answerer
from opticnerve.models import OpticNerveForConditionalGeneration, OpticNerveProcessor
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.types import DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
RATE = 16_000


def sound(seed: int, seconds: float = 0.7) -> Any:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


@pytest.fixture
def both(docked: Callable[..., Dock], whisper_folder: str) -> Dock:
    audio_encoder = {"encoder": {"type": "whisper", "name": whisper_folder, "seconds": 1, "pool": 5}}
    dock = docked("llama", audio=audio_encoder)
    with torch.no_grad():
        for parameter in (*dock.model.image.connector.parameters(), *dock.model.audio.connector.parameters()):
            parameter.mul_(5)
    return dock


def inputs(dock: Dock, *conversations: Any) -> Any:
    return Answerer(dock.model, dock.processor).inputs(conversations)


P = [tiny.picture(i) for i in range(3)]


def test_each_in_its_place(both: Dock) -> None:
    batch = inputs(both, ask("both", P[0], audios=[sound(0)]), ask("sound", audios=[sound(1)]), ask("text"))
    images = (batch["input_ids"] == both.processor.image_token_id).sum(1).tolist()
    sounds = (batch["input_ids"] == both.processor.audio_token_id).sum(1).tolist()
    assert images == [16, 0, 0]
    assert sounds == [10, 10, 0]
    assert batch["input_features"].shape == (2, 16, 100)
    with torch.no_grad():
        out = both.model(**batch)
    assert out.image_hidden_states.shape == (1, 16, 32)
    assert out.audio_hidden_states.shape == (2, 10, 32)


def test_a_long_sound_is_heard_window_by_window(both: Dock) -> None:
    batch = inputs(both, ask("long", audios=[sound(0, 2.5)]))
    assert int((batch["input_ids"] == both.processor.audio_token_id).sum()) == 30
    assert batch["input_features"].shape[0] == 3
    encoded = encode(ask("long", audios=[sound(0, 2.5)], answer="yes"), both.processor)
    assert encoded.input_ids.count(both.processor.audio_token_id) == 30


def test_both_matter(both: Dock) -> None:
    with torch.no_grad():
        logits = [
            both.model(**inputs(both, ask("what?", p, audios=[s]))).logits[0, -1]
            for p, s in ((P[0], sound(0)), (P[1], sound(0)), (P[0], sound(1)))
        ]
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_text_alone_is_the_bare_model(both: Dock) -> None:
    batch = inputs(both, ask("text"))
    assert torch.equal(*tiny.words_of(both.model(**batch).logits, both.model.language_model(**batch).logits))


def test_batch_is_single_and_generation_works(both: Dock) -> None:
    asked = [ask("both", P[0], audios=[sound(0)]), ask("sound", audios=[sound(1)]), ask("text"), ask("eye", P[1])]
    answerer = Answerer(both.model, both.processor)
    assert answerer.answer(asked, max_new_tokens=6) == [answerer.answer([a], max_new_tokens=6)[0] for a in asked]


def test_several_answers_keep_their_media(both: Dock) -> None:
    batch = inputs(both, ask("both", P[0], audios=[sound(0)]), ask("sound", audios=[sound(1), sound(2)]))
    out = both.model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
    alone = [
        both.model.generate(**inputs(both, a), max_new_tokens=4, num_beams=2, do_sample=False)[0, -4:].tolist()
        for a in (ask("both", P[0], audios=[sound(0)]), ask("sound", audios=[sound(1), sound(2)]))
    ]
    assert out[:, -4:].tolist() == alone


def test_packed_equals_unpacked(both: Dock) -> None:
    samples = [
        ask("both", P[0], audios=[sound(0)], answer="yes"), ask("sound", audios=[sound(1)], answer="no"),
        ask("text", answer="red"), ask("eye", P[1], answer="a dog"),
    ]  # fmt: skip
    encoded = [encode(s, both.processor) for s in samples]

    def total(rows: Any) -> tuple[float, Any]:
        both.model.zero_grad()
        loss, _ = NextToken(both.model)(Collator(both.processor)(rows))
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in both.model.named_parameters() if p.grad is not None}

    packed, together = total([pack([[e] for e in encoded])])
    apart, separate = total([pack([[e]]) for e in encoded])
    assert packed == pytest.approx(apart, rel=1e-5)
    for name, gradient in separate.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_save_and_load(both: Dock, tmp_path: Path) -> None:
    both.model.save_pretrained(tmp_path)
    both.processor.save_pretrained(tmp_path)
    model, processor = (
        tf.AutoModelForImageTextToText.from_pretrained(tmp_path),
        tf.AutoProcessor.from_pretrained(tmp_path),
    )
    assert isinstance(model, OpticNerveForConditionalGeneration)
    batch = inputs(both, ask("both", P[0], audios=[sound(0)]))
    again = Answerer(model, processor).inputs([ask("both", P[0], audios=[sound(0)])])
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    with torch.no_grad():
        assert torch.equal(model(**again).logits, both.model(**batch).logits)


class TestEarAlone:
    @pytest.fixture
    def audio_encoder(self, language_folder: Callable[..., str], whisper_folder: str) -> Dock:
        from opticnerve.models.vlm.build import dock

        return dock(
            language=language_folder("llama"),
            audio={"encoder": {"type": "whisper", "name": whisper_folder, "seconds": 1, "pool": 10}},
        )

    def test_round_trip(self, audio_encoder: Dock, tmp_path: Path) -> None:
        audio_encoder.model.save_pretrained(tmp_path)
        audio_encoder.processor.save_pretrained(tmp_path)
        processor = OpticNerveProcessor.from_pretrained(tmp_path)
        assert processor.image_processor is None
        assert processor.image_token is None
        asked = ask("what word?", audios=[sound(0)])
        model = OpticNerveForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(
                model(**Answerer(model, processor).inputs([asked])).logits,
                audio_encoder.model(**inputs(audio_encoder, asked)).logits,
            )

    def test_pictures_are_refused(self, audio_encoder: Dock) -> None:
        with refused("modality", "vision encoder"):
            inputs(audio_encoder, ask("q", P[0]))
        with refused("modality", "vision encoder", error=DataError):
            encode(ask("q", P[0], answer="a"), audio_encoder.processor)

    def test_cross_attention_hears_too(self, language_folder: Callable[..., str], whisper_folder: str) -> None:
        from opticnerve.models.vlm.build import dock

        made = dock(
            language=language_folder("llama"), fusion={"type": "cross_attention", "every": 1, "heads": 2},
            audio={"encoder": {"type": "whisper", "name": whisper_folder, "seconds": 1, "pool": 10}},
        )  # fmt: skip
        batch = inputs(made, ask("long", audios=[sound(0, 1.5)]))
        assert int((batch["input_ids"] == made.processor.audio_token_id).sum()) == 2
        made.model(**batch)


def test_an_eye_alone_refuses_sound(docked: Callable[..., Dock]) -> None:
    dock = docked("llama")
    with refused("modality", "audio encoder"):
        inputs(dock, ask("q", audios=[sound(0)]))
    with refused("modality", "audio encoder", error=DataError):
        encode(ask("q", audios=[sound(0)], answer="a"), dock.processor)


def test_placeholders_without_sound_have_both_numbers(both: Dock) -> None:
    batch = inputs(both, ask("sound", audios=[sound(1)]))
    batch.pop("input_features")
    with pytest.raises(ValueError, match="10 audio placeholders in the text, but 0 visual tokens: no input_features"):
        both.model(**batch)
