"""Tiling against LLaVA-NeXT's own: counts, pictures, and the order of soft tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

import tiny
from errors import refused
from opticnerve.models.vlm.tiling import Tiling
from opticnerve.types import Features

WIDTH = 16
PINPOINTS = {"llava-next": None, "one": [[32, 32]], "many": [[32, 32], [64, 96], [128, 32], [96, 96], [32, 160]]}
# Square, odd, very wide, very tall, tiny, one pixel.
SIZES = [(40, 40), (33, 71), (17, 640), (500, 13), (3, 5), (1, 1), (64, 64), (200, 301)]


def tiling(pinpoints: Any = None, **options: Any) -> Tiling:
    return Tiling.from_options({"pinpoints": pinpoints, **options}, tile_size=32, grid=4, language_width=WIDTH)


def config(made: Tiling) -> tf.LlavaNextConfig:
    return tf.LlavaNextConfig(
        vision_config=tiny.vision_config("clip_vision_model"),
        text_config={"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "vocab_size": 40},
        image_grid_pinpoints=made.options["pinpoints"], image_token_index=39,
    )  # fmt: skip


def theirs(made: Tiling) -> tf.LlavaNextProcessor:
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=made.options["pinpoints"],
    )
    return tf.LlavaNextProcessor(
        images, tiny.tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def onevision(made: Tiling) -> tf.LlavaOnevisionProcessor:
    images = tf.LlavaOnevisionImageProcessor(
        size={"height": 32, "width": 32}, image_grid_pinpoints=made.options["pinpoints"]
    )
    return tf.LlavaOnevisionProcessor(
        images, tiny.tokenizer(), tf.LlavaOnevisionVideoProcessor(), num_image_tokens=16,
        vision_feature_select_strategy="full",
    )  # fmt: skip


@pytest.fixture(scope="module", params=list(PINPOINTS))
def made(request: Any) -> Tiling:
    torch.manual_seed(0)
    return tiling(PINPOINTS[request.param])


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), kind=st.sampled_from(list(PINPOINTS)))
def test_counts_are_llava_nexts(height: int, width: int, kind: str) -> None:
    made = tiling(PINPOINTS[kind])
    processor = _processors.setdefault(kind, theirs(made))
    with_class_token = processor._get_number_of_features(height, width, 32, 32)
    assert made.count(height, width) == with_class_token - 1
    assert made.tiles(height, width) == image_size_to_num_patches((height, width), made.options["pinpoints"], 32)


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), budget=st.integers(1, 9))
def test_counts_within_a_budget_are_llava_onevisions(height: int, width: int, budget: int) -> None:
    made = tiling([[32 * rows, 32 * columns] for rows in range(1, 7) for columns in range(1, 7)], max_tiles=budget)
    processor = _processors.setdefault("onevision", onevision(made))
    processor.vision_aspect_ratio = f"anyres_max_{budget}"
    counted = made.count(height, width)
    assert counted == processor._get_number_of_features(height, width, 32, 32)
    assert counted <= made.spec.max_tokens


@pytest.mark.parametrize(("budget", "grid"), [(0, 4), (1.5, 4), (True, 4), (2, None)])
def test_budgets_that_mean_nothing_are_refused(budget: Any, grid: int | None) -> None:
    with refused("out-of-range" if grid else "unsupported", "max_tiles"):
        Tiling.from_options({"max_tiles": budget}, tile_size=32, grid=grid, tile_tokens=16, language_width=WIDTH)


_processors: dict[str, Any] = {}


def test_tiles_are_llava_nexts(made: Tiling) -> None:
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]
    ours = made.image_processor(tf.CLIPImageProcessor())(pictures, return_tensors="pt")
    reference = theirs(made).image_processor(pictures, return_tensors="pt")
    flat = [tiles[: made.tiles(*s)] for tiles, s in zip(reference["pixel_values"], SIZES, strict=True)]
    torch.testing.assert_close(ours["pixel_values"], torch.cat(flat), rtol=0, atol=1e-5)
    assert ours["image_sizes"].tolist() == reference["image_sizes"].tolist()


def test_the_order_of_tokens_is_llava_nexts(made: Tiling) -> None:
    reference = LlavaNextModel(config(made))
    tiles = [made.tiles(*s) for s in SIZES]
    tokens_TMD = torch.randn(sum(tiles), 16, WIDTH)
    assert made.newline is not None
    rows, lengths = reference.pack_image_features(
        torch.split(tokens_TMD, tiles), torch.tensor(SIZES), "default", image_newline=made.newline
    )
    ours = made.arrange(Features(tokens_TMD, torch.ones(tokens_TMD.shape[:2], dtype=torch.bool)), torch.tensor(SIZES))
    assert ours.mask_BN.sum(1).tolist() == lengths.tolist() == [made.count(*s) for s in SIZES]
    for row_ND, mask_N, expected_ND in zip(ours.tokens_BND, ours.mask_BN, rows, strict=True):
        torch.testing.assert_close(row_ND[mask_N], expected_ND, rtol=0, atol=0)


def test_newline_is_drawn_as_llava_next_draws_it() -> None:
    torch.manual_seed(0)
    made = Tiling.from_options({}, tile_size=32, grid=4, language_width=4096)
    assert made.newline is not None
    assert float(made.newline.detach().std()) == pytest.approx(4096**-0.5, rel=0.05)
