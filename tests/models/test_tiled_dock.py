"""Pictures in tiles, and pictures in their own shape, on a docked model: one count in training and in use, every row its
own pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.packing import pack
from opticnerve.data.encode.tokenize import encode
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import Dock
from opticnerve.objectives.next_token import NextToken
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")


def picture(seed: int, height: int, width: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


WIDE, TALL, SMALL = picture(0, 30, 90), picture(1, 100, 40), picture(2, 33, 31)


@pytest.fixture(
    params=[
        f"{way} {part}" for way in ("tiles", "native") for part in ("mlp", "shuffle", "resampler", "cross_attention")
    ]
)
def tiled(request: pytest.FixtureRequest, docked: Callable[..., Dock]) -> Dock:
    way, part = request.param.split()
    connectors: dict[str, Any] = {
        "resampler": {"type": "resampler", "num_latents": 3, "heads": 2, "key_value_heads": 1, "head_dim": 4},
        "shuffle": "pixel_shuffle",
    }
    options: dict[str, Any] = {"connector": connectors.get(part, "mlp")}
    if part == "cross_attention":
        options["fusion"] = {"type": "cross_attention", "every": 1, "heads": 2}
    if way == "tiles":
        made = docked("llama", tiling={"type": "anyres"}, **options)
    else:
        made = docked("llama", tiny.native_vision(), **options)
    with torch.no_grad():
        for parameter in made.model.image.connector.parameters():
            parameter.mul_(5)
        for layer in getattr(made.model.image.fusion, "layers", ()):
            layer.alpha_cross_attn.fill_(1.0)
    return made


ASKED = [ask("what?", WIDE), ask("compare them", TALL, SMALL), ask("text alone")]


def test_training_counts_as_use_does(tiled: Dock) -> None:
    for conversation in ASKED:
        used = Answerer(tiled.model, tiled.processor).inputs([conversation])["input_ids"][0].tolist()
        assert encode(conversation, tiled.processor, learn=False).input_ids == used


def test_batch_is_single(tiled: Dock) -> None:
    answerer = Answerer(tiled.model, tiled.processor)
    with torch.no_grad():
        together = tiled.model(**answerer.inputs(ASKED)).logits[:, -1]
        for row, conversation in zip(together, ASKED, strict=True):
            alone = tiled.model(**answerer.inputs([conversation])).logits[0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_beams_keep_their_tiles(tiled: Dock) -> None:
    answerer = Answerer(tiled.model, tiled.processor)
    how = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = tiled.model.generate(**answerer.inputs(ASKED), **how)[:, -4:].tolist()
    assert together == [tiled.model.generate(**answerer.inputs([c]), **how)[0, -4:].tolist() for c in ASKED]


def test_trains_packed_as_unpacked(tiled: Dock) -> None:
    samples = [ask("what?", WIDE, answer="yes"), ask("compare", TALL, SMALL, answer="three foxes")]
    encoded = [encode(s, tiled.processor) for s in samples]

    def total(rows: Any) -> tuple[float, Any]:
        tiled.model.zero_grad()
        loss, _ = NextToken(tiled.model)(Collator(tiled.processor)(rows))
        loss.backward()
        return float(loss.detach()), {
            n: p.grad.clone() for n, p in tiled.model.named_parameters() if p.grad is not None
        }

    packed, together = total([pack([[e] for e in encoded])])
    apart, separate = total([pack([[e]]) for e in encoded])
    assert packed == pytest.approx(apart, rel=1e-5)
    for name, gradient in separate.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=5e-5, msg=name)
    assert getattr(tiled.model.image.tiling, "newline", None) is None or "image.tiling.newline" in separate


def test_save_and_load(tiled: Dock, tmp_path: Path) -> None:
    tiled.model.save_pretrained(tmp_path)
    tiled.processor.save_pretrained(tmp_path)
    model, processor = (
        tf.AutoModelForImageTextToText.from_pretrained(tmp_path),
        tf.AutoProcessor.from_pretrained(tmp_path),
    )
    before, after = Answerer(tiled.model, tiled.processor).inputs(ASKED), Answerer(model, processor).inputs(ASKED)
    assert all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        assert torch.equal(model(**after).logits, tiled.model(**before).logits)


def test_sizes_are_needed(tiled: Dock) -> None:
    batch = Answerer(tiled.model, tiled.processor).inputs(ASKED)
    batch.pop("image_sizes")
    with pytest.raises(ValueError, match="give image_sizes beside pixel_values"):
        tiled.model(**batch)


def test_an_ear_takes_no_tiles() -> None:
    from opticnerve import recipe as recipes

    model = {"language": {"name": "x"}, "audio": {"encoder": {"type": "whisper", "name": "y"}, "tiling": {}}}
    with refused("recipe", "audio.tiling"):
        recipes.load({"model": model})
