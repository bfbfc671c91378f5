"""`hf-llava-next`: tiles in stock transformers, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import tiny
from errors import refused
from opticnerve.export.export import export

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Path]
KINDS: dict[str, dict[str, Any]] = {
    "clip": {"vision_encoder": "clip_vision_model", "layer": -2},
    "siglip, one matrix, other tiles": {
        "vision_encoder": "siglip_vision_model", "connector": "linear", "image_size": 48,
        "tiling": {"type": "anyres", "pinpoints": [[48, 96], [144, 48]]},
    },
}  # fmt: skip


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", list(KINDS))
def test_stock_transformers_gives_the_same_answers(kind: str, saved: Make, tmp_path: Path) -> None:
    """Pictures of other shapes among the samples, two in one prompt."""
    source = saved(**{"family": "mistral", "tiling": {"type": "anyres"}, **KINDS[kind]})
    made = export(source, "hf-llava-next", tmp_path / "out")
    assert made.proof is not None
    assert made.proof.difference <= 1e-5
    assert tf.AutoConfig.from_pretrained(tmp_path / "out").model_type == "llava_next"
    assert type(tf.AutoProcessor.from_pretrained(tmp_path / "out").image_processor) is tf.LlavaNextImageProcessor


def test_what_is_exported_comes_back(comes_back: Callable[..., None], saved: Make) -> None:
    source = saved("llama", "clip_vision_model", layer=-2, tiling={"type": "anyres"})
    comes_back(source, "hf-llava-next", tiny.picture(3, 70).resize((25, 70)), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tiling": None}, "it shows pictures whole"),
        ({"tiling": {"type": "anyres", "thumbnail": False}}, "'thumbnail': False"),
        ({"tiling": {"type": "anyres", "max_tiles": 2}}, "'max_tiles': 2"),
        ({"connector": {"type": "resampler", "num_latents": 4}}, "its connector is resampler"),
        ({"vision_encoder": "pixtral", "fit": "native", "tiling": None}, "in their own shape"),
    ],
)
def test_what_llava_next_cannot_hold_is_refused_with_a_way_out(
    options: dict[str, Any], reason: str, saved: Make, tmp_path: Path
) -> None:
    options = {"vision_encoder": "siglip_vision_model", "tiling": {"type": "anyres"}, **options}
    with refused("unsupported", reason, "nearest"):
        export(saved(**options), "hf-llava-next", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
